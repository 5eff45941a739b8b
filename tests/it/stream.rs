//! The log of PostgreSQL: streamed, left, and come back to.

use std::time::{Duration, Instant};

use crate::{
    harness::{Relay, World, service, services, whippet},
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

/// Takes the slot away from whoever reads it.
pub async fn lose_slot(world: &World) {
    let name = &world.name;
    world
        .sql(&format!(
            "DO $$ BEGIN LOOP BEGIN
               PERFORM pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{name}';
               PERFORM pg_drop_replication_slot('{name}');
               EXIT;
             EXCEPTION WHEN object_in_use THEN NULL;
             END; END LOOP; END $$"
        ))
        .await;
}

pub async fn drop_slot(world: &World) {
    // The server may not have seen yet that the relay is gone.
    world.until(&of_slot(world, "count(*) FILTER (WHERE active)"), 0).await;
    world.sql(&of_slot(world, "pg_drop_replication_slot(slot_name)")).await;
}

/// Not by its mode alone: a table that only the log has is in that mode before there is a slot.
pub async fn follows(relay: &Relay) {
    relay.until_status("/tables/0/capture_reason", "the log is read").await;
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
    // Every second, whether it has come back or not.
    let mut every_second = tokio::time::interval(Duration::from_secs(1));
    for _ in 0..10 {
        every_second.tick().await;
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

/// Where the rows stay, any slot will do, also for a table that is never polled instead.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_only_streamed_gets_another_slot_and_loses_nothing() {
    let world = World::new("onlystream").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox, capture: stream }");
    world.install(&config).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    for round in 0..3 {
        lose_slot(&world).await;
        world
            .sql(&format!(
                "{INSERT} SELECT '{topic}', 'k', convert_to('' || i, 'UTF8') FROM generate_series({round} * 100 + 1, {round} * 100 + 100) i"
            ))
            .await;
        world.until("SELECT count(*) FROM outbox", 0).await;
        follows(&relay).await;
    }
    let mut next = 1;
    for number in world.consumer(&topic).read_to_end().iter().map(|one| one.text().parse::<u32>().unwrap()) {
        assert!(number <= next, "{number} came before {next}");
        next += u32::from(number == next);
    }
    assert_eq!(next, 301);
    relay.kill();
    drop_slot(&world).await;
}

/// An outbox without a table, parked and mended like any other; its slot is its only copy.
#[tokio::test(flavor = "multi_thread")]
async fn logical_messages_are_events_and_are_held_with_their_content() {
    let world = World::new("messages").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: 'message:outbox' }");
    world.install(&config).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    let emit = |members: &str| {
        format!("SELECT pg_logical_emit_message(true, 'outbox', '{{\"topic\": \"{topic}\", {members}}}')")
    };
    world
        .sql(&emit(r#""id": "1", "key": "a", "type": "T", "payload": {"n" : 1.0}, "headers": {"x": "y"}"#))
        .await;
    world.sql(&format!("BEGIN; {}; ROLLBACK", emit(r#""id": "undone", "payload": "x""#))).await;
    world.sql(&emit(r#""id": "2", "key": "bad", "payload": "first", "headers": [1]"#)).await;
    world.sql(&emit(r#""id": "3", "key": "bad", "payload_base64": "c2Vjb25k""#)).await;
    world.sql("SELECT pg_logical_emit_message(true, 'outbox', 'no JSON')").await;
    world.sql("SELECT pg_logical_emit_message(true, 'other', 'for somebody else')").await;
    world.sql(&emit(r#""id": "4", "key": "a", "payload": "é""#)).await;
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read(2);
    assert_eq!((seen[0].text(), seen[1].text()), ("{\"n\" : 1.0}", "é"));
    assert_eq!(
        (seen[0].header("id"), seen[0].header("eventType"), seen[0].header("x")),
        (Some("1"), Some("T"), Some("y"))
    );
    relay.until_status("/tables/0/parked_events", 3).await;
    // What is held is settled: the server keeps nothing for it.
    let lag = format!(
        "SELECT (pg_current_wal_lsn() - confirmed_flush_lsn < 100000)::int::bigint FROM pg_replication_slots WHERE slot_name = '{}'",
        world.name
    );
    world.until(&lag, 1).await;
    let listed = relay.operate(&world, &["parked", "--id", "3", "--payload"]);
    assert_eq!(listed["parked"][0]["payload"], "second");
    // It cannot be mended in its place, so its first is let go; the second follows, through a kill.
    relay.kill();
    let relay = world.relay(&config);
    follows(&relay).await;
    relay.until_status("/tables/0/parked_events", 3).await;
    assert_eq!(relay.operate(&world, &["redrive", "--key", "bad"])["events"], 2);
    // It is read, and parked again.
    world.until("SELECT count(*) - 10 * (SELECT count(*) FROM whippet.released) FROM whippet.holds", 3).await;
    relay.operate(&world, &["skip", "--id", "2", "--reason", "test"]);
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "second"));
    world.until("SELECT count(*) FROM whippet.released", 0).await;
    relay.operate(&world, &["pause", "--table", "message:outbox"]);
    world.sql(&emit(r#""id": "5", "key": "a", "payload": "5""#)).await;
    relay.until_status("/tables/0/held_events", 1).await;
    relay.operate(&world, &["resume", "--table", "message:outbox"]);
    world.sql(&emit(r#""id": "6", "key": "a", "payload": "6""#)).await;
    let seen = consumer.read_until(|seen| seen.iter().any(|one| one.text() == "6"));
    let mut ids = std::collections::HashSet::new();
    // The kill may have repeated what was not confirmed by then.
    let texts: Vec<&str> =
        seen.iter().filter(|one| ids.insert(one.header("id"))).map(crate::harness::Seen::text).collect();
    assert_eq!(texts, ["{\"n\" : 1.0}", "é", "second", "5", "6"]);
    // The slot is lost: nobody is to overlook it.
    lose_slot(&world).await;
    relay.until_status("/tables/0/state", "halted").await;
    assert!(relay.status()["tables"][0]["last_error"].as_str().unwrap().contains("teardown"));
    world.sql(&emit(r#""id": "7", "payload": "lost""#)).await;
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = current_database()";
    assert_eq!(world.number(slots).await, 0);
    // Begun anew, as it says.
    let file = world.write("teardown.yaml", &config);
    let teardown = |more: &[&str]| {
        let output = whippet(&[&["teardown", "--config", &file], more].concat());
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert!(teardown(&[]).2.contains("stop it first"));
    drop(relay);
    world.until("SELECT count(*) FROM whippet.members WHERE expires_at > now()", 0).await;
    assert!(teardown(&["--dry-run"]).1.contains("would drop table whippet.holds"));
    // "no JSON" is still parked, and its only copy with it.
    assert!(teardown(&[]).2.contains("1 events are held"));
    let (code, out, _) = teardown(&["--force"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("dropped publication") && out.contains("dropped schema whippet"), "{out}");
    assert_eq!(world.number("SELECT count(*) FROM pg_namespace WHERE nspname = 'whippet'").await, 0);
    let relay = world.relay(&config);
    follows(&relay).await;
    world.sql(&emit(r#""id": "8", "payload": "8""#)).await;
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "8"));
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(teardown(&[]).0, Some(0));
    assert_eq!(world.number(slots).await, 0);
}

/// Rows that the application deletes in the transaction that inserts them, through kills.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_do_not_stay_are_published_through_kills() {
    let world = World::new("transient").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox, capture: stream, rows: transient }");
    world.install(&config).await;
    let mut relay = world.relay(&config);
    follows(&relay).await;
    let mut sent = 0;
    for round in 0..4 {
        for _ in 0..200 {
            sent += 1;
            world
                .sql(&format!(
                    "BEGIN; {INSERT} VALUES ('{topic}', 'k', '{sent}'); DELETE FROM outbox; COMMIT"
                ))
                .await;
        }
        if round < 3 {
            relay.kill();
            relay = world.relay(&config);
        }
    }
    let mut consumer = world.consumer(&topic);
    let mut next = 1;
    consumer.read_until(|seen| seen.last().is_some_and(|last| last.text() == sent.to_string()));
    for number in consumer.seen.iter().map(|one| one.text().parse::<i32>().unwrap()) {
        assert!(number <= next, "{number} came before {next}");
        next += i32::from(number == next);
    }
    assert_eq!(next, sent + 1);
    drop(relay);
    world
        .until("SELECT count(*) FROM pg_replication_slots WHERE slot_name = current_database() AND active", 0)
        .await;
    drop_slot(&world).await;
}
