//! What the log and the traces are told of single events, so that a request can be followed: only where
//! `log.context` or `telemetry` ask for it. What cannot be published at all is told in any case, where it
//! happens.

use std::time::{Duration, SystemTime};

use rdkafka::types::RDKafkaErrorCode as Code;
use tracing::{field::display, info};

use super::{super::ledger::Entry, Core, Table, passing::event_id};
use crate::{event::Event, record::Trail, sink::Ticket, source::Cause, telemetry::Sending};

impl Core {
    /// An event is published.
    pub(super) fn tell_published(&self, entry: &Entry, trail: &Trail) {
        let Some(context) = &trail.context else { return };
        let (table, place, id) = (self.table_of(entry), &entry.place, &*trail.id);
        let topic = entry.topic.map(|topic| self.topics.get(topic).name.as_str());
        let context = display(context);
        let partition = trail.landed.map(|landed| landed.partition);
        let offset = trail.landed.and_then(|landed| landed.offset);
        if trail.replay {
            info!(
                table, %place, id, topic, partition, offset, context,
                "event is published again: it was to be replayed"
            );
        } else {
            info!(table, %place, id, topic, partition, offset, context, "event is published");
        }
    }

    /// A generation ends: what it had sent is sent again by the next one.
    pub(super) fn tell_sent_again(&self, forgotten: &[Entry]) {
        for entry in forgotten {
            let Some(trail) = &entry.trail else { continue };
            let Some(context) = &trail.context else { continue };
            let (table, place, id) = (self.table_of(entry), &entry.place, &*trail.id);
            let context = display(context);
            info!(table, %place, id, context, "event is not acknowledged: it is read and sent again");
        }
    }

    /// An event was sent, and Kafka has answered.
    pub(super) fn trace(&self, entry: &Entry, trail: &Trail, error: Option<Code>) {
        let (Some(spans), Some(parent)) = (&self.spans, &trail.parent) else { return };
        let (Some(topic), Some(sent_at)) = (entry.topic, entry.sent_at) else { return };
        let answered = SystemTime::UNIX_EPOCH + Duration::from_millis(self.wall_ms.unsigned_abs());
        let error = error.map(|code| format!("{code:?}"));
        let sending = Sending {
            event_id: &trail.id,
            table: self.table_of(entry),
            topic: &self.topics.get(topic).name,
            // What is replayed did not wait.
            created_ms: entry.timestamp_ms.filter(|_| !trail.replay),
            sent: answered.checked_sub(self.now.saturating_sub(sent_at)).unwrap_or(answered),
            answered,
            landed: trail.landed,
            error: error.as_deref(),
        };
        spans.sent(parent, &sending);
    }

    /// Kafka has refused an event that the sink had.
    pub(super) fn trace_failed(&self, ticket: Ticket, code: Code) {
        if let Some(entry) = self.ledger.get(ticket)
            && let Some(trail) = &entry.trail
        {
            self.trace(entry, trail, Some(code));
        }
    }

    fn table_of(&self, entry: &Entry) -> &str {
        &self.tables[entry.table.0 as usize].name
    }
}

/// An event was refused for a reason that may pass.
pub(super) fn tried_again(rules: &Table, event: &Event, attempts: u32) {
    let Some(context) = rules.rules.log_context(event) else { return };
    let (table, place, id) = (rules.name.as_str(), &event.place, event_id(rules, event));
    info!(table, %place, id, context = %context, attempts, "event failed and is tried again");
}

/// An event is held for the sake of something else. What is parked for its own sake is told as an error.
pub(super) fn held(rules: &Table, event: &Event, cause: Cause, reason: &str) {
    if cause.is_its_own() {
        return;
    }
    let Some(context) = rules.rules.log_context(event) else { return };
    let (table, place, id) = (rules.name.as_str(), &event.place, event_id(rules, event));
    info!(table, %place, id, context = %context, cause = cause.as_str(), reason, "event is held");
}
