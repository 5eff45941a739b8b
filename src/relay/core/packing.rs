//! Payloads that have to be packed before they can be sent: encoded, put into the object store, or
//! sliced. The work is done outside of the loop, for many events at once; a lane waits for the first
//! of its events that is not ready, so its order stays, and other lanes flow. `away` is about an object
//! store that cannot be reached.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use tracing::info;

use super::{Core, Table, away::Trouble, suspects::Step};
use crate::{
    event::Event,
    record::{Form, Oversize, Packed, Packing, Then},
    relay::{
        lanes::{Lane, Waiting},
        packer::Unpacked,
        topics::Topic,
    },
    sink::{Sink, Ticket},
};

/// What a topic takes is asked about again before a payload is packed or refused by it, if the last answer
/// is older.
const KNOWN_FOR: Duration = Duration::from_secs(2);

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

#[derive(Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The broker is asked what the topic takes now.
    Asking,
    /// It is being worked on, as the job of this number.
    Busy(u64),
    Ready(Box<Packed>),
    /// The object store is away.
    Away,
}

/// What is to be done with an event's payload.
enum Plan {
    /// It goes as it is.
    Go,
    /// What the topic takes decides, and the last answer is old.
    Ask(u32),
    Pack(Packing),
}

/// The events whose payload is packed, or is being packed.
#[derive(Debug, Default)]
pub(super) struct Packings {
    pub states: HashMap<Ticket, State>,
    /// Those that wait for it and are no follower in their lane: its head, or without a lane.
    pub heads: HashMap<Ticket, Event>,
    pub trouble: Option<Trouble>,
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
        self.trouble.take_if(|trouble| trouble.answers.is_some());
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
            Some(State::Ready(packed)) => {
                let chunks = matches!(packed.form, Form::Chunks { .. });
                let topic = topic.map(|topic| self.topics.get(topic)).filter(|_| chunks);
                let Some(reason) = topic.and_then(refuses_chunks) else { return Some(event) };
                self.try_alone(ticket, lane, event, Step::Refuse { reason, oversize: true }, now);
                return None;
            }
            Some(State::Busy(_)) => {
                self.wait_for_packing(ticket, lane, event);
                return None;
            }
            Some(State::Asking | State::Away) | None => {}
        }
        let packing = match self.plan(rules, &event, topic, now) {
            Ok(Plan::Pack(packing)) => packing,
            Ok(Plan::Go) => {
                self.packing.forget(ticket);
                return Some(event);
            }
            Ok(Plan::Ask(topic)) => {
                self.ask_what_it_takes(topic);
                self.packing.states.insert(ticket, State::Asking);
                self.wait_for_packing(ticket, lane, event);
                return None;
            }
            Err(reason) => {
                self.try_alone(ticket, lane, event, Step::Refuse { reason, oversize: true }, now);
                return None;
            }
        };
        if needs_store(&packing) && self.packing.is_away() {
            self.wait_for_store(ticket, (table, lane), rules, event, now);
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
        if let Ok(Plan::Pack(packing)) = self.plan(rules, event, topic, now) {
            self.start_packing(ticket, rules, event, packing);
        }
    }

    fn plan(&self, rules: &Table, event: &Event, topic: Option<u32>, now: Duration) -> Result<Plan, String> {
        let Some(index) = topic.filter(|_| event.unread_bytes.is_none()) else { return Ok(Plan::Go) };
        let topic = self.topics.get(index);
        let limit = topic.max_message_bytes;
        if rules.rules.is_small(event, limit) {
            return Ok(Plan::Go);
        }
        // What is wrong with the rest of the row is told when its record is made.
        let Ok(prepared) = rules.rules.prepare(event, None) else { return Ok(Plan::Go) };
        let packing = rules.rules.packing(event, &prepared.record, limit);
        let goes = matches!(packing, Ok(None));
        let fits = limit.is_none_or(|limit| prepared.record.wire_size() <= limit);
        if !(goes && fits) && now >= topic.known_at + KNOWN_FOR {
            return Ok(Plan::Ask(index));
        }
        match packing.map_err(|rejection| rejection.to_string())? {
            None => Ok(Plan::Go),
            Some(packing) if matches!(packing.oversize, Then::Chunk { .. }) => match refuses_chunks(topic) {
                Some(reason) => Err(reason),
                None if topic.is_to_be_described() => Ok(Plan::Ask(index)),
                None => Ok(Plan::Pack(packing)),
            },
            Some(packing) => Ok(Plan::Pack(packing)),
        }
    }

    /// Asks the broker, unless it is being asked.
    fn ask_what_it_takes(&mut self, topic: u32) {
        let topic = self.topics.get_mut(topic);
        if !std::mem::replace(&mut topic.asked_what_it_takes, true) {
            self.effects.look_up.push(topic.name.clone());
        }
    }

    /// The broker was asked what a topic takes, and has answered, or was silent for too long.
    pub(super) fn told_what_it_takes<S: Sink>(
        &mut self,
        topic: u32,
        answered: bool,
        now: Duration,
        sink: &S,
    ) {
        let described = self.topics.get_mut(topic);
        if answered && described.was_described(now) {
            info!(
                topic = described.name,
                "the brokers do not say what the topic takes (DescribeConfigs): it is taken for one with kafka's default \
                 of 1 MiB that is not compacted"
            );
        }
        let mut wait = self.heads_that(|state| *state == State::Asking);
        wait.retain(|(ticket, _)| self.ledger.get(*ticket).is_some_and(|entry| entry.topic == Some(topic)));
        if !answered && !wait.is_empty() {
            return self.ask_what_it_takes(topic);
        }
        for (ticket, lane) in wait {
            self.packing_goes_on(ticket, lane, now, sink);
        }
    }

    fn start_packing(&mut self, ticket: Ticket, rules: &Table, event: &mut Event, packing: Packing) {
        let Some(payload) = event.row.share(rules.rules.payload_column()) else { return };
        self.packing.jobs += 1;
        let number = self.packing.jobs;
        self.packing.states.insert(ticket, State::Busy(number));
        self.effects.pack.push(Job { ticket, number, table: rules.name.clone(), payload, packing });
    }

    /// The lane stops behind an event whose payload is not ready.
    pub(super) fn wait_for_packing(&mut self, ticket: Ticket, lane: Option<Lane>, event: Event) {
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
                let referred = matches!(packed.form, Form::Reference { .. });
                *state = State::Ready(Box::new(packed));
                if referred {
                    self.store_is_back(now);
                }
                self.packing_goes_on(ticket, lane, now, sink);
            }
            Err(Unpacked::Away(reason)) => {
                *state = State::Away;
                self.store_is_away(reason, now);
            }
            Err(Unpacked::Never { reason, oversize }) => {
                if !oversize {
                    self.store_is_back(now);
                }
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
    pub(super) fn packing_goes_on<S: Sink>(
        &mut self,
        ticket: Ticket,
        lane: Option<Lane>,
        now: Duration,
        sink: &S,
    ) {
        if let Some(event) = self.packing.heads.remove(&ticket) {
            let followers = self.lanes.open(lane);
            self.pass_all(std::iter::once(Waiting { ticket, event }).chain(followers), now, sink);
        }
    }

    /// Heads of lanes whose packing is in such a state.
    pub(super) fn heads_that(&self, is: impl Fn(&State) -> bool) -> Vec<(Ticket, Option<Lane>)> {
        let heads = self.packing.heads.keys();
        let heads = heads.filter(|ticket| self.packing.states.get(ticket).is_some_and(&is));
        heads.filter_map(|ticket| Some((*ticket, self.ledger.get(*ticket)?.lane))).collect()
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

/// Why chunks cannot go to a topic.
fn refuses_chunks(topic: &Topic) -> Option<String> {
    topic.compacted.then(|| {
        format!(
            "topic {} is compacted (cleanup.policy), which would delete all chunks of a key but the last: use \
             payload.oversize: claim_check, or another topic",
            topic.name
        )
    })
}
