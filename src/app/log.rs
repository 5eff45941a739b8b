//! The log of the source, for the tables that follow it.

use std::{future::Future, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    admin::metrics::Metrics,
    config::{Config, Table},
    coordinate::Lease,
    source::{
        database::{Database, TableSpec},
        log::Unsettled,
        table::LogEnd,
    },
};

#[cfg(feature = "postgres")]
pub(super) use self::postgres::Log;

#[cfg(feature = "postgres")]
mod postgres {
    use tokio::sync::{Notify, mpsc};

    use super::*;
    use crate::{
        config::Capture,
        source::postgres::{
            slot::Slot,
            stream::{Follower, Streamer},
        },
    };

    #[derive(Default)]
    pub struct Log {
        followers: Vec<Follower>,
        /// Every table that follows is polled when there is no log.
        all_poll: Option<bool>,
        again: Arc<Notify>,
        streamer: Option<Streamer>,
    }

    impl Log {
        /// A table's end of the log, where it is to follow one.
        pub fn follow(
            &mut self,
            table: &Table,
            spec: &TableSpec,
            waits: watch::Receiver<f64>,
            unsettled: watch::Sender<Unsettled>,
        ) -> Option<LogEnd> {
            let polls = match table.capture {
                Capture::Poll => return None,
                Capture::Stream => false,
                Capture::Auto => true,
            };
            let (lines, end) = mpsc::unbounded_channel();
            self.all_poll = Some(self.all_poll.unwrap_or(true) && polls);
            self.followers.push(Follower { spec: spec.clone(), lines, waits, unsettled });
            Some(LogEnd { lines: end, polls, again: self.again.clone() })
        }

        pub fn open(
            &mut self,
            config: &Config,
            database: &Database,
            lease: &watch::Receiver<Lease>,
            metrics: &Arc<Metrics>,
        ) {
            // `check` has refused other databases.
            #[cfg_attr(not(feature = "sqlite"), expect(irrefutable_let_patterns, reason = "one of one"))]
            let Database::Postgres(database) = database else { return };
            let (Some(disposable), Some(source)) = (self.all_poll, &config.source) else { return };
            // The server shows 63 bytes of it (NAMEDATALEN), and by that we know our own.
            let mut application = format!("whippet:{}", source.relay_schema);
            application.truncate(63);
            self.streamer = Some(Streamer {
                disposable,
                connect: database.replication(source, &application),
                slot: Slot {
                    database: database.clone(),
                    settings: source.stream.clone().unwrap_or_default(),
                    application,
                },
                followers: std::mem::take(&mut self.followers),
                // What is much of the window is read from the table, which has it wait for room.
                row_limit: (config.limits.in_flight_bytes / 4).max(64 << 10),
                lease: lease.clone(),
                again: self.again.clone(),
                metrics: metrics.clone(),
            });
        }

        /// Reads the log, where there is one, until `stop`.
        pub fn spawn(self, stop: CancellationToken) -> impl Future<Output = ()> {
            let task = self.streamer.map(|streamer| tokio::spawn(streamer.run(stop)));
            async move {
                if let Some(task) = task {
                    task.await.ok();
                }
            }
        }
    }
}

/// Of a build without a database that has a log.
#[cfg(not(feature = "postgres"))]
#[derive(Default)]
pub(super) struct Log {}

#[cfg(not(feature = "postgres"))]
impl Log {
    pub fn follow(
        &mut self,
        _: &Table,
        _: &TableSpec,
        _: watch::Receiver<f64>,
        _: watch::Sender<Unsettled>,
    ) -> Option<LogEnd> {
        None
    }

    pub fn open(&mut self, _: &Config, _: &Database, _: &watch::Receiver<Lease>, _: &Arc<Metrics>) {}

    pub fn spawn(self, _: CancellationToken) -> impl Future<Output = ()> {
        std::future::ready(())
    }
}
