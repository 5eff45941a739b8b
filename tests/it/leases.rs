//! One owner at a time, and a hand-over without loss.

use std::time::{Duration, Instant};

use crate::harness::{Relay, World, calm};

const INSERT: &str = "INSERT INTO outbox (topic, key, payload)";

#[tokio::test(flavor = "multi_thread")]
async fn a_second_relay_stands_by_ready_and_takes_over() {
    let world = World::new("standby").await;
    let topic = world.create_topic("events", 1, &[]).await;
    // One lane: it is not shared.
    let config = world.config("[{ name: outbox, order: table }]", "");
    world.install(&config).await;
    let first = world.relay(&config);
    first.wait_for("this relay owns the source");
    let second = world.relay(&config);
    second.wait_for("standing by");
    assert_eq!((second.get("/readyz").0, second.get("/livez").0), (200, 200));
    second.until_status("/role", "standby").await;
    assert_eq!(second.metric("whippet_leases_held", ""), 0.0);
    let mut consumer = world.consumer(&topic);
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', '1')")).await;
    consumer.read(1);
    first.kill();
    let killed = Instant::now();
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', '2')")).await;
    consumer.read_until(|seen| seen.iter().any(|record| record.text() == "2"));
    eprintln!("taken over {:?} after the kill; the lease has 2 s", killed.elapsed());
    assert!(killed.elapsed() < Duration::from_secs(8));

    // A clean stop hands over at once and repeats nothing.
    assert_eq!(second.stop().0, Some(0));
    let config = calm(&config);
    let second = world.relay(&config);
    second.wait_for("this relay owns the source");
    let third = world.relay(&config);
    third.wait_for("standing by");
    world
        .sql(&format!(
            "{INSERT} SELECT '{topic}', 'k', convert_to('n' || i, 'UTF8') FROM generate_series(1, 20000) i"
        ))
        .await;
    let before = consumer.seen.len();
    consumer.read(before + 1000);
    let (code, log) = second.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("stopped;"), "{log}");
    world.until("SELECT count(*) FROM outbox", 0).await;
    let seen = consumer.read_to_end();
    let order: Vec<&str> = seen[before..].iter().map(super::harness::Seen::text).collect();
    let expected: Vec<String> = (1..=20000).map(|n| format!("n{n}")).collect();
    assert_eq!(order, expected, "in order, and each once");
}

/// A relay that was stopped beyond its lease may publish what it has, as repeats; it records nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_wakes_up_after_its_lease_changes_nothing() {
    let world = World::new("zombie").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let zombie = world.relay(&config);
    zombie.wait_for("this relay owns the source");
    let mut consumer = world.consumer(&topic);
    let batch = |from: u32| {
        format!(
            "{INSERT} SELECT '{topic}', 'k', convert_to('' || i, 'UTF8') FROM generate_series({from}, {from} + 1999) i"
        )
    };
    for round in 0..5 {
        let before = consumer.read_to_end().len();
        world.sql(&batch(round * 4000 + 1)).await;
        consumer.read(before + 50);
        zombie.signal("STOP");
        let heir = Relay::start(&world.write("heir.yaml", &config));
        world.sql(&batch(round * 4000 + 2001)).await;
        world.until("SELECT count(*) FROM outbox", 0).await;
        zombie.signal("CONT");
        heir.stop();
        world.until("SELECT count(*) FROM whippet.members WHERE expires_at > clock_timestamp()", 1).await;
    }
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut last = 0;
    for record in consumer.read_to_end() {
        let n: u32 = record.text().parse().unwrap();
        assert!(n <= last + 1, "{n} overtook {}", last + 1);
        last = last.max(n);
    }
    assert_eq!(last, 20_000);
}
