//! What is written down of kept rows: how far the table is published, and what of it is open.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::sync::Barrier;

use crate::{
    harness::{Relay, SOON, World, at_once, calm},
    keep::{Capture, NOT_BEHIND, WAITING, insert, set, started, stop, texts},
    stream::{NO_LAG, drop_slot, follows, of_slot},
};

/// More rows than the log is waited for come at once: they are read from the table, and the log is followed
/// again.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_far_behind_is_left_for_the_table_and_come_back_to() {
    let (world, topic, config) = set("keepfar", Capture::Stream, "").await;
    let config = calm(&config);
    let relay = started(&world, &config, Capture::Stream).await;
    for round in 0..3 {
        world.sql(&insert(&topic, "k", round * 60_000 + 1, round * 60_000 + 60_000)).await;
        world.until(NOT_BEHIND, 0).await;
        follows(&relay).await;
    }
    relay.wait_for("the log is far behind");
    world.until(WAITING, 0).await;
    world.until(&of_slot(&world, NO_LAG), 1).await;
    stop(relay).await;
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read_to_end().iter().map(|one| one.text().parse::<u32>().unwrap());
    assert!(seen.eq(1..=180_000), "each once, in order");
    drop_slot(&world).await;
}

/// The frontier goes past rows that wait for their topic: they are open, and outlive a kill.
#[tokio::test(flavor = "multi_thread")]
async fn rows_in_flight_are_open() {
    for capture in [Capture::Poll, Capture::Stream] {
        let (world, topic, config) = set("keepopen", capture, "").await;
        let relay = started(&world, &config, capture).await;
        world.sql(&insert(&world.topic("missing"), "k", 1, 1)).await;
        world.sql(&insert(&topic, "k", 2, 10)).await;
        let open =
            "SELECT count(*) FROM whippet.watermarks WHERE open = '{[1,2)}' AND upto = 10 AND done = '{}'";
        world.until(open, 1).await;
        relay.kill();
        let missing = world.create_topic("missing", 1, &[]).await;
        let relay = started(&world, &config, capture).await;
        assert_eq!(texts(world.consumer(&missing).read(1)), ["1"]);
        world.until(WAITING, 0).await;
        stop(relay).await;
        assert_eq!(world.consumer(&topic).read_to_end().len(), 9, "the others are not repeated");
        if capture == Capture::Stream {
            drop_slot(&world).await;
        }
    }
}

/// A process that does nothing until this is dropped.
struct StandsStill(String);

impl StandsStill {
    fn new(process: i64) -> StandsStill {
        let still = StandsStill(process.to_string());
        still.signal("STOP");
        still
    }

    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args(["-s", name, &self.0]).status().unwrap().success());
    }
}

impl Drop for StandsStill {
    fn drop(&mut self) {
        self.signal("CONT");
    }
}

/// The frontier goes past rows that the log is yet to bring: they are open, and outlive a kill.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_the_log_is_yet_to_bring_are_open() {
    let (world, topic, config) = set("keepstrays", Capture::Stream, "").await;
    let file = world.write("whippet.yaml", &config);
    let relay = Relay::start_with(&file, &[("FAILPOINTS", "look=sleep(3000)")]);
    follows(&relay).await;
    world.sql(&insert(&topic, "k", 1, 1)).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(1);
    // While the relay is about to look what can be seen, the log stands still.
    let still = StandsStill::new(world.number(&of_slot(&world, "active_pid::bigint")).await);
    world.sql(&insert(&topic, "k", 2, 2)).await;
    world.until("SELECT count(*) FROM whippet.watermarks WHERE open = '{[2,3)}' AND upto = 2", 1).await;
    relay.kill();
    drop(still);
    assert_eq!(consumer.read_to_end().len(), 1);
    let relay = started(&world, &config, Capture::Stream).await;
    assert_eq!(texts(consumer.read(2)), ["1", "2"]);
    world.until(WAITING, 0).await;
    stop(relay).await;
    drop_slot(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watermark_of_another_server_and_a_wrong_column_are_told() {
    let (world, topic, config) = set("keepwrong", Capture::Poll, "").await;
    let says = async |relay: &Relay, words: &str| {
        relay
            .until(|status| {
                let said = status["tables"][0]["last_error"].as_str().unwrap_or_default();
                said.contains(words)
            })
            .await;
    };
    let relay = started(&world, &config, Capture::Poll).await;
    world.sql(&insert(&topic, "k", 1, 10)).await;
    world.until(WAITING, 0).await;
    stop(relay).await;
    world.sql("UPDATE whippet.watermarks SET server = '7'").await;
    world.sql(&insert(&topic, "k", 11, 11)).await;
    let relay = world.relay(&config);
    says(&relay, "another server").await;
    relay.until_status("/tables/0/state", "failing").await;
    let mut consumer = world.consumer(&topic);
    assert_eq!(consumer.read_to_end().len(), 10, "nothing is published on a guess");
    // As docs/operations.md has it, for a server that goes on with the numbers of the other one.
    world
        .sql("UPDATE whippet.watermarks SET server = (SELECT system_identifier FROM pg_control_system())")
        .await;
    consumer.read(11);
    world.sql("UPDATE outbox SET tx = '9000000000000' WHERE seq = 11").await;
    relay.kill();
    let relay = world.relay(&config);
    says(&relay, "came from another one").await;
    // And for one where it begins anew.
    world.sql("UPDATE outbox SET tx = pg_current_xact_id()").await;
    world
        .sql("UPDATE whippet.watermarks SET snapshot = pg_current_snapshot(), upto = 11, open = '{}', done = '{}'")
        .await;
    world.sql(&insert(&topic, "k", 12, 12)).await;
    world.until(WAITING, 0).await;
    stop(relay).await;
    let seen: Vec<u32> = consumer.read(12).iter().map(|one| one.text().parse().unwrap()).collect();
    assert_eq!(seen, (1..=12).collect::<Vec<_>>());
    assert_eq!(consumer.read_to_end().len(), 12);

    let relay = world.relay(&config);
    for (statement, words) in [
        ("DROP INDEX outbox_tx", "has no index"),
        ("ALTER TABLE outbox ALTER tx DROP DEFAULT", "has another default"),
        ("ALTER TABLE outbox ALTER tx DROP NOT NULL", "may be NULL"),
        ("ALTER TABLE outbox ALTER tx TYPE text", "is of type text"),
        ("ALTER TABLE outbox DROP tx", "has no column \"tx\""),
    ] {
        world.sql(statement).await;
        // A statement that fails has the table looked at again.
        world.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'whippet' AND datname = current_database()").await;
        says(&relay, words).await;
    }
}

/// The lease is taken while this relay still believes in it: what it writes down comes too late.
#[tokio::test(flavor = "multi_thread")]
async fn the_frontier_is_not_moved_by_a_relay_that_has_lost_its_lease() {
    let (world, topic, config) = set("keepfence", Capture::Poll, "").await;
    let config = calm(&config);
    let relay = started(&world, &config, Capture::Poll).await;
    world.sql(&insert(&topic, "k", 1, 10)).await;
    world.until(NOT_BEHIND, 0).await;
    // It hears nothing of it from the database while it waits for this lock.
    let mut session = PgConnection::connect(&world.url).await.unwrap();
    let mut locked = session.begin().await.unwrap();
    sqlx::raw_sql("SELECT FROM whippet.leases FOR UPDATE").execute(&mut *locked).await.unwrap();
    world
        .sql(&format!(
            "BEGIN; DELETE FROM whippet.members; CREATE TABLE before AS SELECT at FROM whippet.watermarks; {}; COMMIT",
            insert(&topic, "k", 11, 20)
        ))
        .await;
    relay.wait_for("nothing was recorded");
    assert_eq!(world.number("SELECT count(*) FROM whippet.watermarks JOIN before USING (at)").await, 1);
    locked.rollback().await.unwrap();
    world.until(WAITING, 0).await;
    stop(relay).await;
    let mut consumer = world.consumer(&topic);
    let mut next = 1;
    for number in consumer.read_to_end().iter().map(|one| one.text().parse::<u32>().unwrap()) {
        assert!(number <= next, "{number} came before {next}");
        next += u32::from(number == next);
    }
    assert_eq!(next, 21);
}

/// What is published costs nothing: reads go by the index.
#[test]
fn a_kept_table_costs_nothing_while_nothing_comes() {
    let both = Barrier::new(2);
    at_once([Capture::Poll, Capture::Stream], |capture| costs_nothing(capture, &both));
}

async fn costs_nothing(capture: Capture, both: &Barrier) {
    let (world, topic, config) = set("keepidle", capture, "").await;
    world.sql(&insert(&topic, "k", 1, 200_000)).await;
    let relay = world.relay(&config);
    // Whoever looked at the table itself would be counted below.
    let upto = "SELECT coalesce(max(upto), 0) FROM whippet.watermarks WHERE open = '{}' AND done = '{}'";
    world.until_within(upto, 200_000, 4 * SOON).await;
    if capture == Capture::Stream {
        follows(&relay).await;
    }
    // A slot is made when all transactions of the server have ended.
    both.wait().await;
    // With a transaction that stays open, and rows of which some commit meanwhile.
    let mut sleeper = PgConnection::connect(&world.url).await.unwrap();
    let mut open = sleeper.begin().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(insert(&topic, "open", 1, 1))).execute(&mut *open).await.unwrap();
    world.sql(&insert(&topic, "k", 1, 10_000)).await;
    world.until(upto, 210_001).await;
    relay.until_status("/tables/0/pending", 0).await;
    let touched =
        "SELECT (seq_tup_read + idx_tup_fetch)::bigint FROM pg_stat_user_tables WHERE relname = 'outbox'";
    // As the server does by itself within a minute.
    world.sql("ANALYZE outbox").await;
    let before = touched_when_still(&world, touched).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let more = world.number(touched).await - before;
    eprintln!("{capture:?}: {more} rows touched");
    assert!(more < 2_000, "{more} rows were read for nothing");
    drop(open);
    stop(relay).await;
    if capture == Capture::Stream {
        drop_slot(&world).await;
    }
}

/// The number that a query settles at. Sessions tell what they have read within ten seconds of idling.
async fn touched_when_still(world: &World, sql: &str) -> i64 {
    let mut before = world.number(sql).await;
    let deadline = Instant::now() + SOON;
    loop {
        tokio::time::sleep(Duration::from_secs(11)).await;
        let now = world.number(sql).await;
        if now - before < 1_000 {
            return now;
        }
        assert!(Instant::now() < deadline, "it goes on reading: {} rows in 11 s", now - before);
        before = now;
    }
}
