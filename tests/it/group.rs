//! Several relays on one source: they share its tables by key, take over from one another, and keep each
//! key's order.

use std::time::{Duration, Instant};

use crate::{
    harness::{Relay, World, kafka, service, services},
    load::{Load, Plan},
    mysql::{on_both, world},
    proxy::Proxy,
};

pub const TABLE: &str = "[{ name: outbox }]";
pub const PLAN: Plan = Plan { writers: 6, keys: 500, rows: u64::MAX, pause_ms: 40, poison: None };

const POISONED: Plan = Plan { poison: Some(100), keys: 200, ..PLAN };

/// A world with a group in it, and writers beside.
pub struct Group {
    pub world: World,
    topic: String,
    file: String,
    load: Load,
    pub relays: Vec<Relay>,
    /// How often a lease was not renewed in time, in the end.
    lost: usize,
}

impl Group {
    async fn of(name: &str, relays: usize, plan: Plan) -> Group {
        Group::with(World::new(name).await, relays, plan, "2s").await
    }

    async fn with(world: World, relays: usize, plan: Plan, lease: &str) -> Group {
        let config = world.config(TABLE, "");
        Group::of_config(world, &config, relays, plan, lease).await
    }

    pub async fn of_config(world: World, config: &str, relays: usize, plan: Plan, lease: &str) -> Group {
        let topic = world.create_topic("events", 6, &[]).await;
        let config = config.replace("lease: 2s", &format!("lease: {lease}"));
        world.install(&config).await;
        let seed = fastrand::u64(..1_000_000) * plan.writers;
        let load = Load::start(&world, &topic, plan, seed).await;
        let file = world.write("whippet.yaml", &config);
        let mut group = Group { world, topic, file, load, relays: Vec::new(), lost: 0 };
        for _ in 0..relays {
            group.join();
        }
        group.is_fair().await;
        group
    }

    /// The name of one of the relay's own tables.
    fn own(&self, name: &str) -> String {
        let between = if self.world.url.starts_with("mysql") { '_' } else { '.' };
        format!("whippet{between}{name}")
    }

    pub fn join(&mut self) {
        self.relays.push(Relay::start(&self.file));
    }

    /// Every bucket has an owner, nobody has more than a fair share, and all say so.
    pub async fn is_fair(&self) {
        let count = self.relays.len();
        let fair = |buckets: u64| (64 / count as u64..=64_u64.div_ceil(count as u64)).contains(&buckets);
        for relay in &self.relays {
            relay
                .until(|status| {
                    let group = status["group"].as_array().unwrap();
                    let buckets = group.iter().map(|member| member["buckets"].as_u64().unwrap());
                    group.len() == count && buckets.clone().all(fair) && buckets.sum::<u64>() == 64
                })
                .await;
        }
    }

    /// So much more is published, by whoever does it.
    pub async fn flows(&self) {
        let more = self.load.written() as i64 + 1_500;
        let deadline = Instant::now() + Duration::from_mins(1);
        while (self.load.written() as i64) < more {
            assert!(Instant::now() < deadline);
            self.world.pause().await;
        }
        let all = "SELECT coalesce(max(seq), 0) FROM outbox";
        let reached = self.world.number(all).await;
        let left = format!("SELECT count(*) FROM outbox WHERE seq <= {reached}");
        self.world.until_within(&left, 0, Duration::from_mins(1)).await;
    }

    /// The writers end, everything is published, and the checker looks at all of it. Returns the repeats.
    pub async fn end(mut self) -> usize {
        self.load.stop();
        self.load.ended().await;
        self.world.until_within("SELECT count(*) FROM outbox", 0, Duration::from_mins(1)).await;
        for relay in self.relays.drain(..) {
            let (code, log) = relay.stop();
            assert_eq!(code, Some(0), "{log}");
            self.lost += log.matches("lease is lost").count();
        }
        let (verdict, _) = self.load.check(&self.world);
        assert!(verdict.pairs > 1_000, "{verdict:?}");
        let members = format!("SELECT count(*) FROM {}", self.own("members"));
        assert_eq!(self.world.number(&members).await, 0);
        eprintln!("{} repeats, {} leases lost", verdict.repeats, self.lost);
        verdict.repeats
    }
}

/// A clean hand-over repeats nothing: a bucket is let go when nothing of it is in flight.
#[tokio::test(flavor = "multi_thread")]
async fn relays_come_and_go_and_nothing_is_repeated() {
    // Long enough for a machine that is busy.
    come_and_go(Group::with(World::new("group").await, 1, PLAN, "8s").await).await;
}

pub async fn come_and_go(mut group: Group) {
    for _ in 0..2 {
        group.join();
        group.is_fair().await;
        group.flows().await;
    }
    let work = |relay: &Relay| relay.metric("whippet_events_published_total", "");
    for relay in &group.relays {
        assert!(work(relay) > 100.0, "all of them publish: {}", work(relay));
        assert!(relay.metric("whippet_leases_held", "outbox") >= 0.0);
    }
    let moved: f64 = group.relays.iter().map(|relay| relay.metric("whippet_leases_moved_total", "")).sum();
    // 64 at first, 32 let go and taken, then 21 and 22 of the two.
    assert!(moved <= 64.0 + 2.0 * 32.0 + 2.0 * 22.0 + 4.0, "{moved} buckets moved");
    // The one that works on what is not shared, too.
    for _ in 0..2 {
        let (code, log) = group.relays.remove(0).stop();
        assert_eq!(code, Some(0), "{log}");
        group.is_fair().await;
        group.flows().await;
    }
    assert_eq!(group.end().await, 0, "no hand-over was anything but clean");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_killed_is_replaced_and_nothing_overtakes() {
    kill_and_replace(Group::of("groupkill", 3, PLAN).await).await;
}

async fn kill_and_replace(group: Group) {
    let repeats = kill_and_replace_within(group, Duration::from_secs(6)).await;
    assert!(repeats < 3 * 20_000, "{repeats}");
}

/// Returns how many were repeated.
pub async fn kill_and_replace_within(mut group: Group, at_most: Duration) -> usize {
    let mut takeovers = Vec::new();
    for _ in 0..3 {
        group.flows().await;
        let victim = fastrand::usize(..group.relays.len());
        group.relays.remove(victim).kill();
        let killed = Instant::now();
        group.is_fair().await;
        takeovers.push(killed.elapsed());
        group.join();
        group.is_fair().await;
    }
    eprintln!("fair shares again after a kill, with a lease of 2 s: {takeovers:?}");
    assert!(takeovers.iter().all(|took| *took < at_most), "{takeovers:?}");
    group.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_relays_share_a_table_through_kills_and_joins() {
    let mut group = Group::of("groupeight", 8, PLAN).await;
    for _ in 0..4 {
        for _ in 0..2 {
            let victim = fastrand::usize(..group.relays.len());
            group.relays.remove(victim).kill();
        }
        group.join();
        group.join();
        group.flows().await;
    }
    group.is_fair().await;
    group.end().await;
}

/// An owner that stands still beyond its lease may repeat what it had in its hands; it overtakes nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_stands_still_is_replaced_and_comes_back() {
    stand_still(Group::of("groupstop", 2, PLAN).await).await;
}

/// Returns how many were repeated.
pub async fn stand_still(mut group: Group) -> usize {
    for round in 0..2 {
        group.flows().await;
        let stopped = group.relays.remove(round % 2);
        stopped.signal("STOP");
        group.is_fair().await;
        group.flows().await;
        stopped.signal("CONT");
        group.relays.insert(round % 2, stopped);
        group.is_fair().await;
    }
    let lost = group.relays.iter().map(|relay| relay.metric("whippet_memberships_lost_total", "") as i64);
    let lost: Vec<i64> = lost.collect();
    assert!(lost.iter().all(|times| *times >= 1), "each stood still once: {lost:?}");
    // Who has lost one has a new one, and nobody else has.
    group
        .world
        .until(&format!("SELECT max(epoch) FROM {}", group.own("members")), 2 + lost.iter().sum::<i64>())
        .await;
    group.end().await
}

/// Leases are by the database's clock and by monotonic ones: clock.c makes two hosts' time of day wrong.
#[tokio::test(flavor = "multi_thread")]
async fn hosts_whose_clocks_are_wrong_by_minutes_share_and_take_over_as_others_do() {
    let mut group = Group::of("groupclock", 1, PLAN).await;
    let library = group.world.compile("clock.c");
    let starts = |wrong_by: i64| {
        let environment = [("LD_PRELOAD", &*library), ("CLOCK_WRONG_BY", &wrong_by.to_string())];
        let relay = Relay::start_with(&group.file, &environment);
        let open = relay.wait_for("admin address is open");
        let said = chrono::DateTime::parse_from_rfc3339(open["timestamp"].as_str().unwrap()).unwrap();
        let off = said.signed_duration_since(chrono::Utc::now()).num_seconds() - wrong_by;
        assert!(off.abs() < 60, "its clock is wrong by {wrong_by} s: {open}");
        relay
    };
    let (ahead, behind) = (starts(420), starts(-420));
    group.relays.extend([ahead, behind]);
    group.is_fair().await;
    group.flows().await;
    // Each of them has to notice that one of the others is gone, and none that one is who is there.
    for _ in 0..2 {
        group.relays.remove(0).kill();
        let killed = Instant::now();
        group.is_fair().await;
        assert!(killed.elapsed() < Duration::from_secs(6), "{:?}", killed.elapsed());
        group.flows().await;
    }
    group.end().await;
}

/// The database is out of reach for one of them only.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_cannot_reach_the_database_is_replaced_and_comes_back() {
    let mut group = Group::of("groupcut", 1, PLAN).await;
    let proxy = Proxy::postgres();
    let port = service("WHIPPET_TEST_PG_PROXIED_PORT");
    let (_, name) = group.world.url.rsplit_once('/').unwrap();
    let url = format!("postgres://postgres@127.0.0.1:{port}/{name}");
    let config = group.world.config_for(&url, &kafka(), TABLE, "");
    let file = group.world.write("proxied.yaml", &config);
    group.relays.push(Relay::start(&file));
    group.is_fair().await;
    for _ in 0..3 {
        group.flows().await;
        proxy.blackhole();
        let cut = group.relays.pop().unwrap();
        group.is_fair().await;
        group.flows().await;
        proxy.heal();
        group.relays.push(cut);
        group.is_fair().await;
    }
    group.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker_and_the_database_restart_under_a_group() {
    let group = Group::of("grouprestart", 3, PLAN).await;
    group.flows().await;
    tokio::task::spawn_blocking(|| services("restart", "kafka")).await.unwrap();
    group.flows().await;
    tokio::task::spawn_blocking(|| services("restart", "postgres")).await.unwrap();
    group.flows().await;
    group.is_fair().await;
    group.end().await;
}

/// What is parked, by whom and where it is released are three relays.
#[tokio::test(flavor = "multi_thread")]
async fn a_verb_by_way_of_any_member_reaches_the_owner_of_the_key() {
    verbs(Group::of("groupverbs", 3, POISONED).await).await;
}

async fn verbs(mut group: Group) {
    let holds = group.own("holds");
    let parked = format!("SELECT count(*) FROM (SELECT 1 FROM {holds} LIMIT 31) some_of_them");
    group.world.until(&parked, 31).await;
    group.load.stop();
    group.load.ended().await;
    let unheld = format!("SELECT count(*) - (SELECT count(*) FROM {holds}) FROM outbox");
    group.world.until(&unheld, 0).await;
    let key_column = if group.world.url.starts_with("mysql") { "`key`" } else { "key" };
    // By way of one, while its owner may be another; and again while members come and go.
    for (round, key) in ["key-1", "key-2", "key-3", "key-4", "key-5"].iter().enumerate() {
        let relay = &group.relays[round % 3];
        group.world.sql(&format!("UPDATE outbox SET headers = NULL WHERE {key_column} = '{key}'")).await;
        relay.operate(&group.world, &["redrive", "--key", key]);
        group.world.until(&format!("SELECT count(*) FROM outbox WHERE {key_column} = '{key}'"), 0).await;
    }
    group.relays.remove(0).kill();
    group.load.go_on();
    group.world.sql("UPDATE outbox SET headers = NULL").await;
    group.relays[0].operate(&group.world, &["redrive", "--all"]);
    group.world.until(&parked, 31).await;
    group.load.stop();
    group.load.ended().await;
    group.world.until(&unheld, 0).await;
    for relay in &group.relays {
        // What is paused by way of one is paused at all.
        relay.operate(&group.world, &["pause", "--topic", &group.topic]);
    }
    group.relays[1].operate(&group.world, &["resume", "--topic", &group.topic]);
    group.world.sql("UPDATE outbox SET headers = NULL").await;
    group.relays[1].operate(&group.world, &["redrive", "--all"]);
    group.end().await;
}

/// A relay of the version before knows of one lease only: while it works, nobody else does, and the other way
/// round.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_of_the_version_before_is_waited_for() {
    let world = World::new("groupolder").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config(TABLE, "");
    world.install(&config).await;
    world
        .sql(
            "INSERT INTO whippet.leases VALUES ('source', 'older', 7, clock_timestamp() + interval '1 hour')",
        )
        .await;
    let relay = world.relay(&config);
    relay.wait_for("a relay of an older version owns the source");
    world.sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', '1')")).await;
    assert_eq!(relay.get("/readyz").0, 200);
    world.sql("UPDATE whippet.leases SET expires_at = clock_timestamp()").await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    // Now the older one finds it taken, under another number than its own.
    let taken = "SELECT count(*) FROM whippet.leases WHERE name = 'source' AND epoch = 8 AND owner <> 'older' \
                 AND expires_at > clock_timestamp()";
    world.until(taken, 1).await;
    world.consumer(&topic).read(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_with_another_number_of_buckets_is_refused() {
    let world = World::new("groupbuckets").await;
    let config = world.config(TABLE, "");
    world.install(&config).await;
    let first = world.relay(&config);
    first.wait_for("this relay owns the source");
    let other = world.config(TABLE, "").replace("lease: 2s", "lease: 2s, buckets: 16");
    let second = Relay::start(&world.write("other.yaml", &other));
    second.wait_for("replicas.buckets says 16: set it to 64");
    assert_eq!(first.status()["group"].as_array().unwrap().len(), 1);
}

/// Two applications on one database: each would leave half of the other's rows lying.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_of_another_application_is_refused() {
    let world = World::new("groupother").await;
    let config = world.config(TABLE, "");
    world.install(&config).await;
    let first = world.relay(&config);
    first.wait_for("this relay owns the source");
    let second = Relay::start(&world.write("other.yaml", &world.config("[{ name: elsewhere }]", "")));
    second.wait_for("relays of another application need a source.relay_schema of their own");
    assert_eq!(first.status()["group"].as_array().unwrap().len(), 1);
}

on_both!(
    relays_come_and_go_on_both_and_nothing_is_repeated,
    a_member_that_is_killed_on_both_is_replaced,
    a_verb_by_way_of_any_member_on_both,
);

async fn relays_come_and_go_on_both_and_nothing_is_repeated(server: &str) {
    come_and_go(Group::with(world(server).await, 1, PLAN, "8s").await).await;
}

async fn a_member_that_is_killed_on_both_is_replaced(server: &str) {
    kill_and_replace(Group::with(world(server).await, 3, PLAN, "2s").await).await;
}

async fn a_verb_by_way_of_any_member_on_both(server: &str) {
    verbs(Group::with(world(server).await, 3, POISONED, "2s").await).await;
}

/// No statement of the relay needs the connection that the one before had.
#[tokio::test(flavor = "multi_thread")]
async fn relays_work_behind_a_pooler_of_transactions() {
    services("up", "pgbouncer");
    let world = World::new("grouppool").await;
    let url = format!("{}/{}", service("WHIPPET_TEST_PGBOUNCER"), world.name);
    let config = world.config_for(&url, &kafka(), TABLE, "");
    kill_and_replace(Group::of_config(world, &config, 3, PLAN, "2s").await).await;
    services("down", "pgbouncer");
}
