//! `whippet doctor`, and what a relay finds when it starts.

use std::path::Path;

use serde_json::Value;

use crate::{
    bucket::Bucket,
    harness::{Relay, World, path, whippet},
};

fn doctor(config: &str) -> (Option<i32>, String) {
    let output = whippet(&["doctor", "--config", config]);
    assert!(output.stderr.is_empty(), "{output:?}");
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

fn lines<'a>(printed: &'a str, verdict: &str) -> Vec<&'a str> {
    printed.lines().filter(|line| line.starts_with(verdict)).collect()
}

#[tokio::test]
async fn a_store_that_can_be_used_is_left_as_it_was() {
    let (world, bucket) = (World::new("doctor").await, Bucket::new("doctor").await);
    let text = world.config("[{ name: outbox }]", &bucket.config("p", &[]));
    world.install(&text).await;
    let config = world.write("whippet.yaml", &text);
    let (code, printed) = doctor(&config);
    assert_eq!(code, Some(0), "{printed}");
    for check in ["put", "get", "delete", "lifecycle rules", "versions"] {
        assert!(printed.contains(&format!("ok    object store: {check}: ")), "{printed}");
    }
    assert_eq!((lines(&printed, "warn"), lines(&printed, "FAIL")), (vec![], vec![]), "{printed}");
    assert_eq!(bucket.store("").tally("").await.unwrap().objects, 0);
    let none = world.write("none.yaml", &world.config("[{ name: outbox }]", ""));
    assert!(doctor(&none).1.ends_with("ok    object store: none is configured\n"));
}

#[tokio::test]
async fn a_store_that_cannot_be_used_fails_with_what_to_do() {
    let (world, bucket) = (World::new("doctor_fails").await, Bucket::new("doctor-fails").await);
    let table = "[{ name: outbox }]";
    world.install(&world.config(table, "")).await;
    for (options, expected) in [
        (&[("secret_access_key", "hunter2")][..], "SignatureDoesNotMatch"),
        (&[("endpoint", "http://127.0.0.1:9")], "cannot connect"),
        (&[("region", "eu-west-1")], "set the options region and endpoint"),
    ] {
        let config = world.write("whippet.yaml", &world.config(table, &bucket.config("", options)));
        let (code, printed) = doctor(&config);
        assert_eq!(code, Some(1), "{printed}");
        assert!(matches!(&lines(&printed, "FAIL")[..], [line] if line.contains(expected)), "{printed}");
        assert!(!printed.contains("hunter2"), "{printed}");
    }
    // A relay needs no more than to put.
    bucket.allow_anybody(&["s3:PutObject"]).await;
    let options = [("skip_signature", "true")];
    let config = world.write("whippet.yaml", &world.config(table, &bucket.config("", &options)));
    let output = whippet(&["doctor", "--json", "--config", &config]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let verdict = |check: &str| {
        let finding = findings.iter().find(|finding| finding["check"] == format!("object store: {check}"));
        finding.unwrap()["verdict"].as_str().unwrap().to_owned()
    };
    assert_eq!(
        (verdict("put"), verdict("get"), verdict("delete")),
        ("ok".into(), "warn".into(), "warn".into())
    );
    // Not to be allowed to read the rules is no error.
    assert_eq!(verdict("lifecycle rules"), "ok");
}

#[tokio::test]
async fn a_rule_that_takes_objects_before_their_records_is_a_warning() {
    let (world, bucket) = (World::new("doctor_rules").await, Bucket::new("doctor-rules").await);
    world.create_topic("week", 1, &[("retention.ms", "604800000")]).await;
    world.create_topic("day", 1, &[("retention.ms", "86400000")]).await;
    let ever = world.create_topic("ever", 1, &[("cleanup.policy", "compact")]).await;
    let table = format!("[{{ name: outbox, topic: '{}' }}]", world.topic("{type}"));
    let more = bucket.config("shop", &[]);
    let file = world.write("whippet.yaml", &world.config(&table, &more));
    world.install(&world.config(&table, &more)).await;
    bucket.expire_after(3, "shop/").await;
    let (code, printed) = doctor(&file);
    assert_eq!(code, Some(0), "{printed}");
    let warned = lines(&printed, "warn");
    assert_eq!(warned.len(), 2, "{printed}");
    let of_week = format!("topic {} keeps the records that refer to them for 7days", world.topic("week"));
    assert!(warned.iter().any(|line| line.contains("after 3 days") && line.contains(&of_week)), "{printed}");
    assert!(warned.iter().any(|line| line.contains(&ever) && line.contains("for ever")), "{printed}");
    bucket.expire_after(3, "elsewhere/").await;
    assert_eq!(lines(&doctor(&file).1, "warn"), [""; 0]);

    // A relay starts all the same.
    bucket.expire_after(3, "").await;
    bucket.keep_versions().await;
    let relay = Relay::start(&file);
    relay.wait_for(&of_week);
    relay.wait_for("keeps old versions");
    relay.until_status("/tables/0/state", "running").await;
    assert_eq!(relay.stop().0, Some(0));
}

/// Every check that can fail, by the sources, is broken by a test, which names it.
#[test]
fn every_check_that_fails_is_broken_by_a_test() {
    fn sources(folder: &Path, all: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            match entry.is_dir() {
                true => sources(&entry, all),
                false => all.push(std::fs::read_to_string(entry).unwrap()),
            }
        }
    }
    let mut files = Vec::new();
    sources(&path("src"), &mut files);
    files.retain(|file| file.contains("Finding::"));
    let tests = [
        include_str!("doctor_fixes.rs"),
        include_str!("doctor_servers.rs"),
        include_str!("doctor_mysql.rs"),
        include_str!("doctor_positions.rs"),
        include_str!("doctor_stores.rs"),
    ]
    .concat();
    let mut checks = Vec::new();
    for file in &files {
        let fails =
            ["Finding::fail(", "self.failed("].map(|call| file.split(call).skip(1)).into_iter().flatten();
        for call in fails {
            let name = call.split([',', ')']).next().unwrap().trim();
            let named = || file.split_once(&format!("const {name}: &str = \"")).map(|(_, rest)| rest);
            match name.strip_prefix('"').or_else(named).and_then(|rest| rest.split('"').next()) {
                Some(check) => checks.push(check.to_owned()),
                // A function that is given the check.
                None => assert!(name.starts_with("check"), "{name} is no check"),
            }
        }
    }
    checks.sort_unstable();
    checks.dedup();
    assert!(checks.len() > 20, "{checks:?}");
    // Of a configuration that is good: a build without this source, or a file that has gone since it was read.
    checks.retain(|check| !["source", "object store"].contains(&check.as_str()));
    checks.retain(|check| !tests.contains(&format!("\"{check}\"")));
    assert!(checks.is_empty(), "no test breaks {checks:?}");
}
