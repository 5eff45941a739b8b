//! What ends the reading of a log that alone has the rows: it is said, with what lets it go on, and nothing is passed
//! by in silence.

use std::time::{Duration, Instant};

use crate::{
    db::Session,
    harness::{Consumer, Relay, SOON, World},
    mysql::{on_both, world},
    mysql_stream::{batch, end_readers, streamed},
    mysql_stream_faults::{distinct, in_order},
    mysql_transient::{TRANSIENT, pass, reads, until_halted, until_stored},
};

on_both!(
    a_log_that_was_purged_halts_the_table,
    a_log_that_has_begun_anew_halts_the_table,
    a_change_that_is_told_as_a_statement_halts_the_table,
    what_is_prepared_halts_the_table_until_it_is_given_up,
    columns_that_the_log_does_not_have_halt_the_table_until_they_are_back,
    a_halted_table_stops_no_table_whose_rows_stay,
);

async fn begun(server: &str) -> (World, String, String, Relay, Consumer) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, TRANSIENT);
    world.install(&config).await;
    let relay = world.relay(&config);
    reads(&relay).await;
    pass(&world, &topic, 1, 10).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(10);
    (world, topic, config, relay, consumer)
}

/// The statement that a halted table tells, except while it looks again.
async fn cure(relay: &Relay, word: &str) -> String {
    let deadline = Instant::now() + SOON;
    loop {
        let status = relay.status();
        let reason = status["tables"][0]["capture_reason"].as_str().unwrap_or_default();
        if let Some(at) = reason.find(word) {
            return reason[at..].split(" has the relay").next().unwrap_or_default().to_owned();
        }
        assert!(Instant::now() < deadline, "no {word} in {status}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn a_log_that_was_purged_halts_the_table(server: &str) {
    let (world, topic, config, relay, mut consumer) = begun(server).await;
    assert_eq!(relay.stop().0, Some(0));
    pass(&world, &topic, 11, 20).await;
    world.sql("FLUSH BINARY LOGS").await;
    // A file that is being read is not purged, nor one that has only just ended.
    let mut session = Session::open(&world.url).await.unwrap();
    while session.rows("SHOW BINARY LOGS").await > 1 {
        end_readers(&world).await;
        session.run("PURGE BINARY LOGS BEFORE NOW() + INTERVAL 1 DAY").await.unwrap();
    }
    let relay = world.relay(&config);
    until_halted(&relay, "purged").await;
    pass(&world, &topic, 21, 30).await;
    // Not by itself, however long.
    let relay = {
        relay.kill();
        world.relay(&config)
    };
    until_halted(&relay, "purged").await;
    world.sql(&cure(&relay, "DELETE FROM").await).await;
    reads(&relay).await;
    pass(&world, &topic, 11, 15).await;
    consumer.read(15);
    in_order(&consumer.seen, 15);
    assert_eq!(relay.stop().0, Some(0));
}

async fn a_log_that_has_begun_anew_halts_the_table(server: &str) {
    let (world, topic, config, mut relay, mut consumer) = begun(server).await;
    let reset = if server == "mysql" { "RESET BINARY LOGS AND GTIDS" } else { "RESET MASTER" };
    let noted = until_stored(&world, 0).await;
    for running in [true, false] {
        let still = if running {
            Some(relay)
        } else {
            until_stored(&world, noted).await;
            // Files are told apart by the second in which they were made.
            world.until("SELECT COUNT(*) FROM whippet_binlog WHERE made < UNIX_TIMESTAMP()", 1).await;
            relay.kill();
            None
        };
        world.sql(reset).await;
        // Its numbers come as far again, and further.
        for _ in 0..60 {
            world.sql("CREATE TABLE IF NOT EXISTS other (n int);\nINSERT INTO other VALUES (1)").await;
        }
        pass(&world, &topic, 500, 510).await;
        relay = still.unwrap_or_else(|| world.relay(&config));
        until_halted(&relay, "begun anew").await;
        world.sql(&cure(&relay, "DELETE FROM").await).await;
        reads(&relay).await;
        let next = consumer.seen.len() as u32 + 1;
        pass(&world, &topic, next, next + 9).await;
        consumer.read(next as usize + 9);
    }
    in_order(&consumer.seen, 30);
    assert_eq!(relay.stop().0, Some(0));
}

async fn a_change_that_is_told_as_a_statement_halts_the_table(server: &str) {
    let (world, topic, _, relay, mut consumer) = begun(server).await;
    let mut session = Session::open(&world.url).await.unwrap();
    session.run("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    session.run("SET SESSION binlog_format = 'STATEMENT'").await.unwrap();
    session.run(&batch(&topic, 500, 501)).await.unwrap();
    pass(&world, &topic, 11, 20).await;
    until_halted(&relay, "told as a statement").await;
    // What came before it is not published again each time that it is looked at.
    let published = relay.metric("whippet_events_published_total", "outbox");
    relay.wait_for_nth("a transaction of the binlog cannot be read", 1);
    assert!((published - 10.0).abs() < 0.5, "{published}");
    world.sql(&cure(&relay, "UPDATE").await).await;
    reads(&relay).await;
    consumer.read(20);
    in_order(&consumer.seen, 20);
    assert_eq!(relay.stop().0, Some(0));
}

async fn what_is_prepared_halts_the_table_until_it_is_given_up(server: &str) {
    let (world, topic, _, relay, mut consumer) = begun(server).await;
    world.sql("CREATE TABLE other (n int)").await;
    let xa = async |name: &str, statement: &str, end: &str| {
        let mut session = Session::open(&world.url).await.unwrap();
        session.run(&format!("XA START '{name}'")).await.unwrap();
        session.run(statement).await.unwrap();
        session.run(&format!("XA END '{name}'")).await.unwrap();
        session.run(&end.replace("NAME", &format!("'{name}'"))).await.unwrap();
        session
    };
    let name = |n: u32| format!("{}-{n}", world.name);
    // At once; and of other tables.
    drop(xa(&name(1), &batch(&topic, 11, 12), "XA COMMIT NAME ONE PHASE").await);
    let mut session = xa(&name(2), "INSERT INTO other VALUES (1)", "XA PREPARE NAME").await;
    session.run(&format!("XA COMMIT '{}'", name(2))).await.unwrap();
    pass(&world, &topic, 13, 20).await;
    consumer.read(20);
    let mut session = xa(&name(3), &batch(&topic, 500, 501), "XA PREPARE NAME").await;
    until_halted(&relay, "XA transaction").await;
    session.run(&format!("XA COMMIT '{}'", name(3))).await.unwrap();
    world.sql(&cure(&relay, "UPDATE").await).await;
    reads(&relay).await;
    pass(&world, &topic, 21, 30).await;
    consumer.read(30);
    in_order(&consumer.seen, 30);
    assert_eq!(relay.stop().0, Some(0));
}

async fn columns_that_the_log_does_not_have_halt_the_table_until_they_are_back(server: &str) {
    let (world, topic, config, relay, mut consumer) = begun(server).await;
    // Others come and go, and it is read on.
    for (n, change) in
        ["ADD COLUMN more VARCHAR(40) FIRST", "MODIFY payload MEDIUMBLOB AFTER seq", "DROP COLUMN more"]
            .into_iter()
            .enumerate()
    {
        world.sql(&format!("ALTER TABLE outbox {change}")).await;
        pass(&world, &topic, 11 + n as u32, 11 + n as u32).await;
    }
    consumer.read(13);
    assert_eq!(relay.stop().0, Some(0));
    // Rows of before, read after.
    pass(&world, &topic, 14, 14).await;
    world.sql("ALTER TABLE outbox CHANGE topic target VARCHAR(249), ADD COLUMN topic VARCHAR(249)").await;
    let relay = world.relay(&config);
    consumer.read(14);
    pass(&world, &topic, 15, 15).await;
    consumer.read(15);
    assert_eq!(relay.stop().0, Some(0));
    world.sql("ALTER TABLE outbox MODIFY payload LONGTEXT CHARACTER SET utf8mb4").await;
    pass(&world, &topic, 16, 16).await;
    world.sql("ALTER TABLE outbox RENAME COLUMN payload TO body, ADD COLUMN payload BIGINT").await;
    let relay = world.relay(&config);
    until_halted(&relay, "other names or types").await;
    world.sql("ALTER TABLE outbox DROP COLUMN payload, RENAME COLUMN body TO payload").await;
    reads(&relay).await;
    pass(&world, &topic, 17, 17).await;
    consumer.read_until(|seen| distinct(seen) >= 17);
    in_order(&consumer.seen, 17);
    assert_eq!(relay.stop().0, Some(0));
}

async fn a_halted_table_stops_no_table_whose_rows_stay(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, &format!("{TRANSIENT}, {{ name: kept, capture: auto }}"));
    world.install(&config).await;
    let relay = world.relay(&config);
    reads(&relay).await;
    relay.until_status("/tables/1/capture_reason", "the log is read").await;
    let mut session = Session::open(&world.url).await.unwrap();
    session.run("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    session.run("SET SESSION binlog_format = 'STATEMENT'").await.unwrap();
    session.run(&batch(&topic, 500, 501)).await.unwrap();
    until_halted(&relay, "told as a statement").await;
    world.sql(&batch(&topic, 1, 10).replace("outbox", "kept")).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(10);
    in_order(&consumer.seen, 10);
    world.until("SELECT count(*) FROM kept", 0).await;
    assert_eq!(relay.status()["tables"][1]["state"], "running");
    relay.kill();
}
