//! What the broker does to us.

use crate::{
    harness::{World, calm, services},
    impostor::Impostor,
};

const INSERT: &str = "INSERT INTO outbox (topic, key, payload)";

#[tokio::test(flavor = "multi_thread")]
async fn events_of_a_missing_topic_wait_and_others_flow() {
    let world = World::new("notopic").await;
    let (there, later) = (world.create_topic("there", 1, &[]).await, world.topic("later"));
    let config = world.config("[{ name: outbox, retry: { max: 1s } }, { name: quiet }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!("{INSERT} VALUES ('{later}', 'k', '1'), ('{there}', 'k', '1'), ('{later}', 'k', '2'), ('{there}', 'k', '2')"))
        .await;
    world.consumer(&there).read(2);
    relay.wait_for("kafka topic cannot be written to");
    relay.until_status("/blocked_topics/0", later.as_str()).await;
    relay.wait_for_nth("kafka topic cannot be written to", 2);
    let status = relay.status();
    let [error, of_another] = [0, 1].map(|table| &status["tables"][table]["last_error"]);
    assert!(error.to_string().contains(&format!("topic {later} cannot be written to")), "{error}");
    assert!(of_another.is_null(), "{of_another}");
    let transient = "kind=\"transient\"";
    assert!(relay.metric("whippet_publish_failures_total", transient) >= 2.0);
    assert!(relay.metric("whippet_retries_total", transient) >= 1.0);
    world.create_topic("later", 1, &[]).await;
    let mut consumer = world.consumer(&later);
    assert_eq!(consumer.read(2).iter().map(super::harness::Seen::text).collect::<Vec<_>>(), ["1", "2"]);
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(world.number("SELECT count(*) FROM whippet.holds").await, 0);
    relay.until_status("/tables/0/last_error", serde_json::Value::Null).await;
    // Whoever stops a process and its group sends it two signals.
    relay.signal("TERM");
    assert_eq!(relay.stop().0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_topic_is_created_where_the_configuration_says_so() {
    let world = World::new("create").await;
    let topic = world.topic("made");
    let config = world.config("[{ name: outbox }]", "").replace(
        "kafka: {",
        "kafka: { create_topics: { enabled: true, partitions: 5, replication_factor: 1 },",
    );
    world.install(&config).await;
    let _relay = world.relay(&config);
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', '1'), ('{topic}', 'k', '2')")).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut consumer = world.consumer(&topic);
    assert_eq!(consumer.partitions(), 5);
    assert_eq!(consumer.read_to_end().iter().map(|r| r.text()).collect::<Vec<_>>(), ["1", "2"]);
}

/// Rows 1, 2 and 3 of one key in flight, 1 refused by the broker, 2 and 3 acceptable: nobody may see
/// 2 or 3 while 1 was not published.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_passes_an_event_that_the_broker_refuses() {
    let world = World::new("refused").await;
    let topic = world.create_topic("events", 2, &[("max.message.bytes", "2000000")]).await;
    let config = world.config("[{ name: outbox }]", "");
    let config = config.replace(
        "kafka: {",
        "kafka: { compression: none, linger: 0s, properties: { batch.num.messages: 1 },",
    );
    world.install(&config).await;
    let relay = world.relay(&config);
    // The relay learns the limit now, and it is lowered afterwards.
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'warm', 'w'), ('{topic}', 'other', 'w')")).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(2);
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.lower_limit(&topic, 2, 10_000).await;
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
        seen.iter().all(|record| !record.key.as_deref().unwrap_or_default().starts_with(b"bad")),
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
    // Six times the window, in bytes.
    world.sql(&format!("{INSERT} SELECT '{topic}', 'k' || i % 7, convert_to(i || repeat(' ', 1500), 'UTF8') FROM generate_series(101, 50000) i")).await;
    // Everything that may be in flight is, and the broker is given up several times meanwhile.
    relay.until(|status| status["tables"][0]["in_flight"].as_u64() > Some(5_000)).await;
    relay.until(|status| status["tables"][0]["oldest_pending_age_seconds"].as_f64() > Some(15.0)).await;
    assert_eq!((relay.get("/livez").0, relay.get("/readyz").0), (200, 200));
    services("up", "kafka");
    let up = std::time::Instant::now();
    world.until("SELECT count(*) FROM outbox", 0).await;
    eprintln!("drained {:?} after the broker was there, peak {:.0} MiB", up.elapsed(), relay.peak_mib());
    // contract.md, 5.4: 40 MiB and twice the window.
    assert!(relay.peak_mib() <= 64.0, "{} MiB", relay.peak_mib());
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read_to_end();
    for key in 0..7 {
        let key = format!("k{key}");
        let mut last = 0;
        let mut count = 0;
        for record in seen.iter().filter(|record| record.key.as_deref() == Some(key.as_bytes())) {
            let n: u32 = record.text().trim().parse().unwrap();
            if n > last {
                (last, count) = (n, count + 1);
            }
        }
        let expected = (1..=50000).filter(|n| format!("k{}", n % 7) == key).count();
        assert_eq!(count, expected, "first appearances of {key} are in order and complete");
    }
}

/// The same where the broker knows nothing of the producer yet: it would let the second batch of a
/// partition in, whatever its sequence number, after it refused the first.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_passes_the_first_batch_of_a_new_producer() {
    let world = World::new("firstbatch").await;
    let config = world.config("[{ name: outbox, columns: { partition: part } }]", "");
    // Each record is a batch of its own, five requests in flight.
    let config = config.replace(
        "kafka: {",
        "kafka: { compression: none, linger: 0s, properties: { batch.num.messages: 1 },",
    );
    world.install(&config).await;
    let relay = world.relay(&config);
    for round in 0..10 {
        let topic = world.create_topic(&format!("t{round}"), 10, &[("max.message.bytes", "2000000")]).await;
        // Partition 9 is used, so the limit is known; 0 to 8 have never seen this producer.
        world
            .sql(&format!("INSERT INTO outbox (topic, key, payload, part) VALUES ('{topic}', 'w', 'w', 9)"))
            .await;
        let mut consumer = world.consumer(&topic);
        consumer.read(1);
        world.lower_limit(&topic, 10, 10_000).await;
        world
            .sql(&format!(
                "INSERT INTO outbox (topic, key, payload, part) SELECT '{topic}', 'k' || p,
                   CASE n WHEN 0 THEN convert_to(repeat('x', 20000), 'UTF8') ELSE convert_to('' || n, 'UTF8') END, p
                 FROM generate_series(0, 8) p, generate_series(0, 5) n ORDER BY p, n"
            ))
            .await;
        world.until(&format!("SELECT count(*) FROM whippet.holds WHERE topic = '{topic}'"), 54).await;
        assert_eq!(
            consumer
                .read_to_end()
                .iter()
                .filter(|record| record.partition != 9 && record.key.is_some())
                .count(),
            0,
            "round {round}"
        );
    }
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_takes_small_batches_only_gets_small_batches() {
    let world = World::new("smallbatch").await;
    let small = world.create_topic("small", 2, &[("max.message.bytes", "5000")]).await;
    let config = calm(&world.config("[{ name: outbox }]", ""));
    world.install(&config).await;
    world
        .sql(&format!("{INSERT} SELECT '{small}', 'k' || i % 5, convert_to(repeat(md5('' || i), 20), 'UTF8') FROM generate_series(1, 5000) i"))
        .await;
    let relay = world.relay(&config);
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("did not take a record"), "{log}");
    assert_eq!(world.consumer(&small).read_to_end().len(), 5000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_deleted_and_made_again_loses_nothing_that_was_not_there() {
    let world = World::new("deleted").await;
    let (gone, stays) = (world.create_topic("gone", 1, &[]).await, world.create_topic("stays", 1, &[]).await);
    let config = world.config("[{ name: outbox, retry: { max: 1s } }]", "");
    world.install(&config).await;
    let _relay = world.relay(&config);
    world.sql(&format!("{INSERT} VALUES ('{gone}', 'k', '0'), ('{stays}', 'k', '0')")).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.delete_topic(&gone).await;
    world
        .sql(&format!("{INSERT} VALUES ('{gone}', 'k', '1'), ('{stays}', 'k', '1'), ('{gone}', 'k', '2')"))
        .await;
    let mut others = world.consumer(&stays);
    others.read_until(|seen| seen.iter().any(|record| record.text() == "1"));
    world.create_topic("gone", 1, &[]).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut consumer = world.consumer(&gone);
    let seen: Vec<&str> = consumer.read_to_end().iter().map(super::harness::Seen::text).collect();
    assert_eq!(seen, ["1", "2"]);
}

/// What a cluster says while it is shut down, and what librdkafka never comes back from by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_says_it_has_no_brokers_is_found_again() {
    let world = World::new("nobrokers").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let (during, after) =
        (world.create_topic("during", 1, &[]).await, world.create_topic("after", 1, &[]).await);
    let (impostor, address) = Impostor::start();
    let config = world.config_for(&world.url, &address, "[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    let insert = |from: u32, to: u32| {
        format!(
            "{INSERT} SELECT '{topic}', 'k' || i % 5, convert_to('' || i, 'UTF8') FROM generate_series({from}, {to}) i"
        )
    };
    world.sql(&insert(1, 100)).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    impostor.denies_all_brokers();
    // Nothing is to be sent when it happens, and then there is.
    relay.wait_for("answered with no brokers");
    world.sql(&insert(101, 200)).await;
    // Topics that the relay has to ask about: the client that asks forgets the brokers as well.
    let new = |topic: &str| format!("{INSERT} VALUES ('{topic}', 'k', '1')");
    world.sql(&new(&during)).await;
    relay.wait_for("kafka topic cannot be written to");
    impostor.is_honest();
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.sql(&new(&after)).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut last = std::collections::HashMap::new();
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read_to_end();
    assert_eq!(seen.len(), 200);
    for record in seen {
        let number: u32 = record.text().parse().unwrap();
        let before = last.insert(record.key.clone(), number);
        assert!(before < Some(number), "{before:?} before {number}");
    }
}
