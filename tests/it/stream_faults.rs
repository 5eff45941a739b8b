//! The log of PostgreSQL under every fault: what it takes to be read is lost, and comes back.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    faults::{PLAN, Stage},
    harness::{Relay, SOON, World, run_on, service, services},
    stream::{NO_LAG, drop_slot, follows, of_slot, streamed, until_published},
};

pub const INSERT: &str = "INSERT INTO outbox (topic, key, payload, headers)";
/// A relay says this whenever it has polled the table empty and goes over to the log.
const FOLLOWED: &str = "the log is followed";

async fn stage(name: &str) -> Stage {
    Stage::set(name, PLAN, |world| streamed(world, "{ name: outbox, capture: auto }")).await
}

/// Waits until the log was gone over to so many times, and is still followed.
pub async fn followed(relay: &Relay, times: usize) {
    let deadline = Instant::now() + SOON;
    while said(relay, FOLLOWED) < times {
        assert!(Instant::now() < deadline, "not followed {times} times: {}", relay.status());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    follows(relay).await;
}

pub fn said(relay: &Relay, text: &str) -> usize {
    relay.log().matches(text).count()
}

/// Waits until the table is polled, and why is told in words that have these.
pub async fn polled(relay: &Relay, why: &str) {
    relay
        .until(|status| {
            let table = &status["tables"][0];
            table["capture"] == "poll" && table["capture_reason"].as_str().unwrap().contains(why)
        })
        .await;
}

/// Runs `scripts/services VERB NAME` while everything else goes on.
pub async fn services_beside(verb: &'static str, name: &'static str) {
    tokio::task::spawn_blocking(move || services(verb, name)).await.unwrap();
}

/// Kafka is away until this is dropped, or `back`.
pub struct KafkaAway;

impl KafkaAway {
    pub async fn new() -> KafkaAway {
        services_beside("kill", "kafka").await;
        KafkaAway
    }

    pub async fn back(self) {
        tokio::task::spawn_blocking(move || drop(self)).await.unwrap();
    }
}

impl Drop for KafkaAway {
    fn drop(&mut self) {
        services("up", "kafka");
    }
}

/// A setting of the whole server, until this is dropped.
pub struct Setting(&'static str);

impl Setting {
    pub async fn new(world: &World, name: &'static str, value: &str) -> Setting {
        let setting = Setting(name);
        world.sql(&format!("ALTER SYSTEM SET {name} = '{value}'")).await;
        world.sql("SELECT pg_reload_conf()").await;
        world.until(&format!("SELECT (current_setting('{name}') = '{value}')::int::bigint"), 1).await;
        setting
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let reset = format!("ALTER SYSTEM RESET {}", self.0);
        let done = run_on(&service("WHIPPET_TEST_PG"), &[&reset, "SELECT pg_reload_conf()"]);
        assert!(done.is_ok() || std::thread::panicking(), "{done:?}");
    }
}

/// Writes WAL that has nothing of ours, in MB.
async fn noise(world: &World, megabytes: usize) {
    world.sql("CREATE TABLE IF NOT EXISTS noise (content text)").await;
    world.sql("ALTER TABLE noise ALTER content SET STORAGE EXTERNAL").await;
    for _ in 0..megabytes {
        world.sql("INSERT INTO noise VALUES (repeat('x', 1000000))").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_dropped_under_load_is_made_anew_and_nothing_is_lost() {
    let stage = stage("slotdrop").await;
    let relay = stage.relay();
    let drops = 4;
    for nth in 1..=drops {
        followed(&relay, nth).await;
        until_published(&relay, 200.0).await;
        crate::stream::lose_slot(&stage.world).await;
        // Why it is polled: the log broke off, then the slot was not there and was made.
        polled(&relay, "").await;
        assert_ne!(relay.status()["tables"][0]["capture_reason"], "configured");
    }
    followed(&relay, drops + 1).await;
    until_published(&relay, 200.0).await;
    assert_eq!(said(&relay, "slot made"), drops + 1, "{}", relay.log());
    stage.end(relay).await;
}

/// Has the server give up the slot.
pub async fn lose_slot(world: &World) {
    let deadline = Instant::now() + SOON;
    while world.number(&of_slot(world, "(wal_status = 'lost')::int::bigint")).await == 0 {
        assert!(Instant::now() < deadline, "the server keeps the slot");
        noise(world, 20).await;
        world.sql("SELECT pg_switch_wal()").await;
        world.sql("CHECKPOINT").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_the_server_has_invalidated_is_made_anew_and_nothing_is_lost() {
    let stage = stage("slotlost").await;
    let relay = stage.relay();
    followed(&relay, 1).await;
    until_published(&relay, 200.0).await;
    let _limit = Setting::new(&stage.world, "max_slot_wal_keep_size", "16MB").await;
    // While the relay hangs, and keeps the slot.
    relay.signal("STOP");
    lose_slot(&stage.world).await;
    relay.signal("CONT");
    relay.wait_for("the server has invalidated the slot");
    followed(&relay, 2).await;
    until_published(&relay, 200.0).await;
    // While there is none.
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    lose_slot(&stage.world).await;
    let relay = stage.relay();
    relay.wait_for("the server has invalidated the slot");
    followed(&relay, 1).await;
    until_published(&relay, 200.0).await;
    stage.end(relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_under_load_is_followed_again_and_nothing_is_lost() {
    let stage = stage("streamrestart").await;
    let relay = stage.relay();
    for (nth, verb) in ["restart", "kill", "restart"].into_iter().enumerate() {
        followed(&relay, nth + 1).await;
        until_published(&relay, 200.0).await;
        services_beside(verb, "postgres").await;
        services_beside("up", "postgres").await;
    }
    followed(&relay, 4).await;
    until_published(&relay, 200.0).await;
    stage.end(relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_restarts_while_the_log_is_followed_is_survived() {
    let stage = stage("streamkafka").await;
    let relay = stage.relay();
    for _ in 0..3 {
        follows(&relay).await;
        stage.flows_again(&relay).await;
        let away = KafkaAway::new().await;
        // Rows of the log wait for it.
        stage.carry_on(Duration::from_secs(3)).await;
        away.back().await;
        stage.flows_again(&relay).await;
    }
    follows(&relay).await;
    until_published(&relay, 200.0).await;
    stage.end(relay).await;
}

/// A server that keeps too much of its log is worse than polling.
#[tokio::test(flavor = "multi_thread")]
async fn over_the_budget_the_slot_is_let_go_and_made_anew_when_the_table_has_caught_up() {
    let budget = "max_retained_wal: 64MiB,";
    let stage = Stage::set("walbudget", PLAN, |world| {
        streamed(world, "{ name: outbox, capture: auto }")
            .replace("stream: {", &format!("stream: {{ {budget}"))
    })
    .await;
    let relay = stage.relay();
    followed(&relay, 1).await;
    until_published(&relay, 200.0).await;
    let away = KafkaAway::new().await;
    noise(&stage.world, 40).await;
    relay.wait_for("the server keeps much of its log for the slot");
    noise(&stage.world, 30).await;
    let error = relay.wait_for("the slot is dropped and its tables are polled");
    assert_eq!(error["level"], "ERROR", "{error}");
    polled(&relay, "max_retained_wal").await;
    let slots = of_slot(&stage.world, "count(*)");
    stage.world.until(&slots, 0).await;
    // What waits is measured twice.
    let age = |status: &serde_json::Value| status["tables"][0]["oldest_pending_age_seconds"].as_f64();
    for _ in 0..2 {
        let before = age(&relay.status());
        relay.until(|status| age(status) > before).await;
    }
    assert_eq!(stage.world.number(&slots).await, 0, "while rows wait, the server need not keep its log");
    assert_eq!(relay.metric("whippet_slot_retained_bytes", ""), 0.0);
    away.back().await;
    followed(&relay, 2).await;
    until_published(&relay, 200.0).await;
    assert_eq!(said(&relay, "slot made"), 2, "{}", relay.log());
    stage.end(relay).await;
}

/// The server may be too busy to see that its client is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_cannot_be_let_go_at_once_is_let_go_later() {
    struct Stopped(String);
    impl Stopped {
        fn signal(&self, name: &str) {
            assert!(Command::new("kill").args(["-s", name, &self.0]).status().unwrap().success());
        }
    }
    impl Drop for Stopped {
        fn drop(&mut self) {
            self.signal("CONT");
        }
    }
    let world = World::new("latedrop").await;
    let config = streamed(&world, "{ name: outbox, capture: auto }")
        .replace("stream: {", "stream: { max_retained_wal: 16MiB,");
    world.install(&config).await;
    let relay = world.relay(&config);
    followed(&relay, 1).await;
    let walsender = Stopped(world.number(&of_slot(&world, "active_pid::bigint")).await.to_string());
    walsender.signal("STOP");
    noise(&world, 20).await;
    relay.wait_for("the slot could not be dropped");
    drop(walsender);
    // Dropped, and made anew, as no row waits.
    followed(&relay, 2).await;
    assert_eq!(said(&relay, "slot made"), 2, "{}", relay.log());
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    drop_slot(&world).await;
}

/// The server ends a walsender that it does not hear from.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_hears_from_a_relay_that_can_take_no_more_rows() {
    let rows = 10_000;
    let world = World::new("feedback").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox, capture: auto }")
        .replace("in_flight_events: 20000", "in_flight_events: 200");
    world.install(&config).await;
    world.sql(&format!("ALTER DATABASE {} SET wal_sender_timeout = '2s'", world.name)).await;
    let relay = world.relay(&config);
    followed(&relay, 1).await;
    let walsender = of_slot(&world, "active_pid::bigint");
    let pid = world.number(&walsender).await;
    let away = KafkaAway::new().await;
    // One that is read in full, and then more than all buffers between the server and Kafka take.
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', '0', NULL)")).await;
    let committed = world.number("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint").await;
    world
        .sql(&format!(
            "{INSERT} SELECT '{topic}', 'k', convert_to(rpad('' || i, 3000), 'UTF8'), NULL FROM generate_series(1, {rows}) i"
        ))
        .await;
    relay.until_status("/tables/0/in_flight", 200).await;
    // Three times as long as the server waits.
    let (began, away_for) = (Instant::now(), Duration::from_secs(6));
    while began.elapsed() < away_for {
        assert_eq!(world.number(&walsender).await, pid, "{:?} after Kafka had gone", began.elapsed());
        world.pause().await;
    }
    let waits = format!("(confirmed_flush_lsn - '0/0' < {committed})::int::bigint");
    assert_eq!(world.number(&of_slot(&world, &waits)).await, 1, "rows that wait are confirmed");
    away.back().await;
    let mut consumer = world.consumer(&topic);
    let mut next = 0;
    for seen in consumer.read(rows + 1) {
        let number: usize = seen.text().trim_end().parse().unwrap();
        assert!(number <= next, "{number} came before {next}");
        next = next.max(number + 1);
    }
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.until(&of_slot(&world, NO_LAG), 1).await;
    assert_eq!(world.number(&walsender).await, pid);
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(
        consumer.read_to_end().iter().map(|seen| seen.text()).collect::<std::collections::HashSet<_>>().len(),
        rows + 1
    );
    drop_slot(&world).await;
}

/// Held and paused rows stay in the table, and do not hold the log.
#[tokio::test(flavor = "multi_thread")]
async fn an_operators_verbs_do_what_they_say_while_the_log_is_followed() {
    let world = World::new("streamverbs").await;
    let (topic, other) = (world.create_topic("a", 1, &[]).await, world.create_topic("b", 1, &[]).await);
    let config = streamed(&world, "{ name: outbox, capture: auto }");
    world.install(&config).await;
    let relay = world.relay(&config);
    let row = |topic: &str, key: &str, text: &str, headers: &str| {
        format!("{INSERT} VALUES ('{topic}', '{key}', '{text}', {headers})")
    };
    let holds = "SELECT count(*) FROM whippet.holds";
    let texts_of = |key: &str| {
        let mut consumer = world.consumer(&topic);
        let seen = consumer.read_to_end().iter().filter(|seen| seen.key.as_deref() == Some(key.as_bytes()));
        seen.map(|seen| seen.text().to_owned()).collect::<Vec<_>>()
    };
    followed(&relay, 1).await;

    // A key is parked, and later rows of it are held.
    world.sql(&row(&topic, "bad", "1", "'[1]'")).await;
    world.until(holds, 1).await;
    world.sql(&row(&topic, "bad", "2", "NULL")).await;
    world.sql(&row(&topic, "good", "1", "NULL")).await;
    world.sql(&row(&topic, "bad", "3", "NULL")).await;
    world.until(holds, 3).await;
    world.until("SELECT count(*) FROM outbox", 3).await;
    assert_eq!((texts_of("bad").len(), texts_of("good").len()), (0, 1));
    follows(&relay).await;
    world.until(&of_slot(&world, NO_LAG), 1).await;
    // Once mended, all of them come, and those behind them.
    world.sql("UPDATE outbox SET headers = NULL").await;
    let done = relay.operate(&world, &["redrive", "--table", "outbox", "--key", "bad"]);
    assert_eq!(done["events"], 3);
    world.sql(&row(&topic, "bad", "4", "NULL")).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(texts_of("bad"), ["1", "2", "3", "4"]);
    followed(&relay, 2).await;

    // A topic.
    relay.operate(&world, &["pause", "--topic", &topic]);
    followed(&relay, 3).await;
    for n in 1..=3 {
        world.sql(&row(&topic, "topic", &n.to_string(), "NULL")).await;
        world.sql(&row(&other, "topic", &n.to_string(), "NULL")).await;
    }
    world.until("SELECT count(*) FROM whippet.holds WHERE cause = 'paused'", 3).await;
    world.consumer(&other).read(3);
    world.until(&of_slot(&world, NO_LAG), 1).await;
    relay.operate(&world, &["resume", "--topic", &topic]);
    world.sql(&row(&topic, "topic", "4", "NULL")).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(texts_of("topic"), ["1", "2", "3", "4"]);
    followed(&relay, 4).await;

    // The table: nothing is held, and the server need not keep its log for what stays where it is.
    relay.operate(&world, &["pause", "--table", "outbox"]);
    relay.until_status("/tables/0/state", "paused").await;
    for n in 1..=50 {
        world.sql(&row(&topic, "table", &n.to_string(), "NULL")).await;
    }
    noise(&world, 2).await;
    world.until(&of_slot(&world, NO_LAG), 1).await;
    assert_eq!((world.number("SELECT count(*) FROM outbox").await, world.number(holds).await), (50, 0));
    assert_eq!(texts_of("table").len(), 0);
    relay.operate(&world, &["resume", "--table", "outbox"]);
    for n in 51..=60 {
        world.sql(&row(&topic, "table", &n.to_string(), "NULL")).await;
    }
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(texts_of("table"), (1..=60).map(|n: u32| n.to_string()).collect::<Vec<_>>());
    followed(&relay, 5).await;

    // What is skipped is gone; what was behind it comes.
    world.sql(&row(&topic, "worse", "1", "'[1]'")).await;
    world.until(holds, 1).await;
    world.sql(&row(&topic, "worse", "2", "NULL")).await;
    world.until(holds, 2).await;
    let parked = relay.operate(&world, &["parked", "--reason", "rejected"]);
    let id = parked["parked"][0]["id"].as_str().unwrap();
    relay.operate(&world, &["skip", "--id", id, "--reason", "nobody needs it"]);
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(texts_of("worse"), ["2"]);
    followed(&relay, 6).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    drop_slot(&world).await;
}

/// A process that takes the log from a slot, and throws it away.
pub struct Other(Child);

impl Other {
    pub fn new(world: &World) -> Other {
        let versions = std::fs::read_dir("/usr/lib/postgresql").unwrap();
        let newest: PathBuf = versions.map(|entry| entry.unwrap().path()).max().unwrap();
        let child = Command::new(newest.join("bin/pg_recvlogical"))
            .args(["--dbname", &world.url, "--slot", &world.name, "--start", "--file", "/dev/null"])
            .args(["--option", "proto_version=1", "--option", &format!("publication_names={}", world.name)])
            .stderr(Stdio::null())
            .spawn();
        Other(child.unwrap())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// What somebody else takes from the slot the server never sends again: the table has it.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_else_reads_is_told_and_followed_when_it_is_free() {
    let stage = stage("slottaken").await;
    let relay = stage.relay();
    followed(&relay, 1).await;
    until_published(&relay, 200.0).await;
    relay.kill();
    let free = of_slot(&stage.world, "count(*) FILTER (WHERE active)");
    stage.world.until(&free, 0).await;
    let other = Other::new(&stage.world);
    stage.world.until(&free, 1).await;
    let owner = stage.world.number(&of_slot(&stage.world, "active_pid::bigint")).await;
    let relay = stage.relay();
    polled(&relay, &format!("in use by \"pg_recvlogical\", process {owner} of the server")).await;
    until_published(&relay, 200.0).await;
    assert_eq!(said(&relay, "in use by"), 1, "it is told once");
    drop(other);
    followed(&relay, 1).await;
    until_published(&relay, 200.0).await;
    stage.end(relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stream_lacks_is_told_as_the_sql_that_mends_it() {
    let world = World::new("streamsql").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox, capture: stream }")
        .replace("stream: {", "stream: { create: false,");
    world.install(&config).await;
    world.sql(&format!("DROP PUBLICATION IF EXISTS {}", world.name)).await;
    let relay = world.relay(&config);
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', '1', NULL)")).await;
    for statement in ["CREATE PUBLICATION", "SELECT pg_create_logical_replication_slot"] {
        let told = |status: &serde_json::Value| {
            let table = &status["tables"][0];
            let error = table["last_error"].as_str()?;
            (table["state"] == "failing").then_some(error[error.find(statement)?..].to_owned())
        };
        relay.until(|status| told(status).is_some()).await;
        let sql = told(&relay.status()).unwrap();
        assert_eq!(world.consumer(&topic).read_to_end().len(), 0, "it is not polled");
        world.sql(&sql).await;
    }
    followed(&relay, 1).await;
    relay.until_status("/tables/0/state", "running").await;
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', '2', NULL)")).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut consumer = world.consumer(&topic);
    assert_eq!(consumer.read_to_end().iter().map(|seen| seen.text()).collect::<Vec<_>>(), ["1", "2"]);

    // A table of which it has some rows, or some columns, only: that is noticed while it is streamed, too.
    for part in ["WHERE (key <> 'no')", "(id, topic, key, payload, headers)"] {
        world
            .sql(&format!(
                "ALTER PUBLICATION {0} DROP TABLE outbox; ALTER PUBLICATION {0} ADD TABLE outbox {part}",
                world.name
            ))
            .await;
        let told = |status: &serde_json::Value| {
            let error = status["tables"][0]["last_error"].as_str()?;
            Some(error[error.find("ALTER PUBLICATION")?..].to_owned())
        };
        relay.until(|status| told(status).is_some()).await;
        world.sql(&format!("{INSERT} VALUES ('{topic}', 'no', '3', NULL)")).await;
        let sql = told(&relay.status()).unwrap();
        for statement in sql.split("; ") {
            world.sql(statement).await;
        }
        world.until("SELECT count(*) FROM outbox", 0).await;
        relay.until_status("/tables/0/state", "running").await;
    }

    // A table that the publication does not have.
    world.sql(&format!("ALTER PUBLICATION {} DROP TABLE outbox", world.name)).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    let relay = world.relay(&config);
    let told = |status: &serde_json::Value| {
        let error = status["tables"][0]["last_error"].as_str()?;
        Some(error[error.find("ALTER PUBLICATION")?..].to_owned())
    };
    relay.until(|status| told(status).is_some()).await;
    world.sql(&told(&relay.status()).unwrap()).await;
    followed(&relay, 1).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    drop_slot(&world).await;
}

/// What others write into the log is not kept for a table that is idle.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_table_beside_a_busy_one_does_not_hold_the_log() {
    let world = World::new("idle").await;
    let config = streamed(&world, "{ name: outbox, capture: auto }");
    world.install(&config).await;
    let relay = world.relay(&config);
    followed(&relay, 1).await;
    let wal = "SELECT (pg_current_wal_lsn() - '0/0')::bigint";
    let before = world.number(wal).await;
    noise(&world, 100).await;
    assert!(world.number(wal).await - before > 100_000_000);
    let lag = |of: &str| of_slot(&world, &format!("(pg_current_wal_lsn() - {of} < 20000000)::int::bigint"));
    let within = Duration::from_mins(1);
    world.until_within(&lag("confirmed_flush_lsn"), 1, within).await;
    // The server moves this one at its own pace: by what it writes at a checkpoint, at the latest.
    world.sql("CHECKPOINT").await;
    world.until_within(&lag("restart_lsn"), 1, within).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    drop_slot(&world).await;
}
