//! Reading the log: one connection, one slot, the tables that follow it.
//!
//! The loop decodes what is in its buffer, hands rows to the tables in batches, and reads again. While a
//! table takes nothing, nothing is read, and the server keeps the log; that it is still there the server
//! hears from a task of its own, which no table can starve. A place is confirmed when every row before it
//! is settled.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{debug, error, info, warn};

use super::{
    decoder::{Decoder, Route},
    slot::{Health, Identity, Obstacle, Prepared, Slot, missing},
    upkeep::{Confirmed, Watch, feed_back, show},
    wire::{self, Connection, Message, Reader},
};
use crate::{
    admin::metrics::Metrics,
    coordinate::{Lease, report},
    relay::retry::Policy,
    source::{
        database::{Rows, TableSpec, quoted_table},
        log::{Incoming, Line, Outlets, Progress, Ready, Unsettled},
    },
};

/// A server that says nothing for so long, although it is asked to, is gone.
const SILENT_AFTER: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(500);
const DROP_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// After the log grew too large: it is followed again when no row waits for longer.
const CAUGHT_UP: f64 = 10.0;

/// A table that follows the log.
#[derive(Debug)]
pub struct Follower {
    pub spec: TableSpec,
    pub lines: mpsc::UnboundedSender<Line>,
    /// How long its oldest row has waited, in seconds, as it was last measured.
    pub waits: watch::Receiver<f64>,
    /// What it waits for, where only the log has its rows.
    pub unsettled: watch::Sender<Unsettled>,
}

pub struct Streamer {
    pub slot: Slot,
    pub connect: wire::Settings,
    pub followers: Vec<Follower>,
    /// All of them poll when there is no log, so that it can be done without one.
    pub disposable: bool,
    /// A row above this is left to its table, in bytes.
    pub row_limit: usize,
    pub lease: watch::Receiver<Lease>,
    /// A table wants the log to be read anew.
    pub again: Arc<Notify>,
    pub metrics: Arc<Metrics>,
}

/// Why a reading of the log ended.
enum Ended {
    Stopped,
    /// The lease is gone, or a table asked for it.
    Again(&'static str),
    /// The server keeps more of the log than it may.
    OverBudget(i64),
    Trouble(Obstacle),
}

impl From<Obstacle> for Ended {
    fn from(obstacle: Obstacle) -> Ended {
        Ended::Trouble(obstacle)
    }
}

impl From<wire::Error> for Ended {
    fn from(error: wire::Error) -> Ended {
        Ended::Trouble(error.into())
    }
}

impl Streamer {
    /// Reads the log while this relay owns the source, until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut failures = 0;
        let mut said = String::new();
        self.metrics.slot_max_retained_bytes.set(self.slot.settings.max_retained_wal as i64);
        loop {
            if self.lease.borrow().epoch().is_none() {
                // The slot is the owner's to look at.
                show(&self.metrics, Health::default());
            }
            let is_held = tokio::select! {
                is_held = Lease::held(&mut self.lease) => is_held,
                () = stop.cancelled() => false,
            };
            if !is_held {
                return;
            }
            let began = Instant::now();
            let ended = tokio::select! {
                ended = self.read(&stop) => ended,
                () = Lease::lost(self.lease.clone()) => Ended::Again("the lease is lost"),
            };
            if began.elapsed() > SILENT_AFTER {
                // It was well in between: the same trouble is news again.
                (failures, said) = (0, String::new());
            }
            failures += 1;
            let ended = self.look_at_what_is_not_read(ended).await;
            let (why, lost) = match ended {
                Ended::Stopped => return,
                Ended::Again(why) => {
                    debug!(why, "the log is read anew");
                    self.tell_down(why, false);
                    failures = 0;
                    continue;
                }
                Ended::OverBudget(bytes) => {
                    let why = format!(
                        "the server kept {bytes} bytes of its log for slot {}, more than source.stream.max_retained_wal",
                        self.slot.settings.slot
                    );
                    error!(
                        why,
                        "the slot is dropped and its tables are polled; it is made anew when they have caught up"
                    );
                    self.tell_down(&why, false);
                    if !self.let_go(&stop).await || !self.caught_up(&stop).await {
                        return;
                    }
                    continue;
                }
                Ended::Trouble(obstacle) => {
                    if self.is_replaceable() && obstacle.is_before_the_publication() {
                        // What the slot has yet to send was written before the publication was made, and
                        // cannot be read with it. The tables have it.
                        warn!(
                            slot = self.slot.settings.slot,
                            "the slot is older than the publication: it is made anew"
                        );
                        self.let_go(&stop).await;
                    }
                    (report(&obstacle), matches!(obstacle, Obstacle::Lost(_)))
                }
            };
            if said == why {
                debug!(why, attempt = failures, "the log cannot be read");
            } else {
                warn!(why, "the log cannot be read; tables with capture: auto are polled meanwhile");
                said.clone_from(&why);
            }
            self.tell_down(&why, lost);
            let policy = Policy { max: Duration::from_secs(10), ..Policy::default() };
            tokio::select! {
                () = tokio::time::sleep(policy.pause(failures, fastrand::f64()).max(Duration::from_millis(100))) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Whether another slot is as good as this one: every table has its rows.
    fn is_replaceable(&self) -> bool {
        self.followers.iter().all(|follower| follower.spec.stays())
    }

    /// A slot that cannot be read still keeps the server's log, which has to be seen; and is let go too, when that
    /// is too much.
    async fn look_at_what_is_not_read(&self, ended: Ended) -> Ended {
        let health = match &ended {
            Ended::Trouble(_) => self.slot.health().await.ok().flatten().unwrap_or_default(),
            _ => Health::default(),
        };
        show(&self.metrics, health);
        let most = self.slot.settings.max_retained_wal as i64;
        match self.disposable && health.retained_bytes > most {
            true => Ended::OverBudget(health.retained_bytes),
            false => ended,
        }
    }

    fn tell_down(&self, why: &str, lost: bool) {
        for follower in &self.followers {
            follower.lines.send(Line::Down { why: why.to_owned(), lost }).ok();
        }
    }

    /// Drops the slot. The server may be slow to see that nobody reads from it. `false` when it is time to
    /// stop.
    async fn let_go(&self, stop: &CancellationToken) -> bool {
        while let Err(error) = self.slot.drop_slot().await {
            error!(
                error = report(&error),
                "the slot could not be dropped: the server goes on keeping its log; will try again"
            );
            tokio::select! {
                () = tokio::time::sleep(DROP_AGAIN_AFTER) => {}
                () = stop.cancelled() => return false,
            }
            // Somebody else's, who may be reading from it.
            if self.lease.borrow().epoch().is_none() {
                break;
            }
        }
        true
    }

    /// Waits until the tables have been polled nearly empty. `false` when it is time to stop.
    async fn caught_up(&mut self, stop: &CancellationToken) -> bool {
        // What was measured before may have been measured before Kafka went away.
        self.followers.iter_mut().for_each(|follower| follower.waits.mark_unchanged());
        for Follower { waits, .. } in &mut self.followers {
            let caught_up = async {
                waits.changed().await?;
                waits.wait_for(|seconds| *seconds < CAUGHT_UP).await.map(drop)
            };
            tokio::select! {
                waited = caught_up => if waited.is_err() { return false },
                () = stop.cancelled() => return false,
            }
        }
        true
    }

    /// One reading of the log, from what was confirmed last.
    async fn read(&self, stop: &CancellationToken) -> Ended {
        let prepared = tokio::select! {
            prepared = self.prepare() => prepared,
            () = stop.cancelled() => return Ended::Stopped,
        };
        let (session, lines) = match prepared {
            Ok(prepared) => prepared,
            Err(ended) => return ended,
        };
        for (follower, line) in self.followers.iter().zip(lines) {
            follower.lines.send(line).ok();
        }
        info!(slot = self.slot.settings.slot, "the log is read");
        session.run(self, stop).await
    }

    async fn prepare(&self) -> Result<(Session, Vec<Line>), Ended> {
        let specs: Vec<TableSpec> = self.followers.iter().map(|follower| follower.spec.clone()).collect();
        let password = self.slot.database.password().await.map_err(Obstacle::from)?;
        let settings = wire::Settings { password, ..self.connect.clone() };
        let mut connection = Connection::connect(&settings).await?;
        // Its first two columns.
        let answer = connection.query("IDENTIFY_SYSTEM").await?;
        let column =
            |index: usize| answer.first().and_then(|row| row.get(index)?.clone()).unwrap_or_default();
        let identity =
            Identity { system_identifier: column(0), timeline: column(1).parse().unwrap_or_default() };
        let Prepared { tables, publication } =
            self.slot.prepare(&specs, self.is_replaceable(), identity).await?;
        let config = &self.slot.settings;
        let binary = specs.iter().zip(&tables).all(|(spec, table)| {
            table.as_ref().is_none_or(|(_, known)| super::rows::speaks_binary(spec, known))
        });
        let start = format!(
            "START_REPLICATION SLOT {} LOGICAL 0/0 (proto_version '1', publication_names '{}', messages 'true'{})",
            config.slot,
            format!("\"{}\"", config.publication.replace('"', "\"\"")).replace('\'', "''"),
            if binary { ", binary 'true'" } else { "" }
        );
        let limit_of = |spec: &TableSpec| match spec.stays() {
            true => self.row_limit,
            // A little more for what is around the payload, and for a form that needs more room.
            false => 2 * spec.max_payload + (1 << 20),
        };
        let most = specs.iter().map(limit_of).max().unwrap_or(self.row_limit);
        let (reader, writer) = connection.stream(&start, most).await?;
        let (changed, differs) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (mut routes, mut lines, mut outlets) = (Vec::new(), Vec::new(), Outlets::default());
        let mut numbers = Vec::new();
        for (spec, table) in specs.into_iter().zip(tables) {
            let is_message = matches!(spec.rows, Rows::Messages { .. });
            if !is_message {
                numbers.push((quoted_table(&spec.name), table.as_ref().map(|(oid, _)| i64::from(*oid))));
            }
            let limit = limit_of(&spec);
            let progress = Arc::new(Progress::new(changed.clone()));
            let batches = outlets.open();
            lines.push(match &table {
                None if !is_message => Line::Down { why: missing(&spec), lost: false },
                _ => Line::Up(Incoming { batches, progress: progress.clone() }),
            });
            routes.push(Route::new(spec, table, limit, progress));
        }
        let token = uuid::Uuid::new_v4().to_string();
        let (confirmed, retained) = (Arc::new(Confirmed::default()), Arc::new(AtomicI64::new(0)));
        let watch = Watch {
            slot: self.slot.clone(),
            token: token.clone(),
            metrics: self.metrics.clone(),
            retained: retained.clone(),
            tables: numbers,
            publication,
            differs: differs.clone(),
        };
        let session = Session {
            reader,
            decoder: Decoder::new(routes, token),
            outlets,
            changed,
            confirmed: confirmed.clone(),
            _feedback: AbortOnDropHandle::new(tokio::spawn(feed_back(writer, confirmed))),
            _watch: AbortOnDropHandle::new(tokio::spawn(watch.keep())),
            differs,
            retained,
            said_too_much: false,
            heard: Instant::now(),
        };
        Ok((session, lines))
    }
}

struct Session {
    reader: Reader,
    decoder: Decoder,
    outlets: Outlets,
    changed: Arc<Notify>,
    /// A table is another one, has come, or is not published any more.
    differs: Arc<Notify>,
    confirmed: Arc<Confirmed>,
    _feedback: AbortOnDropHandle<()>,
    _watch: AbortOnDropHandle<()>,
    /// What the server keeps of its log for the slot, in bytes, as it was last measured.
    retained: Arc<AtomicI64>,
    /// Whether it was said that this is too much.
    said_too_much: bool,
    heard: Instant,
}

impl Session {
    async fn run(mut self, streamer: &Streamer, stop: &CancellationToken) -> Ended {
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ready: VecDeque<Ready> = VecDeque::new();
        loop {
            let mut drained = false;
            if ready.is_empty() {
                drained = match self.decode() {
                    Ok(drained) => drained,
                    Err(obstacle) => return obstacle.into(),
                };
                if self.decoder.take_changed()
                    && let Some(ended) = look_at_columns(&self.decoder, &streamer.slot).await
                {
                    return ended;
                }
                ready.extend(self.decoder.take_ready());
            }
            let next = ready.front().map(|ready| (ready.table, ready.bytes));
            tokio::select! {
                biased;
                () = self.changed.notified() => self.confirm(false),
                () = stop.cancelled() => {
                    // The tables have ended, and said how far they came.
                    self.confirm(true);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    return Ended::Stopped;
                }
                () = self.differs.notified() => {
                    return Ended::Again("a table has come or gone, or is not published any more");
                }
                () = streamer.again.notified() => return Ended::Again("a table asked for it"),
                _ = look.tick() => {
                    self.confirm(false);
                    if let Some(ended) = self.look(streamer, next.is_some()) {
                        return ended;
                    }
                }
                reserved = self.outlets.reserve(next), if next.is_some() => {
                    if let (Some(batch), Some(reserved)) = (ready.pop_front(), reserved) {
                        reserved.send(batch);
                    }
                }
                read = self.reader.fill(), if next.is_none() && drained => {
                    if let Err(error) = read {
                        return error.into();
                    }
                    self.heard = Instant::now();
                }
                // There is more in the buffer.
                () = std::future::ready(()), if next.is_none() && !drained => {}
            }
        }
    }

    /// Decodes what is in the buffer, until there is enough to hand over. Whether nothing is left.
    fn decode(&mut self) -> Result<bool, Obstacle> {
        while !self.decoder.is_full() {
            match self.reader.next()? {
                None => return Ok(true),
                Some(Message::Data(frame)) => self.decoder.take(frame)?,
                Some(Message::Oversize { head, bytes }) => self.decoder.take_head(head, bytes),
                Some(Message::Done) => return Err(wire::Error::Closed.into()),
            }
        }
        Ok(false)
    }

    fn confirm(&mut self, now: bool) {
        self.confirmed.at.store(self.decoder.confirmed().0, Ordering::Release);
        if now {
            self.confirmed.now.notify_one();
        }
    }

    /// What is looked at once in a while.
    fn look(&mut self, streamer: &Streamer, waits: bool) -> Option<Ended> {
        if waits {
            // Nothing is read while the tables take nothing, so nothing can be heard.
            self.heard = Instant::now();
        }
        for (table, follower) in streamer.followers.iter().enumerate() {
            if !follower.spec.stays() {
                follower.unsettled.send_replace(self.decoder.unsettled(table));
            }
        }
        if self.heard.elapsed() > SILENT_AFTER {
            return Some(Ended::Trouble(Obstacle::Setup("the server has stopped answering".into())));
        }
        let (retained, most) =
            (self.retained.load(Ordering::Relaxed), streamer.slot.settings.max_retained_wal as i64);
        if retained > most && streamer.disposable {
            return Some(Ended::OverBudget(retained));
        }
        // Half of it is worth a word, while there is time.
        if (retained > most / 2) != self.said_too_much {
            self.said_too_much = !self.said_too_much;
            if self.said_too_much {
                warn!(
                    slot = streamer.slot.settings.slot,
                    retained,
                    most,
                    "the server keeps much of its log for the slot: what follows it is slow, or waits for kafka"
                );
            }
        }
        None
    }
}

/// The log has other columns than the tables had when it began to be read. Read anew it is understood,
/// unless it is the log that is behind: then its rows are left to the table.
async fn look_at_columns(decoder: &Decoder, slot: &Slot) -> Option<Ended> {
    for (spec, known) in decoder.tables() {
        match slot.columns(spec).await {
            Ok(Some(now)) if now == *known => {}
            Ok(_) => return Some(Ended::Again("the columns of a table have changed")),
            Err(obstacle) => return Some(obstacle.into()),
        }
    }
    let (spec, _) = decoder.tables().find(|(spec, _)| !spec.stays() && !decoder.reads(spec))?;
    Some(Ended::Trouble(Obstacle::Setup(format!(
        "the log has rows of table {}, and only the log has them, from when columns that are needed were \
         missing or had other names: configure the names of then until these rows are published",
        spec.name
    ))))
}
