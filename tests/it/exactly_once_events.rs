//! `kafka.delivery: exactly_once`: what is in a transaction. Chunks, holds, and more than one of them takes.

use std::collections::BTreeMap;

use crate::{
    exactly_once::{LEFT, Once, PLAN, exactly, one_table},
    harness::{Relay, World, calm},
    load::Plan,
};

/// A relay that dies at a step, so many times later.
async fn dies_at(file: &str, step: &str, skip: u32) {
    let relay = Relay::start_with(file, &[("FAILPOINTS", &format!("{step}={skip}*off->return"))]);
    let ended = tokio::task::spawn_blocking(move || relay.ended()).await.unwrap();
    assert!(!ended.success(), "{step}: {ended}");
}

/// A hold is in the source before a position passes it, and what is released from it is published once.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_is_neither_lost_nor_repeated_by_kills() {
    let world = World::new("eosholds").await;
    let config = world.config("[{ name: outbox }]", "");
    let plan = Plan { keys: 1_000, poison: Some(100), ..PLAN };
    let mut once = Once::with(world, &config, "exactly_once", plan).await;
    for (step, skip) in [
        ("before-park", 2),
        ("mid-park", 2),
        ("eos-before-commit", 15),
        ("eos-committed", 15),
        ("recorded", 9),
    ] {
        dies_at(&once.file, step, skip).await;
    }
    let relay = Relay::start(&once.file);
    once.load.stop();
    once.load.ended().await;
    let not_held = "SELECT count(*) - (SELECT count(*) FROM whippet.holds) FROM outbox";
    once.world.until(not_held, 0).await;
    assert!(once.world.number("SELECT count(*) FROM whippet.holds").await > 0);
    once.world.sql("UPDATE outbox SET headers = NULL").await;
    relay.operate(&once.world, &["redrive", "--all"]);
    assert_eq!(once.end(LEFT, relay).await, 0, "repeats");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_chunks_of_an_event_are_seen_together_or_not_at_all() {
    let world = World::new("eoschunks").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let payload = "{ oversize: chunk, inline_max: 10KiB, chunk: { size: 10KiB } }";
    let table = format!("[{{ name: outbox, payload: {payload} }}]");
    let config = exactly(&world, &world.config(&table, ""), "exactly_once");
    world.install(&config).await;
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'k' || i, convert_to(repeat('x', 100000), 'UTF8') \
             FROM generate_series(1, 8) i"
        ))
        .await;
    let file = world.write("whippet.yaml", &config);
    // In the middle of the second event, and of the third.
    for skip in [14, 25] {
        dies_at(&file, "mid-chunks", skip).await;
    }
    let relay = Relay::start(&file);
    world.until(LEFT, 0).await;
    assert_eq!(relay.stop().0, Some(0));
    let mut consumer = world.consumer(&topic);
    let mut events: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for chunk in consumer.read_committed() {
        let index = chunk.header("whippet-chunk-index").unwrap().parse().unwrap();
        events.entry(chunk.header("id").unwrap()).or_default().push(index);
    }
    assert_eq!(events.len(), 8);
    for (id, indices) in events {
        assert_eq!(indices, (0..10).collect::<Vec<_>>(), "{id}");
    }
}

/// One transaction of the source may be more than one of Kafka's, each of which is bounded.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_transaction_of_the_source_is_several_of_kafka() {
    let (world, topic, config) = one_table("eoslarge").await;
    let config = calm(&config);
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'k', convert_to('' || i, 'UTF8') \
             FROM generate_series(1, 45000) i"
        ))
        .await;
    let relay = world.relay(&config);
    world.until(LEFT, 0).await;
    let transactions = relay.metric("whippet_transaction_events_count", "");
    assert!(transactions >= 2.0, "{transactions}");
    assert_eq!(relay.metric("whippet_transaction_events_bucket", "le=\"40000\""), transactions);
    assert_eq!(relay.metric("whippet_transaction_events_sum", ""), 45_000.0);
    assert!(relay.metric("whippet_transactions_total", "committed") >= transactions);
    assert_eq!(relay.metric("whippet_transactions_total", "unknown"), 0.0);
    assert_eq!(relay.metric("whippet_unit_takeovers_total", ""), 1.0);
    assert_eq!(relay.stop().0, Some(0));
    let mut consumer = world.consumer(&topic);
    let seen: Vec<u32> = consumer.read_committed().iter().map(|one| one.text().parse().unwrap()).collect();
    assert_eq!(seen, (1..=45_000).collect::<Vec<_>>());
}
