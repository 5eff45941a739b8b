//! One source with its tables, and the relay that publishes them: its own producers, its own lease. What
//! goes wrong with one part is not felt by another.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::roster::{Common, Made, Reload, Roster, names};
use crate::{
    admin::{desk::Desk, metrics::Metrics, status::Board},
    config::{self, Config, Delivery},
    coordinate::{Keeper, Lease, drain::Drain},
    record::Watch,
    relay::{Core, Left, Relay, packer::Packer, unit::DeliveryUnit, window::Window},
    sink,
    source::database::{Database, TableSpec},
    telemetry::Spans,
};

/// Large payloads that all tables together fetch at once, each on a connection: one is left, above all for the lease.
fn most_fetches(source: &config::Source) -> usize {
    (source.max_connections as usize).saturating_sub(1).max(1)
}

/// Batches on their way from the sources to the relay; the window bounds what is in them.
const BATCHES_ON_THE_WAY: usize = 8;
/// Tables that are to come or to go, on their way to the relay.
const CHANGES_ON_THE_WAY: usize = 8;

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
    pub desk: Arc<Desk>,
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
    pub board: Arc<Board>,
    config: Arc<Config>,
    tables: Vec<config::Table>,
    made: Vec<Made>,
    roster: Roster,
    relay: Relay<sink::Kafka>,
    tenure: Tenure,
    drain: Arc<Drain>,
}

enum Tenure {
    Kept(Box<Keeper>),
    /// Nobody tells the lease anything more; it is not to look as if its keeper were gone.
    ForLife(#[expect(dead_code, reason = "held, not used")] [watch::Sender<Lease>; 2]),
}

impl Part {
    pub fn build(
        config: &Arc<Config>,
        tables: &[config::Table],
        database: &Database,
        owner: &Owner,
        shared: &Shared,
    ) -> anyhow::Result<Part> {
        let Shared { replica, window, metrics, packer, has_store, watch, spans, refused, desk } = shared;
        let board = Arc::new(Board::new(replica.clone(), tables.iter().map(|table| table.name.clone())));
        let exactly_once = config.kafka.delivery == Delivery::ExactlyOnce;
        let kafka = sink::Kafka::new(sink::Settings {
            in_flight_events: config.limits.in_flight_events,
            position_topic: exactly_once.then(|| config.kafka.position_topic.clone()),
            ..sink::Settings::of(&config.kafka)
        })
        .context("kafka")?;
        let (lease, leased) = watch::channel(Lease::Standby);
        // Of the tables that are not shared: whose relay has them as a whole.
        let (whole, whole_leased) = watch::channel(Lease::Standby);
        let (events, intake) = mpsc::channel(BATCHES_ON_THE_WAY);
        let (change, changes) = mpsc::channel(CHANGES_ON_THE_WAY);
        let (relayed, relayed_now) = watch::channel(names(tables));
        let drain = Arc::new(Drain::default());
        let common = Common {
            database: database.clone(),
            board: board.clone(),
            metrics: metrics.clone(),
            window: window.clone(),
            fetches: Arc::new(Semaphore::new(config.source.as_ref().map_or(1, most_fetches))),
            has_store: *has_store,
            watch: watch.clone(),
            exactly_once,
            lease: leased.clone(),
            whole: whole_leased,
            drain: drain.clone(),
            events,
            is_spool: matches!(owner, Owner::Process { .. }),
        };
        let mut roster = Roster::new(common, desk.clone(), change, relayed);
        let made = roster.make_all(config, tables)?;
        let rules = made.iter().map(|made| made.rules.clone()).collect();
        let core = Core::new(rules, window.clone(), metrics.clone()).with_spans(spans.clone());
        let unit = DeliveryUnit {
            database: database.clone(),
            position_topic: config.kafka.position_topic.clone(),
            tables: relayed_now.clone(),
            drain: drain.clone(),
            lease: leased.clone(),
        };
        let relay = Relay {
            core: if exactly_once { core.exactly_once() } else { core },
            sink: Arc::new(kafka),
            packer: packer.clone(),
            intake,
            sources: made.iter().map(|made| Some(made.tell.clone())).collect(),
            changes,
            lease: leased,
            claim: None,
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
                units: exactly_once.then_some(config.kafka.eos_units),
                tables: relayed_now,
                lease,
                whole,
                drain: drain.clone(),
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
        Ok(Part {
            board,
            config: config.clone(),
            tables: tables.to_vec(),
            made,
            roster,
            relay,
            tenure,
            drain,
        })
    }

    /// The first of its tables.
    #[cfg_attr(not(feature = "sqlite"), expect(dead_code, reason = "of ingest, which needs SQLite"))]
    pub fn first(&self) -> &TableSpec {
        &self.made[0].watched.spec
    }

    /// Runs until `stop`, and then for `grace` at most. Returns what was left unfinished.
    pub async fn run(
        self,
        reloads: mpsc::Receiver<Reload>,
        stop: CancellationToken,
        grace: Duration,
    ) -> Left {
        // Sources and lease outlive the relay: they record what it finishes while it drains.
        let mut roster = self.roster;
        self.made.into_iter().for_each(|made| roster.start(made));
        roster.show(&self.tables);
        roster.open_log(&self.config);
        let release = CancellationToken::new();
        let keeper = self.tenure.keep(release.clone());

        let stopped_at = async {
            stop.cancelled().await;
            Instant::now()
        };
        let (left, stopped_at, ()) = tokio::join!(
            self.relay.run(stop.clone(), grace),
            stopped_at,
            roster.serve(reloads, stop.clone())
        );
        let remaining = grace.saturating_sub(stopped_at.elapsed()).max(Duration::from_millis(500));
        if tokio::time::timeout(remaining, roster.sources_end()).await.is_err() {
            warn!("the sources did not finish within shutdown.grace; what they had not recorded is repeated");
        }
        roster.end().await;
        self.drain.stopped(left.clean);
        release.cancel();
        if tokio::time::timeout(Duration::from_secs(2), keeper).await.is_err() {
            warn!("could not release the lease in time; it runs out by itself");
        }
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
