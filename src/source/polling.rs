//! Polling: read what is committed, hand it over, delete or mark what is settled.
//!
//! One task for each table, one statement at a time: a read never runs beside the recording of what
//! an earlier read brought, so a row cannot be read again while it is being deleted.
//!
//! Late commits. A number is taken from the sequence before its transaction commits, so a row may
//! appear below the cursor. Every read therefore looks at two ranges in one snapshot: the tail above
//! the cursor, and what appeared between `low` and the cursor. `low` rises to a cursor only when all
//! transactions that had taken a number by then have ended, which their locks on the sequence tell,
//! and one more read has been made since. A number can also be taken by other means than the
//! sequence; such rows are found by a sweep of the whole table, every ten seconds.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info, warn};

use super::{
    Command, Feed, Hold, Source, Yield,
    database::{Database, Error, Found, Limits, Outbox, Reach, TableSpec},
};
use crate::{
    admin::{metrics::Metrics, status::Board},
    config::{Poll, Wake},
    coordinate::{Lease, report},
    event::{Event, Place},
    relay::{core::window_bytes, retry::Policy, window::Window},
    sink::Ticket,
};

/// Rows whose number did not come from the sequence are found at least this often.
const FULL_SWEEP_EVERY: Duration = Duration::from_secs(10);
/// How often open transactions are looked for, while rows come.
const HORIZON_EVERY: Duration = Duration::from_millis(100);
/// Payload bytes that one read may bring along.
const READ_BYTES: usize = 4 << 20;
const LISTEN_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// Places recorded by one statement.
const RECORD_AT_MOST: usize = 5_000;

pub struct Poller {
    pub database: Database,
    pub spec: TableSpec,
    pub poll: Poll,
    pub retry: Policy,
    pub window: Arc<Window>,
    pub lease: watch::Receiver<Lease>,
    pub board: Arc<Board>,
    pub metrics: Arc<Metrics>,
}

/// What a poller keeps between turns.
#[derive(Default)]
struct State {
    generation: u32,
    opened: bool,
    reach: Option<Reach>,
    horizon: Option<Horizon>,
    /// Handed over and not recorded.
    known: HashSet<Place>,
    /// Held since the last opening and above `low`; older ones are left out by SQL.
    held: HashSet<Place>,
    /// Whether the table has held rows for SQL to leave out.
    skip_held: bool,
    /// Settled and not recorded.
    owed: Vec<Place>,
    holds: Vec<Hold>,
    halted: bool,
    stopping: bool,
    /// Mean size of a payload, in bytes.
    payload_mean: f64,
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
    poller: Poller,
    feed: Feed,
    state: State,
    outbox: Option<Outbox>,
    interval: Duration,
    next_read: Instant,
    last_record: Instant,
    last_horizon: Instant,
    last_full_sweep: Instant,
    /// Notified when rows were committed, with `wake: notify`.
    heard: Arc<Notify>,
}

impl Source for Poller {
    async fn run(self, feed: Feed) {
        let now = Instant::now();
        let interval = self.poll.min_interval;
        let heard = Arc::new(Notify::new());
        let _listener = (self.poll.wake == Wake::Notify).then(|| {
            AbortOnDropHandle::new(tokio::spawn(listen(
                self.database.clone(),
                self.spec.name.clone(),
                heard.clone(),
            )))
        });
        Task {
            poller: self,
            feed,
            state: State::default(),
            outbox: None,
            interval,
            next_read: now,
            last_record: now,
            last_horizon: now,
            last_full_sweep: now,
            heard,
        }
        .run()
        .await;
    }
}

/// Keeps listening. Polling goes on underneath, so a failure costs latency only.
async fn listen(database: Database, table: String, heard: Arc<Notify>) {
    loop {
        let Err(error) = database.listen(&table, &heard).await;
        warn!(table, error = report(&error), "cannot listen for notifications; polling goes on");
        tokio::time::sleep(LISTEN_AGAIN_AFTER).await;
    }
}

impl Task {
    async fn run(mut self) {
        let mut failures = 0;
        loop {
            loop {
                match self.feed.commands.try_recv() {
                    Ok(command) => self.take(command),
                    Err(tokio::sync::mpsc::error::TryRecvError::Empty) => break,
                    Err(tokio::sync::mpsc::error::TryRecvError::Disconnected) => {
                        return self.finish().await;
                    }
                }
            }
            let next = match self.turn().await {
                Ok(next) => {
                    failures = 0;
                    next
                }
                Err(error) => {
                    failures += 1;
                    Next::At(Instant::now() + self.failed(&error, failures))
                }
            };
            if !self.wait(next).await {
                return self.finish().await;
            }
        }
    }

    /// Notes an error and says how long to wait.
    fn failed(&mut self, error: &Error, failures: u32) -> Duration {
        let table = self.poller.spec.name.as_str();
        let text = report(error);
        self.poller.board.table_failed(self.feed.table, &text);
        self.poller.metrics.retries(table, "source").inc();
        // Whatever it was, the table may look different now.
        self.outbox = None;
        match error {
            Error::Setup(_) => {
                error!(table, error = text, attempt = failures, "table cannot be relayed; will try again");
            }
            Error::Fenced(_) => {
                warn!(table, error = text, "nothing was recorded");
                self.state.owed.clear();
                self.state.holds.clear();
            }
            Error::Sql { .. } => {
                warn!(table, error = text, attempt = failures, "database error; will try again");
            }
        }
        self.poller.retry.pause(failures, fastrand::f64())
    }

    fn take(&mut self, command: Command) {
        let state = &mut self.state;
        match command {
            Command::Settled(places) => state.owed.extend(places),
            Command::Hold(holds) => state.holds.extend(holds),
            Command::Restart { generation } => {
                state.generation = generation;
                state.opened = false;
            }
            Command::Halt => state.halted = true,
            Command::Stop => state.stopping = true,
        }
    }

    async fn turn(&mut self) -> Result<Next, Error> {
        let Some(epoch) = self.poller.lease.borrow_and_update().epoch() else {
            // What was settled under a lost lease is read, and published, by its next owner.
            self.state.owed.clear();
            self.state.holds.clear();
            return Ok(Next::Told);
        };
        if self.outbox.is_none() {
            self.outbox = Some(self.poller.database.outbox(&self.poller.spec).await?);
            self.poller.board.table_ready(self.feed.table);
        }
        let recorded_by = self.record(epoch, !self.state.holds.is_empty()).await?;
        self.hold(epoch).await?;
        if !self.state.opened {
            self.record(epoch, true).await?;
            self.open().await?;
        }
        if self.state.halted || self.state.stopping {
            return Ok(recorded_by.map_or(Next::Told, Next::At));
        }
        if Instant::now() < self.next_read {
            return Ok(Next::At(recorded_by.map_or(self.next_read, |by| by.min(self.next_read))));
        }
        self.raise_low().await?;
        let Some(limits) = self.limits() else {
            return Ok(recorded_by.map_or(Next::Room, Next::At));
        };
        let rows = self.read(limits).await?;
        self.poller.board.table_ready(self.feed.table);
        self.interval = match rows {
            0 => (self.interval * 2).min(self.poller.poll.max_interval),
            _ => self.poller.poll.min_interval,
        };
        // A full read is followed by the next one at once.
        let pause = if rows >= limits.rows { Duration::ZERO } else { self.interval };
        self.next_read = Instant::now() + pause;
        Ok(Next::At(recorded_by.map_or(self.next_read, |by| by.min(self.next_read))))
    }

    /// Starts a generation: nothing is known, and the relay learns what is parked.
    async fn open(&mut self) -> Result<(), Error> {
        let Some(outbox) = &self.outbox else { return Ok(()) };
        let (parked, held_events) = outbox.parked().await?;
        let state = &mut self.state;
        state.known.clear();
        state.held.clear();
        state.skip_held = held_events > 0;
        state.reach = outbox.has_cursor().then_some(Reach::NOTHING);
        state.horizon = None;
        state.halted = false;
        state.opened = true;
        let generation = state.generation;
        self.send(Yield::Opened { generation, parked, held_events }).await;
        Ok(())
    }

    /// How much the next read may bring; `None` while the window has no worthwhile room.
    fn limits(&self) -> Option<Limits> {
        let (room, window) = (self.poller.window.room(), &self.poller.window);
        let batch = self.poller.poll.batch;
        let idle = window.used().events == 0;
        let enough =
            room.events >= batch.min(window.limit().events / 4) && room.bytes >= window.limit().bytes / 4;
        if !enough && !idle {
            return None;
        }
        let bytes = READ_BYTES.min(room.bytes).max(1);
        let typical = (2.0 * self.state.payload_mean).max(1024.0);
        let rows = (bytes as f64 / typical) as usize;
        let rows = rows.clamp(1, batch.min(room.events).max(1));
        Some(Limits { rows, inline_bytes: bytes / rows })
    }

    async fn read(&mut self, limits: Limits) -> Result<usize, Error> {
        let Some(outbox) = &self.outbox else { return Ok(0) };
        let state = &mut self.state;
        let full_sweep = self.last_full_sweep.elapsed() >= FULL_SWEEP_EVERY;
        let mut reach = state.reach.unwrap_or(Reach::NOTHING);
        if full_sweep {
            reach.low = i64::MIN;
        }
        let above_low = |place: &&Place| match place {
            Place::Int(n) => *n > reach.low,
            Place::Text(_) => true,
        };
        let known: Vec<Place> = state.known.iter().chain(&state.held).filter(above_low).cloned().collect();
        // Held rows are left out by SQL only where memory does not list them: on the first pass
        // over the table, and on a full sweep.
        let found = outbox.read(reach, &known, limits, state.skip_held).await?;
        if full_sweep {
            self.last_full_sweep = Instant::now();
        }
        // All rows of a horizon whose transactions have ended were visible to this read.
        if let (Some(horizon), Some(reach)) = (&state.horizon, &mut state.reach)
            && horizon.writers.is_empty()
            && found.len() < limits.rows
        {
            reach.low = horizon.cursor;
            state.held.retain(|place| matches!(place, Place::Int(n) if *n > reach.low));
            state.horizon = None;
        }
        let rows = found.len();
        if rows > 0 {
            self.hand_over(found).await?;
        }
        Ok(rows)
    }

    /// Hands rows over in order, as far as the window has room; a large payload is fetched when its
    /// turn comes.
    async fn hand_over(&mut self, found: Vec<Found>) -> Result<(), Error> {
        self.poller.metrics.events_read(&self.poller.spec.name).inc_by(found.len() as u64);
        let generation = self.state.generation;
        let mut ready = Vec::with_capacity(found.len());
        for Found { mut event, deferred_bytes } in found {
            let size = event.row.bytes() + deferred_bytes.unwrap_or(0) as usize;
            self.state.payload_mean += (size as f64 - self.state.payload_mean) / 256.0;
            let bytes = window_bytes(&event) + deferred_bytes.unwrap_or(0) as usize;
            if !self.poller.window.claim(1, bytes) {
                self.send(Yield::Events { generation, events: std::mem::take(&mut ready) }).await;
                if !self.claim(bytes).await? {
                    return Ok(());
                }
            }
            if deferred_bytes.is_some() {
                event = match self.fetch(event).await {
                    Ok(event) => event,
                    Err(error) => {
                        self.poller.window.release(1, bytes);
                        self.send(Yield::Events { generation, events: ready }).await;
                        return Err(error);
                    }
                };
                // The row may have changed since its length was read.
                let now = window_bytes(&event);
                self.poller.window.adjust(bytes, now);
            }
            if let (Some(reach), Place::Int(n)) = (&mut self.state.reach, &event.place) {
                reach.cursor = reach.cursor.max(*n);
            }
            self.state.known.insert(event.place.clone());
            ready.push(event);
        }
        self.send(Yield::Events { generation, events: ready }).await;
        Ok(())
    }

    /// Waits for room, recording what gets settled meanwhile. `false` where the rest of the read is
    /// to be forgotten.
    async fn claim(&mut self, bytes: usize) -> Result<bool, Error> {
        loop {
            if self.poller.window.claim(1, bytes) {
                return Ok(true);
            }
            tokio::select! {
                () = self.poller.window.freed() => {}
                command = self.feed.commands.recv() => match command {
                    Some(command) => self.take(command),
                    None => return Ok(false),
                },
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            if !self.state.opened || self.state.stopping || self.state.halted {
                return Ok(false);
            }
            let Some(epoch) = self.poller.lease.borrow().epoch() else { return Ok(false) };
            self.record(epoch, !self.state.holds.is_empty()).await?;
            self.hold(epoch).await?;
        }
    }

    /// The event with its payload.
    async fn fetch(&mut self, event: Event) -> Result<Event, Error> {
        match &self.outbox {
            Some(outbox) => outbox.with_payload(event).await,
            None => Ok(event),
        }
    }

    /// Deletes or marks what is settled, in batches: at once when there is much, else no more often
    /// than rows are read. Returns when the rest is due.
    async fn record(&mut self, epoch: i64, all: bool) -> Result<Option<Instant>, Error> {
        let Some(outbox) = &self.outbox else { return Ok(None) };
        let state = &mut self.state;
        while !state.owed.is_empty() {
            let due = self.last_record + self.poller.poll.min_interval;
            if !all && state.owed.len() < self.poller.poll.batch && Instant::now() < due {
                return Ok(Some(due));
            }
            let batch = &state.owed[..state.owed.len().min(RECORD_AT_MOST)];
            outbox.record(batch, epoch).await?;
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
    async fn hold(&mut self, epoch: i64) -> Result<(), Error> {
        let Some(outbox) = &self.outbox else { return Ok(()) };
        if self.state.holds.is_empty() {
            return Ok(());
        }
        outbox.hold(&self.state.holds, epoch).await?;
        let holds = std::mem::take(&mut self.state.holds);
        let mut tickets: Vec<Ticket> = Vec::with_capacity(holds.len());
        for hold in holds {
            self.state.known.remove(&hold.place);
            self.state.held.insert(hold.place);
            tickets.push(hold.ticket);
        }
        self.state.skip_held = true;
        self.send(Yield::Held { tickets }).await;
        Ok(())
    }

    /// Lets `low` follow the cursor, behind the transactions that are open.
    async fn raise_low(&mut self) -> Result<(), Error> {
        let (Some(outbox), Some(reach)) = (&self.outbox, self.state.reach) else { return Ok(()) };
        if self.last_horizon.elapsed() < HORIZON_EVERY || reach.cursor == reach.low {
            return Ok(());
        }
        self.last_horizon = Instant::now();
        let open = outbox.writers().await?;
        match &mut self.state.horizon {
            None => self.state.horizon = Some(Horizon { cursor: reach.cursor, writers: open }),
            Some(horizon) => horizon.writers.retain(|writer| open.contains(writer)),
        }
        Ok(())
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
            () = self.poller.window.freed(), if room => {}
            // The keeper renews often; only a change of ownership matters, and a turn is cheap.
            _ = self.poller.lease.changed(), if until.is_none() => {}
            () = self.heard.notified(), if until.is_some() => {
                self.next_read = Instant::now();
            }
        }
        true
    }

    /// The relay is done: records what is owed, if the lease still holds.
    async fn finish(mut self) {
        let Some(epoch) = self.poller.lease.borrow().epoch() else { return };
        let owed = self.state.owed.len();
        let table = self.poller.spec.name.clone();
        let done = async {
            self.record(epoch, true).await?;
            self.hold(epoch).await
        };
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
