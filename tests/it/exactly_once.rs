//! `kafka.delivery: exactly_once`: a reader with isolation.level=read_committed sees each event once, in order,
//! whatever dies. The same loads with at_least_once have to repeat some, or nothing is proven.

use std::time::{Duration, Instant};

use crate::{
    harness::{Relay, SOON, World, in_soak, service, services},
    load::{Load, Plan},
    mysql::{on_both, world as world_on},
    proxy::Proxy,
    stream::{drop_slot, streamed},
};

const PLAN: Plan = Plan { writers: 4, keys: 300, rows: u64::MAX, pause_ms: 20, poison: None };

/// Where a relay dies: around begin, produce, position, commit and record.
const FAILPOINTS: [&str; 8] = [
    "eos-initialised",
    "eos-begun",
    "sent",
    "eos-before-position",
    "eos-before-commit",
    "eos-committed",
    "acknowledged",
    "recorded",
];

/// A world with writers, and relays that publish exactly once.
struct Once {
    world: World,
    file: String,
    load: Load,
}

impl Once {
    async fn new(name: &str, tables: &str, delivery: &str) -> Once {
        let world = World::new(name).await;
        let config = world.config(tables, "");
        Once::on(world, &config, delivery).await
    }

    async fn on(world: World, config: &str, delivery: &str) -> Once {
        let topic = world.create_topic("events", 6, &[]).await;
        let config = exactly(&world, config, delivery);
        world.install(&config).await;
        let seed = fastrand::u64(..1_000_000) * PLAN.writers;
        let load = Load::start(&world, &topic, PLAN, seed).await;
        let file = world.write("whippet.yaml", &config);
        Once { world, file, load }
    }

    /// The writers end, everything is recorded, and the checker looks at all of it. Returns the repeats.
    async fn end(&mut self, left: &str, relay: Relay) -> usize {
        self.load.stop();
        self.load.ended().await;
        self.world.until_within(left, 0, Duration::from_mins(1)).await;
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        let (verdict, _) = self.load.check(&self.world);
        assert!(verdict.pairs > 100, "{verdict:?}");
        verdict.repeats
    }
}

/// A configuration with this delivery, and a position topic of its own.
fn exactly(world: &World, config: &str, delivery: &str) -> String {
    let kafka = format!("kafka: {{ delivery: {delivery}, position_topic: '{}',", world.topic("positions"));
    config.replace("kafka: {", &kafka)
}

const LEFT: &str = "SELECT count(*) FROM outbox";

/// Kills a relay again and again: at one of the failpoints, or at random. Returns the last one, which lives.
async fn kills(once: &Once, kills: u32) -> Relay {
    let mut random = fastrand::Rng::new();
    for kill in 0..kills {
        let began = Instant::now();
        let at = FAILPOINTS[kill as usize % FAILPOINTS.len()];
        if kill % 3 == 2 {
            let relay = Relay::start(&once.file);
            tokio::time::sleep(Duration::from_millis(random.u64(300..2_500))).await;
            relay.kill();
            continue;
        }
        // Not at once, or nothing would ever be published.
        let skip = match at {
            "sent" => random.u32(0..2_000),
            "eos-initialised" => 0,
            _ => random.u32(0..4),
        };
        let action = format!("{at}={skip}*off->return");
        let relay = Relay::start_with(&once.file, &[("FAILPOINTS", &action)]);
        let status = tokio::task::spawn_blocking(move || relay.ended()).await.unwrap();
        assert!(!status.success(), "{at}: {status}");
        eprintln!("kill {kill} at {at}: {:?}", began.elapsed());
    }
    Relay::start(&once.file)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_is_seen_once_through_kills_at_every_step() {
    let mut once = Once::new("eoskills", "[{ name: outbox }]", "exactly_once").await;
    let relay = kills(&once, in_soak(16, 200)).await;
    assert_eq!(once.end(LEFT, relay).await, 0, "repeats");
}

/// What the test above would say if it did not prove anything.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_kills_repeat_events_that_are_delivered_at_least_once() {
    let mut once = Once::new("eosnot", "[{ name: outbox }]", "at_least_once").await;
    for _ in 0..4 {
        let relay = Relay::start_with(&once.file, &[("FAILPOINTS", "acknowledged=3*off->return")]);
        tokio::task::spawn_blocking(move || relay.ended()).await.unwrap();
    }
    let relay = Relay::start(&once.file);
    assert!(once.end(LEFT, relay).await > 0, "the checker finds no repeats where there must be some");
}

/// Three relays, of which one works: it is killed at any moment, or stands still beyond its lease and comes back.
#[tokio::test(flavor = "multi_thread")]
async fn each_event_is_seen_once_when_relays_take_over_from_one_another() {
    let mut once = Once::new("eosheirs", "[{ name: outbox, after_publish: mark }]", "exactly_once").await;
    let left = "SELECT count(*) FROM outbox WHERE published_at IS NULL";
    let mut random = fastrand::Rng::new();
    let mut relays: Vec<Relay> = (0..3).map(|_| Relay::start(&once.file)).collect();
    let mut stood = None;
    for round in 0..in_soak(6, 60) {
        let owner = owner_of(&once.world, &relays).await;
        flows(&once, left).await;
        tokio::time::sleep(Duration::from_millis(random.u64(0..200))).await;
        if round % 2 == 0 {
            relays.remove(owner).kill();
            relays.push(Relay::start(&once.file));
        } else {
            // It believes in its lease when it wakes up in the middle of its work.
            relays[owner].signal("STOP");
            stood = Some(relays.remove(owner));
            owner_of(&once.world, &relays).await;
            flows(&once, left).await;
        }
        if let Some(zombie) = stood.take() {
            zombie.signal("CONT");
            relays.push(zombie);
        }
    }
    let last = relays.remove(owner_of(&once.world, &relays).await);
    for relay in relays {
        assert_eq!(relay.stop().0, Some(0));
    }
    assert_eq!(once.end(left, last).await, 0, "repeats");
}

/// Which of them has the source, as the source says.
async fn owner_of(world: &World, relays: &[Relay]) -> usize {
    let deadline = Instant::now() + SOON;
    loop {
        for (index, relay) in relays.iter().enumerate() {
            let name = relay.status()["replica"].as_str().unwrap().to_owned();
            let owns = format!(
                "SELECT count(*) FROM whippet.parts p JOIN whippet.members m USING (epoch) \
                 WHERE part = -1 AND m.owner = '{name}' AND expires_at > clock_timestamp()"
            );
            if world.number(&owns).await == 1 {
                return index;
            }
        }
        assert!(Instant::now() < deadline, "nobody owns the source");
        world.pause().await;
    }
}

/// What is written now is published.
async fn flows(once: &Once, left: &str) {
    let all = once.world.number("SELECT coalesce(max(seq), 0) FROM outbox").await;
    let joined = if left.contains("WHERE") { "AND" } else { "WHERE" };
    once.world.until_within(&format!("{left} {joined} seq <= {all}"), 0, Duration::from_mins(1)).await;
}

/// Answers to commits are lost: the broker has heard the request, and its answer comes to nobody.
#[tokio::test(flavor = "multi_thread")]
async fn each_event_is_seen_once_through_lost_answers_and_a_broker_restart() {
    let proxy = Proxy::kafka();
    let world = World::new("eosnet").await;
    let config =
        world.config_for(&world.url, &service("WHIPPET_TEST_KAFKA_PROXIED"), "[{ name: outbox }]", "");
    let quick = "properties: { socket.timeout.ms: 3000, request.timeout.ms: 2000 },";
    let config = config.replace("kafka: {", &format!("kafka: {{ {quick}"));
    let mut once = Once::on(world, &config, "exactly_once").await;
    let relay = Relay::start(&once.file);
    flows(&once, LEFT).await;
    let mut random = fastrand::Rng::new();
    for round in 0..in_soak(12, 100) {
        tokio::time::sleep(Duration::from_millis(random.u64(100..400))).await;
        proxy.deaf();
        tokio::time::sleep(Duration::from_millis(random.u64(20..150))).await;
        proxy.cut();
        proxy.heal();
        if round == 5 {
            tokio::task::spawn_blocking(|| services("restart", "kafka")).await.unwrap();
        }
        if round % 4 == 3 {
            flows(&once, LEFT).await;
        }
    }
    flows(&once, LEFT).await;
    assert_eq!(once.end(LEFT, relay).await, 0, "repeats");
}

/// What the broker refuses for good costs its own key, and its dead letter is in a transaction too.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_event_has_one_dead_letter_and_everything_else_is_seen_once() {
    let world = World::new("eosdead").await;
    // The broker wants a key there, which the relay does not know.
    let topic = world.create_topic("events", 2, &[("cleanup.policy", "compact")]).await;
    let letters = world.create_topic("events.dead", 1, &[]).await;
    let table = "[{ name: outbox, on_failure: dead_letter, dead_letter: { topic: '{topic}.dead' } }]";
    let config = exactly(&world, &world.config(table, ""), "exactly_once");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload) SELECT '{topic}', CASE WHEN i % 100 <> 7 THEN 'k' || i % 3 END, \
             convert_to('' || i, 'UTF8') FROM generate_series(1, 500) i"
        ))
        .await;
    world.until(LEFT, 0).await;
    assert_eq!(relay.stop().0, Some(0));
    let mut consumer = world.consumer(&topic);
    let seen: Vec<i64> = consumer.read_committed().iter().map(|one| one.text().parse().unwrap()).collect();
    assert_eq!(seen.len(), 495, "{seen:?}");
    for key in 0..3 {
        let of_key: Vec<i64> = seen.iter().copied().filter(|n| n % 3 == key).collect();
        assert!(of_key.is_sorted(), "{of_key:?}");
    }
    let mut dead = world.consumer(&letters);
    let mut dead: Vec<i64> = dead.read_committed().iter().map(|one| one.text().parse().unwrap()).collect();
    dead.sort_unstable();
    assert_eq!(dead, [7, 107, 207, 307, 407]);
}

/// A topic that may not be written to fails every transaction that it is in: its events wait, the others flow.
#[tokio::test(flavor = "multi_thread")]
async fn a_forbidden_topic_stops_nobody_else() {
    let world = World::new("eosforbid").await;
    let good = world.create_topic("good", 2, &[]).await;
    let bad = world.create_topic("bad", 2, &[]).await;
    let config = exactly(&world, &world.config("[{ name: outbox }]", ""), "exactly_once");
    world.install(&config).await;
    world.forbid(&bad, true);
    let relay = world.relay(&config);
    let insert = |topic: &str| {
        format!(
            "INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'k', convert_to('' || i, 'UTF8') \
             FROM generate_series(1, 100) i"
        )
    };
    world.sql(&insert(&bad)).await;
    world.sql(&insert(&good)).await;
    world.until(&format!("SELECT count(*) FROM outbox WHERE topic = '{good}'"), 0).await;
    world.forbid(&bad, false);
    world.until(LEFT, 0).await;
    assert_eq!(relay.stop().0, Some(0));
    for topic in [good, bad] {
        let mut consumer = world.consumer(&topic);
        let seen: Vec<&str> = consumer.read_committed().iter().map(|one| one.text()).collect();
        let all: Vec<String> = (1..=100).map(|n| n.to_string()).collect();
        assert_eq!(seen, all);
    }
}

/// Where positions and source do not belong together the relay stops, and says what to do.
#[tokio::test(flavor = "multi_thread")]
async fn positions_that_are_gone_or_anothers_are_refused() {
    let world = World::new("eosrefuse").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = exactly(&world, &world.config("[{ name: outbox }]", ""), "exactly_once");
    world.install(&config).await;
    let publish = async |n: i64| {
        world.sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', '{n}')")).await;
    };
    let relay = world.relay(&config);
    publish(1).await;
    world.until(LEFT, 0).await;
    assert_eq!(relay.stop().0, Some(0));
    // After a clean stop nothing is in doubt: the same number is another row's.
    world.sql("TRUNCATE outbox RESTART IDENTITY").await;
    publish(2).await;
    let relay = world.relay(&config);
    world.until(LEFT, 0).await;
    assert_eq!(relay.stop().0, Some(0));
    publish(3).await;
    let refused = async |why: &str| {
        let relay = world.relay(&config);
        relay.wait_for(why);
        let status = tokio::task::spawn_blocking(move || relay.ended()).await.unwrap();
        assert_eq!(status.code(), Some(1), "{why}");
        assert_eq!(world.number(LEFT).await, 1, "nothing is published");
    };
    let change = async |what: &str| world.sql(&format!("UPDATE whippet.positions SET {what}")).await;
    change("cluster = 'x' || cluster").await;
    refused("are in Kafka cluster x").await;
    change("cluster = substr(cluster, 2), server = '4' || server").await;
    refused("this is a copy, or it moved").await;
    change("server = substr(server, 2), topic = 'elsewhere'").await;
    refused("are in topic elsewhere").await;
    change(&format!("topic = '{}', counter = counter - 1", world.topic("positions"))).await;
    refused("it was restored from a backup").await;
    change("counter = counter + 1000").await;
    refused("the topic was truncated").await;
    world.delete_topic(&world.topic("positions")).await;
    refused("is gone, so nobody knows").await;
    // The cure.
    world.sql("DELETE FROM whippet.positions").await;
    let relay = world.relay(&config);
    world.until(LEFT, 0).await;
    assert_eq!(relay.stop().0, Some(0));
    assert_eq!(world.consumer(&topic).read_committed().len(), 3);
}

/// Rows from the log: the same through kills.
#[tokio::test(flavor = "multi_thread")]
async fn each_event_of_a_log_is_seen_once_through_kills() {
    let world = World::new("eoslog").await;
    let config = streamed(&world, "{ name: outbox, capture: stream }");
    let mut once = Once::on(world, &config, "exactly_once").await;
    let relay = kills(&once, in_soak(6, 60)).await;
    assert_eq!(once.end(LEFT, relay).await, 0, "repeats");
    drop_slot(&once.world).await;
}

on_both!(each_event_is_seen_once_through_kills_beside);

async fn each_event_is_seen_once_through_kills_beside(server: &str) {
    let world = world_on(server).await;
    let config = world.config("[{ name: outbox }]", "");
    let mut once = Once::on(world, &config, "exactly_once").await;
    let relay = kills(&once, in_soak(4, 60)).await;
    assert_eq!(once.end(LEFT, relay).await, 0, "repeats");
}
