//! The headers of a record, and which of them are the request's context.

use bytes::Bytes;
use rdkafka::message::{Header, OwnedHeaders};

use crate::record::wire;

/// Headers that describe this event or how it travelled, and are wrong on any other.
const OF_THE_EVENT: [&str; 10] = [
    wire::ID,
    "eventType",
    "version",
    "content-type",
    wire::CONTENT_ENCODING,
    wire::LINKEDIN,
    wire::SILVERBACK_INDEX,
    wire::SILVERBACK_COUNT,
    wire::SILVERBACK_LAST,
    wire::SILVERBACK_FIRST_OFFSET,
];
const PREFIXES_OF_THE_EVENT: [&str; 3] = ["whippet-", "__large.message.backed.", "ce_"];

/// Headers in their order; a name may come more than once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(pub Vec<(String, Option<Bytes>)>);

impl Headers {
    /// The value of a header; the last one where there are several, as Java's clients have it.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.find(name)?.as_deref()
    }

    /// The same, where it is text.
    pub fn text(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.get(name)?).ok()
    }

    pub(super) fn find(&self, name: &str) -> Option<&Option<Bytes>> {
        self.0.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    /// The trace that the event belongs to (W3C).
    pub fn traceparent(&self) -> Option<&str> {
        self.text("traceparent")
    }

    pub fn tracestate(&self) -> Option<&str> {
        self.text("tracestate")
    }

    pub fn baggage(&self) -> Option<&str> {
        self.text("baggage")
    }

    /// The request's context: what to put on everything that is produced because of this event. That is
    /// all headers but those that describe the event itself and how it travelled. Who traces replaces
    /// `traceparent` by that of the span at hand.
    pub fn onward(&self) -> Headers {
        let is_context = |name: &str| {
            !OF_THE_EVENT.contains(&name)
                && !PREFIXES_OF_THE_EVENT.iter().any(|start| name.starts_with(start))
        };
        Headers(self.0.iter().filter(|(name, _)| is_context(name)).cloned().collect())
    }
}

/// For a record that is produced with `rdkafka`.
impl From<Headers> for OwnedHeaders {
    fn from(headers: Headers) -> OwnedHeaders {
        let owned = OwnedHeaders::new_with_capacity(headers.0.len());
        headers
            .0
            .iter()
            .fold(owned, |owned, (name, value)| owned.insert(Header { key: name, value: value.as_deref() }))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn headers(of: &[(&str, &str)]) -> Headers {
        let owned = |(name, value): &(&str, &str)| {
            ((*name).to_owned(), Some(Bytes::copy_from_slice(value.as_bytes())))
        };
        Headers(of.iter().map(owned).collect())
    }

    #[test]
    fn the_last_of_a_name_counts_and_null_is_no_text() {
        let mut all = headers(&[("a", "1"), ("a", "2")]);
        all.0.push(("n".into(), None));
        assert_eq!((all.text("a"), all.text("n"), all.text("x")), (Some("2"), None, None));
        assert_eq!(all.find("n"), Some(&None));
    }

    #[test]
    fn the_context_goes_on_and_what_is_about_the_event_does_not() {
        let context = [("traceparent", "t"), ("tenant", "a"), ("baggage", "b"), ("tenant", "c")];
        let of_the_event = [
            ("id", "1"),
            ("eventType", "E"),
            ("version", "2"),
            ("content-type", "application/json"),
            ("content-encoding", "gzip"),
            ("whippet-ref-uri", "u"),
            ("whippet-chunk-id", "c"),
            ("whippet-replay", "now"),
            ("__large.message.backed.value", "\u{1}"),
            ("__large.message.backed..compression", "\u{1}"),
            ("_lm", "x"),
            ("x-chunk-index", "0"),
            ("ce_id", "1"),
        ];
        let all = headers(&[&context[..2], &of_the_event, &context[2..]].concat());
        assert_eq!(all.onward(), headers(&context));
        assert_eq!((all.traceparent(), all.tracestate(), all.baggage()), (Some("t"), None, Some("b")));
    }
}
