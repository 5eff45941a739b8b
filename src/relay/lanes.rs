//! Order: nothing of a key overtakes an earlier event of that key.
//!
//! Pure. A lane is one (table, topic, key), or a whole table under `order: table`. A lane that runs
//! freely costs nothing: it is not even listed, and its events go to the pipelined producer one
//! behind the other, which keeps them in order by itself. Listed are only the lanes in which an
//! event had to stop; what follows in such a lane queues behind it.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
};

use crate::{
    config::Order,
    event::{Event, TableIx},
    sink::Ticket,
};

/// A lane's identity within this process: a keyed 64-bit hash. A collision would make two keys
/// wait for each other; it can never let one overtake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lane(u64);

/// An admitted event that waits, with what is needed to send it.
#[derive(Debug)]
pub struct Waiting {
    pub ticket: Ticket,
    pub event: Event,
}

#[derive(Debug)]
enum Stop {
    /// An event of the lane is tried on its own, once those before it are out of the sink; the others
    /// wait for its end.
    Trying { waiting: VecDeque<Waiting>, in_sink: usize },
    /// An event of the lane is parked: what follows is held behind it.
    Parked,
}

/// Whether an event may go.
#[derive(Debug, PartialEq, Eq)]
pub enum Gate {
    Open,
    /// Queue it with [`Lanes::wait`].
    Trying,
    /// Hold it.
    Parked,
}

#[derive(Debug, Default)]
pub struct Lanes {
    hasher: RandomState,
    stopped: HashMap<Lane, Stop>,
}

impl Lanes {
    /// The lane of an event; `None` where it has no order.
    pub fn lane(&self, table: TableIx, order: Order, topic: &str, key: Option<&[u8]>) -> Option<Lane> {
        match order {
            Order::None => None,
            Order::Table => Some(Lane(self.hasher.hash_one((table, "the table")))),
            Order::Key => key.map(|key| Lane(self.hasher.hash_one((table, topic, key)))),
        }
    }

    pub fn gate(&self, lane: Option<Lane>) -> Gate {
        // Nothing is stopped in an ordinary minute: no hashing on that path.
        if self.stopped.is_empty() {
            return Gate::Open;
        }
        match lane.and_then(|lane| self.stopped.get(&lane)) {
            None => Gate::Open,
            Some(Stop::Trying { .. }) => Gate::Trying,
            Some(Stop::Parked) => Gate::Parked,
        }
    }

    /// Stops a lane behind an event that is tried on its own, after the `in_sink` before it.
    pub fn stop(&mut self, lane: Option<Lane>, in_sink: usize) {
        if let Some(lane) = lane {
            self.stopped.entry(lane).or_insert_with(|| Stop::Trying { waiting: VecDeque::new(), in_sink });
        }
    }

    /// Notes that the sink delivered an event of a lane.
    pub fn delivered(&mut self, lane: Option<Lane>) {
        if !self.stopped.is_empty()
            && let Some(Stop::Trying { in_sink, .. }) = lane.and_then(|lane| self.stopped.get_mut(&lane))
        {
            *in_sink = in_sink.saturating_sub(1);
        }
    }

    /// Whether nothing of a stopped lane is in the sink any more.
    pub fn is_clear(&self, lane: Option<Lane>) -> bool {
        match lane.and_then(|lane| self.stopped.get(&lane)) {
            Some(Stop::Trying { in_sink, .. }) => *in_sink == 0,
            Some(Stop::Parked) | None => true,
        }
    }

    /// Queues an event behind the one that its lane waits for.
    pub fn wait(&mut self, lane: Option<Lane>, event: Waiting) {
        let stop = lane.and_then(|lane| self.stopped.get_mut(&lane));
        debug_assert!(matches!(stop, Some(Stop::Trying { .. })), "only behind `Gate::Trying`");
        if let Some(Stop::Trying { waiting, .. }) = stop {
            waiting.push_back(event);
        }
    }

    /// Parks a lane and returns what waited in it, in order, to be held.
    pub fn park(&mut self, lane: Option<Lane>) -> VecDeque<Waiting> {
        match lane.and_then(|lane| self.stopped.insert(lane, Stop::Parked)) {
            Some(Stop::Trying { waiting, .. }) => waiting,
            _ => VecDeque::new(),
        }
    }

    /// Opens a lane whose event got through, and returns what waited in it, in order.
    pub fn open(&mut self, lane: Option<Lane>) -> VecDeque<Waiting> {
        match lane.and_then(|lane| self.stopped.remove(&lane)) {
            Some(Stop::Trying { waiting, .. }) => waiting,
            _ => VecDeque::new(),
        }
    }

    /// Forgets everything: a new generation learns the parked keys from the database.
    pub fn clear(&mut self) {
        self.stopped.clear();
    }
}
