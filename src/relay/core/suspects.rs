//! Events that are refused, or may be: looked at one at a time, with nothing of their lane on its way.

use std::time::Duration;

use rdkafka::types::RDKafkaErrorCode as Code;
use tracing::warn;

use super::{
    Core, Phase, Table,
    passing::{Refused, event_id, prepare},
    told,
    transaction::Transaction,
};
use crate::{
    config::OnFailure,
    event::Event,
    record::{Failure, Oversize, Packed},
    relay::{
        lanes::{Lane, Waiting},
        retry::{Decision, GiveUp, decide},
        topics::State,
    },
    sink::{Kind, Sink, Ticket, Unit, classify},
    source::Cause,
};

/// A failing event goes from topic to topic after this, as if the topic were at fault: its lane must
/// not wait in memory for ever.
const FAILING_AT_MOST: Duration = Duration::from_secs(30);

/// An event that is handled on its own.
#[derive(Debug)]
pub(super) struct Trial {
    pub waiting: Waiting,
    pub attempts: u32,
    /// Since when it has been failing, by itself.
    pub failing_since: Option<Duration>,
    pub due: Duration,
    pub step: Step,
}

#[derive(Debug)]
pub(super) enum Step {
    /// Send it, alone.
    Send,
    /// Nothing is wrong with it: it goes on when its topic is there.
    Wait,
    /// Its time is up.
    GiveUp,
    /// It can never go: its payload cannot be packed.
    Refuse { reason: String, oversize: bool },
    /// Send its dead letter to the topic of this index.
    Bury { cause: Cause, failure: Failure, letters: u32 },
}

impl Core {
    /// Stops the lane behind an event that is refused, or may be: it is looked at again once nothing
    /// of the lane is on its way, so that no earlier event is held with it.
    pub(super) fn try_alone(
        &mut self,
        ticket: Ticket,
        lane: Option<Lane>,
        event: Event,
        step: Step,
        now: Duration,
    ) {
        self.lanes.stop(lane, lane.map_or(0, |lane| self.ledger.in_sink_of(lane)));
        let waiting = Waiting { ticket, event };
        self.trials.push_back(Trial { waiting, attempts: 0, failing_since: None, due: now, step });
    }

    /// Looks at the suspects: what can be refused without the broker is, and one is sent at a time.
    pub(super) fn start_trials<S: Sink>(&mut self, now: Duration, sink: &S) {
        while self.phase == Phase::Running
            && self.lease_until.is_some()
            && self.trying.is_none()
            && self.transaction.as_ref().is_none_or(Transaction::is_idle)
            && let Some(trial) = self.next_trial(now)
        {
            self.start_trial(trial, now, sink);
        }
    }

    fn next_trial(&mut self, now: Duration) -> Option<Trial> {
        let ready = self.trials.iter().position(|trial| trial.due <= now && self.is_ready_for(trial))?;
        self.trials.remove(ready)
    }

    /// Whether a suspect may be looked at: its topic is known, and nothing of its lane on its way.
    pub(super) fn is_ready_for(&self, trial: &Trial) -> bool {
        let Some(entry) = self.ledger.get(trial.waiting.ticket) else { return true };
        let topic = match &trial.step {
            Step::Send | Step::Wait => entry.topic.is_none_or(|topic| self.topics.get(topic).is_usable()),
            Step::GiveUp | Step::Refuse { .. } => true,
            // A topic for dead letters that is missing is an answer too.
            Step::Bury { letters, .. } => {
                let letters = self.topics.get(*letters);
                letters.is_usable() || letters.trouble.is_some_and(|trouble| trouble.its_own)
            }
        };
        topic && self.lanes.is_clear(entry.lane)
    }

    pub(super) fn start_trial<S: Sink>(&mut self, trial: Trial, now: Duration, sink: &S) {
        let ticket = trial.waiting.ticket;
        let Some(entry) = self.ledger.get(ticket) else { return };
        let (rules, topic, lane) = (self.tables[entry.table.0 as usize].clone(), entry.topic, entry.lane);
        if matches!(trial.step, Step::Wait) {
            let waited = self.lanes.open(lane);
            return self.pass_all(std::iter::once(trial.waiting).chain(waited), now, sink);
        }
        let sent = match &trial.step {
            Step::Send | Step::Wait => {
                let topic = topic.map(|topic| self.topics.get(topic));
                let packed = self.packing.of(ticket);
                let next = (packed.map_or(1, Packed::records), entry.records.acknowledged);
                match prepare(&rules, &trial.waiting.event, packed.map(|packed| (packed, next.1)), topic) {
                    Ok(mut prepared) => {
                        if let Some(trail) = prepared.trail.take() {
                            self.window.adjust(0, self.ledger.follow(ticket, trail));
                        }
                        let sent = sink.send(Unit::Suspects, ticket, &prepared.record);
                        self.ledger.takes(ticket, next.0);
                        sent
                    }
                    Err(refused) => return self.refuse(trial, &rules, refused, now),
                }
            }
            Step::Refuse { reason, oversize } => {
                let refused = Refused { reason: reason.clone(), oversize: *oversize };
                return self.refuse(trial, &rules, refused, now);
            }
            Step::GiveUp => {
                let reason = match topic {
                    Some(topic) if self.topics.get(topic).is_usable() => self.packing.trouble(),
                    Some(topic) => self.topic_trouble(topic),
                    None => "its topic cannot be told".into(),
                };
                return self.fail(trial, &rules, Kind::Transient, reason, rules.give_up, now);
            }
            Step::Bury { failure, letters, .. } => {
                let letters = self.topics.get(*letters);
                if !matches!(letters.state, State::Ready) {
                    let why = self.topic_trouble_of(letters);
                    return self.park_unburied(&trial, &rules, &why);
                }
                let event = &trial.waiting.event;
                let at = chrono::DateTime::from_timestamp_millis(self.wall_ms).unwrap_or_default();
                let at = at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
                let record = rules.rules.dead_letter(event, &rules.name, &letters.name, failure, at);
                let (size, limit) = (record.wire_size(), letters.max_message_bytes);
                if limit.is_some_and(|limit| size > limit) {
                    let why =
                        format!("the dead letter would have {size} bytes, more than {} takes", letters.name);
                    drop(record);
                    return self.park_unburied(&trial, &rules, &why);
                }
                sink.send(Unit::Suspects, ticket, &record)
            }
        };
        if let Step::Bury { letters, .. } = &trial.step {
            let before = self.ledger.get(ticket).map_or(0, |entry| entry.records.acknowledged);
            self.ledger.takes(ticket, before + 1);
            self.ledger.moved(ticket, *letters);
        }
        match sent {
            Ok(()) => {
                self.ledger.sent(ticket, now, None);
                if let Some(transaction) = &mut self.transaction {
                    // It has one of its own, which is dropped if it is refused.
                    transaction.sends(now);
                    transaction.close(now);
                }
                self.trying = Some((ticket, trial));
            }
            Err(code) => self.failed_on_trial(trial, code, now),
        }
    }

    pub(super) fn failed_on_trial(&mut self, mut trial: Trial, code: Code, now: Duration) {
        let Some(entry) = self.ledger.get(trial.waiting.ticket) else { return };
        let (table, topic) = (entry.table, entry.topic);
        let rules = self.tables[table.0 as usize].clone();
        let kind = classify::classify(code);
        trial.attempts += 1;
        let since = *trial.failing_since.get_or_insert(now);
        if kind == Kind::Fatal {
            // The careful producer died too (a lost session, not this record): start over.
            self.metrics.publish_failures(&rules.name, kind.label()).inc();
            self.phase = Phase::Failing { since: now };
            return;
        }
        if self.transaction.is_some() {
            self.ledger.undone(trial.waiting.ticket);
            self.drop_transaction();
        }
        if kind == Kind::Transient && classify::is_about_topic(code) {
            self.block_topic(topic, Some(code), now);
        } else if kind == Kind::Transient && now.saturating_sub(since) >= FAILING_AT_MOST {
            self.topic_is_at_fault(topic, code, now);
        }
        let reason = format!("kafka refused it: {code} ({code:?})");
        match &trial.step {
            Step::Bury { .. } if kind == Kind::Rejected => self.park_unburied(&trial, &rules, &reason),
            Step::Bury { .. } => self.try_again(trial, &rules, now),
            Step::Send | Step::Wait | Step::GiveUp | Step::Refuse { .. } => {
                self.fail(trial, &rules, kind, reason, rules.give_up, now);
            }
        }
    }

    fn try_again(&mut self, mut trial: Trial, rules: &Table, now: Duration) {
        self.metrics.retries(&rules.name, Kind::Transient.label()).inc();
        trial.due = now + rules.retry.pause(trial.attempts, fastrand::f64());
        told::tried_again(rules, &trial.waiting.event, trial.attempts);
        self.trials.push_back(trial);
    }

    /// There can be no record of an event: what its table does with such events.
    fn refuse(&mut self, trial: Trial, rules: &Table, refused: Refused, now: Duration) {
        let then = match rules.rules.oversize() {
            Oversize::Park if refused.oversize => OnFailure::Park,
            Oversize::DeadLetter if refused.oversize => OnFailure::DeadLetter,
            _ => rules.give_up.then,
        };
        let give_up = GiveUp { then, ..rules.give_up };
        self.fail(trial, rules, Kind::Rejected, refused.reason, give_up, now);
    }

    /// An event failed on its own: again, or what the table does with such events.
    fn fail(
        &mut self,
        mut trial: Trial,
        rules: &Table,
        kind: Kind,
        reason: String,
        give_up: GiveUp,
        now: Duration,
    ) {
        let Waiting { ticket, event } = &trial.waiting;
        let ticket = *ticket;
        if event.replay.is_some() && (kind == Kind::Rejected || matches!(trial.step, Step::GiveUp)) {
            return self.refuse_replay(ticket, rules, event, &reason);
        }
        let failing = match trial.step {
            Step::GiveUp => Duration::MAX,
            _ => trial.failing_since.map_or(Duration::ZERO, |since| now.saturating_sub(since)),
        };
        self.metrics.publish_failures(&rules.name, kind.label()).inc();
        // It waited while its topic was tried, and what there can be no record of was tried too.
        let of_topic = self.ledger.get(ticket).and_then(|entry| entry.topic);
        let of_topic = of_topic.map(|topic| self.topics.get(topic)).filter(|topic| topic.trouble.is_some());
        let attempts = trial.attempts.max(of_topic.map_or(1, |topic| topic.attempts)).max(1);
        match decide(kind, failing, give_up) {
            Decision::Retry => self.try_again(trial, rules, now),
            Decision::Park(cause) | Decision::Halt(cause) => {
                self.park(ticket, rules, event, cause, reason, attempts);
            }
            Decision::DeadLetter(cause) => {
                let failure = Failure { kind: cause.as_str(), message: reason, attempts };
                let letters = match (rules.rules.dead_letter_topic(event), event.unread_bytes) {
                    (Ok(_), Some(_)) => Err("its payload was not read".to_owned()),
                    (Ok(name), None) => Ok(self.topic(&name)),
                    (Err(rejection), _) => Err(rejection.to_string()),
                };
                trial.due = now;
                match letters {
                    Ok(letters) => {
                        trial.step = Step::Bury { cause, failure, letters };
                        self.trials.push_back(trial);
                    }
                    Err(why) => {
                        trial.step = Step::Bury { cause, failure, letters: 0 };
                        self.park_unburied(&trial, rules, &why);
                    }
                }
            }
            Decision::Rebuild => self.phase = Phase::Failing { since: now },
        }
    }

    /// A dead letter was refused too: its event is parked.
    fn park_unburied(&mut self, trial: &Trial, rules: &Table, why: &str) {
        let Step::Bury { cause, failure, .. } = &trial.step else { return };
        let reason = format!("{}; and there can be no dead letter: {why}", failure.message);
        self.park(trial.waiting.ticket, rules, &trial.waiting.event, *cause, reason, failure.attempts);
    }

    /// The dead letter of an event was acknowledged.
    pub(super) fn buried(
        &mut self,
        rules: &Table,
        event: &Event,
        cause: Cause,
        failure: &Failure,
        letters: u32,
    ) {
        let context = rules.rules.log_context(event);
        warn!(
            table = rules.name.as_str(), place = %event.place, id = event_id(rules, event),
            context = context.as_ref().map(display), reason = failure.message, cause = cause.as_str(), attempts = failure.attempts,
            dead_letter_topic = self.topics.get(letters).name,
            "event can never be published as it is: its dead letter is published and its key flows on"
        );
        self.metrics.dead_lettered(&rules.name, cause.as_str()).inc();
    }

    /// How many events wait behind the suspects of a topic.
    pub(super) fn wait_behind_trials_of(&self, topic: u32) -> usize {
        let entries = self.trials.iter().filter_map(|trial| self.ledger.get(trial.waiting.ticket));
        entries
            .filter(|entry| entry.topic == Some(topic))
            .map(|entry| self.lanes.waiting_in(entry.lane))
            .sum()
    }

    /// Holds the suspects of a topic, and what waits behind them, because of the topic.
    pub(super) fn hold_trials_of(&mut self, topic: u32) {
        let of_topic = |core: &Core, trial: &Trial| {
            let entry = core.ledger.get(trial.waiting.ticket);
            matches!(trial.step, Step::Send | Step::Wait)
                && entry.is_some_and(|entry| entry.topic == Some(topic))
        };
        if self.trials.is_empty() {
            return;
        }
        let trials = std::mem::take(&mut self.trials);
        let (held, kept): (Vec<Trial>, Vec<Trial>) =
            trials.into_iter().partition(|trial| of_topic(self, trial) && self.is_still(trial));
        self.trials = kept.into();
        let reason = self.topic_trouble(topic);
        for Trial { waiting, attempts, .. } in held {
            let Some(entry) = self.ledger.get(waiting.ticket) else { continue };
            let (table, lane) = (entry.table, entry.lane);
            let rules = self.tables[table.0 as usize].clone();
            self.hold(waiting.ticket, &rules, &waiting.event, Cause::Topic, reason.clone(), attempts);
            for Waiting { ticket, event } in self.lanes.open(lane) {
                self.hold(ticket, &rules, &event, Cause::Topic, reason.clone(), 0);
            }
        }
    }

    /// Whether nothing of a suspect's lane is on its way.
    fn is_still(&self, trial: &Trial) -> bool {
        self.ledger.get(trial.waiting.ticket).is_some_and(|entry| self.lanes.is_clear(entry.lane))
    }
}
