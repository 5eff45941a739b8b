//! What is said of a file that cannot be taken.

use super::*;

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
            with("{ name: outbox }", "{ name: outbox, topic: 'my topic.{type}' }"),
            "tables[0].topic: no name of a Kafka topic: 1 to 249 of letters",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, dead_letter: { topic: .. } }"),
            "tables[0].dead_letter.topic: no name of a Kafka topic",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, rows: transient, capture: poll }"),
            "tables[0].capture: these events are in the log only",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, rows: transient }"),
            "tables[0].capture: these events are in the log only; expected stream",
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
            with("{ name: outbox }", "{ name: outbox, headers: { static: { id: same } } }"),
            "tables[0].headers.static: the relay writes header id itself",
        ),
        (
            with(
                "{ name: outbox }",
                "{ name: outbox, headers: { columns: { eventType: x, whippet-replay: y } } }",
            ),
            "tables[0].headers.columns: the relay writes header whippet-replay itself",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, headers: { static: { '': x } } }"),
            "tables[0].headers.static: expected the name of a header",
        ),
        (
            with("postgres://relay@localhost/shop", "mysql://x/y, stream: { server_id: 4294967296 }"),
            "source.stream.server_id: expected a whole number from 1 to 4294967295",
        ),
        (
            with("{ name: outbox }", "{ name: outbox, order: 'postgres://a:hunter2@b' }"),
            "expected one of none, key, table, found a URL that is not shown",
        ),
        (with("kafka: ", "kafak: "), "w.yaml:1:1: kafka: missing; expected a mapping of keys"),
        (with("kafka: ", "flume: "), "expected one of source, "),
        (with("kafka: ", "default: "), "did you mean `defaults`?"),
        (
            with("{ name: outbox }", "{ name: outbox }, { name: outbox }"),
            "tables[1].name: table outbox is there twice",
        ),
        (
            with("{ name: outbox }", "{ name: outbox }, { name: public.outbox }"),
            "tables[1].name: public.outbox is table outbox, which is there already",
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
            with("postgres://relay@localhost/shop", "mysql://x/y, stream: {}")
                .replace("{ name: outbox }", "{ name: outbox, rows: transient, capture: auto }"),
            "tables[0].capture: these events are in the log only; expected stream",
        ),
        (
            with("postgres://relay@localhost/shop", "mysql://x/y, stream: { server_id: 4294967295 }"),
            "source.stream.server_id: expected a number from 1 to 4294967294",
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
        (
            with("postgres://relay@localhost/shop", "mysql://x/y, stream: {}").replace(
                "{ name: outbox }",
                "{ name: outbox, capture: stream, after_publish: keep, retention: { published: 1h } }",
            ),
            "tables[0].retention.published: MySQL does not tell when kept rows were published",
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

/// What the library says to programmers helps nobody who writes a file.
#[test]
fn two_of_a_key_and_two_documents_are_told_without_advice_to_programmers() {
    let twice = read(&MINIMAL.replace("kafka: ", "kafka: {}\nkafka: ")).unwrap_err();
    assert_eq!(twice, "w.yaml:3:1: malformed YAML: duplicate mapping key: kafka");
    let documents = read(&format!("{MINIMAL}---\n{MINIMAL}")).unwrap_err();
    assert!(documents.contains("malformed YAML: ") && !documents.contains("from_str"), "{documents}");
}

#[test]
fn a_value_of_the_client_is_hidden_where_it_stands_as_a_word() {
    let with = |property: &str| {
        let text =
            MINIMAL.replace("localhost:9092 }", &format!("localhost:9092, properties: {{ {property} }} }}"));
        read(&text).unwrap_err()
    };
    let range = with("message.max.bytes: 10");
    assert!(range.contains("value … is outside allowed range 1000..1000000000"), "{range}");
    let misplaced = with("broker.address.family: hunter2");
    assert!(misplaced.contains("…") && !misplaced.contains("hunter2"), "{misplaced}");
}

#[test]
fn a_file_that_is_not_utf8_is_told_by_line_and_column() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"source: x\n# \xc3\xa9 \xff\n").unwrap();
    let error = load(file.path()).unwrap_err().to_string();
    assert!(error.ends_with(":2:5: expected UTF-8; this byte belongs to another encoding"), "{error}");
}
