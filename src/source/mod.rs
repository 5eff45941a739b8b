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
//! - A new generation starts with [`Yield::Gates`], and reads again everything that is not recorded.
//! - After a release it reads again from the start of the table, before anything that is new.

pub mod database;
#[cfg(any(feature = "mysql", feature = "postgres"))]
mod dial;
pub mod hold;
pub mod kept;
pub mod log;
#[cfg(feature = "mysql")]
pub mod mysql;
#[cfg(any(feature = "mysql", feature = "postgres"))]
mod password;
#[cfg(feature = "postgres")]
pub mod postgres;
pub mod table;
pub mod times;
#[cfg(any(feature = "mysql", feature = "postgres"))]
mod tls;

use std::future::Future;

use tokio::sync::{mpsc, oneshot};

pub use self::hold::{Cause, Hold};
use self::hold::{Counts, Outcome, Over, Request, Scope};
use crate::{
    coordinate::Claim,
    event::{Event, Place, TableIx},
    sink::Ticket,
};

/// (topic, key) as they go out.
pub type RouteKey = (String, Option<Vec<u8>>);
/// A key whose events are held, and whether that is for the object store; else it is parked.
pub type ClosedKey = (String, Option<Vec<u8>>, bool);

/// From a source to the relay, in one channel: the order matters.
#[derive(Debug)]
pub enum Yield {
    /// Keys that are closed: a piece of the list that [`Yield::Gates`] ends.
    Closed { generation: u32, keys: Vec<ClosedKey> },
    /// All that stops events of the table, as it is now. Sent when a generation begins and after
    /// every change; the source reads nothing and holds nothing until [`Command::Go`] answers.
    Gates { generation: u32, serial: u32, gates: Gates },
    /// Committed rows, in the table's order.
    Events { generation: u32, events: Vec<Event> },
    /// Exactly once: these are recorded.
    Recorded { places: Vec<Place> },
    /// These holds are committed.
    Held { tickets: Vec<Ticket>, counts: Counts },
    /// These were to be held behind something that has changed meanwhile: they are read again.
    Forgotten { tickets: Vec<Ticket> },
    /// The source has ended, and this is the last of it.
    Ended,
}

/// What stops events of a table, closed keys apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gates {
    pub paused: Vec<Scope>,
    /// Topics with events that are held until they can be written to.
    pub topics: Vec<String>,
    pub held: Counts,
}

/// From the relay to a source, in one channel: the order matters.
#[derive(Debug)]
pub enum Command {
    /// Kafka acknowledged these: record it.
    Settled(Vec<Place>),
    /// Commit these holds, then answer with [`Yield::Held`].
    Hold(Vec<Hold>),
    /// Read these again, after a while.
    Forget(Vec<Place>),
    /// Forget what was handed over and not settled, and read it again, as this generation. Exactly once: record
    /// what is in doubt before that.
    Restart { generation: u32, taken: Option<Taken> },
    /// The gates of this number are known: go on, or, where too much is held, only go on recording.
    Go { serial: u32, halted: bool },
    /// Read no more of this table (too much is held); go on recording.
    Halt,
    /// Release what is held for this.
    Release(Over),
    /// An operator's verb.
    Verb(Asked),
    /// Read no more; record what still comes and end when the channel closes.
    Stop,
}

/// The delivery unit was taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Under which membership, and with which slots.
    pub claim: Claim,
    /// Published, and perhaps not recorded.
    pub doubts: Vec<Place>,
}

/// A verb on its way to a table. Either it begins, or whoever asked takes it back: never both, so that the answer is
/// true.
#[derive(Debug)]
pub struct Asked {
    request: Request,
    begins: oneshot::Sender<()>,
    answer: oneshot::Sender<Result<Outcome, Refusal>>,
}

/// Where the outcome of a verb comes.
#[derive(Debug)]
pub struct Answer {
    begun: oneshot::Receiver<()>,
    pub outcome: oneshot::Receiver<Result<Outcome, Refusal>>,
}

impl Asked {
    pub fn new(request: Request) -> (Asked, Answer) {
        let ((begins, begun), (answer, outcome)) = (oneshot::channel(), oneshot::channel());
        (Asked { request, begins, answer }, Answer { begun, outcome })
    }

    /// `None`: it was taken back, and whoever asked was told so.
    pub fn begin(self) -> Option<(Request, oneshot::Sender<Result<Outcome, Refusal>>)> {
        self.begins.send(()).ok().map(|()| (self.request, self.answer))
    }

    pub fn refuse(self, refusal: Refusal) {
        // Whoever asked may be gone.
        self.answer.send(Err(refusal)).ok();
    }
}

impl Answer {
    /// Whether it is taken back: it had not begun, and will not.
    pub fn take_back(&mut self) -> bool {
        self.begun.close();
        self.begun.try_recv().is_err()
    }
}

/// Why a verb was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("this replica does not own the source now: ask the one that does")]
    NotOwner,
    #[error("{0}")]
    Wrong(String),
    #[error("{0}; nothing was changed")]
    Failed(String),
    /// The database may have done it without being able to say so.
    #[error(
        "{0}; it may have been carried out or not: look at what is so now (whippet parked, whippet status)"
    )]
    Unknown(String),
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
