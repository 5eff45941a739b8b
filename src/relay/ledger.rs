//! What is in flight: every admitted event has an entry here until it is settled.
//!
//! Pure. The ledger owns one question: *is this event finished?* An entry that is forgotten (a new
//! generation) was never settled, so its row is read again: the default outcome is "not delivered".

use std::{collections::HashMap, time::Duration};

use slab::Slab;

use super::lanes::Lane;
use crate::{
    event::{Place, TableIx},
    record::{Landed, Trail},
    sink::Ticket,
};

/// One admitted event.
#[derive(Clone, Debug)]
pub struct Entry {
    pub table: TableIx,
    pub place: Place,
    /// `None`: the event has no order (null key, or `order: none`).
    pub lane: Option<Lane>,
    /// Index of the topic it goes to; `None` where the topic could not be told.
    pub topic: Option<u32>,
    /// What the event counts for in the window, in bytes.
    pub bytes: usize,
    /// The record's timestamp, in milliseconds since the Unix epoch.
    pub timestamp_ms: Option<i64>,
    /// The partition of its topic that it warms.
    pub warms: Option<u32>,
    /// When it was handed to the sink, on the relay's monotonic clock; `None` before that.
    pub sent_at: Option<Duration>,
    /// Its hold is on its way to the source.
    pub held: bool,
    /// The producer that has it was relieved by another.
    pub relieved: bool,
    pub records: Records,
    /// What is told of it, where somebody wants to know; counted in `bytes`.
    pub trail: Option<Box<Trail>>,
}

impl Entry {
    /// One that was just taken in, and goes nowhere yet.
    pub fn new(table: TableIx, place: Place, bytes: usize) -> Entry {
        Entry {
            table,
            place,
            lane: None,
            topic: None,
            bytes,
            timestamp_ms: None,
            warms: None,
            sent_at: None,
            held: false,
            relieved: false,
            records: Records::default(),
            trail: None,
        }
    }
}

/// How far an event has come that is one record, or several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Records {
    pub all: u32,
    pub sent: u32,
    pub acknowledged: u32,
}

impl Default for Records {
    fn default() -> Records {
        Records { all: 1, sent: 0, acknowledged: 0 }
    }
}

/// What an acknowledged record means for its event.
#[derive(Debug)]
pub enum Acknowledged {
    /// Nothing (any more).
    Unknown,
    /// It has more records. With the topic and the partition of it that this one has warmed.
    Part(Option<(u32, u32)>),
    /// It is finished.
    Whole(Entry),
}

#[derive(Debug, Default)]
pub struct Ledger {
    generation: u32,
    entries: Slab<Entry>,
    /// Entries that the sink has and has not reported on.
    sent: usize,
}

impl Ledger {
    pub fn admit(&mut self, entry: Entry) -> Ticket {
        let slot = self.entries.insert(entry);
        Ticket { generation: self.generation, slot: u32::try_from(slot).unwrap_or(u32::MAX) }
    }

    /// The entry of a ticket; `None` for one of an older generation, or one that is settled.
    pub fn get(&self, ticket: Ticket) -> Option<&Entry> {
        self.current(ticket).then(|| self.entries.get(ticket.slot as usize))?
    }

    /// Notes how many records the event takes.
    pub fn takes(&mut self, ticket: Ticket, records: u32) {
        if self.current(ticket)
            && let Some(entry) = self.entries.get_mut(ticket.slot as usize)
        {
            entry.records.all = records;
        }
    }

    /// Keeps what is told of an event. Returns the bytes that it counts for from now on, more than before.
    pub fn follow(&mut self, ticket: Ticket, trail: Box<Trail>) -> usize {
        let entry = if self.current(ticket) { self.entries.get_mut(ticket.slot as usize) } else { None };
        let Some(entry) = entry.filter(|entry| entry.trail.is_none()) else { return 0 };
        let bytes = trail.bytes();
        entry.bytes += bytes;
        entry.trail = Some(trail);
        bytes
    }

    /// Notes that an event counts for so many bytes more: its record is larger than its row.
    pub fn grows(&mut self, ticket: Ticket, bytes: usize) {
        if self.current(ticket)
            && let Some(entry) = self.entries.get_mut(ticket.slot as usize)
        {
            entry.bytes += bytes;
        }
    }

    /// Notes that the sink took the event's next record.
    pub fn sent(&mut self, ticket: Ticket, at: Duration, warms: Option<u32>) {
        if self.current(ticket)
            && let Some(entry) = self.entries.get_mut(ticket.slot as usize)
        {
            entry.warms = warms;
            entry.records.sent += 1;
            self.sent += usize::from(entry.sent_at.replace(at).is_none());
        }
    }

    /// Notes that the event is to be held.
    pub fn holds(&mut self, ticket: Ticket) {
        if self.current(ticket)
            && let Some(entry) = self.entries.get_mut(ticket.slot as usize)
        {
            entry.held = true;
        }
    }

    /// What was admitted of a table and is neither sent nor to be held. Walks the entries.
    pub fn unsent_of(&self, table: TableIx) -> impl Iterator<Item = Ticket> {
        let unsent = move |entry: &Entry| entry.table == table && entry.sent_at.is_none() && !entry.held;
        let tickets = self.entries.iter().filter(move |(_, entry)| unsent(entry));
        tickets.map(|(slot, _)| Ticket {
            generation: self.generation,
            slot: u32::try_from(slot).unwrap_or(u32::MAX),
        })
    }

    /// Notes that a record of the event was acknowledged; the last one settles it.
    pub fn acknowledged(&mut self, ticket: Ticket, landed: Landed) -> Acknowledged {
        if !self.current(ticket) {
            return Acknowledged::Unknown;
        }
        let Some(entry) = self.entries.get_mut(ticket.slot as usize) else { return Acknowledged::Unknown };
        entry.records.acknowledged += 1;
        if entry.records.acknowledged < entry.records.all {
            return Acknowledged::Part(entry.topic.zip(entry.warms.take()));
        }
        if let Some(trail) = &mut entry.trail {
            trail.landed = Some(landed);
        }
        self.settle(ticket).map_or(Acknowledged::Unknown, Acknowledged::Whole)
    }

    /// Notes that an event counts for up to so many bytes less. Returns how many it did.
    pub fn gives_back(&mut self, ticket: Ticket, bytes: usize) -> usize {
        let entry = if self.current(ticket) { self.entries.get_mut(ticket.slot as usize) } else { None };
        let Some(entry) = entry else { return 0 };
        let less = bytes.min(entry.bytes);
        entry.bytes -= less;
        less
    }

    /// What an event no longer counts for, in bytes, since another of its records was acknowledged: the sink has dropped
    /// that. Nothing while some are not sent: the row has all of them until then.
    pub fn shrinks(&mut self, ticket: Ticket) -> usize {
        let entry = if self.current(ticket) { self.entries.get_mut(ticket.slot as usize) } else { None };
        let Some(entry) = entry.filter(|entry| entry.records.sent == entry.records.all) else { return 0 };
        let left = entry.records.all - entry.records.acknowledged;
        let share = entry.bytes / (left as usize + 1);
        entry.bytes -= share;
        share
    }

    /// Notes that the sink reported a failure: it does not have the event any more.
    pub fn returned(&mut self, ticket: Ticket) -> Option<&Entry> {
        if !self.current(ticket) {
            return None;
        }
        let entry = self.entries.get_mut(ticket.slot as usize)?;
        entry.records.sent = entry.records.acknowledged;
        if entry.sent_at.take().is_some() {
            self.sent -= 1;
        }
        Some(entry)
    }

    /// What was acknowledged of an event is gone with its transaction.
    pub fn undone(&mut self, ticket: Ticket) {
        if self.current(ticket)
            && let Some(entry) = self.entries.get_mut(ticket.slot as usize)
        {
            (entry.records.sent, entry.records.acknowledged) = (0, 0);
        }
    }

    /// An event that is not sent, or whose sending failed, goes elsewhere: as a dead letter.
    pub fn moved(&mut self, ticket: Ticket, topic: u32) {
        if self.current(ticket)
            && let Some(entry) = self.entries.get_mut(ticket.slot as usize)
        {
            entry.topic = Some(topic);
        }
    }

    /// Ends an event. `None` where the ticket means nothing (any more).
    pub fn settle(&mut self, ticket: Ticket) -> Option<Entry> {
        if !self.current(ticket) {
            return None;
        }
        let entry = self.entries.try_remove(ticket.slot as usize)?;
        if entry.sent_at.is_some() {
            self.sent -= 1;
        }
        Some(entry)
    }

    /// Another producer has what comes next: notes that of everything here, and returns its lanes. `None` where something
    /// is not in the sink with all of its records: then the rest of it is to have the same producer. Walks the entries.
    pub fn relieve(&mut self) -> Option<Vec<Lane>> {
        let is_whole = |entry: &Entry| entry.sent_at.is_some() && entry.records.sent == entry.records.all;
        if !self.entries.iter().all(|(_, entry)| is_whole(entry)) {
            return None;
        }
        let lanes = self.entries.iter_mut().filter_map(|(_, entry)| {
            entry.relieved = true;
            entry.lane
        });
        Some(lanes.collect())
    }

    /// Forgets everything: what was not settled is read again. Returns what was forgotten.
    pub fn next_generation(&mut self) -> Vec<Entry> {
        self.generation = self.generation.wrapping_add(1);
        self.sent = 0;
        self.entries.drain().collect()
    }

    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Events admitted and not settled.
    pub fn open(&self) -> usize {
        self.entries.len()
    }

    /// What they count for in the window, in bytes.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.entries.iter().map(|(_, entry)| entry.bytes).sum()
    }

    /// Events that the sink has.
    pub fn in_sink(&self) -> usize {
        self.sent
    }

    /// How many events of this lane the sink has. Walks the entries: for a lane that is stopped only.
    pub fn in_sink_of(&self, lane: Lane) -> usize {
        self.entries.iter().filter(|(_, entry)| entry.lane == Some(lane) && entry.sent_at.is_some()).count()
    }

    /// For each topic of which the sink has events: when the first of them was sent, and how many
    /// events of the topic there are, sent or not. Walks the entries: to be asked once in a while.
    pub fn waits_in_sink(&self) -> HashMap<u32, (Duration, usize)> {
        let mut waits: HashMap<u32, (Option<Duration>, usize)> = HashMap::new();
        for (_, entry) in &self.entries {
            let Some(topic) = entry.topic else { continue };
            let (first, count) = waits.entry(topic).or_default();
            *first = [*first, entry.sent_at].into_iter().flatten().min();
            *count += 1;
        }
        waits.into_iter().filter_map(|(topic, (first, count))| Some((topic, (first?, count)))).collect()
    }

    fn current(&self, ticket: Ticket) -> bool {
        ticket.generation == self.generation
    }
}

#[cfg(test)]
pub mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    pub fn entry(n: i64) -> Entry {
        Entry::new(TableIx(0), Place::Int(n), 1)
    }

    #[derive(Clone, Debug)]
    enum Step {
        Admit,
        Send(usize),
        Return(usize),
        Settle(usize),
        NextGeneration,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => Just(Step::Admit),
            3 => (0..40usize).prop_map(Step::Send),
            1 => (0..40usize).prop_map(Step::Return),
            3 => (0..40usize).prop_map(Step::Settle),
            1 => Just(Step::NextGeneration),
        ];
        proptest::collection::vec(step, 0..120)
    }

    proptest! {
        /// The ledger against a map from every ticket ever given to the place it stands for.
        #[test]
        fn a_ticket_settles_once_and_only_in_its_generation(steps in steps()) {
            let mut ledger = Ledger::default();
            let mut all: Vec<Ticket> = Vec::new();
            let mut open: BTreeMap<usize, bool> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Admit => {
                        open.insert(all.len(), false);
                        all.push(ledger.admit(entry(all.len() as i64)));
                    }
                    Step::Send(n) if n < all.len() => {
                        ledger.sent(all[n], Duration::ZERO, None);
                        // A settled slot may be in use again, under another event's ticket.
                        let holder = open.keys().find(|k| all[**k] == all[n]).copied();
                        if let Some(holder) = holder { open.insert(holder, true); }
                    }
                    Step::Return(n) if n < all.len() => {
                        let holder = open.keys().find(|k| all[**k] == all[n]).copied();
                        prop_assert_eq!(ledger.returned(all[n]).is_some(), holder.is_some());
                        if let Some(holder) = holder { open.insert(holder, false); }
                    }
                    Step::Settle(n) if n < all.len() => {
                        let holder = open.keys().find(|k| all[**k] == all[n]).copied();
                        let settled = ledger.settle(all[n]).map(|e| e.place);
                        prop_assert_eq!(settled, holder.map(|h| Place::Int(h as i64)));
                        if let Some(holder) = holder { open.remove(&holder); }
                    }
                    Step::NextGeneration => {
                        prop_assert_eq!(ledger.next_generation().len(), open.len());
                        open.clear();
                    }
                    _ => {}
                }
                prop_assert_eq!(ledger.open(), open.len());
                prop_assert_eq!(ledger.in_sink(), open.values().filter(|sent| **sent).count());
            }
        }
    }

    #[test]
    fn what_is_told_of_an_event_counts_once_and_goes_with_it() {
        let mut ledger = Ledger::default();
        let ticket = ledger.admit(entry(1));
        let trail =
            Box::new(Trail { id: "e1".into(), replay: false, context: None, parent: None, landed: None });
        assert_eq!(ledger.follow(ticket, trail.clone()), trail.bytes());
        assert_eq!(ledger.follow(ticket, trail.clone()), 0, "the next try of the same event");
        let entry = ledger.settle(ticket).unwrap();
        assert_eq!((entry.bytes, entry.trail), (1 + trail.bytes(), Some(trail.clone())));
        assert_eq!(ledger.follow(ticket, trail), 0, "it is settled");
    }

    #[test]
    fn an_event_of_several_records_is_finished_with_the_last() {
        let mut ledger = Ledger::default();
        let ticket = ledger.admit(Entry { topic: Some(7), bytes: 300, ..entry(1) });
        ledger.takes(ticket, 3);
        ledger.sent(ticket, Duration::ZERO, Some(4));
        assert!(matches!(ledger.acknowledged(ticket, Landed::default()), Acknowledged::Part(Some((7, 4)))));
        assert_eq!(ledger.shrinks(ticket), 0, "the row is there until all are sent");
        ledger.sent(ticket, Duration::ZERO, None);
        ledger.sent(ticket, Duration::ZERO, None);
        assert!(matches!(ledger.acknowledged(ticket, Landed::default()), Acknowledged::Part(None)));
        assert_eq!(ledger.shrinks(ticket), 150, "one of two that the sink had");
        assert_eq!((ledger.open(), ledger.in_sink()), (1, 1));
        // The last one fails and is sent again; those before it are not.
        assert_eq!(ledger.returned(ticket).unwrap().records, Records { all: 3, sent: 2, acknowledged: 2 });
        ledger.sent(ticket, Duration::ZERO, None);
        let finished = ledger.acknowledged(ticket, Landed::default());
        assert!(matches!(finished, Acknowledged::Whole(Entry { bytes: 150, .. })), "{finished:?}");
        assert_eq!((ledger.open(), ledger.in_sink()), (0, 0));
        assert!(matches!(ledger.acknowledged(ticket, Landed::default()), Acknowledged::Unknown));
    }
}
