//! The configuration file: what its keys mean, their defaults, and what is wrong with one.
//!
//! The sections are each a module, but for those of a few keys, which are here. A file becomes a [`Config`] in
//! steps (`read`), each a module too: `yaml` reads texts with their places, `interpolate` replaces `${…}`,
//! `layers` lays the environment over it, `ingest` adds the table of its spool, `tables` fills in `defaults` and
//! presets, `later` refuses what is still to come, `shape` gives the texts their types by the schema, and `check`
//! looks at the whole. Every step goes on after a problem, so that all of them are told at once.

mod change;
mod check;
mod error;
mod exactly_once;
mod ingest;
mod interpolate;
mod kafka;
mod kafka_token;
mod later;
mod layers;
mod payload;
mod read;
mod secret;
mod shape;
mod source;
mod store;
mod table;
mod tables;
mod units;
mod yaml;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use self::change::Given;
pub use self::{
    change::Difference,
    error::{Error, Place, Problem},
    ingest::{COLUMNS as INGEST_COLUMNS, INGEST, Ingest},
    kafka::{Compression, CreateTopics, Delivery, Kafka},
    payload::{Chunk, ChunkDialect, Encode, Encoding, Oversize, Payload, Reference, ReferenceDialect},
    read::{load, parse},
    secret::Secret,
    source::{Dialect, Source, Stream, Tls, TlsMode},
    store::ObjectStore,
    table::{
        AfterPublish, Capture, Columns, DeadLetter, Envelope, Headers, Hold, Jitter, OnFailure, Order, Poll,
        Preset, Retention, Retry, Rows, Table, Wake,
    },
};

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

/// The JSON Schema of the file, with the keys that are still to come.
pub fn schema() -> Value {
    shape::as_written(later::with_keys_to_come(shape::schema()))
}

#[cfg(test)]
mod tests;
