//! Columns with what cannot be read as a time: the events go out without it, and everything else as ever.

use sqlx::{AssertSqlSafe, SqlitePool};

use crate::{
    harness::{Relay, Seen, World, kafka},
    mysql::{on_both, world},
    mysql_stream::streamed,
    stream::drop_slot,
    stream_rows::{LAST_TIME_MS, streams, with_log},
};

on_both!(what_is_no_time_stops_nothing_on_mysql);

const TIME: &str = "2026-01-02T03:04:05.678Z";
const NO_TIME: &str = "the time of an event cannot be read";
/// Nobody listens there.
const NOWHERE: &str = "127.0.0.1:1";

/// Of records whose payload is `good` or `bad`: the good have their time, the others that of their publishing.
fn have_their_times(seen: &[Seen]) {
    for one in seen {
        let at = one.timestamp.unwrap();
        match one.text() {
            "good" => assert_eq!(at, LAST_TIME_MS),
            _ => assert!(at > LAST_TIME_MS, "{at}"),
        }
    }
}

/// While nothing can be published the age of what waits is asked for, and nothing fails by it.
async fn wait_with_an_age(relay: &Relay, tables: &[usize]) {
    for table in tables {
        relay.until(|status| status["tables"][table]["oldest_pending_age_seconds"].is_number()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_time_stops_nothing() {
    let world = World::new("notime").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let columns = "seq bigserial PRIMARY KEY, id uuid DEFAULT gen_random_uuid(), payload text NOT NULL";
    let tables = [
        ("texts", "text", vec!["'junk'", "'2026-02-30'"], format!("'{TIME}'")),
        ("numbers", "numeric", vec!["1767323045.678", "'NaN'"], LAST_TIME_MS.to_string()),
        ("moments", "timestamptz", vec!["'infinity'", "'-infinity'"], format!("'{TIME}'")),
        ("plain", "timestamp", vec!["'infinity'"], format!("'{TIME}'")),
        ("days", "date", vec!["'infinity'", "'5874897-12-31'"], "NULL".to_owned()),
        ("bytes", "bytea", vec!["'\\x00'"], "NULL".to_owned()),
    ];
    for capture in ["poll", "stream"] {
        let mut configs = Vec::new();
        for (table, kind, ..) in &tables {
            let name = format!("{capture}_{table}");
            world.sql(&format!("CREATE TABLE {name} ({columns}, at {kind})")).await;
            configs.push(format!(
                "{{ name: {name}, capture: {capture}, topic: '{topic}', key: k, columns: {{ topic: null, key: null, type: null, \
                   headers: null, created_at: at }} }}"
            ));
        }
        let config = with_log(&world, &format!("[{}]", configs.join(",")), "");
        let insert = async || {
            for (table, _, bad, good) in &tables {
                let name = format!("{capture}_{table}");
                let good = if good == "NULL" { String::new() } else { format!(", ('good', {good})") };
                let bad: Vec<String> = bad.iter().map(|at| format!("('bad', {at})")).collect();
                world.sql(&format!("INSERT INTO {name} (payload, at) VALUES {}{good}", bad.join(","))).await;
            }
        };
        if capture == "poll" {
            let relay = world.relay(&config.replace(&kafka(), NOWHERE));
            // The good one of each is the oldest.
            for (table, _, _, good) in &tables {
                let good = if good == "NULL" { "NULL" } else { good };
                world
                    .sql(&format!("INSERT INTO {capture}_{table} (payload, at) VALUES ('good', {good})"))
                    .await;
            }
            // A number in a column of any other type has none.
            wait_with_an_age(&relay, &[0, 2, 3]).await;
            for (table, ..) in &tables {
                world.sql(&format!("DELETE FROM {capture}_{table}")).await;
            }
            insert().await;
            // Another relay reads what waits from the head.
            relay.kill();
            let relay = world.relay(&config.replace(&kafka(), NOWHERE));
            relay
                .until(|status| {
                    status["tables"].as_array().unwrap().iter().all(|table| table["pending"] != 0)
                })
                .await;
            let (_, log) = relay.stop();
            assert!(!log.contains("database error"), "{log}");
        }
        let relay = world.relay(&config);
        if capture == "stream" {
            streams(&relay, 0..tables.len()).await;
            insert().await;
        }
        let count = if capture == "poll" { 13 } else { 26 };
        let mut consumer = world.consumer(&topic);
        have_their_times(consumer.read(count));
        for (table, ..) in &tables {
            world.until(&format!("SELECT count(*) FROM {capture}_{table}"), 0).await;
        }
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        assert!(!log.contains("database error"), "{log}");
        for (table, ..) in &tables {
            let said = log
                .lines()
                .filter(|line| line.contains(NO_TIME) && line.contains(&format!("{capture}_{table}")));
            assert_eq!(said.count(), 1, "{table}: {log}");
        }
    }
    drop_slot(&world).await;
}

async fn what_is_no_time_stops_nothing_on_mysql(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    world
        .sql(
            "CREATE TABLE polled (seq BIGINT AUTO_INCREMENT PRIMARY KEY, id CHAR(36) DEFAULT (UUID()), payload TEXT, at TEXT);
             CREATE TABLE streamed LIKE polled",
        )
        .await;
    for (table, capture, count) in [("polled", "poll", 3), ("streamed", "stream", 6)] {
        let config = streamed(
            &world,
            &format!(
                "{{ name: {table}, capture: {capture}, topic: '{topic}', key: k, columns: {{ topic: null, key: null, type: null, \
                   headers: null, created_at: at }} }}"
            ),
        );
        let rows = format!(
            "INSERT INTO {table} (payload, at) VALUES ('good', '{TIME}'), ('bad', 'junk'), ('bad', '2026-02-30')"
        );
        if capture == "poll" {
            world.sql(&rows).await;
            let relay = world.relay(&config.replace(&kafka(), NOWHERE));
            relay.until_status("/tables/0/pending", 3).await;
            let (_, log) = relay.stop();
            assert!(!log.contains("database error"), "{log}");
        }
        let relay = world.relay(&config);
        relay.until_status("/tables/0/capture", capture).await;
        if capture == "stream" {
            world.sql(&rows).await;
        }
        have_their_times(world.consumer(&topic).read(count));
        world.until(&format!("SELECT count(*) FROM {table}"), 0).await;
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        assert_eq!(log.matches(NO_TIME).count(), 1, "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_time_stops_nothing_on_sqlite() {
    let world = World::new("notimesqlite").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let url = format!("sqlite://{}?mode=rwc", world.folder.path().join("outbox.db").display());
    let db = SqlitePool::connect(&url).await.unwrap();
    let sql = async |text: &str| sqlx::raw_sql(AssertSqlSafe(text)).execute(&db).await.unwrap();
    sql(&format!(
        "CREATE TABLE outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT DEFAULT (lower(hex(randomblob(16)))), payload TEXT, at); \
         INSERT INTO outbox (payload, at) VALUES ('good', '{TIME}'), ('good', {LAST_TIME_MS}), ('bad', 'junk'), ('bad', x'ff'), \
           ('bad', NULL)"
    ))
    .await;
    let table = format!(
        "[{{ name: outbox, topic: '{topic}', key: k, columns: {{ topic: null, key: null, type: null, headers: null, \
           created_at: at }} }}]"
    );
    let relay = world.relay(&world.config_for(&url, &kafka(), &table, ""));
    have_their_times(world.consumer(&topic).read(5));
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(log.matches(NO_TIME).count(), 1, "{log}");
    assert_eq!(sqlx::query_scalar::<_, i64>("SELECT count(*) FROM outbox").fetch_one(&db).await.unwrap(), 0);
}
