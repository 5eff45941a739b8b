//! What can happen to a binlog under the relay: whatever it is, no row is lost, and the reason is told.

use std::time::{Duration, Instant};

use crate::{
    db::Session,
    harness::{Seen, calm, run_on, service, services},
    load::Load,
    mysql::{on_both, on_both_at_once, world},
    mysql_stream::{PLAN, batch, end_readers, follows, streamed, until_published},
    proxy::Proxy,
    stream_rows::only_the_log,
};

on_both!(
    nothing_is_lost_when_the_server_restarts_under_a_stream,
    nothing_is_lost_when_files_are_purged_and_when_the_log_begins_anew,
    a_change_that_is_told_as_a_statement_is_found_in_the_table,
    columns_may_change_while_the_log_is_followed,
    compressed_transactions_are_rows_like_others,
    a_transaction_of_any_size_is_published_within_bounds,
    what_is_prepared_is_published_when_it_commits,
    a_dead_connection_shows,
);

on_both_at_once!(
    a_change_that_is_not_in_the_log_is_found_in_the_table,
    a_row_that_nobody_can_see_yet_is_published_once_and_recorded_when_it_can_be,
);

pub fn distinct(seen: &[Seen]) -> usize {
    let mut ids: Vec<&str> = seen.iter().filter_map(|one| one.header("id")).collect();
    ids.sort_unstable();
    ids.dedup();
    ids.len()
}

/// The numbers came in order, but for repeats.
pub fn in_order(seen: &[Seen], last: u32) {
    let mut next = 1;
    for number in seen.iter().map(|one| one.text().parse::<u32>().unwrap()) {
        assert!(number <= next, "{number} came before {next}");
        next += u32::from(number == next);
    }
    assert_eq!(next, last + 1);
}

async fn nothing_is_lost_when_the_server_restarts_under_a_stream(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let relay = world.relay(&config);
    let mut load = Load::start(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    for verb in ["restart", "kill"] {
        follows(&relay).await;
        until_published(&relay, 500.0).await;
        let name = server.to_owned();
        let fault = move || {
            services(verb, &name);
            services("up", &name);
        };
        tokio::task::spawn_blocking(fault).await.unwrap();
    }
    follows(&relay).await;
    until_published(&relay, 500.0).await;
    load.stop();
    load.ended().await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(relay.stop().0, Some(0));
    load.check(&world);
}

async fn nothing_is_lost_when_files_are_purged_and_when_the_log_begins_anew(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let mut relay = world.relay(&config);
    follows(&relay).await;
    world.sql(&batch(&topic, 1, 50)).await;
    // The file changes, and the stream goes on.
    for round in 1..4 {
        world.sql("FLUSH BINARY LOGS").await;
        world.sql(&batch(&topic, 50 * round + 1, 50 * round + 50)).await;
    }
    let mut consumer = world.consumer(&topic);
    consumer.read(200);
    relay.kill();
    // What it had not read is purged.
    world.sql(&batch(&topic, 201, 250)).await;
    world.sql("FLUSH BINARY LOGS").await;
    world.sql("PURGE BINARY LOGS BEFORE NOW() + INTERVAL 1 DAY").await;
    relay = world.relay(&config);
    follows(&relay).await;
    world.sql(&batch(&topic, 251, 300)).await;
    consumer.read_until(|seen| distinct(seen) >= 300);
    let reset = if server == "mysql" { "RESET BINARY LOGS AND GTIDS" } else { "RESET MASTER" };
    for round in 6..9 {
        world.sql(&batch(&topic, 50 * round + 1, 50 * round + 25)).await;
        world.sql(reset).await;
        world.sql(&batch(&topic, 50 * round + 26, 50 * round + 50)).await;
        consumer.read_until(|seen| distinct(seen) >= 50 * round as usize + 50);
        world.until("SELECT count(*) FROM outbox", 0).await;
    }
    in_order(&consumer.seen, 450);
    follows(&relay).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
}

/// With REPEATABLE READ a session may have its own format.
async fn a_change_that_is_told_as_a_statement_is_found_in_the_table(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    let mut session = Session::open(&world.url).await.unwrap();
    session.run("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    let mut consumer = world.consumer(&topic);
    for (round, format) in ["STATEMENT", "MIXED", "ROW", "STATEMENT"].into_iter().enumerate() {
        session.run(&format!("SET SESSION binlog_format = '{format}'")).await.unwrap();
        let (from, to) = (3 * round as u32 + 1, 3 * round as u32 + 3);
        session.run(&batch(&topic, from, to)).await.unwrap();
        consumer.read_until(|seen| distinct(seen) >= to as usize);
    }
    // Rows before and after, in the same transaction.
    session.run("BEGIN").await.unwrap();
    session.run("SET SESSION binlog_format = 'ROW'").await.ok();
    session.run(&batch(&topic, 13, 13)).await.unwrap();
    session.run("SAVEPOINT a").await.unwrap();
    session.run(&batch(&topic, 14, 14)).await.unwrap();
    session.run("COMMIT").await.unwrap();
    consumer.read_until(|seen| distinct(seen) >= 14);
    in_order(&consumer.seen, 14);
    world.until("SELECT count(*) FROM outbox", 0).await;
    follows(&relay).await;
    assert!(relay.log().contains("left to the table"));
    assert_eq!(relay.stop().0, Some(0));
}

async fn a_change_that_is_not_in_the_log_is_found_in_the_table(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    let mut session = Session::open(&world.url).await.unwrap();
    session.run("SET SESSION sql_log_bin = 0").await.unwrap();
    session.run(&batch(&topic, 1, 10)).await.unwrap();
    world.until_within("SELECT count(*) FROM outbox", 0, Duration::from_mins(1)).await;
    in_order(world.consumer(&topic).read_to_end(), 10);
    assert_eq!(relay.stop().0, Some(0));
}

async fn columns_may_change_while_the_log_is_followed(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let relay = world.relay(&config);
    let mut load = Load::start(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    for change in [
        "ALTER TABLE outbox ADD COLUMN more VARCHAR(40) FIRST",
        "ALTER TABLE outbox MODIFY payload MEDIUMBLOB AFTER seq",
        "ALTER TABLE outbox DROP COLUMN more",
        "ALTER TABLE outbox RENAME COLUMN type TO t1, ADD COLUMN type VARCHAR(10)",
        "CREATE INDEX by_topic ON outbox (topic(10))",
    ] {
        follows(&relay).await;
        until_published(&relay, 200.0).await;
        world.sql(change).await;
    }
    follows(&relay).await;
    until_published(&relay, 200.0).await;
    load.stop();
    load.ended().await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(relay.stop().0, Some(0));
    load.check(&world);
}

async fn compressed_transactions_are_rows_like_others(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = calm(&streamed(&world, "{ name: outbox }"));
    world.install(&config).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    let switch =
        if server == "mysql" { "SESSION binlog_transaction_compression" } else { "GLOBAL log_bin_compress" };
    let mut session = Session::open(&world.url).await.unwrap();
    let mut consumer = world.consumer(&topic);
    let long = "x".repeat(1_000);
    for round in 0..4_u32 {
        session.run(&format!("SET {switch} = {}", round % 2)).await.unwrap();
        if server == "mysql" && round > 1 {
            session.run(&format!("SET gtid_next = 'AUTOMATIC:tag_{round}'")).await.unwrap();
        }
        session.run("BEGIN").await.unwrap();
        session.run(&batch(&topic, 101 * round + 1, 101 * round + 100)).await.unwrap();
        let insert = format!(
            "INSERT INTO outbox (topic, payload, `key`) VALUES ('{topic}', '{}', '{long}')",
            101 * round + 101
        );
        session.run(&insert).await.unwrap();
        session.run("COMMIT").await.unwrap();
    }
    assert_eq!(consumer.read(404).len(), 404);
    in_order(&consumer.seen, 404);
    world.until("SELECT count(*) FROM outbox", 0).await;
    if server == "mariadb" {
        world.sql("SET GLOBAL log_bin_compress = 0").await;
    }
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    only_the_log(&log);
    assert_eq!(consumer.read_to_end().len(), 404, "nothing is repeated");
}

async fn a_transaction_of_any_size_is_published_within_bounds(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[("max.message.bytes", "20000000")]).await;
    let config = calm(&streamed(&world, "{ name: outbox }"))
        .replace("in_flight_events: 20000", "in_flight_bytes: 4MiB");
    let config = config
        .replace("kafka: {", "kafka: { compression: none, properties: { message.max.bytes: '20000000' },");
    world.install(&config).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    let before = relay.peak_mib();
    let mut consumer = world.consumer(&topic);
    let mut session = Session::open(&world.url).await.unwrap();
    if server == "mysql" {
        // It is compressed to less than what may be kept.
        session.run("SET SESSION binlog_transaction_compression = 1").await.unwrap();
    }
    session.run("BEGIN").await.unwrap();
    session
        .run(&format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', REPEAT('x', 1000))"))
        .await
        .unwrap();
    for _ in 0..16 {
        session.run("INSERT INTO outbox (topic, payload) SELECT topic, payload FROM outbox").await.unwrap();
    }
    session.run("COMMIT").await.unwrap();
    consumer.read(1 << 16);
    // What a debug build is without doing anything is not counted.
    let more = relay.peak_mib() - before;
    eprintln!("{more:.0} MiB more for a transaction of 64 MiB");
    assert!(more < 4.0 * 4.0, "{more:.0} MiB");
    // A row that is larger than all of the window.
    session
        .run(&format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', REPEAT('y', 8 << 20))"))
        .await
        .unwrap();
    consumer.read((1 << 16) + 1);
    world.until("SELECT count(*) FROM outbox", 0).await;
    follows(&relay).await;
    assert_eq!(relay.stop().0, Some(0));
    assert_eq!(consumer.read_to_end().len(), (1 << 16) + 1);
}

async fn what_is_prepared_is_published_when_it_commits(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = calm(&streamed(&world, "{ name: outbox }"));
    world.install(&config).await;
    let relay = world.relay(&config);
    follows(&relay).await;
    let mut consumer = world.consumer(&topic);
    let name = &world.name;
    for (n, ends) in [
        ("1", &["XA PREPARE 'x'", "XA COMMIT 'x'"][..]),
        ("undone", &["XA PREPARE 'x'", "XA ROLLBACK 'x'"]),
        ("2", &["XA COMMIT 'x' ONE PHASE"]),
        ("undone", &["XA ROLLBACK 'x'"]),
    ] {
        let mut session = Session::open(&world.url).await.unwrap();
        let x = |statement: &str| statement.replace("'x'", &format!("'{name}'"));
        session.run(&x("XA START 'x'")).await.unwrap();
        session.run(&format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', '{n}')")).await.unwrap();
        session.run(&x("XA END 'x'")).await.unwrap();
        let before = consumer.read_to_end().len();
        for end in ends {
            assert_eq!(consumer.read_to_end().len(), before, "before {end}");
            session.run(&x(end)).await.unwrap();
        }
        if n != "undone" {
            consumer.read(before + 1);
        }
    }
    world.sql(&batch(&topic, 3, 3)).await;
    consumer.read(3);
    in_order(&consumer.seen, 3);
    assert_eq!(relay.stop().0, Some(0));
}

async fn a_dead_connection_shows(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let proxy = Proxy::to(server);
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let upper = server.to_uppercase();
    let (real, proxied) =
        (service(&format!("WHIPPET_TEST_{upper}")), service(&format!("WHIPPET_TEST_{upper}_PROXIED_PORT")));
    let (host, _) = real.rsplit_once(':').unwrap();
    // The lease would be lost first.
    let config = config.replace(&real, &format!("{host}:{proxied}")).replace("lease: 2s", "lease: 1m");
    let relay = world.relay(&config);
    follows(&relay).await;
    world.sql(&batch(&topic, 1, 10)).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(10);
    proxy.blackhole();
    let began = Instant::now();
    relay.wait_for("the server has stopped answering");
    assert!(began.elapsed() < Duration::from_secs(20));
    world.sql(&batch(&topic, 11, 20)).await;
    proxy.heal();
    consumer.read_until(|seen| distinct(seen) >= 20);
    in_order(&consumer.seen, 20);
    assert_eq!(relay.stop().0, Some(0));
}

/// What makes a server wait for a replica: MariaDB has it, MySQL has it as a plugin. Off when this is dropped,
/// also when a test fails: others need the server.
struct SemiSync(&'static str);

impl SemiSync {
    fn of(server: &str) -> SemiSync {
        if server != "mysql" {
            return SemiSync("mariadb");
        }
        let install = "INSTALL PLUGIN rpl_semi_sync_source SONAME 'semisync_source.so'";
        run_on(&service("WHIPPET_TEST_MYSQL"), &[install]).unwrap();
        SemiSync("mysql")
    }
}

impl Drop for SemiSync {
    fn drop(&mut self) {
        let (server, statements) = match self.0 {
            "mysql" => (
                service("WHIPPET_TEST_MYSQL"),
                ["SET GLOBAL rpl_semi_sync_source_enabled = 0", "UNINSTALL PLUGIN rpl_semi_sync_source"],
            ),
            _ => (
                service("WHIPPET_TEST_MARIADB"),
                [
                    "SET GLOBAL rpl_semi_sync_master_enabled = 0",
                    "SET GLOBAL rpl_semi_sync_master_timeout = 10000",
                ],
            ),
        };
        run_on(&server, &statements).unwrap();
    }
}

/// A semi-synchronous server makes a transaction visible when a replica has it, or after a while. The log has
/// it before.
async fn a_row_that_nobody_can_see_yet_is_published_once_and_recorded_when_it_can_be(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    // The lease waits too when it is renewed.
    let config = streamed(&world, "{ name: outbox }").replace("lease: 2s", "lease: 1m");
    world.install(&config).await;
    let name = if server == "mysql" { "source" } else { "master" };
    let _semi_sync = SemiSync::of(server);
    let relay = world.relay(&config);
    follows(&relay).await;
    let mut consumer = world.consumer(&topic);
    let waits = |ms: u32, on: u8| {
        format!(
            "SET GLOBAL rpl_semi_sync_{name}_wait_point = 'AFTER_SYNC';
             SET GLOBAL rpl_semi_sync_{name}_timeout = {ms};
             SET GLOBAL rpl_semi_sync_{name}_enabled = {on}"
        )
    };
    for round in 0..3_u32 {
        let insert = batch(&topic, 10 * round + 1, 10 * round + 10);
        world.sql(&waits(6_000, 1)).await;
        let mut session = Session::open(&world.url).await.unwrap();
        if round > 0 {
            // The log is read anew while it has the rows and nobody sees them.
            end_readers(&world).await;
        }
        let began = Instant::now();
        let writer = tokio::spawn(async move { session.run(&insert).await.unwrap() });
        let enough = 10 * (round as usize + 1);
        consumer.read_until(|seen| distinct(seen) >= enough);
        let published = began.elapsed();
        writer.await.unwrap();
        let visible = began.elapsed();
        world.sql(&waits(6_000, 0)).await;
        eprintln!("published after {published:?}, visible after {visible:?}");
        // Not by the sweep.
        assert!(visible > Duration::from_secs(4) && published < Duration::from_secs(12));
        world.until("SELECT count(*) FROM outbox", 0).await;
    }
    follows(&relay).await;
    in_order(consumer.read_to_end(), 30);
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
}
