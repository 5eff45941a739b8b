//! Reading for tables whose rows stay: from where the log is now.

use std::{collections::VecDeque, sync::Arc};

use tokio::{sync::Notify, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::{Ended, LOOK_EVERY, Streamer, Watch, said};
use crate::source::{
    database::TableSpec,
    log::{Incoming, Line, Outlets, Progress, Ready},
    mysql::{
        decoder::{Decoder, Route, Verdict},
        server::Obstacle,
        wire::{Packet, Reader},
    },
};

impl Streamer {
    /// One reading of the log, from where it is.
    pub(super) async fn follow(&self, stop: &CancellationToken) -> Ended {
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
        let (mut routes, mut lines, mut outlets) = (Vec::new(), Vec::new(), Outlets::default());
        let mut tables = Vec::new();
        for (spec, known) in specs.into_iter().zip(start.tables) {
            let progress = Arc::new(Progress::new(changed.clone()));
            let batches = outlets.open();
            lines.push(match &known {
                Err(why) => Line::Down { why: why.clone(), lost: false },
                Ok(_) => Line::Up(Incoming { batches, progress: progress.clone() }),
            });
            let known = known.ok();
            tables.push((spec.clone(), known.clone()));
            routes.push(Route::new(spec, known, progress));
        }
        let session = Session {
            reader,
            decoder: Decoder::new(routes, start.server, start.place, start.end, self.limit),
            outlets,
            watch: Watch::keep(&self.server, tables, start.server, start.place),
        };
        info!(file = start.file, at = start.place.at, "the log is read");
        Ok((session, lines))
    }
}

struct Session {
    reader: Reader,
    decoder: Decoder,
    outlets: Outlets,
    watch: Watch,
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
                () = self.watch.differs() => return Ended::Again("a table is another one"),
                () = streamer.again.notified() => return Ended::Again("a table asked for it"),
                _ = look.tick() => {
                    if let Some(ended) = self.watch.look(self.decoder.at(), streamer.silent_after(), next.is_some()) {
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
                    self.watch.heard();
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
}
