//! `whippet consume --config`: what the relay's configuration says is not typed again.

use crate::{
    bucket::Bucket,
    harness::{World, kafka, whippet},
};

/// Exit code, and what was printed.
fn consumed(arguments: &[&str]) -> (Option<i32>, String, String) {
    let said = whippet(&[&["consume"], arguments].concat());
    (said.status.code(), String::from_utf8(said.stdout).unwrap(), String::from_utf8(said.stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relays_configuration_is_enough_to_read_what_it_wrote() {
    let (world, bucket) = (World::new("consumeconfig").await, Bucket::new("consumeconfig").await);
    let topic = world.create_topic("events", 1, &[]).await;
    // One that a producer alone knows is no trouble to a consumer.
    let config = world
        .config(
            "[{ name: outbox }, { name: outbox_in_chunks, payload: { oversize: chunk } }]",
            &bucket.config("payloads", &[]),
        )
        .replace(
            "bootstrap_servers:",
            "properties: { queue.buffering.max.kbytes: 65536 }, bootstrap_servers:",
        );
    world.install(&config).await;
    let relay = world.relay(&config);
    for (id, table) in [("1", "outbox"), ("2", "outbox_in_chunks")] {
        world
            .sql(&format!(
                "INSERT INTO {table} (id, topic, key, payload) VALUES (md5('{id}')::uuid, '{topic}', 'k', \
                 convert_to(repeat('{id}', 2500000), 'UTF8'))"
            ))
            .await;
        world.until(&format!("SELECT count(*) FROM {table}"), 0).await;
    }
    relay.stop();

    let file = world.write("relay.yaml", &config);
    let common = ["--config", &file, "--topic", &topic, "--from-beginning", "--max"];
    let (code, stdout, stderr) = consumed(&[&common[..], &["2"]].concat());
    assert_eq!((code, stderr.lines().count()), (Some(0), 2), "what it waits for, and nothing else: {stderr}");
    let events: Vec<serde_json::Value> =
        stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (event, travelled, digit) in [(&events[0], "reference", "1"), (&events[1], "chunks", "2")] {
        assert_eq!(event["travelled"], travelled);
        assert!(event["payload"] == digit.repeat(2_500_000), "other bytes");
    }

    // What is given beside it wins: another store, which is the only one then, and other brokers.
    let other = format!("file://{}", world.folder.path().display());
    let (code, stdout, stderr) = consumed(&[&common[..], &["1", "--object-store", &other]].concat());
    assert_eq!(code, Some(1));
    assert!(stderr.contains(&format!("is not in {other}; only objects there are read")), "{stderr}");
    assert!(stdout.contains(r#""travelled":"chunks""#), "{stdout}");
    let denied = ["1", "--object-store-option", "secret_access_key=wrong"];
    let (_, _, stderr) = consumed(&[&common[..], &denied].concat());
    assert!(stderr.contains("the object store does not allow it"), "{stderr}");
    let nowhere = world.write("nowhere.yaml", &config.replace(&kafka(), "127.0.0.1:1"));
    let (code, stdout, stderr) = consumed(&[
        "--config",
        &nowhere,
        "--bootstrap-servers",
        &kafka(),
        "--topic",
        &topic,
        "--from-beginning",
        "--max",
        "2",
    ]);
    assert_eq!((code, stdout.lines().count()), (Some(0), 2), "{stderr}");
}

#[test]
fn what_is_missing_is_said_with_where_to_put_it() {
    let (code, _, stderr) = consumed(&["--topic", "t"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("--bootstrap-servers"), "{stderr}");
    let option = ["--object-store-option", "region=x"];
    let common = ["--topic", "t", "--bootstrap-servers", "127.0.0.1:1"];
    let (code, _, stderr) = consumed(&[&common[..], &option].concat());
    assert_eq!(code, Some(2));
    assert!(stderr.contains("--object-store <URL>") && stderr.contains("--config <FILE>"), "{stderr}");

    let (code, _, stderr) = consumed(&["--topic", "t", "--config", "/nowhere/relay.yaml"]);
    assert_eq!(code, Some(78));
    assert!(stderr.contains("/nowhere/relay.yaml"), "{stderr}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("relay.yaml").display().to_string();
    let yaml =
        "source: { url: 'sqlite:///x.db' }\nkafka: { bootstrap_servers: k }\ntables: [{ name: outbox }]\n";
    std::fs::write(&file, yaml).unwrap();
    let (code, _, stderr) = consumed(&[&["--topic", "t", "--config", &file][..], &option].concat());
    assert_eq!(code, Some(1));
    assert!(stderr.contains("the configuration has no object_store; name one with"), "{stderr}");
    std::fs::write(&file, yaml.replace("bootstrap_servers", "bootstrap_server")).unwrap();
    let (code, _, stderr) = consumed(&["--topic", "t", "--config", &file]);
    assert_eq!(code, Some(78));
    assert!(stderr.contains("did you mean `bootstrap_servers`"), "{stderr}");
}
