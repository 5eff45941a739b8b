//! The log of the source, for the tables that follow it.

use std::{future::Future, sync::Arc};

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::metrics::Metrics,
    config::{Capture, Config, Table},
    coordinate::Lease,
    source::{
        database::{Database, TableSpec},
        log::Line,
        table::LogEnd,
    },
};

/// A table that follows the log, before there is one.
struct Wanted {
    spec: TableSpec,
    lines: mpsc::UnboundedSender<Line>,
    waits: watch::Receiver<f64>,
    polls: bool,
}

#[derive(Default)]
pub(super) struct Log {
    wanted: Vec<Wanted>,
    again: Arc<Notify>,
    #[cfg(feature = "postgres")]
    streamer: Option<crate::source::postgres::stream::Streamer>,
}

impl Log {
    /// A table's end of the log, where it is to follow one.
    pub fn follow(&mut self, table: &Table, spec: &TableSpec, waits: watch::Receiver<f64>) -> Option<LogEnd> {
        let polls = match table.capture {
            Capture::Poll => return None,
            Capture::Stream => false,
            Capture::Auto => true,
        };
        let (lines, end) = mpsc::unbounded_channel();
        self.wanted.push(Wanted { spec: spec.clone(), lines, waits, polls });
        Some(LogEnd { lines: end, polls, again: self.again.clone() })
    }

    #[cfg(not(feature = "postgres"))]
    pub fn open(&mut self, _: &Config, _: &Database, _: &watch::Receiver<Lease>, _: &Arc<Metrics>) {}

    #[cfg(feature = "postgres")]
    pub fn open(
        &mut self,
        config: &Config,
        database: &Database,
        lease: &watch::Receiver<Lease>,
        metrics: &Arc<Metrics>,
    ) {
        use crate::source::postgres::{
            slot::Slot,
            stream::{Follower, Streamer},
        };
        // `check` has refused other databases.
        #[cfg_attr(not(feature = "sqlite"), expect(irrefutable_let_patterns, reason = "one of one"))]
        let Database::Postgres(database) = database else { return };
        if self.wanted.is_empty() {
            return;
        }
        let application = format!("whippet:{}", config.source.relay_schema);
        self.streamer = Some(Streamer {
            disposable: self.wanted.iter().all(|table| table.polls),
            connect: database.replication(&config.source, &application),
            slot: Slot {
                database: database.clone(),
                settings: config.source.stream.clone().unwrap_or_default(),
                application,
            },
            followers: self
                .wanted
                .drain(..)
                .map(|Wanted { spec, lines, waits, .. }| Follower { spec, lines, waits })
                .collect(),
            // What is much of the window is read from the table, which has it wait for room.
            row_limit: (config.limits.in_flight_bytes / 4).max(64 << 10),
            lease: lease.clone(),
            again: self.again.clone(),
            metrics: metrics.clone(),
        });
    }

    /// Reads the log, where there is one, until `stop`.
    pub fn spawn(self, stop: CancellationToken) -> impl Future<Output = ()> {
        #[cfg(feature = "postgres")]
        let task = self.streamer.map(|streamer| tokio::spawn(streamer.run(stop)));
        #[cfg(not(feature = "postgres"))]
        let task: Option<tokio::task::JoinHandle<()>> = {
            drop(stop);
            None
        };
        async move {
            if let Some(task) = task {
                task.await.ok();
            }
        }
    }
}
