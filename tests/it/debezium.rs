//! The real Debezium in Kafka Connect, its connectors, and what is compared of the records.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::File,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::harness::{SOON, Seen, World, kafka};

/// A worker of Kafka Connect with connectors, as a child process.
pub struct Debezium {
    child: Child,
    log: PathBuf,
}

impl Debezium {
    pub fn start(world: &World, connectors: &[&str]) -> Debezium {
        let offsets = world.folder.path().join("offsets");
        let worker = world.write(
            "worker.properties",
            &format!(
                "bootstrap.servers={}\nlisteners=http://127.0.0.1:0\noffset.storage.file.filename={}\n\
                 offset.flush.interval.ms=500\nplugin.discovery=only_scan\n\
                 key.converter=org.apache.kafka.connect.storage.StringConverter\n\
                 value.converter=org.apache.kafka.connect.storage.StringConverter\n",
                kafka(),
                offsets.display()
            ),
        );
        let logging = world.write(
            "log4j2.properties",
            "rootLogger.level = ERROR\nrootLogger.appenderRef.out.ref = out\nappender.out.type = Console\n\
             appender.out.name = out\nappender.out.layout.type = PatternLayout\n\
             appender.out.layout.pattern = %d %p %m (%c)%n\n",
        );
        let libs = std::env::var("WHIPPET_TEST_DEBEZIUM_LIBS").expect(
            "WHIPPET_TEST_DEBEZIUM_LIBS is not set: run `scripts/peers install` and `eval \"$(scripts/services env)\"`",
        );
        let log = world.folder.path().join("debezium.log");
        let out = File::create(&log).unwrap();
        let child = Command::new("java")
            .args(["-Xmx512m", "-XX:TieredStopAtLevel=1", "-cp"])
            .arg(format!("{libs}/*"))
            .arg(format!("-Dlog4j2.configurationFile={logging}"))
            .args(["org.apache.kafka.connect.cli.ConnectStandalone", &worker])
            .args(connectors)
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        Debezium { child, log }
    }

    /// SIGTERM; it writes down where it is.
    pub fn stop(&mut self) {
        Command::new("kill").args(["-s", "TERM", &self.child.id().to_string()]).status().unwrap();
        let deadline = Instant::now() + SOON;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "Debezium does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Debezium {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.child.kill().ok();
            self.child.wait().ok();
        }
        if std::thread::panicking() {
            eprintln!("Debezium's log:\n{}", std::fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

/// Options of a connector: what every one here has, and more.
pub fn connector(topics: &str, more: &[(&str, String)]) -> BTreeMap<String, String> {
    let router = "transforms.outbox";
    let common = [
        ("database.hostname", "127.0.0.1".to_owned()),
        ("snapshot.mode", "no_data".into()),
        ("tombstones.on.delete", "false".into()),
        ("poll.interval.ms", "20".into()),
        ("transforms", "outbox".into()),
        (&format!("{router}.type"), "io.debezium.transforms.outbox.EventRouter".into()),
        (&format!("{router}.route.topic.replacement"), format!("{topics}.${{routedByValue}}")),
        (&format!("{router}.table.field.event.timestamp"), "happened_at".into()),
        (
            &format!("{router}.table.fields.additional.placement"),
            "type:header:eventType,tenant:header,number:header:n,vip:header,price:header,request:header,\
             shard:partition"
                .into(),
        ),
    ];
    let options = common.into_iter().chain(more.iter().cloned());
    options.map(|(name, value)| (name.to_owned(), value)).collect()
}

/// As the properties of a connector, whose values are bytes and whose keys are JSON.
pub fn properties_of_bytes(options: BTreeMap<String, String>) -> String {
    let own = [
        ("name", "bytes"),
        ("value.converter", "org.apache.kafka.connect.converters.ByteArrayConverter"),
        ("key.converter", "org.apache.kafka.connect.json.JsonConverter"),
        ("key.converter.schemas.enable", "false"),
    ];
    let own = own.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let lines =
        options.into_iter().chain(own).map(|(name, value)| format!("{name}={}", value.replace('\\', "\\\\")));
    lines.collect::<Vec<_>>().join("\n")
}

/// As JSON, with the headers about itself.
pub fn json_of_text(mut options: BTreeMap<String, String>) -> String {
    options.insert("extended.headers.enabled".into(), "true".into());
    serde_json::json!({ "name": "text", "config": options }).to_string()
}

/// What of a record is compared: all that Debezium and the relay both decide.
#[derive(Debug, PartialEq, Eq)]
struct Compared<'a> {
    key: Option<&'a [u8]>,
    value: Option<Cow<'a, [u8]>>,
    headers: Vec<(&'a str, Option<&'a [u8]>)>,
    /// Where the row says so; else it is the time of reading.
    timestamp: Option<i64>,
    /// A record with no key goes anywhere.
    partition: Option<i32>,
}

/// As JSON Debezium makes a text of no key; the relay has none then.
fn key_of(seen: &Seen) -> Option<&[u8]> {
    seen.key.as_deref().filter(|key| *key != b"null")
}

fn compared(seen: &Seen) -> Compared<'_> {
    let number: usize = seen.header("n").unwrap().parse().unwrap();
    let pinned = number.is_multiple_of(13);
    // Debezium's headers about itself are its first, and ours are the last.
    let mut headers: Vec<_> =
        seen.headers.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    headers.sort_by_key(|(name, _)| name.starts_with("__debezium"));
    Compared {
        key: key_of(seen),
        value: seen.payload.as_deref().map(Cow::from),
        headers,
        timestamp: seen.timestamp.filter(|_| !number.is_multiple_of(4)),
        partition: (key_of(seen).is_some() || pinned).then_some(seen.partition),
    }
}

/// Without Open Telemetry beside it Debezium drops the span's context; the relay hands it on as it is in the row.
fn take_span(record: &mut Compared) -> Vec<(String, String)> {
    let is_span = |name: &str| ["traceparent", "tracestate"].contains(&name);
    let text = |value: Option<&[u8]>| String::from_utf8(value.unwrap().to_vec()).unwrap();
    let span = record
        .headers
        .iter()
        .filter(|(name, _)| is_span(name))
        .map(|(name, value)| ((*name).to_owned(), text(*value)));
    let span = span.collect();
    record.headers.retain(|(name, _)| !is_span(name));
    span
}

fn by_id(seen: &[Seen]) -> BTreeMap<&str, &Seen> {
    let map: BTreeMap<&str, &Seen> = seen.iter().map(|one| (one.header("id").unwrap(), one)).collect();
    assert_eq!(map.len(), seen.len(), "an event is there twice");
    map
}

/// Table, key and partition.
type Lane<'a> = (&'a str, &'a [u8], i32);

/// The ids of each key of each table, in the order of the partition. Tables have no order among each other.
fn by_key(seen: &[Seen]) -> BTreeMap<Lane<'_>, Vec<&str>> {
    let mut keys: BTreeMap<Lane, Vec<(i64, &str)>> = BTreeMap::new();
    for one in seen {
        let Some(key) = key_of(one) else { continue };
        let (table, _) = one.header("eventType").unwrap().split_once(' ').unwrap();
        keys.entry((table, key, one.partition)).or_default().push((one.offset, one.header("id").unwrap()));
    }
    keys.into_iter()
        .map(|(key, mut ids)| {
            ids.sort_unstable();
            (key, ids.into_iter().map(|(_, id)| id).collect())
        })
        .collect()
}

/// MySQL keeps JSON as values: who reads the log makes a text of them, the relay has the server's.
fn rewrite_json(record: &mut Compared) {
    let of_json = |(name, value): &(&str, Option<&[u8]>)| {
        *name == "eventType" && value.is_some_and(|value| value.starts_with(b"outbox "))
    };
    if record.headers.iter().any(of_json) {
        let value = record.value.take();
        let json = value.map(|value| serde_json::from_slice::<serde_json::Value>(&value).unwrap());
        record.value = json.map(|json| json.to_string().into_bytes().into());
    }
}

/// The same records, one by one, and the same order within each key. `about_itself`: the headers that Debezium adds
/// about itself were asked for. `json_by_value`: its text is anybody's.
pub fn compare(theirs: &[Seen], ours: &[Seen], about_itself: bool, json_by_value: bool) -> usize {
    assert_eq!(by_key(ours), by_key(theirs));
    let (theirs, ours) = (by_id(theirs), by_id(ours));
    assert_eq!(ours.len(), theirs.len());
    for (id, theirs) in &theirs {
        let (mut expected, mut found) = (compared(theirs), compared(ours[id]));
        if !about_itself {
            expected.headers.retain(|(name, _)| !name.starts_with("__debezium"));
        }
        let number: usize = theirs.header("n").unwrap().parse().unwrap();
        let span = take_span(&mut found);
        if json_by_value {
            [&mut expected, &mut found].into_iter().for_each(rewrite_json);
        }
        assert_eq!(found, expected, "event {id}, row {number}");
        let text = |name: &str, value: String| (name.to_owned(), value);
        let sent = [
            text(
                "traceparent",
                format!("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0{}", number % 2),
            ),
            text("tracestate", "a=b".into()),
        ];
        assert_eq!(span, if number.is_multiple_of(6) { sent.to_vec() } else { Vec::new() }, "row {number}");
    }
    theirs.len()
}
