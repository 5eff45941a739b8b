//! One source with its tables, and the relay that publishes them: its own producers, its own lease. What
//! goes wrong with one part is not felt by another.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    backlog::{Watched, watch_backlog},
    log::Log,
    tables::{policy, record_spec, shared as shared_by, table_spec},
};
use crate::{
    admin::{metrics::Metrics, status::Board, verbs},
    config::{self, Config, Delivery, Dialect, Poll},
    coordinate::{Keeper, Lease, drain::Drain},
    event::TableIx,
    record::{Rules, Watch},
    relay::{Core, Left, Relay, Table, packer::Packer, retry::GiveUp, unit::DeliveryUnit, window::Window},
    sink,
    source::{Command, Feed, Source as _, database::Database, log::Unsettled, table::TableSource},
    telemetry::Spans,
};

/// Batches on their way from the sources to the relay; the window bounds what is in them.
const BATCHES_ON_THE_WAY: usize = 8;

/// What the parts share.
#[derive(Clone)]
pub(super) struct Shared {
    /// Names this process.
    pub replica: String,
    pub window: Arc<Window>,
    pub metrics: Arc<Metrics>,
    pub packer: Packer,
    pub has_store: bool,
    pub watch: Watch,
    pub spans: Option<Spans>,
    /// Cancelled by what cannot go on without a guess.
    pub refused: CancellationToken,
}

/// Whose the source is.
pub(super) enum Owner {
    /// Whoever has the lease in it, which is kept alive.
    Lease,
    /// This process, as long as it lives, under this number: a lock says so.
    #[cfg_attr(not(feature = "sqlite"), expect(dead_code, reason = "of ingest, which needs SQLite"))]
    Process { epoch: i64 },
}

/// Everything that a part is made of, and nothing running yet.
pub(super) struct Part {
    pub database: Database,
    pub board: Arc<Board>,
    /// The tables, and where it is told how long the oldest row of each has waited.
    pub watched: Vec<Watched>,
    pollers: Vec<(TableSource, Feed)>,
    relay: Relay<sink::Kafka>,
    tenure: Tenure,
    log: Log,
    metrics: Arc<Metrics>,
}

enum Tenure {
    Kept(Box<Keeper>),
    /// Nobody tells the lease anything more; it is not to look as if its keeper were gone.
    ForLife(#[expect(dead_code, reason = "held, not used")] [watch::Sender<Lease>; 2]),
}

impl Part {
    /// `wake`: whether the database tells of commits, whatever the tables' configuration says.
    pub fn build(
        config: &Config,
        tables: &[config::Table],
        database: Database,
        owner: &Owner,
        shared: &Shared,
    ) -> anyhow::Result<Part> {
        let Shared { replica, window, metrics, packer, has_store, watch, spans, refused } = shared;
        let names = tables.iter().map(|table| table.name.clone());
        let board = Arc::new(Board::new(replica.clone(), names));
        let exactly_once = config.kafka.delivery == Delivery::ExactlyOnce;
        let kafka = sink::Kafka::new(sink::Settings {
            bootstrap_servers: config.kafka.bootstrap_servers.clone(),
            linger: config.kafka.linger,
            compression: config.kafka.compression.as_str().to_owned(),
            in_flight_events: config.limits.in_flight_events,
            position_topic: exactly_once.then(|| config.kafka.position_topic.clone()),
            create_topics: config.kafka.create_topics.clone(),
            properties: config.kafka.properties.clone(),
        })
        .context("kafka")?;
        let (lease, leased) = watch::channel(Lease::Standby);
        // Of the tables that are not shared: whose relay has them as a whole.
        let (whole, whole_leased) = watch::channel(Lease::Standby);
        let (events, intake) = mpsc::channel(BATCHES_ON_THE_WAY);

        let mut log = Log::default();
        let (mut relayed, mut pollers, mut sources, mut watched) = (vec![], vec![], vec![], vec![]);
        for (index, table) in tables.iter().enumerate() {
            let retry = policy(&table.retry);
            let rules = Rules::compile(&record_spec(table, *has_store, watch))
                .with_context(|| format!("table {}", table.name))?;
            let dialect = config.source.as_ref().map_or(Dialect::Sqlite, config::Source::dialect);
            let shared = match owner {
                // One producer publishes all of them.
                Owner::Lease if exactly_once => None,
                Owner::Lease => shared_by(table, dialect, config.replicas.buckets),
                Owner::Process { .. } => None,
            };
            let spec = table_spec(table, &rules, shared);
            let (waits, waited) = watch::channel(0.0);
            let (unsettled, only_in_log) = watch::channel(Unsettled::default());
            let end = log.follow(dialect, table, &spec, waited, unsettled);
            let (tell, commands) = mpsc::unbounded_channel::<Command>();
            sources.push(tell);
            let feed = Feed {
                table: TableIx(u16::try_from(index).context("too many tables")?),
                events: events.clone(),
                commands,
            };
            let relay_table = Arc::new(Table {
                name: table.name.clone(),
                rules,
                order: table.order,
                keeps_rows: spec.stays(),
                retry,
                give_up: GiveUp { after: table.retry.give_up_after, then: table.on_failure },
                max_held: table.hold.max_events,
            });
            let source = TableSource {
                log: end,
                database: database.clone(),
                spec: spec.clone(),
                poll: poll(table, owner),
                retry,
                window: window.clone(),
                lease: if spec.shared.is_some() { leased.clone() } else { whole_leased.clone() },
                drain: None,
                exactly_once,
                board: board.clone(),
                metrics: metrics.clone(),
                table: relay_table.clone(),
            };
            pollers.push((source, feed));
            let lease = if spec.shared.is_some() { leased.clone() } else { whole_leased.clone() };
            watched.push(Watched { spec, lease, waits, only_in_log });
            relayed.push(relay_table);
        }
        log.open(config, &database, &whole_leased, metrics);
        let shared: Vec<bool> = watched.iter().map(|table| table.spec.shared.is_some()).collect();
        let drain = Arc::new(Drain::new(shared.iter().copied()));
        for ((source, _), is_shared) in pollers.iter_mut().zip(&shared) {
            source.drain = is_shared.then(|| drain.clone());
        }
        board.shared(shared);
        let core = Core::new(relayed, window.clone(), metrics.clone()).with_spans(spans.clone());
        let unit =
            DeliveryUnit { database: database.clone(), position_topic: config.kafka.position_topic.clone() };
        let relay = Relay {
            core: if exactly_once { core.exactly_once() } else { core },
            sink: Arc::new(kafka),
            packer: packer.clone(),
            intake,
            sources,
            lease: if exactly_once { whole_leased } else { leased },
            epoch: None,
            refused: refused.clone(),
            unit: exactly_once.then(|| Arc::new(unit)),
            board: board.clone(),
            started: Instant::now(),
        };
        let tenure = match *owner {
            Owner::Lease => Tenure::Kept(Box::new(Keeper {
                database: database.clone(),
                owner: replica.clone(),
                length: config.replicas.lease,
                buckets: config.replicas.buckets,
                tables: tables.iter().map(|table| table.name.clone()).collect(),
                lease,
                whole,
                drain,
                board: board.clone(),
                metrics: metrics.clone(),
            })),
            Owner::Process { epoch } => {
                lease.send_replace(Lease::for_life(epoch));
                whole.send_replace(Lease::for_life(epoch));
                board.source_reached();
                board.lease(&lease.borrow());
                Tenure::ForLife([lease, whole])
            }
        };
        let metrics = metrics.clone();
        Ok(Part { database, board, watched, pollers, relay, tenure, log, metrics })
    }

    /// The tables as the operator's verbs see them.
    pub fn for_verbs(&self) -> impl Iterator<Item = verbs::Table> {
        self.watched.iter().zip(&self.relay.sources).map(|(table, source)| verbs::Table {
            spec: table.spec.clone(),
            database: self.database.clone(),
            source: source.downgrade(),
        })
    }

    /// Runs until `stop`, and then for `grace` at most. Returns what was left unfinished.
    pub async fn run(self, stop: CancellationToken, grace: Duration) -> Left {
        // Sources and lease outlive the relay: they record what it finishes while it drains.
        let mut sources = JoinSet::new();
        for (poller, feed) in self.pollers {
            sources.spawn(poller.run(feed));
        }
        let after_sources = CancellationToken::new();
        let log = self.log.spawn(after_sources.clone());
        let after_relay = CancellationToken::new();
        let mut helpers = JoinSet::new();
        for (index, table) in self.watched.into_iter().enumerate() {
            helpers.spawn(watch_backlog(
                self.database.clone(),
                table,
                TableIx(index as u16),
                self.board.clone(),
                self.metrics.clone(),
                after_relay.clone(),
            ));
        }
        let release = CancellationToken::new();
        let keeper = self.tenure.keep(release.clone());

        let stopped_at = async {
            stop.cancelled().await;
            Instant::now()
        };
        let (left, stopped_at) = tokio::join!(self.relay.run(stop.clone(), grace), stopped_at);
        let remaining = grace.saturating_sub(stopped_at.elapsed()).max(Duration::from_millis(500));
        let recorded =
            tokio::time::timeout(remaining, async { while sources.join_next().await.is_some() {} });
        if recorded.await.is_err() {
            warn!("the sources did not finish within shutdown.grace; what they had not recorded is repeated");
            sources.shutdown().await;
        }
        // The log is the last to hear what is settled.
        after_sources.cancel();
        if tokio::time::timeout(Duration::from_secs(2), log).await.is_err() {
            warn!("the log could not be told in time how far it is settled; some of it is read again");
        }
        release.cancel();
        if tokio::time::timeout(Duration::from_secs(2), keeper).await.is_err() {
            warn!("could not release the lease in time; it runs out by itself");
        }
        after_relay.cancel();
        helpers.shutdown().await;
        left
    }
}

impl Tenure {
    /// Keeps the lease until `release`.
    fn keep(self, release: CancellationToken) -> impl Future<Output = ()> {
        let task = tokio::spawn(async move {
            match self {
                Tenure::Kept(keeper) => keeper.run(release).await,
                Tenure::ForLife(_) => release.cancelled().await,
            }
        });
        async move {
            task.await.ok();
        }
    }
}

/// The spool tells of every commit, and its relay is in the same process: it is read when there is something.
fn poll(table: &config::Table, owner: &Owner) -> Poll {
    match owner {
        Owner::Lease => table.poll.clone(),
        Owner::Process { .. } => Poll { wake: config::Wake::Notify, ..table.poll.clone() },
    }
}
