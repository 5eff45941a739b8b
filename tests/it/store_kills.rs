//! The relay dies around uploads and between chunks, and objects are changed behind its back.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use whippet::{
    consume::{Problem, RecvError, Travelled},
    record::wire,
    store::Store,
};

use crate::{
    harness::{Relay, Seen, whippet},
    large::{Large, MIB, next, noise},
};

/// Starts relays, one after the other, that die at these places, and returns when the last has.
async fn die_at(stage: &Large, config: &str, places: &[&str]) {
    let file = stage.world.write("whippet.yaml", config);
    for place in places {
        let relay = Relay::start_with(&file, &[("FAILPOINTS", place)]);
        let ended = tokio::task::spawn_blocking(move || relay.ended()).await.unwrap();
        assert!(!ended.success(), "{place}: {ended}");
        let left: BTreeSet<String> = stage.objects().await.difference(&stage.references()).cloned().collect();
        let unfinished = unfinished(stage).await;
        let is_of_one = |uri: &String| unfinished.iter().any(|id| uri.contains(id));
        assert!(left.iter().all(is_of_one), "{place}: {left:?} are of no event of {unfinished:?}");
        eprintln!("{place}: {} objects of events that are not finished", left.len());
        assert!(!place.starts_with("uploaded") || !left.is_empty(), "it died too early");
    }
}

/// The ids that are in the outbox.
async fn unfinished(stage: &Large) -> Vec<String> {
    sqlx::query_scalar("SELECT id::text FROM outbox").fetch_all(stage.world.db.pg()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_dies_around_an_upload_leaves_objects_of_unfinished_events_only() {
    let mut stage = Large::set("uploadkill", &[]).await;
    let config = stage.config("", &[], "");
    stage.world.install(&config).await;
    for n in 0..8 {
        let size = if n == 5 { 17 * MIB } else { 2 * MIB };
        let key = ["a", "b"][n % 2];
        stage.insert(key, size).await;
        stage.insert(key, 10).await;
    }
    let places = ["before-upload=return", "uploaded=return", "uploaded=2*off->return"];
    die_at(&stage, &config, &places).await;
    let relay = stage.world.relay(&config);
    let (verdict, events) = stage.end(relay).await;
    assert_eq!(verdict.published, 17);
    let referred = events.iter().filter(|event| event.travelled == Travelled::Reference);
    assert_eq!(referred.count(), 8);
}

/// It would die if it hashed a payload once more for its upload.
#[tokio::test(flavor = "multi_thread")]
async fn a_payload_is_hashed_once() {
    let mut stage = Large::set("hashedonce", &[]).await;
    let config = stage.config("", &[], "");
    stage.world.install(&config).await;
    let relay = Relay::start_with(
        &stage.world.write("whippet.yaml", &config),
        &[("FAILPOINTS", "hashed-again=return")],
    );
    for _ in 0..3 {
        stage.insert("k", 2 * MIB).await;
    }
    let (verdict, events) = stage.end(relay).await;
    assert_eq!(verdict.published, 4);
    assert_eq!(events.iter().filter(|event| event.travelled == Travelled::Reference).count(), 3);
}

/// Sets of chunks of which not all came.
fn partial_sets(seen: &[Seen]) -> usize {
    let mut sets: BTreeMap<&str, (BTreeSet<&str>, usize)> = BTreeMap::new();
    for record in seen {
        let Some(id) = record.header(wire::CHUNK_ID) else { continue };
        let (indices, count) = sets.entry(id).or_default();
        indices.insert(record.header(wire::CHUNK_INDEX).unwrap());
        *count = record.header(wire::CHUNK_COUNT).unwrap().parse().unwrap();
    }
    sets.values().filter(|(indices, count)| indices.len() < *count).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_dies_between_chunks_sends_the_event_again_and_a_reader_joins_it_once() {
    let mut stage = Large::set("chunkkill", &[]).await;
    let config = |size: &str| stage.config(&format!("oversize: chunk, chunk: {{ size: {size} }}"), &[], "");
    let (config, other) = (config("100KiB"), config("150KiB"));
    stage.world.install(&config).await;
    for key in ["a", "b", "a", "b"] {
        stage.insert(key, 3 * MIB).await;
        stage.insert(key, 10).await;
    }
    die_at(&stage, &config, &["mid-chunks=return"]).await;
    assert_eq!(partial_sets(&stage.seen()), 1, "it died with one of the chunks acknowledged");
    // In the middle of a set, with whole ones before it; then with slices of another size.
    die_at(&stage, &config, &["mid-chunks=40*off->return"]).await;
    die_at(&stage, &other, &["mid-chunks=9*off->return"]).await;
    let relay = stage.world.relay(&other);
    let (verdict, events) = stage.end(relay).await;
    assert_eq!(verdict.published, 9);
    assert_eq!(events.iter().filter(|event| matches!(event.travelled, Travelled::Chunks(_))).count(), 4);
    let repeats = stage.seen().len() - events.len();
    assert!(repeats > 4 * 21, "nothing came twice: {repeats}");
}

/// With the record of a relay, by the reader that is a library and by the one that is a command.
#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_was_changed_is_refused_by_every_reader() {
    let mut stage = Large::set("changed", &[]).await;
    let config = stage.config("", &[], "");
    let relay = stage.relay(&config).await;
    let large = stage.insert("k", 2 * MIB).await;
    let small = stage.insert("k", 10).await;
    let seen = stage.until_seen(&[&large, &small]);
    let record = seen.iter().find(|record| record.header("id") == Some(&large)).unwrap();
    let uri = record.header(wire::REF_URI).unwrap().to_owned();
    let store: Store = stage.bucket.store("");
    let key = store.key_of(&uri).unwrap();
    let original = store.get(&uri, 1 << 30).await.unwrap();
    let file = stage.world.write("consume.yaml", &config);
    for (content, why) in [
        (noise(99, 2 * MIB), "has another sha256 than was promised"),
        (noise(99, 2 * MIB - 1), "bytes where 2097152 were promised"),
    ] {
        store.put(&key, Bytes::from(content), "application/json").await.unwrap();
        let mut consumer = stage.consumer().await;
        let (mut read, mut refused) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            match next(&mut consumer).await {
                Ok(event) => read.push(event.id().unwrap().to_owned()),
                Err(RecvError::Read(error)) => refused.push(error),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(read, [small.as_str()]);
        let [error] = &refused[..] else { panic!("{refused:?}") };
        assert!(
            matches!(error.problem, Problem::WrongChecksum { .. } | Problem::WrongSize { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(why) && error.to_string().contains(&uri), "{error}");

        let said = whippet(&[
            "consume",
            "--config",
            &file,
            "--topic",
            &stage.topic,
            "--from-beginning",
            "--max",
            "1",
        ]);
        let printed = String::from_utf8(said.stdout).unwrap();
        assert!(printed.lines().count() == 1 && printed.contains(&small), "the next one: {printed}");
        let error = String::from_utf8(said.stderr).unwrap();
        assert!(error.contains(why) && error.contains(&uri), "{error}");
        assert_eq!(said.status.code(), Some(1), "{error}");
    }
    store.put(&key, original, "application/json").await.unwrap();
    stage.end(relay).await;
}
