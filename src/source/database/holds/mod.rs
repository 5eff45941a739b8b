//! Holds, pauses, replays and the audit log, as all dialects have them: the statements in `statements`, what is done
//! with them in `calls`.
//!
//! One relay changes a table's holds, and that only in transactions that end with
//! [`HoldsSql::fence`]: an owner that lost its lease changes nothing.

mod calls;
mod statements;

#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(super) use self::statements::{OR_NOTHING, delete, hold_again, or_topic};
pub(super) use self::{
    calls::{APPLY, KEYS_AT_ONCE, SHOWN_AT_MOST, count, execute, execute_matching, hold_methods, matching},
    statements::{Dialect, HoldsSql},
};
use crate::source::hold::Scope;

/// States of a hold of a kept row which is one no more: the row is to be read again, or is settled.
pub(super) const RELEASED: &str = "released";
pub(super) const SKIPPED: &str = "skipped";
/// The columns that every read has before those of the event: place, timestamp, payload length.
pub(super) const FIXED: usize = 3;

/// A scope as the words of its row.
pub(super) fn words_of(scope: &Scope) -> (&'static str, &str, &[u8]) {
    match scope {
        Scope::Table => ("table", "", b""),
        Scope::Topic(topic) => ("topic", topic, b""),
        Scope::Key { topic, key } => ("key", topic.as_deref().unwrap_or_default(), key),
    }
}

pub(super) fn scope_of(word: &str, topic: String, key: Vec<u8>) -> Scope {
    match word {
        "topic" => Scope::Topic(topic),
        "key" => Scope::Key { topic: Some(topic).filter(|topic| !topic.is_empty()), key },
        _ => Scope::Table,
    }
}
