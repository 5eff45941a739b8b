//! The relay by the configuration that `whippet import debezium` makes of a connector, and the real Debezium: the same
//! rows become the same records.

use std::process::Command;

use crate::{
    debezium::{Debezium, compare, connector, json_of_text, properties_of_bytes},
    harness::{Consumer, Relay, Seen, World, kafka, service, whippet},
};

/// Rows of each table, in transactions of ten.
const ROWS: usize = 100;
/// Of the connector for text, and of the one for bytes.
const TOPICS: [&str; 4] = ["t.orders", "t.customers", "b.orders", "b.customers"];

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

/// The same for MariaDB and MySQL.
fn insert_on_mysql(table: &str, payload: &str, from: usize, to: usize) -> String {
    format!(
        "INSERT INTO {table} (id, aggregatetype, aggregateid, type, payload, tenant, number, vip, price, request,
             happened_at, tracingspancontext, shard)
           WITH RECURSIVE numbers AS (SELECT {from} AS i UNION ALL SELECT i + 1 FROM numbers WHERE i < {to})
           SELECT UUID(), IF(i % 2 = 0, 'orders', 'customers'),
           CASE i % 11 WHEN 0 THEN NULL WHEN 1 THEN '' ELSE CONCAT('clé-', i % 7, ' ☃') END, CONCAT('{table} ', i % 3),
           CASE WHEN i % 9 = 3 THEN NULL ELSE {payload} END,
           CASE WHEN i % 5 = 0 THEN NULL WHEN i % 5 = 1 THEN '' ELSE CONCAT('Mieter \"ü\", \\\\', i) END, i, i % 2 = 0,
           i * 1.25, UUID(),
           CASE WHEN i % 4 > 0 THEN TIMESTAMP'2026-01-02 03:04:05.678901' + INTERVAL i * 1700000 MICROSECOND END,
           CASE WHEN i % 6 = 0 THEN CONCAT('#written by hand\\ntraceparent=00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0',
             i % 2, '\\ntracestate=a\\\\=b\\n') END,
           CASE WHEN i % 13 = 0 THEN i % 4 END FROM numbers ORDER BY i"
    )
}

/// The port of a world's database.
fn port(world: &World) -> String {
    world.url.rsplit_once(':').unwrap().1.split('/').next().unwrap().to_owned()
}

/// Imports a connector, makes the relay's own tables by what came of it, and returns the file and the environment of
/// a relay.
async fn imported(world: &World, file: &str, name: &str) -> (String, Vec<(&'static str, String)>) {
    let said = whippet(&["import", "debezium", file]);
    assert_eq!(said.status.code(), Some(0), "{}", String::from_utf8_lossy(&said.stderr));
    let config = world.write(&format!("{name}.yaml"), &String::from_utf8(said.stdout).unwrap());
    let said = whippet(&["validate", "--config", &config]);
    assert_eq!(said.status.code(), Some(0), "{}", String::from_utf8_lossy(&said.stderr));
    let environment = vec![
        ("KAFKA_BOOTSTRAP_SERVERS", kafka()),
        ("WHIPPET__ADMIN__LISTEN", "127.0.0.1:0".into()),
        ("WHIPPET__SOURCE__RELAY_SCHEMA", format!("of_{name}")),
    ];
    let ddl = Command::new(env!("CARGO_BIN_EXE_whippet"))
        .args(["sql", "--config", &config])
        .envs(environment.iter().map(|(name, value)| (*name, value.as_str())))
        .output()
        .unwrap();
    assert!(ddl.status.success(), "{}", String::from_utf8_lossy(&ddl.stderr));
    world.sql(&String::from_utf8(ddl.stdout).unwrap()).await;
    (config, environment)
}

fn start(config: &str, environment: &[(&str, String)]) -> Relay {
    let environment: Vec<(&str, &str)> =
        environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Relay::start_with(config, &environment)
}

/// How many events come by a topic, of so many tables of text and one of bytes.
fn total(topic: &str, of_text: usize) -> usize {
    if topic.starts_with("t.") { of_text * ROWS / 2 } else { ROWS / 2 }
}

/// Reads what Debezium sent, and no more.
fn read_theirs(consumers: &mut [Consumer; 4], of_text: usize) {
    for (topic, consumer) in TOPICS.iter().zip(consumers) {
        let total = total(topic, of_text);
        assert_eq!(consumer.read(total).len(), total, "{topic}");
    }
}

/// Reads what the relay sent after it; how many are equal.
fn compare_ours(consumers: &mut [Consumer; 4], of_text: usize, json_by_value: bool) -> usize {
    let mut records = 0;
    for (topic, consumer) in TOPICS.iter().zip(consumers) {
        let total = total(topic, of_text);
        let seen = consumer.read(2 * total);
        records += compare(&seen[..total], &seen[total..], topic.starts_with("t."), json_by_value);
    }
    records
}

/// Connectors of strings, as JSON, with three tables, and of bytes, as properties.
#[tokio::test]
async fn the_imported_configuration_sends_the_same_records() {
    let world = World::new("debezium").await;
    let columns = "id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255), \
                   type varchar(255) NOT NULL, payload PAYLOAD, tenant text, number integer, vip boolean, \
                   price numeric(10, 2), request uuid, happened_at timestamp, tracingspancontext varchar(256), \
                   shard integer";
    let object = "'{\"b\": [1, 2.50, \"ü ☃ \\n\"],   \"a\":' || i || '}'";
    let text = "CASE i % 7 WHEN 2 THEN '' WHEN 4 THEN repeat('lang ✓ ', 20000) \
                ELSE '<a>' || i || E'\\n\\t\"☃\"</a>' END";
    let bytes = "decode('00ff' || lpad(to_hex(i), 4, '0') || 'c328', 'hex')";
    let tables = [
        ("outbox", "jsonb", format!("({object})::jsonb")),
        ("outbox_json", "json", format!("({object})::json")),
        ("outbox_text", "text", text.to_owned()),
        ("outbox_bytes", "bytea", bytes.to_owned()),
    ];
    for (name, kind, _) in &tables {
        world.sql(&format!("CREATE TABLE {name} ({})", columns.replace("PAYLOAD", kind))).await;
    }
    for topic in TOPICS {
        world.create_topic(topic, 4, &[]).await;
    }
    let (of_text, of_bytes) = (format!("{}_t", world.name), format!("{}_b", world.name));
    let options = |slot: &str, tables: &str, topics: &str| {
        let more = [
            ("connector.class", "io.debezium.connector.postgresql.PostgresConnector".to_owned()),
            ("database.port", port(&world)),
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
        ];
        connector(&world.topic(topics), &more)
    };
    let tables_of_text = "public\\.outbox,public\\.outbox_json,public\\.outbox_text";
    let json = world.write("text.json", &json_of_text(options(&of_text, tables_of_text, "t")));
    let bytes = properties_of_bytes(options(&of_bytes, "public.outbox_bytes", "b"));
    let properties = world.write("bytes.properties", &bytes);

    // The relay reads a slot that is made here, so that both have all rows.
    let mut configs = Vec::new();
    for (file, slot) in [(&json, &of_text), (&properties, &of_bytes)] {
        let (config, mut environment) = imported(&world, file, slot).await;
        let own = format!("{slot}_own");
        world.sql(&format!("SELECT pg_create_logical_replication_slot('{own}', 'pgoutput')")).await;
        environment.push(("WHIPPET__SOURCE__PASSWORD_FILE", world.write("password", "none")));
        environment.push(("WHIPPET__SOURCE__STREAM__SLOT", own));
        configs.push((config, environment));
    }

    let mut debezium = Debezium::start(&world, &[&json, &properties]);
    let active = |names: &str| {
        format!("SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name IN ({names})")
    };
    world.until(&active(&format!("'{of_text}', '{of_bytes}'")), 2).await;
    let mut consumers = TOPICS.map(|topic| world.consumer(&world.topic(topic)));
    for from in (1..=ROWS).step_by(10) {
        for (table, _, payload) in &tables {
            world.sql(&insert(table, payload, from, from + 9)).await;
        }
    }
    read_theirs(&mut consumers, 3);
    debezium.stop();
    let relays: Vec<Relay> = configs.iter().map(|(config, environment)| start(config, environment)).collect();
    let records = compare_ours(&mut consumers, 3, false);
    assert_eq!(records, tables.len() * ROWS);
    for relay in relays {
        assert_eq!(relay.stop().0, Some(0));
    }

    // As it was imported: the slot is Debezium's, and nothing is lost between the two.
    let (config, environment) = &configs[0];
    let environment: Vec<_> =
        environment.iter().filter(|(name, _)| !name.ends_with("SLOT")).cloned().collect();
    world.sql(&insert("outbox", "'{}'::jsonb", 1001, 1001)).await;
    let relay = start(config, &environment);
    world.sql(&insert("outbox", "'{}'::jsonb", 1003, 1003)).await;
    let new = |seen: &[Seen]| seen.iter().filter(|one| one.header("n").unwrap().len() == 4).count();
    let seen = consumers[1].read_until(|seen| new(seen) == 2);
    let repeated = seen.len() - 2 * total(TOPICS[1], 3) - 2;
    println!("{records} records are equal; {repeated} were repeated when the slot was taken over");
    assert_eq!(relay.stop().0, Some(0));
    for slot in [of_text, of_bytes] {
        for slot in [slot.clone(), format!("{slot}_own")] {
            world.until(&active(&format!("'{slot}'")), 0).await;
            world.sql(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;
        }
    }
}

#[tokio::test]
async fn the_imported_configuration_sends_the_same_records_of_mariadb() {
    the_same_records(&service("WHIPPET_TEST_MARIADB"), false).await;
}

#[tokio::test]
async fn the_imported_configuration_sends_the_same_records_of_mysql() {
    the_same_records(&service("WHIPPET_TEST_MYSQL"), true).await;
}

/// The rows stay until the relay has published them, by an order column that is new; nothing else is changed.
async fn the_same_records(server: &str, is_mysql: bool) {
    let (class, without_tls) = match is_mysql {
        true => ("mysql.MySqlConnector", "disabled"),
        false => ("mariadb.MariaDbConnector", "disable"),
    };
    let world = World::on(server, "debezium").await;
    let columns = "id char(36) PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255), \
                   type varchar(255) NOT NULL, payload PAYLOAD, tenant text, number integer, vip boolean, \
                   price decimal(10, 2), request char(36), happened_at datetime(6), tracingspancontext varchar(256), \
                   shard integer";
    let object = "CONCAT('{\"b\": [1, 2.50, \"ü ☃ \\\\n\"],   \"a\":', i, '}')";
    let text = "CASE i % 7 WHEN 2 THEN '' WHEN 4 THEN REPEAT('lang ✓ ', 20000) \
                ELSE CONCAT('<a>', i, '\\n\\t\"☃\"</a>') END";
    let tables = [
        ("outbox", "json", object),
        ("outbox_text", "longtext", text),
        ("outbox_bytes", "longblob", "UNHEX(CONCAT('00ff', LPAD(HEX(i), 4, '0'), 'c328'))"),
    ];
    for (name, kind, _) in &tables {
        let columns = columns.replace("PAYLOAD", kind);
        world.sql(&format!("CREATE TABLE {name} ({columns}) CHARACTER SET utf8mb4")).await;
    }
    for topic in TOPICS {
        world.create_topic(topic, 4, &[]).await;
    }
    let options = |number: &str, tables: &str, topics: &str| {
        let history = world.folder.path().join(format!("history-{topics}"));
        let more = [
            ("connector.class", format!("io.debezium.connector.{class}")),
            ("database.port", port(&world)),
            ("database.user", "whippet".into()),
            ("database.password", String::new()),
            ("database.ssl.mode", without_tls.into()),
            ("database.server.id", number.into()),
            ("database.include.list", world.name.clone()),
            ("table.include.list", tables.replace("DB", &world.name)),
            ("include.schema.changes", "false".into()),
            ("schema.history.internal", "io.debezium.storage.file.history.FileSchemaHistory".into()),
            ("schema.history.internal.file.filename", history.display().to_string()),
            ("topic.prefix", world.topic(topics)),
        ];
        connector(&world.topic(topics), &more)
    };
    let json = world.write("text.json", &json_of_text(options("5411", "DB.outbox,DB.outbox_text", "t")));
    let bytes = properties_of_bytes(options("5412", "DB.outbox_bytes", "b"));
    let properties = world.write("bytes.properties", &bytes);

    let mut debezium = Debezium::start(&world, &[&json, &properties]);
    let readers = "SELECT COUNT(*) FROM information_schema.processlist WHERE command LIKE 'Binlog Dump%'";
    world.until(readers, 2).await;
    let mut consumers = TOPICS.map(|topic| world.consumer(&world.topic(topic)));
    for from in (1..=ROWS).step_by(10) {
        for (table, _, payload) in &tables {
            world.sql(&insert_on_mysql(table, payload, from, from + 9)).await;
        }
    }
    read_theirs(&mut consumers, 2);
    debezium.stop();

    for (table, ..) in &tables {
        world.sql(&format!("ALTER TABLE {table} ADD COLUMN seq bigint NOT NULL AUTO_INCREMENT UNIQUE")).await;
    }
    let mut relays = Vec::new();
    for (file, name) in [(&json, "t"), (&properties, "b")] {
        let (config, environment) = imported(&world, file, name).await;
        relays.push(start(&config, &environment));
    }
    let records = compare_ours(&mut consumers, 2, is_mysql);
    assert_eq!(records, tables.len() * ROWS);
    println!("{records} records are equal");
    for (table, ..) in &tables {
        world.until(&format!("SELECT COUNT(*) FROM {table}"), 0).await;
    }
    for relay in relays {
        assert_eq!(relay.stop().0, Some(0));
    }
}
