//! How far the tables are with what is to be let go: a part changes hands when nothing of it is in flight.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use crate::event::TableIx;

#[derive(Debug)]
pub struct Drain {
    /// For each table the last list of parts of which it holds nothing that was there before and is not in it.
    seen_off: Vec<AtomicU64>,
    news: Notify,
}

impl Drain {
    /// One entry for each table: whether it is shared.
    pub fn new(shared: impl IntoIterator<Item = bool>) -> Drain {
        let start = |shared| AtomicU64::new(if shared { 0 } else { u64::MAX });
        Drain { seen_off: shared.into_iter().map(start).collect(), news: Notify::new() }
    }

    /// A table has nothing left that is not in the list of this number.
    pub fn seen_off(&self, table: TableIx, serial: u64) {
        if self.seen_off[table.0 as usize].fetch_max(serial, Ordering::AcqRel) < serial {
            self.news.notify_one();
        }
    }

    /// The last list that all tables have seen off.
    pub fn done(&self) -> u64 {
        self.seen_off.iter().map(|serial| serial.load(Ordering::Acquire)).min().unwrap_or(u64::MAX)
    }

    pub async fn news(&self) {
        self.news.notified().await;
    }
}
