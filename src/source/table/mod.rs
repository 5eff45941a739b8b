//! One table: find what is committed, hand it over, delete or mark what is settled.
//!
//! Rows are found by reading the table (polling), or in the database's log (`following`). One task for
//! each table, one statement at a time: a read never runs beside the recording of what
//! an earlier read brought, so a row cannot be read again while it is being deleted.
//!
//! Late commits. A number is taken from the sequence before its transaction commits, so a row may
//! appear below the cursor. Every read therefore looks at two ranges in one snapshot: the tail above
//! the cursor, and what appeared between `low` and the cursor. `low` rises to a cursor only when all
//! transactions that had taken a number by then have ended, which their locks on the sequence tell,
//! and one more read has been made since. A number can also be taken by other means than the
//! sequence; such rows are found by a sweep of the whole table, every ten seconds.

mod following;
mod keeping;
mod known;
mod reading;
mod recording;
mod sharing;
mod verbs;

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info, warn};

use self::{following::Following, keeping::Kept, known::Known, recording::Recording, sharing::Share};
use super::{
    Asked, Command, Feed, Hold, Refusal, Source, Yield,
    database::{Database, Error, Outbox, Reach, TableSpec, answered},
    hold::Over,
    log::{Line, position::Position},
};
use crate::{
    admin::{metrics::Metrics, status::Board},
    config::{Poll, Wake},
    coordinate::{Claim, Lease, drain::Drain, report},
    event::Place,
    relay::{Table, retry::Policy, window::Window},
};

const LISTEN_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// A table's end of the log.
#[derive(Debug)]
pub struct LogEnd {
    pub lines: mpsc::UnboundedReceiver<Line>,
    /// Whether the table is polled while the log cannot be read.
    pub polls: bool,
    /// How often it is polled although the log can be read: a session may leave its rows out of the log.
    pub sweep: Option<Duration>,
    /// Has the log read anew.
    pub again: Arc<Notify>,
}

pub struct TableSource {
    /// `None`: the table is polled.
    pub log: Option<LogEnd>,
    pub database: Database,
    pub spec: TableSpec,
    pub poll: Poll,
    pub retry: Policy,
    pub window: Arc<Window>,
    /// Has a turn for each large payload that may be fetched at once, by all tables.
    pub fetches: Arc<Semaphore>,
    pub lease: watch::Receiver<Lease>,
    /// Where relays share the table: who wants to know when a bucket has nothing in flight.
    pub drain: Option<Arc<Drain>>,
    /// Nothing is read before it is known what is published, and recorded.
    pub exactly_once: bool,
    pub board: Arc<Board>,
    pub metrics: Arc<Metrics>,
    /// As the relay has it.
    pub table: Arc<Table>,
}

/// What a poller keeps between turns.
#[derive(Default)]
struct State {
    opening: Opening,
    /// Where rows stay when they are published: which are.
    kept: Option<Kept>,
    reach: Option<Reach>,
    horizon: Option<Horizon>,
    /// Handed over and not recorded.
    known: Known,
    /// Held since the last opening and above `low`; older ones are left out by SQL.
    held: HashSet<Place>,
    /// Whether the table has held rows for SQL to leave out.
    skip_held: bool,
    /// Settled and not recorded.
    owed: Vec<Place>,
    /// What is being recorded.
    recording: Option<Recording>,
    unseen: Unseen,
    holds: Vec<Hold>,
    /// When holds could not be written last; `None` once they can.
    unheld: Option<Instant>,
    /// What an operator, or the relay, wants changed.
    wishes: VecDeque<Wish>,
    /// Handed over from the relay's own table, for events without a row. Of a kept table: what was held, and
    /// is to be published now.
    released: HashSet<Place>,
    replay: Replay,
    paused: bool,
    halted: bool,
    stopping: bool,
    /// Mean size of a payload, in bytes.
    payload_mean: f64,
}

/// What the relay and this table have told each other of a generation.
#[derive(Default)]
struct Opening {
    generation: u32,
    opened: bool,
    /// Exactly once: what was taken over, so that the generation may read.
    taken: Option<Claim>,
    /// The gates changed, or may have: the relay is to be told before anything else happens.
    gates_due: bool,
    /// The relay was told and has not answered: nothing is read and nothing is held.
    barred: bool,
    /// Counts the lists of gates.
    serial: u32,
    /// The relay has answered: what it wanted to be held before may not have to be.
    look_again: bool,
}

/// Settled, and not to be seen yet: only the log had them.
#[derive(Default)]
struct Unseen {
    places: Vec<Place>,
    due: Option<Instant>,
}

/// Rows that are to be published again.
#[derive(Default)]
struct Replay {
    wanted: bool,
    /// Those that are handed over.
    rows: HashSet<Place>,
    again: Option<Instant>,
    /// They wait until everything is published or held that came before this.
    behind: Option<Position>,
}

/// A change of what is held.
enum Wish {
    Verb(Asked),
    Release(Over),
}

/// A cursor on its way to become `low`.
struct Horizon {
    cursor: i64,
    /// Transactions that may hold a number at or below it.
    writers: Vec<String>,
}

enum Next {
    /// Something to wait for: a command, the lease, or this time.
    At(Instant),
    /// A command or the lease.
    Told,
    /// The window is full.
    Room,
}

struct Task {
    source: TableSource,
    log: Option<Following>,
    feed: Feed,
    state: State,
    share: Share,
    outbox: Option<Arc<Outbox>>,
    interval: Duration,
    next_read: Instant,
    last_record: Instant,
    last_horizon: Instant,
    last_full_sweep: Instant,
    /// When published rows are looked at again for their age.
    expire_at: Instant,
    /// Notified when rows were committed, with `wake: notify`.
    heard: Arc<Notify>,
}

impl Source for TableSource {
    async fn run(self, feed: Feed) {
        let mut this = self;
        let log = this.log.take().map(|end| Following::new(end, !this.spec.stays()));
        let now = Instant::now();
        let interval = this.poll.min_interval;
        let heard = Arc::new(Notify::new());
        let _listener = (this.poll.wake == Wake::Notify).then(|| {
            AbortOnDropHandle::new(tokio::spawn(listen(
                this.database.clone(),
                this.spec.name.clone(),
                heard.clone(),
            )))
        });
        let share = Share::new(this.drain.clone());
        let task = Task {
            share,
            source: this,
            log,
            feed,
            state: State::default(),
            outbox: None,
            interval,
            next_read: now,
            last_record: now,
            last_horizon: now,
            last_full_sweep: now,
            expire_at: now,
            heard,
        };
        Box::pin(task.run()).await;
    }
}

/// Keeps listening. Polling goes on underneath, so a failure costs latency only.
async fn listen(database: Database, table: String, heard: Arc<Notify>) {
    loop {
        let Err(error) = database.listen(&table, &heard).await;
        warn!(table, error = report(&error), "cannot listen for notifications; polling goes on");
        database.failed(&error);
        tokio::time::sleep(LISTEN_AGAIN_AFTER).await;
    }
}

impl Task {
    async fn run(mut self) {
        let mut failures = 0;
        let mut not_before = Instant::now();
        loop {
            loop {
                match self.feed.commands.try_recv() {
                    Ok(command) => self.take(command),
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => {
                        return self.finish().await;
                    }
                }
            }
            // New rows are no reason to try again to hold what could not be; an operator is.
            let waits = self.is_unheld() && self.state.wishes.is_empty();
            let next = if waits && Instant::now() < not_before {
                Next::At(not_before)
            } else {
                match self.turn().await {
                    Ok(next) => {
                        // Turns that go well between two attempts do not begin the count anew.
                        if self.has_worked() {
                            failures = 0;
                        }
                        next
                    }
                    Err(error) => {
                        failures += 1;
                        not_before = Instant::now() + self.failed(&error, failures);
                        Next::At(not_before)
                    }
                }
            };
            if !self.wait(next).await {
                return self.finish().await;
            }
        }
    }

    /// Whether the turn that went well did all that a turn does. Says so.
    fn has_worked(&self) -> bool {
        if !self.state.opening.opened || self.state.opening.barred || self.is_unheld() {
            return false;
        }
        if self.outbox.is_some() && self.has_its_log() {
            self.source.board.table_works(self.feed.table);
        }
        true
    }

    /// Notes an error and says how long to wait.
    fn failed(&mut self, error: &Error, failures: u32) -> Duration {
        let text = report(error);
        // Who waits is told now, and may ask again: it may take long until the table can be used.
        self.refuse_verbs(&Refusal::Failed(text.clone()));
        let table = self.source.spec.name.as_str();
        self.source.board.table_failed(self.feed.table, &text);
        self.source.metrics.retries(table, "source").inc();
        // Whatever it was, the table may look different now, and a change that was on its way may have
        // been committed or not.
        self.outbox = None;
        self.state.kept = None;
        self.state.opening.gates_due |= self.state.opening.opened;
        match error {
            Error::Setup(_) | Error::Refused { .. } => {
                self.cannot_follow();
                let table = self.source.spec.name.as_str();
                error!(table, error = text, attempt = failures, "table cannot be relayed; will try again");
            }
            Error::Fenced(epoch) => {
                warn!(table, error = text, "nothing was recorded");
                self.state.holds.clear();
                // Unless another membership has taken over meanwhile, and has this settled.
                if self.state.opening.taken.is_none_or(|taken| taken.epoch == *epoch) {
                    self.state.owes_only(Vec::new());
                    self.state.opening.taken = None;
                }
            }
            Error::Sql { .. } | Error::NoAnswer(_) => {
                self.source.database.failed(error);
                warn!(table, error = text, attempt = failures, "database error; will try again");
            }
        }
        self.source.retry.pause(failures, fastrand::f64())
    }

    fn take(&mut self, command: Command) {
        let state = &mut self.state;
        match command {
            Command::Settled(places) => state.owed.extend(places),
            Command::Hold(holds) => state.holds.extend(holds),
            Command::Forget(places) => self.forget(places),
            Command::Restart { generation, taken } => {
                if let Some(taken) = taken {
                    // Everything that was owed is among them.
                    state.owes_only(taken.doubts);
                    state.opening.taken = Some(taken.claim);
                }
                state.opening.generation = generation;
                state.opening.opened = false;
                // What the last generation wanted to be held is looked at again by this one.
                state.holds.clear();
            }
            Command::Go { serial, halted } => {
                state.halted = halted;
                if serial == state.opening.serial {
                    state.opening.barred = false;
                    state.opening.look_again = true;
                }
            }
            Command::Release(over) => state.wishes.push_back(Wish::Release(over)),
            Command::Verb(asked) => state.wishes.push_back(Wish::Verb(asked)),
            Command::Halt => state.halted = true,
            Command::Stop => state.stopping = true,
        }
    }

    async fn turn(&mut self) -> Result<Next, Error> {
        self.hear_all();
        let lease = self.source.lease.borrow_and_update().clone();
        let Some(epoch) = lease.epoch() else {
            self.forget_what_is_owed();
            self.without_lease();
            return Ok(Next::Told);
        };
        self.take_up(&lease);
        if self.outbox.as_ref().is_none_or(|outbox| !outbox.is_current()) {
            let outbox = self.source.database.outbox(&self.source.spec);
            self.outbox = Some(Arc::new(answered("look at the table", outbox).await?));
            self.source.board.table_ready(self.feed.table);
            self.can_follow();
        }
        if self.source.exactly_once && !self.is_taken_over() {
            // What is published of these parts is not known yet.
            return Ok(Next::Told);
        }
        self.know_frontier(epoch).await?;
        let recorded_by = self.record(epoch, !self.state.holds.is_empty()).await?;
        if !self.state.opening.opened {
            self.record(epoch, true).await?;
            self.open();
            self.know_frontier(epoch).await?;
        }
        if self.speaks() {
            self.expire(epoch).await?;
        }
        self.change_gates(epoch).await?;
        if self.state.opening.barred || self.state.stopping {
            return Ok(recorded_by.map_or(Next::Told, Next::At));
        }
        let stopped = self.state.halted || (self.state.paused && self.stops_for_a_pause());
        if self.is_streaming() {
            if !stopped {
                return self.follow(recorded_by).await;
            }
            self.back_to_the_table();
        }
        // A row is not read while it is being deleted.
        self.recorded().await?;
        self.skim(stopped).await?;
        if stopped || !self.may_poll() {
            return Ok(recorded_by.map_or(Next::Told, Next::At));
        }
        if Instant::now() < self.next_read {
            return Ok(Next::At(recorded_by.map_or(self.next_read, |by| by.min(self.next_read))));
        }
        self.raise_low().await?;
        let Some(limits) = self.limits() else {
            return Ok(recorded_by.map_or(Next::Room, Next::At));
        };
        self.read_replays(limits).await?;
        // Not all of them could be handed over: there is more.
        let rows = self.read(limits).await?.unwrap_or(limits.rows);
        self.interval = match rows {
            0 => (self.interval * 2).min(self.source.poll.max_interval),
            _ => self.source.poll.min_interval,
        };
        // A full read is followed by the next one at once.
        let pause = if rows >= limits.rows { Duration::ZERO } else { self.interval };
        self.next_read = Instant::now() + pause;
        if rows < limits.rows {
            self.end_of_table().await?;
        }
        Ok(Next::At(recorded_by.map_or(self.next_read, |by| by.min(self.next_read))))
    }

    /// Starts a generation: nothing is known.
    fn open(&mut self) {
        let state = &mut self.state;
        state.known.clear();
        state.kept = None;
        state.replay.rows.clear();
        state.opening.opened = true;
        state.opening.gates_due = true;
        state.released.clear();
        self.is_done_with_all();
        self.back_to_the_table();
        self.read_the_log_again();
    }

    async fn send(&self, yielded: Yield) {
        if matches!(&yielded, Yield::Events { events, .. } if events.is_empty()) {
            return;
        }
        // The relay outlives its sources; if it is gone, so is the reason to read.
        self.feed.events.send((self.feed.table, yielded)).await.ok();
    }

    /// Waits for the next reason to turn. `false` when the relay has closed the channel.
    async fn wait(&mut self, next: Next) -> bool {
        let (until, room) = match next {
            Next::At(time) => (Some(time), false),
            Next::Told => (None, false),
            Next::Room => (None, true),
        };
        tokio::select! {
            command = self.feed.commands.recv() => match command {
                Some(command) => self.take(command),
                None => return false,
            },
            () = tokio::time::sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {}
            () = self.source.window.worth_it(), if room => {}
            () = Recording::ended(self.state.recording.as_mut()) => {}
            news = Following::news(self.log.as_mut()) => self.hear(news),
            // The keeper renews often; only a change of ownership matters, and a turn is cheap.
            Ok(()) = self.source.lease.changed(), if until.is_none() => {}
            () = self.heard.notified(), if until.is_some() => {
                self.next_read = Instant::now();
            }
        }
        true
    }

    /// The relay is done: records what is owed, if the lease still holds.
    async fn finish(mut self) {
        let Some(epoch) = self.source.lease.borrow().epoch() else { return };
        let owed = self.state.owed.len();
        let table = self.source.spec.name.clone();
        let done = async {
            self.record(epoch, true).await?;
            self.hold(epoch).await
        };
        // The log has been told by then how far its rows are settled.
        match done.await {
            Ok(()) => info!(table, "everything that was published is recorded"),
            Err(error) => warn!(
                table,
                owed,
                error = report(&error),
                "could not record everything that was published: it will be repeated"
            ),
        }
    }
}
