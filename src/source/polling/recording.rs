//! Recording: what was published is deleted or marked, and what is held is written down.

use tokio::time::Instant;

use super::Task;
use crate::{
    event::Place,
    sink::Ticket,
    source::{
        Yield,
        database::{Error, answered},
        hold::Counts,
    },
};

/// Places recorded by one statement.
const RECORD_AT_MOST: usize = 5_000;

impl Task {
    /// Deletes or marks what is settled, in batches: at once when there is much, else no more often
    /// than rows are read. Returns when the rest is due.
    pub(super) async fn record(&mut self, epoch: i64, all: bool) -> Result<Option<Instant>, Error> {
        let Some(outbox) = &self.outbox else { return Ok(None) };
        let state = &mut self.state;
        while !state.owed.is_empty() {
            let due = self.last_record + self.poller.poll.min_interval;
            if !all && state.owed.len() < self.poller.poll.batch && Instant::now() < due {
                return Ok(Some(due));
            }
            let batch = &state.owed[..state.owed.len().min(RECORD_AT_MOST)];
            fail::fail_point!("acknowledged", |_| std::process::abort());
            answered("record what was published", outbox.record(batch, epoch)).await?;
            fail::fail_point!("recorded", |_| std::process::abort());
            if !state.replays.is_empty() {
                let done: Vec<Place> = batch.iter().filter_map(|place| state.replays.take(place)).collect();
                let done: Vec<String> = done.iter().map(Place::to_string).collect();
                answered("record what was replayed", outbox.replayed(&done)).await?;
            }
            for place in batch {
                state.known.remove(place);
            }
            let recorded = batch.len();
            state.owed.drain(..recorded);
            self.last_record = Instant::now();
        }
        Ok(None)
    }

    /// Commits holds. What was published before them is recorded first: read again, it would be held
    /// behind them.
    pub(super) async fn hold(&mut self, epoch: i64) -> Result<(), Error> {
        let Some(outbox) = &self.outbox else { return Ok(()) };
        if self.state.holds.is_empty() {
            return Ok(());
        }
        fail::fail_point!("before-park", |_| std::process::abort());
        answered("hold events", outbox.hold(&self.state.holds, epoch)).await?;
        fail::fail_point!("mid-park", |_| std::process::abort());
        let holds = std::mem::take(&mut self.state.holds);
        let mut tickets: Vec<Ticket> = Vec::with_capacity(holds.len());
        let mut counts = Counts::default();
        for hold in holds {
            self.state.known.remove(&hold.place);
            self.state.held.insert(hold.place);
            counts.add(Counts::of(hold.cause, 1));
            tickets.push(hold.ticket);
        }
        self.state.skip_held = true;
        self.send(Yield::Held { tickets, counts }).await;
        Ok(())
    }
}
