//! Kept rows that an operator holds, releases, skips or has published again, and those that are old.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::{
    harness::{Consumer, Seen, at_once, calm},
    keep::{Capture, INSERT, NOT_BEHIND, WAITING, insert, set, started, stop, texts},
    stream::drop_slot,
};

fn of_bad(seen: &[Seen]) -> Vec<&str> {
    seen.iter().filter(|one| one.key.as_deref() == Some(b"bad")).map(Seen::text).collect()
}

fn until_bad(consumer: &mut Consumer, text: &str) {
    consumer.read_until(|seen| of_bad(seen).contains(&text));
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
    let mut first = HashSet::new();
    bad.retain(|text| first.insert(*text));
    assert_eq!(bad, ["1", "2", "3", "4", "5", "6", "7", "8", "10", "11", "12", "13", "14", "15"]);
    if capture == Capture::Stream {
        drop_slot(&world).await;
    }
}

#[test]
fn held_rows_of_a_kept_table_are_released_in_order_and_skipped_for_good() {
    at_once([("keepverbs", Capture::Poll), ("keepverbsstream", Capture::Stream)], |(name, capture)| {
        an_operator(name, capture)
    });
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
    let config = calm(&config);
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
