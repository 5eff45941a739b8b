//! Reading the binlog: one connection, the tables that follow it.
//!
//! The loop decodes what is in its buffer, hands rows to the tables in batches, and reads again. While a
//! table takes nothing, nothing is read, and the log waits in the server's files. Heartbeats of the server
//! show that the connection is alive; the end of its log, that it tells all of it.

mod session;
mod watch;

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

pub use self::watch::Watch;
use super::{
    server::{Obstacle, Server},
    wire,
};
use crate::{
    coordinate::{Lease, report},
    relay::retry::Policy,
    source::{
        database::TableSpec,
        log::{Line, Unsettled},
    },
};

/// A server whose heartbeats do not come for so many of their periods is gone.
const SILENT_PERIODS: u32 = 3;
const SILENT_AT_LEAST: Duration = Duration::from_secs(5);
pub const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A table that follows the log.
#[derive(Debug)]
pub struct Follower {
    pub spec: TableSpec,
    pub lines: mpsc::UnboundedSender<Line>,
    /// What it waits for, where only the log has its rows.
    pub unsettled: tokio::sync::watch::Sender<Unsettled>,
}

pub struct Streamer {
    pub server: Server,
    pub followers: Vec<Follower>,
    /// What one event, and one transaction, may keep, in bytes. What is larger is left to the tables.
    pub limit: usize,
    pub lease: tokio::sync::watch::Receiver<Lease>,
    /// A table wants the log to be read anew.
    pub again: Arc<Notify>,
    /// Only the log has the rows of these tables: it is read from a place that is stored.
    pub only: bool,
}

/// Why a reading of the log ended.
pub enum Ended {
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
            if began.elapsed() > self.silent_after() {
                // It was well in between: the same trouble is news again.
                (failures, said) = (0, String::new());
            }
            failures += 1;
            match ended {
                Ended::Stopped => return,
                Ended::Again(why) => {
                    debug!(why, "the log is read anew");
                    self.tell_down(why, false);
                    failures = 0;
                    continue;
                }
                Ended::Trouble(obstacle) => {
                    let why = report(&obstacle);
                    if said == why {
                        debug!(why, attempt = failures, "the log cannot be read");
                    } else if self.only {
                        warn!(why, "the log cannot be read, and only the log has the rows of these tables");
                        said.clone_from(&why);
                    } else {
                        warn!(why, "the log cannot be read; tables with capture: auto are polled meanwhile");
                        said.clone_from(&why);
                    }
                    self.tell_down(&why, matches!(obstacle, Obstacle::Lost(_)));
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

    pub(super) fn silent_after(&self) -> Duration {
        (self.server.settings.heartbeat * SILENT_PERIODS).max(SILENT_AT_LEAST)
    }

    fn tell_down(&self, why: &str, lost: bool) {
        for follower in &self.followers {
            follower.lines.send(Line::Down { why: why.to_owned(), lost }).ok();
        }
    }

    async fn read(&self, stop: &CancellationToken) -> Ended {
        if self.only { super::transient::read(self, stop).await } else { self.follow(stop).await }
    }
}

/// The server's reason for its end.
pub fn said(error: &[u8]) -> Obstacle {
    wire::Error::server(error).into()
}
