//! Keeping: nothing is written into rows that are published, so a frontier in the relay's own table tells
//! which of them are (`source::kept`). It is a cache here: whatever goes wrong, it is read again.

use std::{collections::HashSet, time::Duration};

use tokio::time::Instant;
use tracing::info;

use super::Task;
use crate::{
    event::Place,
    source::{
        database::{Error, Limits, answered},
        kept::{Frontier, Runs},
        log::At,
    },
};

/// How often what was published is written down.
const RECORD_EVERY: Duration = Duration::from_millis(50);
/// The same where nothing was published and only the frontier has moved.
const TIDY_EVERY: Duration = Duration::from_secs(1);
/// Runs of numbers that are written so often; with more of them, less often.
const FEW_RUNS: usize = 1_000;
/// While the log is followed: how often the frontier moves.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// More rows than this that the log is yet to bring are read from the table.
const STRAYS_AT_MOST: usize = 10_000;
/// Milestones within the time that rows are kept, and the longest and shortest time between two.
const MILESTONES: u32 = 32;
const MILESTONE_AT_MOST_AFTER: Duration = Duration::from_hours(1);
const MILESTONE_AT_LEAST_AFTER: Duration = Duration::from_millis(100);

/// What is settled in a kept table.
pub(super) struct Kept {
    /// Of the lease under which it was read.
    epoch: i64,
    pub frontier: Frontier,
    /// It has moved since it was written down.
    moved: bool,
    /// The pause between two writings.
    pause: Duration,
    look_at: Instant,
    milestone_at: Instant,
}

// A place that is no number was refused when the table was looked at.
impl Kept {
    pub fn take(&mut self, place: &Place, xid: Option<u32>) {
        if let Some(number) = place.number() {
            self.frontier.take(number, xid);
        }
    }

    pub fn give_back(&mut self, place: &Place) {
        if let Some(number) = place.number() {
            self.frontier.give_back(number);
        }
    }
}

impl Task {
    /// Reads the frontier, if it is not known, or may have been moved by another relay.
    pub(super) async fn know_frontier(&mut self, epoch: i64) -> Result<(), Error> {
        let known = self.state.kept.as_ref().is_some_and(|kept| kept.epoch == epoch);
        let Some(outbox) = self.outbox.as_ref().filter(|_| self.source.spec.is_kept() && !known) else {
            return Ok(());
        };
        let recorded = answered("read how far the table is published", outbox.frontier()).await?;
        let now = Instant::now();
        let mut kept = Kept {
            epoch,
            frontier: recorded.map(Frontier::from).unwrap_or_default(),
            moved: false,
            pause: RECORD_EVERY,
            look_at: now,
            milestone_at: now,
        };
        for place in self.state.known.places() {
            kept.take(&place, self.state.known.at(&place).and_then(At::xid));
        }
        self.state.kept = Some(kept);
        Ok(())
    }

    /// What operators released is to be read again, and what they skipped is not.
    pub(super) async fn gather(&mut self, epoch: i64) -> Result<(), Error> {
        let (Some(outbox), Some(kept)) = (&self.outbox, &mut self.state.kept) else { return Ok(()) };
        let ended = answered("look for what is released", outbox.ended_holds()).await?;
        for number in ended.released {
            let place = Place::Int(number);
            if !self.state.known.contains(&place) {
                kept.frontier.give_back(number);
            }
            self.state.released.insert(place);
        }
        if ended.skipped.is_empty() {
            return Ok(());
        }
        ended.skipped.iter().for_each(|number| kept.frontier.take(*number, None));
        self.write_frontier(epoch, &HashSet::new()).await?;
        let skipped: Vec<String> = ended.skipped.iter().map(ToString::to_string).collect();
        self.forget_ended(&skipped, epoch).await
    }

    async fn forget_ended(&self, places: &[String], epoch: i64) -> Result<(), Error> {
        let Some(outbox) = &self.outbox else { return Ok(()) };
        answered("forget what was held", outbox.forget_holds(places, epoch)).await
    }

    /// Writes the frontier down as it is when these are settled too.
    async fn write_frontier(&mut self, epoch: i64, settled: &HashSet<&Place>) -> Result<(), Error> {
        let (Some(outbox), Some(kept)) = (&self.outbox, &mut self.state.kept) else { return Ok(()) };
        let unsettled = self.state.known.places().filter(|place| !settled.contains(place));
        let recorded = kept.frontier.recorded(unsettled.filter_map(|place| place.number()));
        answered("record what was published", outbox.settle(&recorded, epoch)).await?;
        kept.moved = false;
        let runs = recorded.open.runs() + recorded.done.runs();
        kept.pause = RECORD_EVERY * u32::try_from(1 + runs / FEW_RUNS).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Writes down what was settled. Returns when that is due.
    pub(super) async fn record_kept(&mut self, epoch: i64, all: bool) -> Result<Option<Instant>, Error> {
        let Some(kept) = &self.state.kept else { return Ok(None) };
        let due = match (self.state.owed.is_empty(), kept.moved) {
            (false, _) => self.last_record + kept.pause,
            (true, true) => self.last_record + kept.pause.max(TIDY_EVERY),
            (true, false) => return Ok(None),
        };
        if !all && Instant::now() < due {
            return Ok(Some(due));
        }
        fail::fail_point!("acknowledged", |_| std::process::abort());
        // They stay there until they are recorded.
        let owed = self.state.owed.clone();
        let settled: HashSet<&Place> = owed.iter().collect();
        let texts = |among: &HashSet<Place>| -> Vec<String> {
            among.iter().filter(|place| settled.contains(place)).map(Place::to_string).collect()
        };
        let (released, replayed) = (texts(&self.state.released), texts(&self.state.replay.rows));
        if !released.is_empty() {
            self.forget_ended(&released, epoch).await?;
        }
        self.write_frontier(epoch, &settled).await?;
        fail::fail_point!("recorded", |_| std::process::abort());
        if let Some(outbox) = self.outbox.as_ref().filter(|_| !replayed.is_empty()) {
            answered("record what was replayed", outbox.replayed(&replayed)).await?;
        }
        for place in &owed {
            self.state.released.remove(place);
            self.state.replay.rows.remove(place);
        }
        self.state.owed.drain(..owed.len());
        self.forget_known(&owed);
        self.last_record = Instant::now();
        Ok(None)
    }

    /// One read of a kept table. Returns how many rows it found; `None` where not all were handed over.
    pub(super) async fn read_kept(&mut self, limits: Limits) -> Result<Option<usize>, Error> {
        let (Some(outbox), Some(kept)) = (&self.outbox, &self.state.kept) else { return Ok(None) };
        let upto = kept.frontier.upto;
        let looked = answered("read the outbox", outbox.read_kept(&kept.frontier, limits)).await?;
        fail::fail_point!("read", |_| std::process::abort());
        let (rows, mut found) = (looked.found.len(), looked.found);
        let numbers = || found.iter().filter_map(|found| found.event.place.number());
        // Those that were late alone filled it: there may be more of them.
        let late_is_left = numbers().filter(|number| *number <= upto).count() >= limits.rows;
        let last = numbers().next_back().unwrap_or(upto);
        found.retain(|found| !self.state.known.contains(&found.event.place));
        let handed_over = found.is_empty() || self.hand_over(found).await?;
        if let Some(kept) = self.state.kept.as_mut().filter(|_| handed_over && !late_is_left) {
            // What was not found is gone, or held.
            kept.frontier.again = Runs::default();
            kept.moved |= kept.frontier.advance(looked.seen, last);
        }
        Ok(handed_over.then_some(rows))
    }

    /// While the log is followed: moves the frontier to what can be seen now. When that is due again, if it
    /// is. Rows that the log is yet to bring are written down as open; those of a log that is far behind are
    /// read from the table.
    pub(super) async fn look_ahead(&mut self) -> Result<Option<Instant>, Error> {
        let (Some(outbox), Some(kept)) = (&self.outbox, &mut self.state.kept) else { return Ok(None) };
        if kept.frontier.since.is_empty() {
            return Ok(None);
        }
        let now = Instant::now();
        if now < kept.look_at {
            return Ok(Some(kept.look_at));
        }
        fail::fail_point!("look");
        let strays = outbox.strays(&kept.frontier, STRAYS_AT_MOST + 1);
        let strays = answered("look for rows that the log is yet to bring", strays).await?;
        // It is never more than a part of the work.
        kept.look_at = Instant::now() + LOOK_EVERY.max(10 * now.elapsed());
        if strays.found.len() > STRAYS_AT_MOST {
            let table = self.source.spec.name.as_str();
            info!(table, "the log is far behind: the table is polled first");
            self.leave_for_the_table("the log is far behind, and the table is polled first");
            return Ok(Some(now));
        }
        let last = kept.frontier.since.last().into_iter().chain(strays.found.iter().copied()).max();
        strays.found.iter().for_each(|number| kept.frontier.again.insert(*number));
        kept.moved |= kept.frontier.advance(strays.seen, last.unwrap_or(i64::MIN));
        Ok(Some(kept.look_at))
    }

    /// Notes now and then what is published, for rows to be deleted when they are old.
    pub(super) async fn note_milestone(&mut self, kept_for: Duration, epoch: i64) -> Result<(), Error> {
        let (Some(outbox), Some(kept)) = (&self.outbox, &mut self.state.kept) else { return Ok(()) };
        if Instant::now() < kept.milestone_at {
            return Ok(());
        }
        let apart = (kept_for / MILESTONES).clamp(MILESTONE_AT_LEAST_AFTER, MILESTONE_AT_MOST_AFTER);
        answered("note what is published now", outbox.milestone(apart, epoch)).await?;
        kept.milestone_at = Instant::now() + apart;
        Ok(())
    }
}
