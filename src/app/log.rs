//! The log of the source, for the tables that follow it.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    admin::metrics::Metrics,
    config::{Config, Dialect, Table},
    coordinate::Lease,
    source::{
        database::{Database, TableSpec},
        log::Unsettled,
        table::LogEnd,
    },
};

#[cfg(any(feature = "postgres", feature = "mysql"))]
pub(super) use self::read::Log;

#[cfg(any(feature = "postgres", feature = "mysql"))]
mod read {
    use std::time::Duration;

    use tokio::{
        sync::{Notify, mpsc},
        task::JoinHandle,
        time::Instant,
    };
    use tokio_util::sync::CancellationToken;
    use tracing::warn;

    use super::*;
    #[cfg(feature = "mysql")]
    use crate::source::{database::Mysql, mysql};
    use crate::{
        config::{Capture, Source},
        source::log::Line,
    };
    #[cfg(feature = "postgres")]
    use crate::{
        source::database::Postgres,
        source::postgres::{slot::Slot, stream},
    };

    /// A session may leave what it does out of a binlog (`sql_log_bin`).
    const SWEEP_EVERY: Duration = Duration::from_secs(30);
    /// How long the log may take to be told how far it is settled.
    const CLOSED_WITHIN: Duration = Duration::from_secs(2);

    /// A table that follows the log.
    #[derive(Clone)]
    struct Follower {
        spec: TableSpec,
        /// Whether it is polled when there is no log.
        #[cfg_attr(not(feature = "postgres"), expect(dead_code, reason = "a binlog is not given up"))]
        polls: bool,
        lines: mpsc::UnboundedSender<Line>,
        /// How long its oldest row has waited, in seconds.
        #[cfg_attr(not(feature = "postgres"), expect(dead_code, reason = "a binlog is not given up"))]
        waits: watch::Receiver<f64>,
        /// What only the log has, and is not settled.
        unsettled: watch::Sender<Unsettled>,
    }

    enum Streamer {
        #[cfg(feature = "mysql")]
        Mysql(mysql::stream::Streamer),
        #[cfg(feature = "postgres")]
        Postgres(stream::Streamer),
    }

    /// The tables that follow the log, and who reads it: one reader for all of them, so a change of the tables is
    /// another reader. A binlog has another one for rows that only it has: they are read from another place.
    #[derive(Default)]
    pub struct Log {
        followers: Vec<Follower>,
        again: Arc<Notify>,
        again_alone: Arc<Notify>,
        reading: Vec<(CancellationToken, JoinHandle<()>)>,
    }

    impl Log {
        /// A table's end of the log, where it is to follow one.
        pub fn follow(
            &mut self,
            dialect: Dialect,
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
            self.followers.push(Follower { spec: spec.clone(), polls, lines, waits, unsettled });
            let sweep = (dialect == Dialect::Mysql && spec.stays()).then_some(SWEEP_EVERY);
            let is_alone = dialect == Dialect::Mysql && !spec.stays();
            let again = if is_alone { &self.again_alone } else { &self.again };
            Some(LogEnd { lines: end, polls, sweep, again: again.clone() })
        }

        /// A table follows the log no more. Returns whether it did.
        pub fn leave(&mut self, table: &str) -> bool {
            let before = self.followers.len();
            self.followers.retain(|follower| follower.spec.name != table);
            self.followers.len() < before
        }

        pub fn has_followers(&self) -> bool {
            self.followers() > 0
        }

        pub fn followers(&self) -> usize {
            self.followers.len()
        }

        /// Begins to read the log for the tables that follow it now.
        pub fn open(
            &mut self,
            config: &Config,
            database: &Database,
            lease: &watch::Receiver<Lease>,
            #[cfg_attr(not(feature = "postgres"), expect(unused_variables, reason = "there is no slot"))]
            metrics: &Arc<Metrics>,
        ) {
            let Some(source) = config.source.as_ref().filter(|_| self.has_followers()) else { return };
            let followers = self.followers.iter().cloned();
            let streamers = match database {
                #[cfg(feature = "mysql")]
                Database::Mysql(database) => {
                    let of = |only: bool| {
                        let followers = followers.clone().filter(|follower| follower.spec.stays() != only);
                        let followers = followers.map(|Follower { spec, lines, unsettled, .. }| {
                            mysql::stream::Follower { spec, lines, unsettled }
                        });
                        let mut server = server(source, database);
                        // The server takes two readers with one number for one that has come again.
                        server.settings.server_id += u32::from(only);
                        let streamer = mysql::stream::Streamer {
                            server,
                            followers: followers.collect(),
                            limit: row_limit(config),
                            lease: lease.clone(),
                            again: if only { &self.again_alone } else { &self.again }.clone(),
                            only,
                        };
                        Some(streamer).filter(|streamer| !streamer.followers.is_empty())
                    };
                    [of(false), of(true)].into_iter().flatten().map(Streamer::Mysql).collect()
                }
                #[cfg(feature = "postgres")]
                Database::Postgres(database) => {
                    let slot = slot(source, database);
                    vec![Streamer::Postgres(stream::Streamer {
                        disposable: self.followers.iter().all(|follower| follower.polls),
                        connect: database.replication(&slot.application),
                        slot,
                        followers: followers
                            .map(|Follower { spec, lines, waits, unsettled, .. }| stream::Follower {
                                spec,
                                lines,
                                waits,
                                unsettled,
                            })
                            .collect(),
                        row_limit: row_limit(config),
                        lease: lease.clone(),
                        again: self.again.clone(),
                        metrics: metrics.clone(),
                    })]
                }
                // `check` has refused it.
                #[cfg(feature = "sqlite")]
                Database::Sqlite(_) => return,
            };
            let begin = |streamer| {
                let stop = CancellationToken::new();
                let task = match streamer {
                    #[cfg(feature = "mysql")]
                    Streamer::Mysql(streamer) => tokio::spawn(streamer.run(stop.clone())),
                    #[cfg(feature = "postgres")]
                    Streamer::Postgres(streamer) => tokio::spawn(streamer.run(stop.clone())),
                };
                (stop, task)
            };
            let streamers: Vec<Streamer> = streamers;
            self.reading = streamers.into_iter().map(begin).collect();
        }

        /// Reads the log no more, once it is told how far it is settled.
        pub async fn close(&mut self) {
            let deadline = Instant::now() + CLOSED_WITHIN;
            self.reading.iter().for_each(|(stop, _)| stop.cancel());
            for (_, mut task) in self.reading.drain(..) {
                if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                    warn!(
                        "the log could not be told in time how far it is settled; some of it is read again"
                    );
                    task.abort();
                    task.await.ok();
                }
            }
        }
    }

    /// What is much of the window is read from the table, which has it wait for room.
    fn row_limit(config: &Config) -> usize {
        (config.limits.in_flight_bytes / 4).max(64 << 10)
    }

    #[cfg(feature = "mysql")]
    fn server(source: &Source, database: &Mysql) -> mysql::server::Server {
        mysql::server::Server {
            database: database.clone(),
            settings: source.stream.clone().unwrap_or_default(),
        }
    }

    #[cfg(feature = "postgres")]
    fn slot(source: &Source, database: &Postgres) -> Slot {
        // The server shows 63 bytes of it (NAMEDATALEN), and by that we know our own.
        let mut application = format!("whippet:{}", source.relay_schema);
        application.truncate(63);
        Slot { database: database.clone(), settings: source.stream.clone().unwrap_or_default(), application }
    }
}

/// Of a build without a database that has a log.
#[cfg(not(any(feature = "postgres", feature = "mysql")))]
#[derive(Default)]
pub(super) struct Log {}

#[cfg(not(any(feature = "postgres", feature = "mysql")))]
impl Log {
    pub fn follow(
        &mut self,
        _: Dialect,
        _: &Table,
        _: &TableSpec,
        _: watch::Receiver<f64>,
        _: watch::Sender<Unsettled>,
    ) -> Option<LogEnd> {
        None
    }

    pub fn leave(&mut self, _: &str) -> bool {
        false
    }

    pub fn has_followers(&self) -> bool {
        false
    }

    pub fn followers(&self) -> usize {
        0
    }

    pub fn open(&mut self, _: &Config, _: &Database, _: &watch::Receiver<Lease>, _: &Arc<Metrics>) {}

    pub fn close(&mut self) -> impl Future<Output = ()> {
        std::future::ready(())
    }
}
