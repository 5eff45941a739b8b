//! The request travels with its event: into the log, traces and envelopes.

use serde_json::Value;

use crate::harness::{Relay, SOON, Seen, World};

/// The log lines that have a request id anywhere, as their messages.
fn lines_of(relay: &Relay, request: &str) -> Vec<String> {
    let log = relay.log();
    let about = log.lines().filter(|line| line.contains(request));
    about
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["context"]["x-request-id"], request, "{line}");
            assert_eq!(line["id"].as_str().map(str::len), Some(36), "{line}");
            line["message"].as_str().unwrap().to_owned()
        })
        .collect()
}

/// One row of a request, by SQL that knows nothing of it.
async fn write(world: &World, request: &str, table: &str, topic: &str, key: &str, bytes: usize) {
    world
        .sql(&format!(
            "BEGIN; SELECT set_config('whippet.context', '{{\"x-request-id\":\"{request}\",\"user-id\":\"u-{request}\",\"token\":\"s3cret\"}}', true); \
             INSERT INTO {table} (topic, key, payload) VALUES ('{topic}', '{key}', convert_to(repeat('x', {bytes}), 'UTF8')); COMMIT;"
        ))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_lines_of_a_request_are_found_by_its_id() {
    let world = World::new("logcontext").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let small = world.create_topic("small", 1, &[]).await;
    let letters = world.create_topic("letters", 1, &[]).await;
    world.create_topic("letters.dlq", 1, &[]).await;
    let config = world.config(
        "[{ name: outbox, after_publish: mark, payload: { inline_max: 100B }, headers: { deny: [token] } },
          { name: big }, { name: letters, on_failure: dead_letter, payload: { inline_max: 100B } }]",
        "log: { context: [x-request-id, user-id, token] }",
    );
    // So that a large row stays one.
    let config = config.replace("kafka: {", "kafka: { compression: none,");
    world.install(&config).await;
    let relay = world.relay(&config);

    // Published.
    write(&world, "r-ok", "outbox", &topic, "k", 1).await;
    world.until("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL", 1).await;
    // Parked, with one behind it.
    write(&world, "r-parked", "outbox", &topic, "bad", 200).await;
    world.until("SELECT count(*) FROM whippet.holds", 1).await;
    write(&world, "r-behind", "outbox", &topic, "bad", 1).await;
    world.until("SELECT count(*) FROM whippet.holds", 2).await;
    // A dead letter.
    write(&world, "r-letter", "letters", &letters, "k", 200).await;
    world.until("SELECT count(*) FROM letters", 0).await;
    // Refused by the broker, whose limit is another than the relay thinks: tried again, then parked.
    write(&world, "r-first", "big", &small, "k", 1).await;
    world.until("SELECT count(*) FROM big", 0).await;
    world.lower_limit(&small, 1, 5000).await;
    write(&world, "r-retried", "big", &small, "k", 20_000).await;
    world.until("SELECT count(*) FROM whippet.holds", 3).await;
    // What an operator does.
    let id = |request: &str| {
        let log = relay.log();
        let line = log.lines().find(|line| line.contains(request) && line.contains("\"id\"")).unwrap();
        serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_owned()
    };
    relay.operate(&world, &["skip", "--id", &id("r-retried"), "--reason", "nobody needs it"]);
    world.sql("UPDATE outbox SET payload = 'y' WHERE key = 'bad'").await;
    relay.operate(&world, &["redrive", "--table", "outbox", "--key", "bad"]);
    world.until("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL", 3).await;
    relay.operate(&world, &["replay", "--table", "outbox", "--id", &id("r-ok")]);
    relay.wait_for("everything that was to be replayed is published");

    let (parked, released, published) = (
        "event can never be published as it is: its key is parked and the rest flows on",
        "event is released: it is tried again",
        "event is published",
    );
    let replayed = "event is published again: it was to be replayed";
    assert_eq!(lines_of(&relay, "r-ok"), [published, replayed]);
    assert_eq!(lines_of(&relay, "r-parked"), [parked, released, published]);
    assert_eq!(lines_of(&relay, "r-behind"), ["event is held", released, published]);
    let letter = "event can never be published as it is: its dead letter is published and its key flows on";
    assert_eq!(lines_of(&relay, "r-letter"), [letter]);
    assert_eq!(lines_of(&relay, "r-first"), [published]);
    let retried = [
        "kafka did not take a record; the producer is rebuilt and what it had is read again",
        "event is not acknowledged: it is read and sent again",
        parked,
        "event is skipped: it will not be published",
    ];
    assert_eq!(lines_of(&relay, "r-retried"), retried);
    let line = relay.wait_for("event is published");
    assert_eq!(line["level"], "INFO");
    let context = serde_json::json!({ "x-request-id": "r-ok", "user-id": "u-r-ok" });
    assert_eq!(line["context"], context, "a header that does not go out is not told either");
    assert_eq!((&line["table"], &line["topic"]), (&"outbox".into(), &topic.as_str().into()));
    // By partition and offset a record is found at once, also one that is published again.
    let log = relay.log();
    let lines = log.lines().filter(|line| line.contains("event is published"));
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
    let seen = world.consumer(&topic).read_to_end().to_vec();
    let of_topic: Vec<&Value> = lines.iter().filter(|line| line["topic"] == topic.as_str()).collect();
    assert_eq!((of_topic.len(), seen.len()), (4, 4));
    for line in of_topic {
        let place = |seen: &&Seen| (line["partition"] == seen.partition) && (line["offset"] == seen.offset);
        let found = seen.iter().find(place).unwrap_or_else(|| panic!("{line}"));
        assert_eq!(line["id"].as_str(), found.header("id"), "{line}");
    }
}

/// Without `log.context` the log does not grow with the events.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_has_no_line_for_each_event_unless_it_is_asked_for() {
    let world = World::new("quietlog").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    write(&world, "r-1", "outbox", &topic, "k", 1).await;
    world.until_within("SELECT count(*) FROM outbox", 0, SOON).await;
    let (code, log) = relay.stop();
    assert!(code == Some(0) && !log.contains("r-1") && !log.contains("event is published"), "{log}");
}
