//! Logical messages as events: `pg_logical_emit_message(true, prefix, '{"id": …}')`, an outbox without a
//! table. Their members are the columns of the event.

use std::collections::HashMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::value::RawValue;

use crate::{
    event::{Event, Place, Row},
    source::database::TableSpec,
};

/// The member with a payload that is no text.
const BASE64: &str = "payload_base64";

/// The event of a message. One that is no JSON object, or is misspelt, has its whole content as the payload and no id: it
/// is parked, for somebody to look at.
pub fn event(spec: &TableSpec, content: &[u8], place: Place, timestamp_ms: i64) -> Event {
    let members: Option<HashMap<String, &RawValue>> = serde_json::from_slice(content).ok();
    let members = members.filter(|members| !is_misspelt(spec, members));
    let mut row = Row::with_capacity(spec.columns.len(), content.len());
    let mut unread_bytes = None;
    for name in &spec.columns {
        let is_payload = *name == spec.payload;
        let value = match &members {
            Some(members) => match members.get(name.as_str()) {
                Some(raw) => text(raw),
                None if is_payload => members.get(BASE64).and_then(|raw| decoded(raw)),
                None => None,
            },
            None => is_payload.then(|| content.to_vec()),
        };
        let too_large = value.as_ref().map_or(0, Vec::len) as u64;
        if is_payload && too_large > spec.max_payload as u64 {
            unread_bytes = Some(too_large);
            row.push(None);
        } else {
            row.push(value.as_deref());
        }
    }
    Event { place, row, timestamp_ms: Some(timestamp_ms), unread_bytes, replay: None }
}

/// A payload that is absent is null, a tombstone; but not where there is a member that nobody knows, such as `paylod`.
fn is_misspelt(spec: &TableSpec, members: &HashMap<String, &RawValue>) -> bool {
    let has_payload = [spec.payload.as_str(), BASE64].iter().any(|name| members.contains_key(*name));
    !has_payload && members.keys().any(|name| !spec.columns.contains(name))
}

/// A message that is too large to be read: it is known by its size.
pub fn unread(spec: &TableSpec, bytes: usize, place: Place, timestamp_ms: i64) -> Event {
    let mut row = Row::with_capacity(spec.columns.len(), 0);
    spec.columns.iter().for_each(|_| row.push(None));
    Event { place, row, timestamp_ms: Some(timestamp_ms), unread_bytes: Some(bytes as u64), replay: None }
}

/// A string is its text; null is NULL; anything else goes out byte for byte as it stands.
fn text(raw: &RawValue) -> Option<Vec<u8>> {
    match raw.get() {
        "null" => None,
        quoted if quoted.starts_with('"') => {
            serde_json::from_str::<String>(quoted).ok().map(String::into_bytes)
        }
        other => Some(other.as_bytes().to_vec()),
    }
}

/// Bytes in base64 (RFC 4648, section 4). What is none stays as it is: somebody has to see it.
fn decoded(raw: &RawValue) -> Option<Vec<u8>> {
    let text = text(raw)?;
    Some(STANDARD.decode(&text).unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{AfterPublish, Order};

    fn spec() -> TableSpec {
        let columns = ["id", "topic", "key", "payload", "headers"].map(str::to_owned).to_vec();
        TableSpec {
            name: "message:outbox".into(),
            rows: crate::source::database::Rows::Messages { prefix: "outbox".into() },
            optional: columns.clone(),
            columns,
            id: "id".into(),
            payload: "payload".into(),
            sequence: None,
            order: Order::Key,
            timestamps: Vec::new(),
            published_at: None,
            tx: None,
            after_publish: AfterPublish::Delete,
            retention: None,
            max_payload: 20,
            shared: None,
            placing: crate::source::database::Placing::default(),
            unreadable: crate::source::times::Unreadable::default(),
        }
    }

    fn cells(content: &str) -> Vec<Option<String>> {
        let event = event(&spec(), content.as_bytes(), Place::Int(1), 5);
        (0..5)
            .map(|index| event.row.get(index).map(|cell| String::from_utf8_lossy(cell).into_owned()))
            .collect()
    }

    #[test]
    fn members_are_the_columns() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            cells(r#"{"id": "a", "topic": "t", "key": 7, "payload": {"n" : 1.0}, "headers": {"x":"y"}}"#),
            [some("a"), some("t"), some("7"), some(r#"{"n" : 1.0}"#), some(r#"{"x":"y"}"#)]
        );
        assert_eq!(cells(r#"{"id":"a","topic":"t","payload":"é"}"#)[3], some("é"));
        assert_eq!(cells(r#"{"id":"a","payload_base64":"aGk="}"#)[3], some("hi"));
        assert_eq!(cells(r#"{"id":"a","payload_base64":"?"}"#)[3], some("?"));
        assert_eq!(cells(r#"{"id":"a","payload":null}"#)[3], None);
        assert_eq!(cells(r#"{"id":"a"}"#)[3], None);
        let misspelt = r#"{"id":"a","pay":1}"#;
        assert_eq!(cells(misspelt), [None, None, None, some(misspelt), None]);
        assert_eq!(cells("[1]"), [None, None, None, some("[1]"), None]);
    }

    #[test]
    fn a_payload_above_the_limit_is_not_kept() {
        let content = format!(r#"{{"id":"a","payload":"{}"}}"#, "x".repeat(21));
        let event = event(&spec(), content.as_bytes(), Place::Int(1), 5);
        assert_eq!((event.unread_bytes, event.row.get(3)), (Some(21), None));
        assert_eq!(event.row.get(0), Some(&b"a"[..]));
    }
}
