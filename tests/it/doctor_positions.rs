//! What `whippet doctor` says of exactly-once delivery: each FAIL broken on purpose, and mended by what it printed.

use serde_json::Value;

use crate::{
    doctor_fixes::{fails, fails_once, fix, is_green, shell, without_tls},
    exactly_once::{LEFT, exactly},
    harness::{World, calm, kafka, services, services_with},
};

const CHECK: &str = "kafka: positions";

fn run(world: &World, command: &str) {
    let status = shell(world, command).wait().unwrap();
    assert!(status.success(), "{command}: {status}");
}

/// What mends the only FAIL, once that is such a command.
fn fix_once(config: &str, wanted: impl Fn(&str) -> bool) -> String {
    let is_wanted =
        |fails: &[Value]| matches!(fails, [fail] if fail["fix"]["shell"].as_str().is_some_and(&wanted));
    let fails = fails_once(config, is_wanted);
    assert!(is_wanted(&fails), "{fails:#?}");
    assert_eq!(fails[0]["check"], CHECK);
    fails[0]["fix"]["shell"].as_str().unwrap().to_owned()
}

/// Undone at the end, whatever happens: other tests have the same broker.
struct Undo<'a>(&'a World, String);

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        shell(self.0, &self.1).wait().ok();
    }
}

/// A source that publishes exactly once, and its configuration for a topic of positions.
async fn source(name: &str) -> (World, String) {
    let world = World::new(name).await;
    let text = without_tls(&exactly(&world, &world.config("[{ name: outbox }]", ""), "exactly_once"));
    let text = calm(&text);
    world.install(&text).await;
    (world, text)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_unfit_for_positions() {
    let (world, text) = source("fix_eos").await;
    let config = world.write("whippet.yaml", &text);
    let name = world.topic("positions");
    // The relay would make it.
    is_green(&config);
    // It deletes what is old, and more brokers are to have a record than there are.
    world.create_topic("positions", 1, &[("min.insync.replicas", "2")]).await;
    let found = fails_once(&config, |fails| fails.len() == 2);
    assert_eq!(found.len(), 2, "{found:#?}");
    for one in &found {
        assert_eq!(one["check"], CHECK);
        run(&world, one["fix"]["shell"].as_str().unwrap());
    }
    is_green(&config);
    // One of three partitions, and the name of one that is fit.
    let wide = world.create_topic("wide", 3, &[("cleanup.policy", "compact")]).await;
    let wrong = world.write("wide.yaml", &text.replace(&name, &wide));
    assert!(fix(&wrong, CHECK, "config").starts_with("kafka.position_topic: (a topic of one partition"));
    // The topic in which Kafka keeps its transactions can have the same fault.
    let alter = format!(
        "kafka-configs.sh --bootstrap-server {} --alter --entity-type topics --entity-name __transaction_state",
        kafka()
    );
    let _undo = Undo(&world, format!("{alter} --add-config min.insync.replicas=1"));
    run(&world, &format!("{alter} --add-config min.insync.replicas=2"));
    run(&world, &fix_once(&config, |_| true));
    is_green(&config);
}

/// Whoever has rights to something keeps everybody else from it.
#[tokio::test(flavor = "multi_thread")]
async fn rights_to_transactions_and_positions() {
    let (world, text) = source("fix_acl").await;
    let config = world.write("whippet.yaml", &text);
    let topic = world.create_topic("positions", 1, &[("cleanup.policy", "compact")]).await;
    let acls = |rest: &str| format!("kafka-acls.sh --bootstrap-server {} {rest}", kafka());
    let both = format!("--topic {} --transactional-id whippet- --resource-pattern-type prefixed", world.name);
    let _undo = Undo(&world, acls(&format!("--remove --force {both}")));
    run(&world, &acls(&format!("--add --allow-principal User:somebody --operation Describe {both}")));
    // The topic is not to be seen, then there is no transaction, then it may not be written to.
    run(&world, &fix_once(&config, |topic| topic.contains("--topic ")));
    run(&world, &fix_once(&config, |id| id.contains("--transactional-id whippet-")));
    is_green(&config);
    let write = format!("--operation Write --topic {topic}");
    run(&world, &acls(&format!("--remove --force --allow-principal User:ANONYMOUS {write}")));
    let found = fails_once(&config, |fails| !fails.is_empty());
    assert!(found[0]["says"].as_str().unwrap().contains("may not be written to"), "{found:#?}");
    run(&world, &fix(&config, CHECK, "shell"));
    is_green(&config);
    // And a relay is content with what it may do now.
    let relay = world.relay(&text);
    relay.wait_for("this relay is the one producer");
    assert_eq!(relay.stop().0, Some(0));
}

struct AsItWas;

impl Drop for AsItWas {
    fn drop(&mut self) {
        services("restart", "kafka");
    }
}

/// What only a restart of the broker takes up.
#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_broker() {
    let (world, text) = source("fix_broker").await;
    let config = world.write("whippet.yaml", &text);
    let more = "transaction.max.timeout.ms=10000\ndefault.replication.factor=3";
    let as_it_was = AsItWas;
    let other = move || services_with("restart", "kafka", &[("WHIPPET_KAFKA_MORE", more)]);
    tokio::task::spawn_blocking(other).await.unwrap();
    let found = fails(&config);
    let says: Vec<&str> = found.iter().map(|one| one["says"].as_str().unwrap()).collect();
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(says[0].contains("transaction.max.timeout.ms"), "{says:?}");
    let setting = found[0]["fix"]["shell"].as_str().unwrap();
    assert!(setting.starts_with("echo 'transaction.max.timeout.ms=900000' >>"), "{setting}");
    // It would have three replicas, on one broker.
    assert!(says[1].contains("may not make it"), "{says:?}");
    run(&world, found[1]["fix"]["shell"].as_str().unwrap());
    assert_eq!(fails(&config).len(), 1);
    drop(as_it_was);
    is_green(&config);
}

/// A source and positions that do not belong together.
#[tokio::test(flavor = "multi_thread")]
async fn another_source_cluster_or_topic() {
    let (world, text) = source("fix_ids").await;
    let config = world.write("whippet.yaml", &text);
    let topic = world.create_topic("events", 1, &[]).await;
    let relay = world.relay(&text);
    world.sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', '1')")).await;
    world.until(LEFT, 0).await;
    // Noted every second, so that it is more than the first one's start.
    world.until("SELECT count(*) FROM whippet.positions WHERE counter > 1", 1).await;
    // One that works has nothing to fear of it.
    is_green(&config);
    assert_eq!(relay.metric("whippet_unit_takeovers_total", ""), 1.0);
    world.until("SELECT count(*) FROM whippet.positions WHERE counter > 1", 1).await;
    assert_eq!(relay.stop().0, Some(0));
    is_green(&config);
    let change =
        async |what: &str| world.sql(&format!("UPDATE whippet.positions SET {what} WHERE counter > 0")).await;
    let forget = "DELETE FROM \"whippet\".\"positions\"";
    change("server = '4' || server").await;
    assert_eq!(fix(&config, CHECK, "sql"), forget);
    change("server = substr(server, 2), cluster = 'x' || cluster").await;
    assert!(fix(&config, CHECK, "config").starts_with("kafka.bootstrap_servers: (brokers of cluster x"));
    change("cluster = substr(cluster, 2)").await;
    // By another name.
    let positions = world.topic("positions");
    let moved = world.write("moved.yaml", &text.replace(&positions, "elsewhere"));
    assert_eq!(fix(&moved, CHECK, "config"), format!("kafka.position_topic: {positions}"));
    // The topic knows what was noted when the second one took over.
    let relay = world.relay(&text);
    relay.wait_for("this relay is the one producer");
    assert_eq!(relay.stop().0, Some(0));
    change("counter = 1").await;
    let found = fails(&config);
    assert!(found[0]["says"].as_str().unwrap().contains("restored from a backup"), "{found:#?}");
    change("counter = 1000").await;
    let found = fails(&config);
    assert!(found[0]["says"].as_str().unwrap().contains("truncated"), "{found:#?}");
    world.delete_topic(&positions).await;
    let found = fails(&config);
    assert!(found[0]["says"].as_str().unwrap().contains("is gone"), "{found:#?}");
    world.sql(&fix(&config, CHECK, "sql")).await;
    is_green(&config);
    let relay = world.relay(&text);
    relay.wait_for("this relay is the one producer");
    assert_eq!(relay.stop().0, Some(0));
}
