//! Verbs that name no table: each table that they are for answers for itself.

use std::time::{Duration, Instant};

use crate::harness::{Relay, Seen, TOKEN, World};

const INSERT: &str = "INSERT INTO outbox (topic, key, payload, headers)";

fn said(output: &std::process::Output) -> (Option<i32>, serde_json::Value, String) {
    let stdout = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), stdout, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Two keys are parked in `outbox`; `gone` is configured too, and is not there.
async fn with_one_that_fails(name: &str) -> (World, Relay, String) {
    let world = World::new(name).await;
    let topic = world.create_topic("events", 1, &[]).await;
    world.install(&world.config("[{ name: outbox }]", "")).await;
    let relay = world.relay(&world.config("[{ name: outbox }, { name: gone }]", ""));
    world
        .sql(&format!("{INSERT} SELECT '{topic}', 'k' || i % 2, convert_to('' || i, 'UTF8'), '[7]' FROM generate_series(1, 4) i"))
        .await;
    relay.until_status("/tables/0/parked_events", 4).await;
    relay.until_status("/tables/1/state", "failing").await;
    (world, relay, topic)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_fails_stops_no_verb_for_the_others() {
    let (world, relay, topic) = with_one_that_fails("verb_fails").await;
    let missing = "table gone does not exist";
    let (code, listed, stderr) = said(&relay.try_to(&world, &["parked"]));
    assert_eq!((code, listed["parked"].as_array().unwrap().len()), (Some(1), 4), "{stderr}");
    assert!(stderr.contains(missing), "{stderr}");
    assert_eq!(listed["failed"][0]["table"], "gone");
    let (code, page) = relay.get("/parked");
    let page: serde_json::Value = serde_json::from_str(&page).unwrap();
    assert_eq!((code, page["keys"].as_array().unwrap().len()), (200, 2), "{page}");
    assert!(page["failed"][0]["detail"].as_str().unwrap().contains(missing), "{page}");

    // Found: nothing is left to be done elsewhere. And nobody waits for the table that fails.
    let began = Instant::now();
    let id = listed["parked"][0]["id"].as_str().unwrap();
    let (code, done, stderr) = said(&relay.try_to(&world, &["skip", "--id", id, "--reason", "test"]));
    assert_eq!((code, done["events"].as_u64()), (Some(0), Some(1)), "{done} {stderr}");
    assert!(stderr.contains(missing) && stderr.contains("nothing was changed"), "{stderr}");
    // What is for all tables is not done while one is missing.
    world.sql("UPDATE outbox SET headers = NULL").await;
    let (code, done, stderr) = said(&relay.try_to(&world, &["redrive", "--key", "k0"]));
    assert_eq!((code, done["events"].as_u64()), (Some(1), Some(2)), "{done} {stderr}");
    assert!(stderr.contains(missing), "{stderr}");
    let (status, answer) = relay.post("/v1/redrive", Some(TOKEN), r#"{"all": true, "table": "outbox"}"#);
    assert_eq!(status, 200, "{answer}");
    let (status, answer) = relay.post("/v1/pause", Some(TOKEN), &format!(r#"{{"topic": "{topic}"}}"#));
    assert_eq!(status, 207, "{answer}");
    let (code, _, stderr) = said(&relay.try_to(&world, &["pause", "--table", "gone"]));
    assert_eq!(code, Some(1));
    assert!(stderr.contains(missing) && stderr.contains("nothing was changed"), "{stderr}");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());

    relay.operate(&world, &["resume", "--table", "outbox", "--topic", &topic]);
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut texts: Vec<String> =
        world.consumer(&topic).read(3).iter().map(|seen: &Seen| seen.text().to_owned()).collect();
    texts.sort_unstable();
    assert_eq!(texts, ["2", "3", "4"], "1 was skipped");
    // What was said to be done is what the audit log has.
    let lines = "SELECT count(*) FROM whippet.whippet_audit WHERE table_name = ";
    assert_eq!(world.number(&format!("{lines}'outbox'")).await, 5);
    assert_eq!(world.number(&format!("{lines}'gone'")).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_leaves_out_the_tables_that_are_one_lane() {
    let world = World::new("verb_lane").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox }, { name: lane, order: table }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    relay.until_status("/tables/1/state", "running").await;
    let (code, done, stderr) = said(&relay.try_to(&world, &["pause", "--topic", &topic]));
    assert_eq!((code, done["tables"][0]["table"].as_str()), (Some(0), Some("outbox")), "{stderr}");
    assert_eq!(done["left_out"][0]["table"], "lane", "{done}");
    assert!(stderr.contains("table lane is one lane"), "{stderr}");
    for table in ["outbox", "lane"] {
        world.sql(&format!("INSERT INTO {table} (topic, key) VALUES ('{topic}', '{table}')")).await;
    }
    relay.until_status("/tables/0/held_events", 1).await;
    let mut consumer = world.consumer(&topic);
    assert_eq!(consumer.read(1)[0].key.as_deref(), Some(&b"lane"[..]));
    let (code, _, stderr) = said(&relay.try_to(&world, &["pause", "--table", "lane", "--topic", &topic]));
    assert_eq!(code, Some(2), "no relay does that");
    assert!(stderr.contains("400") && stderr.contains("pause all of it"), "{stderr}");
    relay.operate(&world, &["resume", "--topic", &topic]);
    consumer.read(2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_finds_the_table_that_is_meant() {
    let world = World::new("verb_replay").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let of = |name: &str| format!("{{ name: {name}, after_publish: mark }}");
    let one = world.config(&format!("[{{ name: plain }}, {}]", of("one")), "");
    let two = world.config(&format!("[{{ name: plain }}, {}, {}]", of("one"), of("two")), "");
    world.install(&two).await;
    let id = |n: u8| format!("00000000-0000-4000-8000-00000000000{n}");
    for (table, n) in [("one", 1), ("two", 2), ("one", 3), ("two", 3)] {
        let id = id(n);
        world.sql(&format!("INSERT INTO {table} (id, topic, key) VALUES ('{id}', '{topic}', 'k')")).await;
    }
    let relay = world.relay(&one);
    world.until("SELECT count(*) FROM one WHERE published_at IS NOT NULL", 2).await;
    // The only one that keeps what is published.
    assert_eq!(relay.operate(&world, &["replay", "--from", "1", "--dry-run"])["tables"][0]["table"], "one");
    assert_eq!(relay.stop().0, Some(0));
    let relay = world.relay(&two);
    world.until("SELECT count(*) FROM two WHERE published_at IS NOT NULL", 2).await;
    let (_, _, stderr) = said(&relay.try_to(&world, &["replay", "--from", "1"]));
    assert!(stderr.contains("say which table: one, two"), "{stderr}");
    // The only one that has the id.
    let done = relay.operate(&world, &["replay", "--id", &id(2)]);
    assert_eq!((done["events"].as_u64(), done["tables"][0]["table"].as_str()), (Some(1), Some("two")));
    let (_, _, stderr) = said(&relay.try_to(&world, &["replay", "--id", &id(3)]));
    assert!(stderr.contains("one and two have these ids"), "{stderr}");
    assert_eq!(relay.operate(&world, &["replay", "--id", &id(9)])["events"], 0);
    let replayed = world.consumer(&topic).read(5).last().unwrap().header("id").map(str::to_owned);
    assert_eq!(replayed, Some(id(2)));
}
