//! MySQL and MariaDB: what rows hold.

use crate::{
    harness::{World, service},
    mysql::{on_both, texts, world},
};

on_both!(
    every_type_of_column_goes_out_as_text_or_bytes,
    ids_of_every_shape_are_ids_and_places,
    payloads_of_every_size_are_whole_and_too_large_ones_are_parked_unread,
    memory_is_bounded_by_the_largest_row,
    the_headers_of_a_session_come_without_columns,
);

/// A type, a value, what goes out, and the type of PostgreSQL that gives the same.
struct Case(&'static str, &'static str, &'static [u8], Option<&'static str>);

const CASES: &[Case] = &[
    Case("TINYINT", "-128", b"-128", Some("smallint")),
    Case("TINYINT UNSIGNED", "255", b"255", Some("smallint")),
    Case("BOOLEAN", "TRUE", b"1", None),
    Case("SMALLINT UNSIGNED", "65535", b"65535", Some("integer")),
    Case("MEDIUMINT", "-8388608", b"-8388608", Some("integer")),
    Case("INT UNSIGNED", "4294967295", b"4294967295", Some("bigint")),
    Case("BIGINT UNSIGNED", "18446744073709551615", b"18446744073709551615", Some("numeric")),
    Case("BIGINT", "-9223372036854775808", b"-9223372036854775808", Some("bigint")),
    Case("DECIMAL(20,4)", "-1234567890123456.7800", b"-1234567890123456.7800", Some("numeric(20,4)")),
    Case("DOUBLE", "1.5", b"1.5", Some("double precision")),
    Case("FLOAT", "-0.25", b"-0.25", Some("real")),
    Case("BIT(5)", "b'00101'", b"00101", Some("bit(5)")),
    Case("BIT(64)", "~0", b"1111111111111111111111111111111111111111111111111111111111111111", None),
    Case("CHAR(5)", "'ab'", b"ab", None),
    Case(
        "VARCHAR(40)",
        "'gr\u{fc}\u{df} \u{1f415} '",
        "gr\u{fc}\u{df} \u{1f415} ".as_bytes(),
        Some("varchar(40)"),
    ),
    Case("VARCHAR(40) CHARACTER SET latin1", "'gr\u{fc}\u{df}'", "gr\u{fc}\u{df}".as_bytes(), None),
    Case(
        "VARCHAR(40) CHARACTER SET utf16",
        "'gr\u{fc}\u{df} \u{1f415}'",
        "gr\u{fc}\u{df} \u{1f415}".as_bytes(),
        None,
    ),
    Case("TINYTEXT", "'t'", b"t", Some("text")),
    Case("TEXT", "''", b"", Some("text")),
    Case("MEDIUMTEXT", "'it''s'", b"it's", Some("text")),
    Case("LONGTEXT", "'long'", b"long", Some("text")),
    Case("BINARY(4)", "x'00ff0a'", b"\0\xff\n\0", None),
    Case("VARBINARY(9)", "x'00ff0a'", b"\0\xff\n", None),
    Case("BLOB", "x'00ff5c27'", b"\0\xff\\'", None),
    Case("LONGBLOB", "x''", b"", None),
    Case("JSON", "'{\"a\": [1, \"b\"]}'", b"{\"a\": [1, \"b\"]}", Some("json")),
    Case("ENUM('one','t\u{fc}')", "'t\u{fc}'", "t\u{fc}".as_bytes(), None),
    Case("SET('a','b','c')", "'c,a'", b"a,c", None),
    Case("DATE", "'2026-02-28'", b"2026-02-28", Some("date")),
    Case("TIME(3)", "'-12:34:56.789'", b"-12:34:56.789", None),
    Case("YEAR", "2026", b"2026", None),
    Case("DATETIME", "'2026-02-28 23:59:59'", b"2026-02-28 23:59:59", Some("timestamp")),
    Case("DATETIME(6)", "'2026-02-28 23:59:59.000001'", b"2026-02-28 23:59:59.000001", Some("timestamp")),
    // The session that writes is in another zone: what comes is in UTC.
    Case("TIMESTAMP(6) NULL", "'2026-02-28 23:59:59.500000'", b"2026-02-28 18:29:59.500000", None),
    Case(
        "CHAR(36)",
        "'0b5c1b2e-7a51-4f6d-9d3e-2f1a6c5b4d3e'",
        b"0b5c1b2e-7a51-4f6d-9d3e-2f1a6c5b4d3e",
        Some("uuid"),
    ),
    Case("INT", "NULL", b"", Some("integer")),
];

async fn every_type_of_column_goes_out_as_text_or_bytes(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let wanted: Vec<Option<Vec<u8>>> =
        CASES.iter().map(|case| (case.1 != "NULL").then(|| case.2.to_vec())).collect();
    let tables = |cases: &[&Case]| {
        let table = |n| format!("{{ name: t{n}, columns: {{ payload: v, key: n, created_at: at }} }}");
        format!("[{}]", (0..cases.len()).map(table).collect::<Vec<_>>().join(", "))
    };
    let all: Vec<&Case> = CASES.iter().collect();
    let mut script = String::from("SET time_zone = '+05:30';\n");
    for (n, Case(kind, value, ..)) in CASES.iter().enumerate() {
        script += &format!(
            "CREATE TABLE t{n} (seq BIGINT AUTO_INCREMENT PRIMARY KEY, id CHAR(36) NOT NULL DEFAULT (UUID()), \
               topic TEXT NOT NULL, n INT, v {kind}, at TIMESTAMP(3) NOT NULL);\n\
             INSERT INTO t{n} (topic, n, v, at) VALUES ('{topic}', {n}, {value}, '2026-01-01 05:30:00.123');\n"
        );
    }
    world.sql(&script).await;
    let relay = world.relay(&world.config(&tables(&all), ""));
    let mut consumer = world.consumer(&topic);
    consumer.read(CASES.len());
    let got = |seen: &[crate::harness::Seen], n: usize| {
        let record = seen.iter().find(|one| one.key.as_deref() == Some(n.to_string().as_bytes())).unwrap();
        record.payload.clone()
    };
    for (n, wanted) in wanted.iter().enumerate() {
        let shown = got(&consumer.seen, n).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        assert_eq!(&got(&consumer.seen, n), wanted, "{}: {shown:?}", CASES[n].0);
    }
    assert!(consumer.seen.iter().all(|record| record.timestamp == Some(1_767_225_600_123)));
    assert_eq!(relay.stop().0, Some(0));

    // The same from PostgreSQL, where it has such a type.
    let world = World::on(&service("WHIPPET_TEST_PG"), "types").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let comparable: Vec<(usize, &Case)> =
        CASES.iter().enumerate().filter(|(_, case)| case.3.is_some()).collect();
    let mut script = String::new();
    for (n, (_, Case(_, value, _, kind))) in comparable.iter().enumerate() {
        script += &format!(
            "CREATE TABLE t{n} (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, \
               id uuid NOT NULL DEFAULT gen_random_uuid(), topic text NOT NULL, n int, v {}, at timestamptz);\n\
             INSERT INTO t{n} (topic, n, v, at) VALUES ('{topic}', {n}, {value}, now());\n",
            kind.unwrap()
        );
    }
    world.sql(&script).await;
    let cases: Vec<&Case> = comparable.iter().map(|(_, case)| *case).collect();
    let _relay = world.relay(&world.config(&tables(&cases), ""));
    let mut consumer = world.consumer(&topic);
    consumer.read(cases.len());
    for (n, (of, case)) in comparable.iter().enumerate() {
        assert_eq!(got(&consumer.seen, n), wanted[*of], "{}", case.0);
    }
}

async fn ids_of_every_shape_are_ids_and_places(server: &str) {
    for charset in ["utf8mb4", "latin1"] {
        ids_of_every_shape(world(server).await, charset).await;
    }
}

async fn ids_of_every_shape(world: World, charset: &str) {
    let topic = world.create_topic("events", 1, &[]).await;
    let uuid = "0b5c1b2e-7a51-4f6d-9d3e-2f1a6c5b4d3e";
    let other = "1b5c1b2e-7a51-4f6d-9d3e-2f1a6c5b4d3e";
    let tables = "[{ name: a, order: none, columns: { sequence: null } }, { name: b, order: none, columns: { sequence: null } }, \
                   { name: c, order: none, columns: { sequence: null } }, { name: d }]";
    let config = world.config(tables, "");
    world
        .sql(&format!(
            "CREATE TABLE a (id BINARY(16) PRIMARY KEY, topic TEXT NOT NULL, payload TEXT, headers JSON);
             CREATE TABLE b (id CHAR(36) CHARACTER SET latin1 PRIMARY KEY, topic TEXT NOT NULL, payload TEXT, headers JSON);
             CREATE TABLE c (id VARCHAR(20) CHARACTER SET {charset} NOT NULL, topic TEXT NOT NULL, payload TEXT, headers JSON);
             CREATE TABLE d (seq BIGINT UNSIGNED AUTO_INCREMENT PRIMARY KEY, id VARBINARY(8) NOT NULL, topic TEXT NOT NULL, payload TEXT, headers JSON);
             INSERT INTO a VALUES (UNHEX(REPLACE('{uuid}', '-', '')), '{topic}', 'a', NULL), (UNHEX(REPLACE('{other}', '-', '')), '{topic}', 'bad', '7');
             INSERT INTO b VALUES ('{uuid}', '{topic}', 'b', NULL), ('{other}', '{topic}', 'bad', '7');
             INSERT INTO c VALUES ('id', '{topic}', 'c', NULL), ('ID', '{topic}', 'bad', '7'), ('Id', '{topic}', 'bad', '7'), ('id ', '{topic}', 'c2', NULL);
             INSERT INTO d (id, topic, payload, headers) VALUES (x'00ff', '{topic}', 'd', NULL), (x'01', '{topic}', 'bad', '7')"
        ))
        .await;
    let relay = world.relay(&config);
    let mut consumer = world.consumer(&topic);
    let mut ids: Vec<(String, String)> =
        consumer.read(5).iter().map(|one| (one.text().into(), one.header("id").unwrap().into())).collect();
    ids.sort();
    let expected = [("a", uuid), ("b", uuid), ("c", "id"), ("c2", "id "), ("d", "00ff")];
    assert_eq!(ids, expected.map(|(text, id)| (text.to_owned(), id.to_owned())));
    // Each bad one is alone in its table, and nothing else of the same spelling went with another.
    for table in ["a", "b", "c", "d"] {
        let bad = if table == "c" { 2 } else { 1 };
        world.until(&format!("SELECT count(*) FROM {table}"), bad).await;
        let left = format!("SELECT count(*) FROM {table} WHERE payload = 'bad'");
        assert_eq!(world.number(&left).await, bad);
    }
    world.until("SELECT count(*) FROM whippet_holds", 5).await;
    relay.kill();
    let relay = world.relay(&config);
    for table in 0..4 {
        relay.until_status(&format!("/tables/{table}/parked_events"), if table == 2 { 2 } else { 1 }).await;
    }
    for (table, id, left) in [("a", other, 0), ("c", "ID", 1), ("c", "Id", 0), ("d", "01", 0)] {
        world.sql(&format!("UPDATE {table} SET headers = NULL")).await;
        let shown = relay.operate(&world, &["parked", "--table", table, "--id", id, "--payload"]);
        assert_eq!(shown["parked"][0]["payload"], "bad", "{table}");
        relay.operate(&world, &["redrive", "--table", table, "--id", id]);
        world.until(&format!("SELECT count(*) FROM {table}"), left).await;
    }
    relay.operate(&world, &["skip", "--table", "b", "--id", other, "--reason", "test"]);
    world.until("SELECT count(*) FROM b", 0).await;
    assert_eq!(consumer.read_to_end().len(), 9);
}

async fn payloads_of_every_size_are_whole_and_too_large_ones_are_parked_unread(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[("max.message.bytes", "40000000")]).await;
    let tables = "[{ name: outbox, payload: { max_bytes: 24MiB } }, { name: documents }]";
    let config = world.config(tables, "limits: { in_flight_bytes: 4MiB }");
    let config = config
        .replace("kafka: {", "kafka: { compression: none, properties: { message.max.bytes: '40000000' },");
    world.install(&config).await;
    world.sql("ALTER TABLE documents MODIFY payload JSON").await;
    let sizes = [0, 1, 1 << 10, 1 << 20, (1 << 20) + 1, 5 << 20, (16 << 20) - 1, 16 << 20, 20 << 20];
    for size in sizes {
        world
            .sql(&format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', REPEAT(x'ff', {size}))"))
            .await;
    }
    world
        .sql(&format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', REPEAT('x', 25 << 20))"))
        .await;
    world
        .sql(&format!(
            "INSERT INTO documents (topic, payload) VALUES ('{topic}', JSON_ARRAY(REPEAT('x', 6 << 20)))"
        ))
        .await;
    let relay = world.relay(&config);
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read(sizes.len() + 1);
    let mut found: Vec<usize> = seen.iter().map(|one| one.payload.as_ref().unwrap().len()).collect();
    found.sort_unstable();
    let mut wanted: Vec<usize> = sizes.iter().copied().chain([(6 << 20) + 4]).collect();
    wanted.sort_unstable();
    assert_eq!(found, wanted);
    assert!(
        seen.iter()
            .filter_map(|one| one.payload.as_ref())
            .any(|payload| payload.iter().all(|byte| *byte == 0xff))
    );
    relay.until_status("/tables/0/parked_events", 1).await;
    assert_eq!(relay.stop().0, Some(0));
}

async fn memory_is_bounded_by_the_largest_row(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let store = world.folder.path().join("store");
    std::fs::create_dir(&store).unwrap();
    let more =
        format!("limits: {{ in_flight_bytes: 4MiB }}\nobject_store: {{ url: 'file://{}' }}", store.display());
    let config = world.config("[{ name: outbox }]", &more);
    world.install(&config).await;
    for n in 0..6 {
        world
            .sql(&format!(
                "INSERT INTO outbox (topic, payload) VALUES ('{topic}', REPEAT(CHAR(97 + {n}), 40 << 20))"
            ))
            .await;
    }
    let relay = world.relay(&config);
    let mut consumer = world.consumer(&topic);
    for (n, record) in consumer.read(6).iter().enumerate() {
        let object = std::fs::read(record.text().strip_prefix("file://").unwrap()).unwrap();
        assert_eq!(object.len(), 40 << 20);
        assert!(object.iter().all(|byte| *byte == b'a' + n as u8), "{n}");
    }
    // contract.md, section 4.
    let (peak, most) = (relay.peak_mib(), 40.0 + 2.0 * 4.0 + 3.0 * 40.0);
    eprintln!("at most {peak:.0} of {most:.0} MiB");
    assert!(peak < most, "{peak:.0} MiB");
}

async fn the_headers_of_a_session_come_without_columns(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    // Twice: it is safe to run again.
    world.install(&config).await;
    world.install(&config).await;
    let _relay = world.relay(&config);
    world
        .sql(&format!(
            "SET @whippet_context = '{{\"x-request-id\": \"7\", \"user\": \"gr\u{fc}n\"}}';
             INSERT INTO outbox (topic, payload) VALUES ('{topic}', '1');
             INSERT INTO outbox (topic, payload, headers) VALUES ('{topic}', '2', '{{\"own\": \"yes\"}}');
             SET @whippet_context = NULL;
             INSERT INTO outbox (topic, payload) VALUES ('{topic}', '3')"
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read(3);
    assert_eq!(texts(seen), ["1", "2", "3"]);
    assert_eq!((seen[0].header("x-request-id"), seen[0].header("user")), (Some("7"), Some("gr\u{fc}n")));
    assert_eq!((seen[1].header("own"), seen[1].header("user")), (Some("yes"), None));
    assert_eq!(seen[2].header("user"), None);
}
