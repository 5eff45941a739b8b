//! Log lines, on stderr.

use std::{fmt, io::IsTerminal as _};

use serde_json::{Map, Value};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::Writer,
        time::{FormatTime as _, SystemTime},
    },
    registry::LookupSpan,
};

use crate::config::{self, Level, LogFormat};

/// The field of a line about an event that has the event's headers, as a JSON object.
const CONTEXT: &str = "context";

/// Begins to log. Returns how the level is changed later.
pub fn start(config: &config::Log) -> Box<dyn Fn(Level) + Send + Sync> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(config.level))
        .with_writer(std::io::stderr)
        // Where nobody reads the log any more, that could not be told either: to try is a panic.
        .log_internal_errors(false);
    match config.format {
        LogFormat::Json => {
            let builder = builder.event_format(Json).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |level| {
                handle.reload(filter(level)).ok();
            })
        }
        LogFormat::Text => {
            let builder = builder.with_ansi(std::io::stderr().is_terminal()).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |level| {
                handle.reload(filter(level)).ok();
            })
        }
    }
}

/// Libraries only when something is wrong with them.
fn filter(level: Level) -> EnvFilter {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    EnvFilter::new(format!("error,whippet={level}"))
}

/// A line is a JSON object: `timestamp`, `level`, the fields, `target`. The context is an object in it.
struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        let mut line = Line::default();
        line.0.insert("timestamp".into(), timestamp.into());
        line.0.insert("level".into(), event.metadata().level().as_str().into());
        event.record(&mut line);
        line.0.insert("target".into(), event.metadata().target().into());
        writeln!(writer, "{}", Value::Object(line.0))
    }
}

#[derive(Default)]
struct Line(Map<String, Value>);

impl Line {
    fn put(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Line {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        match field.name() {
            CONTEXT => self.put(field, serde_json::from_str::<Value>(&text).unwrap_or(Value::String(text))),
            _ => self.put(field, text),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use tracing::info;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_is_an_object_and_the_context_an_object_in_it() {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber =
            tracing_subscriber::fmt().event_format(Json).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let context = r#"{"x-request-id":"r\"1\n","n":null}"#;
            info!(table = "outbox", place = 7_i64, share = 0.5, %context, "event is published");
            info!(context = None::<String>.as_ref().map(display), why = %"a\nb", "a {} line", "plain");
        });
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let [first, second] = &lines[..] else { panic!("{text}") };
        assert!(first["timestamp"].as_str().unwrap().ends_with('Z'), "{first}");
        assert_eq!((&first["level"], &first["message"]), (&"INFO".into(), &"event is published".into()));
        assert_eq!((&first["place"], &first["share"]), (&7.into(), &0.5.into()));
        assert_eq!(first["context"], serde_json::json!({ "x-request-id": "r\"1\n", "n": null }));
        assert_eq!(first["target"], module_path!());
        assert_eq!((second.get("context"), &second["message"]), (None, &"a plain line".into()));
        assert_eq!(second["why"], "a\nb");
    }
}
