//! MySQL and MariaDB as the source: the same on both, on real servers and real Kafka.

use std::time::{Duration, Instant};

use crate::{
    db::Session,
    harness::{Relay, Seen, World, calm, service, services},
    load::{Load, Plan},
    mysql_stream::{follows, streamed},
};

/// Each test once for each server.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod mariadb {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name("mariadb").await;
            })*
        }

        mod mysql9 {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name("mysql").await;
            })*
        }
    };
}
pub(crate) use on_both;

/// The same on both servers at once: tests that mostly wait.
macro_rules! on_both_at_once {
    ($($name:ident),* $(,)?) => {
        mod both {
            $(#[test]
            fn $name() {
                crate::harness::at_once(["mariadb", "mysql"], |server| super::$name(server));
            })*
        }
    };
}
pub(crate) use on_both_at_once;

on_both!(
    nothing_is_lost_and_nothing_overtakes_through_kills,
    nothing_is_lost_when_the_server_restarts_and_when_it_is_killed,
    what_is_published_is_recorded_beside_rows_that_are_not_committed,
    what_was_rolled_back_is_not_published,
    a_bad_event_parks_its_key_and_an_operator_has_all_verbs,
    keys_are_told_apart_byte_by_byte,
    a_relay_that_wakes_up_after_its_lease_changes_nothing,
    a_bad_topic_is_held_and_released_in_order,
);

on_both_at_once!(
    a_late_commit_is_published_and_stalls_nobody,
    numbers_that_begin_anew_and_numbers_of_their_own_are_found,
);

/// A database on this server.
pub async fn world(server: &str) -> World {
    World::on(&service(&format!("WHIPPET_TEST_{}", server.to_uppercase())), server).await
}

pub fn texts(seen: &[Seen]) -> Vec<&str> {
    seen.iter().map(Seen::text).collect()
}

const INSERT: &str = "INSERT INTO outbox (topic, `key`, payload, headers)";

async fn nothing_is_lost_and_nothing_overtakes_through_kills(server: &str) {
    for after in ["delete", "mark"] {
        let world = world(server).await;
        let topic = world.create_topic("events", 6, &[]).await;
        let config = world.config(&format!("[{{ name: outbox, after_publish: {after} }}]"), "");
        world.install(&config).await;
        let plan = Plan { writers: 6, keys: 300, rows: 20_000, pause_ms: 40, poison: None };
        let seed = fastrand::u64(..1_000_000) * plan.writers;
        let mut load = Load::start(&world, &topic, plan, seed).await;
        let file = world.write("whippet.yaml", &config);
        let faults = std::thread::spawn(move || {
            let mut random = fastrand::Rng::with_seed(seed);
            for _ in 0..6 {
                let relay = Relay::start(&file);
                // From before it owns the source to well into its work.
                std::thread::sleep(Duration::from_millis(random.u64(300..3_000)));
                relay.kill();
            }
            Relay::start(&file)
        });
        // A writer that meets a deadlock, or waits too long for the relay, fails.
        load.ended().await;
        let relay = tokio::task::spawn_blocking(|| faults.join().unwrap()).await.unwrap();
        world.until(pending(after), 0).await;
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        assert!(!log.contains("eadlock"), "{log}");
        let (verdict, rolled_back) = load.check(&world);
        assert!(rolled_back > 0 && verdict.pairs > 20_000);
        assert!(verdict.repeats < 7 * 20_000, "{verdict:?}");
    }
}

fn pending(after: &str) -> &'static str {
    match after {
        "mark" => "SELECT count(*) FROM outbox WHERE published_at IS NULL",
        _ => "SELECT count(*) FROM outbox",
    }
}

async fn nothing_is_lost_when_the_server_restarts_and_when_it_is_killed(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    let plan = Plan { writers: 4, keys: 100, rows: u64::MAX, pause_ms: 20, poison: None };
    let mut load = Load::start(&world, &topic, plan, fastrand::u64(..1_000_000) * plan.writers).await;
    let mut rows = 2_000;
    for verb in ["restart", "kill"] {
        while load.written() < rows {
            world.pause().await;
        }
        let name = server.to_owned();
        let fault = move || {
            services(verb, &name);
            services("up", &name);
        };
        tokio::task::spawn_blocking(fault).await.unwrap();
        rows = load.written() + 2_000;
    }
    while load.written() < rows {
        world.pause().await;
    }
    load.stop();
    load.ended().await;
    world.until(pending("delete"), 0).await;
    assert_eq!(relay.stop().0, Some(0));
    load.check(&world);
}

async fn a_late_commit_is_published_and_stalls_nobody(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = calm(&world.config("[{ name: outbox }]", ""));
    world.install(&config).await;
    let relay = world.relay(&config);
    let mut late = Session::open(&world.url).await.unwrap();
    late.run("BEGIN").await.unwrap();
    late.run(&format!("{INSERT} VALUES ('{topic}', 'late', '0', NULL)")).await.unwrap();
    // Its start is not what is measured.
    let mut consumer = world.consumer(&topic);
    let mut sent = 1;
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'others', '{sent}', NULL)")).await;
    consumer.read(sent);
    let (began, mut slowest) = (Instant::now(), Duration::ZERO);
    // Longer than anything that is looked at once in a while.
    while began.elapsed() < Duration::from_secs(12) {
        let before = Instant::now();
        sent += 1;
        world.sql(&format!("{INSERT} VALUES ('{topic}', 'others', '{sent}', NULL)")).await;
        consumer.read(sent);
        slowest = slowest.max(before.elapsed());
    }
    late.run("COMMIT").await.unwrap();
    let seen = consumer.read(sent + 1);
    assert_eq!(seen.last().unwrap().key.as_deref(), Some(&b"late"[..]));
    assert!(slowest < Duration::from_secs(2), "the slowest took {slowest:?}");
    eprintln!("{sent} events went by while one waited, the slowest in {slowest:?}");
    let (_, log) = relay.stop();
    assert!(!log.contains("\"ERROR\""), "{log}");
    assert_eq!(consumer.read_to_end().len(), sent + 1, "nothing is published twice");
}

/// A list of rows is found row by row, and a run of them ends with its last row, however few there are beside them.
async fn what_is_published_is_recorded_beside_rows_that_are_not_committed(server: &str) {
    for (after, log) in [("delete", false), ("mark", false), ("delete", true)] {
        let world = world(server).await;
        let topic = world.create_topic("events", 3, &[]).await;
        let table = format!("{{ name: outbox, after_publish: {after} }}");
        let config = if log { streamed(&world, &table) } else { world.config(&format!("[{table}]"), "") };
        let config = calm(&config);
        world.install(&config).await;
        let relay = world.relay(&config);
        // Its start is not what is measured.
        relay.wait_for("this relay owns the source");
        if log {
            follows(&relay).await;
        }
        let mut late = Session::open(&world.url).await.unwrap();
        let insert = |rows: usize| {
            let rows: Vec<String> = (0..rows).map(|n| format!("('{topic}', 'k{n}', '{n}', NULL)")).collect();
            format!("{INSERT} VALUES {}", rows.join(","))
        };
        for rows in [10, 999, 1_000, 2_000] {
            late.run("BEGIN").await.unwrap();
            late.run(&insert(1)).await.unwrap();
            world.sql(&insert(rows)).await;
            late.run(&insert(1)).await.unwrap();
            world.until_within(pending(after), 0, Duration::from_secs(5)).await;
            late.run("COMMIT").await.unwrap();
        }
        world.until(pending(after), 0).await;
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        assert!(!log.contains("lease is lost"), "{log}");
    }
}

async fn what_was_rolled_back_is_not_published(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let _relay = world.relay(&config);
    let mut session = Session::open(&world.url).await.unwrap();
    let insert = |n: u32| format!("{INSERT} VALUES ('{topic}', 'k', '{n}', NULL)");
    let mut run = async |statement: &str| session.run(statement).await.unwrap();
    run("BEGIN").await;
    run(&insert(1)).await;
    run("ROLLBACK").await;
    run("BEGIN").await;
    run(&insert(2)).await;
    run("SAVEPOINT here").await;
    run(&insert(3)).await;
    run("ROLLBACK TO SAVEPOINT here").await;
    run(&insert(4)).await;
    run("COMMIT").await;
    let mut consumer = world.consumer(&topic);
    assert_eq!(texts(consumer.read(2)), ["2", "4"]);
    world.until(pending("delete"), 0).await;
    assert_eq!(texts(consumer.read_to_end()), ["2", "4"]);
}

async fn a_bad_event_parks_its_key_and_an_operator_has_all_verbs(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let until_old = world.config("[{ name: outbox, after_publish: mark, retention: { published: 1s } }]", "");
    let config = until_old.replace(", retention: { published: 1s }", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    let insert = async |key: &str, payload: &str, headers: &str| {
        world.sql(&format!("{INSERT} VALUES ('{topic}', '{key}', '{payload}', {headers})")).await;
    };
    for (payload, headers) in [("1", "'[7]'"), ("2", "NULL"), ("3", "NULL")] {
        insert("bad", payload, headers).await;
    }
    relay.until_status("/tables/0/parked_events", 3).await;
    insert("good", "good", "NULL").await;
    let mut consumer = world.consumer(&topic);
    assert_eq!(texts(consumer.read(1)), ["good"], "another key flows");
    let listed = relay.operate(&world, &["parked", "--reason", "not a JSON object"]);
    let id = listed["parked"][0]["id"].as_str().unwrap().to_owned();
    let shown = relay.operate(&world, &["parked", "--id", &id, "--payload"]);
    assert_eq!(shown["parked"][0]["payload"], "1");
    assert!(shown["parked"][0]["since"].as_str().unwrap().ends_with('Z'), "{shown}");
    assert!(shown["parked"][0]["age_seconds"].as_f64().unwrap() < 60.0, "{shown}");
    assert_eq!(relay.operate(&world, &["redrive", "--key", "bad", "--dry-run"])["events"], 3);
    world.sql("UPDATE outbox SET headers = NULL").await;
    // A restart keeps what is held.
    relay.kill();
    let relay = world.relay(&config);
    relay.until_status("/tables/0/parked_events", 3).await;
    assert_eq!(relay.operate(&world, &["redrive", "--key", "bad"])["events"], 3);
    assert_eq!(texts(consumer.read(4)), ["good", "1", "2", "3"]);
    insert("worse", "x", "'7'").await;
    insert("worse", "4", "NULL").await;
    relay.until_status("/tables/0/parked_events", 2).await;
    let listed = relay.operate(&world, &["parked", "--reason", "rejected"]);
    let id = listed["parked"][0]["id"].as_str().unwrap().to_owned();
    relay.operate(&world, &["skip", "--id", &id, "--reason", "test"]);
    consumer.read(5);
    relay.operate(&world, &["pause", "--topic", &topic]);
    insert("k", "5", "NULL").await;
    relay.until_status("/tables/0/held_events", 1).await;
    relay.operate(&world, &["resume", "--topic", &topic]);
    consumer.read(6);
    let replayed = relay.operate(&world, &["replay", "--from", "2", "--to", "3"]);
    assert_eq!(replayed["events"], 2);
    consumer.read(8);
    assert_eq!(texts(consumer.read_to_end()), ["good", "1", "2", "3", "4", "5", "2", "3"]);
    assert!(consumer.seen[7].header("whippet-replay").is_some());
    let audited =
        "SELECT group_concat(action ORDER BY id) = 'redrive,skip,pause,resume,replay' FROM whippet_audit";
    assert_eq!(world.number(audited).await, 1);
    // What is parked stays when the others have gone for their age.
    assert_eq!(relay.stop().0, Some(0));
    let relay = world.relay(&until_old);
    insert("bad", "6", "'[7]'").await;
    world.until("SELECT count(*) FROM outbox", 1).await;
    relay.until_status("/tables/0/parked_events", 1).await;
    assert_eq!(relay.stop().0, Some(0));
}

/// A collation takes these for one; keys are bytes.
async fn keys_are_told_apart_byte_by_byte(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!("{INSERT} VALUES ('{topic}', 'key', 'bad', '7'), ('{topic}', 'key', 'behind', NULL)"))
        .await;
    relay.until_status("/tables/0/parked_events", 2).await;
    let others = ["KEY", "key ", "kéy", "🐕"];
    for key in others {
        world.sql(&format!("{INSERT} VALUES ('{topic}', '{key}', '{key}', NULL)")).await;
    }
    let mut consumer = world.consumer(&topic);
    assert_eq!(texts(consumer.read(4)), others);
    assert_eq!(relay.operate(&world, &["redrive", "--key", "KEY"])["events"], 0);
    relay.kill();
    let relay = world.relay(&config);
    world
        .sql(&format!("{INSERT} VALUES ('{topic}', 'Key', 'Key', NULL), ('{topic}', 'key', 'too', NULL)"))
        .await;
    relay.until_status("/tables/0/parked_events", 3).await;
    // The kill may have repeated some.
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "Key"));
    assert!(!texts(consumer.read_to_end()).contains(&"too"));
}

/// One that stands still in the middle of one has its locks until its connection ends (`waits.rs`).
async fn stop_between_transactions(world: &World, relay: &Relay) {
    let open = "SELECT count(*) FROM information_schema.innodb_trx t JOIN information_schema.processlist p \
                ON p.id = t.trx_mysql_thread_id WHERE p.db = DATABASE() AND t.trx_rows_modified > 0";
    loop {
        relay.signal("STOP");
        // What the server tells of transactions is made anew 100 ms after somebody has asked; a statement that it was sent
        // has ended by then.
        tokio::time::sleep(Duration::from_millis(200)).await;
        if world.number(open).await == 0 {
            return;
        }
        relay.signal("CONT");
    }
}

async fn a_relay_that_wakes_up_after_its_lease_changes_nothing(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let zombie = world.relay(&config);
    zombie.wait_for("this relay owns the source");
    let mut consumer = world.consumer(&topic);
    let batch = |from: u32| {
        let rows: Vec<String> =
            (from..from + 2_000).map(|n| format!("('{topic}', 'k', '{n}', NULL)")).collect();
        format!("{INSERT} VALUES {}", rows.join(","))
    };
    for round in 0..3 {
        let before = consumer.read_to_end().len();
        world.sql(&batch(round * 4_000 + 1)).await;
        consumer.read(before + 50);
        stop_between_transactions(&world, &zombie).await;
        let heir = Relay::start(&world.write("heir.yaml", &config));
        world.sql(&batch(round * 4_000 + 2_001)).await;
        world.until(pending("delete"), 0).await;
        zombie.signal("CONT");
        heir.stop();
        world.until("SELECT count(*) FROM whippet_members WHERE expires_at > UTC_TIMESTAMP(6)", 1).await;
    }
    let mut last = 0;
    for record in consumer.read_to_end() {
        let n: u32 = record.text().parse().unwrap();
        assert!(n <= last + 1, "{n} overtook {}", last + 1);
        last = last.max(n);
    }
    assert_eq!(last, 12_000);
    let epoch = world.number("SELECT max(epoch) FROM whippet_members").await;
    assert!(epoch >= 7, "{epoch}");
}

async fn numbers_that_begin_anew_and_numbers_of_their_own_are_found(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let _relay = world.relay(&config);
    let mut consumer = world.consumer(&topic);
    let insert = |n: u32| format!("INSERT INTO outbox (seq, topic, payload) VALUES ({n}, '{topic}', '{n}')");
    // What was published leaves no trace but in the relay.
    for n in [10, 11, 12] {
        world.sql(&insert(n)).await;
        consumer.read(n as usize - 9);
        world.until(pending("delete"), 0).await;
    }
    world.sql(&insert(5)).await;
    assert_eq!(consumer.read(4)[3].text(), "5");
    world.sql(&insert(11)).await;
    assert_eq!(consumer.read(5)[4].text(), "11");
    world.until(pending("delete"), 0).await;
    world.sql("TRUNCATE TABLE outbox").await;
    for n in 1..=20 {
        world.sql(&format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', 'again {n}')")).await;
    }
    consumer.read(25);
    world.until(pending("delete"), 0).await;
}

async fn a_bad_topic_is_held_and_released_in_order(server: &str) {
    let world = world(server).await;
    let there = world.create_topic("there", 4, &[]).await;
    let later = world.topic("later");
    let config = world.config("[{ name: outbox, retry: { max: 1s } }]", "limits: { in_flight_events: 1000 }");
    world.install(&config).await;
    let relay = world.relay(&config);
    let rows: Vec<String> = (1..=6_000)
        .map(|n| format!("('{}', 'k{}', '{n}', NULL)", if n % 2 == 0 { &later } else { &there }, n % 14))
        .collect();
    for some in rows.chunks(1_000) {
        world.sql(&format!("{INSERT} VALUES {}", some.join(","))).await;
    }
    world.consumer(&there).read(3_000);
    world.until("SELECT count(*) FROM whippet_holds WHERE state = 'held' AND cause = 'topic'", 3_000).await;
    relay.kill();
    let _relay = world.relay(&config);
    world.sql(&format!("{INSERT} VALUES ('{later}', 'k0', 'last', NULL)")).await;
    world.create_topic("later", 4, &[]).await;
    let mut consumer = world.consumer(&later);
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "last"));
    world.until(pending("delete"), 0).await;
    world.until("SELECT count(*) FROM whippet_holds", 0).await;
    let seen = consumer.read_to_end();
    for key in 0..7 {
        let name = format!("k{}", 2 * key);
        let of_key = seen.iter().filter(|one| one.key.as_deref() == Some(name.as_bytes()));
        let mut numbers: Vec<u32> = of_key.filter_map(|one| one.text().parse().ok()).collect();
        assert!(numbers.is_sorted(), "key {name}: {numbers:?}");
        numbers.dedup();
        assert_eq!(numbers.len(), (1..=6_000).filter(|n| n % 14 == 2 * key).count());
    }
}
