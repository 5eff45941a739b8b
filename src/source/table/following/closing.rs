//! From the table to the log: the table is polled until nothing is left, then read once more, then the log is
//! followed; and back.

use std::collections::HashSet;

use tokio::time::Instant;
use tracing::info;

use super::{
    super::{State, Task},
    Following, Overlap, Phase,
};
use crate::{
    event::Place,
    source::database::{Error, Outbox, Reach, answered},
};

/// More rows than this read in step 1 are no end: the table is polled on.
const LAST_ROWS_AT_MOST: usize = 50_000;

impl Task {
    /// Reads the table from its head, before anything more is taken from the log.
    pub(in crate::source::table) fn back_to_the_table(&mut self) {
        let Some(log) = &mut self.log else { return };
        if !matches!(log.phase, Phase::Polling) {
            log.phase = Phase::Polling;
            self.state.read_from_head(self.outbox.as_deref());
            self.next_read = Instant::now();
            self.interval = self.source.poll.min_interval;
        }
        if log.only {
            return;
        }
        log.acks.defer_all();
        log.found = None;
        self.state.known.in_log().for_each(|known| known.number = None);
    }

    /// Drops what the log brings and polling finds, while the table is polled or stopped.
    pub(in crate::source::table) async fn skim(&mut self, stopped: bool) -> Result<(), Error> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let Some(incoming) = log.incoming.as_mut().filter(|_| !log.only) else { return Ok(()) };
        'batches: loop {
            if log.batch.as_ref().is_none_or(|batch| batch.rows.is_empty()) {
                // Its room is free for the next one.
                log.batch = None;
                log.batch = incoming.batches.try_recv().ok();
            }
            let Some(batch) = &mut log.batch else { break };
            while let Some(row) = batch.rows.front() {
                if !log.moment.as_ref().is_some_and(|moment| moment.sees(&row.at)) {
                    let moment = answered("note the moment", self.source.database.moment()).await?;
                    let sees = moment.sees(&row.at);
                    log.moment = Some(moment);
                    if !sees {
                        // It has committed, and cannot be seen yet.
                        break 'batches;
                    }
                }
                batch.rows.pop_front();
                log.acks.defer_next();
            }
        }
        // What is stopped stays in the table, and is not waited for: that it is stopped is written down.
        if stopped && self.state.known.is_empty() {
            log.acks.settle_deferred();
        }
        log.tell();
        Ok(())
    }

    /// A read has come to the end of the table.
    pub(in crate::source::table) async fn end_of_table(&mut self) -> Result<(), Error> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let Some(incoming) = &log.incoming else { return Ok(()) };
        match &mut log.phase {
            Phase::Polling if log.only => {
                log.phase = Phase::Streaming { overlap: None };
                self.say("stream", "the log is read");
            }
            Phase::Polling if incoming.progress.is_current() => {
                let moment = answered("note the moment", self.source.database.moment()).await?;
                log.phase = Phase::Closing { moment, read: HashSet::new() };
                self.next_read = Instant::now();
            }
            Phase::Polling | Phase::Streaming { .. } => {}
            Phase::Closing { moment, read } => {
                let until = answered("note the moment", self.source.database.moment()).await?;
                let overlap = Overlap { moment: moment.clone(), read: std::mem::take(read), until };
                log.phase = Phase::Streaming { overlap: Some(overlap) };
                log.found = Some(self.state.known.places().collect());
                log.tell();
                let again = std::mem::take(&mut log.sweeping);
                log.sweep_at = Instant::now() + log.sweep.unwrap_or_default();
                if !again {
                    let table = self.source.spec.name.as_str();
                    info!(table, "nothing is left in the table: the log is followed");
                    self.say("stream", "the log is read");
                }
            }
        }
        Ok(())
    }

    /// Whether this read is one of step 1, which looks at the whole table.
    pub(in crate::source::table) fn is_closing(&self) -> bool {
        matches!(&self.log, Some(Following { phase: Phase::Closing { .. }, .. }))
    }

    /// Rows that polling hands over.
    pub(in crate::source::table) fn polled(&mut self, place: &Place) {
        if let Some(log) = &mut self.log
            && let Phase::Closing { read, .. } = &mut log.phase
        {
            read.insert(place.clone());
            if read.len() > LAST_ROWS_AT_MOST {
                log.phase = Phase::Polling;
            }
        }
    }
}

impl State {
    /// Reads begin at the head of the table.
    pub(in crate::source::table) fn read_from_head(&mut self, outbox: Option<&Outbox>) {
        if let Some(outbox) = outbox {
            self.reach = outbox.has_cursor().then_some(Reach::NOTHING);
        }
        self.horizon = None;
    }
}
