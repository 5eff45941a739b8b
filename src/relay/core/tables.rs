//! Tables that come and go while the relay runs: its configuration was reloaded.
//!
//! One that goes is read no more, and what of it was not sent yet is given back: whoever reads the table next
//! finds it. What was sent, or is being held, comes to its end first. Other tables do not notice.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use tracing::warn;

use super::{Core, Progress, Table, Trial};
use crate::{event::TableIx, sink::Ticket};

impl Core {
    /// Takes a table in, at a place that is free or the next one.
    pub fn add(&mut self, table: TableIx, rules: Arc<Table>) {
        let index = table.0 as usize;
        debug_assert!(index <= self.tables.len(), "places are given out in order");
        if index == self.tables.len() {
            self.tables.push(rules);
            self.progress.push(Progress::default());
        } else {
            self.tables[index] = rules;
            self.progress[index] = Progress::default();
        }
        self.give_up_times = self.tables.iter().filter_map(|table| table.give_up.after).collect();
    }

    /// A table is to go: gives back what was not sent.
    pub(super) fn retire(&mut self, table: TableIx) {
        self.retiring.insert(table);
        self.progress[table.0 as usize].opened = None;
        let unsent: HashSet<Ticket> = self.ledger.unsent_of(table).collect();
        self.trials.retain(|trial| !unsent.contains(&trial.waiting.ticket));
        self.topics.forget(&unsent);
        for ticket in unsent {
            self.give_back(ticket);
        }
        self.suspects.retain(|(of, _)| *of != table);
        self.failed_once.retain(|(of, _)| *of != table);
    }

    /// What of a table that goes has failed meanwhile is not tried again.
    pub(super) fn give_back_what_failed(&mut self) {
        if self.retiring.is_empty() {
            return;
        }
        let (ledger, retiring) = (&self.ledger, &self.retiring);
        let goes = |trial: &Trial| {
            ledger.get(trial.waiting.ticket).is_some_and(|entry| retiring.contains(&entry.table))
        };
        let (failed, kept): (VecDeque<Trial>, _) =
            std::mem::take(&mut self.trials).into_iter().partition(goes);
        self.trials = kept;
        for trial in failed {
            self.give_back(trial.waiting.ticket);
        }
    }

    fn give_back(&mut self, ticket: Ticket) {
        self.packing.forget(ticket);
        if let Some(entry) = self.ledger.settle(ticket) {
            // Who waited in its lane is of the same table, and given back too.
            self.lanes.open(entry.lane);
            self.window.release(1, entry.bytes);
            self.progress[entry.table.0 as usize].open -= 1;
        }
    }

    /// Whether nothing of a table is in flight.
    pub fn is_drained_of(&self, table: TableIx) -> bool {
        self.progress[table.0 as usize].open == 0
    }

    /// What was sent of a table that goes has no end: it ends as every fault does.
    pub(super) fn wait_no_longer(&mut self, table: TableIx) {
        warn!(
            table = self.tables[table.0 as usize].name,
            events = self.progress[table.0 as usize].open,
            "kafka does not answer for what was sent of a table that is to stop: producers are rebuilt, and what was \
             in flight may be repeated"
        );
        self.start_over();
    }

    /// The source of a table has ended: its place is free.
    pub fn remove(&mut self, table: TableIx) {
        self.retiring.remove(&table);
        self.lanes.forget_closed(table);
        self.published.retain(|(of, _), _| *of != table);
        self.progress[table.0 as usize] = Progress::default();
    }

    pub fn generation(&self) -> u32 {
        self.ledger.generation()
    }
}
