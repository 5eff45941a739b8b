//! Rows that the application deletes itself, on MySQL and MariaDB: only the binlog has them.

use std::time::Duration;

use crate::{
    db::Session,
    harness::{Relay, Seen, World, services},
    load::Load,
    mysql::{on_both, world},
    mysql_stream::{PLAN, batch, end_readers, streamed, until_published, until_published_in_all},
    mysql_stream_faults::{distinct, in_order},
};

on_both!(
    rows_that_do_not_stay_come_once_and_in_order,
    rows_that_are_kept_are_followed_and_stay_as_they_are,
    nothing_is_lost_through_kills_of_either_end_restarts_and_rotation,
    what_is_not_acknowledged_is_read_again,
    a_transaction_larger_than_the_window_is_published_within_bounds,
    what_is_held_is_kept_with_its_content,
    rows_are_published_or_parked_whatever_their_size,
);

pub const TRANSIENT: &str = "{ name: outbox, capture: stream, rows: transient }";

/// A transaction that inserts these numbers and deletes them.
pub async fn pass(world: &World, topic: &str, from: u32, to: u32) {
    let insert = batch(topic, from, to);
    world.sql(&format!("BEGIN;\n{insert};\nDELETE FROM outbox;\nCOMMIT")).await;
}

/// How far the log was read, as it is stored.
pub async fn until_stored(world: &World, since: i64) -> i64 {
    let changed = format!(
        "SELECT COUNT(*) FROM whippet_binlog WHERE CAST(UNIX_TIMESTAMP(noted) * 1e6 AS SIGNED) > {since}"
    );
    world.until(&changed, 1).await;
    world.number("SELECT CAST(UNIX_TIMESTAMP(noted) * 1e6 AS SIGNED) FROM whippet_binlog").await
}

/// The log is read, and not only to be read.
pub async fn reads(relay: &Relay) {
    relay.until_status("/tables/0/capture_reason", "the log is read").await;
}

async fn rows_that_do_not_stay_come_once_and_in_order(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, TRANSIENT);
    world.install(&config).await;
    // Before the log is read the first time: nobody asked for these.
    pass(&world, &topic, 900, 910).await;
    let relay = world.relay(&config);
    reads(&relay).await;
    assert!(relay.log().contains("no place in the binlog is stored"));
    pass(&world, &topic, 1, 100).await;
    let mut session = Session::open(&world.url).await.unwrap();
    let mut run = async |statement: &str| session.run(statement).await.unwrap();
    for statement in [
        "BEGIN".to_owned(),
        batch(&topic, 101, 101),
        "SAVEPOINT a".into(),
        batch(&topic, 5000, 5001),
        "ROLLBACK TO a".into(),
        batch(&topic, 102, 102),
        "DELETE FROM outbox".into(),
        "COMMIT".into(),
        "BEGIN".into(),
        batch(&topic, 6000, 6000),
        "ROLLBACK".into(),
    ] {
        run(&statement).await;
    }
    // The log tells what was undone, where a table without transactions was written to between.
    run("CREATE TABLE notes (n int) ENGINE = MyISAM").await;
    if server == "mariadb" {
        for statement in [
            "BEGIN".to_owned(),
            batch(&topic, 103, 104),
            "SAVEPOINT `b`".into(),
            "INSERT INTO notes VALUES (1)".into(),
            batch(&topic, 7000, 7001),
            "ROLLBACK TO `b`".into(),
            batch(&topic, 105, 105),
            "COMMIT".into(),
            "BEGIN".into(),
            batch(&topic, 7002, 7002),
            "INSERT INTO notes VALUES (2)".into(),
            "ROLLBACK".into(),
        ] {
            run(&statement).await;
        }
    } else {
        run(&batch(&topic, 103, 105)).await;
    }
    let mut consumer = world.consumer(&topic);
    consumer.read(105);
    in_order(&consumer.seen, 105);
    // One that the application leaves where it is stays there: it is the application's.
    world.until("SELECT count(*) FROM outbox", 3).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    // While nobody reads.
    pass(&world, &topic, 106, 200).await;
    let relay = world.relay(&config);
    reads(&relay).await;
    pass(&world, &topic, 201, 300).await;
    consumer.read(300);
    assert_eq!(relay.stop().0, Some(0));
    in_order(&consumer.seen, 300);
    assert_eq!(consumer.read_to_end().len(), 300, "nothing is repeated after a clean stop");
    world.until("SELECT count(*) FROM outbox", 0).await;
}

/// `after_publish: keep`: nothing in the table says what is published, so that is the log's to tell.
async fn rows_that_are_kept_are_followed_and_stay_as_they_are(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox, capture: stream, after_publish: keep }");
    world.install(&config).await;
    world.sql(&batch(&topic, 900, 910)).await;
    let relay = world.relay(&config);
    reads(&relay).await;
    world.sql(&batch(&topic, 1, 100)).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(100);
    assert_eq!(relay.stop().0, Some(0));
    world.sql(&batch(&topic, 101, 150)).await;
    let relay = world.relay(&config);
    reads(&relay).await;
    world.sql(&batch(&topic, 151, 200)).await;
    consumer.read(200);
    assert_eq!(relay.stop().0, Some(0));
    in_order(&consumer.seen, 200);
    assert_eq!(consumer.read_to_end().len(), 200, "each once, and nothing from before the first start");
    assert_eq!(world.number("SELECT count(*) FROM outbox").await, 211);
}

/// Places are told by files then.
#[tokio::test(flavor = "multi_thread")]
async fn mysql_without_gtids_is_read_from_a_place_in_a_file() {
    let world = world("mysql").await;
    let to = async |modes: &[&str]| {
        for mode in modes {
            world.sql(&format!("SET GLOBAL gtid_mode = {mode}")).await;
        }
    };
    to(&["ON_PERMISSIVE", "OFF_PERMISSIVE", "OFF"]).await;
    rows_that_do_not_stay_come_once_and_in_order("mysql").await;
    through_kills("mysql", &[]).await;
    to(&["OFF_PERMISSIVE", "ON_PERMISSIVE", "ON"]).await;
}

async fn nothing_is_lost_through_kills_of_either_end_restarts_and_rotation(server: &str) {
    through_kills(server, &["restart", "kill"]).await;
}

/// kill -9 of the relay again and again, the server's end of the connection, the server itself, and new files.
async fn through_kills(server: &str, of_the_server: &'static [&'static str]) {
    let world = world(server).await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = streamed(&world, TRANSIENT);
    world.install(&config).await;
    let mut relay = world.relay(&config);
    reads(&relay).await;
    let mut load = Load::transient(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    for round in 0..5 {
        until_published(&relay, 300.0).await;
        relay.kill();
        if round % 2 == 0 {
            world.sql("FLUSH BINARY LOGS").await;
        }
        relay = world.relay(&config);
        reads(&relay).await;
    }
    for _ in 0..4 {
        until_published(&relay, 200.0).await;
        end_readers(&world).await;
    }
    for verb in of_the_server {
        until_published(&relay, 300.0).await;
        let name = server.to_owned();
        let fault = move || {
            services(verb, &name);
            services("up", &name);
        };
        tokio::task::spawn_blocking(fault).await.unwrap();
    }
    until_published(&relay, 300.0).await;
    load.stop();
    load.ended().await;
    // Behind everything: what came before it is on its way when this has come.
    let end = world.create_topic("end", 1, &[]).await;
    pass(&world, &end, 1, 1).await;
    world.consumer(&end).read(1);
    assert_eq!(relay.stop().0, Some(0));
    let (verdict, rolled_back) = load.check(&world);
    assert!(verdict.published > 2000 && rolled_back > 0, "{verdict:?}");
}

/// The position waits for what its topic does not take, although more of the transaction is published.
async fn what_is_not_acknowledged_is_read_again(server: &str) {
    let world = world(server).await;
    let (topic, missing) = (world.create_topic("events", 1, &[]).await, world.topic("missing"));
    let config = streamed(&world, TRANSIENT);
    world.install(&config).await;
    let relay = world.relay(&config);
    reads(&relay).await;
    let (first, second) = (batch(&topic, 1, 10), batch(&missing, 1, 10));
    world.sql(&format!("BEGIN;\n{first};\n{second};\nDELETE FROM outbox;\nCOMMIT")).await;
    world.consumer(&topic).read(10);
    // Longer than a position that moves would take to be stored.
    relay.until(|status| status["tables"][0]["oldest_pending_age_seconds"].as_f64() > Some(3.0)).await;
    relay.kill();
    assert_eq!(world.create_topic("missing", 1, &[]).await, missing);
    let relay = world.relay(&config);
    let mut consumer = world.consumer(&missing);
    consumer.read(10);
    in_order(&consumer.seen, 10);
    assert_eq!(relay.stop().0, Some(0));
}

/// Read twice: to see that it commits, and piece by piece. Compressed as one event on MySQL, and not.
async fn a_transaction_larger_than_the_window_is_published_within_bounds(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, TRANSIENT)
        .replace("in_flight_events: 20000", "in_flight_events: 500, in_flight_bytes: 1MiB");
    world.install(&config).await;
    let mut relay = world.relay(&config);
    reads(&relay).await;
    let mut session = Session::open(&world.url).await.unwrap();
    let mut next = 1;
    for (round, end) in ["COMMIT", "ROLLBACK", "COMMIT"].into_iter().enumerate() {
        let switch = if server == "mysql" {
            "SESSION binlog_transaction_compression"
        } else {
            "GLOBAL log_bin_compress"
        };
        session.run(&format!("SET {switch} = {}", usize::from(round == 0))).await.unwrap();
        session.run("BEGIN").await.unwrap();
        let from = next;
        for piece in 0..4 {
            let rows: Vec<String> = (0..400)
                .map(|n| format!("('{topic}', 'k', CONCAT('{}', REPEAT(' ', 2000)))", from + piece * 400 + n))
                .collect();
            let insert = format!("INSERT INTO outbox (topic, `key`, payload) VALUES {}", rows.join(","));
            session.run(&insert).await.unwrap();
        }
        session.run("DELETE FROM outbox").await.unwrap();
        session.run(end).await.unwrap();
        if end == "COMMIT" {
            next += 1600;
        }
        if round == 0 {
            // In the middle of it.
            until_published_in_all(&relay, 300.0).await;
            relay.kill();
            relay = world.relay(&config);
            reads(&relay).await;
        }
    }
    if server == "mariadb" {
        session.run("SET GLOBAL log_bin_compress = 0").await.unwrap();
    }
    let mut consumer = world.consumer(&topic);
    consumer.read_until(|seen| seen.last().is_some_and(|last| last.text().trim() == "3200"));
    let mut number = 1;
    for one in consumer.seen.iter().map(|one| one.text().trim().parse::<u32>().unwrap()) {
        assert!(one <= number, "{one} came before {number}");
        number += u32::from(one == number);
    }
    assert_eq!(number, 3201);
    let peak = relay.peak_mib();
    assert!(peak < 200.0, "{peak} MiB");
    assert_eq!(relay.stop().0, Some(0));
}

async fn what_is_held_is_kept_with_its_content(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, TRANSIENT);
    world.install(&config).await;
    let mut relay = world.relay(&config);
    reads(&relay).await;
    let mut consumer = world.consumer(&topic);
    let row = async |key: &str, payload: &str| {
        let insert = "INSERT INTO outbox (topic, `key`, payload) VALUES";
        world
            .sql(&format!("BEGIN;\n{insert} ('{topic}', '{key}', {payload});\nDELETE FROM outbox;\nCOMMIT"))
            .await;
    };
    for key in ["a", "b", "c"] {
        relay.operate(&world, &["pause", "--table", "outbox", "--key", key]);
    }
    row("a", "'1'").await;
    row("a", "NULL").await;
    row("b", "REPEAT('x', 300000)").await;
    row("c", "'2'").await;
    row("d", "'3'").await;
    consumer.read(1);
    relay.until_status("/tables/0/held_events", 4).await;
    assert_eq!(world.number("SELECT COUNT(*) FROM whippet_contents").await, 4);
    // It is known again what is held, although the log may bring it once more.
    relay.kill();
    relay = world.relay(&config);
    reads(&relay).await;
    relay.until_status("/tables/0/held_events", 4).await;
    // What is skipped comes no more, once the log is stored to be read behind it.
    row("d", "'4'").await;
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "4"));
    let noted = until_stored(&world, 0).await;
    row("d", "'5'").await;
    until_stored(&world, noted).await;
    relay.operate(&world, &["skip", "--table", "outbox", "--key", "c", "--reason", "paused"]);
    relay.until_status("/tables/0/held_events", 3).await;
    relay.operate(&world, &["resume", "--table", "outbox", "--key", "a"]);
    consumer.read_until(|seen| distinct(seen) >= 5);
    relay.operate(&world, &["resume", "--table", "outbox", "--key", "b"]);
    consumer.read_until(|seen| distinct(seen) >= 6);
    world.until("SELECT COUNT(*) FROM whippet_contents", 0).await;
    assert_eq!(relay.stop().0, Some(0));
    let came: Vec<(Option<&[u8]>, usize)> = consumer
        .read_to_end()
        .iter()
        .filter(|one| one.key.as_deref() != Some(b"d"))
        .map(|one| (one.key.as_deref(), one.payload.as_ref().map_or(0, Vec::len)))
        .collect();
    assert_eq!(came, [(Some(&b"a"[..]), 1), (Some(b"a"), 0), (Some(b"b"), 300_000)]);
}

async fn rows_are_published_or_parked_whatever_their_size(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(
        &world,
        "{ name: outbox, capture: stream, rows: transient, payload: { max_bytes: 300KiB } }",
    );
    world.install(&config).await;
    let relay = world.relay(&config);
    reads(&relay).await;
    let mut session = Session::open(&world.url).await.unwrap();
    for compressed in [0, 1] {
        if server == "mysql" {
            session.run(&format!("SET SESSION binlog_transaction_compression = {compressed}")).await.unwrap();
        }
        // Above the limit, but kept; above what is kept of an event; at the limit; and two small ones around.
        for (n, payload) in
            ["'a'", "REPEAT('x', 307201)", "REPEAT('x', 4000000)", "REPEAT('x', 307200)", "'b'"]
                .into_iter()
                .enumerate()
        {
            let insert = "INSERT INTO outbox (topic, `key`, payload) VALUES";
            session.run("BEGIN").await.unwrap();
            session.run(&format!("{insert} ('{topic}', '{compressed}-{n}', {payload})")).await.unwrap();
            session.run("DELETE FROM outbox").await.unwrap();
            session.run("COMMIT").await.unwrap();
        }
        // Of other keys each: in no order.
        let came = [(0, 1), (3, 307_200), (4, 1)].map(|(n, length)| (format!("{compressed}-{n}"), length));
        let mut consumer = world.consumer(&topic);
        consumer.read_until(|seen| {
            came.iter().all(|(key, length)| {
                let is_it =
                    |one: &Seen| one.key.as_deref() == Some(key.as_bytes()) && one.text().len() == *length;
                seen.iter().any(is_it)
            })
        });
        relay.until_status("/tables/0/parked_events", 2 * (compressed + 1)).await;
    }
    let with_id = "SELECT COUNT(*) FROM whippet_holds WHERE state = 'parked' AND CHAR_LENGTH(event_id) = 36 \
                   AND reason LIKE '%bytes%'";
    world.until_within(with_id, 4, Duration::from_secs(10)).await;
    assert_eq!(relay.stop().0, Some(0));
}

/// The first table is halted, and says why.
pub async fn until_halted(relay: &Relay, why: &str) {
    let is = |status: &serde_json::Value| {
        let table = &status["tables"][0];
        table["state"] == "halted"
            && table["capture_reason"].as_str().is_some_and(|reason| reason.contains(why))
    };
    relay.until(is).await;
}
