//! The context all in one header, and as attributes of CloudEvents.

use serde_json::{Value, json};

use crate::harness::{Relay, Seen, World, whippet};

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
const ID: &str = "11111111-1111-1111-1111-111111111111";

/// A relay of one table with these keys, and the record of one row.
async fn record_of(name: &str, keys: &str, more: &str, payload: &str) -> (World, Relay, String, Seen) {
    let world = World::new(name).await;
    let topic = world.create_topic("orders", 1, &[]).await;
    let config = world.config(&format!("[{{ name: outbox, {keys} }}]"), more);
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            r#"BEGIN;
            SELECT set_config('whippet.context', '{{"x-request-id":"r-1","authid":"u-7","traceparent":"{TRACE}","token":"s"}}', true);
            INSERT INTO outbox (id, topic, key, type, payload, created_at)
            VALUES ('{ID}', '{topic}', 'o-1', 'OrderPlaced', {payload}, '2026-01-02 03:04:05.678+00');
            COMMIT;"#
        ))
        .await;
    let record = world.consumer(&topic).read(1)[0].clone();
    (world, relay, topic, record)
}

/// The first event of a topic as `whippet consume` prints it, by the relay's configuration.
fn consumed(world: &World, topic: &str) -> Value {
    let file = world.folder.path().join("whippet.yaml").display().to_string();
    let flags = ["--topic", topic, "--from-beginning", "--max", "1"];
    let output = whippet(&[&["consume", "--config", &file], &flags[..]].concat());
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

fn names(record: &Seen) -> Vec<&str> {
    record.headers.iter().map(|(name, _)| name.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_header_carries_all_context() {
    let keys = "headers: { blob: x-context, deny: [token], static: { source: shop } }";
    let (world, relay, topic, record) = record_of("blob", keys, "", "'{}'").await;
    assert_eq!(names(&record), ["id", "eventType", "x-context"]);
    let blob: Value = serde_json::from_str(record.header("x-context").unwrap()).unwrap();
    let all = json!({ "source": "shop", "x-request-id": "r-1", "authid": "u-7", "traceparent": TRACE });
    assert_eq!(blob, all);
    assert_eq!(consumed(&world, &topic)["context"], all);
    assert_eq!(record.text(), "{}");
    assert_eq!(relay.metric("whippet_context_dropped_total", "denied"), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binary_cloudevent_has_its_attributes_as_headers_and_a_large_one_is_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let more = format!("object_store: {{ url: 'file://{}' }}", folder.path().display());
    let keys = "envelope: cloudevents-binary, headers: { deny: [token], static: { source: /shop } }, payload: { inline_max: 100B }";
    let (world, _relay, topic, record) = record_of("cebinary", keys, &more, r#"'{"a": 1}'"#).await;
    let expected = [
        ("id", ID),
        ("eventType", "OrderPlaced"),
        ("x-request-id", "r-1"),
        ("traceparent", TRACE),
        ("ce_specversion", "1.0"),
        ("ce_id", ID),
        ("ce_type", "OrderPlaced"),
        ("ce_source", "/shop"),
        ("ce_time", "2026-01-02T03:04:05.678Z"),
        ("ce_subject", "o-1"),
        ("content-type", "application/json"),
        ("ce_authid", "u-7"),
        ("ce_traceparent", TRACE),
    ];
    for (name, value) in expected {
        assert_eq!(record.header(name), Some(value), "{name}");
    }
    assert_eq!(record.text(), r#"{"a": 1}"#);
    assert!(record.header("authid").is_none() && record.header("token").is_none());

    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'o-1', convert_to(repeat('x', 200), 'UTF8'))"
        ))
        .await;
    let large = world.consumer(&topic).read(2)[1].clone();
    assert_eq!(large.header("ce_dataref"), large.header("whippet-ref-uri"));
    assert_eq!(
        (large.header("ce_dataref"), large.header("ce_type")),
        (Some(large.text()), Some(topic.as_str()))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_structured_cloudevent_is_its_value_and_its_dead_letter_is_too() {
    let keys = "envelope: cloudevents-structured, headers: { deny: [token] }, on_failure: dead_letter, \
                payload: { inline_max: 1000B }";
    let (world, relay, topic, record) = record_of("cestructured", keys, "", r#"'{"a": 1.0}'"#).await;
    assert_eq!(names(&record), ["id", "eventType", "x-request-id", "traceparent", "content-type"]);
    assert_eq!(record.header("content-type"), Some("application/cloudevents+json"));
    let whole: Value = serde_json::from_str(record.text()).unwrap();
    let expected = json!({
        "specversion": "1.0", "id": ID, "type": "OrderPlaced", "source": "/outbox", "subject": "o-1",
        "time": "2026-01-02T03:04:05.678Z", "datacontenttype": "application/json", "traceparent": TRACE,
        "authid": "u-7", "data": { "a": 1.0 },
    });
    assert_eq!(whole, expected);
    let read = consumed(&world, &topic);
    assert_eq!(
        (&read["payload"], &read["id"], &read["type"]),
        (&json!(r#"{"a": 1.0}"#), &json!(ID), &json!("OrderPlaced"))
    );
    assert_eq!(read["context"], json!({ "x-request-id": "r-1", "traceparent": TRACE, "authid": "u-7" }));

    let letters = world.create_topic("orders.dlq", 1, &[]).await;
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'o-1', '\\x00ff'), \
             ('{topic}', 'o-1', convert_to(repeat('x', 1001), 'UTF8')), ('{topic}', 'o-1', NULL)"
        ))
        .await;
    let records = world.consumer(&topic).read(3).to_vec();
    let bytes: Value = serde_json::from_str(records[1].text()).unwrap();
    assert_eq!((&bytes["data_base64"], bytes.get("data")), (&json!("AP8="), None));
    assert_eq!((records[2].payload.as_ref(), records[2].header("ce_specversion")), (None, Some("1.0")));
    let letter = world.consumer(&letters).read(1)[0].clone();
    assert_eq!(letter.header("content-type"), Some("application/cloudevents+json"));
    let whole: Value = serde_json::from_str(letter.text()).unwrap();
    assert_eq!(whole["data_base64"].as_str().map(str::len), Some(1336));
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(relay.metric("whippet_in_flight_bytes", ""), 0.0, "what an envelope adds is given back");
}
