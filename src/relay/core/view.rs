//! What the loop and the status board see of the core.

use super::{Core, Phase};
use crate::{
    event::TableIx,
    source::hold::{Counts, Scope},
};

impl Core {
    /// Whether events may come in now. While a producer is rebuilt they wait in the channel.
    pub fn wants_events(&self) -> bool {
        self.phase == Phase::Running
    }

    /// Events that are not finished: admitted, and neither acknowledged nor held.
    pub fn open(&self) -> usize {
        self.ledger.open()
    }

    /// Events that Kafka has not answered for yet, and holds that are being written.
    pub fn unanswered(&self) -> usize {
        self.ledger.in_sink() + self.holding
    }

    pub fn parked_keys(&self, table: TableIx) -> usize {
        self.lanes.parked(table)
    }

    /// Held events, parked ones among them.
    pub fn held_counts(&self, table: TableIx) -> Counts {
        self.progress[table.0 as usize].held
    }

    /// What an operator paused within a table.
    pub fn paused(&self, table: TableIx) -> Vec<String> {
        self.progress[table.0 as usize].paused.iter().map(Scope::describe).collect()
    }

    /// Events of a table that are read and not settled.
    pub fn in_flight(&self, table: TableIx) -> usize {
        self.progress[table.0 as usize].open
    }

    /// Events of a table that Kafka acknowledged.
    pub fn published(&self, table: TableIx) -> u64 {
        self.progress[table.0 as usize].published
    }

    /// When Kafka last acknowledged an event of a table, in milliseconds since the Unix epoch.
    pub fn last_publish_ms(&self, table: TableIx) -> Option<i64> {
        self.progress[table.0 as usize].last_publish_ms
    }

    /// What last went wrong with an event of a table.
    pub fn last_error(&self, table: TableIx) -> Option<&str> {
        self.progress[table.0 as usize].last_error.as_deref()
    }

    pub fn halted(&self, table: TableIx) -> bool {
        self.progress[table.0 as usize].halted
    }

    /// Topics that cannot be written to now.
    pub fn blocked_topics(&self) -> Vec<String> {
        self.topics.troubled().map(|topic| topic.name.clone()).collect()
    }
}
