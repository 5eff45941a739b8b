use std::collections::BTreeMap;

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

/// Each broken file with the place and the words of what is said about it.
#[test]
fn every_error_names_its_place_and_what_was_expected() {
    let with = |from: &str, to: &str| MINIMAL.replace(from, to);
    let once = |table: &str| {
        with("localhost:9092 }", "localhost:9092, delivery: exactly_once }")
            .replace("{ name: outbox }", &format!("{{ name: outbox, {table} }}"))
    };
    let cases = [
        (with("tables:", "tabels:"), "w.yaml:3:1: tabels: unknown key; did you mean `tables`?"),
        (
            with("{ name: outbox }", "{ name: outbox, topik: x }"),
            "w.yaml:3:26: tables[0].topik: unknown key; did you mean `topic`?",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, poll: { batch: many } }"),
            "w.yaml:3:41: tables[0].poll.batch: expected a whole number from 1 to 100000, found `many`",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, order: kee }"),
            "tables[0].order: expected one of none, key, table, found `kee`; did you mean `key`?",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, retry: { max: 5 } }"),
            "tables[0].retry.max: expected a duration such as 250ms, 5s or 2m, found `5`",
        ),
        (with("{ name: outbox }", "outbox"), "tables[0]: expected a mapping of keys"),
        (
            with("{ name: outbox }", "{ name: outbox, topic: \"a{b\" }"),
            "tables[0].topic: not a template: a { without its }",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, rows: transient, capture: poll }"),
            "tables[0].capture: these events are in the log only",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, after_publish: keep }"),
            "tables[0].columns.tx: missing; expected the column that after_publish: keep goes by: xid8",
        ),
        (
            with("{ name: outbox }", "{ name: \"message:x\", after_publish: keep }"),
            "tables[0].after_publish: nothing of these events stays",
        ),
        (
            with(
                "{ name: outbox }",
                "{ name: outbox, after_publish: keep, columns: { tx: t, sequence: null } }",
            ),
            "tables[0].columns.sequence: missing; expected the integer order column",
        ),
        (
            with("postgres://relay@localhost/shop", "\"sqlite://app.db\"")
                .replace("{ name: outbox }", "{ name: outbox, after_publish: keep, columns: { tx: tx } }"),
            "tables[0].columns.tx: SQLite's rows are kept by their number",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, retention: { published: 7d } }"),
            "tables[0].retention.published: published rows stay with after_publish: mark or keep only",
        ),
        (
            with("{ name: outbox }", "{ name: \"message:x\", capture: auto }"),
            "tables[0].capture: these events are in the log only; expected stream",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, payload: { oversize: claim_check } }"),
            "tables[0].payload.oversize: claim_check needs object_store",
        ),
        (
            with_payload("reference: { key: \"{topic}/{id}\" }"),
            "reference.key: expected {id} and {sha256} in it",
        ),
        (
            with_payload("reference: { key: \"{id}-{{sha256}}\" }"),
            "reference.key: expected {id} and {sha256} in it",
        ),
        (
            with_payload("reference: { key: \"{id}-{sha256\" }"),
            "reference.key: not a template: a { without its }",
        ),
        (
            with_payload("reference: { dialects: [bakdata] }, encode: { codec: snappy }"),
            "encode.codec: readers of dialect bakdata decode gzip and zstd only",
        ),
        (
            with_payload("reference: { dialects: [bakdata] }, encode: { codec: lz4 }, inline_max: 0"),
            "encode.codec: readers of dialect bakdata decode gzip and zstd only",
        ),
        (
            with_payload("reference: { dialects: [bakdata] }, encode: { codec: zstd }"),
            "encode.codec: readers of dialect bakdata are not told what is encoded in a record",
        ),
        (
            with("{ name: outbox }", "{ name: outbox }, { name: outbox }"),
            "tables[1].name: table outbox is there twice",
        ),
        (with("[{ name: outbox }]", "[]"), "tables: expected at least 1 element(s)"),
        (with("tables: [{ name: outbox }]\n", ""), "tables: missing; expected a list"),
        (
            with("postgres://relay@localhost/shop", "mariadb://x/y"),
            "w.yaml:1:16: source.url: write mysql:// for MariaDB too",
        ),
        (with("postgres://relay@localhost/shop", "mysql://x"), "source.url: expected a database in it"),
        (
            with("postgres://relay@localhost/shop", "\"mysql://x/y?pool=7\""),
            "source.url: there is no parameter pool",
        ),
        (
            with("postgres://relay@localhost/shop", "mysql://x/y, tls: { mode: verify-ca }"),
            "source.tls.mode: the driver for MySQL checks the name with the certificate",
        ),
        (
            with("postgres://relay@localhost/shop", "mysql://x/y, stream: { server_id: 0 }"),
            "source.stream.server_id: expected a whole number from 1",
        ),
        (
            with("postgres://relay@localhost/shop", "mysql://x/y")
                .replace("{ name: outbox }", "{ name: outbox, capture: stream, rows: transient }"),
            "tables[0].rows: rows that only the binlog has are still to come; expected stay",
        ),
        (
            with("postgres://relay@localhost/shop", "mysql://x/y")
                .replace("{ name: outbox }", "{ name: \"message:a\" }"),
            "tables[0].name: MySQL has no logical messages",
        ),
        (
            with("postgres://relay@localhost/shop", "mysql://x/y")
                .replace("{ name: outbox }", "{ name: outbox, after_publish: keep }"),
            "tables[0].after_publish: MySQL does not tell",
        ),
        (with("postgres://relay@localhost/shop", "\"sqlite::memory:\""), "source.url: a database in memory"),
        (
            with("postgres://relay@localhost/shop", "\"${NOWHERE}\""),
            "source.url: `${NOWHERE}` cannot be resolved: the variable is not set",
        ),
        (
            with("localhost:9092 }", "localhost:9092, properties: { acks: 1 } }"),
            "kafka.properties.acks: refused: fewer acknowledgements lose events",
        ),
        (
            with("localhost:9092 }", "localhost:9092, properties: { sasl.mechanis: x } }"),
            "kafka.properties.sasl.mechanis: librdkafka says: No such configuration property",
        ),
        (
            with("localhost:9092 }", "localhost:9092, properties: { transactional.id: mine } }"),
            "kafka.properties.transactional.id: refused: the relay has one by the source",
        ),
        (
            with("localhost:9092 }", "localhost:9092, properties: { transaction.timeout.ms: 900000 } }"),
            "kafka.properties.transaction.timeout.ms: refused: a relay that dies",
        ),
        (
            once("capture: auto"),
            "tables[0].capture: with kafka.delivery: exactly_once, auto cannot be chosen",
        ),
        (
            once("capture: stream, rows: transient"),
            "tables[0].rows: with kafka.delivery: exactly_once, transient cannot be chosen",
        ),
        (
            once("after_publish: keep"),
            "tables[0].after_publish: with kafka.delivery: exactly_once, keep cannot be chosen",
        ),
        (
            once("capture: stream").replace("name: outbox", "name: \"message:a\""),
            "tables[0].name: with kafka.delivery: exactly_once, logical messages cannot be chosen",
        ),
        (
            once("capture: poll") + "ingest: { topics: [a], spool: /var/lib/whippet }\n",
            "kafka.delivery: exactly_once is for tables: run `ingest` in a relay of its own",
        ),
        (
            with("localhost:9092 }", "localhost:9092, position_topic: 'not a topic' }"),
            "kafka.position_topic: not a legal name",
        ),
        (
            format!("{MINIMAL}log: {{ context: [x-request-id, ''] }}\n"),
            "log.context[1]: expected the name of a header",
        ),
        (
            format!("{MINIMAL}telemetry: {{ otlp_endpoint: 'otel:4317' }}\n"),
            "telemetry.otlp_endpoint: expected http://host:4317 (gRPC)",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, envelope: cloudevents }"),
            "tables[0].envelope: expected one of none, cloudevents-binary, cloudevents-structured",
        ),
        (
            with(
                "{ name: outbox }",
                "{ name: o, envelope: cloudevents-binary, headers: { blob: x-context } }",
            ),
            "tables[0].headers.blob: a CloudEvent has its context as attributes",
        ),
        (
            with("{ name: outbox }", "{ name: o, headers: { blob: id } }"),
            "tables[0].headers.blob: expected the name of a header that the relay does not write itself",
        ),
        (
            with(
                "{ name: outbox }",
                "{ name: o, envelope: cloudevents-structured, payload: { oversize: chunk } }",
            ),
            "tables[0].payload.oversize: a structured CloudEvent is one record",
        ),
        (
            with(
                "{ name: outbox }",
                "{ name: o, envelope: cloudevents-structured, payload: { encode: { codec: zstd } } }",
            ),
            "tables[0].payload.encode.codec: a structured CloudEvent is JSON",
        ),
        (with("tables:", "  tables:"), "malformed YAML"),
        (
            format!("{MINIMAL}admin: {{ listen: localhost }}\n"),
            "admin.listen: expected an IP address and a port",
        ),
        (format!("{MINIMAL}source: {{}}\n"), "malformed YAML"),
        (String::new(), "source: missing"),
    ];
    for (text, expected) in cases {
        let said = read(&text).expect_err(&text);
        assert!(said.contains(expected), "\n{text}\nsaid     {said}\nexpected {expected}");
        assert!(said.starts_with("w.yaml"), "{said}");
    }
}

#[test]
fn all_problems_are_told_at_once_in_the_order_of_the_file() {
    let said = read("source: { url: 7 }\nkafka: { linger: x }\ntables: [{ nam: a }]\n").unwrap_err();
    let keys: Vec<&str> = said.lines().filter_map(|line| line.split(": ").nth(1)).collect();
    assert_eq!(
        keys,
        ["kafka.bootstrap_servers", "kafka.linger", "tables[0].name", "tables[0].nam"],
        "{said}"
    );
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
fn what_is_wrong_with_ingest_is_told_with_its_place() {
    let with = |from: &str, to: &str| INGEST_ALONE.replace(from, to);
    for (text, expected) in [
        (with("topics: [orders], ", ""), "ingest.topics: missing; expected a list"),
        (with("[orders]", "[]"), "ingest.topics: expected at least 1 element(s)"),
        (with("[orders]", "[a b]"), "ingest.topics[0]: expected a topic, or a glob"),
        (with(", spool: /nowhere/spool", ""), "ingest.spool: missing"),
        (with("topics:", "max_bytes: 1KiB, topics:"), "ingest.max_bytes: expected at least 1MiB"),
        (
            with("topics:", "headers: [a b], topics:"),
            "ingest.headers[0]: expected the name of an HTTP header",
        ),
        (
            with("topics:", "listen: \"127.0.0.1:9464\", topics:"),
            "ingest.listen: admin.listen has this address",
        ),
        (format!("{INGEST_ALONE}tables: [{{ name: outbox }}]\n"), "source: missing"),
        (
            format!("{INGEST_ALONE}source: {{ url: postgres://x/y }}\n"),
            "tables: expected at least 1 element(s)",
        ),
        (
            MINIMAL.replace("outbox", "ingest") + "ingest: { topics: [a], spool: /nowhere }\n",
            "a table is called ingest, and so is the spool",
        ),
        (
            format!(
                "{INGEST_ALONE}defaults: {{ payload: {{ reference: {{ key: \"{{tenant}}/{{id}}-{{sha256}}\" }} }} }}\n"
            ),
            "defaults.payload.reference.key: the spool of ingest has no column tenant",
        ),
        (
            format!("{INGEST_ALONE}defaults: {{ payload: {{ oversize: claim_check }} }}\n"),
            "defaults.payload.oversize: claim_check needs object_store",
        ),
    ] {
        let said = read(&text).expect_err(expected);
        assert!(said.contains(expected), "{said}\n{text}");
    }
    let open = read(&with("topics:", "listen: \"0.0.0.0:9465\", topics:")).unwrap();
    assert!(open.warnings[0].contains("whoever reaches this address can publish"), "{:?}", open.warnings);
    let memory = read(&with("/nowhere/spool", "/dev/shm")).unwrap();
    assert!(memory.warnings[0].contains("it is memory"), "{:?}", memory.warnings);
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

fn file(path: &str) -> String {
    std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

#[test]
fn the_annotated_file_and_every_example_load() {
    let env: BTreeMap<String, String> = BTreeMap::new();
    let examples = format!("{}/config/examples", env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<String> = std::fs::read_dir(examples)
        .unwrap()
        .map(|entry| format!("config/examples/{}", entry.unwrap().file_name().display()))
        .collect();
    assert!(files.len() >= 3);
    files.push("config/whippet.yaml".into());
    for name in files {
        parse(&name, &file(&name), &env).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn an_object_store_is_checked_without_connecting() {
    let with = |store: &str| read(&format!("{MINIMAL}object_store: {store}\n"));
    let good = "{ url: s3://b/p, options: { endpoint: http://localhost:9000, secret_access_key: hunter2, \
                access_key_id: k } }";
    let config = with(good).unwrap();
    assert_eq!(config.object_store.as_ref().unwrap().open().unwrap().uri("k"), "s3://b/p/k");
    assert!(!format!("{config:?}").contains("hunter2"));
    for (store, expected) in [
        ("{ url: ftp://b }", "w.yaml:4:17: object_store.url: expected s3://bucket/prefix, gs://"),
        ("{ options: {} }", "object_store.url: missing; expected"),
        (
            "{ url: s3://b, options: { regoin: x } }",
            "w.yaml:4:41: object_store.options.regoin: unknown option; did you mean `region`?",
        ),
        (
            "{ url: s3://b, options: { endpoint: http://minio:9000 } }",
            "w.yaml:4:41: object_store.options.endpoint: anybody on the way reads",
        ),
        ("{ url: s3://b, options: { timeout: hunter2 } }", "object_store.options.timeout: "),
    ] {
        let error = with(store).unwrap_err();
        assert!(error.contains(expected) && !error.contains("hunter2"), "{error}");
    }
}

/// Every key of the schema stands in the annotated file: as a key, or, if it is still to come, in a
/// comment.
#[test]
fn the_annotated_file_has_every_key() {
    let text = file("config/whippet.yaml");
    let mut missing = Vec::new();
    keys(&schema(), "", &mut |path, name| {
        if path.starts_with("defaults.") {
            return;
        }
        let there = text.lines().any(|line| {
            line.trim_start().trim_start_matches(['#', ' ', '-']).starts_with(&format!("{name}:"))
        });
        if !there {
            missing.push(path.to_owned());
        }
    });
    assert!(missing.is_empty(), "config/whippet.yaml lacks {missing:?}");
}

fn keys(schema: &Value, path: &str, found: &mut dyn FnMut(&str, &str)) {
    let nested = [&schema["items"], &schema["anyOf"][0]];
    for schema in nested.into_iter().filter(|nested| nested.is_object()) {
        keys(schema, path, found);
    }
    for (name, child) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        found(&path, name);
        keys(child, &path, found);
    }
}
