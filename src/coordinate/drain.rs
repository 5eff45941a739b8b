//! How far the tables are with what is to be let go: a part changes hands when nothing of it is in flight.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::event::TableIx;

#[derive(Debug, Default)]
pub struct Drain {
    /// For each table that is shared the last list of parts of which it holds nothing that was there before and is
    /// not in it.
    seen_off: Mutex<BTreeMap<TableIx, u64>>,
    news: Notify,
}

impl Drain {
    /// A table that is shared begins: it is waited for from now on.
    pub fn begins(&self, table: TableIx) {
        self.lock().insert(table, 0);
    }

    /// A table has ended, and has nothing in flight.
    pub fn ended(&self, table: TableIx) {
        self.lock().remove(&table);
        self.news.notify_one();
    }

    /// A table has nothing left that is not in the list of this number.
    pub fn seen_off(&self, table: TableIx, serial: u64) {
        let mut seen_off = self.lock();
        if let Some(before) = seen_off.get_mut(&table).filter(|before| **before < serial) {
            *before = serial;
            self.news.notify_one();
        }
    }

    /// The last list that all tables have seen off.
    pub fn done(&self) -> u64 {
        self.lock().values().min().copied().unwrap_or(u64::MAX)
    }

    pub async fn news(&self) {
        self.news.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<TableIx, u64>> {
        self.seen_off.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
