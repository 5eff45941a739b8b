//! Order: nothing of a key overtakes an earlier event of that key.
//!
//! Pure. A lane is one (table, topic, key), or a whole table under `order: table`. A lane that runs
//! freely costs nothing: it is not even listed, and its events go to the pipelined producer one
//! behind the other, which keeps them in order by itself. Listed are only the lanes in which an
//! event had to stop: what follows queues behind one that is tried alone, and is held behind one
//! that is parked.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState},
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

/// A lane is a keyed hash already.
#[derive(Debug, Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u64(&mut self, lane: u64) {
        self.0 = lane;
    }
}

type OfLanes<T> = HashMap<Lane, T, BuildHasherDefault<AsItIs>>;

/// An admitted event that waits, with what is needed to send it.
#[derive(Debug)]
pub struct Waiting {
    pub ticket: Ticket,
    pub event: Event,
}

/// An event of the lane is tried on its own, once those before it are out of the sink; the others wait
/// for its end. Or nothing is tried, and those that wait go on when the sink has delivered what is before them.
#[derive(Debug, Default)]
struct Trying {
    waiting: VecDeque<Waiting>,
    in_sink: usize,
    crosses: bool,
}

/// Whether an event may go.
#[derive(Debug, PartialEq, Eq)]
pub enum Gate {
    Open,
    /// Queue it with [`Lanes::wait`].
    Trying,
    /// Hold it.
    Closed(Closed),
}

/// Why a lane's events are held, and with it who opens the lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// An event of it is parked: an operator.
    Parked,
    /// The object store is away: the relay, when it is back.
    Store,
}

#[derive(Debug, Default)]
pub struct Lanes {
    hasher: RandomState,
    trying: OfLanes<Trying>,
    /// Closed lanes, by table: small, because there may be hundreds of thousands.
    closed: Vec<ClosedLanes>,
}

#[derive(Debug, Default)]
struct ClosedLanes {
    lanes: OfLanes<Closed>,
    /// How many of them are parked.
    parked: usize,
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

    pub fn gate(&self, table: TableIx, lane: Option<Lane>) -> Gate {
        let closed = self.closed.get(table.0 as usize).map(|closed| &closed.lanes);
        let closed = closed.filter(|lanes| !lanes.is_empty());
        // Nothing is stopped in an ordinary minute: no hashing on that path.
        if self.trying.is_empty() && closed.is_none() {
            return Gate::Open;
        }
        let Some(lane) = lane else { return Gate::Open };
        if self.trying.contains_key(&lane) {
            return Gate::Trying;
        }
        closed.and_then(|closed| closed.get(&lane)).map_or(Gate::Open, |why| Gate::Closed(*why))
    }

    /// Stops a lane behind an event that is tried on its own, after the `in_sink` before it.
    pub fn stop(&mut self, lane: Option<Lane>, in_sink: usize) {
        if let Some(lane) = lane {
            self.trying.entry(lane).or_insert_with(|| Trying { in_sink, ..Trying::default() });
        }
    }

    /// Stops a lane until the sink has delivered what it has of it, of which this is one: another producer has the next.
    pub fn cross(&mut self, lane: Lane) {
        let crossing =
            self.trying.entry(lane).or_insert_with(|| Trying { crosses: true, ..Trying::default() });
        crossing.in_sink += 1;
    }

    /// Notes that the sink delivered an event of a lane, and returns what may go on, in order.
    pub fn delivered(&mut self, lane: Option<Lane>) -> VecDeque<Waiting> {
        if !self.trying.is_empty()
            && let Some(trying) = lane.and_then(|lane| self.trying.get_mut(&lane))
        {
            trying.in_sink = trying.in_sink.saturating_sub(1);
            if trying.crosses && trying.in_sink == 0 {
                return self.open(lane);
            }
        }
        VecDeque::new()
    }

    /// Whether nothing of a stopped lane is in the sink any more.
    pub fn is_clear(&self, lane: Option<Lane>) -> bool {
        lane.and_then(|lane| self.trying.get(&lane)).is_none_or(|trying| trying.in_sink == 0)
    }

    /// How many events wait in a lane.
    pub fn waiting_in(&self, lane: Option<Lane>) -> usize {
        lane.and_then(|lane| self.trying.get(&lane)).map_or(0, |trying| trying.waiting.len())
    }

    /// Queues an event behind the one that its lane waits for.
    pub fn wait(&mut self, lane: Option<Lane>, event: Waiting) {
        let trying = lane.and_then(|lane| self.trying.get_mut(&lane));
        debug_assert!(trying.is_some(), "only behind `Gate::Trying`");
        if let Some(trying) = trying {
            trying.waiting.push_back(event);
        }
    }

    /// Closes a lane and returns what waited in it, in order, to be held.
    pub fn close(&mut self, table: TableIx, lane: Option<Lane>, why: Closed) -> VecDeque<Waiting> {
        let Some(lane) = lane else { return VecDeque::new() };
        self.add_closed(table, lane, why);
        self.open(Some(lane))
    }

    /// Opens a lane whose event is out of the way, and returns what waited in it, in order.
    pub fn open(&mut self, lane: Option<Lane>) -> VecDeque<Waiting> {
        let trying = lane.and_then(|lane| self.trying.remove(&lane));
        trying.unwrap_or_default().waiting
    }

    /// Adds to the closed lanes of a table. What an operator has to open stays so.
    pub fn add_closed(&mut self, table: TableIx, lane: Lane, why: Closed) {
        let closed = self.closed_of(table);
        let before = match why {
            Closed::Parked => closed.lanes.insert(lane, why),
            Closed::Store => Some(*closed.lanes.entry(lane).or_insert(why)),
        };
        closed.parked += usize::from(why == Closed::Parked && before != Some(why));
    }

    /// Forgets the closed lanes of a table: the source lists them anew.
    pub fn forget_closed(&mut self, table: TableIx) {
        *self.closed_of(table) = ClosedLanes::default();
    }

    pub fn parked(&self, table: TableIx) -> usize {
        self.closed.get(table.0 as usize).map_or(0, |closed| closed.parked)
    }

    /// Forgets everything: a new generation learns the closed lanes from the database.
    pub fn clear(&mut self) {
        self.trying.clear();
        self.closed.clear();
    }

    fn closed_of(&mut self, table: TableIx) -> &mut ClosedLanes {
        let index = table.0 as usize;
        if self.closed.len() <= index {
            self.closed.resize_with(index + 1, ClosedLanes::default);
        }
        &mut self.closed[index]
    }
}
