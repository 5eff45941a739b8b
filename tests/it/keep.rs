//! `after_publish: keep`: nothing is written into a row, and it is known all the same what is published.

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::{
    harness::{Relay, SOON, Seen, World, calm},
    load::{Load, Plan},
    stream::{drop_slot, follows, lose_slot, streamed, until_published},
};

pub const INSERT: &str = "INSERT INTO outbox (topic, key, payload, headers)";
const PLAN: Plan = Plan { writers: 4, keys: 50, rows: 1_000_000, pause_ms: 30, poison: None };
/// Rows that are not written down as published.
pub const WAITING: &str = "SELECT count(*) FROM outbox o LEFT JOIN whippet.watermarks w ON w.table_name = 'outbox' \
    WHERE coalesce(w.open @> o.seq OR NOT (w.done @> o.seq \
      OR (o.seq <= w.upto AND pg_visible_in_snapshot(o.tx, w.snapshot))), true)";
/// The same, where the frontier itself has them, so that nothing else is written down.
pub const NOT_BEHIND: &str = "SELECT count(*) FROM outbox o LEFT JOIN whippet.watermarks w ON w.table_name = 'outbox' \
    WHERE NOT coalesce(o.seq <= w.upto AND pg_visible_in_snapshot(o.tx, w.snapshot), false)";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capture {
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

pub async fn set(name: &str, capture: Capture, more: &str) -> (World, String, String) {
    let world = World::new(name).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = config(&world, capture, more);
    world.install(&config).await;
    (world, topic, config)
}

/// A relay that has come to its work.
pub async fn started(world: &World, config: &str, capture: Capture) -> Relay {
    let relay = world.relay(config);
    relay.wait_for("this relay owns the source");
    if capture == Capture::Stream {
        follows(&relay).await;
    }
    relay
}

pub fn insert(topic: &str, key: &str, from: u32, to: u32) -> String {
    format!(
        "{INSERT} SELECT '{topic}', '{key}', convert_to('' || i, 'UTF8'), NULL FROM generate_series({from}, {to}) i"
    )
}

pub fn texts(seen: &[Seen]) -> Vec<&str> {
    seen.iter().map(Seen::text).collect()
}

pub async fn stop(relay: Relay) {
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
    world.until_within(WAITING, 0, 4 * SOON).await;
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
    let config = calm(&config);
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

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_table_loses_its_slot_under_load_and_nothing_else() {
    let world = World::new("keepslot").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = calm(&config(&world, Capture::Stream, ""));
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
