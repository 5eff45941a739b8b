//! The fault suite: writers go on, something breaks, and the outside checker has the last word.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    harness::{Relay, SOON, World, kafka, service, services},
    load::{Load, Plan},
    proxy::Proxy,
};

pub const PLAN: Plan = Plan { writers: 4, keys: 50, rows: 1_000_000, pause_ms: 30, poison: None };

/// A relay under load, and what it takes to end the test.
pub struct Stage {
    pub world: World,
    pub load: Load,
    pub config: String,
}

impl Stage {
    pub async fn set(name: &str, plan: Plan, config: impl Fn(&World) -> String) -> Stage {
        Stage::set_in(World::new(name).await, plan, config).await
    }

    pub async fn set_in(world: World, plan: Plan, config: impl Fn(&World) -> String) -> Stage {
        let topic = world.create_topic("events", 3, &[]).await;
        let config = config(&world);
        // Installed past the proxies: those are for the relay.
        let direct = world.config("[{ name: outbox }]", "");
        world.install(&direct).await;
        let load = Load::start(&world, &topic, plan, fastrand::u64(..1_000_000) * plan.writers).await;
        Stage { world, load, config }
    }

    pub fn relay(&self) -> Relay {
        self.world.relay(&self.config)
    }

    /// Lets the load go on for a while: the time that a fault lasts.
    pub async fn carry_on(&self, time: Duration) {
        let (until, before) = (Instant::now() + time, self.load.written());
        while Instant::now() < until || self.load.written() == before {
            self.world.pause().await;
        }
    }

    /// Waits until something was published since, which shows that the relay works again.
    pub async fn flows_again(&self, relay: &Relay) {
        let before = relay.metric("whippet_events_published_total", "outbox");
        let deadline = Instant::now() + SOON;
        while relay.metric("whippet_events_published_total", "outbox") <= before {
            assert!(Instant::now() < deadline, "it does not flow again: {}", relay.status());
            self.world.pause().await;
        }
    }

    /// Ends the load, lets the relay finish, and asks the checker.
    pub async fn end(mut self, relay: Relay) {
        self.load.stop();
        self.load.ended().await;
        self.world.until("SELECT count(*) FROM outbox", 0).await;
        assert_eq!(relay.get("/livez").0, 200, "the loops turned all the time");
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        let (verdict, _) = self.load.check(&self.world);
        assert!(verdict.published > 500, "{verdict:?}");
    }
}

/// Each fault a relay meets on a network, one after the other.
async fn weather(stage: &Stage, relay: &Relay, proxy: &Proxy) {
    type Fault = (&'static str, fn(&Proxy));
    let faults: [Fault; 5] = [
        ("cut", Proxy::cut),
        ("blackhole", Proxy::blackhole),
        ("latency", |proxy| proxy.latency(300)),
        ("slow close", |proxy| proxy.slow_close(1_000)),
        ("reset", |proxy| proxy.reset_peer(50)),
    ];
    for (name, fault) in faults {
        let began = Instant::now();
        fault(proxy);
        stage.carry_on(Duration::from_secs(3)).await;
        assert_eq!(relay.get("/livez").0, 200, "{name}");
        proxy.heal();
        let healed = Instant::now();
        stage.flows_again(relay).await;
        eprintln!("{name}: {:?}, flows again {:?} after it ended", healed - began, healed.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_to_kafka_breaks_in_every_way() {
    let proxy = Proxy::kafka();
    let stage = Stage::set("netkafka", PLAN, |world| {
        let kafka = service("WHIPPET_TEST_KAFKA_PROXIED");
        let config = world.config_for(&world.url, &kafka, "[{ name: outbox }]", "");
        // So that a request that vanished is noticed within the test.
        config.replace(
            "kafka: {",
            "kafka: { properties: { socket.timeout.ms: 4000, request.timeout.ms: 3000 },",
        )
    })
    .await;
    let relay = stage.relay();
    stage.flows_again(&relay).await;
    weather(&stage, &relay, &proxy).await;
    stage.end(relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_to_the_database_breaks_in_every_way() {
    let proxy = Proxy::postgres();
    let stage = Stage::set("netdb", PLAN, |world| {
        let port = service("WHIPPET_TEST_PG_PROXIED_PORT");
        let (_, name) = world.url.rsplit_once('/').unwrap();
        let url = format!("postgres://postgres@127.0.0.1:{port}/{name}");
        world.config_for(&url, &kafka(), "[{ name: outbox }]", "")
    })
    .await;
    let relay = stage.relay();
    stage.flows_again(&relay).await;
    weather(&stage, &relay, &proxy).await;
    stage.end(relay).await;
}

pub fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &pid.to_string()]).status().unwrap();
    assert!(sent.success());
}

pub fn kafka_pid() -> u32 {
    let file = service("WHIPPET_TEST_KAFKA_PID");
    std::fs::read_to_string(file).unwrap().trim().parse().unwrap()
}

/// A broker that hangs for longer than a request may take, and then goes on as if nothing had been: its
/// answers come for requests that were given up.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_hangs_longer_than_a_request_is_survived() {
    let stage = Stage::set("hang", PLAN, |world| {
        world.config("[{ name: outbox }]", "").replace(
            "kafka: {",
            "kafka: { properties: { socket.timeout.ms: 1500, request.timeout.ms: 1000 },",
        )
    })
    .await;
    let relay = stage.relay();
    stage.flows_again(&relay).await;
    for _ in 0..2 {
        signal(kafka_pid(), "STOP");
        // Longer than both, and short enough for the controller, which hangs with it, not to give it up.
        stage.carry_on(Duration::from_millis(2_500)).await;
        signal(kafka_pid(), "CONT");
        stage.flows_again(&relay).await;
    }
    stage.end(relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_restarts_again_and_again_is_survived() {
    let stage = Stage::set("restarts", PLAN, |world| world.config("[{ name: outbox }]", "")).await;
    let relay = stage.relay();
    for _ in 0..3 {
        stage.flows_again(&relay).await;
        // Without a goodbye.
        tokio::task::spawn_blocking(|| services("kill", "kafka")).await.unwrap();
        tokio::task::spawn_blocking(|| services("up", "kafka")).await.unwrap();
        let up = Instant::now();
        stage.flows_again(&relay).await;
        eprintln!("flows again {:?} after the broker was there", up.elapsed());
        stage.carry_on(Duration::from_secs(1)).await;
    }
    stage.end(relay).await;
}

/// The relay dies at every place where something was done and not yet told; parked keys among it, which
/// are mended and released at the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_dies_at_any_point_loses_nothing_and_overtakes_nothing() {
    let plan = Plan { keys: 2_000, poison: Some(300), ..PLAN };
    let stage = Stage::set("failpoints", plan, |world| world.config("[{ name: outbox }]", "")).await;
    let file = stage.world.write("whippet.yaml", &stage.config);
    let start = |place: &str| Relay::start_with(&file, &[("FAILPOINTS", place)]);
    for (place, after) in [
        ("read", 30),
        ("before-send", 500),
        ("sent", 500),
        ("acknowledged", 10),
        ("recorded", 10),
        ("before-park", 2),
        ("mid-park", 2),
    ] {
        let relay = start(&format!("{place}={after}*off->return"));
        let ended = tokio::task::spawn_blocking(move || relay.ended()).await.unwrap();
        assert!(!ended.success(), "{place}: {ended}");
        eprintln!("died at {place}");
    }
    let relay = stage.relay();
    stage.world.until("SELECT (count(*) > 0)::int::bigint FROM whippet.holds", 1).await;
    relay.kill();
    for place in ["mid-redrive", "redriven"] {
        let relay = start(&format!("{place}=return"));
        relay.wait_for("this relay owns the source");
        // It dies before it answers.
        assert_eq!(relay.try_to(&stage.world, &["redrive", "--all"]).status.code(), Some(1), "{place}");
        let ended = tokio::task::spawn_blocking(move || relay.ended()).await.unwrap();
        assert!(!ended.success(), "{place}: {ended}");
    }
    stage.load.stop();
    let relay = stage.relay();
    stage.flows_again(&relay).await;
    let mut stage = stage;
    stage.load.ended().await;
    stage.world.sql("UPDATE outbox SET headers = NULL").await;
    stage.world.until("SELECT count(*) - (SELECT count(*) FROM whippet.holds) FROM outbox", 0).await;
    assert!(stage.world.number("SELECT count(*) FROM whippet.holds").await > 0);
    relay.operate(&stage.world, &["redrive", "--all"]);
    stage.end(relay).await;
}

/// A poison row at the head of every batch: each costs its own key, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_poison_row_at_the_head_of_every_batch_stops_nobody_else() {
    let world = World::new("poison").await;
    let topic = world.create_topic("events", 3, &[("max.message.bytes", "2000000")]).await;
    let config = world.config("[{ name: outbox, poll: { batch: 100 } }]", "");
    let config = config.replace("kafka: {", "kafka: { compression: none,");
    world.install(&config).await;
    let relay = world.relay(&config);
    world.sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'warm', '0')")).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    // Half of them the relay can tell by itself, and half only the broker.
    world.lower_limit(&topic, 3, 20_000).await;
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload, headers)
             SELECT '{topic}', CASE i % 100 WHEN 0 THEN 'poison' || i ELSE 'k' || i % 7 END,
               CASE WHEN i % 200 = 0 THEN convert_to(repeat('x', 30000), 'UTF8') ELSE convert_to('' || i, 'UTF8') END,
               CASE WHEN i % 200 = 100 THEN '[1]'::json END
             FROM generate_series(0, 9999) i"
        ))
        .await;
    world.until("SELECT count(*) FROM whippet.holds", 100).await;
    world.until("SELECT count(*) FROM outbox", 100).await;
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read_to_end();
    for key in 0..7 {
        let key = format!("k{key}");
        let mut next = (0..10_000).filter(|i| i % 100 != 0 && format!("k{}", i % 7) == key).peekable();
        let of_key = seen.iter().filter(|record| record.key.as_deref() == Some(key.as_bytes()));
        for number in of_key.map(|record| record.text().parse::<u32>().unwrap()) {
            assert!(next.peek().is_none_or(|next| number <= *next), "{number} came before {:?}", next.peek());
            next.next_if_eq(&number);
        }
        assert_eq!(next.next(), None);
    }
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
}

/// go-pq-cdc#151, sequin#2128: what waits at the start does not have to fit into memory.
#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_thousand_parked_events_at_the_start_stay_within_the_memory_limit() {
    let world = World::new("manyparked").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = world.config("[{ name: outbox, hold: { max_events: 500000 } }]", "");
    world.install(&config).await;
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'key-' || i, convert_to(md5('' || i), 'UTF8') FROM generate_series(1, 200000) i;
             INSERT INTO whippet.holds (table_name, place, event_id, topic, key, state, cause, reason, attempts)
               SELECT 'outbox', seq::text, id::text, topic, convert_to(key, 'UTF8'), 'parked', 'rejected', 'a reason of some length, as they are', 1 FROM outbox;
             ANALYZE outbox; ANALYZE whippet.holds"
        ))
        .await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'free-' || i, '1' FROM generate_series(1, 1000) i;
             INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'key-' || i, '2' FROM generate_series(1, 1000) i"
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    consumer.read(1000);
    world.until("SELECT count(*) FROM whippet.holds", 201_000).await;
    relay.until_status("/tables/0/parked_keys", 200_000).await;
    // contract.md, 5.4: 40 MiB, twice the window of 12 MiB, and the largest row, which is small.
    let bound = 40.0 + 2.0 * 12.0;
    eprintln!("200,000 keys parked: peak {:.0} MiB", relay.peak_mib());
    assert!(relay.peak_mib() <= bound, "{} MiB", relay.peak_mib());
    let began = Instant::now();
    let done = relay.operate(&world, &["redrive", "--all"]);
    assert_eq!((done["keys"].as_u64(), done["events"].as_u64()), (Some(200_000), Some(201_000)));
    world.until_within("SELECT count(*) FROM outbox", 0, Duration::from_mins(1)).await;
    eprintln!("released and published in {:?}, peak {:.0} MiB", began.elapsed(), relay.peak_mib());
    assert!(relay.peak_mib() <= bound, "{} MiB", relay.peak_mib());
    consumer.read(202_000);
    let mut firsts = std::collections::HashMap::new();
    for record in consumer.read_to_end() {
        let last = firsts.insert(record.key.clone(), record.payload.clone());
        assert_ne!(last.flatten().as_deref(), Some(&b"2"[..]), "the later one was first");
    }
    assert_eq!(firsts.len(), 201_000);
}

/// All events of one key, through a kill and a broker restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_hot_key_stays_in_order_through_a_kill_and_a_restart() {
    let stage = Stage::set("hotkey", Plan { keys: 1, writers: 3, pause_ms: 10, ..PLAN }, |world| {
        world.config("[{ name: outbox }]", "")
    })
    .await;
    let relay = stage.relay();
    stage.flows_again(&relay).await;
    relay.kill();
    let relay = stage.relay();
    stage.flows_again(&relay).await;
    tokio::task::spawn_blocking(|| services("restart", "kafka")).await.unwrap();
    stage.flows_again(&relay).await;
    stage.end(relay).await;
}
