//! Tables, columns and passwords that change while the log is followed.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    harness::{Consumer, SOON, Seen, World, service},
    stream_rows::*,
    stream_sizes::*,
};

/// Somebody who inserts one row after the other, whatever becomes of the table meanwhile.
struct Writer {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Vec<usize>>,
}

impl Writer {
    /// Rows have one key, and number `n` in key and payload where it belongs.
    fn start(world: &World, insert: &str) -> Writer {
        let (stop, insert) = (Arc::new(AtomicBool::new(false)), insert.to_owned());
        let (asked, db) = (stop.clone(), world.db.pg().clone());
        let task = tokio::spawn(async move {
            let mut inserted = Vec::new();
            for n in 0.. {
                if asked.load(Ordering::Relaxed) {
                    break;
                }
                // A column may be missing at the moment: then there is no row.
                let row = insert.replace("NUMBER", &n.to_string());
                if sqlx::raw_sql(sqlx::AssertSqlSafe(row)).execute(&db).await.is_ok() {
                    inserted.push(n);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            inserted
        });
        Writer { stop, task }
    }

    /// The numbers of all rows that were committed, in order.
    async fn stop(self) -> Vec<usize> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

/// Waits until rows come from the log: until one has come that the table never showed.
pub async fn until_the_log_is_followed(world: &World, consumer: &mut Consumer, insert_and_delete: &str) {
    let deadline = Instant::now() + SOON;
    let from_log = |seen: &[Seen]| seen.iter().filter(|one| one.text() == "only in the log").count();
    let before = from_log(consumer.read_to_end());
    loop {
        world.sql(insert_and_delete).await;
        for _ in 0..10 {
            if from_log(consumer.read_to_end()) > before {
                return;
            }
            world.pause().await;
        }
        assert!(Instant::now() < deadline, "the log is not followed again");
    }
}

/// A table whose columns change under its inserts, one change after the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_may_change_while_it_is_streamed() {
    let world = World::new("schemachange").await;
    let topic = world.create_topic("events", 1, &[]).await;
    world
        .sql(&format!(
            "CREATE TABLE outbox (seq bigserial PRIMARY KEY, id uuid DEFAULT gen_random_uuid(), topic text DEFAULT '{topic}',
               key int, type text DEFAULT 't', payload text, headers json, created_at timestamptz DEFAULT now(), unmapped text)"
        ))
        .await;
    let config = with_log(&world, "[{ name: outbox, capture: stream }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    let mut consumer = world.consumer(&topic);
    let writer = Writer::start(&world, "INSERT INTO outbox (key, payload) VALUES ('7', 'NUMBER')");
    let only_in_log = "BEGIN; INSERT INTO outbox (key, payload) VALUES ('7', 'only in the log');
        DELETE FROM outbox WHERE payload = 'only in the log'; COMMIT";
    for change in [
        "ADD more text",
        "ADD still_more text NOT NULL DEFAULT 'x'",
        "DROP unmapped",
        // Columns that may be missing.
        "RENAME type TO kind",
        "RENAME kind TO type",
        "DROP type",
        "ADD type text DEFAULT 'again'",
        "DROP created_at",
        "ADD created_at timestamptz DEFAULT now()",
        "ALTER key TYPE text",
        "ALTER key TYPE varchar(100)",
        "ALTER payload TYPE bytea USING convert_to(payload, 'UTF8')",
        "ALTER payload TYPE text USING convert_from(payload, 'UTF8')",
        "ALTER id TYPE text",
    ] {
        eprintln!("{change}");
        world.sql(&format!("ALTER TABLE outbox {change}")).await;
        until_the_log_is_followed(&world, &mut consumer, only_in_log).await;
    }
    assert_eq!(consumer.read_to_end().last().unwrap().header("eventType"), Some("again"));
    let inserted = writer.stop().await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    end(&world, relay).await;
    let seen: Vec<Seen> =
        consumer.read_to_end().iter().filter(|one| one.text() != "only in the log").cloned().collect();
    assert_eq!(first_seen(&numbers(&seen)), inserted, "nothing is lost, nothing overtakes");
    assert!(seen.iter().all(|one| one.key.as_deref() == Some(b"7")));
}

/// Numbers without their repeats.
pub fn first_seen(numbers: &[usize]) -> Vec<usize> {
    let mut seen = BTreeSet::new();
    numbers.iter().copied().filter(|n| seen.insert(*n)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_is_needed_and_goes_is_said_and_its_table_flows_when_it_is_back() {
    let world = World::new("needed").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let (_, relay) = stream_outbox(&world, "", "").await;
    let mut consumer = world.consumer(&topic);
    let writer = Writer::start(&world, &format!("{INSERT} VALUES ('{topic}', 'k', 'NUMBER')"));
    let only_in_log = format!(
        "BEGIN; {INSERT} VALUES ('{topic}', 'k', 'only in the log'); DELETE FROM outbox WHERE payload = 'only in the log'; COMMIT"
    );
    consumer.read(10);
    for (gone, back) in [
        ("RENAME payload TO body", "RENAME body TO payload"),
        ("RENAME id TO event_id", "RENAME event_id TO id"),
        ("DROP topic", &format!("ADD topic text DEFAULT '{topic}'")),
    ] {
        world.sql(&format!("ALTER TABLE outbox {gone}")).await;
        // So that there is something to read.
        let nothing = if gone == "DROP topic" {
            "INSERT INTO outbox (key) VALUES ('nothing')".to_owned()
        } else {
            format!("INSERT INTO outbox (key, topic) VALUES ('nothing', '{topic}')")
        };
        world.sql(&nothing).await;
        relay.until_status("/tables/0/state", "failing").await;
        let column = gone.split(' ').nth(1).unwrap();
        let said = format!("table outbox has no column \"{column}\"");
        relay
            .until(|status| status["tables"][0]["last_error"].as_str().is_some_and(|e| e.contains(&said)))
            .await;
        world.sql("DELETE FROM outbox WHERE key = 'nothing'").await;
        world.sql(&format!("ALTER TABLE outbox {back}")).await;
        relay.until_status("/tables/0/state", "running").await;
        until_the_log_is_followed(&world, &mut consumer, &only_in_log).await;
    }
    let inserted = writer.stop().await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    end(&world, relay).await;
    let seen: Vec<Seen> =
        consumer.read_to_end().iter().filter(|one| one.text() != "only in the log").cloned().collect();
    assert_eq!(first_seen(&numbers(&seen)), inserted);
}

/// A role of the server is this test's alone, or its password would change under others.
async fn as_role(world: &World, config: &str, password: &str) -> String {
    let name = &world.name;
    world.install(config).await;
    world
        .sql(&format!(
            "ALTER ROLE whippet_tls PASSWORD '{password}';
             GRANT ALL ON SCHEMA public, whippet TO whippet_tls; ALTER TABLE outbox OWNER TO whippet_tls;
             GRANT CREATE ON DATABASE {name} TO whippet_tls;
             GRANT ALL ON ALL TABLES IN SCHEMA whippet TO whippet_tls; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO whippet_tls"
        ))
        .await;
    let url = service("WHIPPET_TEST_PG_TLS");
    let (server, _) = url.rsplit_once('/').unwrap();
    format!("{}/{name}", server.replace("whippet_tls:whippet-tls@", "whippet_tls@"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_encrypted_and_its_password_may_change_while_it_runs() {
    let world = World::new("streamtls").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let plain = with_log(&world, "[{ name: outbox, capture: stream }]", "");
    let url = as_role(&world, &plain, "whippet-tls").await;
    let password = world.write("password", "whippet-tls\n");
    let with_ca = |ca: &str| {
        let more =
            format!("source: {{ password_file: '{password}', tls: {{ mode: verify-full, ca_file: '{ca}' }},");
        plain.replace(&world.url, &url).replace("source: {", &more)
    };
    let config = with_ca(&service("WHIPPET_TEST_PG_CA"));
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    let encrypted = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE ssl AND \
        usename = 'whippet_tls' AND backend_type = 'walsender' AND datname = current_database()";
    assert_eq!(world.number(encrypted).await, 1);
    let only_in_log =
        format!("BEGIN; {INSERT} VALUES ('{topic}', 'k', 'only in the log'); DELETE FROM outbox; COMMIT");
    let mut consumer = world.consumer(&topic);
    until_the_log_is_followed(&world, &mut consumer, &only_in_log).await;

    // Every connection is made anew.
    world.sql("ALTER ROLE whippet_tls PASSWORD 'rotated'").await;
    world.write("password", "rotated\n");
    world
        .sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'whippet_tls' AND datname = current_database()")
        .await;
    until_the_log_is_followed(&world, &mut consumer, &only_in_log).await;
    streams(&relay, [0]).await;
    assert_eq!(world.number(encrypted).await, 1);
    world.sql("ALTER ROLE whippet_tls PASSWORD 'whippet-tls'").await;
    world.write("password", "whippet-tls\n");
    let log = end(&world, relay).await;
    assert!(!log.contains("rotated"), "a password is never printed");

    // A CA of somebody else's.
    let made = std::process::Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "1",
        ])
        .args(["-subj", "/CN=somebody else", "-keyout", "/dev/null", "-out"])
        .arg(world.folder.path().join("other.crt"))
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let relay = world.relay(&with_ca(&world.folder.path().join("other.crt").display().to_string()));
    let said = relay.wait_for("invalid peer certificate");
    assert!(said.to_string().contains("source database"), "{said}");
    assert_eq!(relay.get("/readyz").0, 503);
    assert_eq!(world.number(encrypted).await, 0);
    drop(relay);
}

/// A partitioned outbox, as the one table that it is for those who insert; with partitions that come and go.
#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_outbox_is_streamed_as_one_table() {
    let world = World::new("partitioned").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config =
        with_log(&world, "[{ name: by_range, capture: stream }, { name: by_hash, capture: stream }]", "");
    let columns =
        "id uuid DEFAULT gen_random_uuid(), topic text, key text, type text, payload bytea, headers json,
        created_at timestamptz DEFAULT now()";
    world
        .sql(&format!(
            "CREATE TABLE by_range (seq bigserial PRIMARY KEY, {columns}) PARTITION BY RANGE (seq);
             CREATE TABLE r1 PARTITION OF by_range FOR VALUES FROM (0) TO (100);
             CREATE TABLE by_hash (seq bigserial PRIMARY KEY, {columns}) PARTITION BY HASH (seq);
             CREATE TABLE h0 PARTITION OF by_hash FOR VALUES WITH (MODULUS 2, REMAINDER 0);
             CREATE TABLE h1 PARTITION OF by_hash FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
        ))
        .await;
    let relay = world.relay(&config);
    streams(&relay, [0, 1]).await;
    let rows = |table: &str, from: u32, to: u32| {
        let insert = format!("INSERT INTO {table} (topic, key, payload)");
        format!(
            "{insert} SELECT '{topic}', '{table}', convert_to('' || i, 'UTF8') FROM generate_series({from}, {to}) i"
        )
    };
    // Only in the log, so that it is the log that has them.
    for (from, to, partition) in [(1, 99, 100), (100, 199, 200), (200, 299, 300)] {
        world
            .sql(&format!(
                "BEGIN; {}; {}; DELETE FROM by_range; DELETE FROM by_hash; COMMIT;
                 CREATE TABLE r{partition} PARTITION OF by_range FOR VALUES FROM ({partition}) TO ({partition} + 100)",
                rows("by_range", from, to),
                rows("by_hash", from, to),
            ))
            .await;
    }
    // With columns in another order.
    world
        .sql(&format!(
            "CREATE TABLE other_order (payload bytea, key text, seq bigint NOT NULL, headers json, type text, id uuid, created_at timestamptz, topic text);
             ALTER TABLE by_range ATTACH PARTITION other_order FOR VALUES FROM (400) TO (1000);
             SELECT setval('by_range_seq_seq', 399); {}; DROP TABLE r1",
            rows("by_range", 300, 399)
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    consumer.read(399 + 299);
    for (table, last) in [("by_range", 399), ("by_hash", 299)] {
        let key = Some(table.as_bytes());
        let seen: Vec<Seen> = consumer.seen.iter().filter(|one| one.key.as_deref() == key).cloned().collect();
        assert_eq!(numbers(&seen), (1..=last).collect::<Vec<_>>());
        world.until(&format!("SELECT count(*) FROM {table}"), 0).await;
    }
    only_the_log(&end(&world, relay).await);
}

/// One log for all of them, and what is wrong with one is its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_fails_or_is_paused_leaves_the_others_of_its_log_alone() {
    let world = World::new("onelog").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = with_log(
        &world,
        "[{ name: one, capture: stream }, { name: two, capture: stream }, { name: three, capture: auto }]",
        "",
    );
    world.install(&config).await;
    let relay = world.relay(&config);
    streams(&relay, [0, 1, 2]).await;
    let mut consumer = world.consumer(&topic);
    // They stay: the log may be read anew at any moment, since the columns of two change, and what only the log
    // has is no promise of a table whose rows stay.
    let others = |what: &str| {
        let row = |table: &str| {
            format!("INSERT INTO {table} (topic, key, payload) VALUES ('{topic}', '{table}', '{what}');")
        };
        format!("{} {}", row("one"), row("three"))
    };
    let two =
        |what: &str| format!("INSERT INTO two (topic, key, payload) VALUES ('{topic}', 'two', '{what}')");
    let has = |seen: &[Seen], key: &str, text: &str| {
        seen.iter().any(|one| one.key.as_deref() == Some(key.as_bytes()) && one.text() == text)
    };
    let others_have = |consumer: &mut Consumer, text: &str| {
        consumer.read_until(|seen| has(seen, "one", text) && has(seen, "three", text));
    };

    relay.operate(&world, &["pause", "--table", "two"]);
    relay.until_status("/tables/1/state", "paused").await;
    // More than all buffers between the log and the table.
    world
        .sql(&format!(
            "{} FROM generate_series(1, 20000)",
            two("paused").replace("VALUES (", "SELECT ").replace("')", "'")
        ))
        .await;
    // Only the log can have these: nothing has it read anew while two is paused.
    world
        .sql(&format!("BEGIN; {} DELETE FROM one; DELETE FROM three; COMMIT", others("while two is paused")))
        .await;
    others_have(&mut consumer, "while two is paused");
    assert!(!has(consumer.read_to_end(), "two", "paused"));
    relay.operate(&world, &["resume", "--table", "two"]);
    consumer.read_until(|seen| seen.iter().filter(|one| one.text() == "paused").count() == 20_000);
    streams(&relay, [1]).await;

    world.sql(&format!("{}; ALTER TABLE two RENAME payload TO body", two("before"))).await;
    world.sql(&two("failing").replace("payload", "body")).await;
    relay.until_status("/tables/1/state", "failing").await;
    streams(&relay, [0, 2]).await;
    world.sql(&others("while two fails")).await;
    others_have(&mut consumer, "while two fails");
    // The relay that starts now finds it so, and the others are streamed.
    relay.kill();
    let relay = world.relay(&config);
    streams(&relay, [0, 2]).await;
    world.sql(&others("after a start")).await;
    others_have(&mut consumer, "after a start");
    world.sql("ALTER TABLE two RENAME body TO payload").await;
    consumer.read_until(|seen| has(seen, "two", "before") && has(seen, "two", "failing"));
    streams(&relay, [0, 1, 2]).await;

    // There is no such table at all.
    world.sql("ALTER TABLE two RENAME TO elsewhere").await;
    world.sql(&two("missing").replace("INTO two", "INTO elsewhere")).await;
    relay.until_status("/tables/1/state", "failing").await;
    world.sql(&others("while two is missing")).await;
    others_have(&mut consumer, "while two is missing");
    relay.kill();
    let relay = world.relay(&config);
    streams(&relay, [0, 2]).await;
    world.sql(&others("after another start")).await;
    others_have(&mut consumer, "after another start");
    world.sql("ALTER TABLE elsewhere RENAME TO two").await;
    consumer.read_until(|seen| has(seen, "two", "missing"));
    streams(&relay, [0, 1, 2]).await;
    end(&world, relay).await;
}

/// The log says nothing about a table that is another one, or is not published any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_made_anew_or_taken_from_the_publication_flows_on() {
    let world = World::new("madeanew").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let (config, relay) = stream_outbox(&world, "", "").await;
    let mut consumer = world.consumer(&topic);
    let row = |what: &str| format!("{INSERT} VALUES ('{topic}', 'k', '{what}')");
    let only_in_log = format!("BEGIN; {}; DELETE FROM outbox; COMMIT", row("only in the log"));
    world.sql("ALTER TABLE outbox RENAME TO old").await;
    world.install(&config).await;
    world.sql(&row("made anew")).await;
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "made anew"));
    until_the_log_is_followed(&world, &mut consumer, &only_in_log).await;

    world.sql(&format!("ALTER PUBLICATION {} DROP TABLE outbox", world.name)).await;
    world.sql(&row("not published")).await;
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "not published"));
    until_the_log_is_followed(&world, &mut consumer, &only_in_log).await;
    end(&world, relay).await;
}

/// Where only the log has the rows, they are what the table was when they were inserted.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_do_not_stay_outlive_a_change_of_their_table() {
    let world = World::new("transientchange").await;
    let topic = world.create_topic("events", 1, &[]).await;
    world
        .sql(&format!(
            "CREATE TABLE outbox (seq bigserial PRIMARY KEY, id uuid DEFAULT gen_random_uuid(), topic text DEFAULT '{topic}',
               key int DEFAULT 7, type text DEFAULT 't', payload text)"
        ))
        .await;
    let config = with_log(&world, "[{ name: outbox, capture: stream, rows: transient }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    let changes = [
        "ADD unmapped text",
        "RENAME type TO kind",
        "ALTER key TYPE text",
        "ADD created_at timestamptz DEFAULT '2026-01-02 03:04:05.678+00'",
        "ALTER payload TYPE bytea USING convert_to(payload, 'UTF8')",
    ];
    let row =
        |n: usize| format!("BEGIN; INSERT INTO outbox (payload) VALUES ('{n}'); DELETE FROM outbox; COMMIT");
    for (n, change) in changes.iter().enumerate() {
        world.sql(&format!("{}; ALTER TABLE outbox {change}", row(n))).await;
    }
    world.sql(&row(changes.len())).await;
    let relay = world.relay(&config);
    let mut consumer = world.consumer(&topic);
    assert_eq!(numbers(consumer.read(6)), (0..6).collect::<Vec<_>>());
    assert!(consumer.seen.iter().all(|one| one.key.as_deref() == Some(b"7")));
    let types: Vec<_> = consumer.seen.iter().map(|one| one.header("eventType")).collect();
    assert_eq!(types, [Some("t"), Some("t"), None, None, None, None]);
    let at: Vec<_> = consumer.seen.iter().map(|one| one.timestamp == Some(LAST_TIME_MS)).collect();
    assert_eq!(at, [false, false, false, false, true, true]);
    streams(&relay, [0]).await;
    world.sql(&row(6)).await;
    assert_eq!(numbers(consumer.read(7))[6], 6);
    only_the_log(&end(&world, relay).await);
}
