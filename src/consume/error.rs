//! Why there is no event at a place, and what to do about it.

use super::Place;
use crate::{record::encode::DecodeError, store::StoreError};

/// An event that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct ReadError {
    /// Commits are held back here until it is done, as an event is.
    pub place: Place,
    pub problem: Problem,
}

#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("header {name}: {why}; the record was not written by a relay, or was changed since")]
    Header { name: String, why: String },
    #[error(
        "the payload has {size} bytes, and {at_most} are taken at most; raise the reader's limit if it is genuine"
    )]
    TooLarge { size: u64, at_most: u64 },
    #[error("the payload is in an object store, and none is configured for this reader: it is at {uri}")]
    NoStore { uri: String },
    #[error(transparent)]
    Store(StoreError),
    #[error("{what} has {found} bytes where {expected} were promised; it was changed since it was written")]
    WrongSize { what: String, expected: u64, found: u64 },
    #[error("{what} has another sha256 than was promised; it was changed since it was written")]
    WrongChecksum { what: String },
    #[error("chunks of {id} do not fit together: {why}")]
    Conflict { id: String, why: &'static str },
    /// Most often what a crash has left, of an event that has come whole since, or that an operator
    /// has skipped.
    #[error("chunks of {id} (event {event:?}): {have} of {count} came, and no more in {gap} offsets")]
    Expired { id: String, event: Option<String>, have: usize, count: u32, gap: i64 },
    #[error(
        "chunks of {id} (event {event:?}) had to make room after {have} of {count}: raise the reader's limits"
    )]
    NoRoom { id: String, event: Option<String>, have: usize, count: u32 },
    #[error("the payload was encoded as {0:?} on its way, which this reader does not know: is it too old?")]
    Encoding(String),
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl ReadError {
    /// Whether it passes by itself, so that trying again is enough.
    pub fn is_transient(&self) -> bool {
        matches!(&self.problem, Problem::Store(error) if error.is_transient())
    }
}
