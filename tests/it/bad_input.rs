//! What is wrong is said with table, row and cure; nothing is lost, and nothing crash-loops.

use crate::harness::{World, kafka};

const INSERT: &str = "INSERT INTO outbox (topic, key, payload, headers)";

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_row_parks_its_key_and_everything_else_flows() {
    let world = World::new("badrow").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "{INSERT} VALUES ('{topic}', 'good', '1', NULL), ('{topic}', 'bad', '1', '[\"secret\"]'), ('{topic}', 'bad', '2', NULL),
             ('no such/topic', 'x', '1', NULL), ('{topic}', NULL, 'keyless', '7'), ('{topic}', NULL, 'keyless too', NULL),
             ('{topic}', 'good', '2', NULL)"
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    consumer.read(3);
    // The bad one, the one behind it, the illegal topic, the bad one without a key.
    world.until("SELECT count(*) FROM whippet.holds", 4).await;
    world.until("SELECT count(*) FROM outbox", 4).await;
    let mut good: Vec<&str> = consumer.seen.iter().map(super::harness::Seen::text).collect();
    good.sort_unstable();
    assert_eq!(good, ["1", "2", "keyless too"]);

    let line = relay.wait_for("\"place\":\"2\"");
    assert_eq!(line["table"], "outbox");
    assert!(
        line["reason"].as_str().is_some_and(|reason| reason.contains("column headers is not a JSON object"))
    );
    assert!(line["id"].as_str().is_some_and(|id| id.len() == 36), "{line}");
    relay.wait_for("is not a legal topic name");
    assert!(!relay.log().contains("secret"), "headers are never logged");
    relay.until_status("/tables/0/parked_events", 4).await;
    let status = relay.status();
    assert_eq!(status["tables"][0]["parked_keys"], 2);
    assert!(status["tables"][0]["last_error"].is_string());
    assert_eq!(relay.metric("whippet_parked_keys", "outbox"), 2.0);
    assert_eq!(relay.metric("whippet_publish_failures_total", "rejected"), 3.0);
    assert_eq!(
        world.number("SELECT count(*) FROM whippet.holds WHERE cause = 'behind' AND key = 'bad'").await,
        1
    );

    // A restart remembers: what follows in the key is held, the rest flows.
    relay.kill();
    let relay = world.relay(&config);
    world
        .sql(&format!("{INSERT} VALUES ('{topic}', 'bad', '3', NULL), ('{topic}', 'good', '3', NULL)"))
        .await;
    consumer.read_until(|seen| seen.iter().any(|record| record.payload.as_deref() == Some(b"3")));
    world.until("SELECT count(*) FROM whippet.holds", 5).await;
    assert!(consumer.read_to_end().iter().all(|record| record.key.as_deref() != Some(b"bad")));
    relay.until_status("/tables/0/parked_keys", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_not_there_parks_the_key_and_costs_nobody_else_anything() {
    let world = World::new("badpartition").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = world.config("[{ name: outbox, columns: { partition: part } }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload, part) VALUES ('{topic}', 'good', '1', 2), ('{topic}', 'bad', '1', 3), ('{topic}', 'good', '2', 2)"
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    assert!(consumer.read(2).iter().all(|record| record.partition == 2));
    world
        .until("SELECT count(*) FROM whippet.holds WHERE reason LIKE '%has 3 partition(s)%number 3%'", 1)
        .await;
    assert!(!relay.log().contains("rebuilt"), "{}", relay.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_most_that_may_be_held_the_table_halts_and_says_so() {
    let world = World::new("halt").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox, hold: { max_events: 3 } }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world.sql(&format!("{INSERT} SELECT '{topic}', 'bad', 'x', '7' FROM generate_series(1, 4)")).await;
    relay.wait_for("the table halts");
    relay.until_status("/tables/0/state", "halted").await;
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'good', 'x', NULL)")).await;
    // Measured every few seconds, by another task than the poller.
    relay.until_status("/tables/0/pending", 1).await;
    assert_eq!(world.number("SELECT count(*) FROM outbox").await, 5, "nothing is lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_table_or_column_is_said_and_taken_up_when_it_is_there() {
    let world = World::new("missing").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    let relay = world.relay(&config);
    let said = relay.wait_for("table outbox does not exist");
    assert!(said.to_string().contains("whippet sql"), "{said}");
    relay.until_status("/tables/0/state", "failing").await;
    assert_eq!(relay.get("/readyz").0, 200, "ready: the database was reached");
    world.sql("CREATE TABLE outbox (seq bigserial PRIMARY KEY, id uuid, topic text, body text)").await;
    let said = relay.wait_for("table outbox has no column");
    assert!(said.to_string().contains("payload") && said.to_string().contains("body"), "{said}");
    world.sql("ALTER TABLE outbox RENAME body TO payload").await;
    world
        .sql(&format!("INSERT INTO outbox (id, topic, payload) VALUES (gen_random_uuid(), '{topic}', 'x')"))
        .await;
    world.consumer(&topic).read(1);
    assert!(relay.log().lines().count() < 100, "it does not flood the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_rights_and_a_wrong_password_are_said_and_mended_without_a_restart() {
    let world = World::new("rights").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let as_owner = world.config("[{ name: public.outbox }]", "");
    world.install(&as_owner).await;
    world.sql("REVOKE ALL ON ALL TABLES IN SCHEMA public, whippet FROM whippet_pw; REVOKE ALL ON SCHEMA whippet FROM whippet_pw").await;

    let password = world.write("password", "wrong\n");
    let url = world.url.replace("postgres@", "whippet_pw@");
    let config = world
        .config_for(&url, &kafka(), "[{ name: public.outbox }]", "")
        .replace("source: {", &format!("source: {{ password_file: '{password}',"));
    let relay = world.relay(&config);
    relay.wait_for("password authentication failed");
    assert_eq!(relay.get("/readyz").0, 503);
    assert_eq!(relay.get("/livez").0, 200, "it waits, it does not crash");
    world.write("password", "whippet-pw\n");
    relay.wait_for("permission denied for schema whippet");
    world
        .sql("GRANT USAGE ON SCHEMA whippet TO whippet_pw; GRANT ALL ON ALL TABLES IN SCHEMA whippet TO whippet_pw")
        .await;
    relay.wait_for("permission denied for table outbox");
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', 'x', NULL)")).await;
    world.sql("GRANT SELECT, DELETE ON outbox TO whippet_pw").await;
    world.consumer(&topic).read(1);
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert!(!relay.log().contains("whippet-pw"), "a password is never printed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_database_or_broker_at_start_is_waited_for() {
    let world = World::new("unreachable").await;
    let config = world.config_for("postgres://nobody@127.0.0.1:1/x", &kafka(), "[{ name: outbox }]", "");
    let relay = world.relay(&config);
    let said = relay.wait_for("cannot reach the source database");
    assert!(said["error"].as_str().unwrap().contains("refused"), "{said}");
    assert_eq!((relay.get("/readyz").0, relay.get("/livez").0), (503, 200));
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");

    let config = world.config_for(&world.url, "127.0.0.1:1", "[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world.sql(&format!("{INSERT} VALUES ('somewhere', 'k', 'x', NULL)")).await;
    let said = relay.wait_for("kafka topic cannot be written to");
    assert!(said["cure"].as_str().unwrap().contains("kafka.bootstrap_servers"), "{said}");
    assert_eq!(relay.get("/readyz").0, 200, "readiness is not Kafka's health");
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("stays in the outbox"), "{log}");
    assert_eq!(world.number("SELECT count(*) FROM outbox").await, 1);
}

/// Whoever looks at the status sees what is wrong now, and since when; not what was wrong last week.
#[tokio::test(flavor = "multi_thread")]
async fn the_error_of_a_table_that_is_mended_is_gone() {
    let world = World::new("mended").await;
    let tables = "[{ name: outbox, columns: { key: at }, retry: { max: 1s } }, { name: late }]";
    let config = world.config(tables, "");
    world.install(&world.config("[{ name: outbox }]", "")).await;
    // It is found, and cannot be read.
    world
        .sql(
            "ALTER TABLE outbox RENAME TO written;
             CREATE VIEW outbox AS SELECT *, 1 / (seq - seq) AS at FROM written;
             INSERT INTO written (topic) VALUES ('none')",
        )
        .await;
    let relay = world.relay(&config);
    for (table, says) in [(0, "division by zero"), (1, "table late does not exist")] {
        relay
            .until(|status| {
                let table = &status["tables"][table];
                let said = table["last_error"].as_str().unwrap_or_default();
                table["state"] == "failing" && said.contains(says) && table["last_error_at"].is_string()
            })
            .await;
    }
    // Each try waits for longer than the last, although the table is looked at and found good each time.
    let tried = |line: &str| line.contains("division by zero") && line.contains("\"attempt\":4");
    relay.until(|_| relay.log().lines().any(tried)).await;
    world.sql("DELETE FROM written").await;
    world.install(&world.config("[{ name: late }]", "")).await;
    for table in [0, 1] {
        relay
            .until(|status| {
                let table = &status["tables"][table];
                table["state"] == "running"
                    && table["last_error"].is_null()
                    && table["last_error_at"].is_null()
            })
            .await;
    }
}
