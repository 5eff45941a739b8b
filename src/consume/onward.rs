//! From an event to what is produced because of it: the request's context, by the rules that a relay has
//! for it, and the span of what is done meanwhile.

use std::borrow::Cow;

use bytes::Bytes;

use super::{Event, Headers};
use crate::{
    record::{
        Filter, envelope,
        w3c::{Parent, TRACEPARENT},
    },
    telemetry::{self, Spans},
};

/// What goes on from an event: rules, and who makes spans.
///
/// ```no_run
/// use whippet::{consume::{Event, Onward}, telemetry::Telemetry};
///
/// # async fn example(event: Event) -> anyhow::Result<()> {
/// let telemetry = Telemetry::open("http://otel:4317", "billing", "billing-1", "kafka:9092")?;
/// let onward = Onward::new(&["*"], &["x-secret-*"], 16 << 10).traced(&telemetry.spans, Some("billing"));
/// let work = onward.begin(&event);
/// // For a record that is produced:
/// let _headers: rdkafka::message::OwnedHeaders = work.context().clone().into();
/// // For a row that is written: SELECT set_config('whippet.context', $1, true)
/// let _text: String = work.context().json();
/// // The span ends here.
/// drop(work);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Onward {
    filter: Filter,
    spans: Option<Spans>,
    group: Option<String>,
}

impl Default for Onward {
    /// What a relay does unless it is told otherwise.
    fn default() -> Onward {
        Onward::new(&["*"], &[], 16 << 10)
    }
}

impl Onward {
    /// As `headers.allow`, `deny` and `max_bytes` of a relay: globs over names without regard to case; `deny`
    /// wins; where the budget is short, the trace is the last to go. A bad `traceparent` does not go on.
    pub fn new(allow: &[&str], deny: &[&str], max_bytes: usize) -> Onward {
        let owned = |globs: &[&str]| globs.iter().map(|&glob| glob.to_owned()).collect::<Vec<String>>();
        Onward { filter: Filter::new(&owned(allow), &owned(deny), max_bytes), spans: None, group: None }
    }

    /// A span for each event whose trace is recorded.
    pub fn traced(self, spans: &Spans, group: Option<&str>) -> Onward {
        Onward { spans: Some(spans.clone()), group: group.map(str::to_owned), ..self }
    }

    /// Begins what is done because of an event. In the event's trace, if that is recorded: as a child of the
    /// span that wrote the event, and linked to it.
    pub fn begin(&self, event: &Event) -> Work {
        let onward = event.headers.onward().0;
        let own = onward
            .into_iter()
            .map(|(name, value)| (Cow::Owned(name), value.map(|value| Cow::Owned(value.to_vec()))));
        let mut kept = Vec::new();
        self.filter.admit(own.collect(), &mut kept, &mut crate::record::Dropped::default());
        let text = |value: Cow<'_, [u8]>| Bytes::from(value.into_owned());
        let kept = kept.into_iter().map(|(name, value)| (name.into_owned(), value.map(text)));
        let mut context = Headers(kept.collect());
        let parent = context.traceparent().and_then(|traceparent| {
            Parent::parse(traceparent.as_bytes(), context.tracestate()).filter(Parent::is_sampled)
        });
        let span = self.spans.as_ref().zip(parent).map(|(spans, parent)| {
            let id = event.id().unwrap_or_default();
            spans.processing(&parent, &event.place.topic, id, self.group.as_deref())
        });
        if let Some(span) = &span {
            let traceparent = Bytes::from(span.traceparent());
            let of_event = context.0.iter_mut().filter(|(name, _)| name == TRACEPARENT);
            of_event.for_each(|(_, value)| *value = Some(traceparent.clone()));
        }
        Work { span, context }
    }
}

/// What is done because of an event. Its span ends when this is dropped.
#[derive(Debug)]
pub struct Work {
    span: Option<telemetry::Processing>,
    context: Headers,
}

impl Work {
    /// What to put on everything that is produced meanwhile.
    pub fn context(&self) -> &Headers {
        &self.context
    }

    /// It failed: a few words that are the same each time, such as a type of error.
    pub fn failed(&mut self, error: &str) {
        if let Some(span) = &mut self.span {
            span.failed(error);
        }
    }
}

impl Headers {
    /// As a JSON object of strings: for the column `headers` of an outbox, or for what fills it.
    pub fn json(&self) -> String {
        let own = self
            .0
            .iter()
            .map(|(name, value)| (Cow::Borrowed(name.as_str()), value.as_deref().map(Cow::Borrowed)));
        envelope::as_json(&own.collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Place, Travelled, headers::tests::headers},
        *,
    };

    fn event(of: &[(&str, &str)]) -> Event {
        Event {
            place: Place { topic: "t".into(), partition: 0, first: 0, last: 0 },
            timestamp_ms: None,
            key: None,
            payload: None,
            still_encoded: None,
            headers: headers(of),
            travelled: Travelled::Inline,
        }
    }

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_goes_on_is_filtered_as_a_relay_does() {
        let all = [
            ("id", "1"),
            ("traceparent", TRACE),
            ("x-secret-a", "s"),
            ("tenant", "\"a\""),
            ("big", "0123456789"),
        ];
        let all = event(&all);
        let onward = Onward::new(&["*"], &["X-Secret-*"], 11 + TRACE.len() + 9);
        assert_eq!(onward.begin(&all).context(), &headers(&[("traceparent", TRACE), ("tenant", "\"a\"")]));
        let bad = event(&[("traceparent", "00-bad"), ("tracestate", "a=b"), ("u", "7")]);
        let work = Onward::default().begin(&bad);
        assert_eq!(work.context(), &headers(&[("u", "7")]));
        assert_eq!(work.context().json(), r#"{"u":"7"}"#);
    }
}
