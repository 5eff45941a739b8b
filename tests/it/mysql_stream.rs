//! The binlog of MySQL and MariaDB: streamed, left, and come back to. The same on both.

use std::time::{Duration, Instant};

use crate::{
    db::Session,
    harness::{Relay, Seen, World, calm},
    load::{Load, Plan},
    mysql::{on_both, world},
};

on_both!(
    rows_come_from_the_log_once_and_in_order,
    rows_are_published_while_others_wait_to_be_deleted,
    a_stream_loses_nothing_through_kills_of_either_end,
);

const INSERT: &str = "INSERT INTO outbox (topic, `key`, payload)";
pub const PLAN: Plan = Plan { writers: 4, keys: 50, rows: 1_000_000, pause_ms: 30, poison: None };

/// A configuration that streams. The number of a reader is the server's, so each test has one of its own.
pub fn streamed(world: &World, table: &str) -> String {
    let config = world.config(&format!("[{table}]"), "limits: { in_flight_events: 20000 }");
    let number = world.name.bytes().fold(0_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    let stream = format!("stream: {{ server_id: {}, heartbeat: 1s }}", number | 0x1000_0000);
    config.replace("source: {", &format!("source: {{ {stream},"))
}

pub async fn follows(relay: &Relay) {
    relay.until_status("/tables/0/capture_reason", "the log is read").await;
}

pub async fn until_published(relay: &Relay, more: f64) {
    until_published_in_all(relay, relay.metric("whippet_events_published_total", "outbox") + more).await;
}

/// Since the relay's start.
pub async fn until_published_in_all(relay: &Relay, events: f64) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while relay.metric("whippet_events_published_total", "outbox") < events {
        assert!(Instant::now() < deadline, "it does not flow: {}", relay.status());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// One statement that inserts these numbers.
pub fn batch(topic: &str, from: u32, to: u32) -> String {
    let rows: Vec<String> = (from..=to).map(|n| format!("('{topic}', 'k', '{n}')")).collect();
    format!("{INSERT} VALUES {}", rows.join(","))
}

fn numbers(seen: &[Seen]) -> Vec<u32> {
    seen.iter().map(|one| one.text().parse().unwrap()).collect()
}

async fn rows_come_from_the_log_once_and_in_order(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    // Before the log is read.
    world.sql(&batch(&topic, 1, 100)).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    world.sql(&batch(&topic, 101, 1100)).await;
    let mut session = Session::open(&world.url).await.unwrap();
    let mut run = async |statement: &str| session.run(statement).await.unwrap();
    // Deleted by the one who inserted it: only the log has it.
    run("BEGIN").await;
    run(&batch(&topic, 1101, 1101)).await;
    run("DELETE FROM outbox WHERE payload = '1101'").await;
    run("COMMIT").await;
    // What was undone is in no log.
    run("BEGIN").await;
    run("SAVEPOINT a").await;
    run(&batch(&topic, 5000, 5001)).await;
    run("ROLLBACK TO a").await;
    run(&batch(&topic, 1102, 1102)).await;
    run("COMMIT").await;
    run("BEGIN").await;
    run(&batch(&topic, 6000, 6000)).await;
    run("ROLLBACK").await;
    let mut consumer = world.consumer(&topic);
    assert_eq!(numbers(consumer.read(1102)), (1..=1102).collect::<Vec<_>>());
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("left to the table"), "{log}");
    assert_eq!(consumer.read_to_end().len(), 1102, "nothing is repeated after a clean stop");
}

/// Places in files tell what can be seen then.
#[tokio::test(flavor = "multi_thread")]
async fn mysql_without_gtids_is_followed_by_its_files() {
    let world = world("mysql").await;
    let to = async |modes: &[&str]| {
        for mode in modes {
            world.sql(&format!("SET GLOBAL gtid_mode = {mode}")).await;
        }
    };
    to(&["ON_PERMISSIVE", "OFF_PERMISSIVE", "OFF"]).await;
    rows_come_from_the_log_once_and_in_order("mysql").await;
    a_stream_loses_nothing_through_kills_of_either_end("mysql").await;
    to(&["OFF_PERMISSIVE", "ON_PERMISSIVE", "ON"]).await;
}

/// Ends the connections that read the binlog.
pub async fn end_readers(world: &World) {
    let Ok(mut session) = Session::open(&world.url).await else { return };
    let of = "SELECT count(*) FROM information_schema.processlist WHERE command LIKE 'Binlog Dump%'";
    if world.number(of).await > 0 {
        let list = "SELECT CAST(MAX(id) AS SIGNED) FROM information_schema.processlist WHERE command LIKE 'Binlog Dump%'";
        let id = world.number(list).await;
        // It may have ended by itself.
        session.run(&format!("KILL {id}")).await.ok();
    }
}

/// The statement that deletes runs beside the log.
async fn rows_are_published_while_others_wait_to_be_deleted(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = calm(&streamed(&world, "{ name: outbox }"));
    world.install(&config).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    // The one has inserted a row, and the other has it locked from its commit on.
    let mut one = Session::open(&world.url).await.unwrap();
    let mut other = Session::open(&world.url).await.unwrap();
    one.run("BEGIN").await.unwrap();
    one.run(&batch(&topic, 1, 1)).await.unwrap();
    let locked = tokio::spawn(async move {
        // It locks no gaps, so others may insert.
        other.run("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED").await.unwrap();
        other.run("BEGIN").await.unwrap();
        other.run("SELECT * FROM outbox FOR UPDATE").await.unwrap();
        other
    });
    let runs = |statement: &str| {
        format!(
            "SELECT count(*) FROM information_schema.processlist WHERE db = DATABASE() AND info LIKE '{statement}'"
        )
    };
    world.until(&runs("SELECT%FOR UPDATE"), 1).await;
    one.run("COMMIT").await.unwrap();
    let mut other = locked.await.unwrap();
    let mut consumer = world.consumer(&topic);
    consumer.read(1);
    world.until(&runs("DELETE%"), 1).await;
    let began = Instant::now();
    for n in 2..=20 {
        world.sql(&batch(&topic, n, n)).await;
        consumer.read(n as usize);
    }
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "longer than the lease may wait: {:?}",
        began.elapsed()
    );
    world.until(&runs("DELETE%"), 1).await;
    other.run("COMMIT").await.unwrap();
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(numbers(consumer.read_to_end()), (1..=20).collect::<Vec<_>>());
}

/// kill -9 again and again, and the server's end of the connection too, under load.
async fn a_stream_loses_nothing_through_kills_of_either_end(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let mut load = Load::start(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    let mut relay = world.relay(&config);
    for _ in 0..4 {
        follows(&relay).await;
        until_published(&relay, 200.0).await;
        relay.kill();
        relay = world.relay(&config);
    }
    for _ in 0..8 {
        follows(&relay).await;
        until_published(&relay, 200.0).await;
        end_readers(&world).await;
    }
    follows(&relay).await;
    until_published(&relay, 200.0).await;
    load.stop();
    load.ended().await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    let (verdict, _) = load.check(&world);
    assert!(verdict.published > 2000, "{verdict:?}");
}
