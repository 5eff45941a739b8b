//! The configuration file: what its keys mean, their defaults, and what is wrong with one.
//!
//! A file becomes a [`Config`] in steps, each a module: `yaml` reads texts with their places,
//! `interpolate` replaces `${…}`, `layers` lays the environment over it, `ingest` adds the table of its
//! spool, `tables` fills in `defaults` and presets, `later` refuses what is still to come, `shape` gives the texts their
//! types by the schema, and `check` looks at the whole. Every step goes on after a problem, so that
//! all of them are told at once.

mod change;
mod check;
mod error;
mod exactly_once;
mod ingest;
mod interpolate;
mod later;
mod layers;
mod payload;
mod secret;
mod shape;
mod table;
mod tables;
mod units;
mod yaml;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

pub use self::{
    change::Difference,
    error::{Error, Place, Problem},
    ingest::{COLUMNS as INGEST_COLUMNS, INGEST, Ingest},
    payload::{Chunk, ChunkDialect, Encode, Encoding, Oversize, Payload, Reference, ReferenceDialect},
    secret::Secret,
    table::{
        AfterPublish, Capture, Columns, DeadLetter, Envelope, Headers, Hold, Jitter, OnFailure, Order, Poll,
        Preset, Retention, Retry, Rows, Table, Wake,
    },
};
use self::{change::Given, error::Problems};
use crate::store::{Store, StoreError};

/// The whole configuration.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Whippet configuration")]
pub struct Config {
    /// Absent where `ingest` alone is there.
    #[serde(default)]
    pub source: Option<Source>,
    pub kafka: Kafka,
    /// Where payloads go that Kafka does not take.
    #[serde(default)]
    pub object_store: Option<ObjectStore>,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub replicas: Replicas,
    #[serde(default)]
    pub admin: Admin,
    #[serde(default)]
    pub log: Log,
    /// Traces; none where it is absent.
    #[serde(default)]
    pub telemetry: Telemetry,
    #[serde(default)]
    pub shutdown: Shutdown,
    #[serde(default)]
    pub ingest: Option<Ingest>,
    /// The outbox tables; order matters only for messages.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub tables: Vec<Table>,
    /// The table of the spool, where there is one.
    #[serde(skip)]
    pub spool: Option<Table>,
    /// What works, but perhaps not as intended.
    #[serde(skip)]
    pub warnings: Vec<String>,
    #[serde(skip)]
    given: Given,
}

/// The database that has the outbox.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// postgres://user@host:5432/database, mysql://user@host:3306/database (MySQL and MariaDB) or
    /// sqlite://path/to/file.db
    pub url: Secret,
    /// Holds the password; read again whenever connecting failed, so that it can be rotated.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// A program and its arguments, which prints the password; run whenever a connection of the relay's own is made.
    #[serde(default)]
    pub password_command: Vec<String>,
    #[serde(default)]
    pub tls: Tls,
    /// How the database's log is read, for tables that follow it.
    #[serde(default)]
    pub stream: Option<Stream>,
    /// Connections of one relay to the database, at most; the log is read by one more.
    #[serde(default = "Source::max_connections")]
    #[schemars(range(min = 2, max = 100))]
    pub max_connections: u32,
    /// Where the relay keeps its own tables. MySQL and SQLite: the prefix of their names.
    #[serde(default = "Source::relay_schema")]
    pub relay_schema: String,
}

/// Reading the log of the database.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Stream {
    /// The replication slot (PostgreSQL).
    pub slot: String,
    /// PostgreSQL.
    pub publication: String,
    /// Make slot and publication where they are missing.
    pub create: bool,
    /// What the relay is to the server's binlog, which has one reader of a number (MySQL).
    #[schemars(range(min = 1))]
    pub server_id: u32,
    /// How often a heartbeat goes through the log, so that a dead connection shows and an idle database does
    /// not hold its log.
    #[serde(with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub heartbeat: Duration,
    /// What the server may keep of its log for the slot, in bytes. Past it the slot is dropped and the
    /// tables are polled, if all of them have capture: auto.
    #[serde(with = "units::size")]
    #[schemars(with = "units::SizeText")]
    pub max_retained_wal: usize,
}

impl Default for Stream {
    fn default() -> Stream {
        Stream {
            slot: "whippet".into(),
            publication: "whippet".into(),
            create: true,
            server_id: 5400,
            heartbeat: Duration::from_secs(10),
            max_retained_wal: 4 << 30,
        }
    }
}

/// The SQL dialect of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Postgres,
    /// MySQL and MariaDB.
    Mysql,
    Sqlite,
}

impl Config {
    /// How the log is read, where a table follows it.
    pub fn log(&self) -> Option<Stream> {
        let follows = self.tables.iter().any(|table| table.capture != Capture::Poll);
        let source = self.source.as_ref().filter(|_| follows)?;
        Some(source.stream.clone().unwrap_or_default())
    }

    /// The tables of the source, and the spool's.
    pub fn all_tables(&self) -> impl Iterator<Item = &Table> {
        self.tables.iter().chain(&self.spool)
    }
}

impl Source {
    fn max_connections() -> u32 {
        4
    }

    fn relay_schema() -> String {
        "whippet".into()
    }

    /// By the scheme of the URL; `check` has refused all others.
    pub fn dialect(&self) -> Dialect {
        match self.url.expose().split_once(':') {
            Some(("sqlite", _)) => Dialect::Sqlite,
            Some(("mysql", _)) => Dialect::Mysql,
            _ => Dialect::Postgres,
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    pub mode: TlsMode,
    /// The certificate authority of the server, PEM.
    pub ca_file: Option<PathBuf>,
    /// The client's certificate, PEM.
    pub cert_file: Option<PathBuf>,
    /// The key of `cert_file`, PEM.
    pub key_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    Disable,
    #[default]
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Where events go.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    /// host:port, comma-separated.
    pub bootstrap_servers: String,
    /// How often an event is published, at most, as readers with isolation.level=read_committed see it.
    #[serde(default)]
    pub delivery: Delivery,
    /// exactly_once: how many transactional ids, and producers, the polled tables may be spread over.
    /// One does all the work so far, whatever this says.
    #[serde(default = "Kafka::eos_units")]
    #[schemars(range(min = 1, max = 64))]
    pub eos_units: u16,
    /// exactly_once: where it is noted, in the transactions of the events, what is published. Compacted,
    /// one partition; relays may share it.
    #[serde(default = "Kafka::position_topic")]
    pub position_topic: String,
    /// How long a batch waits for more records.
    #[serde(default = "Kafka::linger", with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub linger: Duration,
    #[serde(default)]
    pub compression: Compression,
    /// What to do about a topic that is missing.
    #[serde(default)]
    pub create_topics: CreateTopics,
    /// librdkafka's own properties, such as security.protocol; one that would break a guarantee is
    /// refused.
    #[serde(default)]
    pub properties: BTreeMap<String, Secret>,
}

impl Kafka {
    fn linger() -> Duration {
        Duration::from_millis(1)
    }

    fn eos_units() -> u16 {
        4
    }

    fn position_topic() -> String {
        "whippet.positions".into()
    }
}

/// How often an event may be seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    #[default]
    AtLeastOnce,
    ExactlyOnce,
}

/// Topics are made only where this says so.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateTopics {
    pub enabled: bool,
    #[schemars(range(min = 1, max = 100_000))]
    pub partitions: i32,
    #[schemars(range(min = 1, max = 1000))]
    pub replication_factor: i32,
}

impl Default for CreateTopics {
    fn default() -> CreateTopics {
        CreateTopics { enabled: false, partitions: 12, replication_factor: 3 }
    }
}

/// Of each Kafka batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    None,
    #[default]
    Lz4,
    Zstd,
    Snappy,
    Gzip,
}

impl Compression {
    /// As librdkafka names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Compression::None => "none",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
            Compression::Snappy => "snappy",
            Compression::Gzip => "gzip",
        }
    }
}

/// A bucket, a container or a folder.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ObjectStore {
    /// s3://bucket/prefix, gs://bucket/prefix, az://container/prefix,
    /// abfss://container@account.dfs.core.windows.net/prefix or file:///folder
    pub url: String,
    /// As `object_store` names them, such as endpoint and region. One that ends in `_file` names a file
    /// with the value. Credentials that are not here come from the environment and from the platform.
    #[serde(default)]
    pub options: BTreeMap<String, Secret>,
}

impl ObjectStore {
    /// Connects to nothing. Options from files are read again while it is open.
    pub fn open(&self) -> Result<Store, StoreError> {
        let options = self.options.clone();
        let now =
            move || options.iter().map(|(name, value)| (name.clone(), value.expose_now().into())).collect();
        Store::following(&self.url, now)
    }
}

/// What may be in flight: read and not settled, over all tables.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    #[schemars(range(min = 1, max = 10_000_000))]
    pub in_flight_events: usize,
    #[serde(with = "units::size")]
    #[schemars(with = "units::SizeText")]
    pub in_flight_bytes: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { in_flight_events: 100_000, in_flight_bytes: 12 << 20 }
    }
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Replicas {
    /// How many buckets of keys the work is cut into, for relays to share. Stored at the first start: relays
    /// that differ do not start.
    #[schemars(range(min = 1, max = 4096))]
    pub buckets: u16,
    /// How long a relay has its share without renewing; a dead one is replaced after this.
    #[serde(with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub lease: Duration,
}

impl Default for Replicas {
    fn default() -> Replicas {
        Replicas { buckets: 64, lease: Duration::from_secs(10) }
    }
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Metrics, probes and status; null for none.
    #[schemars(with = "Option<units::AddressText>")]
    pub listen: Option<SocketAddr>,
    /// Who may change something: a token a line, or `NAME TOKEN` to have the name in the audit log.
    /// Read again for every request, so that it can be rotated. Without it nothing can be changed.
    pub token_file: Option<PathBuf>,
}

impl Default for Admin {
    fn default() -> Admin {
        Admin { listen: Some(SocketAddr::from(([127, 0, 0, 1], 9464))), token_file: None }
    }
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    pub level: Level,
    pub format: LogFormat,
    /// Headers that every log line about an event carries, such as x-request-id. With any there is a line
    /// for each event that is published, too.
    pub context: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Telemetry {
    /// http://host:4317 (gRPC) or http://host:4318 (HTTP): where traces are sent to, by OTLP. An event is traced
    /// if its row has a traceparent that says so.
    pub otlp_endpoint: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    #[default]
    Json,
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Shutdown {
    /// How long SIGTERM waits for what is in flight.
    #[serde(with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub grace: Duration,
}

impl Default for Shutdown {
    fn default() -> Shutdown {
        Shutdown { grace: Duration::from_secs(20) }
    }
}

/// Reads a file, under the environment of this process.
pub fn load(path: &Path) -> Result<Config, Error> {
    let text =
        std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    // A variable that is not UTF-8 cannot be one of ours.
    let env = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    parse(&path.display().to_string(), &text, &env)
}

/// Reads the text of a file called `name` in messages.
pub fn parse(name: &str, text: &str, env: &BTreeMap<String, String>) -> Result<Config, Error> {
    let (mut tree, places) = yaml::read(name, text)?;
    let mut problems = Problems::new(places);
    let overrides = layers::overrides(env, &mut problems);
    let [properties, options] = ["kafka.properties", "object_store.options"]
        .map(|key| interpolate::recipes(&tree, key, env, &problems));
    interpolate::apply(&mut tree, env, &mut problems);
    let mut tree = layers::merge(tree, overrides, &mut problems);
    let has_spool = ingest::add_table(&mut tree, &mut problems);
    let explicit = tables::fill_in(&mut tree, &mut problems);
    later::refuse(&mut tree, &mut problems);
    let shaped = shape::shape(tree, &shape::schema(), &mut problems);
    // What the schema lets through deserializes; were it not so, that is a problem too.
    let given = Given(shaped.clone().unwrap_or_default());
    let mut config = shaped.and_then(|shaped| {
        serde_json::from_value::<Config>(shaped).map_err(|error| problems.add("", error.to_string())).ok()
    });
    if let Some(config) = &mut config {
        follow_files(&mut config.kafka.properties, properties);
        if let Some(store) = &mut config.object_store {
            follow_files(&mut store.options, options);
        }
        for (table, explicit) in config.tables.iter_mut().zip(&explicit) {
            table.columns.required = required(table, explicit);
        }
        config.spool = has_spool.then(|| ingest::take_table(config)).flatten();
        check::check(config, &mut problems);
    }
    let (mut config, warnings) = problems.finish(config)?;
    config.warnings = warnings;
    config.given = given;
    Ok(config)
}

/// Lets values that came from files be read again.
fn follow_files(secrets: &mut BTreeMap<String, Secret>, recipes: BTreeMap<String, interpolate::Recipe>) {
    for (name, recipe) in recipes {
        if let Some(secret) = secrets.get_mut(&name) {
            *secret = std::mem::take(secret).made_by(recipe);
        }
    }
}

/// The columns without which a table cannot be relayed as configured: those that the user named,
/// and those that every event needs. A preset's others may be missing, as if they were NULL.
fn required(table: &Table, explicit: &BTreeSet<String>) -> BTreeSet<String> {
    let columns = &table.columns;
    let by_role = columns.by_role();
    let named = by_role.iter().filter(|(role, _)| explicit.contains(*role)).map(|(_, name)| *name);
    let templates = [&table.topic, &table.key].into_iter().flatten();
    let templates: Vec<crate::record::Template> =
        templates.filter_map(|source| crate::record::Template::parse(source).ok()).collect();
    let marked = columns.published_at.as_ref().filter(|_| table.after_publish == AfterPublish::Mark);
    let kept_by = columns.tx.as_ref().filter(|_| table.after_publish == AfterPublish::Keep);
    let routed = columns.topic.as_ref().filter(|_| table.topic.is_none());
    [&columns.id, &columns.payload]
        .into_iter()
        .chain(&columns.sequence)
        .chain(marked)
        .chain(kept_by)
        .chain(routed)
        .chain(&table.headers.from)
        .chain(table.headers.columns.iter().map(|(_, column)| column))
        .map(String::as_str)
        .chain(named)
        .chain(templates.iter().flat_map(|template| template.columns()))
        .map(str::to_owned)
        .collect()
}

/// The JSON Schema of the file, with the keys that are still to come.
pub fn schema() -> Value {
    later::with_keys_to_come(shape::schema())
}

#[cfg(test)]
mod tests;
