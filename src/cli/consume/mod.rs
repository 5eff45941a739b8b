//! `consume`: prints events as a consumer should see them.

mod arguments;

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use anyhow::Context as _;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

pub use self::arguments::Arguments;
use self::arguments::Format;
use super::{
    BAD_CONFIG, DONE, FAILED,
    run::{runtime, stop_on_signal},
};
use crate::{
    config::{self, Config},
    consume::{Consumer, Event, Headers, RunError, Settings, Start, Travelled},
    coordinate::report,
};

pub fn consume(arguments: &Arguments) -> u8 {
    let config = match arguments.config.as_deref().map(config::load).transpose() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return BAD_CONFIG;
        }
    };
    let filter = EnvFilter::new("error,whippet=warn");
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    let consumed = runtime()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(print(arguments, config.as_ref())));
    match consumed {
        Ok(0) => DONE,
        Ok(unread) => {
            eprintln!("{unread} event(s) could not be read");
            FAILED
        }
        Err(error) => {
            eprintln!("{}", report(error.as_ref()));
            FAILED
        }
    }
}

/// What there is to wait for, before there is anything else to be seen.
fn waits_for(settings: &Settings, max: Option<u64>) -> String {
    let topics = settings.topics.join(", ");
    let start = match settings.start {
        Start::Beginning => "from the oldest record on",
        Start::End => "what comes from now on (--from-beginning: what is there, too)",
    };
    let from = match &settings.group {
        Some(group) => format!("as group {group}, from what it committed on; where it has not, {start}"),
        None => start.to_owned(),
    };
    let end = max.map_or_else(|| "Ctrl-C".into(), |max| format!("{max} event(s), or Ctrl-C"));
    format!("reading {topics} {from}; ends with {end}")
}

/// Until there are enough, or a signal. How many could not be read.
async fn print(arguments: &Arguments, config: Option<&Config>) -> anyhow::Result<u64> {
    let (settings, store) = (arguments.settings(config), arguments.store(config)?);
    let mut out = output(&arguments.output)?;
    // On stderr: the output is for the events.
    eprintln!("connecting to the brokers at {}", settings.bootstrap_servers);
    let mut consumer = Consumer::open(&settings, store).await?;
    eprintln!("{}", waits_for(&settings, arguments.max));
    let stop = CancellationToken::new();
    tokio::spawn(stop_on_signal(stop.clone()));
    let (mut printed, mut unread) = (0, 0);
    let enough = stop.clone();
    let ran = consumer.run(&stop, |event| {
        let written = match event {
            // Flushed before it is committed: a reader that went away has not had it.
            Ok(event) => {
                printed += 1;
                if arguments.max == Some(printed) {
                    enough.cancel();
                }
                write(&mut out, &event, arguments.format).and_then(|()| out.flush())
            }
            Err(error) => {
                unread += 1;
                eprintln!("{error}");
                Ok(())
            }
        };
        std::future::ready(written)
    });
    match ran.await {
        Err(RunError::Handler(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(unread),
        Err(RunError::Handler(error)) => Err(error).context("the output cannot be written"),
        Err(RunError::Kafka(error)) => Err(error).context("Kafka"),
        Ok(()) => Ok(unread),
    }
}

fn output(path: &Path) -> anyhow::Result<Box<dyn Write + Send>> {
    if path == Path::new("-") {
        return Ok(Box::new(BufWriter::new(io::stdout())));
    }
    let file = File::create(path).with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(Box::new(BufWriter::new(file)))
}

fn write(out: &mut impl Write, event: &Event, format: Format) -> io::Result<()> {
    match format {
        Format::Raw => out.write_all(event.payload.as_deref().unwrap_or_default()),
        Format::Json => {
            serde_json::to_writer(&mut *out, &line(event))?;
            out.write_all(b"\n")
        }
    }
}

/// What is text is text; what is not has `_base64` in its name.
fn line(event: &Event) -> Value {
    let mut line = Map::new();
    let place = &event.place;
    line.insert("topic".into(), json!(&*place.topic));
    line.insert("partition".into(), json!(place.partition));
    line.insert("offset".into(), json!(place.last));
    if place.first != place.last {
        line.insert("first_offset".into(), json!(place.first));
    }
    line.insert("timestamp".into(), json!(event.timestamp_ms));
    bytes(&mut line, "key", event.key.as_deref());
    line.insert("id".into(), json!(event.id()));
    line.insert("type".into(), json!(event.kind()));
    line.insert("headers".into(), headers(&event.headers));
    line.insert("context".into(), headers(&event.headers.onward()));
    line.insert("travelled".into(), json!(event.travelled.name()));
    if let Travelled::Chunks(count) = event.travelled {
        line.insert("chunks".into(), json!(count));
    }
    if let Some(encoding) = &event.still_encoded {
        line.insert("still_encoded".into(), json!(encoding));
    }
    line.insert("size".into(), json!(event.payload.as_ref().map(|payload| payload.len())));
    bytes(&mut line, "payload", event.payload.as_deref());
    Value::Object(line)
}

fn bytes(line: &mut Map<String, Value>, name: &str, value: Option<&[u8]>) {
    match value.map(|value| (value, std::str::from_utf8(value))) {
        None => line.insert(name.into(), Value::Null),
        Some((_, Ok(text))) => line.insert(name.into(), text.into()),
        Some((value, Err(_))) => line.insert(format!("{name}_base64"), BASE64_STANDARD.encode(value).into()),
    };
}

/// A name that comes again keeps the last value, which is the one that counts.
fn headers(headers: &Headers) -> Value {
    let mut all = Map::new();
    for (name, value) in &headers.0 {
        bytes(&mut all, name, value.as_deref());
    }
    Value::Object(all)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::consume::Place;

    #[test]
    fn what_is_waited_for_is_said() {
        let mut settings = Settings::new("k:1", &["orders", "audit"]);
        let now = "what comes from now on (--from-beginning: what is there, too)";
        assert_eq!(waits_for(&settings, None), format!("reading orders, audit {now}; ends with Ctrl-C"));
        settings = settings.group("g");
        settings.start = Start::Beginning;
        assert_eq!(
            waits_for(&settings, Some(3)),
            "reading orders, audit as group g, from what it committed on; where it has not, from the oldest record on; \
             ends with 3 event(s), or Ctrl-C"
        );
    }

    #[test]
    fn a_line_has_text_as_text_and_bytes_as_base64() {
        let header = |name: &str, value: &'static [u8]| (name.to_owned(), Some(Bytes::from_static(value)));
        let event = Event {
            place: Place { topic: "t".into(), partition: 2, first: 4, last: 7 },
            timestamp_ms: Some(5),
            key: None,
            payload: Some(Bytes::from_static(&[0xff, 0])),
            still_encoded: Some("br".into()),
            headers: Headers(vec![
                header("id", b"e-1"),
                header("eventType", b"Placed"),
                header("b", &[0xfe]),
                ("n".into(), None),
            ]),
            travelled: Travelled::Chunks(3),
        };
        assert_eq!(
            line(&event).to_string(),
            r#"{"topic":"t","partition":2,"offset":7,"first_offset":4,"timestamp":5,"key":null,"id":"e-1","type":"Placed","headers":{"id":"e-1","eventType":"Placed","b_base64":"/g==","n":null},"context":{"b_base64":"/g==","n":null},"travelled":"chunks","chunks":3,"still_encoded":"br","size":2,"payload_base64":"/wA="}"#
        );
        let tombstone = Event { payload: None, still_encoded: None, travelled: Travelled::Inline, ..event };
        assert!(
            line(&tombstone).to_string().ends_with(r#""travelled":"inline","size":null,"payload":null}"#)
        );
    }
}
