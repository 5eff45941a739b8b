//! Rows that their order column does not tell apart, and tables that have two names.

use serde_json::Value;
use sqlx::{AssertSqlSafe, SqlitePool};

use crate::{
    harness::{Relay, World, kafka, whippet},
    mysql::{on_both, texts, world},
    mysql_stream::streamed,
    mysql_stream_faults::{distinct, in_order},
    mysql_transient::{TRANSIENT, pass, reads},
    stream::drop_slot,
    stream_rows::with_log,
};

on_both!(
    rows_of_one_number_on_mysql,
    a_table_of_two_names_on_mysql,
    rows_that_do_not_stay_are_relayed_under_one_name_only,
);

const COLUMNS: &str = "topic text, k text, type text, payload text, headers json, \
                       created_at timestamptz NOT NULL DEFAULT now(), published_at timestamptz";

fn findings(world: &World, config: &str) -> Vec<Value> {
    let output = whippet(&["doctor", "--json", "--config", &world.write("doctor.yaml", config)]);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The one finding that says this.
fn finding<'a>(findings: &'a [Value], text: &str) -> &'a Value {
    let mut found =
        findings.iter().filter(|one| one["says"].as_str().is_some_and(|says| says.contains(text)));
    let one = found.next().unwrap_or_else(|| panic!("no finding of {text}: {findings:#?}"));
    assert_eq!(found.next(), None);
    one
}

/// A read takes fewer rows than have one number.
fn table(name: &str, capture: &str, after: &str) -> String {
    format!(
        "{{ name: {name}, capture: {capture}, after_publish: {after}, columns: {{ key: k }}, poll: {{ batch: 2 }} }}"
    )
}

/// One that is parked, three others of its number, and one that has none.
fn rows(table: &str, topic: &str, number: &str) -> String {
    format!(
        "INSERT INTO {table} (seq, topic, k, payload, headers) VALUES ({number}, '{topic}', 'bad', 'bad', '[]'), \
           ({number}, '{topic}', 'good', 'one', NULL), ({number}, '{topic}', 'good', 'two', NULL), \
           ({number}, '{topic}', 'other', 'three', NULL), (NULL, '{topic}', 'null', 'none', NULL)"
    )
}

fn later(table: &str, topic: &str, number: &str) -> String {
    format!("INSERT INTO {table} (seq, topic, k, payload) VALUES ({number}, '{topic}', 'good', 'four')")
}

fn waiting(table: &str) -> String {
    format!("SELECT count(*) FROM {table} WHERE published_at IS NULL")
}

fn sorted(seen: &[crate::harness::Seen]) -> Vec<&str> {
    let mut texts = texts(seen);
    texts.sort_unstable();
    texts
}

const OTHERS: [&str; 5] = ["four", "none", "one", "three", "two"];
const ALL: [&str; 6] = ["bad", "four", "none", "one", "three", "two"];

/// Publishes all rows but the one that is parked, whichever number they have; then that one too.
async fn each_is_recorded_alone(world: &World, relay: &Relay, table: &str, topic: &str, number: &str) {
    world.sql(&rows(table, topic, number)).await;
    let mut consumer = world.consumer(topic);
    consumer.read(4);
    relay.until_status("/tables/0/parked_events", 1).await;
    // Another one of that number, when the first is parked already.
    world.sql(&later(table, topic, number)).await;
    assert_eq!(sorted(consumer.read(5)), OTHERS);
    world.until(&waiting(table), 1).await;
    assert_eq!(relay.status()["tables"][0]["parked_events"], 1);
    world.sql(&format!("UPDATE {table} SET headers = NULL")).await;
    let done = relay.operate(world, &["redrive", "--table", table, "--all"]);
    assert_eq!(done["events"], 1, "{done}");
    world.until(&waiting(table), 0).await;
    relay.until_status("/tables/0/parked_events", 0).await;
    assert_eq!(sorted(consumer.read_to_end()), ALL);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_one_number() {
    let world = World::new("samenumber").await;
    for (name, order, number, capture, after) in [
        ("polled", "bigint", "7", "poll", "delete"),
        ("marked", "bigint", "7", "poll", "mark"),
        ("streamed", "bigint", "7", "stream", "delete"),
        ("streamed_and_marked", "bigint", "7", "stream", "mark"),
        ("by_time", "timestamptz", "'2026-01-02'", "poll", "delete"),
    ] {
        let topic = world.create_topic(name, 1, &[]).await;
        world
            .sql(&format!(
                "CREATE TABLE {name} (seq {order}, id uuid PRIMARY KEY DEFAULT gen_random_uuid(), {COLUMNS})"
            ))
            .await;
        let config = with_log(&world, &format!("[{}]", table(name, capture, after)), "");
        let warning = format!("column seq of table {name} may be NULL and has no unique index of its own");
        let found = findings(&world, &config);
        let found = finding(&found, &warning);
        assert_eq!(found["verdict"], "warn");
        let fix = found["fix"]["sql"].as_str().unwrap();
        // Two times may be the same.
        assert_eq!(fix.contains("CREATE UNIQUE INDEX CONCURRENTLY"), order == "bigint", "{fix}");
        let relay = world.relay(&config);
        relay.wait_for("rows are told apart by their id");
        relay.until_status("/tables/0/capture", capture).await;
        each_is_recorded_alone(&world, &relay, name, &topic, number).await;
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        assert_eq!(log.matches(&warning).count(), 1, "{log}");
    }
    drop_slot(&world).await;
}

/// A read ends inside the run of one number, and one of the run is settled before the others are read.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_takes_no_row_of_its_number_with_it() {
    let world = World::new("deadnumber").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let dead = world.create_topic("events.dlq", 1, &[]).await;
    world
        .sql(&format!(
            "CREATE TABLE outbox (seq bigint NOT NULL, id uuid PRIMARY KEY DEFAULT gen_random_uuid(), {COLUMNS});
             INSERT INTO outbox (id, seq, topic, k, payload, headers)
               SELECT lpad(n::text, 32, '0')::uuid, 7, '{topic}', n::text, n::text, CASE n WHEN 1 THEN '[]'::json END
               FROM generate_series(1, 9) n"
        ))
        .await;
    let relay = world.relay(&world.config(
        &format!(
            "[{{ name: outbox, columns: {{ key: k }}, poll: {{ batch: 1 }}, on_failure: dead_letter, \
                 dead_letter: {{ topic: {dead} }} }}]"
        ),
        "",
    ));
    assert_eq!(sorted(world.consumer(&topic).read(8)), ["2", "3", "4", "5", "6", "7", "8", "9"]);
    assert_eq!(world.consumer(&dead).read(1)[0].text(), "1");
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(relay.stop().0, Some(0));
}

/// A table whose index goes, and comes back, while a row is parked.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_stays_held_when_rows_are_told_apart_by_another_column() {
    let world = World::new("otherplace").await;
    let topic = world.create_topic("events", 1, &[]).await;
    world
        .sql(&format!(
            "CREATE TABLE outbox (seq bigint NOT NULL CONSTRAINT one UNIQUE, id uuid PRIMARY KEY DEFAULT gen_random_uuid(), {COLUMNS})"
        ))
        .await;
    let config = world.config("[{ name: outbox, columns: { key: k } }]", "");
    let relay = world.relay(&config);
    let insert = "INSERT INTO outbox (seq, topic, k, payload, headers) VALUES";
    world.sql(&format!("{insert} (7, '{topic}', 'bad', 'bad', '[]')")).await;
    relay.until_status("/tables/0/parked_events", 1).await;
    assert_eq!(world.number("SELECT count(*) FROM whippet.holds WHERE place = '7'").await, 1);
    relay.kill();

    world.sql("ALTER TABLE outbox DROP CONSTRAINT one").await;
    let relay = world.relay(&config);
    world.until("SELECT count(*) FROM whippet.holds WHERE place = event_id", 1).await;
    world
        .sql(&format!("{insert} (7, '{topic}', 'good', 'good', NULL), (8, '{topic}', 'bad', 'behind', NULL)"))
        .await;
    let mut consumer = world.consumer(&topic);
    assert_eq!(consumer.read(1)[0].text(), "good");
    world.until("SELECT count(*) FROM whippet.holds", 2).await;
    world.until("SELECT count(*) FROM outbox", 2).await;
    relay.kill();

    world.sql("ALTER TABLE outbox ADD UNIQUE (seq)").await;
    let relay = world.relay(&config);
    world.until("SELECT count(*) FROM whippet.holds WHERE place IN ('7', '8')", 2).await;
    assert_eq!(world.number("SELECT count(*) FROM whippet.holds").await, 2);
    world.sql("UPDATE outbox SET headers = NULL").await;
    relay.operate(&world, &["redrive", "--table", "outbox", "--all"]);
    let seen: Vec<&str> = consumer.read(3).iter().map(crate::harness::Seen::text).collect();
    assert_eq!(seen, ["good", "bad", "behind"]);
    world.until("SELECT count(*) FROM outbox", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_nothing_tells_apart_and_kept_rows_without_a_number_are_refused() {
    let world = World::new("nothingtells").await;
    let topic = world.create_topic("events", 1, &[]).await;
    world
        .sql(&format!(
            "CREATE TABLE neither (seq bigint, id uuid DEFAULT gen_random_uuid(), {COLUMNS});
             CREATE TABLE partly (seq bigint NOT NULL, id uuid NOT NULL DEFAULT gen_random_uuid(), {COLUMNS});
             CREATE UNIQUE INDEX ON partly (seq) WHERE topic IS NOT NULL;
             CREATE UNIQUE INDEX ON partly (id, topic);
             CREATE TABLE kept (seq bigint NOT NULL, id uuid PRIMARY KEY DEFAULT gen_random_uuid(), {COLUMNS},
               tx xid8 NOT NULL DEFAULT pg_current_xact_id());
             CREATE INDEX ON kept (tx);
             CREATE TABLE counted (seq bigserial, id uuid, {COLUMNS});
             CREATE TABLE parts (seq bigint NOT NULL, id uuid NOT NULL DEFAULT gen_random_uuid(), {COLUMNS},
               PRIMARY KEY (seq, created_at)) PARTITION BY RANGE (created_at);
             CREATE TABLE part PARTITION OF parts DEFAULT"
        ))
        .await;
    let tables = "[{ name: neither }, { name: partly, columns: { key: k } }, { name: kept, after_publish: keep, \
                    columns: { tx: tx, key: k } }, { name: parts, columns: { key: k } }, { name: counted, \
                    columns: { key: k } }]";
    let config = world.config(tables, "");
    let found = findings(&world, &config);
    let relay = world.relay(&config);
    for (says, fix) in [
        ("column seq of table neither may be NULL and has no unique index of its own", "SET NOT NULL"),
        ("column seq of table partly has no unique index of its own", "CREATE UNIQUE INDEX CONCURRENTLY"),
        (
            "column seq of table kept has no unique index of its own, and after_publish: keep",
            "CREATE UNIQUE INDEX",
        ),
    ] {
        let one = finding(&found, says);
        assert_eq!(one["verdict"], "FAIL", "{one}");
        assert!(one["fix"]["sql"].as_str().unwrap().contains(fix), "{one}");
        relay.wait_for(says);
    }
    // No index of a table in partitions can say more: its id is what its writers make it.
    let parts = finding(&found, "column seq of table parts has no unique index of its own");
    assert_eq!((&parts["verdict"], &parts["fix"]), (&Value::from("warn"), &Value::Null));
    world
        .sql(&format!(
            "INSERT INTO parts (seq, topic, k, payload) VALUES (1, '{topic}', 'k', '1');
             INSERT INTO partly (seq, topic, k, payload) VALUES (1, '{topic}', 'k', '2')"
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    consumer.read(1);
    world.until("SELECT count(*) FROM parts", 0).await;
    // A number of a sequence is given once.
    assert!(
        found
            .iter()
            .all(|one| !one["says"].as_str().unwrap().contains("told apart by their id") || one == parts)
    );
    world
        .sql(&format!(
            "INSERT INTO counted (id, topic, k, payload)
               SELECT '00000000-0000-0000-0000-000000000001', '{topic}', 'k', '3' FROM generate_series(1, 2)"
        ))
        .await;
    world.until("SELECT count(*) FROM counted", 0).await;
    // It is taken up when it is mended.
    world.sql("CREATE UNIQUE INDEX ON partly (seq)").await;
    assert_eq!(sorted(consumer.read(4)), ["1", "2", "3", "3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_two_names_is_relayed_once() {
    let world = World::new("twonames").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world
        .config("[{ name: outbox, columns: { key: k } }, { name: app.outbox, columns: { key: k } }]", "");
    world
        .sql(&format!(
            "CREATE SCHEMA app; CREATE TABLE app.outbox (seq bigserial PRIMARY KEY, id uuid DEFAULT gen_random_uuid(), {COLUMNS});
             ALTER DATABASE {name} SET search_path = app",
            name = world.url.rsplit('/').next().unwrap()
        ))
        .await;
    let relay = world.relay(&config);
    relay.wait_for("which is relayed already");
    world.sql(&format!("INSERT INTO app.outbox (topic, k, payload) VALUES ('{topic}', 'k', '1')")).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(1);
    world.until("SELECT count(*) FROM app.outbox", 0).await;
    let status = relay.status();
    let failing =
        status["tables"].as_array().unwrap().iter().filter(|table| table["state"] == "failing").count();
    assert_eq!(failing, 1, "{status}");
    assert_eq!(consumer.read_to_end().len(), 1);
    let found = findings(&world, &config);
    assert_eq!(finding(&found, "table app.outbox is table outbox")["verdict"], "FAIL");
}

/// The same table under two names, as far as the configuration alone tells.
#[test]
fn a_configuration_has_no_table_twice() {
    let folder = tempfile::tempdir().unwrap();
    for (url, other) in [
        ("postgres://db/shop", "public.outbox"),
        ("mysql://db/shop", "shop.outbox"),
        ("sqlite:///var/lib/shop.db", "Outbox"),
    ] {
        let file = folder.path().join("whippet.yaml");
        let text = format!(
            "source: {{ url: '{url}' }}\nkafka: {{ bootstrap_servers: 'kafka:9092' }}\n\
             tables: [{{ name: outbox }}, {{ name: {other} }}]\n"
        );
        std::fs::write(&file, text).unwrap();
        let output = whippet(&["validate", "--config", file.to_str().unwrap()]);
        let says = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{says}");
        assert!(says.contains(&format!("{other} is table outbox, which is there already")), "{says}");
    }
}

/// Under names that the configuration alone does not tell to be one.
async fn a_table_of_two_names_on_mysql(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let (url, name) = world.url.rsplit_once('/').unwrap();
    let encoded = format!("{url}/%{:02x}{}", name.as_bytes()[0], &name[1..]);
    let tables = format!("[{{ name: outbox }}, {{ name: {name}.outbox }}]");
    let config = world.config_for(&encoded, &kafka(), &tables, "");
    world.install(&world.config("[{ name: outbox }]", "")).await;
    let relay = world.relay(&config);
    relay.wait_for("which is relayed already");
    world.sql(&format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', '1')")).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(1);
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(relay.stop().0, Some(0));
    assert_eq!(consumer.read_to_end().len(), 1);
    let found = findings(&world, &config);
    assert_eq!(finding(&found, &format!("table {name}.outbox is table outbox"))["verdict"], "FAIL");
}

/// Only the log has them: it is not read under both names, and goes on from where it was with one.
async fn rows_that_do_not_stay_are_relayed_under_one_name_only(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, TRANSIENT);
    world.install(&config).await;
    let (url, name) = world.url.rsplit_once('/').unwrap();
    let encoded = format!("{url}/%{:02x}{}", name.as_bytes()[0], &name[1..]);
    let other = TRANSIENT.replace("outbox", &format!("{name}.outbox"));
    let of_two_names = streamed(&world, &format!("{TRANSIENT}, {other}")).replace(&world.url, &encoded);
    let mut consumer = world.consumer(&topic);

    let relay = world.relay(&config);
    reads(&relay).await;
    pass(&world, &topic, 1, 10).await;
    consumer.read(10);
    assert_eq!(relay.stop().0, Some(0));

    let relay = world.relay(&of_two_names);
    relay.wait_for("which is relayed already");
    pass(&world, &topic, 11, 20).await;
    relay
        .until(|status| status["tables"].as_array().unwrap().iter().any(|table| table["state"] == "failing"))
        .await;
    assert_eq!(relay.stop().0, Some(0));
    let found = findings(&world, &of_two_names);
    assert_eq!(finding(&found, &format!("table {name}.outbox is table outbox"))["verdict"], "FAIL");

    let relay = world.relay(&config);
    reads(&relay).await;
    pass(&world, &topic, 21, 30).await;
    in_order(consumer.read_until(|seen| distinct(seen) >= 30), 30);
    assert_eq!(relay.stop().0, Some(0));
    assert_eq!(consumer.read_to_end().len(), 30, "each once");
}

async fn rows_of_one_number_on_mysql(server: &str) {
    let world = world(server).await;
    for (name, capture, after) in
        [("polled", "poll", "delete"), ("marked", "poll", "mark"), ("streamed", "stream", "delete")]
    {
        let topic = world.create_topic(name, 1, &[]).await;
        world
            .sql(&format!(
                "CREATE TABLE {name} (seq BIGINT, id CHAR(36) NOT NULL PRIMARY KEY DEFAULT (UUID()), topic VARCHAR(200), \
                   k VARCHAR(200), type TEXT, payload TEXT, headers JSON, created_at DATETIME(3) DEFAULT (UTC_TIMESTAMP(3)), \
                   published_at DATETIME(6))"
            ))
            .await;
        let config = streamed(&world, &table(name, capture, after));
        let found = findings(&world, &config);
        let fix = &finding(&found, "rows are told apart by their id")["fix"]["sql"];
        assert!(fix.as_str().unwrap().contains(&format!("ALTER TABLE `{name}` ADD UNIQUE (`seq`)")), "{fix}");
        let relay = world.relay(&config);
        relay.until_status("/tables/0/capture", capture).await;
        each_is_recorded_alone(&world, &relay, name, &topic, "7").await;
        assert_eq!(relay.stop().0, Some(0));
    }
    // Mended, and back, while a row is parked: what is held gets the place that its row has.
    let topic = world.create_topic("again", 1, &[]).await;
    let config = streamed(&world, &table("polled", "poll", "delete"));
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "INSERT INTO polled (seq, topic, k, payload, headers) VALUES (7, '{topic}', 'bad', 'bad', '[]')"
        ))
        .await;
    let held = "SELECT count(*) FROM whippet_holds WHERE place = event_id";
    world.until(held, 1).await;
    relay.kill();
    world.sql("ALTER TABLE polled MODIFY seq BIGINT NOT NULL, ADD UNIQUE (seq)").await;
    let relay = world.relay(&config);
    world.until("SELECT count(*) FROM whippet_holds WHERE place = '7'", 1).await;
    relay.kill();
    world.sql("ALTER TABLE polled DROP INDEX seq").await;
    let relay = world.relay(&config);
    world.until(held, 1).await;
    relay.until_status("/tables/0/parked_events", 1).await;
    world.sql("UPDATE polled SET headers = NULL").await;
    relay.operate(&world, &["redrive", "--table", "polled", "--all"]);
    assert_eq!(texts(world.consumer(&topic).read(1)), ["bad"]);
    world.until("SELECT count(*) FROM polled", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_one_number_on_sqlite() {
    let world = World::new("samesqlite").await;
    let url = format!("sqlite://{}?mode=rwc", world.folder.path().join("outbox.db").display());
    let db = SqlitePool::connect(&url).await.unwrap();
    let sql = async |text: &str| sqlx::raw_sql(AssertSqlSafe(text)).execute(&db).await.unwrap();
    let until = async |text: &str, expected: i64| {
        while sqlx::query_scalar::<_, i64>(AssertSqlSafe(text)).fetch_one(&db).await.unwrap() != expected {
            world.pause().await;
        }
    };
    let columns =
        "topic TEXT, k TEXT, type TEXT, payload TEXT, headers TEXT, created_at TEXT, published_at TEXT";
    for after in ["mark", "delete"] {
        let topic = world.create_topic(after, 1, &[]).await;
        sql(&format!(
            "DROP TABLE IF EXISTS outbox; CREATE TABLE outbox (seq INTEGER, \
               id TEXT NOT NULL PRIMARY KEY DEFAULT (lower(hex(randomblob(16)))), {columns})"
        ))
        .await;
        let config = world.config_for(&url, &kafka(), &format!("[{}]", table("outbox", "poll", after)), "");
        let found = findings(&world, &config);
        assert_eq!(finding(&found, "rows are told apart by their id")["verdict"], "warn");
        let relay = world.relay(&config);
        sql(&rows("outbox", &topic, "7")).await;
        let mut consumer = world.consumer(&topic);
        consumer.read(4);
        relay.until_status("/tables/0/parked_events", 1).await;
        sql(&later("outbox", &topic, "7")).await;
        assert_eq!(sorted(consumer.read(5)), OTHERS);
        until(&waiting("outbox"), 1).await;
        relay.kill();
        if after == "delete" {
            // Made anew with a number of its own for each row: what is held gets that for its place, and back.
            sql(&format!(
                "ALTER TABLE outbox RENAME TO before; \
                 CREATE TABLE outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT, {columns}); \
                 INSERT INTO outbox SELECT * FROM before"
            ))
            .await;
            let relay = world.relay(&config);
            until("SELECT count(*) FROM whippet_holds WHERE place = '7'", 1).await;
            relay.kill();
            sql("DROP TABLE outbox; ALTER TABLE before RENAME TO outbox").await;
        }
        let relay = world.relay(&config);
        until("SELECT count(*) FROM whippet_holds WHERE place = event_id", 1).await;
        relay.until_status("/tables/0/parked_events", 1).await;
        sql("UPDATE outbox SET headers = NULL").await;
        relay.operate(&world, &["redrive", "--table", "outbox", "--all"]);
        until(&waiting("outbox"), 0).await;
        assert_eq!(sorted(consumer.read(6)), ALL);
        assert_eq!(relay.stop().0, Some(0));
    }
}
