//! What is told of an event beside its record: the context that its log lines carry, and the trace that
//! its spans belong to. Nothing is done for it where nobody asked.

use std::fmt;

use super::{
    Header, Rules,
    w3c::{Parent, TRACEPARENT, TRACESTATE},
};
use crate::event::Event;

/// Who wants to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watch {
    /// Headers that every log line of an event carries.
    pub log: Vec<String>,
    /// Whether there are spans of events whose trace is recorded.
    pub traces: bool,
}

/// Where Kafka has put a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Landed {
    pub partition: i32,
    /// Unknown where the broker found that it had the record already.
    pub offset: Option<i64>,
}

/// What is kept of an event while its record is on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trail {
    pub id: Box<str>,
    /// It is published again because an operator asked for it.
    pub replay: bool,
    /// `None` where the log is to have none.
    pub context: Option<Context>,
    /// `None` where its trace is not recorded.
    pub parent: Option<Parent>,
    /// Of its last record, once Kafka has acknowledged it.
    pub landed: Option<Landed>,
}

impl Trail {
    /// What it takes in memory.
    pub fn bytes(&self) -> usize {
        let context = self.context.as_ref().map_or(0, |context| context.0.len());
        let state =
            self.parent.as_ref().and_then(|parent| parent.state.as_ref()).map_or(0, |state| state.len());
        size_of::<Trail>() + self.id.len() + context + state
    }
}

/// Headers of an event as a JSON object, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context(Box<str>);

impl Context {
    /// By the names that are asked for, as they are asked for. Of several headers of a name the last counts.
    fn of(names: &[String], headers: &[Header<'_>]) -> Context {
        let find = |name: &str| headers.iter().rev().find(|(known, _)| known.eq_ignore_ascii_case(name));
        let found = names.iter().filter_map(|name| Some((name, find(name)?)));
        let object: serde_json::Map<String, serde_json::Value> = found
            .map(|(name, (_, value))| {
                let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
                (name.clone(), value.as_deref().map(text).into())
            })
            .collect();
        Context(serde_json::Value::Object(object).to_string().into())
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Watch {
    /// `None` where there is nothing to tell of this event.
    pub(super) fn trail(&self, id: &str, event: &Event, headers: &[Header<'_>]) -> Option<Box<Trail>> {
        let context = (!self.log.is_empty()).then(|| Context::of(&self.log, headers));
        let parent = if self.traces { parent(headers) } else { None };
        if context.is_none() && parent.is_none() {
            return None;
        }
        Some(Box::new(Trail { id: id.into(), replay: event.replay.is_some(), context, parent, landed: None }))
    }
}

/// The span that the row was written in, where its trace is recorded.
fn parent(headers: &[Header<'_>]) -> Option<Parent> {
    let find = |wanted: &str| {
        let (_, value) = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted))?;
        value.as_deref()
    };
    let traceparent = find(TRACEPARENT)?;
    // Asked of every event; most are not recorded.
    let parent = Parent::parse(traceparent, None).filter(Parent::is_sampled)?;
    let state = find(TRACESTATE).and_then(|state| std::str::from_utf8(state).ok()).map(Box::from);
    Some(Parent { state, ..parent })
}

impl Rules {
    /// Whether log lines are to have a context.
    pub fn tells_the_log(&self) -> bool {
        !self.watch.log.is_empty()
    }

    /// The context of an event for a log line about it; `None` where the log is to have none.
    pub fn log_context(&self, event: &Event) -> Option<Context> {
        if !self.tells_the_log() {
            return None;
        }
        let id = self.id(&event.row).unwrap_or_default();
        let headers = self.headers.headers(id, &event.row, &self.columns.0);
        // Headers that cannot be read are none.
        let headers = headers.map(|gathered| gathered.headers).unwrap_or_default();
        Some(Context::of(&self.watch.log, &headers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::{Place, Row},
        record::Spec,
    };

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0";

    fn told(watch: Watch, headers: &str) -> (Option<Box<Trail>>, Option<String>) {
        let rules = Rules::compile(&Spec {
            id: "id".into(),
            payload: "payload".into(),
            topic: Some("topic".into()),
            headers: Some("headers".into()),
            allow: vec!["*".into()],
            deny: vec!["secret".into()],
            headers_max_bytes: 1000,
            watch,
            ..Spec::default()
        })
        .unwrap();
        let mut row = Row::default();
        for column in rules.columns() {
            let value = match column.as_str() {
                "id" => Some("e1"),
                "topic" => Some("t"),
                "headers" => Some(headers),
                _ => None,
            };
            row.push(value.map(str::as_bytes));
        }
        let event = Event { place: Place::Int(1), row, timestamp_ms: None, unread_bytes: None, replay: None };
        let context = rules.log_context(&event).map(|context| context.to_string());
        (rules.prepare(&event, None).ok().and_then(|prepared| prepared.trail), context)
    }

    #[test]
    fn the_log_has_what_is_named_and_goes_out() {
        let log = ["x-request-id", "User-Id", "secret", "gone"].map(str::to_owned).to_vec();
        let watch = Watch { log, traces: false };
        let headers = r#"{"user-id":"7","X-Request-Id":"a\"\n","secret":"s","other":"o","n":null}"#;
        let (trail, context) = told(watch.clone(), headers);
        let context = context.unwrap();
        assert_eq!(context, r#"{"x-request-id":"a\"\n","User-Id":"7"}"#);
        let trail = trail.unwrap();
        assert_eq!((&*trail.id, trail.context.unwrap().to_string(), trail.parent), ("e1", context, None));
        assert_eq!(told(watch, "no JSON"), (None, Some("{}".into())), "a line there is all the same");
    }

    #[test]
    fn only_what_is_recorded_leaves_a_trail() {
        let traces = Watch { log: Vec::new(), traces: true };
        let headers = |flag: &str| format!(r#"{{"tracestate":"a=b","traceparent":"{TRACE}{flag}"}}"#);
        let (trail, context) = told(traces.clone(), &headers("1"));
        let trail = trail.unwrap();
        assert_eq!((context, &trail.context), (None, &None));
        assert_eq!(trail.bytes(), size_of::<Trail>() + 2 + 3);
        assert_eq!(trail.parent.unwrap().state.as_deref(), Some("a=b"));
        for headers in [&*headers("0"), "{}", r#"{"traceparent":"bad"}"#] {
            assert_eq!(told(traces.clone(), headers), (None, None), "{headers}");
        }
        assert_eq!(told(Watch::default(), &headers("1")), (None, None));
    }
}
