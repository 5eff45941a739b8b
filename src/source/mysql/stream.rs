//! Reading the binlog: one connection, the tables that follow it.
//!
//! The loop decodes what is in its buffer, hands rows to the tables in batches, and reads again. While a
//! table takes nothing, nothing is read, and the log waits in the server's files. Heartbeats of the server
//! show that the connection is alive; the end of its log, that it tells all of it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{debug, info, warn};

use super::{
    decoder::{Decoder, Ready, Route, Verdict},
    rows::Known,
    server::{Obstacle, Server},
    wire::{Packet, Reader},
};
use crate::{
    coordinate::{Lease, report},
    relay::retry::Policy,
    source::{
        database::TableSpec,
        log::{
            Batch, Incoming, Line, Progress,
            binlog::{Coordinates, ServerId},
        },
    },
};

/// Room for rows between the log and the tables, in KiB: beyond it nothing is decoded. One that is larger
/// travels alone.
const ROOM_KIB: u32 = 1024;
/// A server whose heartbeats do not come for so many of their periods is gone.
const SILENT_PERIODS: u32 = 3;
const SILENT_AT_LEAST: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(500);
const COMPARE_EVERY: Duration = Duration::from_secs(5);

/// A table that follows the log.
#[derive(Debug)]
pub struct Follower {
    pub spec: TableSpec,
    pub lines: mpsc::UnboundedSender<Line>,
}

pub struct Streamer {
    pub server: Server,
    pub followers: Vec<Follower>,
    /// What one event, and one transaction, may keep, in bytes. What is larger is left to the tables.
    pub limit: usize,
    pub lease: watch::Receiver<Lease>,
    /// A table wants the log to be read anew.
    pub again: Arc<Notify>,
}

/// Why a reading of the log ended.
enum Ended {
    Stopped,
    /// The lease is gone, or a table asked for it.
    Again(&'static str),
    Trouble(Obstacle),
}

impl<E: Into<Obstacle>> From<E> for Ended {
    fn from(error: E) -> Ended {
        Ended::Trouble(error.into())
    }
}

impl Streamer {
    /// Reads the log while this relay owns the source, until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let (mut failures, mut said) = (0, String::new());
        loop {
            if !self.owned(&stop).await {
                return;
            }
            let began = Instant::now();
            let ended = tokio::select! {
                ended = self.read(&stop) => ended,
                () = self.lost() => Ended::Again("the lease is lost"),
            };
            if began.elapsed() > self.silent_after() {
                // It was well in between: the same trouble is news again.
                (failures, said) = (0, String::new());
            }
            failures += 1;
            match ended {
                Ended::Stopped => return,
                Ended::Again(why) => {
                    debug!(why, "the log is read anew");
                    self.tell_down(why);
                    failures = 0;
                    continue;
                }
                Ended::Trouble(obstacle) => {
                    let why = report(&obstacle);
                    if said == why {
                        debug!(why, attempt = failures, "the log cannot be read");
                    } else {
                        warn!(why, "the log cannot be read; tables with capture: auto are polled meanwhile");
                        said.clone_from(&why);
                    }
                    self.tell_down(&why);
                }
            }
            let policy = Policy { max: Duration::from_secs(10), ..Policy::default() };
            let pause = policy.pause(failures, fastrand::f64()).max(Duration::from_millis(100));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    fn silent_after(&self) -> Duration {
        (self.server.settings.heartbeat * SILENT_PERIODS).max(SILENT_AT_LEAST)
    }

    fn tell_down(&self, why: &str) {
        for follower in &self.followers {
            follower.lines.send(Line::Down { why: why.to_owned(), lost: false }).ok();
        }
    }

    /// Waits for the lease. `false` when it is time to stop.
    async fn owned(&mut self, stop: &CancellationToken) -> bool {
        loop {
            if self.lease.borrow_and_update().epoch().is_some() {
                return true;
            }
            tokio::select! {
                changed = self.lease.changed() => if changed.is_err() { return false },
                () = stop.cancelled() => return false,
            }
        }
    }

    /// Waits until the lease is lost.
    async fn lost(&self) {
        let mut lease = self.lease.clone();
        loop {
            let until = match *lease.borrow_and_update() {
                Lease::Owner { until, .. } if Instant::now() < until => until,
                _ => return,
            };
            tokio::select! {
                changed = lease.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    /// One reading of the log, from where it is.
    async fn read(&self, stop: &CancellationToken) -> Ended {
        let prepared = tokio::select! {
            prepared = self.prepare() => prepared,
            () = stop.cancelled() => return Ended::Stopped,
        };
        let (session, lines) = match prepared {
            Ok(prepared) => prepared,
            Err(obstacle) => return obstacle.into(),
        };
        for (follower, line) in self.followers.iter().zip(lines) {
            follower.lines.send(line).ok();
        }
        session.run(self, stop).await
    }

    async fn prepare(&self) -> Result<(Session, Vec<Line>), Obstacle> {
        let specs: Vec<TableSpec> = self.followers.iter().map(|follower| follower.spec.clone()).collect();
        let start = self.server.start(&specs).await?;
        let reader = self.server.read(&start, self.limit).await?;
        let changed = Arc::new(Notify::new());
        let (mut routes, mut lines, mut outlets) = (Vec::new(), Vec::new(), Vec::new());
        let mut tables = Vec::new();
        for (spec, known) in specs.into_iter().zip(start.tables) {
            let progress = Arc::new(Progress::new(changed.clone()));
            let (outlet, batches) = mpsc::channel(2);
            lines.push(match &known {
                Err(why) => Line::Down { why: why.clone(), lost: false },
                Ok(_) => Line::Up(Incoming { batches, progress: progress.clone() }),
            });
            outlets.push(outlet);
            let known = known.ok();
            tables.push((spec.clone(), known.clone()));
            routes.push(Route::new(spec, known, progress));
        }
        let places =
            Places { server: start.server, at: start.place, end: None, begun_anew: false, refused: None };
        let places = Arc::new(Mutex::new(places));
        let differs = Arc::new(Notify::new());
        let session = Session {
            reader,
            decoder: Decoder::new(routes, start.server, start.place, start.end, self.limit),
            outlets,
            room: Arc::new(Semaphore::new(ROOM_KIB as usize)),
            _watch: AbortOnDropHandle::new(tokio::spawn(keep_watch(
                self.server.clone(),
                tables,
                places.clone(),
                differs.clone(),
            ))),
            places,
            differs,
            heard: Instant::now(),
            behind: None,
        };
        info!(file = start.file, at = start.place.at, "the log is read");
        Ok((session, lines))
    }
}

/// How far the log was read, and where it is, as they were last looked at.
struct Places {
    server: ServerId,
    at: Coordinates,
    end: Option<Coordinates>,
    /// The log was read further than it is, or is another server's.
    begun_anew: bool,
    /// The server's settings are such that it cannot be followed any more.
    refused: Option<String>,
}

/// Notes now and then where the log is and whether it may still be followed, and sees whether the tables are the
/// same: one that could not be followed may be mended.
async fn keep_watch(
    server: Server,
    tables: Vec<(TableSpec, Option<Known>)>,
    places: Arc<Mutex<Places>>,
    differs: Arc<Notify>,
) {
    let mut compare = tokio::time::interval_at(Instant::now() + COMPARE_EVERY, COMPARE_EVERY);
    compare.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let polled: Vec<TableSpec> =
        tables.iter().filter(|(_, known)| known.is_none()).map(|(spec, _)| spec.clone()).collect();
    let first = server.tables(&polled).await.ok();
    let places = || places.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        compare.tick().await;
        let read_before = places().at;
        match server.database.log_end().await {
            Ok((server, now)) => {
                let mut places = places();
                places.end = Some(now);
                places.begun_anew |= now < read_before || server != places.server;
            }
            Err(error) => debug!(error = report(&error), "cannot look where the log is"),
        }
        if let Ok(Some(why)) = server.database.log_refusal(server.settings.server_id).await {
            places().refused = Some(why);
        }
        if !polled.is_empty() && server.tables(&polled).await.ok() != first {
            differs.notify_one();
        }
    }
}

struct Session {
    reader: Reader,
    decoder: Decoder,
    outlets: Vec<mpsc::Sender<Batch>>,
    room: Arc<Semaphore>,
    _watch: AbortOnDropHandle<()>,
    places: Arc<Mutex<Places>>,
    /// A table that could not be followed is another one now.
    differs: Arc<Notify>,
    heard: Instant,
    /// A place that the log had come to, and has not told us of since then.
    behind: Option<(Coordinates, Instant)>,
}

impl Session {
    async fn run(mut self, streamer: &Streamer, stop: &CancellationToken) -> Ended {
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ready: VecDeque<Ready> = VecDeque::new();
        loop {
            let (mut drained, mut changed) = (false, false);
            if ready.is_empty() {
                match self.decode() {
                    Ok((is_drained, verdict)) => {
                        (drained, changed) = (is_drained, verdict == Verdict::Changed);
                    }
                    Err(obstacle) => return obstacle.into(),
                }
                ready.extend(self.decoder.take_ready());
            }
            if changed {
                // What was decoded is in the tables, which are polled.
                return Ended::Again("a statement may have changed a table");
            }
            let next = ready.front().map(|ready| (ready.table, ready.bytes));
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ended::Stopped,
                () = self.differs.notified() => return Ended::Again("a table is another one"),
                () = streamer.again.notified() => return Ended::Again("a table asked for it"),
                _ = look.tick() => {
                    if let Some(ended) = self.look(streamer, next.is_some()) {
                        return ended;
                    }
                }
                permits = reserve(&self.room, next.and_then(|(table, bytes)| Some((self.outlets.get(table)?, bytes)))),
                    if next.is_some() =>
                {
                    if let (Some(batch), Some((outlet, room))) = (ready.pop_front(), permits) {
                        outlet.send(Batch { rows: batch.rows.into(), room });
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
    fn decode(&mut self) -> Result<(bool, Verdict), Obstacle> {
        while !self.decoder.is_full() {
            let verdict = match self.reader.next_packet() {
                None => return Ok((true, Verdict::GoOn)),
                Some(Packet::Whole([0xff, error @ ..])) => return Err(said(error)),
                Some(Packet::Whole([0xfe, ..])) => {
                    return Err(Obstacle::Setup("the server has ended its binlog".into()));
                }
                Some(Packet::Whole(packet)) => self.decoder.take(packet)?,
                Some(Packet::Oversize { head, .. }) => self.decoder.take_head(head)?,
            };
            if verdict == Verdict::Changed {
                return Ok((false, verdict));
            }
        }
        Ok((false, Verdict::GoOn))
    }

    /// What is looked at once in a while.
    fn look(&mut self, streamer: &Streamer, waits: bool) -> Option<Ended> {
        let (now, at) = (Instant::now(), self.decoder.at());
        let (end, begun_anew, refused) = {
            let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
            places.at = at;
            (places.end, places.begun_anew, places.refused.take())
        };
        if begun_anew {
            return Some(Ended::Again("the server's binlog has begun anew, or it is another server"));
        }
        if let Some(why) = refused {
            return Some(Ended::Trouble(Obstacle::Setup(why)));
        }
        if waits {
            // Nothing is read while the tables take nothing, so nothing can be heard.
            (self.heard, self.behind) = (now, None);
            return None;
        }
        let trouble = |why: &str| Some(Ended::Trouble(Obstacle::Setup(why.into())));
        if self.heard.elapsed() > streamer.silent_after() {
            return trouble("the server has stopped answering");
        }
        match (self.behind, end?) {
            (_, end) if at >= end => self.behind = None,
            (Some((place, since)), _) if at < place => {
                if since.elapsed() > 2 * streamer.silent_after() {
                    return trouble("the server does not tell all of its binlog");
                }
            }
            (_, end) => self.behind = Some((end, now)),
        }
        None
    }
}

/// The server's reason for its end.
fn said(error: &[u8]) -> Obstacle {
    super::wire::Error::server(error).into()
}

/// A place in a table's queue, and room for what goes there. `None`: the table has left, and its rows are
/// where they were.
async fn reserve(
    room: &Arc<Semaphore>,
    to: Option<(&mpsc::Sender<Batch>, usize)>,
) -> Option<(mpsc::OwnedPermit<Batch>, OwnedSemaphorePermit)> {
    let (outlet, bytes) = to?;
    let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX).clamp(1, ROOM_KIB);
    let room = room.clone().acquire_many_owned(kib).await.ok()?;
    let outlet = outlet.clone().reserve_owned().await.ok()?;
    Some((outlet, room))
}
