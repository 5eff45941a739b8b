//! What the broker does to us.

use crate::harness::{World, services};

const INSERT: &str = "INSERT INTO outbox (topic, key, payload)";

#[tokio::test(flavor = "multi_thread")]
async fn events_of_a_missing_topic_wait_and_others_flow() {
    let world = World::new("notopic").await;
    let (there, later) = (world.create_topic("there", 1, &[]).await, world.topic("later"));
    let config = world.config("[{ name: outbox, retry: { max: 1s } }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!("{INSERT} VALUES ('{later}', 'k', '1'), ('{there}', 'k', '1'), ('{later}', 'k', '2'), ('{there}', 'k', '2')"))
        .await;
    world.consumer(&there).read(2);
    relay.wait_for("kafka topic cannot be written to");
    while relay.status()["blocked_topics"][0] != later.as_str() {
        world.pause().await;
    }
    world.create_topic("later", 1, &[]).await;
    let mut consumer = world.consumer(&later);
    assert_eq!(consumer.read(2).iter().map(|r| r.text()).collect::<Vec<_>>(), ["1", "2"]);
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(world.number("SELECT count(*) FROM whippet.holds").await, 0);
}

/// Rows 1, 2 and 3 of one key in flight, 1 refused by the broker, 2 and 3 acceptable: nobody may see
/// 2 or 3 while 1 was not published.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_passes_an_event_that_the_broker_refuses() {
    let world = World::new("refused").await;
    let topic = world.create_topic("events", 2, &[("max.message.bytes", "2000000")]).await;
    let config = world.config("[{ name: outbox }]", "");
    let config = config
        .replace("kafka: {", "kafka: { compression: none, linger: 20ms,");
    world.install(&config).await;
    let relay = world.relay(&config);
    // The relay learns the limit now, and it is lowered afterwards.
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'warm', 'w'), ('{topic}', 'other', 'w')")).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(2);
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.alter_topic(&topic, "max.message.bytes", "10000").await;
    let mut script = String::from("BEGIN;");
    for round in 0..50 {
        script += &format!(
            "{INSERT} VALUES ('{topic}', 'bad{round}', convert_to(repeat('x', 20000), 'UTF8')), ('{topic}', 'bad{round}', '2'),
             ('{topic}', 'good', '{round}'), ('{topic}', 'bad{round}', '3');"
        );
    }
    world.sql(&(script + "COMMIT;")).await;
    world.until("SELECT count(*) FROM whippet.holds", 150).await;
    world.until("SELECT count(*) FROM outbox", 150).await;
    let seen = consumer.read_to_end();
    assert!(
        seen.iter().all(|record| !record.key.as_deref().unwrap().starts_with(b"bad")),
        "an event passed the refused one before it"
    );
    // First appearances of the innocent key are in order, and all there; repeats may follow.
    let mut good: Vec<&str> = Vec::new();
    for record in seen.iter().filter(|record| record.key.as_deref() == Some(b"good")) {
        if !good.contains(&record.text()) {
            good.push(record.text());
        }
    }
    assert_eq!(good, (0..50).map(|n| n.to_string()).collect::<Vec<_>>());
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_goes_away_is_waited_for_and_nothing_is_lost() {
    let world = World::new("outage").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world.sql(&format!("{INSERT} SELECT '{topic}', 'k' || i % 7, convert_to('' || i, 'UTF8') FROM generate_series(1, 100) i")).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    services("kill", "kafka");
    world.sql(&format!("{INSERT} SELECT '{topic}', 'k' || i % 7, convert_to('' || i, 'UTF8') FROM generate_series(101, 5000) i")).await;
    while relay.metric("whippet_in_flight_events", "") == 0.0 {
        world.pause().await;
    }
    assert_eq!((relay.get("/livez").0, relay.get("/readyz").0), (200, 200));
    services("up", "kafka");
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read_to_end();
    for key in 0..7 {
        let key = format!("k{key}");
        let mut last = 0;
        let mut count = 0;
        for record in seen.iter().filter(|record| record.key.as_deref() == Some(key.as_bytes())) {
            let n: u32 = record.text().parse().unwrap();
            if n > last {
                (last, count) = (n, count + 1);
            }
        }
        let expected = (1..=5000).filter(|n| format!("k{}", n % 7) == key).count();
        assert_eq!(count, expected, "first appearances of {key} are in order and complete");
    }
}
