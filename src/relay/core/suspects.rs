//! Events that are refused, or may be: looked at one at a time, with nothing of their lane on its way.

use std::time::Duration;

use rdkafka::types::RDKafkaErrorCode as Code;

use super::{Core, Phase, prepare};
use crate::{
    event::Event,
    relay::{
        lanes::{Lane, Waiting},
        retry::{Decision, decide},
        topics::State,
    },
    sink::{Kind, Sink, Ticket, Unit, classify},
};

/// A suspect of a refused batch, tried on its own.
#[derive(Debug)]
pub(super) struct Trial {
    pub waiting: Waiting,
    pub attempts: u32,
    pub due: Duration,
}

impl Core {
    /// Stops the lane behind an event that is refused, or may be: it is looked at again once nothing
    /// of the lane is on its way, so that no earlier event is held with it.
    pub(super) fn try_alone(&mut self, ticket: Ticket, lane: Option<Lane>, event: Event, now: Duration) {
        self.lanes.stop(lane, lane.map_or(0, |lane| self.ledger.in_sink_of(lane)));
        self.trials.push_back(Trial { waiting: Waiting { ticket, event }, attempts: 0, due: now });
    }

    /// Looks at the suspects: what can be refused without the broker is, and one is sent at a time.
    pub(super) fn start_trials<S: Sink>(&mut self, now: Duration, sink: &S) {
        while self.phase == Phase::Running
            && self.lease_until.is_some()
            && self.trying.is_none()
            && let Some(trial) = self.next_trial(now)
        {
            self.start_trial(trial, now, sink);
        }
    }

    pub(super) fn next_trial(&mut self, now: Duration) -> Option<Trial> {
        let ready = self.trials.iter().position(|trial| trial.due <= now && self.is_ready_for(trial))?;
        self.trials.remove(ready)
    }

    pub(super) fn start_trial<S: Sink>(&mut self, trial: Trial, now: Duration, sink: &S) {
        let Trial { waiting: Waiting { ticket, event }, attempts, .. } = trial;
        let Some(entry) = self.ledger.get(ticket) else { return };
        let rules = self.tables[entry.table.0 as usize].clone();
        let topic = entry.topic.map(|topic| self.topics.get(topic));
        let sent = match prepare(&rules, &event, topic) {
            Ok(prepared) => sink.send(Unit::Suspects, ticket, &prepared.record),
            Err(reason) => return self.reject(ticket, &rules, &event, reason, attempts),
        };
        match sent {
            Ok(()) => {
                self.ledger.sent(ticket, now, None);
                self.trying = Some((ticket, event, attempts));
            }
            Err(code) => self.failed_on_trial(ticket, event, attempts + 1, code, now),
        }
    }

    /// Whether a suspect may be looked at: its topic is known, and nothing of its lane on its way.
    pub(super) fn is_ready_for(&self, trial: &Trial) -> bool {
        let Some(entry) = self.ledger.get(trial.waiting.ticket) else { return true };
        let ready = |topic| matches!(self.topics.get(topic).state, State::Ready);
        entry.topic.is_none_or(ready) && self.lanes.is_clear(entry.lane)
    }

    pub(super) fn failed_on_trial(
        &mut self,
        ticket: Ticket,
        event: Event,
        attempts: u32,
        code: Code,
        now: Duration,
    ) {
        let Some(entry) = self.ledger.get(ticket) else { return };
        let (table, topic) = (entry.table, entry.topic);
        let rules = self.tables[table.0 as usize].clone();
        let kind = classify::classify(code);
        if kind != Kind::Rejected {
            self.metrics.publish_failures(&rules.name, kind.label()).inc();
        }
        match decide(kind) {
            Decision::Retry => {
                self.metrics.retries(&rules.name, kind.label()).inc();
                if classify::is_about_topic(code) {
                    self.block_topic(topic, code, now);
                }
                let due = now + rules.retry.pause(attempts, fastrand::f64());
                self.trials.push_back(Trial { waiting: Waiting { ticket, event }, attempts, due });
            }
            Decision::Park => {
                let reason = format!("kafka refused it: {code} ({code:?})");
                self.reject(ticket, &rules, &event, reason, attempts);
            }
            // The careful producer died too (a lost session, not this record): start over.
            Decision::Rebuild => self.phase = Phase::Failing { since: now },
        }
    }
}
