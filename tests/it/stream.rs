//! The log of PostgreSQL: streamed, left, and come back to.

use std::time::{Duration, Instant};

use crate::{
    harness::{Relay, World, service, services},
    load::{Load, Plan},
};

const INSERT: &str = "INSERT INTO outbox (topic, key, payload)";
const PLAN: Plan = Plan { writers: 4, keys: 50, rows: 1_000_000, pause_ms: 30, poison: None };

/// Whether the slot is confirmed up to about now.
pub const NO_LAG: &str = "(pg_current_wal_lsn() - confirmed_flush_lsn < 100000)::int::bigint";

/// A configuration that streams; slots are the server's, so their name is the database's.
pub fn streamed(world: &World, table: &str) -> String {
    let more = "limits: { in_flight_events: 20000 }";
    let config = world.config(&format!("[{table}]"), more);
    let stream = format!("stream: {{ slot: {0}, publication: {0}, heartbeat: 1s }}", world.name);
    config.replace("source: {", &format!("source: {{ {stream},"))
}

/// A query of what the server says of this world's slot.
pub fn of_slot(world: &World, what: &str) -> String {
    format!("SELECT {what} FROM pg_replication_slots WHERE slot_name = '{}'", world.name)
}

pub async fn drop_slot(world: &World) {
    // The server may not have seen yet that the relay is gone.
    world.until(&of_slot(world, "count(*) FILTER (WHERE active)"), 0).await;
    world.sql(&of_slot(world, "pg_drop_replication_slot(slot_name)")).await;
}

pub async fn follows(relay: &Relay) {
    relay.until_status("/tables/0/capture", "stream").await;
}

pub async fn until_published(relay: &Relay, more: f64) {
    let before = relay.metric("whippet_events_published_total", "outbox");
    let deadline = Instant::now() + Duration::from_secs(30);
    while relay.metric("whippet_events_published_total", "outbox") < before + more {
        assert!(Instant::now() < deadline, "it does not flow: {}", relay.status());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_come_from_the_log_once_and_in_order_and_the_slot_follows() {
    rows_come_once_and_in_order(World::new("stream").await).await;
}

/// The same of the newest server that is supported.
#[tokio::test(flavor = "multi_thread")]
async fn rows_come_from_the_log_of_postgresql_18_once_and_in_order() {
    tokio::task::spawn_blocking(|| services("up", "pg18")).await.unwrap();
    rows_come_once_and_in_order(World::on(&service("WHIPPET_TEST_PG18"), "stream18").await).await;
}

async fn rows_come_once_and_in_order(world: World) {
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let batch = |from: u32, to: u32| {
        format!(
            "{INSERT} SELECT '{topic}', 'k', convert_to('' || i, 'UTF8') FROM generate_series({from}, {to}) i"
        )
    };
    // Before there is a slot.
    world.sql(&batch(1, 100)).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    world.sql(&batch(101, 1100)).await;
    // Deleted by the one who inserted it: only the log has it.
    world.sql(&format!("BEGIN; {}; DELETE FROM outbox; COMMIT", batch(1101, 1101))).await;
    // What was undone is in no log.
    world
        .sql(&format!(
            "BEGIN; SAVEPOINT a; {}; ROLLBACK TO a; {}; COMMIT",
            batch(5000, 5001),
            batch(1102, 1102)
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    let seen: Vec<u32> = consumer.read(1102).iter().map(|one| one.text().parse().unwrap()).collect();
    assert_eq!(seen, (1..=1102).collect::<Vec<_>>());
    world.until("SELECT count(*) FROM outbox", 0).await;
    // Everything is settled, so the server need not keep any of it.
    world.until(&of_slot(&world, NO_LAG), 1).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(consumer.read_to_end().len(), 1102, "nothing is repeated after a clean stop");
    drop_slot(&world).await;
}

/// kill -9 again and again, and the walsender too, under load.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_loses_nothing_through_kills_of_either_end() {
    let world = World::new("streamkill").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let mut load = Load::start(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    let mut relay = world.relay(&config);
    for _ in 0..5 {
        follows(&relay).await;
        until_published(&relay, 200.0).await;
        relay.kill();
        relay = world.relay(&config);
    }
    for _ in 0..5 {
        follows(&relay).await;
        until_published(&relay, 200.0).await;
        world.sql(&of_slot(&world, "pg_terminate_backend(active_pid)")).await;
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
    drop_slot(&world).await;
}
