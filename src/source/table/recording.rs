//! Recording: what was published is deleted or marked, and what is held is written down.
//!
//! While the log is followed a statement that records runs beside it: the log need not stop for it. Whatever else
//! looks at the table waits for its end.

use std::{collections::HashSet, future::pending, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::{State, Task};
use crate::{
    event::Place,
    sink::Ticket,
    source::{
        Yield,
        database::{EXPIRED_AT_ONCE, Error, Outbox, answered},
        hold::Counts,
        log::Moment,
    },
};

/// Places recorded by one statement.
const RECORD_AT_MOST: usize = 5_000;
/// The same between two reads: about as long as what is in flight lasts.
const RECORD_BETWEEN_READS: usize = 2_500;
/// More than so many that are published and not recorded, and the log waits: a crash would repeat them.
const UNRECORDED_AT_MOST: usize = 2 * RECORD_AT_MOST;
/// So many numbers that follow one another are recorded by a statement of their own: it need tell their ends only.
const RUN_AT_LEAST: usize = 512;
const RECORD: &str = "record what was published";
/// How often published rows are looked at for their age, if they are kept for longer than this, and when again while
/// there are many.
const EXPIRE_EVERY: Duration = Duration::from_secs(10);
const EXPIRE_MORE_AFTER: Duration = Duration::from_millis(200);
/// How often rows are recorded that came from the log: a statement costs more than its rows.
const RECORD_EVERY: Duration = Duration::from_millis(50);
/// When those are tried again whose transaction could not be seen yet.
const RECORD_UNSEEN_AFTER: Duration = Duration::from_millis(500);

/// When rows that are kept for so long are looked at again, after so many were deleted.
fn expire_again_after(kept: Duration, gone: u64) -> Duration {
    match gone < EXPIRED_AT_ONCE {
        true => kept.clamp(EXPIRE_MORE_AFTER, EXPIRE_EVERY),
        false => EXPIRE_MORE_AFTER,
    }
}

/// Places that are being recorded.
pub(super) struct Recording {
    places: Vec<Place>,
    /// Those of them that are written down, by a statement that is under way or has ended.
    written: Arc<Vec<Place>>,
    statement: Option<AbortOnDropHandle<Result<u64, Error>>>,
    /// How many rows it has changed, once it has ended.
    result: Option<Result<u64, Error>>,
    /// Those that cannot be recorded yet, and the moment that told, if it is a new one.
    unseen: HashSet<Place>,
    moment: Option<Moment>,
    outbox: Arc<Outbox>,
    epoch: i64,
}

impl Recording {
    fn runs(&self) -> bool {
        self.result.is_none() && self.statement.as_ref().is_some_and(|statement| !statement.is_finished())
    }

    /// Cancel safe.
    async fn end(&mut self) {
        if let (None, Some(statement)) = (&self.result, &mut self.statement) {
            self.result = Some(statement.await.unwrap_or(Err(Error::NoAnswer(RECORD))));
        }
    }

    /// Waits for the end of a statement. Cancel safe.
    pub async fn ended(this: Option<&mut Recording>) {
        match this.filter(|recording| recording.result.is_none()) {
            Some(recording) => recording.end().await,
            None => pending().await,
        }
    }
}

/// How many of these places, which are in their order, are recorded next: the run at their beginning, if it is a long
/// one; else what comes before the first long run.
fn next(places: &[Place], at_most: usize) -> usize {
    let follows = |one: &Place, next: &Place| matches!((one, next), (Place::Int(one), Place::Int(next)) if one.checked_add(1) == Some(*next));
    let mut before = 0;
    for run in places.chunk_by(follows) {
        if run.len() >= RUN_AT_LEAST {
            return if before == 0 { run.len().min(at_most) } else { before };
        }
        before += run.len();
        if before >= at_most {
            break;
        }
    }
    before.min(at_most)
}

impl State {
    /// Whether what was settled is recorded, to the end of the statement that does it.
    pub(super) fn owes_nothing(&self) -> bool {
        self.owed.is_empty() && self.recording.is_none()
    }

    /// What else was settled is seen to by others, or known better now. A statement that is under way is let go of: the
    /// lease that it names tells whether it is still to be done.
    pub(super) fn owes_only(&mut self, places: Vec<Place>) {
        self.owed = places;
        self.recording = None;
        self.unseen.places.clear();
    }
}

impl Task {
    /// Deletes or marks what is settled, in batches: at once when there is much, else no more often
    /// than rows are read. Returns when the rest is due.
    pub(super) async fn record(&mut self, epoch: i64, all: bool) -> Result<Option<Instant>, Error> {
        if self.source.spec.is_kept() {
            return self.record_kept(epoch, all).await;
        }
        let beside = !all && self.is_streaming() && !self.source.exactly_once;
        if beside && self.is_recording() && !self.owes_much() {
            return Ok(self.state.unseen.due);
        }
        self.recorded().await?;
        let state = &mut self.state;
        if all || state.unseen.due.is_some_and(|due| due <= Instant::now()) {
            state.owed.append(&mut state.unseen.places);
            state.unseen.due = None;
        }
        let reads = !all && !self.is_streaming();
        let at_most = if reads { RECORD_BETWEEN_READS } else { RECORD_AT_MOST };
        while !self.state.owed.is_empty() {
            // Deleting is off the way of those that come from the log: a little later, and more at once.
            let (pause, much) = match self.is_streaming() {
                true => (RECORD_EVERY, RECORD_AT_MOST),
                false => (self.source.poll.min_interval, self.source.poll.batch),
            };
            let due = self.last_record + pause;
            if !all && self.state.owed.len() < much && !self.owes_much() && Instant::now() < due {
                return Ok(self.state.unseen.due.into_iter().chain([due]).min());
            }
            let Some(outbox) = self.outbox.clone() else { return Ok(None) };
            self.begin_to_record(outbox, epoch, at_most).await?;
            if beside && self.is_recording() {
                break;
            }
            self.recorded().await?;
            // What is read next is published while the rest is recorded.
            if reads && !self.state.owed.is_empty() {
                return Ok(Some(Instant::now()));
            }
        }
        Ok(self.state.unseen.due)
    }

    fn is_recording(&self) -> bool {
        self.state.recording.as_ref().is_some_and(Recording::runs)
    }

    /// Whether a crash would repeat too much.
    fn owes_much(&self) -> bool {
        let recording = self.state.recording.as_ref().map_or(0, |recording| recording.places.len());
        self.state.owed.len() + recording >= UNRECORDED_AT_MOST.min(self.source.window.limit().events)
    }

    /// Has the next places recorded.
    async fn begin_to_record(
        &mut self,
        outbox: Arc<Outbox>,
        epoch: i64,
        at_most: usize,
    ) -> Result<(), Error> {
        self.state.owed.sort_unstable();
        let next = &self.state.owed[..next(&self.state.owed, at_most)];
        fail::fail_point!("acknowledged", |_| std::process::abort());
        let (unseen, moment) = self.hidden(next).await?;
        let (stays, released) = (self.source.spec.stays(), &self.state.released);
        // Where rows do not stay, the rest is recorded by telling the log.
        let is_written = |place: &&Place| match stays {
            true => !unseen.contains(*place),
            false => released.contains(*place),
        };
        let written: Arc<Vec<Place>> = Arc::new(next.iter().filter(is_written).cloned().collect());
        let statement = (!written.is_empty()).then(|| {
            let (outbox, written) = (outbox.clone(), written.clone());
            let statement = async move { answered(RECORD, outbox.record(&written, epoch)).await };
            AbortOnDropHandle::new(tokio::spawn(statement))
        });
        let result = statement.is_none().then_some(Ok(0));
        let rest = self.state.owed.split_off(next.len());
        let places = std::mem::replace(&mut self.state.owed, rest);
        self.state.recording =
            Some(Recording { places, written, statement, result, unseen, moment, outbox, epoch });
        Ok(())
    }

    /// Waits for the end of what is being recorded. What could not be is owed as before.
    pub(super) async fn recorded(&mut self) -> Result<(), Error> {
        let Some(recording) = &mut self.state.recording else { return Ok(()) };
        recording.end().await;
        let Some(mut recording) = self.state.recording.take() else { return Ok(()) };
        let ended = self.end_recording(&mut recording).await;
        if ended.is_err() {
            self.state.owed.splice(..0, recording.places);
        }
        ended
    }

    async fn end_recording(&mut self, recording: &mut Recording) -> Result<(), Error> {
        let Recording { places, written, result, unseen, moment, outbox, epoch, .. } = recording;
        let rows = result.take().unwrap_or(Err(Error::NoAnswer(RECORD)))?;
        if !self.source.spec.stays() {
            written.iter().for_each(|place| {
                self.state.released.remove(place);
            });
        } else if rows < written.len() as u64 {
            let (seen, more) = self.by_sight(written).await?;
            unseen.extend(more);
            if !seen.is_empty() {
                // It may be since then that they are seen.
                answered(RECORD, outbox.record(&seen, *epoch)).await?;
            }
        }
        fail::fail_point!("recorded", |_| std::process::abort());
        if !self.state.replay.rows.is_empty() {
            let done: Vec<Place> =
                places.iter().filter_map(|place| self.state.replay.rows.take(place)).collect();
            let done: Vec<String> = done.iter().map(Place::to_string).collect();
            answered("record what was replayed", outbox.replayed(&done)).await?;
        }
        self.has_seen(moment.take());
        if !unseen.is_empty() {
            places.retain(|place| !unseen.contains(place));
            self.state.unseen.places.extend(unseen.drain());
            self.state.unseen.due.get_or_insert(Instant::now() + RECORD_UNSEEN_AFTER);
        }
        self.forget_known(&*places);
        self.last_record = Instant::now();
        if self.source.exactly_once {
            self.send(Yield::Recorded { places: std::mem::take(places) }).await;
        }
        Ok(())
    }

    /// Deletes published rows that are past their time: some at once, and others have their turn between.
    pub(super) async fn expire(&mut self, epoch: i64) -> Result<(), Error> {
        let Some(kept) = self.source.spec.retention else { return Ok(()) };
        if self.source.spec.is_kept() {
            self.note_milestone(kept, epoch).await?;
        }
        if Instant::now() < self.expire_at {
            return Ok(());
        }
        self.recorded().await?;
        let Some(outbox) = &self.outbox else { return Ok(()) };
        let gone = answered("delete what was published long ago", outbox.expire(kept, epoch)).await?;
        self.expire_at = Instant::now() + expire_again_after(kept, gone);
        Ok(())
    }

    /// Whether holds could not be written when it was last tried. What is not wanted to be held any more is forgotten
    /// after a while.
    pub(super) fn is_unheld(&self) -> bool {
        let forget = self.source.retry.max * 2;
        self.state.unheld.is_some_and(|at| at.elapsed() < forget)
    }

    /// Commits holds. What was published before them is recorded first: read again, it would be held
    /// behind them.
    pub(super) async fn hold(&mut self, epoch: i64) -> Result<(), Error> {
        let Some(outbox) = &self.outbox else { return Ok(()) };
        if self.state.holds.is_empty() {
            return Ok(());
        }
        fail::fail_point!("before-park", |_| std::process::abort());
        self.state.unheld = Some(Instant::now());
        let held = outbox.hold(&self.state.holds, epoch, self.share.version);
        let held = answered("hold events", held).await?;
        self.state.unheld = None;
        if !held {
            // Another relay changed the gates: they are looked at first.
            self.state.opening.gates_due = true;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_is_recorded_by_itself_and_what_is_before_it_too() {
        let of = |ranges: &[std::ops::Range<i64>]| -> Vec<Place> {
            ranges.iter().cloned().flatten().map(Place::Int).collect()
        };
        let long = RUN_AT_LEAST as i64;
        assert_eq!(next(&[], RECORD_AT_MOST), 0);
        assert_eq!(next(&of(&[0..3, 5..9]), RECORD_AT_MOST), 7);
        assert_eq!(next(&of(&[0..3, 5..9, 10..10 + long, 1000..1001]), RECORD_AT_MOST), 7);
        assert_eq!(next(&of(&[10..10 + long, 1000..1001]), RECORD_AT_MOST), RUN_AT_LEAST);
        assert_eq!(next(&of(&[0..100_000, 200_000..200_001]), RECORD_AT_MOST), RECORD_AT_MOST);
        let apart: Vec<Place> = (0..100_000).map(|n| Place::Int(2 * n)).collect();
        assert_eq!(next(&apart, RECORD_AT_MOST), RECORD_AT_MOST);
        assert_eq!(
            next(&[Place::Int(i64::MAX), Place::Text("a".into()), Place::Text("b".into())], RECORD_AT_MOST),
            3
        );
    }

    /// An outbox in a file of its own.
    #[cfg(feature = "sqlite")]
    async fn outbox(folder: &std::path::Path) -> Outbox {
        use crate::source::database::{Database, a_spec};
        let url = format!("sqlite://{}?mode=rwc", folder.join("outbox.db").display());
        let table = "CREATE TABLE outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE)";
        let pool = sqlx::SqlitePool::connect(&url).await.unwrap();
        sqlx::raw_sql(table).execute(&pool).await.unwrap();
        let config = format!(
            "source: {{ url: '{url}' }}\nkafka: {{ bootstrap_servers: 'none:9092' }}\ntables: [{{ name: outbox }}]"
        );
        let config = crate::config::parse("test", &config, &std::collections::BTreeMap::new()).unwrap();
        let database = Database::new(&config.source.unwrap()).unwrap();
        database.outbox(&a_spec("seq", crate::config::AfterPublish::Delete)).await.unwrap()
    }

    /// So a row is gone at twice its age at the latest.
    #[test]
    fn rows_are_looked_at_as_often_as_they_are_kept_for() {
        let after = |kept, gone| expire_again_after(Duration::from_millis(kept), gone).as_millis();
        assert_eq!((after(3_000, 0), after(9_999, 1)), (3_000, 9_999));
        assert_eq!((after(60_000, 0), after(1, 0)), (10_000, 200));
        assert_eq!((after(60_000, EXPIRED_AT_ONCE), after(3_000, EXPIRED_AT_ONCE)), (200, 200));
    }

    #[cfg(feature = "sqlite")]
    #[tokio::test]
    async fn what_is_being_recorded_is_owed_until_it_is_known_better() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = State::default();
        assert!(state.owes_nothing());
        let places = vec![Place::Int(1), Place::Int(2)];
        let recording = Recording {
            written: Arc::new(places.clone()),
            places,
            statement: Some(AbortOnDropHandle::new(tokio::spawn(pending()))),
            result: None,
            unseen: HashSet::new(),
            moment: None,
            outbox: Arc::new(outbox(folder.path()).await),
            epoch: 1,
        };
        state.recording = Some(recording);
        state.unseen.places.push(Place::Int(3));
        assert!(!state.owes_nothing(), "its statement has not ended");
        // As a generation begins that has taken over.
        state.owes_only(vec![Place::Int(2)]);
        assert!(state.recording.is_none() && state.unseen.places.is_empty());
        assert_eq!(state.owed, [Place::Int(2)]);
        assert!(!state.owes_nothing());
        state.owes_only(Vec::new());
        assert!(state.owes_nothing());
    }
}
