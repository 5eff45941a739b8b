//! The log, and what the server and its other clients make of it: a promotion, a log that is not logical, a
//! commit that waits, a publication that changes, Kafka away.

use std::time::{Duration, Instant};

use crate::{
    faults::{PLAN, Stage},
    harness::{SOON, World, calm, in_soak, kafka, run_on, service, services, services_with},
    proxy::Proxy,
    stream::{drop_slot, follows, of_slot, streamed, until_published},
    stream_faults::{INSERT, KafkaAway, Setting, followed, polled, said, services_beside},
    stream_sizes::within_bounds,
};

async fn number_on(server: &str, sql: &str) -> i64 {
    use sqlx::Connection as _;
    let mut connection = sqlx::PgConnection::connect(server).await.unwrap();
    sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut connection).await.unwrap()
}

/// Under load: what a writer has heard is on both servers, and the relay knows no other rows.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_promoted_is_followed_and_nothing_is_lost() {
    for (verb, name) in [("reset", "pg17b"), ("reset", "pg17"), ("up", "pg17"), ("up", "pg17b")] {
        services_beside(verb, name).await;
    }
    let (primary, standby) = (service("WHIPPET_TEST_PG17"), service("WHIPPET_TEST_PG17B"));
    let proxy = Proxy::pg17();
    let both = "ALTER SYSTEM SET synchronous_standby_names = 'pg17b'";
    run_on(&primary, &[both, "SELECT pg_reload_conf()"]).unwrap();
    let port = service("WHIPPET_TEST_PG17_PROXIED_PORT");
    let world = World::on(&format!("postgres://postgres@127.0.0.1:{port}/postgres"), "promotion").await;
    let mut stage =
        Stage::set_in(world, PLAN, |world| streamed(world, "{ name: outbox, capture: auto }")).await;
    let relay = stage.relay();
    followed(&relay, 1).await;
    until_published(&relay, 200.0).await;
    assert_eq!(stage.world.number(&of_slot(&stage.world, "failover::int::bigint")).await, 1);
    // The standby takes a copy once the slot's oldest transaction is over: that is told at a checkpoint, if
    // none is open then.
    stage.load.stop();
    stage.load.ended().await;
    let copied =
        of_slot(&stage.world, "count(*)") + " AND synced AND NOT temporary AND invalidation_reason IS NULL";
    let deadline = Instant::now() + 2 * SOON;
    while number_on(&standby, &copied).await == 0 {
        assert!(Instant::now() < deadline, "the standby has no copy of the slot");
        stage.world.sql("CHECKPOINT").await;
    }
    stage.load.go_on();
    until_published(&relay, 200.0).await;
    services_beside("kill", "pg17").await;
    proxy.cut();
    run_on(&standby, &["SELECT pg_promote()"]).unwrap();
    proxy.lead_to(&standby);
    followed(&relay, 2).await;
    until_published(&relay, 200.0).await;
    assert_eq!(said(&relay, "slot made"), 1, "the standby's copy of it is read: {}", relay.log());
    assert_eq!(said(&relay, "another server has taken over"), 1);
    assert_eq!(stage.world.number("SELECT timeline FROM whippet.slots").await, 2);
    stage.end(relay).await;
    for name in ["pg17b", "pg17"] {
        services_beside("reset", name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_a_logical_log_is_polled_and_told_why() {
    struct Logical;
    impl Drop for Logical {
        fn drop(&mut self) {
            services("restart", "pg18");
        }
    }
    let restart = |level: &'static str| {
        tokio::task::spawn_blocking(move || {
            // No slot of before: with one of those it would not start.
            services("reset", "pg18");
            services_with("up", "pg18", &[("WHIPPET_PG18_WAL_LEVEL", level)]);
        })
    };
    restart("replica").await.unwrap();
    let logical = Logical;
    let world = World::on(&service("WHIPPET_TEST_PG18"), "wallevel").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox, capture: auto }");
    world.install(&config).await;
    let relay = world.relay(&config);
    polled(&relay, "wal_level is replica").await;
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', '1', NULL)")).await;
    world.consumer(&topic).read(1);
    tokio::task::spawn_blocking(move || drop(logical)).await.unwrap();
    followed(&relay, 1).await;
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', '2', NULL)")).await;
    world.consumer(&topic).read(2);
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    drop_slot(&world).await;
}

/// The log has a transaction from when its commit is on the disk. It is seen, and can be deleted, later:
/// with a synchronous standby that is away, much later.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_the_log_has_before_they_can_be_seen_are_published_and_recorded() {
    let world = World::new("unseen").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = calm(&streamed(&world, "{ name: outbox, capture: auto }"));
    world.install(&config).await;
    world.sql("CREATE TABLE probe (n int)").await;
    // All but those who ask for it do without the standby.
    world.sql(&format!("ALTER DATABASE {} SET synchronous_commit = 'local'", world.name)).await;
    let write = |sql: String| {
        use sqlx::Connection as _;
        let url = world.url.clone();
        tokio::spawn(async move {
            let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
            sqlx::raw_sql("SET synchronous_commit = 'on'").execute(&mut connection).await.unwrap();
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
        })
    };
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()";
    let relay = world.relay(&config);
    followed(&relay, 1).await;
    let away = Setting::new(&world, "synchronous_standby_names", "nobody").await;
    let began = Instant::now();
    // The server takes note of it a little later.
    while world.number(waiting).await == 0 {
        assert!(began.elapsed() < SOON, "nobody waits for the standby");
        let probe = write("INSERT INTO probe VALUES (1)".into());
        while !probe.is_finished() && world.number(waiting).await == 0 {
            world.pause().await;
        }
    }
    let row = |n: u32| format!("{INSERT} VALUES ('{topic}', 'k', '{n}', NULL)");
    let mut consumer = world.consumer(&topic);

    let first = write(row(1));
    world.until(waiting, 2).await;
    consumer.read(1);
    // One that comes while the table is polled.
    relay.kill();
    let second = write(row(2));
    world.until(waiting, 3).await;
    let relay = world.relay(&config);
    followed(&relay, 1).await;
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "2"));
    assert_eq!(world.number("SELECT count(*) FROM outbox").await, 0, "they cannot be seen");
    tokio::task::spawn_blocking(move || drop(away)).await.unwrap();
    first.await.unwrap();
    second.await.unwrap();
    world.until("SELECT count(*) FROM outbox", 0).await;
    follows(&relay).await;
    let mut texts: Vec<&str> = consumer.read_to_end().iter().map(|seen| seen.text()).collect();
    texts.dedup();
    assert_eq!(texts, ["1", "2"]);
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    drop_slot(&world).await;
}

/// What a transaction inserts while its table is not published is not in the log, however late it commits.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_inserted_while_its_table_was_not_published_is_not_lost() {
    use sqlx::Connection as _;
    let world = World::new("unpublished").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox, capture: auto }");
    world.install(&config).await;
    let relay = world.relay(&config);
    followed(&relay, 1).await;
    let change = |what: &str| format!("ALTER PUBLICATION {} {what} TABLE outbox", world.name);
    world.sql(&change("DROP")).await;
    let mut writer = sqlx::PgConnection::connect(&world.url).await.unwrap();
    let late = format!("BEGIN; {INSERT} VALUES ('{topic}', 'k', 'late', NULL)");
    sqlx::raw_sql(sqlx::AssertSqlSafe(late)).execute(&mut writer).await.unwrap();
    world.sql(&change("ADD")).await;
    let deadline = Instant::now() + SOON;
    while said(&relay, "waiting for transactions") == 0 {
        assert!(Instant::now() < deadline, "{}", relay.log());
        world.pause().await;
    }
    // Nobody else waits for it.
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', 'early', NULL)")).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(1);
    sqlx::raw_sql("COMMIT").execute(&mut writer).await.unwrap();
    assert_eq!(consumer.read(2)[1].text(), "late");
    followed(&relay, 2).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    drop_slot(&world).await;
}

/// Ten minutes of it in `scripts/soak`.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_slower_than_its_writers_loses_nothing_and_stays_within_its_bounds() {
    let proxy = Proxy::kafka();
    let stage = Stage::set("slowreader", PLAN, |world| {
        let direct = format!("bootstrap_servers: '{}'", kafka());
        let proxied = format!(
            "bootstrap_servers: '{}', compression: none, properties: {{ batch.size: 16384 }}",
            service("WHIPPET_TEST_KAFKA_PROXIED")
        );
        streamed(world, "{ name: outbox, capture: auto }").replace(&direct, &proxied)
    })
    .await;
    let relay = stage.relay();
    followed(&relay, 1).await;
    proxy.limit_to(in_soak(16 << 10, 64 << 10));
    let (backlog, published) =
        (stage.world.number("SELECT count(*) FROM outbox").await, "whippet_events_published_total");
    let before = relay.metric(published, "outbox");
    stage.carry_on(in_soak(Duration::from_secs(15), Duration::from_mins(10))).await;
    assert!(relay.metric(published, "outbox") > before, "slow, and not stopped");
    // Or the relay is no slower than its writers.
    let many = format!("SELECT (count(*) > {})::int::bigint FROM outbox", backlog + 2_000);
    stage.world.until_within(&many, 1, 2 * SOON).await;
    let waits = stage.world.number("SELECT count(*) FROM outbox").await;
    assert_eq!(relay.status()["tables"][0]["capture"], "stream", "{}", relay.status());
    eprintln!("{waits} rows wait, {} were published meanwhile", relay.metric(published, "outbox") - before);
    proxy.heal();
    stage.load.stop();
    stage.world.until_within("SELECT count(*) FROM outbox", 0, in_soak(SOON, Duration::from_mins(2))).await;
    within_bounds(&relay, 0);
    stage.end(relay).await;
}

/// There is no table to be counted: the log's own rows are.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_only_the_log_has_show_that_they_wait() {
    let world = World::new("onlywaits").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: 'message:outbox' }");
    world.install(&config).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    let emit = |n: u32| {
        format!(
            "SELECT pg_logical_emit_message(true, 'outbox', '{{\"id\": \"{n}\", \"topic\": \"{topic}\", \"key\": \"k\", \"payload\": \"{n}\"}}')"
        )
    };
    world.sql(&emit(1)).await;
    world.consumer(&topic).read(1);
    relay.until_status("/tables/0/pending", 0).await;
    let away = KafkaAway::new().await;
    for n in 2..5 {
        world.sql(&emit(n)).await;
    }
    relay.until_status("/tables/0/pending", 3).await;
    relay.until(|status| status["tables"][0]["oldest_pending_age_seconds"].as_f64() > Some(3.0)).await;
    assert_eq!(relay.metric("whippet_pending_events", "table=\"message:outbox\""), 3.0);
    away.back().await;
    world.consumer(&topic).read(4);
    relay.until_status("/tables/0/pending", 0).await;
    relay.until(|status| status["tables"][0]["oldest_pending_age_seconds"].is_null()).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    drop_slot(&world).await;
}
