//! Events that stop: what is parked, what is held until something ends, and how they flow again.
//!
//! Whatever is held closes a gate for what follows it. A gate is opened by the source's list of them
//! ([`Yield::Gates`](crate::source::Yield::Gates)) alone, which comes after a release was committed and
//! before anything more is read; so what was held is read again before anything that is newer.

use tracing::{error, info, warn};

use super::{Core, Mishap, Phase, Table, passing::event_id, told};
use crate::{
    config::{OnFailure, Order},
    event::{Event, TableIx},
    record::is_legal_topic,
    relay::lanes::{Closed, Lane, Waiting},
    sink::{Kind, Ticket},
    source::{
        Cause, ClosedKey, Gates, Hold, RouteKey,
        hold::{Counts, Over},
    },
};

const BEHIND: &str = "an earlier event of its key is parked";
const BEHIND_STORE: &str = "an earlier event of its key waits for the object store";

/// Topic and key, as the relay's own table has them: an empty topic where there is none.
fn route_key(rules: &Table, event: &Event) -> RouteKey {
    match rules.rules.route(event) {
        Ok(route) => (route.topic.into_owned(), route.key.map(|key| key.into_owned())),
        Err(_) => (String::new(), None),
    }
}

impl Core {
    /// A piece of the list of closed keys.
    pub(super) fn closed_keys_are(&mut self, table: TableIx, keys: Vec<ClosedKey>) {
        let order = self.tables[table.0 as usize].order;
        for (topic, key, for_store) in keys {
            // An event without order held only itself.
            if let Some(lane) = self.lanes.lane(table, order, &topic, key.as_deref()) {
                let why = if for_store { Closed::Store } else { Closed::Parked };
                self.progress[table.0 as usize].listed.push((lane, why));
            }
        }
    }

    /// The gates of a table are what the source says, and what is on its way to it.
    pub(super) fn gates_are(&mut self, table: TableIx, serial: u32, gates: Gates) {
        let progress = &mut self.progress[table.0 as usize];
        let listed = std::mem::take(&mut progress.listed);
        progress.paused = gates.paused;
        progress.held = gates.held;
        progress.held_topics.clear();
        progress.store_asked = false;
        if !progress.has_parked() && self.holding == 0 {
            progress.parked = None;
        }
        self.lanes.forget_closed(table);
        for (lane, why) in listed.into_iter().chain(progress.closing.values().copied()) {
            self.lanes.add_closed(table, lane, why);
        }
        for name in gates.topics.iter().filter(|name| is_legal_topic(name)) {
            let topic = self.topic(name);
            self.progress[table.0 as usize].held_topics.insert(topic, false);
        }
        let halted = self.is_too_much(table);
        if halted {
            self.say_halted(table);
        } else if self.progress[table.0 as usize].halted {
            info!(table = self.tables[table.0 as usize].name, "the table goes on");
        }
        self.progress[table.0 as usize].halted = halted;
        self.count_held(table);
        self.effects.go.push((table, serial, halted));
    }

    /// Why an event has to be held for something around it: its topic, or a pause.
    pub(super) fn closed(
        &self,
        table: TableIx,
        rules: &Table,
        topic: Option<u32>,
        event: &Event,
    ) -> Option<(Cause, String)> {
        let progress = &self.progress[table.0 as usize];
        let tripped = topic.filter(|topic| self.topics.get(*topic).tripped);
        if tripped.is_some() || self.is_held_for_topic(table, rules.order, topic) {
            let reason = match topic {
                Some(topic) => self.topic_trouble(topic),
                None => "an earlier event of the table is held for its topic".into(),
            };
            return Some((Cause::Topic, reason));
        }
        if progress.paused.is_empty() {
            return None;
        }
        let (topic, key) = route_key(rules, event);
        let scope = progress.paused.iter().find(|scope| scope.covers(&topic, key.as_deref()))?;
        Some((Cause::Paused, format!("{} is paused", scope.describe())))
    }

    /// Whether events of this topic are held until it can be written to. A table that is one lane stops
    /// as one.
    pub(super) fn is_held_for_topic(&self, table: TableIx, order: Order, topic: Option<u32>) -> bool {
        let held = &self.progress[table.0 as usize].held_topics;
        match order {
            Order::Table => !held.is_empty(),
            Order::Key | Order::None => topic.is_some_and(|topic| held.contains_key(&topic)),
        }
    }

    /// Parks an event's key: the event and all that waits behind it are held.
    pub(super) fn park(
        &mut self,
        ticket: Ticket,
        rules: &Table,
        event: &Event,
        cause: Cause,
        reason: String,
        attempts: u32,
    ) {
        let Some(entry) = self.ledger.get(ticket) else { return };
        let (table, lane) = (entry.table, entry.lane);
        let context = rules.rules.log_context(event);
        error!(
            table = rules.name.as_str(), place = %event.place, id = event_id(rules, event), reason,
            context = context.as_ref().map(display), cause = cause.as_str(), attempts,
            "event can never be published as it is: its key is parked and the rest flows on"
        );
        self.suspects.remove(&(table, event.place.clone()));
        let what = format!("{} {} parked: {reason}", rules.name, event.place);
        self.progress[table.0 as usize].parked = Some(Mishap { what, at_ms: self.wall_ms });
        self.hold(ticket, rules, event, cause, reason, attempts);
        if let Some(lane) = lane {
            self.progress[table.0 as usize].closing.insert(ticket, (lane, Closed::Parked));
        }
        for Waiting { ticket, event } in self.lanes.close(table, lane, Closed::Parked) {
            self.hold_behind(ticket, rules, &event, Closed::Parked);
        }
        self.count_held(table);
        if rules.give_up.then == OnFailure::Halt {
            self.halt(table);
        }
    }

    /// Holds an event behind an earlier one of its lane.
    pub(super) fn hold_behind(&mut self, ticket: Ticket, rules: &Table, event: &Event, why: Closed) {
        let (cause, reason) = match why {
            Closed::Parked => (Cause::Behind, BEHIND),
            Closed::Store => (Cause::Store, BEHIND_STORE),
        };
        self.hold(ticket, rules, event, cause, reason.into(), 0);
    }

    pub(super) fn hold(
        &mut self,
        ticket: Ticket,
        rules: &Table,
        event: &Event,
        cause: Cause,
        reason: String,
        attempts: u32,
    ) {
        self.packing.forget(ticket);
        let Some(entry) = self.ledger.get(ticket) else { return };
        let table = entry.table;
        if self.transaction.is_some() && entry.records.sent > 0 {
            // Some of its records are in the transaction, which must have all of them or none.
            self.phase = Phase::Failing { since: self.now };
            return;
        }
        if event.replay.is_some() {
            // It is published already, and asked for again later.
            return self.forget(ticket);
        }
        if let (Cause::Topic, Some(topic)) = (cause, entry.topic) {
            self.progress[table.0 as usize].held_topics.entry(topic).or_insert(false);
        }
        told::held(rules, event, cause, &reason);
        let (topic, key) = route_key(rules, event);
        self.holding += 1;
        self.ledger.holds(ticket);
        self.progress[table.0 as usize].holds.push(Hold {
            ticket,
            place: event.place.clone(),
            event_id: event_id(rules, event).to_owned(),
            topic,
            key,
            cause,
            reason,
            attempts,
            content: (!rules.keeps_rows).then(|| Box::new(event.clone())),
        });
    }

    /// Gives an event back to its source, which hands it over again later.
    fn forget(&mut self, ticket: Ticket) {
        if let Some(entry) = self.ledger.settle(ticket) {
            self.window.release(1, entry.bytes);
            let progress = &mut self.progress[entry.table.0 as usize];
            progress.open -= 1;
            progress.forgotten.push(entry.place);
        }
    }

    /// The source committed holds.
    pub(super) fn held(&mut self, table: TableIx, tickets: Vec<Ticket>, counts: Counts) {
        self.no_longer_holding(table, tickets);
        self.progress[table.0 as usize].held.add(counts);
        self.count_held(table);
        if self.is_too_much(table) {
            self.halt(table);
        }
    }

    /// Holds that are committed, or were not wanted any more.
    pub(super) fn no_longer_holding(&mut self, table: TableIx, tickets: Vec<Ticket>) {
        for ticket in tickets {
            let progress = &mut self.progress[table.0 as usize];
            progress.closing.remove(&ticket);
            if let Some(entry) = self.ledger.settle(ticket) {
                self.holding -= 1;
                self.window.release(1, entry.bytes);
                progress.open -= 1;
            }
        }
    }

    /// Has the sources release what is held for topics that can be written to again.
    pub(super) fn release_ready_topics(&mut self) {
        for (index, progress) in self.progress.iter_mut().enumerate() {
            if progress.held_topics.is_empty() {
                continue;
            }
            let rules = &self.tables[index];
            let now = self.now;
            let can_go = |topic: u32| {
                let topic = self.topics.get(topic);
                topic.is_usable() || topic.is_given_up(rules.give_up.after, now)
            };
            // One lane: all of them, or none.
            let all = rules.order != Order::Table || progress.held_topics.keys().all(|topic| can_go(*topic));
            for (topic, asked) in &mut progress.held_topics {
                if all && !*asked && can_go(*topic) {
                    *asked = true;
                    let name = self.topics.get(*topic).name.clone();
                    self.effects.release.push((TableIx(index as u16), Over::Topic(name)));
                }
            }
        }
    }

    pub(super) fn count_held(&self, table: TableIx) {
        let progress = &self.progress[table.0 as usize];
        self.metrics.held(
            &self.tables[table.0 as usize].name,
            self.lanes.parked(table),
            progress.held,
            progress.halted,
        );
    }

    /// Whether a table has to stop: too much is held, or `on_failure` says so.
    fn is_too_much(&self, table: TableIx) -> bool {
        let (rules, progress) = (&self.tables[table.0 as usize], &self.progress[table.0 as usize]);
        let failed = progress.has_parked();
        progress.held.all() > rules.max_held || (rules.give_up.then == OnFailure::Halt && failed)
    }

    fn halt(&mut self, table: TableIx) {
        if !std::mem::replace(&mut self.progress[table.0 as usize].halted, true) {
            self.say_halted(table);
            self.count_held(table);
            self.effects.halt.push(table);
        }
    }

    fn say_halted(&self, table: TableIx) {
        let (rules, progress) = (&self.tables[table.0 as usize], &self.progress[table.0 as usize]);
        let (name, held) = (rules.name.as_str(), progress.held.all());
        if held > rules.max_held {
            error!(
                table = name,
                held,
                max = rules.max_held,
                "more events are held than hold.max_events allows: the table halts. Mend and release \
                 them (whippet redrive, whippet skip), or raise the limit"
            );
        } else {
            error!(
                table = name,
                held,
                "an event cannot be published and on_failure is halt: the table halts. Mend it and \
                 release it (whippet redrive), or let it go (whippet skip)"
            );
        }
    }

    /// An event that was published before cannot be published again: nothing is held for it.
    pub(super) fn refuse_replay(&mut self, ticket: Ticket, rules: &Table, event: &Event, reason: &str) {
        let context = rules.rules.log_context(event);
        warn!(
            table = rules.name.as_str(), place = %event.place, id = event_id(rules, event), reason,
            context = context.as_ref().map(display), "event cannot be replayed; its row stays as it is"
        );
        self.metrics.publish_failures(&rules.name, Kind::Rejected.label()).inc();
        self.packing.forget(ticket);
        if let Some(entry) = self.ledger.settle(ticket) {
            self.suspects.remove(&(entry.table, entry.place.clone()));
            self.window.release(1, entry.bytes);
            let progress = &mut self.progress[entry.table.0 as usize];
            progress.open -= 1;
            progress.settled.push(entry.place);
        }
    }

    /// The lane of an event; a replay has none: its order was that of its first time.
    pub(super) fn lane_of(
        &self,
        table: TableIx,
        order: Order,
        event: &Event,
        topic: &str,
        key: Option<&[u8]>,
    ) -> Option<Lane> {
        if event.replay.is_some() { None } else { self.lanes.lane(table, order, topic, key) }
    }
}
