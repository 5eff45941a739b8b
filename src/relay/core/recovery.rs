//! The way back from every fault: the generation ends, the producers are thrown away, and what is not
//! recorded is read again.

use std::time::Duration;

use rdkafka::types::RDKafkaErrorCode as Code;
use tracing::warn;

use super::{Core, Phase, Rebuild};
use crate::{
    relay::retry::Policy,
    sink::{Kind, Sink, Ticket, classify},
};

/// How long a failing producer may take to report on what it has.
pub(super) const FAILING_AT_MOST: Duration = Duration::from_secs(1);

/// Before the next rebuild, where the last ones did not help.
pub(super) fn rebuild_pause(attempt: u32) -> Duration {
    Policy::default().pause(attempt, fastrand::f64())
}

impl Core {
    /// A record that the pipelined producer did not deliver. Its later records of the same key may
    /// be on their way, so the producer is finished: what it has is read again, in order.
    pub(super) fn failed_in_pipeline(&mut self, ticket: Ticket, code: Code, now: Duration) {
        self.trace_failed(ticket, code);
        let Some(entry) = self.ledger.returned(ticket) else { return };
        let (table, place, topic) = (entry.table, entry.place.clone(), entry.topic);
        let trail = entry.trail.as_ref().filter(|trail| trail.context.is_some());
        let (id, context) =
            (trail.map(|trail| trail.id.clone()), trail.and_then(|trail| trail.context.clone()));
        let rules = self.tables[table.0 as usize].clone();
        let kind = classify::classify(code);
        self.metrics.publish_failures(&rules.name, kind.label()).inc();
        if classify::is_about_topic(code) {
            self.block_topic(topic, Some(code), now);
        } else if classify::is_about_size(code) && self.ask_for_limit(topic) {
            // The new limit tells which records are too large, and how large a batch may be.
        } else if kind == Kind::Rejected {
            self.suspects.insert((table, place.clone()));
        } else if kind == Kind::Transient && !self.failed_once.insert((table, place.clone())) {
            // Twice: it may fail for ever, and everything else must not fail with it.
            self.suspects.insert((table, place.clone()));
        }
        if self.phase == Phase::Running {
            warn!(
                table = rules.name.as_str(), place = %place, id = id.as_deref(), error = %code, kind = kind.label(),
                context = context.as_ref().map(display),
                "kafka did not take a record; the producer is rebuilt and what it had is read again"
            );
            self.phase = Phase::Failing { since: now };
        }
    }

    /// What follows from the state, whatever the action was.
    pub(super) fn upkeep<S: Sink>(&mut self, now: Duration, sink: &S) {
        if self.lease_until.is_some_and(|until| now >= until) {
            self.lease_until = None;
        }
        if self.lease_until.is_none() && std::mem::take(&mut self.owned) {
            warn!("the lease is lost: what is in flight is thrown away, the next owner reads it");
            self.start_over();
        }
        match self.phase {
            Phase::Failing { since } if self.ledger.in_sink() == 0 || now >= since + FAILING_AT_MOST => {
                self.rebuilds += 1;
                // The first rebuild comes at once; only one that did not help is followed by a pause.
                match self.rebuilds {
                    1 => self.start_over(),
                    n => self.phase = Phase::Pausing { until: now + rebuild_pause(n - 1) },
                }
            }
            Phase::Pausing { until } if now >= until => self.start_over(),
            _ => {}
        }
        self.give_back_what_failed();
        if self.phase == Phase::Running {
            if self.may_send() {
                self.effects.look_up.extend(self.topics.due(now));
                self.look_at_bad_topics(now, sink);
                self.release_ready_topics();
                self.look_at_store(now, sink);
                self.start_trials(now, sink);
            } else if !self.is_barred() {
                self.look_for_stalls(now);
            }
            self.look_at_transaction(now, sink);
        }
    }

    /// Whether other producers are due than those that are being made, in transactions.
    pub(super) fn is_overtaken(&self) -> bool {
        self.rebuilding.is_some_and(|(_, generation)| self.is_overtaken_since(generation))
    }

    pub(super) fn is_overtaken_since(&self, generation: u32) -> bool {
        self.transaction.is_some() && generation != self.ledger.generation()
    }

    /// Asks for new producers. Those of a rebuild that is under way have not been used and will do.
    pub(super) fn rebuild(&mut self) {
        self.phase = Phase::Rebuilding;
        if self.rebuilding.is_none() {
            self.rebuilding = Some((self.batch_bytes, self.ledger.generation()));
            let take_over = self.transaction.is_some() && self.lease_until.is_some();
            self.effects.rebuild = Some(Rebuild { batch_bytes: self.batch_bytes, take_over });
        }
    }

    /// Ends the generation: producers and everything in flight are thrown away, and the sources
    /// read again what is not recorded.
    pub(super) fn start_over(&mut self) {
        let forgotten = self.ledger.next_generation();
        self.tell_sent_again(&forgotten);
        let bytes = forgotten.iter().map(|entry| entry.bytes).sum();
        self.window.release(forgotten.len(), bytes);
        self.lanes.clear();
        for progress in &mut self.progress {
            progress.open = 0;
            progress.listed.clear();
            progress.closing.clear();
            // Forgotten with everything else.
            progress.holds.clear();
            progress.forgotten.clear();
        }
        self.topics.start_over();
        self.packing.start_over();
        self.effects.pack.clear();
        self.trials.clear();
        self.trying = None;
        self.holding = 0;
        self.rebuild();
        match &mut self.transaction {
            // The sources may read when it is known what is published: see `taken_over`.
            Some(transaction) => {
                transaction.start_over();
                (self.effects.restart, self.effects.settle) = (None, None);
                (self.effects.end, self.effects.note) = (None, None);
            }
            None => self.effects.restart = Some(self.ledger.generation()),
        }
    }
}
