//! `after_publish: keep`: nothing is written into a row, and it is known all the same what is published.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::{
    harness::{Consumer, Relay, SOON, Seen, World},
    load::{Load, Plan},
    stream::{NO_LAG, drop_slot, follows, lose_slot, of_slot, streamed, until_published},
};

const INSERT: &str = "INSERT INTO outbox (topic, key, payload, headers)";
const PLAN: Plan = Plan { writers: 4, keys: 50, rows: 1_000_000, pause_ms: 30, poison: None };
/// Rows that are not written down as published.
const WAITING: &str = "SELECT count(*) FROM outbox o LEFT JOIN whippet.watermarks w ON w.table_name = 'outbox' \
    WHERE coalesce(w.open @> o.seq OR NOT (w.done @> o.seq \
      OR (o.seq <= w.upto AND pg_visible_in_snapshot(o.tx, w.snapshot))), true)";
/// The same, where the frontier itself has them, so that nothing else is written down.
const NOT_BEHIND: &str = "SELECT count(*) FROM outbox o LEFT JOIN whippet.watermarks w ON w.table_name = 'outbox' \
    WHERE NOT coalesce(o.seq <= w.upto AND pg_visible_in_snapshot(o.tx, w.snapshot), false)";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Capture {
    Poll,
    Stream,
}

fn table(more: &str) -> String {
    format!("{{ name: outbox, after_publish: keep, columns: {{ tx: tx }}{more} }}")
}

fn config(world: &World, capture: Capture, more: &str) -> String {
    match capture {
        Capture::Poll => world.config(&format!("[{}]", table(more)), "limits: { in_flight_events: 20000 }"),
        Capture::Stream => streamed(world, &table(more)),
    }
}

async fn set(name: &str, capture: Capture, more: &str) -> (World, String, String) {
    let world = World::new(name).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = config(&world, capture, more);
    world.install(&config).await;
    (world, topic, config)
}

/// A relay that has come to its work.
async fn started(world: &World, config: &str, capture: Capture) -> Relay {
    let relay = world.relay(config);
    relay.wait_for("this relay owns the source");
    if capture == Capture::Stream {
        follows(&relay).await;
    }
    relay
}

fn insert(topic: &str, key: &str, from: u32, to: u32) -> String {
    format!(
        "{INSERT} SELECT '{topic}', '{key}', convert_to('' || i, 'UTF8'), NULL FROM generate_series({from}, {to}) i"
    )
}

fn texts(seen: &[Seen]) -> Vec<&str> {
    seen.iter().map(Seen::text).collect()
}

fn of_bad(seen: &[Seen]) -> Vec<&str> {
    seen.iter().filter(|one| one.key.as_deref() == Some(b"bad")).map(Seen::text).collect()
}

fn until_bad(consumer: &mut Consumer, text: &str) {
    consumer.read_until(|seen| of_bad(seen).contains(&text));
}

async fn stop(relay: Relay) {
    let (code, log) = tokio::task::spawn_blocking(|| relay.stop()).await.unwrap();
    assert_eq!(code, Some(0), "{log}");
}

/// kill -9 under load: what was written down is not repeated, and a clean stop repeats nothing at all.
async fn killed_under_load(name: &str, capture: Capture) {
    let world = World::new(name).await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = config(&world, capture, "");
    world.install(&config).await;
    let mut load = Load::start(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    let kills = 6;
    for _ in 0..kills {
        let relay = started(&world, &config, capture).await;
        until_published(&relay, 300.0).await;
        // Past what had piled up.
        world.until(&format!("SELECT (({WAITING}) < 500)::int::bigint"), 1).await;
        relay.kill();
    }
    let relay = started(&world, &config, capture).await;
    load.stop();
    load.ended().await;
    world.until(WAITING, 0).await;
    world.until(NOT_BEHIND, 0).await;
    stop(relay).await;
    let (verdict, _) = load.check(&world);
    assert!(verdict.published > 2_000, "{verdict:?}");
    // It writes down every 50 ms, at a few thousand rows a second.
    assert!(verdict.repeats < kills * 1_000, "{verdict:?}");
    assert_eq!(
        world.number("SELECT count(*) FROM outbox").await,
        verdict.published as i64,
        "every row is still there"
    );

    // Begun again, and again, with more to do.
    let records = world.consumer(&topic).read_to_end().len();
    for round in 1..=3 {
        let relay = started(&world, &config, capture).await;
        world.sql(&insert(&topic, "more", round * 100, round * 100 + 99)).await;
        world.until(WAITING, 0).await;
        stop(relay).await;
        let all = world.consumer(&topic).read_to_end().len();
        assert_eq!(all, records + 100 * round as usize, "nothing is repeated after a clean stop");
    }
    if capture == Capture::Stream {
        drop_slot(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kept_rows_are_polled_through_kills_and_nothing_is_lost() {
    killed_under_load("keeppoll", Capture::Poll).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kept_rows_are_streamed_through_kills_and_nothing_is_lost() {
    killed_under_load("keepstream", Capture::Stream).await;
}

/// A backlog that is larger than the window, and a kill in the middle of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_is_written_down_while_it_is_published() {
    let (world, topic, config) = set("keepbacklog", Capture::Poll, "").await;
    let rows = 300_000;
    world.sql(&insert(&topic, "k", 1, rows)).await;
    let relay = world.relay(&config);
    until_published(&relay, 100_000.0).await;
    relay.kill();
    let relay = world.relay(&config);
    world.until(WAITING, 0).await;
    stop(relay).await;
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read_to_end();
    let mut next = 1;
    for number in seen.iter().map(|one| one.text().parse::<u32>().unwrap()) {
        assert!(number <= next, "{number} came before {next}");
        next += u32::from(number == next);
    }
    assert_eq!(next, rows + 1);
    let repeats = seen.len() - rows as usize;
    assert!(repeats <= 40_000, "{repeats} repeats");
}

/// It takes its number, and the watermark goes past it for seconds, with the number that it has.
async fn a_late_commit(name: &str, capture: Capture) {
    let (world, topic, config) = set(name, capture, "").await;
    let relay = started(&world, &config, capture).await;
    let mut sleeper = PgConnection::connect(&world.url).await.unwrap();
    let mut late = sleeper.begin().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(insert(&topic, "late", 1, 3_000))).execute(&mut *late).await.unwrap();
    let began = Instant::now();
    let mut consumer = world.consumer(&topic);
    let mut sent = 0;
    while began.elapsed() < Duration::from_secs(6) {
        sent += 1;
        world.sql(&insert(&topic, "others", sent, sent)).await;
        consumer.read(sent as usize);
    }
    // The open one does not hold it back.
    world.until(NOT_BEHIND, 0).await;
    late.commit().await.unwrap();
    consumer.read(sent as usize + 3_000);
    world.until(NOT_BEHIND, 0).await;
    stop(relay).await;
    let relay = started(&world, &config, capture).await;
    world.sql(&insert(&topic, "last", 1, 1)).await;
    world.until(WAITING, 0).await;
    stop(relay).await;
    let seen = consumer.read_to_end();
    assert_eq!(seen.len(), sent as usize + 3_001, "each once");
    let late: Vec<u32> = seen
        .iter()
        .filter(|one| one.key.as_deref() == Some(b"late"))
        .map(|one| one.text().parse().unwrap())
        .collect();
    assert_eq!(late, (1..=3_000).collect::<Vec<_>>());
    if capture == Capture::Stream {
        drop_slot(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_row_that_commits_late_is_polled_once() {
    a_late_commit("keeplate", Capture::Poll).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_row_that_commits_late_is_streamed_once() {
    a_late_commit("keeplatestream", Capture::Stream).await;
}

/// Parked, and the watermark goes on; released, and in order, through kills and restarts.
async fn an_operator(name: &str, capture: Capture) {
    let (world, topic, config) = set(name, capture, "").await;
    let relay = started(&world, &config, capture).await;
    // The first of them cannot be published.
    let bad = |from: u32, to: u32| {
        format!(
            "{INSERT} SELECT '{topic}', 'bad', convert_to('' || i, 'UTF8'), CASE i WHEN {from} THEN '[7]'::json END \
             FROM generate_series({from}, {to}) i"
        )
    };
    world.sql(&bad(1, 3)).await;
    world.until("SELECT count(*) FROM whippet.holds", 3).await;
    world.sql(&insert(&topic, "good", 1, 500)).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(500);
    world.until(NOT_BEHIND, 0).await;
    world.sql(&insert(&topic, "bad", 4, 4)).await;
    world.until("SELECT count(*) FROM whippet.holds", 4).await;
    relay.kill();
    let relay = started(&world, &config, capture).await;
    relay.until_status("/tables/0/parked_events", 4).await;
    world.sql("UPDATE outbox SET headers = NULL").await;
    assert_eq!(relay.operate(&world, &["redrive", "--key", "bad"])["events"], 4);
    world.sql(&insert(&topic, "bad", 5, 5)).await;
    consumer.read(505);
    world.until("SELECT count(*) FROM whippet.holds", 0).await;
    relay.until_status("/tables/0/parked_events", 0).await;
    assert_eq!(of_bad(consumer.read_to_end()), ["1", "2", "3", "4", "5"]);

    // Released while the relay is dead a moment later: they are still to be read again.
    world.sql(&bad(6, 8)).await;
    world.until("SELECT count(*) FROM whippet.holds WHERE state = 'parked'", 3).await;
    world.sql("UPDATE outbox SET headers = NULL").await;
    relay.kill();
    world.sql("UPDATE whippet.holds SET state = 'released'").await;
    let relay = started(&world, &config, capture).await;
    consumer.read(508);
    world.until("SELECT count(*) FROM whippet.holds", 0).await;

    // Skipped, and dead at once, before the watermark has it: it never appears.
    world.sql(&bad(9, 10)).await;
    world.until("SELECT count(*) FROM whippet.holds", 2).await;
    let listed = relay.operate(&world, &["parked", "--reason", "rejected"]);
    let id = listed["parked"][0]["id"].as_str().unwrap().to_owned();
    relay.operate(&world, &["skip", "--id", &id, "--reason", "test"]);
    relay.kill();
    world.sql("UPDATE outbox SET headers = NULL").await;
    let relay = started(&world, &config, capture).await;
    until_bad(&mut consumer, "10");
    world.until("SELECT count(*) FROM whippet.holds", 0).await;
    world.until(WAITING, 0).await;

    // Paused and released.
    relay.operate(&world, &["pause", "--topic", &topic]);
    world.sql(&insert(&topic, "bad", 11, 12)).await;
    relay.until_status("/tables/0/held_events", 2).await;
    world.until(NOT_BEHIND, 0).await;
    relay.operate(&world, &["resume", "--topic", &topic]);
    until_bad(&mut consumer, "12");
    relay.operate(&world, &["pause", "--table", "outbox"]);
    relay.until_status("/tables/0/state", "paused").await;
    world.sql(&insert(&topic, "bad", 13, 14)).await;
    relay.until_status("/tables/0/pending", 2).await;
    relay.operate(&world, &["resume", "--table", "outbox"]);
    until_bad(&mut consumer, "14");
    relay.until_status("/tables/0/pending", 0).await;
    stop(relay).await;
    // Once more, from what is written down.
    let relay = started(&world, &config, capture).await;
    world.sql(&insert(&topic, "bad", 15, 15)).await;
    until_bad(&mut consumer, "15");
    world.until(WAITING, 0).await;
    stop(relay).await;
    let mut bad = of_bad(consumer.read_to_end());
    // The kills may have repeated what was not written down by then.
    let mut first = std::collections::HashSet::new();
    bad.retain(|text| first.insert(*text));
    assert_eq!(bad, ["1", "2", "3", "4", "5", "6", "7", "8", "10", "11", "12", "13", "14", "15"]);
    if capture == Capture::Stream {
        drop_slot(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn held_rows_of_a_kept_table_are_released_in_order_and_skipped_for_good() {
    an_operator("keepverbs", Capture::Poll).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn held_rows_of_a_kept_table_that_is_streamed_are_released_in_order() {
    an_operator("keepverbsstream", Capture::Stream).await;
}

/// More rows than the log is waited for come at once: they are read from the table, and the log is followed
/// again.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_far_behind_is_left_for_the_table_and_come_back_to() {
    let (world, topic, config) = set("keepfar", Capture::Stream, "").await;
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
async fn kept_rows_are_replayed_by_number_or_id() {
    let (world, topic, config) = set("keepreplay", Capture::Poll, "").await;
    let relay = started(&world, &config, Capture::Poll).await;
    world.sql(&insert(&topic, "k", 1, 5)).await;
    world.until(WAITING, 0).await;
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'bad', 'parked', '[7]')")).await;
    relay.until_status("/tables/0/parked_events", 1).await;
    let range = ["replay", "--table", "outbox", "--from", "2", "--to", "9"];
    assert_eq!(relay.operate(&world, &range)["events"], 4, "what is parked is not published");
    let mut consumer = world.consumer(&topic);
    assert_eq!(texts(&consumer.read(9)[5..]), ["2", "3", "4", "5"]);
    world.until("SELECT count(*) FROM whippet.replays", 0).await;
    let refused = relay.try_to(&world, &["replay", "--table", "outbox", "--from", "2020-01-01T00:00:00Z"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("give numbers or ids"), "{refused:?}");
    stop(relay).await;
    assert_eq!(consumer.read_to_end().len(), 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn kept_rows_are_deleted_when_they_were_published_long_ago() {
    let (world, topic, config) = set("keepretention", Capture::Poll, ", retention: { published: 4s }").await;
    let relay = started(&world, &config, Capture::Poll).await;
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'bad', 'parked', '[7]')")).await;
    let began = Instant::now();
    world.sql(&insert(&topic, "k", 1, 12_000)).await;
    let mut sleeper = PgConnection::connect(&world.url).await.unwrap();
    let mut late = sleeper.begin().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(insert(&topic, "late", 1, 1))).execute(&mut *late).await.unwrap();
    world.until(WAITING, 0).await;
    world.until("SELECT count(*) FROM whippet.holds", 1).await;
    world.until("SELECT count(*) FROM outbox", 1).await;
    assert!(began.elapsed() >= Duration::from_secs(4), "after {:?}", began.elapsed());
    // Of one that is held it is not known when it will be published.
    let milestones =
        |open: &str| format!("SELECT count(*) FROM whippet.milestones WHERE {open} open @> 1::bigint");
    world.until(&format!("SELECT (({}) > 0)::int::bigint", milestones("")), 1).await;
    assert_eq!(world.number(&milestones("upto >= 1 AND NOT")).await, 0);
    // One that was open all the time is published first, and one that was held too.
    late.commit().await.unwrap();
    let committed = Instant::now();
    let mut consumer = world.consumer(&topic);
    consumer.read(12_001);
    world.sql("UPDATE outbox SET headers = NULL").await;
    relay.operate(&world, &["redrive", "--all"]);
    consumer.read(12_002);
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert!(committed.elapsed() >= Duration::from_secs(4), "after {:?}", committed.elapsed());
    // Milestones do not pile up.
    world.until("SELECT (count(*) < 50)::int::bigint FROM whippet.milestones", 1).await;
    stop(relay).await;
    assert_eq!(consumer.read_to_end().len(), 12_002);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_table_loses_its_slot_under_load_and_nothing_else() {
    let world = World::new("keepslot").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = config(&world, Capture::Stream, "");
    world.install(&config).await;
    let mut load = Load::start(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    let relay = started(&world, &config, Capture::Stream).await;
    for _ in 0..4 {
        follows(&relay).await;
        until_published(&relay, 300.0).await;
        lose_slot(&world).await;
        relay.until(|status| status["tables"][0]["capture"] == "poll").await;
        until_published(&relay, 300.0).await;
    }
    follows(&relay).await;
    load.stop();
    load.ended().await;
    world.until(NOT_BEHIND, 0).await;
    world.until(WAITING, 0).await;
    stop(relay).await;
    let (verdict, _) = load.check(&world);
    assert!(verdict.published > 2_000, "{verdict:?}");
    assert_eq!(verdict.repeats, 0, "nobody died: {verdict:?}");
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
    locked.rollback().await.unwrap();
    assert_eq!(world.number("SELECT count(*) FROM whippet.watermarks JOIN before USING (at)").await, 1);
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
#[tokio::test(flavor = "multi_thread")]
async fn a_kept_table_costs_nothing_while_nothing_comes() {
    for capture in [Capture::Poll, Capture::Stream] {
        let (world, topic, config) = set("keepidle", capture, "").await;
        world.sql(&insert(&topic, "k", 1, 200_000)).await;
        let relay = world.relay(&config);
        // Whoever looked at the table itself would be counted below.
        let upto = "SELECT coalesce(max(upto), 0) FROM whippet.watermarks WHERE open = '{}' AND done = '{}'";
        world.until_within(upto, 200_000, 4 * SOON).await;
        if capture == Capture::Stream {
            follows(&relay).await;
        }
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
