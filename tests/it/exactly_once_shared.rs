//! `kafka.delivery: exactly_once` by several relays at a time: each publishes a share of the table (`kafka.eos_units`), and
//! a reader with isolation.level=read_committed sees each event once, in the order of its key.

use std::time::{Duration, Instant};

use crate::{
    exactly_once::exactly,
    group::{Group, PLAN, TABLE, come_and_go, kill_and_replace_within, stand_still},
    harness::{Relay, SOON, World},
    mysql::{on_both, world as world_on},
};

/// A takeover of producers comes on top of what a group needs.
const WITHIN: Duration = Duration::from_secs(12);

async fn group(world: World, relays: usize, lease: &str) -> Group {
    let config = exactly(&world, &world.config(TABLE, ""), "exactly_once");
    Group::of_config(world, &config, relays, PLAN, lease).await
}

/// All of them publish, and a share that is handed over is fenced by nobody.
#[tokio::test(flavor = "multi_thread")]
async fn relays_share_a_table_and_come_and_go() {
    come_and_go(group(World::new("eosgroup").await, 1, "8s").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_killed_is_replaced_by_those_that_share_with_it() {
    let group = group(World::new("eosgroupkill").await, 3, "2s").await;
    assert_eq!(kill_and_replace_within(group, WITHIN).await, 0, "repeats");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_stands_still_is_fenced_by_those_that_share_with_it() {
    let group = group(World::new("eosgroupstop").await, 2, "2s").await;
    assert_eq!(stand_still(group).await, 0, "repeats");
}

on_both!(relays_share_a_table_through_a_kill_on_both);

async fn relays_share_a_table_through_a_kill_on_both(server: &str) {
    let mut group = group(world_on(server).await, 2, "2s").await;
    group.flows().await;
    for relay in &group.relays {
        assert!(relay.metric("whippet_events_published_total", "") > 100.0, "both publish");
    }
    group.relays.remove(0).kill();
    group.is_fair().await;
    group.flows().await;
    group.join();
    group.is_fair().await;
    assert_eq!(group.end().await, 0, "repeats");
}

/// An outbox, its topic of one partition, and the file of its configuration.
async fn one_table(name: &str) -> (World, String, String) {
    let world = World::new(name).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = exactly(&world, &world.config(TABLE, ""), "exactly_once");
    world.install(&config).await;
    let file = world.write("whippet.yaml", &config);
    (world, topic, file)
}

/// More relays than may work: the others stand by, and one of them inherits.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_above_the_number_of_units_stands_by_and_inherits() {
    let world = World::new("eosunits").await;
    let topic = world.create_topic("events", 6, &[]).await;
    let config = exactly(&world, &world.config(TABLE, ""), "exactly_once");
    let config = config.replace("kafka: {", "kafka: { eos_units: 2,");
    world.install(&config).await;
    let file = world.write("whippet.yaml", &config);
    let shares = async |relay: &Relay, wanted: &[u64]| {
        relay
            .until(|status| {
                let group = status["group"].as_array().unwrap().iter();
                let mut buckets: Vec<u64> = group.map(|member| member["buckets"].as_u64().unwrap()).collect();
                buckets.sort_unstable();
                buckets == wanted
            })
            .await;
    };
    let mut relays = vec![Relay::start(&file)];
    shares(&relays[0], &[64]).await;
    relays.push(Relay::start(&file));
    shares(&relays[0], &[32, 32]).await;
    relays.push(Relay::start(&file));
    relays[2].wait_for("standing by");
    shares(&relays[0], &[0, 32, 32]).await;
    relays.remove(1).kill();
    let heir = relays[1].wait_for("a relay is gone: what it had is this one's");
    assert_eq!(heir["parts"], 33, "{heir}");
    shares(&relays[0], &[32, 32]).await;
    // One that may be alone is refused nothing: it waits until it may work.
    let alone = Relay::start(&world.write("alone.yaml", &config.replace("eos_units: 2", "eos_units: 1")));
    alone.wait_for("standing by");
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'k' || i % 50, convert_to('' || i, 'UTF8') \
             FROM generate_series(1, 1000) i"
        ))
        .await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    for relay in relays {
        assert_eq!(relay.stop().0, Some(0));
    }
    shares(&alone, &[64]).await;
    assert_eq!(alone.stop().0, Some(0));
    let mut consumer = world.consumer(&topic);
    let mut seen: Vec<i64> =
        consumer.read_committed().iter().map(|one| one.text().parse().unwrap()).collect();
    seen.sort_unstable();
    assert_eq!(seen, (1..=1000).collect::<Vec<i64>>());
}

/// How many relays have a half of the table.
const SHARES: &str = "SELECT count(*) FROM (SELECT epoch FROM whippet.parts WHERE part >= 0 GROUP BY epoch HAVING count(*) = 32) s";
const INSERT: &str = "(topic, key, payload) SELECT '{topic}', 'k' || i, convert_to('' || i, 'UTF8')";

/// A relay that has committed and not recorded: another one that does not have the table keeps that for one that has it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_doubt_of_a_table_waits_for_a_relay_that_has_it() {
    let world = World::new("eosstrange").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let both = exactly(&world, &world.config("[{ name: outbox }, { name: other }]", ""), "exactly_once");
    let one = world.write("one.yaml", &both.replace(", { name: other }", ""));
    world.install(&both).await;
    let both = world.write("both.yaml", &both);
    let insert = INSERT.replace("{topic}", &topic);
    // The first commit is that of the takeover.
    let dies = Relay::start_with(&both, &[("FAILPOINTS", "eos-committed=1*off->return")]);
    world.sql(&format!("INSERT INTO other {insert} FROM generate_series(1, 5) i")).await;
    tokio::task::spawn_blocking(move || dies.ended()).await.unwrap();
    let heir = Relay::start(&one);
    heir.wait_for("of tables that this relay does not have");
    let last = Relay::start(&both);
    last.wait_for("this relay is the one producer");
    world.sql(&format!("INSERT INTO outbox {insert} FROM generate_series(6, 10) i")).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let held = "SELECT count(*) FROM whippet.parts WHERE part >= 0 AND epoch = (SELECT min(epoch) FROM whippet.members)";
    assert_eq!(world.number(held).await, 64, "nothing is let go");
    assert_eq!(world.number("SELECT count(*) FROM other").await, 5);
    assert_eq!(heir.stop().0, Some(0));
    world.until("SELECT count(*) FROM other", 0).await;
    assert_eq!(last.stop().0, Some(0));
    assert_eq!(numbers(&world, &topic), (1..=10).collect::<Vec<i64>>());
}

/// Two that share the work: the one that wakes up in its commit was fenced by the other, which works under ids of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_wakes_up_in_its_commit_was_fenced_by_one_that_shares_with_it() {
    let (world, topic, file) = one_table("eoswakes").await;
    let heir = Relay::start(&file);
    heir.wait_for("this relay owns the source");
    // It has not written its position, which others would wait for. The takeover's comes first.
    let zombie = Relay::start_with(&file, &[("FAILPOINTS", "eos-before-position=1*off->1*sleep(6000)->off")]);
    world.until(SHARES, 2).await;
    let insert = INSERT.replace("{topic}", &topic);
    world.sql(&format!("INSERT INTO outbox {insert} FROM generate_series(1, 200) i")).await;
    // It is in its commit when that is counted.
    let deadline = Instant::now() + SOON;
    while zombie.metric("whippet_transaction_events_count", "") < 1.0 {
        assert!(Instant::now() < deadline, "{}", zombie.log());
        world.pause().await;
    }
    zombie.signal("STOP");
    world.until("SELECT count(*) FROM outbox", 0).await;
    zombie.signal("CONT");
    zombie.wait_for("another producer of this unit has fenced this relay's");
    world.until(SHARES, 2).await;
    for relay in [heir, zombie] {
        assert_eq!(relay.stop().0, Some(0));
    }
    assert_eq!(numbers(&world, &topic), (1..=200).collect::<Vec<i64>>());
}

/// It inherits, stands still before it fences anybody, and goes on when all that it had is another two relays': it may cost
/// them a takeover, and what is in doubt of theirs stays so.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_wakes_up_in_its_takeover_looks_again_whose_the_slots_are() {
    let world = World::new("eoslooks").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = exactly(&world, &world.config(WITH_OTHER, ""), "exactly_once");
    world.install(&config).await;
    let file = world.write("whippet.yaml", &config);
    // The first takeover is that of its start.
    let stands_still = ("FAILPOINTS", "eos-fencing=1*off->1*sleep(2000)->off");
    let late = Relay::start_with(&file, &[stands_still, ("WHIPPET__LOG__LEVEL", "debug")]);
    late.wait_for("this relay is the one producer");
    let dies = Relay::start(&file);
    world.until(SHARES, 2).await;
    dies.kill();
    late.wait_for(r#""others":"[\"whippet"#);
    late.signal("STOP");
    let heir = Relay::start(&file);
    // Slot 1, which the one that stands still had inherited, is free, and is the next one's.
    let free = "SELECT count(*) FROM whippet.parts WHERE part = -3 AND epoch IS NULL";
    world.until(free, 1).await;
    let both = [heir, Relay::start(&file)];
    world.until(&format!("{SHARES} WHERE epoch > 2"), 2).await;
    world.until(free, 0).await;
    world.sql(REFUSE).await;
    let insert = INSERT.replace("{topic}", &topic);
    world.sql(&format!("INSERT INTO other {insert} FROM generate_series(1, 200) i")).await;
    world.consumer(&topic).read(200);
    late.signal("CONT");
    // Under another membership: what it was about has ended.
    late.wait_for_nth("this relay is the one producer", 2);
    let (mut last, deadline) = (200, Instant::now() + SOON);
    for relay in &both {
        // Who is fenced hears of it with its next transaction.
        while relay.metric("whippet_unit_fenced_total", "") < 1.0 {
            assert!(Instant::now() < deadline, "{}", late.log());
            let next = last + 20;
            world
                .sql(&format!("INSERT INTO outbox {insert} FROM generate_series({}, {next}) i", last + 1))
                .await;
            last = next;
            world.pause().await;
        }
    }
    world.sql("DROP TRIGGER refuse ON other").await;
    world.until("SELECT (SELECT count(*) FROM outbox) + (SELECT count(*) FROM other)", 0).await;
    for relay in both.into_iter().chain([late]) {
        assert_eq!(relay.stop().0, Some(0));
    }
    assert_eq!(numbers(&world, &topic), (1..=last).collect::<Vec<i64>>());
}

const WITH_OTHER: &str = "[{ name: outbox }, { name: other, retry: { initial: 50ms, max: 200ms } }]";
/// Nothing of the other table can be recorded.
const REFUSE: &str = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$; \
                      CREATE TRIGGER refuse BEFORE DELETE ON other FOR EACH ROW EXECUTE FUNCTION refuse()";

/// What is published and cannot be recorded is in doubt after a crash, too. Others are not stopped by that, and work is let go
/// when it is settled.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_cannot_be_recorded_stops_no_other_after_a_crash() {
    let world = World::new("eosbroken").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = exactly(&world, &world.config(WITH_OTHER, ""), "exactly_once");
    world.install(&config).await;
    let file = world.write("whippet.yaml", &config);
    world.sql(REFUSE).await;
    let first = Relay::start(&file);
    let insert = INSERT.replace("{topic}", &topic);
    world.sql(&format!("INSERT INTO other {insert} FROM generate_series(1, 5) i")).await;
    world.consumer(&topic).read(5);
    first.kill();
    let both = [Relay::start(&file), Relay::start(&file)];
    for relay in &both {
        relay.wait_for("this relay is the one producer");
    }
    world.sql(&format!("INSERT INTO outbox {insert} FROM generate_series(6, 60) i")).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(world.number("SELECT count(*) FROM other").await, 5);
    let most = "SELECT max(n) FROM (SELECT count(*) n FROM whippet.parts WHERE part >= 0 GROUP BY epoch) s";
    assert_eq!(world.number(most).await, 64, "nothing is let go");
    world.sql("DROP TRIGGER refuse ON other").await;
    world.until("SELECT count(*) FROM other", 0).await;
    world.until(most, 32).await;
    for relay in both {
        assert_eq!(relay.stop().0, Some(0));
    }
    assert_eq!(numbers(&world, &topic), (1..=60).collect::<Vec<i64>>());
}

/// After a crash an operator empties the table that knows who had which slot, and fewer relays are to work. Those that
/// begin at once do not share what is in doubt.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_where_nobody_knows_whose_it_was_is_settled_by_one() {
    for units in [4, 1] {
        let (world, topic, file) = one_table("eosemptied").await;
        let first = Relay::start(&file);
        first.wait_for("this relay owns the source");
        let dies = Relay::start_with(&file, &[("FAILPOINTS", "eos-committed=1*off->return")]);
        world.until(SHARES, 2).await;
        let insert = INSERT.replace("{topic}", &topic);
        world.sql(&format!("INSERT INTO outbox {insert} FROM generate_series(1, 200) i")).await;
        tokio::task::spawn_blocking(move || dies.ended()).await.unwrap();
        first.kill();
        world.sql("DELETE FROM whippet.parts; DELETE FROM whippet.members").await;
        let config = std::fs::read_to_string(&file).unwrap();
        let config = config.replace("kafka: {", &format!("kafka: {{ eos_units: {units},"));
        let file = world.write("again.yaml", &config);
        // Both are there before either reads, and the second one is later to know what is published.
        let both = ["1000", "3000"].map(|ms| {
            let slowly = format!("eos-half-initialised=1*sleep({ms})->off");
            Relay::start_with(&file, &[("FAILPOINTS", &slowly)])
        });
        world.until("SELECT count(*) FROM outbox", 0).await;
        for relay in both {
            assert_eq!(relay.stop().0, Some(0));
        }
        assert_eq!(numbers(&world, &topic), (1..=200).collect::<Vec<i64>>(), "with {units} units");
    }
}

/// What a reader of committed records sees.
fn numbers(world: &World, topic: &str) -> Vec<i64> {
    let mut consumer = world.consumer(topic);
    let mut seen: Vec<i64> =
        consumer.read_committed().iter().map(|one| one.text().parse().unwrap()).collect();
    seen.sort_unstable();
    seen
}
