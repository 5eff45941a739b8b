//! What the database does to us, other than to go away.

use std::time::{Duration, Instant};

use sqlx::Connection as _;

use crate::harness::{SOON, World, service, services};

const INSERT: &str = "INSERT INTO outbox (topic, key, payload)";

async fn stage(name: &str, tables: &str) -> (World, crate::harness::Relay, String) {
    let world = World::new(name).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config(tables, "");
    world.install(&config).await;
    // Of a deadlock the application finds out first, or the relay: not by chance.
    world.sql(&format!("ALTER DATABASE {} SET deadlock_timeout = '10s'", world.name)).await;
    let relay = world.relay(&config);
    relay.wait_for("this relay owns the source");
    (world, relay, topic)
}

fn batch(topic: &str, from: u32, to: u32) -> String {
    format!(
        "{INSERT} SELECT '{topic}', 'k', convert_to('' || i, 'UTF8') FROM generate_series({from}, {to}) i"
    )
}

/// In order, with repeats only.
fn assert_all(world: &World, topic: &str, count: u32) {
    let mut highest = 0;
    for record in world.consumer(topic).read_to_end() {
        let number: u32 = record.text().parse().unwrap();
        assert!(number <= highest + 1, "{number} after {highest}");
        highest = highest.max(number);
    }
    assert_eq!(highest, count);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_restarts_or_drops_connections_is_survived() {
    let (world, relay, topic) = stage("dbrestart", "[{ name: outbox }]").await;
    world.sql(&batch(&topic, 1, 1000)).await;
    world.sql(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'whippet' AND datname = '{}'", world.name)).await;
    world.sql(&batch(&topic, 1001, 2000)).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    tokio::task::spawn_blocking(|| services("restart", "postgres")).await.unwrap();
    // The test's own pool has dead connections as well.
    while sqlx::query("SELECT 1").execute(world.db.pg()).await.is_err() {}
    world.sql(&batch(&topic, 2001, 3000)).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!((relay.get("/livez").0, relay.get("/readyz").0), (200, 200));
    assert_all(&world, &topic, 3000);
}

/// A failover that leaves us connected to what is a standby now: every write is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_has_become_read_only_is_left_for_the_next_one() {
    let (world, relay, topic) = stage("readonly", "[{ name: outbox }]").await;
    let name = &world.name;
    world.sql(&batch(&topic, 1, 10)).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    world
        .sql(&format!(
            "ALTER DATABASE {name} SET default_transaction_read_only = on;
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'whippet' AND datname = '{name}'"
        ))
        .await;
    relay.wait_for("read-only transaction");
    assert_eq!(relay.get("/livez").0, 200);
    let mut writer = sqlx::PgConnection::connect(&world.url).await.unwrap();
    for statement in [
        "SET default_transaction_read_only = off".to_owned(),
        format!("ALTER DATABASE {name} SET default_transaction_read_only = off"),
        batch(&topic, 11, 20),
    ] {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut writer).await.unwrap();
    }
    // Nobody closes the relay's connections, which stay read-only: it has to leave them by itself.
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_all(&world, &topic, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_without_a_free_connection_is_waited_for() {
    let (world, relay, topic) = stage("exhausted", "[{ name: outbox }]").await;
    let name = &world.name;
    // A superuser is let in whatever the limit is, so the database is closed to all instead, from
    // another one.
    let mut server = sqlx::PgConnection::connect(&service("WHIPPET_TEST_PG")).await.unwrap();
    let allow = |allow: bool| sqlx::AssertSqlSafe(format!("ALTER DATABASE {name} ALLOW_CONNECTIONS {allow}"));
    sqlx::raw_sql(allow(false)).execute(&mut server).await.unwrap();
    world.sql(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'whippet' AND datname = '{name}'")).await;
    relay.wait_for("not currently accepting connections");
    world.sql(&batch(&topic, 1, 10)).await;
    sqlx::raw_sql(allow(true)).execute(&mut server).await.unwrap();
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_all(&world, &topic, 10);
}

/// The application locks rows in another order than the relay deletes them.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadlock_with_the_application_is_tried_again() {
    let (world, relay, topic) = stage("deadlock", "[{ name: outbox }]").await;
    relay.operate(&world, &["pause", "--table", "outbox"]);
    world.sql(&batch(&topic, 1, 3)).await;
    let mut connection = sqlx::PgConnection::connect(&world.url).await.unwrap();
    let mut app = connection.begin().await.unwrap();
    // Whoever waits first is the victim, and that is to be the relay.
    sqlx::raw_sql("SET LOCAL deadlock_timeout = '1min'; UPDATE outbox SET type = 'x' WHERE seq = 3")
        .execute(&mut *app)
        .await
        .unwrap();
    // Row 1 keeps the relay from deleting until all are published: then 2 and 3 are in one statement.
    let mut another = sqlx::PgConnection::connect(&world.url).await.unwrap();
    let mut gate = another.begin().await.unwrap();
    sqlx::query("SELECT FROM outbox WHERE seq = 1 FOR UPDATE").execute(&mut *gate).await.unwrap();
    relay.operate(&world, &["resume", "--table", "outbox"]);
    let waits = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND wait_event_type = 'Lock' AND query LIKE 'DELETE%'",
        world.name
    );
    world.until(&waits, 1).await;
    world.consumer(&topic).read(3);
    while relay.metric("whippet_events_published_total", "outbox") < 3.0 {
        world.pause().await;
    }
    gate.commit().await.unwrap();
    // It has row 2, or will not wait for row 3.
    world
        .until("SELECT count(*) FROM (SELECT FROM outbox WHERE seq < 3 FOR UPDATE SKIP LOCKED) free", 0)
        .await;
    world.until(&waits, 1).await;
    sqlx::query("UPDATE outbox SET type = 'x' WHERE seq = 2").execute(&mut *app).await.unwrap();
    app.commit().await.unwrap();
    relay.wait_for("deadlock detected");
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_all(&world, &topic, 3);
}

/// The database has no room left: neither a hold nor a deletion can be recorded. PostgreSQL's own error,
/// raised by a trigger.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_the_relays_state_loses_nothing() {
    let (world, relay, topic) = stage("diskfull", "[{ name: outbox }]").await;
    world
        .sql(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
               $$BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END$$;
             CREATE TRIGGER full_disk BEFORE INSERT ON whippet.holds FOR EACH STATEMENT EXECUTE FUNCTION full_disk();
             CREATE TRIGGER full_disk BEFORE DELETE ON outbox FOR EACH STATEMENT EXECUTE FUNCTION full_disk()",
        )
        .await;
    // In one transaction: nothing more is read before a hold that is known can be written.
    let batch = batch(&topic, 1, 100);
    world.sql(&format!("INSERT INTO outbox (topic, key, payload, headers) VALUES ('{topic}', 'bad', 'x', '7'), ('{topic}', 'bad', 'y', NULL); {batch}")).await;
    relay.wait_for("No space left on device");
    let mut consumer = world.consumer(&topic);
    consumer.read(100);
    assert_eq!(world.number("SELECT count(*) FROM outbox").await, 102);
    assert_eq!(relay.get("/livez").0, 200);
    world.sql("DROP TRIGGER full_disk ON outbox; DROP TRIGGER full_disk ON whippet.holds").await;
    world.until_within("SELECT count(*) FROM outbox", 2, Duration::from_mins(1)).await;
    world.until("SELECT count(*) FROM whippet.holds", 2).await;
    assert_all(&world, &topic, 100);
}

/// A hold that cannot be written stops its table, and is tried ever more seldom: one line for each attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_hold_that_cannot_be_written_is_tried_ever_more_seldom() {
    let tables = "[{ name: outbox, retry: { initial: 100ms, jitter: none }, poll: { wake: notify } }]";
    let (world, relay, topic) = stage("unheld", tables).await;
    world
        .sql(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
               $$BEGIN RAISE EXCEPTION 'No space left on device' USING ERRCODE = 'disk_full'; END$$",
        )
        .await;
    let full = "CREATE TRIGGER full_disk BEFORE INSERT ON whippet.holds FOR EACH STATEMENT EXECUTE FUNCTION full_disk()";
    let insert = |key: &str, headers: &str| {
        format!(
            "INSERT INTO outbox (topic, key, payload, headers) VALUES ('{topic}', '{key}', 'x', {headers})"
        )
    };
    let attempts = || -> Vec<u64> {
        let log = relay.log();
        let lines = log.lines().filter(|line| line.contains("No space left on device"));
        lines
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["attempt"].as_u64().unwrap())
            .collect()
    };
    // One that is parked for itself, and then some that are held because an operator said so: these are read again.
    for (round, expected) in [("bad", "parked_events"), ("paused", "held_events")] {
        let before = attempts().len();
        world.sql(full).await;
        if round == "paused" {
            relay.operate(&world, &["pause", "--topic", &topic]);
        }
        let began = Instant::now();
        world.sql(&insert(round, if round == "bad" { "'7'" } else { "NULL" })).await;
        while attempts().len() < before + 5 {
            assert!(began.elapsed() < SOON, "{}", relay.log());
            // Whoever is told of new rows does not try at once.
            world.sql(&insert(round, "NULL")).await;
            world.pause().await;
        }
        assert_eq!(attempts()[before..before + 5], [1, 2, 3, 4, 5], "{round}");
        let pauses = Duration::from_millis(100 + 200 + 400 + 800);
        assert!(began.elapsed() >= pauses, "{round}: {:?}", began.elapsed());
        world.sql("DROP TRIGGER full_disk ON whippet.holds").await;
        relay.until(|status| status["tables"][0][expected].as_u64() > Some(0)).await;
        // Those behind it too: a later round begins with nothing on its way.
        world.until("SELECT count(*) - (SELECT count(*) FROM whippet.holds) FROM outbox", 0).await;
    }
}
