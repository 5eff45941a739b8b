//! `whippet demo`: the whole story with nothing to install.
//!
//! An example application writes orders and outbox rows into a SQLite file, each in one
//! transaction. The relay, the same that `whippet run` starts, publishes them to a broker inside
//! this process: librdkafka's mock cluster, which speaks Kafka's protocol and keeps records in
//! memory. With `--ingest`, some events come by HTTP instead. Two payloads are too large for a record: one becomes a claim check, in a folder that is
//! the object store, the other one chunks. The consumer kit reads everything back, and it is compared.

mod caller;
mod reader;
mod screen;
mod shop;
mod verdict;

use std::{
    collections::BTreeMap,
    path::Path,
    str::FromStr as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rdkafka::{mocking::MockCluster, producer::DefaultProducerContext};
use sqlx::{
    AssertSqlSafe, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::{reader::Received, screen::Screen, shop::Expected};
use crate::{
    admin::status::{self, Board},
    app::App,
    config::{self, Config, ObjectStore},
    source::database::ddl,
};

/// An outbox table, and the topic that its events go to.
#[derive(Debug)]
struct Outbox {
    table: &'static str,
    topic: &'static str,
}

/// A payload that does not fit into a record becomes a claim check here.
const ORDERS: Outbox = Outbox { table: "outbox", topic: "orders" };
/// And chunks here.
const CONTRACTS: Outbox = Outbox { table: "outbox_in_chunks", topic: "contracts" };
/// What comes by HTTP.
const CLICKS: Outbox = Outbox { table: config::INGEST, topic: "clicks" };
/// One in so many events does, where any do.
const BY_HTTP: usize = 4;
const PARTITIONS: i32 = 4;
/// Without a new event for this long, something is wrong.
const STALLED_AFTER: Duration = Duration::from_secs(30);
const REDRAW_EVERY: Duration = Duration::from_millis(100);

/// What the parts of the demo tell each other.
#[derive(Debug, Default)]
struct Progress {
    /// Committed events, in the order of their commits.
    expected: Vec<Expected>,
    rolled_back: usize,
    /// Who still writes.
    writing: usize,
    received: Vec<Received>,
    /// Why nothing more is read.
    unread: Option<String>,
}

type Shared = Arc<Mutex<Progress>>;

fn lock(shared: &Shared) -> MutexGuard<'_, Progress> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the demo; with `ingest`, some of the events come by HTTP. `Ok(true)` where every committed event came back,
/// in order, byte for byte.
pub async fn run(events: usize, ingest: bool, keep: bool, stop: CancellationToken) -> anyhow::Result<bool> {
    let folder = tempfile::Builder::new().prefix("whippet-demo-").tempdir().context("a temporary folder")?;
    let broker: MockCluster<'static, DefaultProducerContext> =
        MockCluster::new(1).context("the broker inside this process")?;
    for outbox in [ORDERS, CONTRACTS, CLICKS] {
        broker.create_topic(outbox.topic, PARTITIONS, 1).context("the topics")?;
    }
    std::fs::create_dir(folder.path().join("payloads")).context("the folder for payloads")?;
    let config = configuration(folder.path(), &broker.bootstrap_servers(), ingest)?;
    // Readers and the writer do not wait for each other in WAL mode.
    let source = config.source.as_ref().context("the demo has a source")?;
    let options = SqliteConnectOptions::from_str(source.url.expose())?
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(10));
    let database = SqlitePool::connect_with(options).await.context("the SQLite file")?;
    sqlx::raw_sql(AssertSqlSafe(ddl::script(&config))).execute(&database).await.context("the outbox")?;

    let app = App::build(&config).await?;
    let (admin, ingest) = (app.admin_address(), app.ingest_address());
    let relay_stop = CancellationToken::new();
    let boards = app.boards();
    let relay = tokio::spawn(app.run(relay_stop.clone()));
    let shared = Shared::default();
    let reading = CancellationToken::new();
    let store = config.object_store.as_ref().map(ObjectStore::open).transpose()?;
    let consumer = reader::open(&broker.bootstrap_servers(), store).await?;
    let reader = tokio::spawn(reader::run(consumer, shared.clone(), reading.clone()));
    let by_http = ingest.map_or(0, |_| events / BY_HTTP);
    lock(&shared).writing = if ingest.is_some() { 2 } else { 1 };
    let mut writers = JoinSet::new();
    writers.spawn(shop::run(database.clone(), events - by_http, shared.clone()));
    if let Some(ingest) = ingest {
        writers.spawn(caller::run(ingest, by_http, shared.clone()));
    }

    let mut screen = Screen::new(events);
    screen.begin(&config, folder.path(), &broker.bootstrap_servers(), admin, ingest);
    let finished = tokio::select! {
        finished = watch(&shared, &mut screen, &boards, writers) => finished,
        () = stop.cancelled() => Err(anyhow::anyhow!("interrupted before everything came back")),
    };
    let good = match finished {
        Ok(()) => {
            let progress = lock(&shared);
            let verdict = verdict::compare(&progress.expected, &progress.received);
            screen.end(&progress, &verdict);
            verdict.is_ok()
        }
        Err(error) => {
            relay_stop.cancel();
            return Err(error);
        }
    };
    if keep && let Some(admin) = admin {
        screen.keep(admin);
        stop.cancelled().await;
    }
    relay_stop.cancel();
    relay.await.context("the relay")?;
    reading.cancel();
    reader.await.context("the consumer")?;
    database.close().await;
    Ok(good)
}

/// Redraws until everything that was written came back.
async fn watch(
    shared: &Shared,
    screen: &mut Screen,
    boards: &[Arc<Board>],
    mut writers: JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let mut tick = tokio::time::interval(REDRAW_EVERY);
    let (mut seen, mut moved) = (0, Instant::now());
    loop {
        tick.tick().await;
        while let Some(ended) = writers.try_join_next() {
            ended.context("the application")??;
        }
        let progress = lock(shared);
        screen.draw(&progress, &status::of_all(boards));
        if let Some(why) = &progress.unread {
            anyhow::bail!("the consumer cannot read on: {why}");
        }
        let distinct = progress.received.len();
        if distinct != seen {
            (seen, moved) = (distinct, Instant::now());
        }
        if progress.writing == 0 && distinct >= progress.expected.len() {
            return Ok(());
        }
        anyhow::ensure!(
            moved.elapsed() < STALLED_AFTER,
            "{} of {} events came back, and no more for {} s",
            distinct,
            progress.expected.len(),
            STALLED_AFTER.as_secs()
        );
    }
}

/// As a user would write it, but for the free port and the quick polling.
fn configuration(folder: &Path, broker: &str, ingest: bool) -> anyhow::Result<Config> {
    let mut yaml = format!(
        "source: {{ url: 'sqlite://{folder}/shop.db?mode=rwc' }}\n\
         kafka: {{ bootstrap_servers: '{broker}' }}\n\
         object_store: {{ url: 'file://{folder}/payloads' }}\n\
         admin: {{ listen: '127.0.0.1:0' }}\n\
         defaults: {{ poll: {{ max_interval: 20ms }} }}\n\
         tables:\n  \
           - {{ name: {claim_checks} }}\n  \
           - {{ name: {chunks}, payload: {{ oversize: chunk }} }}\n",
        folder = folder.display(),
        claim_checks = ORDERS.table,
        chunks = CONTRACTS.table,
    );
    if ingest {
        yaml += &format!(
            "ingest: {{ listen: '127.0.0.1:0', topics: [{topic}], spool: '{folder}/spool' }}\n",
            topic = CLICKS.topic,
            folder = folder.display()
        );
    }
    Ok(config::parse("the demo's configuration", &yaml, &BTreeMap::new())?)
}
