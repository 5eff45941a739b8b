//! What a file means that is taken.

mod reference;
mod refused;

use std::{collections::BTreeMap, time::Duration};

use super::*;

const MINIMAL: &str = "\
source: { url: postgres://relay@localhost/shop }
kafka: { bootstrap_servers: localhost:9092 }
tables: [{ name: outbox }]
";

/// A table with claim checks, and these keys of `payload`.
fn with_payload(keys: &str) -> String {
    let table = format!("{{ name: outbox, payload: {{ {keys} }} }}");
    MINIMAL.replace("{ name: outbox }", &table) + "object_store: { url: file:///var/lib/payloads }\n"
}

fn read(text: &str) -> Result<Config, String> {
    read_with(text, &[])
}

fn read_with(text: &str, env: &[(&str, &str)]) -> Result<Config, String> {
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    parse("w.yaml", text, &env).map_err(|error| error.to_string())
}

#[test]
fn three_keys_are_enough() {
    let config = read(MINIMAL).unwrap();
    let table = &config.tables[0];
    assert_eq!(table.columns.sequence.as_deref(), Some("seq"));
    assert_eq!((table.order, table.after_publish), (Order::Key, AfterPublish::Delete));
    assert_eq!(config.limits.in_flight_bytes, 12 << 20);
    assert_eq!(config.admin.listen, Some("127.0.0.1:9464".parse().unwrap()));
    assert_eq!(table.retry.max, Duration::from_secs(30));
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    let required: Vec<&str> = table.columns.required.iter().map(String::as_str).collect();
    assert_eq!(required, ["id", "payload", "seq", "topic"]);
}

#[test]
fn a_table_wins_over_defaults_and_defaults_over_the_preset() {
    let config = read(
        "source: { url: postgres://localhost/shop }
kafka: { bootstrap_servers: k:9092 }
defaults: { poll: { batch: 7, max_interval: 1s }, columns: { key: k }, headers: { static: { z: 1, a: 2 } } }
tables:
  - { name: a, poll: { batch: 9 } }
  - { name: b, preset: debezium, columns: { sequence: seq } }
",
    )
    .unwrap();
    let [a, b] = &config.tables[..] else { panic!("two tables") };
    assert_eq!((a.poll.batch, a.poll.max_interval), (9, Duration::from_secs(1)));
    assert_eq!(a.columns.key.as_deref(), Some("k"));
    assert_eq!(b.columns.key.as_deref(), Some("k"));
    assert_eq!(b.topic.as_deref(), Some("outbox.event.{aggregatetype}"));
    assert_eq!((b.order, b.event_type_header()), (Order::Key, false));
    assert!(b.columns.required.contains("aggregatetype"));
    let fixed: Vec<&str> = a.headers.fixed.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(fixed, ["z", "a"], "in the order of the file");
}

/// MySQL's tables do not tell which rows are published: the log alone says what is new.
#[test]
fn kept_rows_of_mysql_are_followed_in_the_binlog() {
    let table = |capture: &str| {
        let yaml = format!(
            "source: {{ url: 'mysql://x/y', stream: {{}} }}\nkafka: {{ bootstrap_servers: k }}\n\
             tables: [{{ name: outbox, preset: debezium, capture: {capture}, after_publish: keep }}]\n"
        );
        parse("w.yaml", &yaml, &BTreeMap::new()).map(|config| config.tables[0].clone())
    };
    let kept = table("stream").unwrap();
    assert_eq!(
        (kept.rows, kept.order, kept.after_publish),
        (Rows::Transient, Order::Key, AfterPublish::Keep)
    );
    for capture in ["poll", "auto"] {
        let error = table(capture).unwrap_err().to_string();
        assert!(error.contains("expected delete or mark, or capture: stream"), "{error}");
    }
}

#[test]
fn without_an_order_column_there_is_no_order_and_a_warning() {
    let text = MINIMAL.replace("{ name: outbox }", "{ name: outbox, preset: debezium }");
    let config = read(&text).unwrap();
    assert_eq!(config.tables[0].order, Order::None);
    assert!(config.warnings[0].contains("no columns.sequence"), "{:?}", config.warnings);
    let text = MINIMAL.replace("{ name: outbox }", "{ name: outbox, preset: debezium, order: key }");
    assert!(read(&text).unwrap_err().contains("w.yaml:3:"), "{:?}", read(&text));
}

#[test]
fn the_environment_wins_over_the_file_and_every_scalar_may_refer_to_it() {
    let text = "\
source: { url: \"postgres://relay:${PW}@${HOST:-db}/shop\" }
kafka: { bootstrap_servers: x:1, properties: { sasl.username: \"${PW}\" } }
tables: [{ name: outbox, poll: { batch: \"${BATCH}\" } }]
";
    let env = [
        ("PW", "s3cret"),
        ("BATCH", "12"),
        ("WHIPPET__KAFKA__BOOTSTRAP_SERVERS", "k:9092"),
        ("WHIPPET__KAFKA__LINGER", "5ms"),
        ("WHIPPET__TABLES__0__ORDER", "table"),
    ];
    let config = read_with(text, &env).unwrap();
    assert_eq!(config.source.as_ref().unwrap().url.expose(), "postgres://relay:s3cret@db/shop");
    assert_eq!(config.kafka.bootstrap_servers, "k:9092");
    assert_eq!(config.kafka.linger, Duration::from_millis(5));
    assert_eq!((config.tables[0].poll.batch, config.tables[0].order), (12, Order::Table));
    assert!(!format!("{config:?}").contains("s3cret"));
    let wrong = [("PW", "s3cret"), ("BATCH", "s3cret")];
    let said = read_with(text, &wrong).unwrap_err();
    assert!(said.contains("tables[0].poll.batch") && !said.contains("s3cret"), "{said}");
    let said =
        read_with(text, &[("PW", "x"), ("BATCH", "1"), ("WHIPPET__KAFKA__LINGER", "s3cret")]).unwrap_err();
    assert!(said.contains("environment variable WHIPPET__KAFKA__LINGER: kafka.linger"), "{said}");
    assert!(!said.contains("s3cret"), "{said}");
}

/// The literal text of an object's key: readers of any kind have to make the same of its URI.
#[test]
fn only_a_safe_key_is_taken() {
    let key = |key: &str| read(&with_payload(&format!("reference: {{ key: {key:?} }}")));
    for good in [
        "{topic}/{id}-{sha256}",
        "shop/{tenant}/{id}_{sha256}.json",
        "{tenant}..{id}/{sha256}",
        ".{id}{sha256}",
    ] {
        key(good).unwrap();
    }
    for bad in [
        "/{id}-{sha256}",
        "{id}-{sha256}/",
        "a//{id}-{sha256}",
        "../{id}-{sha256}",
        "{id}/../{sha256}",
        "{id}/./{sha256}",
        "{id} {sha256}",
        "{id}\t{sha256}",
        "{id}%2F{sha256}",
        "{id}\\{sha256}",
        "{id}?{sha256}",
        "ü/{id}-{sha256}",
        "{{{id}}}-{sha256}",
    ] {
        let error = key(bad).unwrap_err();
        assert!(error.contains("payload.reference.key: expected A-Z, a-z, 0-9"), "{bad}: {error}");
    }
}

/// What readers of dialect bakdata can be told, and what others are told beside them.
#[test]
fn encoding_for_bakdata_alone_is_taken_where_nothing_of_it_stays_inline() {
    let alone = "reference: { dialects: [bakdata] }, encode: { codec: gzip }, inline_max: 0";
    assert_eq!(read(&with_payload(alone)).unwrap().warnings.len(), 0);
    let both = read(&with_payload("encode: { codec: snappy }")).unwrap();
    assert!(both.warnings[0].contains("decode gzip and zstd of objects only"), "{:?}", both.warnings);
    let chunks = "oversize: chunk, reference: { dialects: [bakdata] }, encode: { codec: lz4 }";
    assert_eq!(read(&with_payload(chunks)).unwrap().warnings.len(), 0, "nothing is a reference");
}

const INGEST_ALONE: &str =
    "kafka: { bootstrap_servers: k:1 }\ningest: { topics: [orders], spool: /nowhere/spool }\n";

#[test]
fn with_ingest_source_and_tables_may_be_absent() {
    let config = read(INGEST_ALONE).unwrap();
    assert!(config.source.is_none() && config.tables.is_empty() && config.warnings.is_empty());
    let (ingest, spool) = (config.ingest.unwrap(), config.spool.unwrap());
    assert_eq!((ingest.listen.port(), ingest.max_bytes), (9465, 1 << 30));
    assert_eq!((ingest.dedup, ingest.headers.len()), (Duration::from_hours(24), 4));
    assert_eq!((spool.name.as_str(), spool.capture, spool.order), ("ingest", Capture::Poll, Order::Key));
    let required: Vec<&str> = spool.columns.required.iter().map(String::as_str).collect();
    assert!(required.contains(&"topic") && required.contains(&"seq"), "{required:?}");
    let both = format!("{MINIMAL}ingest: {{ topics: [a], spool: /nowhere }}\n");
    let config = read(&both).unwrap();
    assert_eq!((config.tables.len(), config.all_tables().count()), (1, 2));
    // `defaults` are for the spool too, but for what is its own.
    let defaults = "defaults: { on_failure: dead_letter, after_publish: mark, capture: stream, topic: \"{x}\", \
                    headers: { from: [tenant], max_bytes: 1KiB }, columns: { key: k } }\n";
    let spool = read(&format!("{INGEST_ALONE}{defaults}")).unwrap().spool.unwrap();
    assert_eq!((spool.on_failure, spool.after_publish), (OnFailure::DeadLetter, AfterPublish::Delete));
    assert_eq!((spool.topic, spool.columns.key.as_deref()), (None, Some("key")));
    assert_eq!((spool.headers.from.len(), spool.headers.max_bytes), (0, 1 << 10));
}

#[test]
fn keys_to_come_are_accepted_where_they_ask_for_nothing() {
    let text = format!(
        "{MINIMAL}replicas: {{ mode: auto, buckets: 64, lease: 5s }}
log: {{ context: [] }}
defaults: {{ capture: poll, rows: stay, on_failure: park, envelope: none, retention: {{ published: never }},
  payload: {{ encode: {{ codec: none, above: 64KiB }}, inline_max: auto }}, columns: {{ tx: null }} }}
"
    );
    assert_eq!(read(&text).unwrap().replicas.lease, Duration::from_secs(5));
}

#[test]
fn an_object_store_is_checked_without_connecting() {
    let with = |store: &str| read(&format!("{MINIMAL}object_store: {store}\n"));
    let good = "{ url: s3://b/p, options: { endpoint: http://localhost:9000, secret_access_key: hunter2, \
                access_key_id: k } }";
    let config = with(good).unwrap();
    assert_eq!(config.object_store.as_ref().unwrap().open().unwrap().uri("k"), "s3://b/p/k");
    assert!(!format!("{config:?}").contains("hunter2"));
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    let plain = with("{ url: s3://b/p, options: { endpoint: http://minio:9000 } }").unwrap();
    assert!(plain.warnings[0].starts_with("object_store.options.endpoint: payloads go over http://"));
    let meant =
        with("{ url: s3://b/p, options: { endpoint: http://minio:9000, allow_http: true } }").unwrap();
    assert!(meant.warnings.is_empty(), "{:?}", meant.warnings);
    for (store, expected) in [
        ("{ url: ftp://b }", "w.yaml:4:17: object_store.url: expected s3://bucket/prefix, gs://"),
        ("{ options: {} }", "object_store.url: missing; expected"),
        (
            "{ url: s3://b, options: { regoin: x } }",
            "w.yaml:4:41: object_store.options.regoin: unknown option; did you mean `region`?",
        ),
        (
            "{ url: s3://b, options: { endpoint: http://minio:9000, allow_http: no } }",
            "w.yaml:4:41: object_store.options.endpoint: it is http://, and allow_http is false",
        ),
        ("{ url: s3://b, options: { timeout: hunter2 } }", "object_store.options.timeout: "),
    ] {
        let error = with(store).unwrap_err();
        assert!(error.contains(expected) && !error.contains("hunter2"), "{error}");
    }
}
