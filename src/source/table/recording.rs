//! Recording: what was published is deleted or marked, and what is held is written down.

use std::time::Duration;

use tokio::time::Instant;

use super::Task;
use crate::{
    event::Place,
    sink::Ticket,
    source::{
        Yield,
        database::{EXPIRED_AT_ONCE, Error, answered},
        hold::Counts,
    },
};

/// Places recorded by one statement.
const RECORD_AT_MOST: usize = 5_000;
/// How often published rows are looked at for their age, and when again while there are many.
const EXPIRE_EVERY: Duration = Duration::from_secs(10);
const EXPIRE_MORE_AFTER: Duration = Duration::from_millis(200);
/// How often rows are recorded that came from the log, or are large: a statement costs more than its rows.
pub(super) const RECORD_EVERY: Duration = Duration::from_millis(50);
/// When those are tried again whose transaction could not be seen yet.
const RECORD_UNSEEN_AFTER: Duration = Duration::from_millis(500);

impl Task {
    /// Deletes or marks what is settled, in batches: at once when there is much, else no more often
    /// than rows are read. Returns when the rest is due.
    pub(super) async fn record(&mut self, epoch: i64, all: bool) -> Result<Option<Instant>, Error> {
        if self.source.spec.is_kept() {
            return self.record_kept(epoch, all).await;
        }
        let state = &mut self.state;
        if all || state.unseen_due.is_some_and(|due| due <= Instant::now()) {
            state.owed.append(&mut state.unseen);
            state.unseen_due = None;
        }
        while !self.state.owed.is_empty() {
            // Deleting is off the way of those that come from the log: a little later, and more at once.
            let pause = if self.is_streaming() { RECORD_EVERY } else { self.source.poll.min_interval };
            let due = self.last_record + pause;
            if !all && self.state.owed.len() < self.source.poll.batch && Instant::now() < due {
                return Ok(self.state.unseen_due.into_iter().chain([due]).min());
            }
            let Some(outbox) = &self.outbox else { return Ok(None) };
            let batch = &self.state.owed[..self.state.owed.len().min(RECORD_AT_MOST)];
            fail::fail_point!("acknowledged", |_| std::process::abort());
            let (mut unseen, moment) = self.hidden(batch).await?;
            if self.source.spec.stays() {
                let visible: Vec<Place>;
                let batch = if unseen.is_empty() {
                    batch
                } else {
                    visible = batch.iter().filter(|place| !unseen.contains(*place)).cloned().collect();
                    &visible
                };
                let rows = answered("record what was published", outbox.record(batch, epoch)).await?;
                if rows < batch.len() as u64 {
                    let (seen, more) = self.by_sight(batch).await?;
                    unseen.extend(more);
                    if !seen.is_empty() {
                        // It may be since then that they are seen.
                        answered("record what was published", outbox.record(&seen, epoch)).await?;
                    }
                }
            } else {
                // The rest is recorded by telling the log.
                let is_released = |place: &&Place| self.state.released.contains(*place);
                let released: Vec<Place> = batch.iter().filter(is_released).cloned().collect();
                if !released.is_empty() {
                    answered("record what was published", outbox.record(&released, epoch)).await?;
                    released.iter().for_each(|place| {
                        self.state.released.remove(place);
                    });
                }
            }
            fail::fail_point!("recorded", |_| std::process::abort());
            if !self.state.replays.is_empty() {
                let done: Vec<Place> =
                    batch.iter().filter_map(|place| self.state.replays.take(place)).collect();
                let done: Vec<String> = done.iter().map(Place::to_string).collect();
                answered("record what was replayed", outbox.replayed(&done)).await?;
            }
            let recorded = batch.len();
            self.has_seen(moment);
            let rest = self.state.owed.split_off(recorded);
            let mut batch = std::mem::replace(&mut self.state.owed, rest);
            if !unseen.is_empty() {
                batch.retain(|place| !unseen.contains(place));
                self.state.unseen.extend(unseen);
                self.state.unseen_due.get_or_insert(Instant::now() + RECORD_UNSEEN_AFTER);
            }
            self.forget_known(&batch);
            self.last_record = Instant::now();
            if self.source.exactly_once {
                self.send(Yield::Recorded { places: batch }).await;
            }
        }
        Ok(self.state.unseen_due)
    }

    /// Deletes published rows that are past their time: some at once, and others have their turn between.
    pub(super) async fn expire(&mut self, epoch: i64) -> Result<(), Error> {
        let Some(kept) = self.source.spec.retention else { return Ok(()) };
        if self.source.spec.is_kept() {
            self.note_milestone(kept, epoch).await?;
        }
        let Some(outbox) = &self.outbox else { return Ok(()) };
        if Instant::now() < self.expire_at {
            return Ok(());
        }
        let gone = answered("delete what was published long ago", outbox.expire(kept, epoch)).await?;
        let pause = if gone < EXPIRED_AT_ONCE { EXPIRE_EVERY } else { EXPIRE_MORE_AFTER };
        self.expire_at = Instant::now() + pause;
        Ok(())
    }

    /// Commits holds. What was published before them is recorded first: read again, it would be held
    /// behind them.
    pub(super) async fn hold(&mut self, epoch: i64) -> Result<(), Error> {
        let Some(outbox) = &self.outbox else { return Ok(()) };
        if self.state.holds.is_empty() {
            return Ok(());
        }
        fail::fail_point!("before-park", |_| std::process::abort());
        let held = outbox.hold(&self.state.holds, epoch, self.share.version);
        if !answered("hold events", held).await? {
            // Another relay changed the gates: they are looked at first.
            self.state.gates_due = true;
            return Ok(());
        }
        fail::fail_point!("mid-park", |_| std::process::abort());
        let holds = std::mem::take(&mut self.state.holds);
        let mut tickets: Vec<Ticket> = Vec::with_capacity(holds.len());
        let mut counts = Counts::default();
        self.forget_known(holds.iter().map(|hold| &hold.place));
        for hold in holds {
            self.state.released.remove(&hold.place);
            // Where the log is followed, the table is read from its head before it is polled again.
            if !self.is_streaming() {
                self.state.held.insert(hold.place);
            }
            counts.add(Counts::of(hold.cause, 1));
            tickets.push(hold.ticket);
        }
        self.state.skip_held = true;
        self.send(Yield::Held { tickets, counts }).await;
        Ok(())
    }
}
