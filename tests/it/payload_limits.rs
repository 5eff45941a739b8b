//! What a topic takes: chunks where it is compacted, and a limit that is changed while the relay runs.

use std::time::{Duration, Instant};

use whippet::{consume::Travelled, record::wire};

use crate::{
    harness::{Relay, SOON, Seen, World, service, whippet},
    large::{Large, MIB},
    proxy::Proxy,
};

const CHUNKS: &str = "oversize: chunk, chunk: { size: 100KiB }";
const COMPACTED: &str = "is compacted (cleanup.policy)";

/// A configuration whose only table goes to this topic, in chunks.
fn chunks_to(world: &World, kafka: &str, topic: &str) -> String {
    let table = format!("[{{ name: outbox, topic: '{topic}', payload: {{ {CHUNKS} }} }}]");
    world.config_for(&world.url, kafka, &table, "")
}

fn doctor(config: &str) -> (Option<i32>, String) {
    let output = whippet(&["doctor", "--config", config]);
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_for_a_compacted_topic_are_refused_at_the_start() {
    let world = World::new("compactstart").await;
    let compacted = world.create_topic("compacted", 1, &[("cleanup.policy", "compact,delete")]).await;
    let fine = world.create_topic("fine", 1, &[]).await;
    let config = chunks_to(&world, &crate::harness::kafka(), &compacted);
    world.install(&config).await;
    let file = world.write("whippet.yaml", &config);
    let (code, printed) = doctor(&file);
    assert!(code == Some(1) && printed.contains("FAIL  kafka: chunks: topic"), "{printed}");
    assert!(printed.contains(&format!("topic {compacted} {COMPACTED}")), "{printed}");
    let relay = Relay::start(&file);
    let said = relay.wait_for(COMPACTED).to_string();
    assert!(said.contains(&compacted) && said.contains("payload.oversize: claim_check"), "{said}");
    relay.wait_for("the relay stops");
    assert_eq!(relay.ended().code(), Some(1));

    // One of those that a template can mean: there may never be an event for it. One that is not there yet.
    for (topic, verdict) in [(world.topic("{type}"), "warn"), (fine, "ok  "), (world.topic("later"), "ok  ")]
    {
        let file = world.write("whippet.yaml", &chunks_to(&world, &crate::harness::kafka(), &topic));
        let (code, printed) = doctor(&file);
        assert!(printed.contains(&format!("{verdict}  kafka: chunks: ")), "{printed}");
        // That it is missing is another matter.
        assert_eq!(code, Some(i32::from(topic.ends_with("later"))), "{printed}");
        let relay = Relay::start(&file);
        relay.until_status("/tables/0/state", "running").await;
        assert_eq!(relay.stop().0, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kafka_that_is_away_does_not_keep_a_relay_with_chunks_from_starting() {
    let world = World::new("compactaway").await;
    let proxy = Proxy::kafka();
    proxy.cut();
    let topic = world.create_topic("events", 1, &[]).await;
    let config = chunks_to(&world, &service("WHIPPET_TEST_KAFKA_PROXIED"), &topic);
    world.install(&config).await;
    let began = Instant::now();
    let relay = world.relay(&config);
    relay.until_status("/tables/0/state", "running").await;
    assert_eq!(relay.get("/readyz").0, 200);
    // The question to Kafka is given up after 10 s.
    assert!(began.elapsed() < Duration::from_secs(8), "it waited for Kafka");
    proxy.heal();
    world.sql("INSERT INTO outbox (key, payload) VALUES ('k', 'small')").await;
    assert_eq!(world.consumer(&topic).read(1).len(), 1);
    assert_eq!(relay.stop().0, Some(0));
}

/// Releases what is parked until all of it has gone.
async fn redrive_all(stage: &Large, relay: &Relay) {
    let deadline = Instant::now() + SOON;
    while stage.world.number("SELECT count(*) FROM outbox").await > 0 {
        assert!(Instant::now() < deadline, "{}", relay.status());
        relay.operate(&stage.world, &["redrive", "--all"]);
        stage.world.pause().await;
    }
}

/// A broker that does not say in time what its topic is like has not said that it is another.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_refused_while_the_broker_does_not_say_that_the_topic_has_changed() {
    let proxy = Proxy::kafka();
    let mut stage = Large::set("compactlate", &[("cleanup.policy", "compact")]).await;
    let proxied = service("WHIPPET_TEST_KAFKA_PROXIED");
    let config = stage.config(CHUNKS, &[], "").replace(&crate::harness::kafka(), &proxied);
    let relay = stage.relay(&config).await;
    let known = stage.insert("small", 10).await;
    stage.until_seen(&[&known]);
    // Longer than what was said is taken for known.
    let began = Instant::now();
    proxy.latency(1_500);
    while began.elapsed() < Duration::from_secs(3) {
        let small = stage.insert("small", 10).await;
        stage.until_seen(&[&small]);
    }
    stage.insert("large", 2 * MIB).await;
    stage.until_held(1, "rejected", COMPACTED).await;
    assert_eq!(stage.seen().iter().filter(|record| record.header(wire::CHUNK_ID).is_some()).count(), 0);
    proxy.heal();
    stage.world.alter_topic(&stage.topic, "cleanup.policy", "delete").await;
    redrive_all(&stage, &relay).await;
    stage.end(relay).await;
}

/// The topic is made after the start, then it is changed while the relay runs.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_refused_by_a_topic_that_becomes_compacted() {
    let mut stage = Large::set("compacted", &[]).await;
    let config = stage.config(CHUNKS, &[], "");
    stage.topic = stage.world.topic("later");
    let relay = stage.relay(&config).await;
    stage.insert("early", 2 * MIB).await;
    stage.insert("early", 10).await;
    relay.wait_for("kafka topic cannot be written to");
    stage.world.create_topic("later", 1, &[("cleanup.policy", "compact")]).await;
    stage.until_held(1, "rejected", COMPACTED).await;
    stage.until_held(1, "behind", "").await;
    let small = stage.insert("small", 10).await;
    assert_eq!(stage.until_seen(&[&small]).len(), 1, "no chunk was sent");
    stage.world.alter_topic(&stage.topic, "cleanup.policy", "delete").await;
    redrive_all(&stage, &relay).await;

    // It is noticed by and by; from then on no chunk goes out.
    stage.world.alter_topic(&stage.topic, "cleanup.policy", "compact").await;
    let deadline = Instant::now() + SOON;
    for n in 0.. {
        assert!(Instant::now() < deadline, "it is not noticed");
        stage.insert(&format!("key-{n}"), 2 * MIB).await;
        let open = "SELECT count(*) - (SELECT count(*) FROM whippet.holds) FROM outbox";
        stage.world.until(open, 0).await;
        if stage.world.number("SELECT count(*) FROM whippet.holds").await > 0 {
            break;
        }
    }
    let chunks = |seen: &[Seen]| seen.iter().filter(|record| record.header(wire::CHUNK_ID).is_some()).count();
    let before = chunks(&stage.seen());
    stage.insert("another", 2 * MIB).await;
    stage.until_held(2, "rejected", COMPACTED).await;
    assert_eq!(chunks(&stage.seen()), before);
    stage.world.alter_topic(&stage.topic, "cleanup.policy", "delete").await;
    redrive_all(&stage, &relay).await;
    stage.end(relay).await;
}

/// Inserts events of this size until one travels so, and returns how many it took.
async fn until_one_travels(stage: &mut Large, size: usize, by_reference: bool) {
    let deadline = Instant::now() + SOON;
    loop {
        assert!(Instant::now() < deadline, "the new limit is not noticed");
        let id = stage.insert("k", size).await;
        let seen = stage.until_seen(&[&id]);
        let record = seen.iter().find(|record| record.header("id") == Some(&id)).unwrap();
        if record.header(wire::REF_URI).is_some() == by_reference {
            return;
        }
    }
}

/// Sizes around what fits with the headers that these records have, between small ones of the key.
async fn around(stage: &mut Large, limit: usize) {
    for size in (limit - 400..limit).step_by(40) {
        stage.insert("k", size).await;
        stage.insert("k", 10).await;
    }
    stage.world.until("SELECT count(*) FROM outbox", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_is_lowered_and_raised_is_noticed() {
    let mut stage = Large::set("limits", &[("max.message.bytes", "600000")]).await;
    let relay = stage.relay(&stage.config("", &[], "")).await;
    around(&mut stage, 600_000).await;
    stage.world.alter_topic(&stage.topic, "max.message.bytes", "100000").await;
    until_one_travels(&mut stage, 300_000, true).await;
    around(&mut stage, 100_000).await;
    stage.world.alter_topic(&stage.topic, "max.message.bytes", "3000000").await;
    until_one_travels(&mut stage, 1_500_000, false).await;
    around(&mut stage, 3_000_000).await;
    let (_, events) = stage.end(relay).await;
    let way = |low: usize, high: usize| -> Vec<Travelled> {
        let size = |event: &&whippet::consume::Event| event.payload.as_ref().unwrap().len();
        let of_size = events.iter().filter(|event| (low..high).contains(&size(event)));
        of_size.map(|event| event.travelled).collect()
    };
    for limit in [600_000, 100_000, 3_000_000] {
        let ways = way(limit - 400, limit);
        assert_eq!(ways.len(), 10);
        let both = ways.contains(&Travelled::Inline) && ways.contains(&Travelled::Reference);
        assert!(both && ways.is_sorted_by_key(|way| *way == Travelled::Reference), "{limit}: {ways:?}");
    }
}

/// What the refusal says is enough: the limit is raised, and the event released.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_event_goes_once_the_limit_is_raised() {
    let mut stage = Large::set("raised", &[("max.message.bytes", "100000")]).await;
    let relay = stage.relay(&stage.config("oversize: park", &[], "")).await;
    stage.insert("k", MIB).await;
    stage.until_held(1, "rejected", "raise the topic").await;
    stage.world.alter_topic(&stage.topic, "max.message.bytes", "2000000").await;
    redrive_all(&stage, &relay).await;
    stage.end(relay).await;
}
