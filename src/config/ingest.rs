//! Taking events by HTTP: the keys of `ingest`, and the table that its spool is.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Config, Table, error::Problems, units};
use crate::{ingest::volume, record::Template};

/// Events by HTTP, kept in a spool of the relay's own until they are published.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ingest {
    #[serde(default = "Ingest::listen")]
    #[schemars(with = "units::AddressText")]
    pub listen: SocketAddr,
    /// What callers may publish to: names, or globs such as audit.*
    #[schemars(length(min = 1))]
    pub topics: Vec<String>,
    /// A folder that outlives the process, on a disk of this machine.
    pub spool: PathBuf,
    /// What the spool may take on the disk.
    #[serde(default = "Ingest::max_bytes", with = "units::size")]
    #[schemars(with = "units::SizeText")]
    pub max_bytes: usize,
    /// Who may publish: a token a line, or `NAME TOKEN`. Read again for every request.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// How long a `Whippet-Id` is remembered after its event was published.
    #[serde(default = "Ingest::dedup", with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub dedup: Duration,
    /// HTTP headers that become headers of the record, beside every `whippet-header-*`.
    #[serde(default = "Ingest::headers")]
    pub headers: Vec<String>,
}

impl Ingest {
    fn listen() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 9465))
    }

    fn max_bytes() -> usize {
        1 << 30
    }

    fn dedup() -> Duration {
        Duration::from_hours(24)
    }

    fn headers() -> Vec<String> {
        ["traceparent", "tracestate", "baggage", "x-request-id"].map(str::to_owned).to_vec()
    }
}

/// The spool's table: its name in `/status`, in metrics and for the operator's verbs.
pub const INGEST: &str = "ingest";

/// The columns of the spool's table that an event has.
pub const COLUMNS: [&str; 8] = ["seq", "id", "topic", "key", "type", "payload", "headers", "created_at"];

/// Adds the spool's table to the others, where there is a spool: `defaults` are filled in as for them. Without
/// a spool, there have to be a source and tables.
pub(super) fn add_table(tree: &mut Value, problems: &mut Problems) -> bool {
    if tree.is_null() {
        *tree = Value::Object(Map::new());
    }
    let Value::Object(root) = tree else { return false };
    let has = |root: &Map<String, Value>, key: &str| root.get(key).is_some_and(|value| !value.is_null());
    let tables = root.get("tables").and_then(Value::as_array);
    let any_table = root.contains_key("tables") && tables.is_none_or(|tables| !tables.is_empty());
    if !has(root, "ingest") {
        if !root.contains_key("source") {
            problems.missing("source", "a mapping of keys");
        }
        if !root.contains_key("tables") {
            problems.missing("tables", "a list");
        }
        return false;
    }
    if any_table && !has(root, "source") {
        problems.missing("source", "a mapping of keys: where the tables are");
    }
    if has(root, "source") && !any_table {
        problems.add("tables", "expected at least 1 element(s): a source is configured");
    }
    if root.get("tables").is_none_or(Value::is_null) {
        root.insert("tables".into(), Value::Array(Vec::new()));
    }
    let Some(Value::Array(tables)) = root.get_mut("tables") else { return false };
    tables.push(table());
    true
}

/// What of a table is the spool's own. Everything else may be given in `defaults`.
fn table() -> Value {
    let no = Value::Null;
    json!({
        "name": INGEST, "preset": "whippet", "capture": "poll", "rows": "stay", "after_publish": "delete",
        "topic": no, "key": no, "retention": { "published": "never" },
        "columns": {
            "id": "id", "sequence": "seq", "topic": "topic", "key": "key", "type": "type", "payload": "payload",
            "headers": "headers", "created_at": "created_at", "published_at": no, "partition": no,
            "timestamp": no, "version": no, "tracing_span_context": no, "tx": no,
        },
        "headers": { "from": [] }, "poll": { "wake": "none" },
    })
}

/// Takes the spool's table out again: it is in another database than the others.
pub(super) fn take_table(config: &mut Config) -> Option<Table> {
    config.tables.pop()
}

pub(super) fn check(config: &Config, problems: &mut Problems) {
    let Some(ingest) = &config.ingest else { return };
    if !cfg!(feature = "sqlite") {
        problems.add_key("ingest", "this build has no support for SQLite, which the spool needs");
    }
    if config.tables.iter().any(|table| table.name == INGEST) {
        problems
            .add_key("ingest", format!("a table is called {INGEST}, and so is the spool: rename the table"));
    }
    if config.admin.listen == Some(ingest.listen) && ingest.listen.port() != 0 {
        problems.add("ingest.listen", "admin.listen has this address");
    }
    for (index, topic) in ingest.topics.iter().enumerate() {
        let legal = |c: char| c.is_ascii_alphanumeric() || "._-*?".contains(c);
        if topic.is_empty() || topic.len() > 249 || !topic.chars().all(legal) {
            let path = format!("ingest.topics[{index}]");
            problems.add(&path, "expected a topic, or a glob over topics such as audit.*");
        }
    }
    for (index, name) in ingest.headers.iter().enumerate() {
        if axum::http::HeaderName::try_from(name.as_str()).is_err() {
            problems.add(&format!("ingest.headers[{index}]"), "expected the name of an HTTP header");
        }
    }
    if ingest.max_bytes < 1 << 20 {
        problems.add("ingest.max_bytes", "expected at least 1MiB");
    }
    if ingest.spool.as_os_str().is_empty() {
        problems.add("ingest.spool", "expected a folder that outlives the process");
    }
    if let Some(why) = volume::passing(&ingest.spool) {
        problems.warn("ingest.spool", &format!("{}: {why}", ingest.spool.display()));
    }
    match &ingest.token_file {
        Some(file) if !file.is_file() => {
            problems.warn("ingest.token_file", &format!("there is no file {} (yet)", file.display()));
        }
        None if !ingest.listen.ip().is_loopback() => problems.warn(
            "ingest.listen",
            "whoever reaches this address can publish: set ingest.token_file, or listen on 127.0.0.1",
        ),
        _ => {}
    }
    if let Some(table) = &config.spool {
        templates(table, problems);
    }
}

/// `defaults` may name columns that the application's tables have and the spool does not: events would be taken
/// and never published.
fn templates(table: &Table, problems: &mut Problems) {
    let reference = (&table.payload.reference.key, "defaults.payload.reference.key");
    let dead_letter = (&table.dead_letter.topic, "defaults.dead_letter.topic");
    for (source, path) in [reference, dead_letter] {
        let Ok(template) = Template::parse(source) else { continue };
        let strange = template.columns().find(|name| !COLUMNS.contains(name) && *name != "sha256");
        if let Some(name) = strange {
            problems
                .add(path, format!("the spool of ingest has no column {name}: say it in each table instead"));
        }
    }
}
