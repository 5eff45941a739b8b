//! An event goes out, or has to wait: for its lane, its topic, its partition, its payload. Or it is held.

use std::time::Duration;

use super::{
    super::{
        lanes::{Gate, Waiting},
        ledger::Entry,
        topics::{Topic, Warmth, partition_of},
    },
    Core, Phase, Table,
    suspects::Step,
    window_bytes,
};
use crate::{
    config::Order,
    event::{Event, TableIx},
    record::{Packed, Prepared, is_legal_topic},
    sink::{Sink, Ticket, Unit},
};

impl Core {
    /// Takes a fresh event in and sends it, or lets it wait, or holds it.
    pub(super) fn admit<S: Sink>(
        &mut self,
        table: TableIx,
        rules: &Table,
        event: Event,
        now: Duration,
        sink: &S,
    ) {
        let route = rules.rules.route(&event);
        let (topic, lane) = match &route {
            // Refused when its record is prepared; no broker need be asked.
            Ok(route) if !is_legal_topic(&route.topic) => {
                (None, self.lane_of(table, rules.order, &event, &route.topic, route.key.as_deref()))
            }
            Ok(route) => {
                let topic = self.topic(&route.topic);
                let key = route.key.as_deref();
                (Some(topic), self.lane_of(table, rules.order, &event, &route.topic, key))
            }
            // Without a topic there is no key to keep in order: such an event holds only itself,
            // except where the table is one lane.
            Err(_) => (None, self.lane_of(table, rules.order, &event, "", None)),
        };
        drop(route);
        self.progress[table.0 as usize].open += 1;
        let fresh = Entry::new(table, event.place.clone(), window_bytes(&event));
        let ticket = self.ledger.admit(Entry { lane, topic, timestamp_ms: event.timestamp_ms, ..fresh });
        self.pass(ticket, rules, event, now, sink);
    }

    /// Sends an admitted event, or stops it where it has to wait.
    pub(super) fn pass<S: Sink>(
        &mut self,
        ticket: Ticket,
        rules: &Table,
        event: Event,
        now: Duration,
        sink: &S,
    ) {
        let Some(entry) = self.ledger.get(ticket) else { return };
        let (table, lane, topic) = (entry.table, entry.lane, entry.topic);
        if self.phase != Phase::Running || self.lease_until.is_none_or(|until| now >= until) {
            // This generation is over, or about to be: the row is read again.
            return;
        }
        match self.lanes.gate(table, lane) {
            Gate::Open => {}
            Gate::Trying => {
                let mut event = event;
                self.pack_ahead(ticket, rules, &mut event, topic, now);
                return self.lanes.wait(lane, Waiting { ticket, event });
            }
            Gate::Closed(why) => return self.hold_behind(ticket, rules, &event, why),
        }
        let bad = topic.map(|topic| self.topics.get(topic)).filter(|topic| !topic.is_usable());
        let is_bad = bad.is_some();
        // What is held for the topic is earlier, and is released to be given up first.
        let first = !self.is_held_for_topic(table, rules.order, topic);
        let given_up = first && bad.is_some_and(|topic| topic.is_given_up(rules.give_up.after, now));
        if given_up {
            return self.try_alone(ticket, lane, event, Step::GiveUp, now);
        }
        if let Some((cause, reason)) = self.closed(table, rules, topic, &event) {
            return self.hold(ticket, rules, &event, cause, reason, 0);
        }
        if let Some(topic) = topic.filter(|_| is_bad) {
            if rules.order == Order::Table {
                // The next one may have another topic.
                return self.try_alone(ticket, lane, event, Step::Wait, now);
            }
            let bytes = window_bytes(&event);
            return self.topics.get_mut(topic).wait(Waiting { ticket, event }, bytes);
        }
        // The partition that has to be warm first; only an event with an order minds.
        let mut cold = None;
        if let (Some(index), true) = (topic, lane.is_some()) {
            match self.topics.get(index).warmth(|count| partition(rules, &event, count)) {
                Warmth::Warm => {}
                Warmth::Cold(partition) => cold = Some(partition),
                Warmth::Warming(partition) => {
                    // Before its lane may be stopped: earlier events of it may wait there too.
                    let mut event = event;
                    self.pack_ahead(ticket, rules, &mut event, topic, now);
                    let topic = self.topics.get_mut(index);
                    return topic.wait_for_warmth(partition, Waiting { ticket, event });
                }
            }
        }
        if let Some(event) = self.packed_or_stopped(ticket, rules, event, now) {
            self.send(ticket, rules, event, cold, now, sink);
        }
    }

    /// Sends the record of an event, or its chunks; one alone where it warms the partition `cold`.
    fn send<S: Sink>(
        &mut self,
        ticket: Ticket,
        rules: &Table,
        event: Event,
        cold: Option<u32>,
        now: Duration,
        sink: &S,
    ) {
        let Some(entry) = self.ledger.get(ticket) else { return };
        let (table, lane, topic, first) = (entry.table, entry.lane, entry.topic, entry.records.sent);
        if !self.suspects.is_empty() && self.suspects.contains(&(table, event.place.clone())) {
            return self.try_alone(ticket, lane, event, Step::Send, now);
        }
        let packed = self.packing.of(ticket);
        let topic_facts = topic.map(|topic| self.topics.get(topic));
        let records = packed.map_or(1, Packed::records);
        // A partition is warmed by one record; the others of the event wait with the rest.
        let last = if cold.is_some() { records.min(first + 1) } else { records };
        for index in first..last {
            let packed = packed.map(|packed| (packed, index));
            let mut prepared = match prepare(rules, &event, packed, topic_facts) {
                Ok(prepared) => prepared,
                // The topic takes less than when it was packed.
                Err(Refused { oversize: true, .. }) if packed.is_some() && index == 0 => {
                    self.packing.forget(ticket);
                    return self.pass(ticket, rules, event, now, sink);
                }
                Err(_) => return self.try_alone(ticket, lane, event, Step::Send, now),
            };
            if index == 0 {
                self.metrics.count_dropped(&rules.name, &prepared.dropped);
            }
            let more = prepared.trail.take().map_or(0, |trail| self.ledger.follow(ticket, trail));
            if more + prepared.grown > 0 {
                self.ledger.grows(ticket, prepared.grown);
                self.window.adjust(0, more + prepared.grown);
            }
            fail::fail_point!("before-send", |_| std::process::abort());
            if let Err(code) = sink.send(Unit::Main, ticket, &prepared.record) {
                return self.failed_in_pipeline(ticket, code, now);
            }
            if index == 0 {
                self.ledger.takes(ticket, records);
                if let Some(transaction) = &mut self.transaction {
                    transaction.sends(now);
                }
            }
            self.ledger.sent(ticket, now, cold);
            if packed.is_some() && records == 1 {
                // The row goes now. What the sink has of it is a reference to its payload, or that in a smaller form.
                let payload = event.row.get(rules.rules.payload_column()).map_or(0, <[u8]>::len);
                let value = prepared.record.payload.as_ref().map_or(0, |value| value.len());
                let less = self.ledger.gives_back(ticket, payload.saturating_sub(value));
                if less > 0 {
                    self.window.release(0, less);
                }
            }
            fail::fail_point!("sent", |_| std::process::abort());
        }
        if let (Some(topic), Some(partition)) = (topic, cold) {
            self.topics.get_mut(topic).warms(partition);
            if last < records {
                return self.topics.get_mut(topic).wait_for_warmth(partition, Waiting { ticket, event });
            }
        }
        // What fails from here on is read again, and packed again.
        self.packing.forget(ticket);
    }

    pub(super) fn pass_all<S: Sink>(
        &mut self,
        waited: impl IntoIterator<Item = Waiting>,
        now: Duration,
        sink: &S,
    ) {
        for Waiting { ticket, event } in waited {
            let Some(entry) = self.ledger.get(ticket) else { continue };
            let rules = self.tables[entry.table.0 as usize].clone();
            self.pass(ticket, &rules, event, now, sink);
        }
    }
}

/// Where an event goes, as far as it can be told before its record is made.
fn partition(rules: &Table, event: &Event, count: usize) -> Option<usize> {
    match rules.rules.explicit_partition(&event.row) {
        Some(partition) => usize::try_from(partition).ok(),
        // Under `order: table` an event without a key has an order too.
        None if count == 1 => Some(0),
        None => partition_of(rules.rules.route(event).ok()?.key.as_deref()?, count),
    }
}

pub(super) fn event_id<'a>(rules: &Table, event: &'a Event) -> &'a str {
    rules.rules.id(&event.row).unwrap_or("")
}

/// Why an event can have no record.
#[derive(Debug)]
pub(super) struct Refused {
    pub reason: String,
    /// Its payload is larger than the topic, or the table, takes.
    pub oversize: bool,
}

impl Refused {
    fn new(reason: String) -> Refused {
        Refused { reason, oversize: false }
    }
}

/// The record of an event, or the one of a chunk, or why there can be none.
pub(super) fn prepare<'a>(
    rules: &'a Table,
    event: &'a Event,
    packed: Option<(&'a Packed, u32)>,
    topic: Option<&Topic>,
) -> Result<Prepared<'a>, Refused> {
    if let Some(bytes) = event.unread_bytes {
        let reason =
            format!("the payload has {bytes} bytes, more than payload.max_bytes allows: it was not read");
        return Err(Refused { reason, oversize: true });
    }
    let prepared = rules.rules.prepare(event, packed);
    let mut prepared = prepared.map_err(|rejection| Refused::new(rejection.to_string()))?;
    let Some(topic) = topic else { return Ok(prepared) };
    let size = prepared.record.wire_size();
    if let Some(limit) = topic.max_message_bytes.filter(|limit| size > *limit) {
        let reason = format!(
            "the record would have {size} bytes and topic {} takes {limit} (max.message.bytes): raise the \
             topic's limit or make the payload smaller",
            topic.name
        );
        return Err(Refused { reason, oversize: true });
    }
    let count = topic.partition_count();
    match prepared.record.partition {
        Some(partition) if usize::try_from(partition).is_ok_and(|partition| partition >= count) => {
            Err(Refused::new(format!(
                "topic {} has {count} partition(s) and the row asks for number {partition}: mend the row, or \
             add partitions",
                topic.name
            )))
        }
        // Chunks belong on one partition; without a key none would be chosen for all of them.
        None if prepared.record.key.is_none() && packed.is_some_and(|(packed, _)| packed.records() > 1) => {
            let partition = partition_of(event_id(rules, event).as_bytes(), count);
            prepared.record.partition = partition.and_then(|partition| i32::try_from(partition).ok());
            Ok(prepared)
        }
        _ => Ok(prepared),
    }
}
