//! Faults of the process itself: nobody reads what it logs, and a panic.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use crate::harness::{Relay, World};

/// As of `whippet run 2>&1 | head`, or of a collector that died.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_any_more_stops_nothing() {
    let world = World::new("nolog").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "log: { level: debug }");
    world.install(&config).await;
    let mut relay = Command::new(env!("CARGO_BIN_EXE_whippet"))
        .args(["run", "--config", &world.write("whippet.yaml", &config)])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::new(relay.stderr.take().unwrap()).read_line(&mut first).unwrap();
    assert!(first.contains("timestamp"), "{first}");
    world.sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', '1')")).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let id = relay.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    assert_eq!(relay.wait().unwrap().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_of_its_own_ends_a_relay_and_the_next_start_goes_on() {
    let world = World::new("panic").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    world.sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', '1')")).await;
    let file = world.write("whippet.yaml", &config);
    let relay = Relay::start_with(&file, &[("FAILPOINTS", "read=panic")]);
    relay.wait_for("a fault of whippet's own");
    assert_eq!(relay.ended().code(), Some(1));
    let _relay = Relay::start(&file);
    assert_eq!(world.consumer(&topic).read(1)[0].text(), "1");
}
