//! Context that comes folded up: all in one header, or as a CloudEvent. It is laid open as if each of it
//! were a header; what is no such thing is left as it is. The mirror image of `record::envelope`.

use bytes::Bytes;
use serde_json::{Map, Value};

use super::Headers;
use crate::record::envelope::{ATTRIBUTE, CONTENT_TYPE, STRUCTURED, is_extension, open};

/// Lays the headers of a record open. `blob` is the header that has them all, where there is one.
pub(super) fn headers(headers: &mut Headers, blob: Option<&str>) {
    if let Some(name) = blob
        && let Some(object) = headers.get(name).and_then(|value| serde_json::from_slice(value).ok())
    {
        let object: Map<String, Value> = object;
        headers.0.retain(|(known, _)| known != name);
        for (name, value) in object {
            let text = match value {
                Value::Null => None,
                Value::String(text) => Some(Bytes::from(text)),
                other => Some(Bytes::from(other.to_string())),
            };
            add(headers, name, text);
        }
    }
    extensions(headers);
}

/// Attributes of the context become headers without their prefix, beside those that have it.
fn extensions(headers: &mut Headers) {
    let of = |name: &str| name.strip_prefix(ATTRIBUTE).filter(|name| is_context(name)).map(str::to_owned);
    let found: Vec<(String, Option<Bytes>)> =
        headers.0.iter().filter_map(|(name, value)| Some((of(name)?, value.clone()))).collect();
    for (name, value) in found {
        add(headers, name, value);
    }
}

/// What is about the event is not about its request.
fn is_context(name: &str) -> bool {
    is_extension(name) && !["source", "subject", "dataschema", "dataref"].contains(&name)
}

/// What is there already wins.
fn add(headers: &mut Headers, name: String, value: Option<Bytes>) {
    if headers.find(&name).is_none() {
        headers.0.push((name, value));
    }
}

/// The payload of a structured CloudEvent, and its attributes among the headers; or the value as it is.
pub(super) fn structured(headers: &mut Headers, value: Bytes) -> Option<Bytes> {
    let is_structured = headers.text(CONTENT_TYPE).is_some_and(|kind| kind.starts_with(STRUCTURED));
    let Some(opened) = is_structured.then(|| open(&value).ok()).flatten() else { return Some(value) };
    headers.0.retain(|(name, _)| name != CONTENT_TYPE);
    for (name, value) in opened.attributes {
        let name = match name.as_str() {
            "datacontenttype" => CONTENT_TYPE.to_owned(),
            name => format!("{ATTRIBUTE}{name}"),
        };
        add(headers, name, Some(value.into()));
    }
    extensions(headers);
    opened.data.map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use super::{super::headers::tests::headers as of, *};

    #[test]
    fn one_header_is_laid_open_and_what_is_none_is_left() {
        let mut all = of(&[("id", "1"), ("x-context", r#"{"u":"7","n":null,"id":"mine","d":1.10}"#)]);
        headers(&mut all, Some("x-context"));
        let mut expected = of(&[("id", "1"), ("u", "7")]);
        expected.0.push(("n".into(), None));
        expected.0.push(("d".into(), Some("1.1".into())));
        assert_eq!(all, expected);
        for value in ["[1]", "broken", r#""text""#] {
            let before = of(&[("x-context", value)]);
            let mut all = before.clone();
            headers(&mut all, Some("x-context"));
            assert_eq!(all, before);
        }
        let before = of(&[("x-context", "{}"), ("a", "b")]);
        let mut all = before.clone();
        headers(&mut all, None);
        assert_eq!(all, before, "nobody said that it has any");
    }

    #[test]
    fn attributes_of_the_context_are_headers_and_go_on() {
        let mut all = of(&[
            ("id", "1"),
            ("ce_id", "1"),
            ("ce_source", "/shop"),
            ("ce_authid", "u-7"),
            ("traceparent", "t"),
            ("ce_traceparent", "t"),
        ]);
        headers(&mut all, None);
        assert_eq!(all.text("authid"), Some("u-7"));
        assert_eq!(all.onward(), of(&[("traceparent", "t"), ("authid", "u-7")]));
    }

    #[test]
    fn a_structured_event_gives_back_its_payload() {
        let mut all = of(&[("id", "1"), ("content-type", "application/cloudevents+json; charset=UTF-8")]);
        let value =
            r#"{"specversion":"1.0","type":"E","authid":"u","datacontenttype":"text/plain","data":"x\n"}"#;
        assert_eq!(structured(&mut all, value.into()).as_deref(), Some(&b"x\n"[..]));
        assert_eq!((all.text("ce_type"), all.text("authid")), (Some("E"), Some("u")));
        assert_eq!(all.text("content-type"), Some("text/plain"));
        for (kind, value) in [("application/json", value), (STRUCTURED, "[]"), (STRUCTURED, "{}")] {
            let before = of(&[("content-type", kind)]);
            let mut all = before.clone();
            assert_eq!(structured(&mut all, value.into()).as_deref(), Some(value.as_bytes()));
            assert_eq!(all, before);
        }
    }
}
