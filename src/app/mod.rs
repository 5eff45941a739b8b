//! From a configuration to a running relay: everything is built first, then spawned, and stopped in
//! the order in which events flow.

mod log;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::log::Log;
use crate::{
    admin::{
        metrics::Metrics,
        server,
        server::Admin,
        status::Board,
        verbs::{self, Desk},
    },
    config::{self, AfterPublish, Config, Jitter},
    coordinate::{Keeper, Lease, report},
    event::TableIx,
    record::{LargeSpec, Oversize, Rules, Spec},
    relay::{
        Core, Left, Relay, Table,
        packer::Packer,
        retry::{GiveUp, Policy},
        window::{Room, Window},
    },
    sink,
    source::{
        Command, Feed, Source as _,
        database::{Database, Rows, TableSpec, answered},
        log::Unsettled,
        table::TableSource,
    },
};

/// Batches on their way from the sources to the relay; the window bounds what is in them.
const BATCHES_ON_THE_WAY: usize = 8;
/// How often the backlog of each table is measured.
const BACKLOG_EVERY: Duration = Duration::from_secs(5);

/// Everything that a relay is made of, and nothing running yet.
pub struct App {
    database: Database,
    pollers: Vec<(TableSource, Feed)>,
    relay: Relay<sink::Kafka>,
    keeper: Keeper,
    admin: Option<(Admin, TcpListener)>,
    /// The tables, and where it is told how long the oldest row of each has waited.
    watched: Vec<Watched>,
    log: Log,
    metrics: Arc<Metrics>,
    board: Arc<Board>,
    grace: Duration,
}

impl App {
    pub async fn build(config: &Config) -> anyhow::Result<App> {
        let replica = replica_name();
        let names: Vec<&str> = config.tables.iter().map(|table| table.name.as_str()).collect();
        let metrics = Arc::new(Metrics::new(&names));
        let board = Arc::new(Board::new(replica.clone(), names.iter().map(|name| (*name).to_owned())));
        let window = Window::new(Room {
            events: config.limits.in_flight_events,
            bytes: config.limits.in_flight_bytes,
        });
        let database = Database::new(&config.source)?;
        let kafka = sink::Kafka::new(sink::Settings {
            bootstrap_servers: config.kafka.bootstrap_servers.clone(),
            linger: config.kafka.linger,
            compression: config.kafka.compression.as_str().to_owned(),
            in_flight_events: config.limits.in_flight_events,
            create_topics: config.kafka.create_topics.clone(),
            properties: config.kafka.properties.clone(),
        })
        .context("kafka")?;
        let store = config.object_store.as_ref().map(config::ObjectStore::open).transpose()?;
        let (lease, leased) = watch::channel(Lease::Standby);
        let (events, intake) = mpsc::channel(BATCHES_ON_THE_WAY);

        let mut log = Log::default();
        let (mut tables, mut pollers, mut sources, mut watched) = (vec![], vec![], vec![], vec![]);
        for (index, table) in config.tables.iter().enumerate() {
            let retry = policy(&table.retry);
            let rules = Rules::compile(&record_spec(table, store.is_some()))
                .with_context(|| format!("tables[{index}] ({})", table.name))?;
            let spec = table_spec(table, &rules);
            let (waits, waited) = watch::channel(0.0);
            let (unsettled, only_in_log) = watch::channel(Unsettled::default());
            let ix = TableIx(u16::try_from(index).context("too many tables")?);
            let end = log.follow(config.source.dialect(), table, &spec, waited, unsettled);
            let (tell, commands) = mpsc::unbounded_channel::<Command>();
            sources.push(tell);
            let feed = Feed { table: ix, events: events.clone(), commands };
            let source = TableSource {
                log: end,
                database: database.clone(),
                spec: spec.clone(),
                poll: table.poll.clone(),
                retry,
                window: window.clone(),
                lease: leased.clone(),
                board: board.clone(),
                metrics: metrics.clone(),
            };
            pollers.push((source, feed));
            let spec_of_table = spec.clone();
            watched.push(Watched { spec, waits, only_in_log });
            tables.push(Arc::new(Table {
                name: table.name.clone(),
                rules,
                order: table.order,
                keeps_rows: spec_of_table.stays(),
                retry,
                give_up: GiveUp { after: table.retry.give_up_after, then: table.on_failure },
                max_held: table.hold.max_events,
            }));
        }
        log.open(config, &database, &leased, &metrics);
        let relay = Relay {
            core: Core::new(tables, window.clone(), metrics.clone()),
            sink: Arc::new(kafka),
            packer: Packer::new(store),
            intake,
            sources,
            lease: leased,
            board: board.clone(),
            started: Instant::now(),
        };
        let keeper = Keeper {
            database: database.clone(),
            owner: replica,
            length: config.replicas.lease,
            lease,
            board: board.clone(),
        };
        let admin = match config.admin.listen {
            Some(listen) => {
                let listener = server::bind(listen).await?;
                let tables = watched.iter().zip(&relay.sources);
                let tables = tables.map(|(table, source): (&Watched, &mpsc::UnboundedSender<Command>)| {
                    verbs::Table { spec: table.spec.clone(), source: source.downgrade() }
                });
                let desk = Arc::new(Desk {
                    database: database.clone(),
                    tables: tables.collect(),
                    token_file: config.admin.token_file.clone(),
                });
                let admin = Admin { board: board.clone(), metrics: metrics.clone(), window, desk };
                Some((admin, listener))
            }
            None => None,
        };
        let grace = config.shutdown.grace;
        Ok(App { database, pollers, relay, keeper, admin, watched, log, metrics, board, grace })
    }

    /// The state as `/status` shows it.
    pub fn board(&self) -> Arc<Board> {
        self.board.clone()
    }

    /// Where the admin address is, once its port is chosen.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin.as_ref().and_then(|(_, listener)| listener.local_addr().ok())
    }

    /// Runs until `stop`. Returns what was left unfinished.
    pub async fn run(self, stop: CancellationToken) -> Left {
        let deadline = self.grace;
        // Sources and lease outlive the relay: they record what it finishes while it drains.
        let after_relay = CancellationToken::new();
        let mut sources = JoinSet::new();
        for (poller, feed) in self.pollers {
            sources.spawn(poller.run(feed));
        }
        let after_sources = CancellationToken::new();
        let log = self.log.spawn(after_sources.clone());
        let mut helpers = JoinSet::new();
        for (index, table) in self.watched.into_iter().enumerate() {
            helpers.spawn(watch_backlog(
                self.database.clone(),
                table,
                TableIx(index as u16),
                self.relay.lease.clone(),
                self.board.clone(),
                self.metrics.clone(),
                after_relay.clone(),
            ));
        }
        if let Some((admin, listener)) = self.admin {
            if let Ok(address) = listener.local_addr() {
                info!(%address, "admin address is open");
            }
            helpers.spawn(admin.serve(listener, after_relay.clone()));
        }
        let release = CancellationToken::new();
        let keeper = tokio::spawn(self.keeper.run(release.clone()));

        let stopped_at = async {
            stop.cancelled().await;
            Instant::now()
        };
        let (left, stopped_at) = tokio::join!(self.relay.run(stop.clone(), deadline), stopped_at);
        let remaining = deadline.saturating_sub(stopped_at.elapsed()).max(Duration::from_millis(500));
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
        if tokio::time::timeout(Duration::from_secs(1), async {
            while helpers.join_next().await.is_some() {}
        })
        .await
        .is_err()
        {
            helpers.shutdown().await;
        }
        left
    }
}

/// A table whose backlog is measured.
struct Watched {
    spec: TableSpec,
    /// Told how long the oldest row has waited, in seconds.
    waits: watch::Sender<f64>,
    /// What waits, where there is no table to be asked.
    only_in_log: watch::Receiver<Unsettled>,
}

/// Measures what waits in a table, apart from the poller: it has to show when the poller is stuck.
async fn watch_backlog(
    database: Database,
    Watched { spec, waits, only_in_log }: Watched,
    table: TableIx,
    lease: watch::Receiver<Lease>,
    board: Arc<Board>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    let mut outbox = None;
    let mut tick = tokio::time::interval(BACKLOG_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return,
        }
        let owner = lease.borrow().epoch().is_some();
        metrics.leases(&spec.name, owner);
        if !owner {
            continue;
        }
        let measured = async {
            if outbox.is_none() {
                outbox = Some(database.outbox(&spec).await?);
            }
            match &outbox {
                Some(outbox) => Ok(Some((outbox.backlog().await?, outbox.oldest_parked().await?))),
                None => Ok(None),
            }
        };
        match answered("measure the backlog", measured).await {
            Ok(Some((mut backlog, parked))) => {
                backlog.add(*only_in_log.borrow());
                metrics.oldest_parked_age.with_label_values(&[&spec.name]).set(parked.unwrap_or(0.0));
                let oldest = backlog.oldest_seconds.unwrap_or(0.0);
                metrics
                    .pending_events
                    .with_label_values(&[&spec.name])
                    .set(i64::try_from(backlog.rows).unwrap_or(i64::MAX));
                metrics.oldest_pending_age.with_label_values(&[&spec.name]).set(oldest);
                waits.send_replace(oldest);
                board.backlog(table, backlog);
            }
            Ok(None) => {}
            // The poller says what is wrong; this one only measures.
            Err(error) => {
                outbox = None;
                tracing::debug!(table = spec.name, error = report(&error), "cannot measure the backlog");
            }
        }
    }
}

fn policy(retry: &config::Retry) -> Policy {
    Policy { initial: retry.initial, max: retry.max, jitter: retry.jitter == Jitter::Full }
}

fn record_spec(table: &config::Table, has_store: bool) -> Spec {
    let columns = &table.columns;
    Spec {
        id: columns.id.clone(),
        topic: columns.topic.clone(),
        key: columns.key.clone(),
        kind: columns.kind.clone(),
        payload: columns.payload.clone(),
        headers: columns.headers.clone(),
        partition: columns.partition.clone(),
        version: columns.version.clone(),
        tracing_span_context: columns.tracing_span_context.clone(),
        topic_template: table.topic.clone(),
        key_template: table.key.clone(),
        headers_from: table.headers.from.clone(),
        headers_static: table.headers.fixed.clone(),
        allow: table.headers.allow.clone(),
        deny: table.headers.deny.clone(),
        headers_max_bytes: table.headers.max_bytes,
        event_type_header: table.event_type_header(),
        dead_letter_topic: table.dead_letter.topic.clone(),
        large: large_spec(&table.payload, has_store),
    }
}

fn large_spec(payload: &config::Payload, has_store: bool) -> LargeSpec {
    let (references, chunks) = (&payload.reference.dialects, &payload.chunk.dialects);
    LargeSpec {
        content_type: payload.content_type.clone(),
        encode: payload.encode.codec.codec().map(|codec| (codec, payload.encode.above)),
        inline_max: payload.inline_max,
        oversize: match payload.oversize {
            Some(config::Oversize::ClaimCheck) => Oversize::ClaimCheck,
            Some(config::Oversize::Chunk) => Oversize::Chunk,
            Some(config::Oversize::Park) => Oversize::Park,
            Some(config::Oversize::DeadLetter) => Oversize::DeadLetter,
            None if has_store => Oversize::ClaimCheck,
            None => Oversize::Fail,
        },
        reference_key: payload.reference.key.clone(),
        whippet: references.contains(&config::ReferenceDialect::Whippet),
        bakdata: references.contains(&config::ReferenceDialect::Bakdata),
        chunk_bytes: payload.chunk.size,
        silverback: chunks.contains(&config::ChunkDialect::Silverback),
        linkedin: chunks.contains(&config::ChunkDialect::Linkedin),
    }
}

/// What the sources of a configuration need of their tables.
pub fn table_specs(config: &Config) -> anyhow::Result<Vec<TableSpec>> {
    let spec = |table| -> anyhow::Result<TableSpec> {
        Ok(table_spec(table, &Rules::compile(&record_spec(table, config.object_store.is_some()))?))
    };
    config.tables.iter().map(spec).collect()
}

fn table_spec(table: &config::Table, rules: &Rules) -> TableSpec {
    let columns = &table.columns;
    TableSpec {
        name: table.name.clone(),
        rows: match (table.message_prefix(), table.rows) {
            (Some(prefix), _) => Rows::Messages { prefix: prefix.to_owned() },
            (None, config::Rows::Transient) => Rows::Transient,
            (None, config::Rows::Stay) => Rows::Stay,
        },
        columns: rules.columns().to_vec(),
        optional: rules
            .columns()
            .iter()
            .chain(&columns.sequence)
            .chain(&columns.published_at)
            .filter(|name| !columns.required.contains(*name))
            .cloned()
            .collect(),
        id: columns.id.clone(),
        payload: columns.payload.clone(),
        sequence: columns.sequence.clone(),
        order: table.order,
        timestamps: columns.timestamp.iter().chain(&columns.created_at).cloned().collect(),
        published_at: match table.after_publish {
            AfterPublish::Mark => columns.published_at.clone(),
            AfterPublish::Delete | AfterPublish::Keep => None,
        },
        tx: columns.tx.clone().filter(|_| table.after_publish == AfterPublish::Keep),
        after_publish: table.after_publish,
        retention: table.retention.published,
        max_payload: table.payload.max_bytes,
    }
}

/// Pod and start: two starts of one pod are two owners.
fn replica_name() -> String {
    let host = std::env::var("HOSTNAME")
        .ok()
        .or_else(|| std::fs::read_to_string("/etc/hostname").ok())
        .map_or_else(|| "whippet".to_owned(), |name| name.trim().to_owned());
    format!("{host}-{}", &uuid::Uuid::new_v4().simple().to_string()[..8])
}
