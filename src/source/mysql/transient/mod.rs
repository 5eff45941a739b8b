//! Reading for tables whose rows do not stay: from a stored position on, every row, or none.
//!
//! The position is stored when everything before it is published or held, and written down; so what is read again
//! after a crash is what was not. A place in the middle of a transaction is never stored.

mod decoder;
mod start;
#[cfg(test)]
mod tests;
mod transaction;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::info;

use self::decoder::{Begin, Decoder, Route, Unreadable, Verdict};
use super::{
    rows::obstacle,
    server::Obstacle,
    stream::{Ended, LOOK_EVERY, Streamer, Watch},
    wire::{self, Packet, Reader},
};
use crate::{
    coordinate::Lease,
    source::{
        database::{TableSpec, answered, position::Stored},
        log::{Incoming, Line, Outlets, Progress, Ready, binlog::Coordinates},
    },
};

/// How often the position is stored while rows are settled, and while there are none: to store it is a
/// transaction too, which the log tells of.
const STORE_EVERY: Duration = Duration::from_secs(1);
const STORE_IDLE: Duration = Duration::from_secs(10);

/// One reading of the log.
pub async fn read(streamer: &Streamer, stop: &CancellationToken) -> Ended {
    let Some(epoch) = streamer.lease.borrow().epoch() else { return Ended::Again("the lease is lost") };
    let prepared = tokio::select! {
        prepared = Session::prepare(streamer, epoch) => prepared,
        () = stop.cancelled() => return Ended::Stopped,
    };
    let (session, lines) = match prepared {
        Ok(prepared) => prepared,
        Err(obstacle) => return obstacle.into(),
    };
    for (follower, line) in streamer.followers.iter().zip(lines) {
        follower.lines.send(line).ok();
    }
    session.run(streamer, stop).await
}

struct Session {
    reader: Reader,
    decoder: Decoder,
    outlets: Outlets,
    /// Wakes when more is settled.
    changed: Arc<Notify>,
    watch: Watch,
    longest: usize,
    epoch: i64,
    /// What is stored, since when, and how many rows were settled then.
    stored: Stored,
    stored_at: Instant,
    stored_rows: u64,
    progress: Vec<Arc<Progress>>,
    /// Why nothing more is read: it ends when what was read is settled.
    ending: Option<Obstacle>,
}

/// How long an event may be: with a little more than the payload, for what is around it.
fn longest(specs: &[TableSpec]) -> usize {
    specs.iter().map(|spec| 2 * spec.max_payload + (1 << 20)).max().unwrap_or(1 << 20)
}

impl Session {
    async fn prepare(streamer: &Streamer, epoch: i64) -> Result<(Session, Vec<Line>), Obstacle> {
        let server = &streamer.server;
        let specs: Vec<TableSpec> = streamer.followers.iter().map(|follower| follower.spec.clone()).collect();
        let changed = Arc::new(Notify::new());
        let (mut routes, mut lines, mut all) = (Vec::new(), Vec::new(), Vec::new());
        let mut outlets = Outlets::default();
        for (spec, known) in specs.iter().zip(server.tables(&specs).await?) {
            let known = known.ok_or_else(|| {
                Obstacle::Setup(format!("table {} does not exist, or this account cannot see it", spec.name))
            })?;
            if let Some(why) = obstacle(spec, &known) {
                return Err(Obstacle::Setup(format!("{why}, and only the binlog has its rows")));
            }
            let progress = Arc::new(Progress::new(changed.clone()));
            let batches = outlets.open();
            lines.push(Line::Up(Incoming { batches, progress: progress.clone() }));
            all.push(progress.clone());
            routes.push(Route::new(spec.clone(), known, progress));
        }
        let stored = server.resume(epoch).await?;
        let (id, _) = server.database.log_end().await?;
        let longest = longest(&specs);
        let begin = Begin {
            server: id,
            position: stored.position.clone(),
            era: stored.era,
            limit: streamer.limit,
            longest,
        };
        let session = Session {
            reader: server.read_from(&stored.position, longest).await?,
            decoder: Decoder::new(routes, begin),
            outlets,
            changed,
            watch: Watch::keep(server, Vec::new(), id, Coordinates::default()),
            longest,
            epoch,
            stored_at: Instant::now(),
            stored_rows: 0,
            progress: all,
            ending: None,
            stored,
        };
        info!(position = %session.stored.position, "the log is read, for rows that do not stay");
        Ok((session, lines))
    }

    async fn run(mut self, streamer: &Streamer, stop: &CancellationToken) -> Ended {
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ready: VecDeque<Ready> = VecDeque::new();
        loop {
            let mut drained = false;
            if ready.is_empty() && self.ending.is_none() {
                match self.decode(streamer, stop).await {
                    Ok(is_drained) => drained = is_drained,
                    Err(obstacle @ Obstacle::Lost(_)) => self.ending = Some(obstacle),
                    Err(obstacle) => return obstacle.into(),
                }
                ready.extend(self.decoder.take_ready());
            }
            if ready.is_empty() && self.ending.is_some() && self.decoder.is_settled() {
                // So the next reading begins right before what is in its way.
                if let Err(obstacle) = self.store(streamer, true).await {
                    return obstacle.into();
                }
                return self.ending.take().map_or(Ended::Stopped, Ended::Trouble);
            }
            let next = ready.front().map(|ready| (ready.table, ready.bytes));
            let reads = next.is_none() && self.ending.is_none();
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    // The tables have ended, and said how far they came.
                    return match self.store(streamer, true).await {
                        Ok(()) => Ended::Stopped,
                        Err(obstacle) => obstacle.into(),
                    };
                }
                () = streamer.again.notified() => return Ended::Again("a table asked for it"),
                // Where it ends when all is settled, that is looked at.
                () = self.changed.notified() => {}
                _ = look.tick() => {
                    self.show(streamer);
                    if let Err(obstacle) = self.store(streamer, false).await {
                        return obstacle.into();
                    }
                    let waits = !reads;
                    if let Some(ended) = self.watch.look(self.decoder.at(), streamer.silent_after(), waits) {
                        return ended;
                    }
                }
                reserved = self.outlets.reserve(next), if next.is_some() => {
                    if let (Some(batch), Some(reserved)) = (ready.pop_front(), reserved) {
                        reserved.send(batch);
                    } else {
                        return Ended::Again("a table has left the log");
                    }
                }
                read = self.reader.fill(), if reads && drained => {
                    if let Err(error) = read {
                        return error.into();
                    }
                    self.watch.heard();
                }
                // There is more in the buffer.
                () = std::future::ready(()), if reads && !drained => {}
            }
        }
    }

    /// Decodes what is in the buffer, until there is enough to hand over. Whether nothing is left.
    async fn decode(&mut self, streamer: &Streamer, stop: &CancellationToken) -> Result<bool, Obstacle> {
        while !self.decoder.is_full() {
            let verdict = if self.decoder.is_inside() {
                self.decoder.take_inside()?
            } else {
                match self.reader.next_packet() {
                    None => return Ok(true),
                    Some(Packet::Whole([0xff, error @ ..])) => {
                        return Err(match wire::Error::server(error) {
                            wire::Error::Server { code, message } if start::is_gone(code, &message) => {
                                streamer.server.lost(&format!("the server says: {message}"))
                            }
                            error => error.into(),
                        });
                    }
                    Some(Packet::Whole([0xfe, ..])) => {
                        return Err(Obstacle::Setup("the server has ended its binlog".into()));
                    }
                    Some(Packet::Whole(packet)) => self.decoder.take(packet)?,
                    Some(Packet::Oversize { head, bytes }) => self.decoder.take_head(head, bytes)?,
                }
            };
            match verdict {
                Verdict::GoOn => {}
                Verdict::Changed => {
                    let specs: Vec<TableSpec> =
                        streamer.followers.iter().map(|follower| follower.spec.clone()).collect();
                    self.decoder.learn(streamer.server.tables(&specs).await?);
                }
                Verdict::Again => {
                    let again = streamer.server.read_from(self.decoder.reached(), self.longest);
                    self.reader = tokio::select! {
                        reader = again => reader?,
                        // The caller sees that it is time to stop.
                        () = stop.cancelled() => return Ok(true),
                    };
                    self.decoder.rewind();
                }
                Verdict::Unreadable(unreadable) => return Err(cannot_be_read(streamer, &unreadable)),
            }
        }
        Ok(false)
    }

    fn show(&self, streamer: &Streamer) {
        for (table, follower) in streamer.followers.iter().enumerate() {
            follower.unsettled.send_replace(self.decoder.unsettled(table));
        }
    }

    /// Stores how far everything is settled, if it is time.
    async fn store(&mut self, streamer: &Streamer, now: bool) -> Result<(), Obstacle> {
        let rows = self.progress.iter().map(|progress| progress.settled()).sum();
        let (file, made) = self.decoder.file();
        let every = if rows == self.stored_rows { STORE_IDLE } else { STORE_EVERY };
        // Each of them is told, so all are asked.
        let awaited = self.progress.iter().filter(|progress| progress.was_awaited()).count() > 0;
        // Before the log has told of its file nothing has come.
        if made == 0 || (!now && !awaited && self.stored_at.elapsed() < every) {
            return Ok(());
        }
        let (file, era, server) = (file.to_owned(), self.stored.era, self.stored.server.clone());
        let next = Stored { position: self.decoder.settled().clone(), server, file, made, era };
        if next == self.stored || matches!(*streamer.lease.borrow(), Lease::Standby) {
            return Ok(());
        }
        answered("note how far the binlog was read", streamer.server.database.store(&next, self.epoch))
            .await?;
        (self.stored, self.stored_at, self.stored_rows) = (next, Instant::now(), rows);
        Ok(())
    }
}

fn cannot_be_read(streamer: &Streamer, Unreadable { why, start, behind }: &Unreadable) -> Obstacle {
    Obstacle::Lost(format!(
        "a transaction of the binlog cannot be read: {why}. It is in file {}, at {}. Mend it, if it can be; or give up \
         what it has inserted, and go on behind it: {}",
        start.file,
        start.at,
        streamer.server.database.go_on(behind)
    ))
}
