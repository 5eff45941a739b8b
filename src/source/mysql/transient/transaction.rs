//! The transaction that is being read: what it has inserted, as far as it is kept. Pure.

use std::sync::Arc;

use crate::{
    event::{Event, Place},
    relay::core::window_bytes,
    source::log::{
        binlog::{Commit, Coordinates, SharedCommit},
        position::Identity,
    },
};

pub const SAVEPOINT: &str = "it goes back to a savepoint, and is too large to be kept";

#[derive(Debug)]
pub struct Transaction {
    pub identity: Identity,
    /// Where it begins.
    pub start: Coordinates,
    /// When it was made, in seconds since 1970.
    pub seconds: u32,
    /// It has begun, and may have rows.
    pub is_open: bool,
    /// It is read again and known to commit: its rows are handed over as they come.
    pub commits: bool,
    /// It is large. Its rows are not kept, and it is read again when it has committed.
    pub is_large: bool,
    /// What of it cannot be read exactly.
    pub unreadable: Option<&'static str>,
    /// Rows that are kept, by their tables.
    pub rows: Vec<(usize, Event)>,
    bytes: usize,
    /// For each table, how many rows it has had.
    counts: Vec<u32>,
    savepoints: Vec<Savepoint>,
    pub at: SharedCommit,
}

#[derive(Debug)]
struct Savepoint {
    name: Vec<u8>,
    /// Rows that it had had, and those that were kept.
    came: u64,
    kept: usize,
}

impl Transaction {
    pub fn new(identity: Identity, start: Coordinates, seconds: u32, tables: usize) -> Transaction {
        Transaction {
            identity,
            start,
            seconds,
            is_open: false,
            commits: false,
            is_large: false,
            unreadable: None,
            rows: Vec::new(),
            bytes: 0,
            counts: vec![0; tables],
            savepoints: Vec::new(),
            at: Arc::new(Commit { gtid: None, end: start }),
        }
    }

    /// Whether it has had rows of ours.
    pub fn has_rows(&self) -> bool {
        self.came() > 0
    }

    fn came(&self) -> u64 {
        self.counts.iter().copied().map(u64::from).sum()
    }

    /// The tables of which it has had rows.
    pub fn tables(&self) -> impl Iterator<Item = usize> {
        self.counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(table, _)| table)
    }

    pub fn cannot_be_read(&mut self, why: &'static str) {
        self.unreadable.get_or_insert(why);
    }

    /// A row. Its place is the same whenever the log is read, and in the order of the log, as text too; `era` tells
    /// logs apart, of which a later one has the greater.
    pub fn take(&mut self, table: usize, event: Event, era: i64, limit: usize) {
        let Coordinates { file, at } = self.start;
        let place = format!("{era:010}.{file:010}.{at:010}.{:08}", self.counts[table]);
        self.counts[table] += 1;
        if self.is_large {
            return;
        }
        self.bytes += window_bytes(&event);
        self.rows.push((table, Event { place: Place::Text(place.into()), ..event }));
        // One that has come is no less kept for being read again.
        if self.bytes > limit && self.rows.len() > 1 && !self.commits {
            self.is_large = true;
            self.rows = Vec::new();
        }
    }

    /// What is kept, to be handed over.
    pub fn take_rows(&mut self) -> Vec<(usize, Event)> {
        self.bytes = 0;
        std::mem::take(&mut self.rows)
    }

    pub fn savepoint(&mut self, name: &[u8]) {
        let point = Savepoint { name: plain(name), came: self.came(), kept: self.rows.len() };
        self.savepoints.push(point);
    }

    /// What came after the savepoint is undone.
    pub fn roll_back_to(&mut self, name: &[u8]) {
        let name = plain(name);
        let point = self.savepoints.iter().rposition(|point| point.name == name);
        let (came, kept) = match point.map(|index| &self.savepoints[index]) {
            Some(point) => (point.came, point.kept),
            // It was set before there was anything to be told of.
            None => (0, 0),
        };
        if came == self.came() {
            return;
        }
        if self.is_large || self.commits {
            return self.cannot_be_read(SAVEPOINT);
        }
        self.rows.truncate(kept);
        self.bytes = self.rows.iter().map(|(_, event)| window_bytes(event)).sum();
        self.savepoints.truncate(point.map_or(0, |index| index + 1));
    }
}

/// A name without its quotes; they are compared without regard to case.
fn plain(name: &[u8]) -> Vec<u8> {
    let name = name.strip_prefix(b"`").and_then(|name| name.strip_suffix(b"`")).unwrap_or(name);
    name.to_ascii_lowercase()
}
