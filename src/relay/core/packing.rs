//! Payloads that have to be packed before they can be sent: encoded, put into the object store, or
//! sliced. The work is done outside of the loop, for many events at once; a lane waits for the first
//! of its events that is not ready, so its order stays, and other lanes flow.
//!
//! When the object store is away, what needs it waits in memory, and is held once that fills a quarter
//! of the window or has lasted for [`PATIENCE`]; its keys with it. A small object that can be put again
//! shows that it is back.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use tracing::{info, warn};

use super::{Core, Phase, Table, suspects::Step, window_bytes};
use crate::{
    event::{Event, TableIx},
    record::{Oversize, Packed, Packing, Then},
    relay::{
        lanes::{Closed, Lane, Waiting},
        packer::Unpacked,
        retry::Policy,
    },
    sink::{Sink, Ticket},
    source::{Cause, hold::Over},
};

/// How long events wait in memory for an object store that is away.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a topic takes is asked about again before a payload is moved out, if it was last asked so long ago.
const LIMIT_KNOWN_FOR: Duration = Duration::from_secs(30);

/// A payload to be packed.
#[derive(Clone, Debug)]
pub struct Job {
    pub ticket: Ticket,
    /// Tells it from another job of the same ticket: a slot of the ledger is used again.
    pub number: u64,
    /// For the metrics.
    pub table: String,
    pub payload: Bytes,
    pub packing: Packing,
}

#[derive(Debug)]
enum State {
    /// It is being worked on, as the job of this number.
    Busy(u64),
    Ready(Box<Packed>),
    /// The object store is away.
    Away,
}

#[derive(Debug)]
struct Trouble {
    reason: String,
    since: Duration,
    attempts: u32,
    /// When it is asked again; `None`: it is being asked.
    due: Option<Duration>,
    /// What needs the store is held, and no longer waits in memory.
    tripped: bool,
}

/// The events whose payload is packed, or is being packed.
#[derive(Debug, Default)]
pub(super) struct Packings {
    states: HashMap<Ticket, State>,
    /// Those that wait for it and are no follower in their lane: its head, or without a lane.
    heads: HashMap<Ticket, Event>,
    trouble: Option<Trouble>,
    /// Jobs so far.
    jobs: u64,
}

impl Packings {
    /// What was made of an event's payload.
    pub fn of(&self, ticket: Ticket) -> Option<&Packed> {
        match self.states.get(&ticket) {
            Some(State::Ready(packed)) => Some(packed),
            _ => None,
        }
    }

    pub fn forget(&mut self, ticket: Ticket) {
        if !self.states.is_empty() {
            self.states.remove(&ticket);
            self.heads.remove(&ticket);
        }
    }

    /// A new generation reads everything again. That the store is away stays known.
    pub fn start_over(&mut self) {
        self.states.clear();
        self.heads.clear();
    }

    pub fn is_away(&self) -> bool {
        self.trouble.is_some()
    }

    /// Why payloads cannot be moved out now.
    pub fn trouble(&self) -> String {
        self.trouble.as_ref().map_or_else(String::new, |trouble| trouble.reason.clone())
    }

    pub fn next_due(&self) -> Option<Duration> {
        let trouble = self.trouble.as_ref()?;
        let patience = (!trouble.tripped && !self.heads.is_empty()).then_some(trouble.since + PATIENCE);
        [trouble.due, patience].into_iter().flatten().min()
    }

    fn is_given_up(&self, rules: &Table, now: Duration) -> bool {
        let since = self.trouble.as_ref().map(|trouble| trouble.since);
        since.zip(rules.give_up.after).is_some_and(|(since, after)| now >= since + after)
    }

    /// Events and bytes that wait for the store.
    fn waiting(&self) -> (usize, usize) {
        let away = |ticket| matches!(self.states.get(ticket), Some(State::Away));
        let heads = self.heads.iter().filter(|(ticket, _)| away(ticket));
        heads.fold((0, 0), |(events, bytes), (_, event)| (events + 1, bytes + window_bytes(event)))
    }
}

impl Core {
    /// Gives an event back whose payload can travel, packed or as it is. One that has to be packed
    /// first, or can never be, is taken, and its lane waits for it.
    pub(super) fn packed_or_stopped(
        &mut self,
        ticket: Ticket,
        rules: &Table,
        mut event: Event,
        now: Duration,
    ) -> Option<Event> {
        let entry = self.ledger.get(ticket)?;
        let (table, lane, topic) = (entry.table, entry.lane, entry.topic);
        match self.packing.states.get(&ticket) {
            Some(State::Ready(_)) => return Some(event),
            Some(State::Busy(_)) => {
                self.wait_for_packing(ticket, lane, event);
                return None;
            }
            Some(State::Away) | None => {}
        }
        let packing = match self.packing_of(rules, &event, topic, now) {
            Ok(Some(packing)) => packing,
            Ok(None) => {
                self.packing.forget(ticket);
                return Some(event);
            }
            Err(reason) => {
                self.try_alone(ticket, lane, event, Step::Refuse { reason, oversize: true }, now);
                return None;
            }
        };
        if let (Some(trouble), true) = (&self.packing.trouble, needs_store(&packing)) {
            if self.packing.is_given_up(rules, now) {
                self.try_alone(ticket, lane, event, Step::GiveUp, now);
            } else if trouble.tripped {
                self.hold_for_store(table, ticket, lane, &event);
            } else {
                self.packing.states.insert(ticket, State::Away);
                self.wait_for_packing(ticket, lane, event);
            }
            return None;
        }
        self.start_packing(ticket, rules, &mut event, packing);
        self.wait_for_packing(ticket, lane, event);
        None
    }

    /// An event that waits behind another: its payload is packed meanwhile.
    pub(super) fn pack_ahead(
        &mut self,
        ticket: Ticket,
        rules: &Table,
        event: &mut Event,
        topic: Option<u32>,
        now: Duration,
    ) {
        let usable = topic.is_some_and(|topic| self.topics.get(topic).is_usable());
        if !usable || self.packing.is_away() || self.packing.states.contains_key(&ticket) {
            return;
        }
        // What is wrong with it is told when its turn comes.
        if let Ok(Some(packing)) = self.packing_of(rules, event, topic, now) {
            self.start_packing(ticket, rules, event, packing);
        }
    }

    fn packing_of(
        &mut self,
        rules: &Table,
        event: &Event,
        topic: Option<u32>,
        now: Duration,
    ) -> Result<Option<Packing>, String> {
        let Some(index) = topic.filter(|_| event.unread_bytes.is_none()) else { return Ok(None) };
        let topic = self.topics.get_mut(index);
        if rules.rules.is_small(event, topic.max_message_bytes) {
            return Ok(None);
        }
        // What is wrong with the rest of the row is told when its record is made.
        let Ok(prepared) = rules.rules.prepare(event, None) else { return Ok(None) };
        let packing = rules.rules.packing(event, &prepared.record, topic.max_message_bytes);
        let packing = packing.map_err(|rejection| rejection.to_string())?;
        if let Some(Packing { oversize: Then::Chunk { .. }, .. }) = packing
            && topic.compacted
        {
            return Err(format!(
                "topic {} is compacted (cleanup.policy), which would delete all chunks of a key but the last: \
                 use payload.oversize: claim_check, or another topic",
                topic.name
            ));
        }
        if packing.is_some() && now >= topic.known_at + LIMIT_KNOWN_FOR {
            // It may take more by now. This event goes by what is known.
            topic.known_at = now;
            self.effects.look_up.push(topic.name.clone());
        }
        Ok(packing)
    }

    fn start_packing(&mut self, ticket: Ticket, rules: &Table, event: &mut Event, packing: Packing) {
        let Some(payload) = event.row.share(rules.rules.payload_column()) else { return };
        self.packing.jobs += 1;
        let number = self.packing.jobs;
        self.packing.states.insert(ticket, State::Busy(number));
        self.effects.pack.push(Job { ticket, number, table: rules.name.clone(), payload, packing });
    }

    /// The lane stops behind an event whose payload is not ready.
    fn wait_for_packing(&mut self, ticket: Ticket, lane: Option<Lane>, event: Event) {
        // What is in the sink already goes first anyway.
        self.lanes.stop(lane, 0);
        self.packing.heads.insert(ticket, event);
    }

    /// The work on a payload is done.
    pub(super) fn packed<S: Sink>(
        &mut self,
        (ticket, number): (Ticket, u64),
        result: Result<Packed, Unpacked>,
        took: Duration,
        now: Duration,
        sink: &S,
    ) {
        let state = self.packing.states.get_mut(&ticket);
        let Some(state) = state.filter(|state| matches!(state, State::Busy(its) if *its == number)) else {
            // Nobody waits for it any more.
            return;
        };
        let Some(entry) = self.ledger.get(ticket) else { return };
        let (table, lane) = (entry.table, entry.lane);
        let rules = self.tables[table.0 as usize].clone();
        self.metrics.offloaded(&rules.name, mode(rules.rules.oversize()), &result, took);
        match result {
            Ok(packed) => {
                *state = State::Ready(Box::new(packed));
                self.packing_goes_on(ticket, lane, now, sink);
            }
            Err(Unpacked::Away(reason)) => {
                *state = State::Away;
                self.store_is_away(reason, now);
            }
            Err(Unpacked::Never { reason, oversize }) => {
                // A follower is looked at when its turn comes.
                self.packing.states.remove(&ticket);
                if let Some(event) = self.packing.heads.remove(&ticket) {
                    let followers = self.lanes.open(lane);
                    self.try_alone(ticket, lane, event, Step::Refuse { reason, oversize }, now);
                    followers.into_iter().for_each(|follower| self.lanes.wait(lane, follower));
                }
            }
        }
    }

    /// A lane goes on from its first event.
    fn packing_goes_on<S: Sink>(&mut self, ticket: Ticket, lane: Option<Lane>, now: Duration, sink: &S) {
        if let Some(event) = self.packing.heads.remove(&ticket) {
            let followers = self.lanes.open(lane);
            self.pass_all(std::iter::once(Waiting { ticket, event }).chain(followers), now, sink);
        }
    }

    fn store_is_away(&mut self, reason: String, now: Duration) {
        match &mut self.packing.trouble {
            Some(trouble) => trouble.reason = reason,
            None => {
                warn!(
                    error = reason,
                    "the object store cannot be reached; events that need it wait with their keys, others flow"
                );
                let due = Some(now + Policy::default().pause(1, fastrand::f64()));
                self.packing.trouble = Some(Trouble { reason, since: now, attempts: 1, due, tripped: false });
            }
        }
    }

    /// Whether the object store took the small object.
    pub(super) fn probed<S: Sink>(&mut self, result: Result<(), String>, now: Duration, sink: &S) {
        let Some(trouble) = &mut self.packing.trouble else { return };
        match result {
            Err(reason) => {
                trouble.reason = reason;
                trouble.attempts += 1;
                trouble.due = Some(now + Policy::default().pause(trouble.attempts, fastrand::f64()));
            }
            Ok(()) => {
                info!(seconds = now.saturating_sub(trouble.since).as_secs(), "the object store is back");
                self.packing.trouble = None;
                self.try_those_away_again(now, sink);
            }
        }
    }

    /// What waits for the store is packed anew, in order within its lane.
    fn try_those_away_again<S: Sink>(&mut self, now: Duration, sink: &S) {
        for (ticket, lane) in self.heads_away() {
            self.packing_goes_on(ticket, lane, now, sink);
        }
    }

    fn heads_away(&self) -> Vec<(Ticket, Option<Lane>)> {
        let away = |ticket: &Ticket| matches!(self.packing.states.get(ticket), Some(State::Away));
        let heads = self.packing.heads.keys().filter(|ticket| away(ticket));
        heads.filter_map(|ticket| Some((*ticket, self.ledger.get(*ticket)?.lane))).collect()
    }

    /// Asks the store again when it is time, holds what has waited for long enough, and has the sources
    /// release it once the store is back.
    pub(super) fn look_at_store<S: Sink>(&mut self, now: Duration, sink: &S) {
        if self.packing.is_away() {
            self.look_at_trouble(now, sink);
        }
        for (index, progress) in self.progress.iter_mut().enumerate() {
            let can_go = !self.packing.is_away() || self.packing.is_given_up(&self.tables[index], now);
            if progress.held.store > 0 && can_go && !progress.store_asked {
                progress.store_asked = true;
                self.effects.release.push((TableIx(index as u16), Over::Store));
            }
        }
    }

    fn look_at_trouble<S: Sink>(&mut self, now: Duration, sink: &S) {
        let limit = self.window.limit();
        let (events, bytes) = self.packing.waiting();
        let Some(trouble) = &mut self.packing.trouble else { return };
        if trouble.due.is_some_and(|due| now >= due) {
            trouble.due = None;
            self.effects.probe = true;
        }
        let much = events >= limit.events.div_ceil(4) || bytes >= limit.bytes / 4;
        if !trouble.tripped && (much || (events > 0 && now >= trouble.since + PATIENCE)) {
            trouble.tripped = true;
            warn!(
                error = trouble.reason,
                events,
                "events that need the object store are held from now on, and released when it is back"
            );
        }
        let given_up = self.give_up_times.iter().any(|after| now >= trouble.since + *after);
        if self.phase == Phase::Running && (trouble.tripped || given_up) {
            // They are held, or given up, as if they came now.
            for (ticket, lane) in self.heads_away() {
                self.packing_goes_on(ticket, lane, now, sink);
            }
        }
    }

    /// Holds an event, and all that waits behind it, until the store is back.
    fn hold_for_store(&mut self, table: TableIx, ticket: Ticket, lane: Option<Lane>, event: &Event) {
        let rules = self.tables[table.0 as usize].clone();
        self.hold(ticket, &rules, event, Cause::Store, self.packing.trouble(), 0);
        if let Some(lane) = lane.filter(|_| event.replay.is_none()) {
            self.progress[table.0 as usize].closing.insert(ticket, (lane, Closed::Store));
            for Waiting { ticket, event } in self.lanes.close(table, Some(lane), Closed::Store) {
                self.hold_behind(ticket, &rules, &event, Closed::Store);
            }
        }
        self.count_held(table);
    }
}

/// Whether nothing can become of it while the store is away.
fn needs_store(packing: &Packing) -> bool {
    packing.codec.is_none() && matches!(packing.oversize, Then::Refer { .. })
}

/// The value of the metric label `mode`.
fn mode(oversize: Oversize) -> &'static str {
    match oversize {
        Oversize::ClaimCheck => "claim_check",
        Oversize::Chunk => "chunk",
        Oversize::Fail | Oversize::Park | Oversize::DeadLetter => "encode",
    }
}
