//! `kafka.delivery: exactly_once`: a reader with isolation.level=read_committed sees each event once, in order,
//! whatever dies. The same loads with at_least_once have to repeat some, or nothing is proven.

use std::time::{Duration, Instant};

use crate::{
    harness::{Relay, World, in_soak},
    load::{Load, Plan},
    mysql::{on_both, world as world_on},
    mysql_stream::streamed as streamed_beside,
    stream::{drop_slot, streamed},
};

pub const PLAN: Plan = Plan { writers: 4, keys: 300, rows: u64::MAX, pause_ms: 20, poison: None };

/// Where a relay dies: around begin, produce, position, commit and record.
pub const FAILPOINTS: [&str; 10] = [
    "eos-fencing",
    "eos-half-initialised",
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
pub struct Once {
    pub world: World,
    pub file: String,
    pub load: Load,
}

impl Once {
    async fn new(name: &str, tables: &str, delivery: &str) -> Once {
        let world = World::new(name).await;
        let config = world.config(tables, "");
        Once::on(world, &config, delivery).await
    }

    pub async fn on(world: World, config: &str, delivery: &str) -> Once {
        Once::with(world, config, delivery, PLAN).await
    }

    pub async fn with(world: World, config: &str, delivery: &str, plan: Plan) -> Once {
        let topic = world.create_topic("events", 6, &[]).await;
        let config = exactly(&world, config, delivery);
        world.install(&config).await;
        let seed = fastrand::u64(..1_000_000) * plan.writers;
        let load = Load::start(&world, &topic, plan, seed).await;
        let file = world.write("whippet.yaml", &config);
        Once { world, file, load }
    }

    /// The writers end, everything is recorded, and the checker looks at all of it. Returns the repeats.
    pub async fn end(&mut self, left: &str, relay: Relay) -> usize {
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
pub fn exactly(world: &World, config: &str, delivery: &str) -> String {
    let kafka = format!("kafka: {{ delivery: {delivery}, position_topic: '{}',", world.topic("positions"));
    config.replace("kafka: {", &kafka)
}

/// A table whose events go to one partition, each once, by one relay at a time.
pub async fn one_table(name: &str) -> (World, String, String) {
    let world = World::new(name).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = exactly(&world, &world.config("[{ name: outbox }]", ""), "exactly_once");
    let config = config.replace("kafka: {", "kafka: { eos_units: 1,");
    world.install(&config).await;
    (world, topic, config)
}

pub const LEFT: &str = "SELECT count(*) FROM outbox";

/// Kills a relay again and again: at one of the failpoints, or at random. Returns the last one, which lives.
async fn kills(once: &Once, kills: u32) -> Relay {
    let mut random = fastrand::Rng::new();
    let first = random.u32(..);
    for kill in 0..kills {
        let began = Instant::now();
        let at = FAILPOINTS[first.wrapping_add(kill) as usize % FAILPOINTS.len()];
        if kill % 3 == 2 {
            let relay = Relay::start(&once.file);
            tokio::time::sleep(Duration::from_millis(random.u64(300..2_500))).await;
            relay.kill();
            continue;
        }
        // Not at once, or nothing would ever be published.
        let skip = match at {
            "sent" => random.u32(0..2_000),
            "eos-fencing" | "eos-half-initialised" | "eos-initialised" => 0,
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

/// What the test above would say if it did not prove anything, of any source.
async fn repeats_at_least_once(world: World, config: &str, plan: Plan) {
    let mut once = Once::with(world, config, "at_least_once", plan).await;
    let relay = Relay::start_with(&once.file, &[("FAILPOINTS", "acknowledged=3*off->return")]);
    tokio::task::spawn_blocking(move || relay.ended()).await.unwrap();
    let relay = Relay::start(&once.file);
    // It died soon: the checker is to have something to look at.
    let deadline = Instant::now() + Duration::from_mins(1);
    while once.load.written() < 500 {
        assert!(Instant::now() < deadline, "{} rows were written", once.load.written());
        once.world.pause().await;
    }
    assert!(once.end(LEFT, relay).await > 0, "the checker finds no repeats where there must be some");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_kills_repeat_events_that_are_delivered_at_least_once() {
    let world = World::new("eosnot").await;
    let config = world.config("[{ name: outbox }]", "");
    repeats_at_least_once(world, &config, PLAN).await;
}

/// What is written now is published.
pub async fn flows(once: &Once, left: &str) {
    let all = once.world.number("SELECT coalesce(max(seq), 0) FROM outbox").await;
    let joined = if left.contains("WHERE") { "AND" } else { "WHERE" };
    once.world.until_within(&format!("{left} {joined} seq <= {all}"), 0, Duration::from_mins(1)).await;
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
    relay.wait_for("kafka topic can be written to");
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
    let (world, topic, config) = one_table("eosrefuse").await;
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
    let change =
        async |what: &str| world.sql(&format!("UPDATE whippet.positions SET {what} WHERE counter > 0")).await;
    change("cluster = 'x' || cluster").await;
    refused("are in Kafka cluster x").await;
    change("cluster = substr(cluster, 2), server = '4' || server").await;
    refused("this is a copy, or it moved").await;
    change("server = substr(server, 2), topic = 'elsewhere'").await;
    refused("are in topic elsewhere").await;
    change(&format!("topic = '{}', counter = 1", world.topic("positions"))).await;
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

on_both!(
    each_event_is_seen_once_through_kills_beside,
    each_event_of_a_binlog_is_seen_once_through_kills,
    a_binlog_at_least_once_repeats_events,
);

async fn each_event_is_seen_once_through_kills_beside(server: &str) {
    let world = world_on(server).await;
    let config = world.config("[{ name: outbox }]", "");
    let mut once = Once::on(world, &config, "exactly_once").await;
    let relay = kills(&once, in_soak(4, 60)).await;
    assert_eq!(once.end(LEFT, relay).await, 0, "repeats");
}

async fn each_event_of_a_binlog_is_seen_once_through_kills(server: &str) {
    let world = world_on(server).await;
    let config = streamed_beside(&world, "{ name: outbox, capture: stream }");
    let mut once = Once::on(world, &config, "exactly_once").await;
    let relay = kills(&once, in_soak(5, 60)).await;
    relay.until_status("/tables/0/capture_reason", "the log is read").await;
    assert_eq!(once.end(LEFT, relay).await, 0, "repeats");
}

async fn a_binlog_at_least_once_repeats_events(server: &str) {
    let world = world_on(server).await;
    let config = streamed_beside(&world, "{ name: outbox, capture: stream }");
    repeats_at_least_once(world, &config, PLAN).await;
}

/// A file that the writer and the relay share, one at a time.
const FILE_PLAN: Plan = Plan { writers: 1, keys: 5, pause_ms: 2, ..PLAN };

async fn world_of_a_file(name: &str) -> (tempfile::TempDir, World) {
    let folder = tempfile::tempdir().unwrap();
    let world = World::on(&format!("sqlite://{}", folder.path().display()), name).await;
    world.sql("PRAGMA journal_mode = WAL").await;
    (folder, world)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_of_a_file_is_seen_once_through_kills() {
    let (_folder, world) = world_of_a_file("eosfile").await;
    let config = world.config("[{ name: outbox }]", "");
    let mut once = Once::with(world, &config, "exactly_once", FILE_PLAN).await;
    let relay = kills(&once, in_soak(5, 60)).await;
    assert_eq!(once.end(LEFT, relay).await, 0, "repeats");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_at_least_once_repeats_events() {
    let (_folder, world) = world_of_a_file("eosfilenot").await;
    let config = world.config("[{ name: outbox }]", "");
    repeats_at_least_once(world, &config, FILE_PLAN).await;
}
