//! One outbox table.

use std::{collections::BTreeSet, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};

use super::{payload::Payload, units};

/// An outbox table, and how its rows become records.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// schema.table or table; or message:PREFIX for PostgreSQL's logical messages of that prefix.
    pub name: String,
    /// Where rows are found; poll, or auto where source.stream is there.
    #[serde(default)]
    pub capture: Capture,
    /// Whether rows stay until they are published.
    #[serde(default)]
    pub rows: Rows,
    /// Fills `columns`, `topic` and `headers`; what is written beside it wins.
    #[serde(default)]
    pub preset: Preset,
    pub columns: Columns,
    /// Template over columns, such as orders.{aggregatetype}; wins over the topic column.
    #[serde(default)]
    pub topic: Option<String>,
    /// Template over columns; wins over the key column.
    #[serde(default)]
    pub key: Option<String>,
    #[serde(default)]
    pub headers: Headers,
    #[serde(default)]
    pub order: Order,
    #[serde(default)]
    pub after_publish: AfterPublish,
    #[serde(default)]
    pub poll: Poll,
    #[serde(default)]
    pub payload: Payload,
    #[serde(default)]
    pub on_failure: OnFailure,
    #[serde(default)]
    pub hold: Hold,
    #[serde(default)]
    pub dead_letter: DeadLetter,
    #[serde(default)]
    pub retry: Retry,
    #[serde(default)]
    pub retention: Retention,
    /// Whether events go out as CloudEvents, and how.
    #[serde(default)]
    pub envelope: Envelope,
}

impl Table {
    /// The prefix, where the events are logical messages.
    pub fn message_prefix(&self) -> Option<&str> {
        self.name.strip_prefix(MESSAGE)
    }

    /// The column that is written when a row is published, where one is.
    pub fn marked(&self) -> Option<&String> {
        self.columns.published_at.as_ref().filter(|_| self.after_publish == AfterPublish::Mark)
    }

    /// The column that tells which rows are published, where nothing is written.
    pub fn kept_by(&self) -> Option<&String> {
        self.columns.tx.as_ref().filter(|_| self.after_publish == AfterPublish::Keep)
    }

    /// Debezium's outbox router sends `id` only.
    pub fn event_type_header(&self) -> bool {
        self.preset != Preset::Debezium
    }
}

/// The name of a table of logical messages is this and their prefix.
pub(super) const MESSAGE: &str = "message:";

/// Whether the rows of a table stay until they are published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Rows {
    #[default]
    Stay,
    /// The application deletes them itself, in the transaction that inserts them: only the log has them.
    Transient,
}

/// Where the rows of a table are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Capture {
    /// In the table.
    #[default]
    Poll,
    /// In the log; while it cannot be read, the table waits.
    Stream,
    /// In the log while it can be read, else in the table.
    Auto,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// The table that `whippet sql` makes.
    #[default]
    Whippet,
    /// The table that Debezium's outbox event router reads.
    Debezium,
}

/// Which column has what; null for none.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Columns {
    /// The event's id: what consumers deduplicate on.
    pub id: String,
    /// The order column, filled from a sequence.
    #[serde(default)]
    pub sequence: Option<String>,
    #[serde(default)]
    pub topic: Option<String>,
    #[serde(default)]
    pub key: Option<String>,
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    pub payload: String,
    /// A JSON object of strings.
    #[serde(default)]
    pub headers: Option<String>,
    #[serde(default)]
    pub created_at: Option<String>,
    /// Set by `after_publish: mark`.
    #[serde(default)]
    pub published_at: Option<String>,
    #[serde(default)]
    pub partition: Option<String>,
    /// The record's timestamp, where it is not `created_at`.
    #[serde(default)]
    pub timestamp: Option<String>,
    /// Becomes the header `version`.
    #[serde(default)]
    pub version: Option<String>,
    /// java.util.Properties text whose entries become headers, as Debezium writes it.
    #[serde(default)]
    pub tracing_span_context: Option<String>,
    /// The number of the row's transaction (PostgreSQL), which `after_publish: keep` goes by.
    #[serde(default)]
    pub tx: Option<String>,
    /// Columns that the table must have.
    #[serde(skip)]
    pub required: BTreeSet<String>,
}

impl Columns {
    /// The mapped columns, by the key that maps them.
    pub fn by_role(&self) -> Vec<(&'static str, &str)> {
        let optional = [
            ("sequence", &self.sequence),
            ("topic", &self.topic),
            ("key", &self.key),
            ("type", &self.kind),
            ("headers", &self.headers),
            ("created_at", &self.created_at),
            ("published_at", &self.published_at),
            ("partition", &self.partition),
            ("timestamp", &self.timestamp),
            ("version", &self.version),
            ("tracing_span_context", &self.tracing_span_context),
            ("tx", &self.tx),
        ];
        [("id", self.id.as_str()), ("payload", self.payload.as_str())]
            .into_iter()
            .chain(optional.into_iter().filter_map(|(role, name)| Some((role, name.as_deref()?))))
            .collect()
    }
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Headers {
    /// Columns that become headers of the same name.
    pub from: Vec<String>,
    /// Columns that become headers of another name: header, column. A NULL is a header without a value.
    #[serde(deserialize_with = "in_order")]
    #[schemars(with = "std::collections::BTreeMap<String, String>")]
    pub columns: Vec<(String, String)>,
    /// Headers of every record.
    #[serde(rename = "static", deserialize_with = "in_order")]
    #[schemars(with = "std::collections::BTreeMap<String, String>")]
    pub fixed: Vec<(String, String)>,
    /// Globs over the names of the row's own headers, without regard to case.
    pub allow: Vec<String>,
    /// Wins over `allow`.
    pub deny: Vec<String>,
    /// The budget of all headers of a record.
    #[serde(with = "units::size")]
    #[schemars(with = "units::SizeText")]
    pub max_bytes: usize,
    /// One header that carries them all, as a JSON object of strings; null: each is one.
    pub blob: Option<String>,
}

impl Default for Headers {
    fn default() -> Headers {
        Headers {
            from: Vec::new(),
            columns: Vec::new(),
            fixed: Vec::new(),
            allow: vec!["*".into()],
            deny: Vec::new(),
            max_bytes: 16 << 10,
            blob: None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Envelope {
    #[default]
    None,
    /// Attributes are headers ce_…, the value is the payload.
    CloudeventsBinary,
    /// The value is one JSON object.
    CloudeventsStructured,
}

/// A mapping, in the order in which it is written.
fn in_order<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<(String, String)>, D::Error> {
    let map = serde_json::Map::deserialize(from)?;
    let text = |value: serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    Ok(map.into_iter().map(|(name, value)| (name, text(value))).collect())
}

/// What may not overtake what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Events of one (topic, key).
    #[default]
    Key,
    /// Events of the whole table.
    Table,
    None,
}

/// What becomes of a published row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AfterPublish {
    #[default]
    Delete,
    /// `columns.published_at` is set.
    Mark,
    /// Nothing: the row stays as it is.
    Keep,
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Poll {
    /// Rows that one read may bring.
    #[schemars(range(min = 1, max = 100_000))]
    pub batch: usize,
    /// The pause after a read that was not full.
    #[serde(with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub min_interval: Duration,
    /// Where the pause grows to while nothing comes.
    #[serde(with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub max_interval: Duration,
    /// notify: a NOTIFY on the channel called like the table wakes the poller (PostgreSQL).
    pub wake: Wake,
}

impl Default for Poll {
    fn default() -> Poll {
        Poll {
            batch: 2000,
            min_interval: Duration::from_millis(5),
            max_interval: Duration::from_millis(250),
            wake: Wake::None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Wake {
    #[default]
    None,
    Notify,
}

/// How long published rows are kept, where after_publish keeps them.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// Published rows are deleted after this; never: somebody else does.
    #[serde(with = "units::duration_or_never")]
    #[schemars(with = "units::DurationOrNeverText")]
    pub published: Option<Duration>,
}

/// What becomes of an event that can never be published as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// It and every later event of its key are held until an operator releases them.
    #[default]
    Park,
    /// It is published to `dead_letter.topic`, and its key flows on.
    DeadLetter,
    /// It is held and the table stops.
    Halt,
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DeadLetter {
    /// Template over columns; {topic} is the topic that the event was meant for.
    pub topic: String,
}

impl Default for DeadLetter {
    fn default() -> DeadLetter {
        DeadLetter { topic: "{topic}.dlq".into() }
    }
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Hold {
    /// Events that may be held; past it the table halts and alerts.
    #[schemars(range(min = 1))]
    pub max_events: u64,
}

impl Default for Hold {
    fn default() -> Hold {
        Hold { max_events: 100_000 }
    }
}

/// The pauses between tries.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// The longest first pause; it doubles from try to try.
    #[serde(with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub initial: Duration,
    /// The longest pause of all.
    #[serde(with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub max: Duration,
    pub jitter: Jitter,
    /// After failing by itself for so long, an event is taken for one that can never be published;
    /// `never`, or a duration. A broker that is down is no failure of an event.
    #[serde(with = "units::duration_or_never")]
    #[schemars(with = "units::DurationOrNeverText")]
    pub give_up_after: Option<Duration>,
}

impl Default for Retry {
    fn default() -> Retry {
        Retry {
            initial: Duration::from_millis(100),
            max: Duration::from_secs(30),
            jitter: Jitter::Full,
            give_up_after: None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Jitter {
    /// A pause is anything from zero to the longest of its turn.
    #[default]
    Full,
    None,
}
