//! Where events come from. A source reads committed rows and hands them over; it never hears of
//! Kafka. The relay tells it what is settled, and the source owns *how* that is recorded.
//!
//! What a source promises:
//!
//! - It hands over only what it claimed room for in the window, in the table's order: no event is
//!   handed over while an earlier one of its key, visible to the same snapshot, is neither handed
//!   over, held nor settled.
//! - It records an acknowledgement only for a place that the relay called settled, and never forgets
//!   one: after an error of the database it records what it owes before it reads again.
//! - A new generation starts with [`Yield::Opened`], which lists the parked keys, and reads again
//!   everything that is not recorded.

pub mod database;
pub mod polling;

use std::future::Future;

use tokio::sync::mpsc;

use crate::{
    event::{Event, Place, TableIx},
    sink::Ticket,
};

/// (topic, key) as they go out.
pub type RouteKey = (String, Option<Vec<u8>>);

/// From a source to the relay, in one channel: the order matters.
#[derive(Debug)]
pub enum Yield {
    /// A generation begins: these keys are parked, and this many events are held.
    Opened { generation: u32, parked: Vec<RouteKey>, held_events: u64 },
    /// Committed rows, in the table's order.
    Events { generation: u32, events: Vec<Event> },
    /// These holds are committed.
    Held { tickets: Vec<Ticket> },
}

/// From the relay to a source, in one channel: the order matters.
#[derive(Debug)]
pub enum Command {
    /// Kafka acknowledged these: record it.
    Settled(Vec<Place>),
    /// Commit these holds, then answer with [`Yield::Held`].
    Hold(Vec<Hold>),
    /// Forget what was handed over and not settled, and read it again, as this generation.
    Restart { generation: u32 },
    /// Read no more of this table (too much is held); go on recording.
    Halt,
    /// Read no more; record what still comes and end when the channel closes.
    Stop,
}

/// An event that is to be held: what the relay's own table keeps of it.
#[derive(Clone, Debug)]
pub struct Hold {
    pub ticket: Ticket,
    pub place: Place,
    pub event_id: String,
    pub topic: String,
    pub key: Option<Vec<u8>>,
    /// `rejected` for the event itself, `behind` for one that follows it.
    pub cause: &'static str,
    /// One sentence for the operator: what was wrong and what mends it.
    pub reason: String,
    pub attempts: u32,
}

/// A source's two ends of its channels.
#[derive(Debug)]
pub struct Feed {
    pub table: TableIx,
    pub events: mpsc::Sender<(TableIx, Yield)>,
    pub commands: mpsc::UnboundedReceiver<Command>,
}

/// A source runs until the relay closes its command channel, and repairs its own connections: an
/// error of the database is logged, shown in the status and tried again.
pub trait Source: Send + 'static {
    fn run(self, feed: Feed) -> impl Future<Output = ()> + Send;
}
