//! What waits long, or works long, in the database costs no lease, and the verbs of an operator do not grow with the
//! square of what is held.

use std::time::{Duration, Instant};

use crate::{
    db::Session,
    harness::{Relay, World, at_once, service},
};

const SERVERS: [&str; 3] = ["WHIPPET_TEST_PG", "WHIPPET_TEST_MARIADB", "WHIPPET_TEST_MYSQL"];

/// On each of the servers whose rows have locks, at once: they mostly wait.
fn on_each<F: Future<Output = ()>>(test: impl Fn(World) -> F + Sync) {
    at_once(SERVERS, async |server| test(World::on(&service(server), "waits").await).await);
}

#[test]
fn verbs_for_one_key_among_very_many_held_events_are_quick() {
    on_each(are_quick);
}

#[tokio::test(flavor = "multi_thread")]
async fn verbs_for_one_key_are_quick_on_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    are_quick(World::on(&format!("sqlite://{}", folder.path().display()), "waits").await).await;
}

#[test]
fn rows_that_the_application_has_locked_cost_no_lease() {
    on_each(locked_rows);
}

#[test]
fn a_long_verb_of_another_relay_costs_no_lease() {
    on_each(long_verb);
}

#[test]
fn a_relay_that_stands_still_in_a_transaction_costs_the_others_nothing() {
    on_each(stands_still);
}

/// Four relays and three servers share the processors: a lease that they can keep, and longer than it.
const LEASE: &str = "lease: 4s";
/// In seconds.
const LONG: i64 = 6;

fn config(world: &World) -> String {
    world.config("[{ name: outbox }]", "").replace("lease: 2s", LEASE)
}

fn is_mysql(world: &World) -> bool {
    world.url.starts_with("mysql")
}

/// The name of one of the relay's own tables.
fn own(world: &World, name: &str) -> String {
    format!("whippet{}{name}", if world.url.starts_with("postgres") { '.' } else { '_' })
}

/// Until the relay has renewed its lease for long enough to have lost it: the last moment that one is good until is so
/// much later.
async fn until_a_lease_would_be_lost(world: &World) {
    let seconds = match is_mysql(world) {
        true => "TIMESTAMPDIFF(SECOND, '2000-01-01', max(expires_at))",
        false => "extract(epoch FROM max(expires_at))::bigint",
    };
    let expires = format!("SELECT {seconds} AS expires FROM {}", own(world, "members"));
    let began = world.number(&expires).await;
    world.until(&format!("SELECT count(*) FROM ({expires}) m WHERE m.expires >= {began} + {LONG}"), 1).await;
}

/// 200 keys of 100 events each: the first is bad, the others are behind it.
async fn hold_20_000(world: &World) {
    let session = Session::open(&world.url).await.unwrap();
    let key = if is_mysql(world) { "`key`" } else { "key" };
    let into = format!(
        "INSERT INTO {} (table_name, place, event_id, topic, {key}, state, cause, reason, attempts) VALUES ",
        own(world, "holds")
    );
    for hundred in 0..200 {
        let rows: Vec<String> = (0..100)
            .map(|nth| {
                let (number, cause) = (nth * 200 + hundred, if nth == 0 { "invalid" } else { "behind" });
                let key = session.bytes(format!("key-{hundred}").as_bytes());
                format!(
                    "('outbox', '{number}', 'id-{number}', 'events', {key}, 'parked', '{cause}', 'bad', 1)"
                )
            })
            .collect();
        world.sql(&format!("{into}{}", rows.join(","))).await;
    }
}

async fn are_quick(world: World) {
    let config = config(&world);
    world.install(&config).await;
    let relay = world.relay(&config);
    relay.until_status("/role", "owner").await;
    hold_20_000(&world).await;
    let held = format!("SELECT count(*) FROM {}", own(&world, "holds"));
    for (verb, events, left) in [
        (&["redrive", "--key", "key-7"][..], 100, 19_900),
        (&["skip", "--key", "key-8", "--reason", "test"], 100, 19_800),
        // The others of its key wait for nothing any more.
        (&["skip", "--id", "id-9", "--reason", "test"], 1, 19_700),
        (&["redrive", "--all"], 19_700, 0),
    ] {
        let began = Instant::now();
        let done = relay.operate(&world, verb);
        let took = began.elapsed();
        assert_eq!(done["events"], events, "{verb:?}: {done}");
        assert_eq!(world.number(&held).await, left, "{verb:?}");
        // By the square it was minutes.
        assert!(took < Duration::from_secs(8), "{verb:?} took {took:?}");
    }
    assert_eq!(relay.metric("whippet_memberships_lost_total", ""), 0.0);
}

/// It has lost no lease, to its end.
fn has_owned_all_along(relay: Relay) {
    assert_eq!(relay.metric("whippet_memberships_lost_total", ""), 0.0);
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("lease is lost"), "{log}");
}

/// What is to be held waits until the verb has ended, which may have released its key.
async fn long_verb(world: World) {
    let topic = world.create_topic("events", 1, &[]).await;
    let config = config(&world);
    world.install(&config).await;
    let relay = world.relay(&config);
    relay.until_status("/role", "owner").await;
    relay.until_status("/tables/0/state", "running").await;
    let mut other = Session::open(&world.url).await.unwrap();
    other.run("BEGIN").await.unwrap();
    other.run(&format!("UPDATE {} SET version = version + 1", own(&world, "gates"))).await.unwrap();
    let key = if is_mysql(&world) { "`key`" } else { "key" };
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, {key}, payload, headers) VALUES ('{topic}', 'k', '1', '[7]')"
        ))
        .await;
    until_a_lease_would_be_lost(&world).await;
    other.run("COMMIT").await.unwrap();
    relay.until_status("/tables/0/parked_events", 1).await;
    has_owned_all_along(relay);
}

/// What is published cannot be recorded while the application has its rows locked. Were the lease lost meanwhile, all of
/// it would be published again.
async fn locked_rows(world: World) {
    let topic = world.create_topic("events", 1, &[]).await;
    let config = config(&world);
    world.install(&config).await;
    let key = if is_mysql(&world) { "`key`" } else { "key" };
    let rows: Vec<String> = (0..100).map(|nth| format!("('{topic}', 'key-{nth}', '{nth}')")).collect();
    world.sql(&format!("INSERT INTO outbox (topic, {key}, payload) VALUES {}", rows.join(","))).await;
    let mut application = Session::open(&world.url).await.unwrap();
    application.run("BEGIN").await.unwrap();
    // Not the first: some can be recorded, and their statement waits for the others.
    application.run("UPDATE outbox SET headers = headers WHERE seq % 10 = 5").await.unwrap();
    let relay = world.relay(&config);
    relay.until_status("/role", "owner").await;
    let mut consumer = world.consumer(&topic);
    consumer.read(100);
    until_a_lease_would_be_lost(&world).await;
    application.run("COMMIT").await.unwrap();
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(consumer.read_to_end().len(), 100, "nothing is repeated");
    has_owned_all_along(relay);
}

/// It cannot be replaced before its transaction has ended, by whomever. The others keep what is theirs.
async fn stands_still(world: World) {
    let topic = world.create_topic("events", 1, &[]).await;
    let config = config(&world);
    world.install(&config).await;
    let halves = |status: &serde_json::Value| {
        status["group"].as_array().unwrap().iter().filter(|member| member["buckets"] == 32).count() == 2
    };
    let still = world.relay(&config);
    still.until_status("/role", "owner").await;
    let other = world.relay(&config);
    still.until(halves).await;
    other.until(halves).await;
    let members = own(&world, "members");
    let epoch = world.number(&format!("SELECT min(epoch) FROM {members}")).await;
    still.signal("STOP");
    // As its own transactions do.
    let lock = if is_mysql(&world) { "LOCK IN SHARE MODE" } else { "FOR KEY SHARE" };
    let mut in_transaction = Session::open(&world.url).await.unwrap();
    in_transaction.run("BEGIN").await.unwrap();
    in_transaction.run(&format!("SELECT epoch FROM {members} WHERE epoch = {epoch} {lock}")).await.unwrap();
    until_a_lease_would_be_lost(&world).await;
    in_transaction.run("ROLLBACK").await.unwrap();
    other.until(|status| status["group"][0]["buckets"] == 64).await;
    let key = if is_mysql(&world) { "`key`" } else { "key" };
    let rows: Vec<String> = (0..100).map(|nth| format!("('{topic}', 'key-{nth}', '{nth}')")).collect();
    world.sql(&format!("INSERT INTO outbox (topic, {key}, payload) VALUES {}", rows.join(","))).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    still.signal("CONT");
    still.until(halves).await;
    has_owned_all_along(other);
}
