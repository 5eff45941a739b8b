//! What passes between a log and the tables that follow it.
//!
//! The table is the truth, and the log is speed. A log brings the rows of a table in the order of their
//! commits; the table's own task decides which of them are new to it ([`Moment`]), hands them over,
//! records them, and tells the log how far it has settled them ([`Acks`]). Where the log ends, polling
//! goes on from what is in the table.

mod acks;
pub mod binlog;
mod decoded;
pub mod gtids;
mod moment;
mod open;
mod outlets;
pub mod position;

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc};

pub use self::{
    acks::Acks,
    decoded::{Decoded, Ready},
    moment::{At, Lsn, Moment, Snapshot, Unreadable},
    open::Open,
    outlets::Outlets,
};
use crate::event::Event;

/// What becomes of the log, as a table is told.
#[derive(Debug)]
pub enum Line {
    /// It is read from now on.
    Up(Incoming),
    /// It is not, and why. `lost`: what it alone had is gone.
    Down { why: String, lost: bool },
}

/// The end of one reading of the log that a table holds.
#[derive(Debug)]
pub struct Incoming {
    pub batches: mpsc::Receiver<Batch>,
    pub progress: Arc<Progress>,
}

/// What a log and a table that follows it tell each other of one reading.
#[derive(Debug, Default)]
pub struct Progress {
    /// Rows of the table that are settled, from the first one without a gap.
    settled: AtomicU64,
    /// The log has come to where it was when it began to be read.
    current: AtomicBool,
    /// The table waits until it is stored how far the log is settled.
    awaited: AtomicBool,
    /// Wakes the log when more is settled.
    changed: Arc<Notify>,
}

impl Progress {
    pub fn new(changed: Arc<Notify>) -> Progress {
        Progress { changed, ..Progress::default() }
    }

    pub fn settle(&self, rows: u64) {
        if self.settled.swap(rows, Ordering::Release) != rows {
            self.changed.notify_one();
        }
    }

    pub fn settled(&self) -> u64 {
        self.settled.load(Ordering::Acquire)
    }

    pub fn await_store(&self) {
        self.awaited.store(true, Ordering::Release);
    }

    /// Whether it waited; not any more.
    pub fn was_awaited(&self) -> bool {
        self.awaited.swap(false, Ordering::AcqRel)
    }

    pub fn is_current(&self) -> bool {
        self.current.load(Ordering::Acquire)
    }

    pub fn set_current(&self) {
        self.current.store(true, Ordering::Release);
    }
}

/// What only the log has of a table, and is not settled: read, and not published or held.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unsettled {
    pub rows: u64,
    /// When the oldest was committed.
    pub since: Option<Instant>,
}

/// Rows of one table, in the order of the log.
#[derive(Debug)]
pub struct Batch {
    pub rows: VecDeque<Streamed>,
    /// Room for what is on its way between log and table; free again when the batch is gone.
    pub room: OwnedSemaphorePermit,
}

/// A row that was inserted, as the log has it.
#[derive(Debug)]
pub struct Streamed {
    pub at: At,
    /// `None`: it is too large, or cannot be read as it is now; the table has it.
    pub event: Option<Event>,
}
