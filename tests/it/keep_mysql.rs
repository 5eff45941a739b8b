//! Kept rows of MySQL and MariaDB: the log alone tells which are new, and those that were published are in the table.

use std::collections::HashMap;

use crate::{
    harness::{Relay, Seen, World, calm},
    mysql::{on_both, texts, world},
    mysql_stream::{batch, streamed},
    mysql_transient::reads,
};

on_both!(kept_rows_are_replayed_by_number_or_id, a_replay_waits_until_its_rows_are_published);

async fn started(server: &str) -> (World, String, Relay) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = calm(&streamed(&world, "{ name: outbox, capture: stream, after_publish: keep }"));
    world.install(&config).await;
    let relay = world.relay(&config);
    reads(&relay).await;
    (world, topic, relay)
}

fn is_replay(one: &Seen) -> bool {
    one.header("whippet-replay").is_some()
}

async fn kept_rows_are_replayed_by_number_or_id(server: &str) {
    let (world, topic, relay) = started(server).await;
    let other = world.create_topic("again", 1, &[]).await;
    world.sql(&batch(&topic, 1, 5)).await;
    let large =
        format!("INSERT INTO outbox (topic, `key`, payload) VALUES ('{topic}', 'k', REPEAT('x', 300000))");
    world.sql(&large).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(6);
    // The only table that keeps what is published: it need not be named.
    let range = ["replay", "--from", "2", "--to", "4"];
    assert_eq!(relay.operate(&world, &[&range[..], &["--dry-run"]].concat())["events"], 3);
    assert_eq!(relay.operate(&world, &range)["events"], 3);
    let seen = consumer.read(9);
    assert_eq!(texts(&seen[6..]), ["2", "3", "4"]);
    for (first, again) in seen[1..4].iter().zip(&seen[6..]) {
        assert_eq!(first.header("id"), again.header("id"));
        assert!(is_replay(again) && !is_replay(first));
    }
    world.until("SELECT COUNT(*) FROM whippet_replays", 0).await;

    let id = seen[5].header("id").unwrap().to_owned();
    assert_eq!(relay.operate(&world, &["replay", "--id", &id, "--topic", &other])["events"], 1);
    let mut again = world.consumer(&other);
    let again = &again.read(1)[0];
    assert_eq!((again.header("id"), again.payload.as_ref().map(Vec::len)), (Some(&*id), Some(300_000)));
    let refused = relay.try_to(&world, &["replay", "--from", "2020-01-01T00:00:00Z"]);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("kept rows do not have the time of their publishing"), "{said}");
    assert_eq!(relay.stop().0, Some(0));
    assert_eq!(world.number("SELECT COUNT(*) FROM outbox").await, 6);
    assert_eq!(consumer.read_to_end().len(), 9);
}

/// What was committed is in the table before its event is in Kafka, and may be held before it comes there.
async fn a_replay_waits_until_its_rows_are_published(server: &str) {
    const ROWS: u32 = 30_000;
    let (world, topic, relay) = started(server).await;
    let bad = format!(
        "INSERT INTO outbox (topic, `key`, payload, headers) VALUES ('{topic}', 'bad', '-', '7'), \
         ('{topic}', 'bad', 'behind', NULL)"
    );
    world.sql(&format!("BEGIN;\n{};\n{bad};\nCOMMIT", batch(&topic, 1, ROWS))).await;
    let (from, parked) = ((ROWS - 8).to_string(), (ROWS + 1).to_string());
    assert_eq!(relay.operate(&world, &["replay", "--from", &from])["events"], 11);
    let mut consumer = world.consumer(&topic);
    consumer.read(ROWS as usize + 9);
    relay.until_status("/tables/0/parked_events", 2).await;
    // What is held is not published.
    assert_eq!(relay.operate(&world, &["replay", "--from", &parked, "--dry-run"])["events"], 0);
    world.until("SELECT COUNT(*) FROM whippet_replays", 2).await;
    let list = relay.operate(&world, &["parked", "--reason", "rejected"]);
    let id = list["parked"][0]["id"].as_str().unwrap_or_else(|| panic!("{list}"));
    relay.operate(&world, &["skip", "--id", id, "--reason", "test"]);
    consumer.read(ROWS as usize + 11);
    world.until("SELECT COUNT(*) FROM whippet_replays", 0).await;
    assert_eq!(relay.stop().0, Some(0));
    let mut came: HashMap<&str, Vec<bool>> = HashMap::new();
    for one in consumer.read_to_end() {
        came.entry(one.text()).or_default().push(is_replay(one));
    }
    assert_eq!(came.len(), ROWS as usize + 1);
    for (text, came) in came {
        let replayed = text == "behind" || text.parse::<u32>().unwrap() > ROWS - 9;
        assert_eq!(came, if replayed { &[false, true][..] } else { &[false] }, "{text}");
    }
}
