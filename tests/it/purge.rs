//! `whippet purge`: one person's payloads go, everybody else's stay, and the audit log has it.

use std::process::Command;

use bytes::Bytes;
use whippet::store::{Store, safe_key};

use crate::{
    bucket::Bucket,
    harness::{World, whippet},
};

const CONFIG: &str = "[{ name: outbox }]";

async fn put(store: &Store, key: &str, size: usize) {
    store.put(&safe_key(key), Bytes::from(vec![7; size]), "text/plain").await.unwrap();
}

async fn left(store: &Store) -> u64 {
    store.tally("").await.unwrap().objects
}

/// The exit code, what it printed, and what it said besides.
fn purge(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = whippet(&[&["purge"], arguments].concat());
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn one_persons_payloads_go_and_all_others_stay() {
    let (world, bucket) = (World::new("purge").await, Bucket::new("purge").await);
    let store = bucket.store("shop");
    for (key, size) in [
        ("orders/customer 4/a", 10),
        ("orders/customer 4/b/c", 20),
        ("orders/customer 42/a", 1),
        ("orders/customer_-204/a", 1),
        ("other/customer 4/a", 1),
    ] {
        put(&store, key, size).await;
    }
    put(&bucket.store("shop2"), "orders/customer 4/a", 1).await;
    let config = world.write("whippet.yaml", &world.config(CONFIG, &bucket.config("shop", &[])));
    let place = store.uri(&safe_key("orders/customer 4"));
    let audit = "SELECT count(*) FROM information_schema.tables WHERE table_name = 'whippet_audit'";

    let (code, printed, _) = purge(&["--config", &config, "--prefix", "/orders/customer 4/", "--dry-run"]);
    assert_eq!((code, &printed), (Some(0), &format!("would delete 2 objects, 30 bytes, in {place}\n")));
    assert_eq!((left(&store).await, world.number(audit).await), (5, 0));

    // As contract.md has it: the configuration is that of the folder, where none is named.
    let here = Command::new(env!("CARGO_BIN_EXE_whippet"))
        .args(["purge", "--prefix", "orders/customer 4", "--dry-run"])
        .current_dir(world.folder.path())
        .output()
        .unwrap();
    assert_eq!((here.status.code(), String::from_utf8(here.stdout).unwrap()), (Some(0), printed));

    let asked = ["--prefix", "orders/customer 4", "--who", "ann", "--why", "request 17", "--json"];
    let (code, printed, said) = purge(&[&["--config", &config], &asked[..]].concat());
    assert_eq!((code, said.as_str()), (Some(0), ""));
    let expected = serde_json::json!({ "place": place, "objects": 2, "bytes": 30, "dry_run": false });
    assert_eq!(serde_json::from_str::<serde_json::Value>(&printed).unwrap(), expected);
    assert_eq!(left(&store).await, 3);
    let line = format!(
        "SELECT count(*) FROM whippet.whippet_audit WHERE who = 'ann' AND action = 'purge' AND what = '{place}' \
         AND why = 'request 17' AND events = 2"
    );
    assert_eq!(world.number(&line).await, 1);

    // Once more is nothing more, and is asked for: that is on record.
    let (code, printed, _) = purge(&["--config", &config, "--prefix", "orders/customer 4"]);
    assert_eq!((code, printed), (Some(0), format!("deleted 0 objects, 0 bytes, in {place}\n")));
    let lines = "SELECT count(*) FROM whippet.whippet_audit WHERE action = 'purge' AND events = 0";
    assert_eq!(world.number(lines).await, 1);

    for empty in ["", "/", "//"] {
        let (code, _, said) = purge(&["--config", &config, "--prefix", empty]);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("the prefix is empty; --all deletes everything\n"), "{said}");
    }
    assert_eq!(purge(&["--config", &config]).0, Some(2));
    assert_eq!(left(&store).await, 3);
    assert_eq!(purge(&["--config", &config, "--all"]).0, Some(0));
    assert_eq!((left(&store).await, left(&bucket.store("shop2")).await), (0, 1));
}

#[tokio::test]
async fn a_purge_that_may_not_delete_says_so_and_has_its_line() {
    let (world, bucket) = (World::new("purge_denied").await, Bucket::new("denied").await);
    put(&bucket.store("shop"), "a/b", 1).await;
    bucket.allow_anybody(&["s3:PutObject"]).await;
    let options = [("skip_signature", "true")];
    let config = world.write("whippet.yaml", &world.config(CONFIG, &bucket.config("shop", &options)));
    let (code, _, said) = purge(&["--config", &config, "--prefix", "a"]);
    assert!(code == Some(1) && said.contains("403 AccessDenied"), "{code:?} {said}");

    bucket.allow_anybody_to_list().await;
    let (code, printed, said) = purge(&["--config", &config, "--prefix", "a"]);
    assert_eq!((code, printed.as_str()), (Some(1), ""));
    assert!(said.contains("AccessDenied") && said.contains("run it again"), "{said}");
    assert_eq!(world.number("SELECT count(*) FROM whippet.whippet_audit WHERE events = 1").await, 1);
}

#[tokio::test]
async fn old_versions_that_stay_are_not_kept_secret() {
    let (world, bucket) = (World::new("versions").await, Bucket::new("versions").await);
    bucket.keep_versions().await;
    put(&bucket.store("shop"), "a/b", 1).await;
    let config = world.write("whippet.yaml", &world.config(CONFIG, &bucket.config("shop", &[])));
    let (code, _, said) = purge(&["--config", &config, "--prefix", "a"]);
    assert!(code == Some(0) && said.contains("the bucket keeps old versions"), "{code:?} {said}");
}
