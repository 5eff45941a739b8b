//! From a row to the bytes on the wire: which topic and key, which headers, which value.
//!
//! Pure. [`Rules`] are compiled once for each table; what they need from a row are its columns by
//! index. A [`Rejection`] says in one sentence why a row can never be a record as it is; it names
//! columns and sizes, never values of payloads or headers.

mod context;
mod dead_letter;
pub mod encode;
pub mod envelope;
mod large;
mod properties;
mod route;
mod trail;
pub mod w3c;
pub mod wire;

use std::borrow::Cow;

pub use self::{
    context::{Dropped, Filter, tells_of_the_record},
    dead_letter::Failure,
    envelope::Envelope,
    large::{Form, LargeSpec, ObjectKey, Oversize, Packed, Packing, Then},
    route::{Route, Template, TemplateError, is_legal_topic},
    trail::{Context, Landed, Trail, Watch},
};
use self::{
    context::{Gathered, HeaderRules},
    dead_letter::DeadLetterRules,
    envelope::{Dress, Wearing},
    large::LargeRules,
    route::RouteRules,
};
use crate::event::{Event, Row};

/// What a table's configuration says about its records: column names and templates.
#[derive(Clone, Debug, Default)]
pub struct Spec {
    pub id: String,
    pub topic: Option<String>,
    pub key: Option<String>,
    pub kind: Option<String>,
    pub payload: String,
    pub headers: Option<String>,
    pub partition: Option<String>,
    pub version: Option<String>,
    /// A column in the format of `java.util.Properties`, whose entries become headers.
    pub tracing_span_context: Option<String>,
    /// Wins over the topic column.
    pub topic_template: Option<String>,
    /// Wins over the key column.
    pub key_template: Option<String>,
    /// Columns that become headers of the same name.
    pub headers_from: Vec<String>,
    /// Header and column; a NULL is a header without a value.
    pub headers_columns: Vec<(String, String)>,
    pub headers_static: Vec<(String, String)>,
    /// Globs over the names of the row's own headers; `deny` wins.
    pub allow: Vec<String>,
    pub deny: Vec<String>,
    /// The budget of all headers of a record together, in bytes.
    pub headers_max_bytes: usize,
    /// Whether the type becomes the header `eventType`.
    pub event_type_header: bool,
    /// One header that has all context, as JSON.
    pub blob: Option<String>,
    pub envelope: Envelope,
    /// The source of a CloudEvent, where no header says it.
    pub source: String,
    /// Where dead letters go; `{topic}` is the record's topic.
    pub dead_letter_topic: String,
    pub large: LargeSpec,
    pub watch: Watch,
}

/// Why a table's rules cannot be compiled.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RuleError {
    #[error("topic {0:?}: {1}")]
    Topic(String, TemplateError),
    #[error("key {0:?}: {1}")]
    Key(String, TemplateError),
    #[error("dead_letter.topic {0:?}: {1}")]
    DeadLetter(String, TemplateError),
    #[error("payload.reference.key {0:?}: {1}")]
    ReferenceKey(String, TemplateError),
    #[error("neither a topic column nor a topic template is configured")]
    NoTopic,
}

/// Why a row can never be published as it is, and what mends it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Rejection(String);

impl Rejection {
    fn new(reason: impl Into<String>) -> Rejection {
        Rejection(reason.into())
    }
}

/// The columns of a table by role, in the order in which its rows hold them.
#[derive(Debug, Default)]
struct Columns(Vec<String>);

impl Columns {
    /// The index of a column, which is asked for from now on.
    fn index(&mut self, name: &str) -> usize {
        if let Some(index) = self.0.iter().position(|known| known == name) {
            return index;
        }
        self.0.push(name.to_owned());
        self.0.len() - 1
    }

    fn optional(&mut self, name: Option<&String>) -> Option<usize> {
        name.map(|name| self.index(name))
    }
}

/// A table's rules, compiled.
#[derive(Debug)]
pub struct Rules {
    columns: Columns,
    id: usize,
    payload: usize,
    partition: Option<usize>,
    route: RouteRules,
    headers: HeaderRules,
    dress: Dress,
    dead_letter: DeadLetterRules,
    large: LargeRules,
    watch: Watch,
}

/// A Kafka record, borrowing from the row wherever it can.
#[derive(Debug, PartialEq, Eq)]
pub struct Record<'a> {
    pub topic: Cow<'a, str>,
    pub partition: Option<i32>,
    /// `None` stays null; empty stays empty.
    pub key: Option<Cow<'a, [u8]>>,
    /// `None` is a tombstone.
    pub payload: Option<Cow<'a, [u8]>>,
    pub headers: Vec<Header<'a>>,
    /// Milliseconds since the Unix epoch.
    pub timestamp_ms: Option<i64>,
}

/// Name and value; a JSON null stays null.
pub type Header<'a> = (Cow<'a, str>, Option<Cow<'a, [u8]>>);

/// A record that is ready, and the headers that did not make it.
#[derive(Debug)]
pub struct Prepared<'a> {
    pub record: Record<'a>,
    pub dropped: Dropped,
    /// Of the first record of an event.
    pub trail: Option<Box<Trail>>,
    /// By how many bytes its envelope makes the value larger than the row's payload.
    pub grown: usize,
}

impl Rules {
    pub fn compile(spec: &Spec) -> Result<Rules, RuleError> {
        let mut columns = Columns::default();
        Ok(Rules {
            id: columns.index(&spec.id),
            payload: columns.index(&spec.payload),
            partition: columns.optional(spec.partition.as_ref()),
            route: RouteRules::compile(spec, &mut columns)?,
            headers: HeaderRules::compile(spec, &mut columns),
            dress: Dress::compile(spec, &mut columns),
            dead_letter: DeadLetterRules::compile(spec, &mut columns)?,
            large: LargeRules::compile(spec, &mut columns)?,
            watch: spec.watch.clone(),
            columns,
        })
    }

    /// The columns that a row has to hold, in this order.
    pub fn columns(&self) -> &[String] {
        &self.columns.0
    }

    /// The event's id: what consumers deduplicate on.
    pub fn id<'a>(&self, row: &'a Row) -> Result<&'a str, Rejection> {
        let name = &self.columns.0[self.id];
        let id = row.get(self.id).filter(|id| !id.is_empty()).ok_or_else(|| {
            Rejection::new(format!("the id (column {name}) is NULL or empty: give every row an id"))
        })?;
        text(id, name)
    }

    /// Topic and key: what decides an event's order.
    pub fn route<'a>(&self, event: &'a Event) -> Result<Route<'a>, Rejection> {
        let mut route = self.route.route(&event.row, &self.columns.0)?;
        if let Some(topic) = event.replay.as_ref().and_then(|replay| replay.topic.as_deref()) {
            route.topic = topic.into();
        }
        Ok(route)
    }

    /// The whole record, or the one of a chunk: `packed` is what was made of the payload, and the
    /// chunk's index.
    pub fn prepare<'a>(
        &'a self,
        event: &'a Event,
        packed: Option<(&'a Packed, u32)>,
    ) -> Result<Prepared<'a>, Rejection> {
        let row = &event.row;
        let id = self.id(row)?;
        let Route { topic, key } = self.route(event)?;
        route::check_topic(&topic)?;
        let partition = self.partition.map(|index| self.partition(row, index)).transpose()?;
        let Gathered { headers, about, dropped } = self.headers.headers(id, row, &self.columns.0)?;
        let is_first = packed.is_none_or(|(_, index)| index == 0);
        let trail = if is_first { self.watch.trail(id, event, &headers) } else { None };
        let wearing = Wearing { headers, about, payload: row.get(self.payload) };
        let (mut headers, payload) = self.dress.dress(event, (id, &topic, key.as_deref()), wearing);
        if let Some(replay) = &event.replay {
            headers.push(("whippet-replay".into(), Some(replay.requested.as_bytes().into())));
        }
        if self.large.flags_inline() {
            headers.push((wire::BACKED_VALUE.into(), Some((&[wire::INLINE][..]).into())));
        }
        let grown = match &payload {
            Some(Cow::Owned(whole)) => {
                whole.len().saturating_sub(row.get(self.payload).map_or(0, <[u8]>::len))
            }
            _ => 0,
        };
        let mut record = Record {
            topic,
            partition: partition.flatten(),
            key,
            payload,
            headers,
            // Kafka knows no time before 1970, and librdkafka takes 0 for "now" as well.
            timestamp_ms: event.timestamp_ms.filter(|ms| *ms > 0),
        };
        if let Some((packed, index)) = packed {
            self.wear(&mut record, packed, index);
        }
        Ok(Prepared { record, dropped, trail, grown })
    }

    /// The partition that the row names, if it is a number.
    pub fn explicit_partition(&self, row: &Row) -> Option<i32> {
        self.partition(row, self.partition?).ok()?
    }

    fn partition(&self, row: &Row, index: usize) -> Result<Option<i32>, Rejection> {
        let Some(value) = row.get(index) else { return Ok(None) };
        let number = std::str::from_utf8(value).ok().and_then(|text| text.trim().parse().ok());
        match number {
            Some(number) if number >= 0 => Ok(Some(number)),
            _ => Err(Rejection::new(format!(
                "column {} is not a partition number (0 and up): mend the row, or set it to NULL",
                self.columns.0[index]
            ))),
        }
    }
}

impl Record<'_> {
    /// The most that this record alone takes in a batch on the wire, uncompressed, in bytes: what
    /// a topic's `max.message.bytes` is compared with. A record that passes this check passes in
    /// any company, however badly it compresses.
    ///
    /// Record batch format v2 (Kafka documentation, "Message Format"): 61 bytes of batch header,
    /// then each record with varints of at most 5 bytes (10 for the timestamp delta).
    pub fn wire_size(&self) -> usize {
        const BATCH_HEADER: usize = 61;
        const VARINT: usize = 5;
        // Length, attributes, timestamp delta, offset delta, key length, value length, count.
        const RECORD: usize = VARINT + 1 + 2 * VARINT + 4 * VARINT;
        let headers: usize = self
            .headers
            .iter()
            .map(|(name, value)| 2 * VARINT + name.len() + value.as_ref().map_or(0, |v| v.len()))
            .sum();
        BATCH_HEADER
            + RECORD
            + self.key.as_ref().map_or(0, |key| key.len())
            + self.payload.as_ref().map_or(0, |payload| payload.len())
            + headers
    }
}

/// A column as text.
fn text<'a>(value: &'a [u8], column: &str) -> Result<&'a str, Rejection> {
    std::str::from_utf8(value)
        .map_err(|_| Rejection::new(format!("column {column} is not UTF-8 text: mend the row")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::Place;

    /// The columns of preset `whippet`, and a row for them.
    fn spec() -> Spec {
        let column = |name: &str| Some(name.to_owned());
        Spec {
            id: "id".into(),
            payload: "payload".into(),
            topic: column("topic"),
            key: column("key"),
            kind: column("type"),
            headers: column("headers"),
            partition: column("partition"),
            version: column("version"),
            allow: vec!["*".into()],
            headers_max_bytes: 16 << 10,
            event_type_header: true,
            ..Spec::default()
        }
    }

    fn event(rules: &Rules, values: &[(&str, &str)]) -> Event {
        let mut row = Row::default();
        for column in rules.columns() {
            row.push(values.iter().find(|(name, _)| name == column).map(|(_, value)| value.as_bytes()));
        }
        Event {
            place: Place::Int(1),
            row,
            timestamp_ms: Some(1_700_000_000_000),
            unread_bytes: None,
            replay: None,
        }
    }

    fn named<'a>(prepared: &'a Prepared<'_>) -> Vec<(&'a str, Option<&'a str>)> {
        let text = |value: &'a Option<Cow<'_, [u8]>>| value.as_ref().map(|v| std::str::from_utf8(v).unwrap());
        prepared.record.headers.iter().map(|(name, value)| (name.as_ref(), text(value))).collect()
    }

    #[test]
    fn a_whole_row_becomes_a_whole_record() {
        let rules = Rules::compile(&spec()).unwrap();
        let event = event(
            &rules,
            &[
                ("id", "e1"),
                ("topic", "orders"),
                ("key", "k"),
                ("type", "OrderPlaced"),
                ("payload", "{}"),
                ("headers", r#"{"user-id":"7","b":null}"#),
                ("partition", "3"),
                ("version", "2"),
            ],
        );
        let prepared = rules.prepare(&event, None).unwrap();
        let record = &prepared.record;
        assert_eq!((&*record.topic, record.partition), ("orders", Some(3)));
        assert_eq!(record.key.as_deref(), Some(&b"k"[..]));
        assert_eq!(record.payload.as_deref(), Some(&b"{}"[..]));
        assert_eq!(record.timestamp_ms, Some(1_700_000_000_000));
        assert_eq!(
            named(&prepared),
            [
                ("id", Some("e1")),
                ("eventType", Some("OrderPlaced")),
                ("version", Some("2")),
                ("user-id", Some("7")),
                ("b", None),
            ]
        );
    }

    #[test]
    fn null_stays_null_and_empty_stays_empty() {
        let rules = Rules::compile(&spec()).unwrap();
        let tombstone = event(&rules, &[("id", "e1"), ("topic", "t")]);
        let prepared = rules.prepare(&tombstone, None).unwrap();
        assert_eq!((&prepared.record.key, &prepared.record.payload), (&None, &None));
        let empty = event(&rules, &[("id", "e1"), ("topic", "t"), ("key", ""), ("payload", "")]);
        let prepared = rules.prepare(&empty, None).unwrap();
        assert_eq!(prepared.record.key.as_deref(), Some(&b""[..]));
        assert_eq!(prepared.record.payload.as_deref(), Some(&b""[..]));
    }

    #[test]
    fn what_can_never_be_a_record_is_said_without_its_values() {
        let rules = Rules::compile(&spec()).unwrap();
        for (values, expected) in [
            (&[("topic", "t")][..], "the id (column id) is NULL"),
            (&[("id", "1")], "the topic (column topic) is NULL"),
            (&[("id", "1"), ("topic", "a b")], "not a legal topic name"),
            (
                &[("id", "1"), ("topic", "t"), ("partition", "-1")],
                "column partition is not a partition number",
            ),
            (&[("id", "1"), ("topic", "t"), ("headers", "{secret")], "column headers is not a JSON object"),
            (
                &[("id", "1"), ("topic", "t"), ("headers", r#"["secret"]"#)],
                "column headers is not a JSON object",
            ),
            (&[("id", "1"), ("topic", "t"), ("headers", r#"{"a":{"secret":1}}"#)], "header \"a\""),
        ] {
            let event = event(&rules, values);
            let said = rules.prepare(&event, None).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
            assert!(!said.contains("secret"), "{said}");
        }
    }

    proptest! {
        /// Against a record that is encoded field by field, with every varint at its longest.
        #[test]
        fn the_wire_size_is_never_too_small(
            key in proptest::option::of(0..2_000usize),
            payload in proptest::option::of(0..200_000usize),
            headers in proptest::collection::vec((0..300usize, proptest::option::of(0..300usize)), 0..20),
        ) {
            let payload = payload.map(|size| vec![0u8; size]);
            let record = Record {
                topic: "t".into(),
                partition: None,
                key: key.map(|size| vec![0; size].into()),
                payload: payload.as_deref().map(Cow::Borrowed),
                headers: headers.iter().map(|(name, value)| {
                    ("n".repeat(*name).into(), value.map(|size| vec![0; size].into()))
                }).collect(),
                timestamp_ms: None,
            };
            // Zigzag varints, as the format has them.
            let varint = |n: usize| (64 - ((2 * n as u64) | 1).leading_zeros() as usize).div_ceil(7);
            let field = |size: Option<usize>| varint(size.unwrap_or(1)) + size.unwrap_or(0);
            let headers: usize = headers.iter().map(|(name, value)| field(Some(*name)) + field(*value)).sum();
            let body = 1 + 10 + 5 + field(key) + field(payload.as_ref().map(Vec::len)) + 5 + headers;
            prop_assert!(record.wire_size() >= 61 + varint(body) + body);
        }
    }
}
