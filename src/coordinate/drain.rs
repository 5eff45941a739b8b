//! How far the tables are with what is to be let go: a part changes hands when nothing of it is in flight.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::Notify;

use crate::event::TableIx;

#[derive(Debug, Default)]
pub struct Drain {
    /// The tables that are shared.
    tables: Mutex<BTreeMap<TableIx, Table>>,
    news: Notify,
    /// Exactly once: something that nobody here can settle may be published.
    barred: AtomicBool,
    /// The relay has stopped, and left nothing that anybody would have to settle.
    clean: AtomicBool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Table {
    /// The last list of parts of which it holds nothing that was there before and is not in it.
    seen_off: u64,
    /// Exactly once: something may be published that is not recorded, and is not known yet to be either.
    unsettled: bool,
}

impl Drain {
    /// A table that is shared begins: it is waited for from now on.
    pub fn begins(&self, table: TableIx) {
        self.lock().insert(table, Table::default());
    }

    /// A table has ended, and has nothing in flight.
    pub fn ended(&self, table: TableIx) {
        self.lock().remove(&table);
        self.news.notify_one();
    }

    /// A table has nothing left that is not in the list of this number.
    pub fn seen_off(&self, table: TableIx, serial: u64) {
        let mut tables = self.lock();
        if let Some(table) = tables.get_mut(&table).filter(|table| table.seen_off < serial) {
            table.seen_off = serial;
            self.news.notify_one();
        }
    }

    /// Whether it is known of a table what is published of it, and recorded.
    pub fn is_settled(&self, table: TableIx, settled: bool) {
        if let Some(table) = self.lock().get_mut(&table) {
            table.unsettled = !settled;
        }
    }

    /// Nothing is let go any more, or again.
    pub fn bar(&self, barred: bool) {
        self.barred.store(barred, Ordering::Relaxed);
    }

    /// The relay has stopped.
    pub fn stopped(&self, clean: bool) {
        self.clean.store(clean, Ordering::Relaxed);
    }

    /// Whether everything can be let go as it is.
    pub fn is_clean(&self) -> bool {
        self.clean.load(Ordering::Relaxed) && !self.barred.load(Ordering::Relaxed)
    }

    /// The last list that all tables have seen off; `None` where nothing may be let go, and is worked on till then.
    pub fn done(&self) -> Option<u64> {
        let tables = self.lock();
        let settled = !self.barred.load(Ordering::Relaxed) && !tables.values().any(|table| table.unsettled);
        settled.then(|| tables.values().map(|table| table.seen_off).min().unwrap_or(u64::MAX))
    }

    pub async fn news(&self) {
        self.news.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<TableIx, Table>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_let_go_before_all_tables_have_seen_it_off_and_are_settled() {
        let (drain, [one, other]) = (Drain::default(), [TableIx(0), TableIx(1)]);
        assert_eq!(drain.done(), Some(u64::MAX), "there is nothing to wait for");
        drain.begins(one);
        drain.begins(other);
        drain.seen_off(one, 2);
        assert_eq!(drain.done(), Some(0));
        drain.seen_off(other, 1);
        assert_eq!(drain.done(), Some(1));
        drain.is_settled(one, false);
        assert_eq!(drain.done(), None);
        drain.is_settled(one, true);
        drain.ended(other);
        assert_eq!(drain.done(), Some(2));
        drain.bar(true);
        assert_eq!(drain.done(), None);
        drain.stopped(true);
        assert!(!drain.is_clean());
        drain.bar(false);
        assert!(drain.is_clean());
    }
}
