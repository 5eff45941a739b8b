//! The real Debezium in Kafka Connect, and the relay by the configuration that `whippet import debezium` makes of its
//! connectors: the same rows become the same records.

use std::{
    collections::BTreeMap,
    fs::File,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::harness::{Relay, SOON, Seen, World, kafka, whippet};

/// Rows of each table, in transactions of ten.
const ROWS: usize = 100;

/// A worker of Kafka Connect with connectors, as a child process.
struct Debezium {
    child: Child,
    log: PathBuf,
}

impl Debezium {
    fn start(world: &World, connectors: &[&str]) -> Debezium {
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
    fn stop(&mut self) {
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

/// Options that both connectors have, without their router's.
fn common(world: &World, slot: &str, tables: &str, topics: &str) -> BTreeMap<String, String> {
    let port = world.url.rsplit_once(':').unwrap().1.split('/').next().unwrap();
    let router = "transforms.outbox";
    [
        ("connector.class", "io.debezium.connector.postgresql.PostgresConnector".to_owned()),
        ("database.hostname", "127.0.0.1".into()),
        ("database.port", port.into()),
        ("database.user", "postgres".into()),
        ("database.password", "not needed here".into()),
        ("database.dbname", world.name.clone()),
        ("database.sslmode", "disable".into()),
        ("plugin.name", "pgoutput".into()),
        ("slot.name", slot.into()),
        ("publication.name", slot.into()),
        ("publication.autocreate.mode", "filtered".into()),
        ("table.include.list", tables.into()),
        ("topic.prefix", slot.into()),
        ("snapshot.mode", "no_data".into()),
        ("tombstones.on.delete", "false".into()),
        ("poll.interval.ms", "20".into()),
        ("transforms", "outbox".into()),
        (&format!("{router}.type"), "io.debezium.transforms.outbox.EventRouter".into()),
        (&format!("{router}.route.topic.replacement"), format!("{topics}.${{routedByValue}}")),
        (&format!("{router}.table.field.event.timestamp"), "happened_at".into()),
        (
            &format!("{router}.table.fields.additional.placement"),
            "type:header:eventType,tenant:header,number:header:n,vip:header,price:header,request:header,shard:partition".into(),
        ),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

/// Every kind of key, payload, header and time, and rows that want a partition of their own.
fn insert(table: &str, payload: &str, from: usize, to: usize) -> String {
    format!(
        "INSERT INTO {table} SELECT gen_random_uuid(), CASE i % 2 WHEN 0 THEN 'orders' ELSE 'customers' END,
           CASE i % 11 WHEN 0 THEN NULL WHEN 1 THEN '' ELSE 'clé-' || (i % 7) || ' ☃' END, '{table} ' || i % 3,
           CASE WHEN i % 9 = 3 THEN NULL ELSE {payload} END,
           CASE WHEN i % 5 = 0 THEN NULL WHEN i % 5 = 1 THEN '' ELSE 'Mieter \"ü\", \\' || i END, i, i % 2 = 0,
           (i * 1.25)::numeric(10, 2), gen_random_uuid(),
           CASE WHEN i % 4 > 0 THEN timestamp '2026-01-02 03:04:05.678901' + i * interval '1.7 s' END,
           CASE WHEN i % 6 = 0 THEN E'#written by hand\\ntraceparent=00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0'
             || i % 2 || E'\\ntracestate=a\\\\=b\\n' END,
           CASE WHEN i % 13 = 0 THEN i % 4 END FROM generate_series({from}, {to}) i"
    )
}

/// What of a record is compared: all that Debezium and the relay both decide.
#[derive(Debug, PartialEq, Eq)]
struct Compared<'a> {
    key: Option<&'a [u8]>,
    value: Option<&'a [u8]>,
    headers: Vec<(&'a str, Option<&'a [u8]>)>,
    /// Where the row says so; else it is the time of reading.
    timestamp: Option<i64>,
    /// A record with no key goes anywhere.
    partition: Option<i32>,
}

fn compared(seen: &Seen) -> Compared<'_> {
    let number: usize = seen.header("n").unwrap().parse().unwrap();
    let pinned = number.is_multiple_of(13);
    // Debezium's headers about itself are its first, and ours are the last.
    let mut headers: Vec<_> =
        seen.headers.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    headers.sort_by_key(|(name, _)| name.starts_with("__debezium"));
    Compared {
        key: seen.key.as_deref(),
        value: seen.payload.as_deref(),
        headers,
        timestamp: seen.timestamp.filter(|_| !number.is_multiple_of(4)),
        partition: (seen.key.is_some() || pinned).then_some(seen.partition),
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
        let Some(key) = &one.key else { continue };
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

/// The same records, one by one, and the same order within each key. `about_itself`: the headers that Debezium adds
/// about itself were asked for.
fn compare(theirs: &[Seen], ours: &[Seen], about_itself: bool) -> usize {
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

/// One connector of strings, as JSON, with three tables; one of bytes, as properties.
#[tokio::test]
async fn the_imported_configuration_sends_the_same_records() {
    let world = World::new("debezium").await;
    let columns = "id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255), \
                   type varchar(255) NOT NULL, payload PAYLOAD, tenant text, number integer, vip boolean, \
                   price numeric(10, 2), request uuid, happened_at timestamp, tracingspancontext varchar(256), shard integer";
    let strings = "'{\"b\": [1, 2.50, \"ü ☃ \\n\"],   \"a\":' || i || '}'";
    let text = "CASE i % 7 WHEN 2 THEN '' WHEN 4 THEN repeat('lang ✓ ', 20000) ELSE '<a>' || i || E'\\n\\t\"☃\"</a>' END";
    let bytes = "decode('00ff' || lpad(to_hex(i), 4, '0') || 'c328', 'hex')";
    let tables = [
        ("outbox", "jsonb", format!("({strings})::jsonb")),
        ("outbox_json", "json", format!("({strings})::json")),
        ("outbox_text", "text", text.to_owned()),
        ("outbox_bytes", "bytea", bytes.to_owned()),
    ];
    for (name, kind, _) in &tables {
        world.sql(&format!("CREATE TABLE {name} ({})", columns.replace("PAYLOAD", kind))).await;
    }
    let (of_text, of_bytes) = (format!("{}_t", world.name), format!("{}_b", world.name));
    let topics = ["t.orders", "t.customers", "b.orders", "b.customers"];
    for topic in topics {
        world.create_topic(topic, 4, &[]).await;
    }

    let mut config = common(
        &world,
        &of_text,
        "public\\.outbox,public\\.outbox_json,public\\.outbox_text",
        &world.topic("t"),
    );
    config.insert("extended.headers.enabled".into(), "true".into());
    let json = serde_json::json!({ "name": "text", "config": config }).to_string();
    let json = world.write("text.json", &json);
    let mut options = common(&world, &of_bytes, "public.outbox_bytes", &world.topic("b"));
    options.insert("name".into(), "bytes".into());
    options.insert("value.converter".into(), "org.apache.kafka.connect.converters.ByteArrayConverter".into());
    let lines: Vec<String> =
        options.iter().map(|(name, value)| format!("{name}={}", value.replace('\\', "\\\\"))).collect();
    let properties = world.write("bytes.properties", &lines.join("\n"));

    // The relay reads a slot that is made here, so that both have all rows.
    let mut configs = Vec::new();
    for (file, slot) in [(&json, &of_text), (&properties, &of_bytes)] {
        let said = whippet(&["import", "debezium", file]);
        assert_eq!(said.status.code(), Some(0), "{}", String::from_utf8_lossy(&said.stderr));
        let imported = world.write(&format!("{slot}.yaml"), &String::from_utf8(said.stdout).unwrap());
        let said = whippet(&["validate", "--config", &imported]);
        assert_eq!(said.status.code(), Some(0), "{}", String::from_utf8_lossy(&said.stderr));
        let own = format!("{slot}_own");
        let mut environment = vec![
            ("KAFKA_BOOTSTRAP_SERVERS", kafka()),
            ("WHIPPET__ADMIN__LISTEN", "127.0.0.1:0".into()),
            ("WHIPPET__SOURCE__PASSWORD_FILE", world.write("password", "none")),
            ("WHIPPET__SOURCE__RELAY_SCHEMA", format!("of_{slot}")),
        ];
        let ddl = Command::new(env!("CARGO_BIN_EXE_whippet"))
            .args(["sql", "--config", &imported])
            .envs(environment.iter().map(|(name, value)| (*name, value.as_str())))
            .output()
            .unwrap();
        assert!(ddl.status.success(), "{}", String::from_utf8_lossy(&ddl.stderr));
        world.sql(&String::from_utf8(ddl.stdout).unwrap()).await;
        world.sql(&format!("SELECT pg_create_logical_replication_slot('{own}', 'pgoutput')")).await;
        environment.push(("WHIPPET__SOURCE__STREAM__SLOT", own));
        configs.push((imported, environment));
    }

    let mut debezium = Debezium::start(&world, &[&json, &properties]);
    let active = format!(
        "SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name IN ('{of_text}', '{of_bytes}')"
    );
    world.until(&active, 2).await;
    let mut consumers = topics.map(|topic| world.consumer(&world.topic(topic)));
    for from in (1..=ROWS).step_by(10) {
        for (table, _, payload) in &tables {
            world.sql(&insert(table, payload, from, from + 9)).await;
        }
    }
    let total = |topic: &str| if topic.starts_with("t.") { 3 * ROWS / 2 } else { ROWS / 2 };
    for (topic, consumer) in topics.iter().zip(&mut consumers) {
        assert_eq!(consumer.read(total(topic)).len(), total(topic), "{topic}");
    }
    debezium.stop();

    let start = |(imported, environment): &(String, Vec<(&str, String)>)| {
        let environment: Vec<(&str, &str)> =
            environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
        Relay::start_with(imported, &environment)
    };
    let relays: Vec<Relay> = configs.iter().map(&start).collect();
    let mut records = 0;
    for (topic, consumer) in topics.iter().zip(&mut consumers) {
        let seen = consumer.read(2 * total(topic));
        records += compare(&seen[..total(topic)], &seen[total(topic)..], topic.starts_with("t."));
    }
    assert_eq!(records, tables.len() * ROWS);
    for relay in relays {
        assert_eq!(relay.stop().0, Some(0));
    }

    // As it was imported: the slot is Debezium's, and nothing is lost between the two.
    let (imported, environment) = &configs[0];
    let environment: Vec<_> =
        environment.iter().filter(|(name, _)| !name.ends_with("SLOT")).cloned().collect();
    world.sql(&insert("outbox", "'{}'::jsonb", 1001, 1001)).await;
    let relay = start(&(imported.clone(), environment));
    world.sql(&insert("outbox", "'{}'::jsonb", 1003, 1003)).await;
    let consumer = &mut consumers[1];
    let new = |seen: &[Seen]| seen.iter().filter(|one| one.header("n").unwrap().len() == 4).count();
    let seen = consumer.read_until(|seen| new(seen) == 2);
    let repeated = seen.len() - 2 * total(topics[1]) - 2;
    println!("{records} records are equal; {repeated} were repeated when the slot was taken over");
    assert_eq!(relay.stop().0, Some(0));
    for slot in [of_text, of_bytes] {
        for slot in [slot.clone(), format!("{slot}_own")] {
            world
                .until(
                    &format!(
                        "SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name = '{slot}'"
                    ),
                    0,
                )
                .await;
            world.sql(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;
        }
    }
}
