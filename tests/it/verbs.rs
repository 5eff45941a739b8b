//! What an operator can do: look at what is held, release it, skip it, pause, replay. Through the
//! command line, against a running relay.

use crate::harness::{Relay, Seen, TOKEN, World};

const INSERT: &str = "INSERT INTO outbox (topic, key, payload, headers)";

fn texts(seen: &[Seen]) -> Vec<&str> {
    seen.iter().map(Seen::text).collect()
}

/// A relay, and a topic in which key `bad` is parked behind its first event, of three.
async fn parked(name: &str) -> (World, Relay, String) {
    let world = World::new(name).await;
    let topic = world.create_topic("events", 2, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "{INSERT} VALUES ('{topic}', 'bad', '1', '[7]'), ('{topic}', 'bad', '2', NULL), ('{topic}', 'good', '1', NULL), ('{topic}', 'bad', '3', NULL)"
        ))
        .await;
    world.until("SELECT count(*) FROM whippet.holds", 3).await;
    world.until("SELECT count(*) FROM outbox", 3).await;
    (world, relay, topic)
}

async fn audited(world: &World, action: &str) -> i64 {
    world.number(&format!("SELECT count(*) FROM whippet.whippet_audit WHERE action = '{action}' AND who = 'tester' AND at > now() - interval '1 minute'")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_key_is_looked_at_mended_and_redriven_in_order() {
    let (world, relay, topic) = parked("redrive").await;
    let listed = relay.operate(&world, &["parked"]);
    let listed = listed["parked"].as_array().unwrap();
    assert_eq!(listed.len(), 3);
    let wrong = |status: &serde_json::Value| {
        let table = &status["tables"][0];
        (
            table["last_error"].as_str().is_some_and(|error| error.contains("parked")),
            table["last_error_at"].is_string(),
        )
    };
    relay.until(|status| wrong(status) == (true, true)).await;
    let head = listed.iter().find(|held| held["cause"] == "rejected").unwrap();
    assert_eq!((head["state"].as_str(), head["key"].as_str()), (Some("parked"), Some("bad")));
    assert!(head["reason"].as_str().unwrap().contains("not a JSON object"), "{head}");
    assert!(head.get("payload").is_none(), "only when asked for");
    let id = head["id"].as_str().unwrap();
    let one = relay.operate(&world, &["parked", "--id", id, "--payload"]);
    assert_eq!(one["parked"][0]["payload"], "1");
    for (key, count) in [(["--key", "good"], 0), (["--key", "bad"], 3), (["--key-hex", "626164"], 3)] {
        let of_key = relay.operate(&world, &[&["parked"], &key[..]].concat());
        assert_eq!(of_key["parked"].as_array().unwrap().len(), count, "{key:?}");
    }

    // Released as it is, it is parked again, with those behind it.
    let done = relay.operate(&world, &["redrive", "--id", id]);
    assert_eq!((done["keys"].as_u64(), done["events"].as_u64()), (Some(1), Some(3)));
    relay.until(|status| status["tables"][0]["parked_events"] == 3).await;
    world.until("SELECT count(*) FROM whippet.holds", 3).await;

    world.sql("UPDATE outbox SET headers = NULL").await;
    let dry = relay.operate(&world, &["redrive", "--table", "outbox", "--key", "bad", "--dry-run"]);
    assert_eq!((dry["dry_run"].as_bool(), dry["events"].as_u64()), (Some(true), Some(3)));
    assert_eq!(world.number("SELECT count(*) FROM whippet.holds").await, 3, "a dry run changes nothing");
    assert_eq!(audited(&world, "redrive").await, 1);

    world.sql(&format!("{INSERT} VALUES ('{topic}', 'bad', '4', NULL)")).await;
    let done = relay.operate(&world, &["redrive", "--table", "outbox", "--key", "bad", "--why", "mended"]);
    assert!(done["events"].as_u64() >= Some(3), "{done}");
    let mut consumer = world.consumer(&topic);
    consumer.read(5);
    world.until("SELECT count(*) FROM outbox", 0).await;
    let seen: Vec<&Seen> =
        consumer.read_to_end().iter().filter(|record| record.key.as_deref() == Some(b"bad")).collect();
    assert_eq!(seen.iter().map(|record| record.text()).collect::<Vec<_>>(), ["1", "2", "3", "4"]);
    assert_eq!(audited(&world, "redrive").await, 2);
    relay.until_status("/tables/0/parked_keys", 0).await;
    assert_eq!(relay.metric("whippet_parked_events", "outbox"), 0.0);
    // It is over, and nobody is to look for it.
    relay.until(|status| wrong(status) == (false, false)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_skipped_is_settled_and_never_published() {
    let (world, relay, topic) = parked("skip").await;
    let listed = relay.operate(&world, &["parked", "--reason", "rejected"]);
    let id = listed["parked"][0]["id"].as_str().unwrap();
    let refused = relay.try_to(&world, &["skip", "--id", id]);
    assert_eq!(refused.status.code(), Some(2), "it asks for a reason");
    let dry = relay.operate(&world, &["skip", "--id", id, "--dry-run"]);
    assert_eq!(dry["events"], 1);
    assert_eq!(world.number("SELECT count(*) FROM outbox").await, 3);
    relay.operate(&world, &["skip", "--id", id, "--reason", "nobody needs it"]);
    let mut consumer = world.consumer(&topic);
    consumer.read(3);
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut seen = texts(consumer.read_to_end());
    seen.sort_unstable();
    assert_eq!(seen, ["1", "2", "3"], "1 is of the good key; 2 and 3 were released");
    assert_eq!(
        world.number("SELECT count(*) FROM whippet.whippet_audit WHERE why = 'nobody needs it'").await,
        1
    );

    // A whole key.
    world
        .sql(&format!("{INSERT} VALUES ('{topic}', 'worse', '1', '7'), ('{topic}', 'worse', '2', NULL)"))
        .await;
    world.until("SELECT count(*) FROM whippet.holds", 2).await;
    relay.operate(&world, &["skip", "--table", "outbox", "--key", "worse", "--reason", "gone"]);
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'worse', 'new', NULL)")).await;
    consumer.read_until(|seen| seen.iter().any(|record| record.text() == "new"));
    assert_eq!(consumer.read_to_end().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_holds_survives_a_restart_and_ends_in_order() {
    let world = World::new("pause").await;
    let (a, b) = (world.create_topic("a", 1, &[]).await, world.create_topic("b", 1, &[]).await);
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    relay.wait_for("this relay owns the source");
    assert_eq!(relay.operate(&world, &["pause", "--topic", &a])["keys"], 1);
    assert_eq!(relay.operate(&world, &["pause", "--topic", &a])["keys"], 0, "it is paused already");
    relay.operate(&world, &["pause", "--table", "outbox", "--key", "k"]);
    let batch = |n: u32| {
        format!(
            "{INSERT} VALUES ('{a}', 'x', '{n}', NULL), ('{b}', 'k', '{n}', NULL), ('{b}', 'x', '{n}', NULL)"
        )
    };
    world.sql(&batch(1)).await;
    world.until("SELECT count(*) FROM whippet.holds WHERE state = 'held' AND cause = 'paused'", 2).await;
    relay.until_status("/tables/0/held_events", 2).await;
    assert_eq!(relay.metric("whippet_held_events", "paused"), 2.0);
    relay.kill();
    let relay = world.relay(&config);
    world.sql(&batch(2)).await;
    world.until("SELECT count(*) FROM whippet.holds WHERE cause = 'paused'", 4).await;
    let mut seen_b = world.consumer(&b);
    seen_b.read_until(|seen| seen.len() == 2);
    assert_eq!(world.consumer(&a).read_to_end().len(), 0);
    relay.operate(&world, &["resume", "--topic", &a]);
    let mut seen_a = world.consumer(&a);
    assert_eq!(texts(seen_a.read(2)), ["1", "2"]);
    relay.operate(&world, &["resume", "--table", "outbox", "--key", "k"]);
    seen_b.read_until(|seen| seen.iter().filter(|record| record.key.as_deref() == Some(b"k")).count() == 2);

    relay.operate(&world, &["pause", "--table", "outbox"]);
    relay.until_status("/tables/0/state", "paused").await;
    world.sql(&batch(3)).await;
    relay.until_status("/tables/0/pending", 3).await;
    assert_eq!(world.number("SELECT count(*) FROM whippet.holds").await, 0, "rows just stay where they are");
    relay.operate(&world, &["resume", "--table", "outbox"]);
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(texts(seen_a.read(3)), ["1", "2", "3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn published_rows_are_replayed_by_id_number_or_time() {
    let world = World::new("replay").await;
    let (topic, other) =
        (world.create_topic("events", 1, &[]).await, world.create_topic("other", 1, &[]).await);
    let config = world.config("[{ name: outbox, after_publish: mark }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "{INSERT} SELECT '{topic}', 'k', convert_to('' || i, 'UTF8'), NULL FROM generate_series(1, 5) i"
        ))
        .await;
    world.until("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL", 5).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(5);
    let marks = "SELECT count(DISTINCT published_at) FROM outbox";
    let before = world.number(marks).await;
    let range = ["replay", "--table", "outbox", "--from", "2", "--to", "4"];
    assert_eq!(relay.operate(&world, &[&range[..], &["--dry-run"]].concat())["events"], 3);
    assert_eq!(relay.operate(&world, &range)["events"], 3);
    consumer.read(8);
    world.until("SELECT count(*) FROM whippet.replays", 0).await;
    let seen = consumer.read_to_end();
    assert_eq!(texts(&seen[5..]), ["2", "3", "4"]);
    for (again, first) in seen[5..].iter().zip(&seen[1..4]) {
        assert_eq!(again.header("id"), first.header("id"), "the same event");
        assert!(again.header("whippet-replay").is_some_and(|when| when.ends_with('Z')));
        assert_eq!(first.header("whippet-replay"), None);
    }
    let id: String = sqlx::query_scalar("SELECT id::text FROM outbox WHERE seq = 5")
        .fetch_one(world.db.pg())
        .await
        .unwrap();
    assert_eq!(relay.operate(&world, &["replay", "--id", &id, "--topic", &other])["events"], 1);
    assert_eq!(texts(world.consumer(&other).read(1)), ["5"]);
    let times = ["replay", "--from", "2020-01-01T00:00:00Z", "--topic", &other];
    assert_eq!(relay.operate(&world, &times)["events"], 5);
    world.consumer(&other).read(6);
    assert_eq!(world.number(marks).await, before, "a replay leaves the rows as they are");
    assert_eq!(world.number("SELECT count(*) FROM outbox WHERE published_at IS NULL").await, 0);
    assert_eq!(audited(&world, "replay").await, 3);

    // One that cannot be published again is told and forgotten; the row's key is not parked.
    relay.operate(&world, &["pause", "--topic", &other]);
    assert_eq!(relay.operate(&world, &["replay", "--id", &id, "--topic", &other])["events"], 1);
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', 'live', NULL)")).await;
    consumer.read_until(|seen| seen.iter().any(|record| record.text() == "live"));
    world.until("SELECT count(*) FROM whippet.replays", 1).await;
    relay.operate(&world, &["resume", "--topic", &other]);
    world.until("SELECT count(*) FROM whippet.replays", 0).await;
    world.consumer(&other).read(7);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_token_may_change_something_and_bad_requests_are_told() {
    let (world, relay, _) = parked("token").await;
    let all = r#"{"all": true}"#;
    for token in [None, Some(""), Some("wrong"), Some("it-toke"), Some("it-token2"), Some("tester")] {
        assert_eq!(relay.post("/v1/redrive", token, all).0, 401, "{token:?}");
    }
    assert_eq!(relay.get("/v1/parked").0, 401);
    assert_eq!((relay.get("/status").0, relay.get("/metrics").0), (200, 200), "reading is open");
    for (path, body, code) in [
        ("/v1/redrive", "{}", 400),
        ("/v1/redrive", "{", 400),
        ("/v1/redrive", r#"{"tabel": "outbox"}"#, 422),
        ("/v1/redrive", r#"{"all": true, "table": "nope"}"#, 404),
        ("/v1/skip", all, 400),
        ("/v1/pause", "{}", 400),
        ("/v1/replay", r#"{"table": "outbox", "from": 1}"#, 400),
        ("/v1/nothing", "{}", 404),
    ] {
        let (status, answer) = relay.post(path, Some(TOKEN), body);
        assert_eq!(status, code, "{path} {body}: {answer}");
    }
    // As `curl --data` and Python's urllib send it.
    let form = "application/x-www-form-urlencoded";
    let dry = r#"{"all": true, "dry_run": true}"#;
    assert_eq!(relay.post_as(form, "/v1/redrive", Some(TOKEN), dry).0, 200);
    let large = format!(r#"{{"id": "{}"}}"#, "x".repeat(300_000));
    assert_eq!(relay.post("/v1/redrive", Some(TOKEN), &large).0, 413);
    assert_eq!(world.number("SELECT count(*) FROM whippet.holds").await, 3, "nothing has changed");
    // The token can be rotated.
    world.write("token", "# none\n");
    assert_eq!(relay.post("/v1/redrive", Some(TOKEN), all).0, 401);
    world.write("token", "new\n");
    assert_eq!(relay.post("/v1/redrive", Some("new"), r#"{"all": true, "dry_run": true}"#).0, 200);
    let (_, log) = relay.stop();
    assert!(!log.contains(TOKEN), "a token is never logged");

    let config = world.config("[{ name: outbox }]", "");
    let without = config.lines().map(|line| line.split(", token_file").next().unwrap());
    let without: Vec<String> = without
        .map(|line| if line.starts_with("admin") { format!("{line} }}") } else { line.to_owned() })
        .collect();
    let relay = world.relay(&without.join("\n"));
    assert_eq!(relay.post("/v1/redrive", Some(TOKEN), all).0, 403);
    assert_eq!(relay.get("/v1/parked").0, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_stands_by_refuses_and_says_who_can() {
    let world = World::new("verbstandby").await;
    // One lane: it is not shared.
    let config = world.config("[{ name: outbox, order: table }]", "");
    world.install(&config).await;
    let owner = world.relay(&config);
    owner.wait_for("this relay owns the source");
    let standby = world.relay(&config);
    standby.wait_for("standing by");
    let output = standby.try_to(&world, &["redrive", "--all"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not own the source"), "{output:?}");
    assert_eq!(owner.operate(&world, &["redrive", "--all"])["events"], 0);
}

/// Somebody who opens a connection and never finishes a request does not keep it.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_never_ends_is_ended() {
    use std::io::{Read as _, Write as _};
    let world = World::new("slowloris").await;
    let config = world.config("[{ name: outbox }]", "");
    let relay = world.relay(&config);
    let mut slow = std::net::TcpStream::connect(&relay.admin).unwrap();
    slow.set_read_timeout(Some(std::time::Duration::from_secs(25))).unwrap();
    slow.write_all(b"GET /status HTTP/1.1\r\nHost: x\r\n").unwrap();
    let mut answer = Vec::new();
    slow.read_to_end(&mut answer).unwrap();
    assert!(!String::from_utf8_lossy(&answer).contains("200"), "it was never asked for");
    assert_eq!(relay.get("/status").0, 200);
}
