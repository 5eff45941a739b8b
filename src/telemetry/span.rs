//! Spans of an event: its wait in the outbox, its way to Kafka, and what a consumer does because of it.
//!
//! They belong to the trace that the row was written in, as children of the span that wrote it, and each
//! links to it too, as OpenTelemetry's conventions for messaging (1.44, in development) ask of a sender
//! that did not create the message's context. What the record carries stays the row's own.

use std::{
    borrow::Cow,
    time::{Duration, SystemTime},
};

use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::Spans;
use crate::record::{Landed, w3c::Parent};

/// An event on its way to Kafka, from the outbox to the answer.
#[derive(Clone, Copy, Debug)]
pub struct Sending<'a> {
    pub event_id: &'a str,
    pub table: &'a str,
    pub topic: &'a str,
    /// By the clock of whoever wrote the row, in milliseconds since the Unix epoch.
    pub created_ms: Option<i64>,
    pub sent: SystemTime,
    pub answered: SystemTime,
    /// Where Kafka has it, where it took it.
    pub landed: Option<Landed>,
    /// What Kafka said, where it took nothing.
    pub error: Option<&'a str>,
}

/// The spans of an event. It has waited in the outbox once, until it is taken.
pub(super) fn of(
    parent: &Parent,
    sending: &Sending<'_>,
    scope: &InstrumentationScope,
    server: &[KeyValue],
) -> impl Iterator<Item = SpanData> {
    let created = sending.created_ms.and_then(|ms| u64::try_from(ms).ok());
    let created = created.map(|ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms));
    let waited = created.filter(|_| sending.error.is_none()).map(|created| {
        let attributes = vec![
            KeyValue::new("whippet.table", sending.table.to_owned()),
            KeyValue::new("messaging.message.id", sending.event_id.to_owned()),
        ];
        // The clocks of the application, the database and this process are not one.
        let times = (created.min(sending.sent), sending.sent);
        let name = format!("outbox {}", sending.table);
        span(parent, name.into(), SpanKind::Internal, times, attributes, scope)
    });
    let mut attributes = messaging("send", "send", sending.topic, sending.event_id, server);
    if let Some(Landed { partition, offset }) = sending.landed {
        // A name, in OpenTelemetry's conventions.
        attributes.push(KeyValue::new("messaging.destination.partition.id", partition.to_string()));
        attributes.extend(offset.map(|offset| KeyValue::new("messaging.kafka.offset", offset)));
    }
    attributes.extend(sending.error.map(|error| KeyValue::new("error.type", error.to_owned())));
    let times = (sending.sent, sending.answered);
    let name = format!("send {}", sending.topic);
    let mut sent = span(parent, name.into(), SpanKind::Client, times, attributes, scope);
    if let Some(error) = sending.error {
        sent.status = Status::error(error.to_owned());
    }
    waited.into_iter().chain([sent])
}

fn messaging(
    name: &'static str,
    kind: &'static str,
    topic: &str,
    event_id: &str,
    server: &[KeyValue],
) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("messaging.system", "kafka"),
        KeyValue::new("messaging.operation.name", name),
        KeyValue::new("messaging.operation.type", kind),
        KeyValue::new("messaging.destination.name", topic.to_owned()),
        KeyValue::new("messaging.message.id", event_id.to_owned()),
    ];
    attributes.extend_from_slice(server);
    attributes
}

fn span(
    parent: &Parent,
    name: Cow<'static, str>,
    kind: SpanKind,
    (start_time, end_time): (SystemTime, SystemTime),
    attributes: Vec<KeyValue>,
    scope: &InstrumentationScope,
) -> SpanData {
    let (trace, flags) = (TraceId::from_bytes(parent.trace), TraceFlags::new(parent.flags));
    let state =
        parent.state.as_deref().and_then(|state| state.parse::<TraceState>().ok()).unwrap_or_default();
    let of_row = SpanContext::new(trace, SpanId::from_bytes(parent.span), flags, true, state.clone());
    let mut links = SpanLinks::default();
    links.links.push(Link::with_context(of_row));
    SpanData {
        // Zero is no id.
        span_context: SpanContext::new(trace, fastrand::u64(1..).into(), flags, false, state),
        parent_span_id: SpanId::from_bytes(parent.span),
        parent_span_is_remote: true,
        span_kind: kind,
        name,
        start_time,
        // A clock may be set back.
        end_time: end_time.max(start_time),
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links,
        status: Status::Unset,
        instrumentation_scope: scope.clone(),
    }
}

/// What a consumer does because of an event: its span is sent when this is dropped.
#[derive(Debug)]
pub struct Processing {
    spans: Spans,
    span: Option<SpanData>,
}

impl Spans {
    /// Begins the span of processing an event from this topic.
    pub fn processing(
        &self,
        parent: &Parent,
        topic: &str,
        event_id: &str,
        group: Option<&str>,
    ) -> Processing {
        let mut attributes = messaging("process", "process", topic, event_id, &self.server);
        attributes
            .extend(group.map(|group| KeyValue::new("messaging.consumer.group.name", group.to_owned())));
        let now = SystemTime::now();
        let name = format!("process {topic}");
        let span = span(parent, name.into(), SpanKind::Consumer, (now, now), attributes, &self.scope);
        Processing { spans: self.clone(), span: Some(span) }
    }
}

impl Processing {
    /// The `traceparent` of what is produced meanwhile.
    pub fn traceparent(&self) -> String {
        let Some(span) = &self.span else { return String::new() };
        let context = &span.span_context;
        format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags().to_u8())
    }

    /// It failed, for a reason of few words that are the same each time.
    pub fn failed(&mut self, error: &str) {
        if let Some(span) = &mut self.span {
            span.status = Status::error(error.to_owned());
            span.attributes.push(KeyValue::new("error.type", error.to_owned()));
        }
    }
}

impl Drop for Processing {
    fn drop(&mut self) {
        if let Some(mut span) = self.span.take() {
            span.end_time = SystemTime::now().max(span.start_time);
            self.spans.put(span);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn at(ms: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(ms)
    }

    fn spans(sending: Sending<'_>) -> Vec<SpanData> {
        let parent = Parent::parse(TRACEPARENT.as_bytes(), Some("a=b")).unwrap();
        of(&parent, &sending, &InstrumentationScope::default(), &super::super::server("k1:9092,k2:9092"))
            .collect()
    }

    const SENDING: Sending<'static> = Sending {
        event_id: "e1",
        table: "outbox",
        topic: "orders",
        created_ms: Some(1_000),
        sent: SystemTime::UNIX_EPOCH,
        answered: SystemTime::UNIX_EPOCH,
        landed: None,
        error: None,
    };

    fn attribute(span: &SpanData, name: &str) -> Option<String> {
        let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == name)?;
        Some(found.value.as_str().into_owned())
    }

    #[test]
    fn both_spans_belong_to_the_rows_trace_and_link_to_its_span() {
        let both = spans(Sending { sent: at(3_000), answered: at(3_005), ..SENDING });
        let [waited, sent] = &both[..] else { panic!("{both:?}") };
        assert_eq!((&*waited.name, &waited.span_kind), ("outbox outbox", &SpanKind::Internal));
        assert_eq!((waited.start_time, waited.end_time), (at(1_000), at(3_000)));
        assert_eq!((&*sent.name, &sent.span_kind), ("send orders", &SpanKind::Client));
        assert_eq!((sent.start_time, sent.end_time), (at(3_000), at(3_005)));
        for span in &both {
            let of_row = &span.links.links[0].span_context;
            assert_eq!(span.span_context.trace_id().to_string(), TRACEPARENT[3..35]);
            assert_eq!(span.parent_span_id.to_string(), TRACEPARENT[36..52]);
            assert_eq!(
                (of_row.trace_id(), of_row.span_id()),
                (span.span_context.trace_id(), span.parent_span_id)
            );
            assert!(of_row.is_remote() && of_row.is_sampled());
            assert_eq!(span.span_context.trace_state().header(), "a=b");
            assert_ne!(span.span_context.span_id(), span.parent_span_id);
        }
        assert_eq!(attribute(sent, "messaging.destination.name").as_deref(), Some("orders"));
        assert_eq!(attribute(sent, "messaging.message.id").as_deref(), Some("e1"));
        assert_eq!(attribute(sent, "server.address").as_deref(), Some("k1"));
        assert_eq!(attribute(sent, "server.port").as_deref(), Some("9092"));
        assert_eq!(sent.status, Status::Unset);
        assert_eq!(attribute(sent, "messaging.destination.partition.id"), None);
    }

    #[test]
    fn what_kafka_took_is_found_by_partition_and_offset() {
        let sent = |offset| {
            let landed = Some(Landed { partition: 3, offset });
            spans(Sending { created_ms: None, landed, ..SENDING }).remove(0)
        };
        let known = sent(Some(17));
        assert_eq!(attribute(&known, "messaging.destination.partition.id").as_deref(), Some("3"));
        assert_eq!(attribute(&known, "messaging.kafka.offset").as_deref(), Some("17"));
        assert_eq!(attribute(&sent(None), "messaging.kafka.offset"), None);
    }

    #[test]
    fn a_clock_that_is_behind_makes_no_span_that_ends_before_it_begins() {
        let both =
            spans(Sending { created_ms: Some(9_000), sent: at(3_000), answered: at(2_000), ..SENDING });
        assert!(both.iter().all(|span| span.start_time == at(3_000) && span.end_time == at(3_000)));
        assert_eq!(spans(Sending { created_ms: None, ..SENDING }).len(), 1);
        assert_eq!(spans(Sending { created_ms: Some(-1), ..SENDING }).len(), 1);
    }

    #[test]
    fn what_kafka_refuses_is_an_error_and_the_event_goes_on_waiting() {
        let failed = spans(Sending { error: Some("MessageSizeTooLarge"), ..SENDING });
        let [sent] = &failed[..] else { panic!("{failed:?}") };
        assert_eq!(sent.status, Status::error("MessageSizeTooLarge"));
        assert_eq!(attribute(sent, "error.type").as_deref(), Some("MessageSizeTooLarge"));
    }
}
