//! From a request to events, or to why it has none. Pure.
//!
//! What a record could not carry is refused here, while its caller listens: an event that was taken is one that
//! can be published.

use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, value::RawValue};
use uuid::Uuid;
use wildmatch::WildMatch;

use crate::{
    config::{self, Table},
    http::Problem,
    record::is_legal_topic,
};

const KEY: &str = "whippet-key";
const ID: &str = "whippet-id";
const TYPE: &str = "whippet-type";
/// Of headers that go along under the rest of their name.
const ALONG: &str = "whippet-header-";
const NDJSON: &str = "application/x-ndjson";
/// The longest id and the longest type, in bytes.
const NAME_AT_MOST: usize = 255;
/// The longest key, in bytes.
const KEY_AT_MOST: usize = 16 << 10;
/// The longest body of a batch, in bytes, and the most events in it.
const BATCH_AT_MOST: usize = 16 << 20;
const EVENTS_AT_MOST: usize = 10_000;
/// The longest value that an SQLite of these days takes is 1,000,000,000 bytes (SQLITE_MAX_LENGTH).
const PAYLOAD_AT_MOST: usize = 900 << 20;

/// An event that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub id: String,
    /// Whether the caller gave the id: only then can it come again.
    pub given: bool,
    pub topic: String,
    pub key: Option<String>,
    pub kind: Option<String>,
    /// `None` is a tombstone.
    pub payload: Option<Bytes>,
    /// A JSON object of strings.
    pub headers: Option<String>,
}

impl Event {
    /// What it takes in the spool, more or less.
    pub fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let ids = 2 * self.id.len() + self.topic.len();
        ids + text(&self.key)
            + text(&self.kind)
            + text(&self.headers)
            + self.payload.as_ref().map_or(0, Bytes::len)
            + 64
    }
}

/// What callers may send.
#[derive(Debug)]
pub struct Rules {
    topics: Vec<WildMatch>,
    headers: Vec<HeaderName>,
    headers_at_most: usize,
    payload_at_most: usize,
    batch_at_most: usize,
}

/// What a request says of its body.
#[derive(Debug, PartialEq, Eq)]
pub struct Head {
    topic: String,
    /// For every event of the request, unless it says otherwise.
    headers: Map<String, Value>,
    body: Body,
}

#[derive(Debug, PartialEq, Eq)]
enum Body {
    Payload {
        id: Option<String>,
        key: Option<String>,
        kind: Option<String>,
    },
    /// An event a line.
    Lines,
}

impl Head {
    /// Whether the request may be one that was taken before: it has an id, or its lines may have.
    pub fn may_be_known(&self) -> bool {
        match &self.body {
            Body::Payload { id, .. } => id.is_some(),
            Body::Lines => true,
        }
    }
}

impl Rules {
    pub fn new(ingest: &config::Ingest, table: &Table) -> Rules {
        Rules {
            topics: ingest.topics.iter().map(|glob| WildMatch::new(glob)).collect(),
            headers: ingest
                .headers
                .iter()
                .filter_map(|name| HeaderName::try_from(name.as_str()).ok())
                .collect(),
            headers_at_most: table.headers.max_bytes,
            // What is larger would never find room.
            payload_at_most: table.payload.max_bytes.min(PAYLOAD_AT_MOST).min(ingest.max_bytes / 2),
            batch_at_most: BATCH_AT_MOST.min(ingest.max_bytes / 2),
        }
    }

    /// What is known before the body is read.
    pub fn head(&self, topic: String, headers: &HeaderMap) -> Result<Head, Problem> {
        if !is_legal_topic(&topic) {
            return Err(Problem::bad("the topic is not 1 to 249 of letters, digits, '.', '_' and '-'"));
        }
        if !self.topics.iter().any(|glob| glob.matches(&topic)) {
            let detail = format!("topic {topic} is not one of ingest.topics");
            return Err(Problem::new(StatusCode::FORBIDDEN, detail));
        }
        if headers.get(header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
            let detail = "a payload goes out as it comes: send it without Content-Encoding";
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail));
        }
        let (id, key, kind) = (only(headers, ID)?, only(headers, KEY)?, only(headers, TYPE)?);
        let content_type = only(headers, header::CONTENT_TYPE.as_str())?;
        let media_type =
            content_type.as_deref().and_then(|value| value.split(';').next()).unwrap_or_default();
        let is_batch = media_type.trim().eq_ignore_ascii_case(NDJSON);
        let mut along = self.along(headers)?;
        let body = if is_batch {
            if id.is_some() || key.is_some() || kind.is_some() {
                return Err(Problem::bad("of a batch, each line says its own id, key and type"));
            }
            Body::Lines
        } else {
            if let Some(content_type) = content_type {
                along.insert(header::CONTENT_TYPE.to_string(), content_type.into());
            }
            Body::Payload { id, key, kind }
        };
        Ok(Head { topic, headers: along, body })
    }

    /// The longest body that a request may have.
    pub fn body_at_most(&self, head: &Head) -> usize {
        match head.body {
            Body::Payload { .. } => self.payload_at_most,
            Body::Lines => self.batch_at_most,
        }
    }

    /// The events of a request, in order.
    pub fn events(&self, head: Head, body: &Bytes) -> Result<Vec<Event>, Problem> {
        let Head { topic, headers, body: kind_of_body } = head;
        if let Body::Payload { id, key, kind } = kind_of_body {
            return Ok(vec![self.event(topic, id, key, kind, Some(body.clone()), headers)?]);
        }
        let mut events = Vec::new();
        for (number, line) in body.split(|byte| *byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            if events.len() == EVENTS_AT_MOST {
                let detail = format!("a batch has {EVENTS_AT_MOST} events at most");
                return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
            }
            let event = self.line(&topic, &headers, body, line);
            events.push(event.map_err(|problem| problem.of(&format!("line {}", number + 1)))?);
        }
        if events.is_empty() {
            return Err(Problem::bad("the batch is empty: a JSON object a line is expected"));
        }
        Ok(events)
    }

    fn line(
        &self,
        topic: &str,
        headers: &Map<String, Value>,
        body: &Bytes,
        line: &[u8],
    ) -> Result<Event, Problem> {
        // Positions in the line, and no part of it: it may be a secret.
        let line: Line = serde_json::from_slice(line).map_err(|error| match error.is_data() {
            true => Problem::bad(format!("column {}: expected the members key, id, type, headers and payload, as text but for the last two", error.column())),
            false => Problem::bad(format!("column {}: not JSON", error.column())),
        })?;
        let payload = match (line.payload, line.payload_base64) {
            (Some(payload), None) => content(payload, body)?,
            (None, Some(encoded)) => {
                let decoded = BASE64_STANDARD.decode(encoded);
                Some(decoded.map_err(|_| Problem::bad("payload_base64 is not base64"))?.into())
            }
            _ => return Err(Problem::bad("expected payload (null for a tombstone) or payload_base64")),
        };
        let mut all = headers.clone();
        for (name, value) in line.headers.into_iter().flatten() {
            if !value.is_string() && !value.is_null() {
                return Err(Problem::bad("a value of headers is not text"));
            }
            all.insert(name, value);
        }
        self.event(topic.to_owned(), line.id, line.key, line.kind, payload, all)
    }

    fn event(
        &self,
        topic: String,
        id: Option<String>,
        key: Option<String>,
        kind: Option<String>,
        payload: Option<Bytes>,
        headers: Map<String, Value>,
    ) -> Result<Event, Problem> {
        let legal = |text: &String| !text.is_empty() && text.len() <= NAME_AT_MOST;
        if !id.as_ref().is_none_or(legal) {
            return Err(Problem::bad("the id is not 1 to 255 bytes long"));
        }
        if !kind.as_ref().is_none_or(legal) {
            return Err(Problem::bad("the type is not 1 to 255 bytes long"));
        }
        if key.as_ref().is_some_and(|key| key.len() > KEY_AT_MOST) {
            return Err(Problem::bad("the key is longer than 16 KiB"));
        }
        if payload.as_ref().is_some_and(|payload| payload.len() > self.payload_at_most) {
            let detail = format!("the payload is above {} bytes", self.payload_at_most);
            return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
        }
        let given = id.is_some();
        let id = id.unwrap_or_else(|| Uuid::new_v4().to_string());
        // With the two that the record has anyway.
        let own = "id".len() + id.len() + "eventType".len() + kind.as_ref().map_or(0, String::len);
        let size: usize =
            headers.iter().map(|(name, value)| name.len() + value.as_str().map_or(0, str::len)).sum();
        if own + size > self.headers_at_most {
            let detail = format!("the headers are above headers.max_bytes, {} bytes", self.headers_at_most);
            return Err(Problem::bad(detail));
        }
        let headers = (!headers.is_empty()).then(|| Value::Object(headers).to_string());
        Ok(Event { id, given, topic, key, kind, payload, headers })
    }

    /// The headers that go along.
    fn along(&self, headers: &HeaderMap) -> Result<Map<String, Value>, Problem> {
        let mut along = Map::new();
        for name in headers.keys() {
            let renamed = name.as_str().strip_prefix(ALONG).filter(|rest| !rest.is_empty());
            let Some(as_name) = renamed.or_else(|| self.headers.contains(name).then_some(name.as_str()))
            else {
                continue;
            };
            // Of several, as one (RFC 9110, section 5.3): baggage and tracestate may come so.
            let values = headers.get_all(name).iter().map(|value| text(name.as_str(), value.as_bytes()));
            let values: Vec<&str> = values.collect::<Result<_, _>>()?;
            along.insert(as_name.to_owned(), values.join(",").into());
        }
        Ok(along)
    }
}

/// A line of a batch.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    id: Option<String>,
    key: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    headers: Option<Map<String, Value>>,
    #[serde(borrow, default, deserialize_with = "present")]
    payload: Option<&'a RawValue>,
    payload_base64: Option<String>,
}

/// A null that is there is not a payload that is missing.
fn present<'de: 'a, 'a, D: Deserializer<'de>>(from: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

/// A string is its text; null is a tombstone; anything else goes out byte for byte as it stands.
fn content(payload: &RawValue, body: &Bytes) -> Result<Option<Bytes>, Problem> {
    Ok(match payload.get() {
        "null" => None,
        quoted if quoted.starts_with('"') => {
            let text: Result<String, _> = serde_json::from_str(quoted);
            Some(text.map_err(|_| Problem::bad("the payload is not text: half of a surrogate pair"))?.into())
        }
        json => Some(body.slice_ref(json.as_bytes())),
    })
}

/// The one value of a header.
fn only(headers: &HeaderMap, name: &'static str) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => text(name, value.as_bytes()).map(|value| Some(value.to_owned())),
        (Some(_), Some(_)) => Err(Problem::bad(format!("header {name} is there twice"))),
    }
}

fn text<'a>(name: &str, value: &'a [u8]) -> Result<&'a str, Problem> {
    std::str::from_utf8(value).map_err(|_| Problem::bad(format!("header {name} is not UTF-8")))
}

#[cfg(test)]
mod tests;
