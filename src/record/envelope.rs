//! How a record wears its context: as headers, all in one header (`headers.blob`), or as the attributes
//! of a CloudEvent. docs/context.md is about what that is for.
//!
//! Headers that describe the event (`id` and its like) stay as they are in any case, and so do those that
//! say how a large payload travels. CloudEvents 1.0.2 and its Kafka binding are what is written.

use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::de::IgnoredAny;
use serde_json::{Map, Value, value::RawValue};

use super::{
    Columns, Header, Spec,
    w3c::{TRACEPARENT, TRACESTATE},
};
use crate::event::Event;

/// In how much of an envelope an event is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Envelope {
    #[default]
    None,
    /// Attributes are headers `ce_…`, the value is the payload.
    Binary,
    /// The value is a JSON object that has all of it.
    Structured,
}

pub const CONTENT_TYPE: &str = "content-type";
/// The media type of a value that is a whole CloudEvent.
pub const STRUCTURED: &str = "application/cloudevents+json";
/// What the names of attributes begin with, where they are headers.
pub const ATTRIBUTE: &str = "ce_";
/// Where the payload is, if it is not in the record.
pub const DATAREF: &str = "ce_dataref";
const VERSION: &str = "1.0";

#[derive(Debug)]
pub(super) struct Dress {
    blob: Option<String>,
    pub envelope: Envelope,
    /// Where the type is, for the attribute.
    kind: Option<usize>,
    /// Where no header says `source`.
    source: String,
    content_type: String,
}

/// An event's headers and value, about to be sent.
pub(super) struct Wearing<'a> {
    pub headers: Vec<Header<'a>>,
    /// How many of the headers describe the event; the others are its context.
    pub about: usize,
    pub payload: Option<&'a [u8]>,
}

impl Dress {
    pub fn compile(spec: &Spec, columns: &mut Columns) -> Dress {
        Dress {
            blob: spec.blob.clone(),
            envelope: spec.envelope,
            kind: columns.optional(spec.kind.as_ref().filter(|_| spec.envelope != Envelope::None)),
            source: spec.source.clone(),
            content_type: spec.large.content_type.clone(),
        }
    }

    /// Whether headers may grow: in JSON a character takes six bytes at most.
    pub fn growth(&self) -> usize {
        if self.blob.is_some() || self.envelope == Envelope::Structured { 6 } else { 1 }
    }

    pub fn dress<'a>(
        &'a self,
        event: &'a Event,
        (id, topic, key): (&'a str, &str, Option<&[u8]>),
        wearing: Wearing<'a>,
    ) -> (Vec<Header<'a>>, Option<Cow<'a, [u8]>>) {
        let Wearing { mut headers, about, payload } = wearing;
        if let Some(name) = &self.blob {
            let context: Vec<Header<'a>> = headers.drain(about..).collect();
            if !context.is_empty() {
                headers.push((name.into(), Some(as_json(&context).into_bytes().into())));
            }
            return (headers, payload.map(Cow::Borrowed));
        }
        if self.envelope == Envelope::None {
            return (headers, payload.map(Cow::Borrowed));
        }
        let context = headers.split_off(about);
        let attributes = self.attributes(event, (id, topic, key), context, &mut headers);
        match payload.filter(|_| self.envelope == Envelope::Structured) {
            Some(payload) => {
                let whole = structured(&attributes, payload);
                headers.push((CONTENT_TYPE.into(), Some(STRUCTURED.as_bytes().into())));
                (headers, Some(whole.into_bytes().into()))
            }
            // A tombstone stays one: its attributes are headers.
            None => {
                for (name, value) in attributes {
                    let name = match name.as_ref() {
                        "datacontenttype" => CONTENT_TYPE.into(),
                        name => format!("{ATTRIBUTE}{name}").into(),
                    };
                    headers.push((name, Some(text_bytes(value))));
                }
                (headers, payload.map(Cow::Borrowed))
            }
        }
    }

    /// The attributes of an event. What of its context can be none stays among the headers; so does the
    /// trace, which tracers look for there.
    fn attributes<'a>(
        &'a self,
        event: &'a Event,
        (id, topic, key): (&'a str, &str, Option<&[u8]>),
        context: Vec<Header<'a>>,
        headers: &mut Vec<Header<'a>>,
    ) -> Vec<(Cow<'a, str>, Cow<'a, str>)> {
        let (mut source, mut subject, mut schema, mut content_type) = (None, None, None, None);
        let mut extensions: Vec<(Cow<'a, str>, Cow<'a, str>)> = Vec::new();
        for (name, value) in context {
            let Some(text) = value.as_ref().and_then(attribute_text) else {
                headers.push((name, value));
                continue;
            };
            match name.as_ref() {
                "source" => source = Some(text),
                "subject" => subject = Some(text),
                "dataschema" => schema = Some(text),
                TRACEPARENT | TRACESTATE => {
                    extensions.push((name.clone(), text));
                    headers.push((name, value));
                }
                named if named.eq_ignore_ascii_case(CONTENT_TYPE) => content_type = Some(text),
                named if is_extension(named) => match extensions.iter_mut().find(|(known, _)| *known == name)
                {
                    Some((_, known)) => *known = text,
                    None => extensions.push((name, text)),
                },
                _ => headers.push((name, value)),
            }
        }
        let text = |bytes: &'a [u8]| attribute_text(&Cow::Borrowed(bytes));
        let kind = self.kind.and_then(|index| event.row.get(index)).and_then(text);
        let key = key.and_then(|key| attribute_text(&Cow::Owned(key.to_vec())));
        let time = event.timestamp_ms.and_then(chrono::DateTime::from_timestamp_millis);
        let time = time.map(|time| time.to_rfc3339_opts(chrono::SecondsFormat::Millis, true).into());
        [
            ("specversion", Some(VERSION.into())),
            ("id", Some(id.into())),
            ("type", Some(kind.unwrap_or_else(|| topic.to_owned().into()))),
            ("source", Some(source.unwrap_or_else(|| self.source.as_str().into()))),
            ("time", time),
            ("subject", subject.or(key)),
            ("datacontenttype", Some(content_type.unwrap_or_else(|| self.content_type.as_str().into()))),
            ("dataschema", schema),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.into(), value?)))
        .chain(extensions)
        .collect()
    }
}

/// The URI-reference of a table: what `source` is unless a header says otherwise.
pub fn source_of(table: &str) -> String {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
    const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'_').remove(b'-').remove(b'~');
    format!("/{}", utf8_percent_encode(table, SEGMENT))
}

/// Names of attributes are lower-case letters and digits; these are taken, or not for everybody.
pub fn is_extension(name: &str) -> bool {
    const TAKEN: [&str; 6] = ["id", "type", "time", "specversion", "datacontenttype", "data"];
    !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        && !TAKEN.contains(&name)
        // Known to every tracer as a header.
        && name != super::w3c::BAGGAGE
}

/// A value of an attribute is text of at least one character, without control characters.
fn attribute_text<'a>(value: &Cow<'a, [u8]>) -> Option<Cow<'a, str>> {
    let text: Cow<'a, str> = match value {
        Cow::Borrowed(bytes) => std::str::from_utf8(bytes).ok()?.into(),
        Cow::Owned(bytes) => std::str::from_utf8(bytes).ok()?.to_owned().into(),
    };
    (!text.is_empty() && !text.chars().any(char::is_control)).then_some(text)
}

fn text_bytes(text: Cow<'_, str>) -> Cow<'_, [u8]> {
    match text {
        Cow::Borrowed(text) => text.as_bytes().into(),
        Cow::Owned(text) => text.into_bytes().into(),
    }
}

/// Headers as a JSON object of strings, in their order; of several of a name the last counts.
pub fn as_json(headers: &[Header<'_>]) -> String {
    let mut object = Map::new();
    for (name, value) in headers {
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        object.insert(name.clone().into_owned(), value.as_deref().map(text).into());
    }
    Value::Object(object).to_string()
}

/// A whole CloudEvent. JSON is in it as it is, text as a string, everything else in base64.
fn structured(attributes: &[(Cow<'_, str>, Cow<'_, str>)], payload: &[u8]) -> String {
    let content_type = attributes.iter().find(|(name, _)| name == "datacontenttype").map_or("", |(_, t)| t);
    let mut whole = String::with_capacity(payload.len() + 64 * attributes.len());
    let mut separator = '{';
    for (name, value) in attributes {
        whole.push(separator);
        whole.push_str(&quoted(name));
        whole.push(':');
        whole.push_str(&quoted(value));
        separator = ',';
    }
    let text = std::str::from_utf8(payload);
    match text {
        Ok(json) if is_json(content_type) && serde_json::from_str::<IgnoredAny>(json).is_ok() => {
            whole.push_str(",\"data\":");
            whole.push_str(json);
        }
        Ok(text) if content_type.starts_with("text/") => {
            whole.push_str(",\"data\":");
            whole.push_str(&quoted(text));
        }
        _ => {
            whole.push_str(",\"data_base64\":\"");
            STANDARD.encode_string(payload, &mut whole);
            whole.push('"');
        }
    }
    whole.push('}');
    whole
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// Whether a media type is JSON's.
pub fn is_json(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || kind == "text/json" || kind.ends_with("+json")
}

/// What a structured CloudEvent says.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened {
    /// All but the data, as text.
    pub attributes: Vec<(String, String)>,
    pub data: Option<Vec<u8>>,
}

/// Opens a structured CloudEvent; or says why it is none.
pub fn open(value: &[u8]) -> Result<Opened, String> {
    let members: serde_json::Result<std::collections::BTreeMap<String, &RawValue>> =
        serde_json::from_slice(value);
    let members = members.map_err(|error| format!("it is no JSON object: {error}"))?;
    let mut opened = Opened { attributes: Vec::new(), data: None };
    let content_type = members.get("datacontenttype").and_then(|raw| plain(raw));
    for (name, raw) in members {
        match name.as_str() {
            "data_base64" => {
                let text = plain(raw).ok_or("data_base64 is no text")?;
                let bytes = STANDARD.decode(text).map_err(|error| format!("data_base64: {error}"))?;
                opened.data = Some(bytes);
            }
            "data" if raw.get() == "null" => {}
            "data" => {
                // A string is the data itself, unless the data is JSON.
                let text = plain(raw).filter(|_| !content_type.as_deref().is_none_or(is_json));
                opened.data = Some(text.unwrap_or_else(|| raw.get().to_owned()).into_bytes());
            }
            _ if raw.get() == "null" => {}
            // Numbers and booleans are written as they are.
            _ => opened.attributes.push((name, plain(raw).unwrap_or_else(|| raw.get().to_owned()))),
        }
    }
    match opened.attributes.iter().any(|(name, _)| name == "specversion") {
        true => Ok(opened),
        false => Err("it has no specversion".into()),
    }
}

/// A JSON string's text.
fn plain(raw: &RawValue) -> Option<String> {
    serde_json::from_str(raw.get()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::{
        event::{Place, Row},
        record::{Rules, large::LargeSpec},
    };

    fn rules(envelope: Envelope, blob: Option<&str>) -> Rules {
        Rules::compile(&Spec {
            id: "id".into(),
            payload: "payload".into(),
            topic: Some("topic".into()),
            key: Some("key".into()),
            kind: Some("type".into()),
            headers: Some("headers".into()),
            headers_from: vec!["tenant_id".into()],
            headers_static: vec![("source".into(), "/shop".into())],
            allow: vec!["*".into()],
            headers_max_bytes: 16 << 10,
            event_type_header: true,
            blob: blob.map(str::to_owned),
            envelope,
            source: source_of("public.outbox"),
            large: LargeSpec { content_type: "application/json".into(), ..LargeSpec::default() },
            ..Spec::default()
        })
        .unwrap()
    }

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn row(rules: &Rules, headers: &str, payload: Option<&[u8]>) -> Event {
        let mut row = Row::default();
        for column in rules.columns() {
            row.push(match column.as_str() {
                "id" => Some(b"e1"),
                "topic" => Some(b"orders"),
                "key" => Some(b"k-1"),
                "type" => Some(b"OrderPlaced"),
                "tenant_id" => Some(b"acme"),
                "headers" => Some(headers.as_bytes()),
                "payload" => payload,
                _ => None,
            });
        }
        let timestamp_ms = Some(1_767_323_045_678);
        Event { place: Place::Int(1), row, timestamp_ms, unread_bytes: None, replay: None }
    }

    type Sent = (Vec<(String, Option<String>)>, Option<Vec<u8>>);

    fn sent(rules: &Rules, event: &Event) -> Sent {
        let record = rules.prepare(event, None).unwrap().record;
        let text = |value: Cow<'_, [u8]>| String::from_utf8(value.into_owned()).unwrap();
        let headers = record.headers.into_iter().map(|(name, value)| (name.into_owned(), value.map(text)));
        (headers.collect(), record.payload.map(Cow::into_owned))
    }

    fn get<'a>(sent: &'a Sent, name: &str) -> Option<&'a str> {
        sent.0.iter().find(|(known, _)| known == name)?.1.as_deref()
    }

    fn names(sent: &Sent) -> Vec<&str> {
        sent.0.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn a_blob_has_all_of_the_context_and_nothing_else_is_moved() {
        let rules = rules(Envelope::None, Some("x-context"));
        let headers = format!(r#"{{"traceparent":"{TRACE}","u":"\"ü\n","n":null}}"#);
        let event = row(&rules, &headers, Some(b"{}"));
        let sent = sent(&rules, &event);
        assert_eq!(names(&sent), ["id", "eventType", "x-context"]);
        let blob: Value = serde_json::from_str(get(&sent, "x-context").unwrap()).unwrap();
        let all =
            json!({ "tenant_id": "acme", "source": "/shop", "traceparent": TRACE, "u": "\"ü\n", "n": null });
        assert_eq!(blob, all);
        assert_eq!(sent.1.as_deref(), Some(&b"{}"[..]));
    }

    #[test]
    fn binary_attributes_are_headers_and_what_can_be_none_stays_one() {
        let rules = rules(Envelope::Binary, None);
        let headers = format!(
            r#"{{"traceparent":"{TRACE}","baggage":"u=7","authid":"u-7","x-request-id":"r-1","ce_id":"mine","Content-Type":"text/plain","n":null,"time":"x","odd":"a\nb"}}"#
        );
        let event = row(&rules, &headers, Some(b"\x00raw"));
        let sent = sent(&rules, &event);
        let expected = [
            ("id", Some("e1")),
            ("eventType", Some("OrderPlaced")),
            ("tenant_id", Some("acme")),
            ("traceparent", Some(TRACE)),
            ("baggage", Some("u=7")),
            ("x-request-id", Some("r-1")),
            ("n", None),
            ("time", Some("x")),
            ("odd", Some("a\nb")),
            ("ce_specversion", Some("1.0")),
            ("ce_id", Some("e1")),
            ("ce_type", Some("OrderPlaced")),
            ("ce_source", Some("/shop")),
            ("ce_time", Some("2026-01-02T03:04:05.678Z")),
            ("ce_subject", Some("k-1")),
            ("content-type", Some("text/plain")),
            ("ce_traceparent", Some(TRACE)),
            ("ce_authid", Some("u-7")),
        ];
        let found: Vec<(&str, Option<&str>)> =
            sent.0.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
        assert_eq!(found, expected);
        assert_eq!(sent.1.as_deref(), Some(&b"\x00raw"[..]));
        let dropped = rules.prepare(&event, None).unwrap().dropped;
        assert_eq!(dropped.counts().find(|(reason, _)| *reason == "shadowed"), Some(("shadowed", 1)));
    }

    #[test]
    fn a_structured_event_is_one_object_and_a_tombstone_stays_one() {
        let rules = rules(Envelope::Structured, None);
        let headers = format!(r#"{{"traceparent":"{TRACE}","authid":"u-7","x-request-id":"r-1"}}"#);
        let sent_json = sent(&rules, &row(&rules, &headers, Some(br#"{"a": 1.10}"#)));
        let names_of = names(&sent_json);
        assert_eq!(names_of, ["id", "eventType", "tenant_id", "traceparent", "x-request-id", "content-type"]);
        assert_eq!(get(&sent_json, "content-type"), Some(STRUCTURED));
        let value = String::from_utf8(sent_json.1.clone().unwrap()).unwrap();
        assert!(value.ends_with(r#","data":{"a": 1.10}}"#), "byte for byte: {value}");
        let object: Value = serde_json::from_str(&value).unwrap();
        let expected = json!({
            "specversion": "1.0", "id": "e1", "type": "OrderPlaced", "source": "/shop", "subject": "k-1",
            "time": "2026-01-02T03:04:05.678Z", "datacontenttype": "application/json",
            "traceparent": TRACE, "authid": "u-7", "data": { "a": 1.10 },
        });
        assert_eq!(object, expected);

        for (payload, content_type, member, as_it_is) in [
            (&b"\xff\x00"[..], "application/octet-stream", "data_base64", json!("/wA=")),
            (b"{broken", "application/json", "data_base64", json!("e2Jyb2tlbg==")),
            (b"a \"word\"", "text/plain", "data", json!("a \"word\"")),
            (b"", "text/plain", "data", json!("")),
        ] {
            let headers = format!(r#"{{"content-type":"{content_type}"}}"#);
            let sent = sent(&rules, &row(&rules, &headers, Some(payload)));
            let object: Value = serde_json::from_slice(&sent.1.clone().unwrap()).unwrap();
            assert_eq!(object[member], as_it_is, "{content_type}");
            assert_eq!(open(&sent.1.unwrap()).unwrap().data.as_deref(), Some(payload), "{content_type}");
        }
        let tombstone = sent(&rules, &row(&rules, "{}", None));
        assert_eq!((tombstone.1.as_ref(), get(&tombstone, "ce_id")), (None, Some("e1")));
    }

    #[test]
    fn what_is_needed_is_there_whatever_the_row_has() {
        let rules = Rules::compile(&Spec {
            id: "id".into(),
            payload: "payload".into(),
            topic_template: Some("t".into()),
            envelope: Envelope::Binary,
            source: source_of("my outbox"),
            large: LargeSpec { content_type: "application/json".into(), ..LargeSpec::default() },
            ..Spec::default()
        })
        .unwrap();
        let mut row = Row::default();
        [Some(&b"e1"[..]), Some(b"x")].into_iter().for_each(|value| row.push(value));
        let event = Event { place: Place::Int(1), row, timestamp_ms: None, unread_bytes: None, replay: None };
        let sent = sent(&rules, &event);
        assert_eq!((get(&sent, "ce_type"), get(&sent, "ce_source")), (Some("t"), Some("/my%20outbox")));
        assert_eq!((get(&sent, "ce_time"), get(&sent, "ce_subject")), (None, None));
    }

    #[test]
    fn what_is_no_cloudevent_is_said() {
        for (value, why) in [
            (&b"[]"[..], "no JSON object"),
            (b"{}", "no specversion"),
            (br#"{"specversion":"1.0","data_base64":"*"}"#, "data_base64"),
        ] {
            let said = open(value).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
        let numbers = open(br#"{"specversion":"1.0","sequence":7,"n":null,"data":null}"#).unwrap();
        let expected = [("sequence", "7"), ("specversion", "1.0")];
        let expected: Vec<_> = expected.map(|(n, v)| (n.to_owned(), v.to_owned())).into();
        assert_eq!(numbers, Opened { attributes: expected, data: None });
    }

    proptest! {
        /// Whatever the payload is, it comes out of its envelope as it was.
        #[test]
        fn a_payload_comes_out_as_it_went_in(
            payload in proptest::collection::vec(any::<u8>(), 0..60),
            kind in 0..3_usize,
        ) {
            let content_type = ["application/json", "text/plain", "image/png"][kind];
            let rules = rules(Envelope::Structured, None);
            let headers = format!(r#"{{"content-type":"{content_type}"}}"#);
            let value = sent(&rules, &row(&rules, &headers, Some(&payload))).1.unwrap();
            prop_assert_eq!(open(&value).unwrap().data, Some(payload));
        }
    }
}
