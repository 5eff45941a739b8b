//! Claim checks as a client reads them that nobody here wrote: bakdata's deserializer for Java.

use std::{collections::HashMap, process::Command};

use bytes::Bytes;
use rdkafka::{
    ClientConfig,
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use whippet::store::safe_key;

use crate::{
    bucket::{Bucket, REGION},
    harness::{SOON, World, kafka, path, service},
    large::{Large, MIB, noise},
};

/// A record as the application behind the deserializer has it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Read {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<String>,
    pub size: Option<usize>,
    pub sha256: Option<String>,
}

/// Reads a topic to its end; the error is what the client said.
pub fn read(topic: &str) -> Result<Vec<Read>, String> {
    let output = Command::new(path("scripts/large-message-reader"))
        .arg(topic)
        .arg(format!("bootstrap.servers={}", kafka()))
        .arg(format!("large.message.s3.endpoint={}", service("WHIPPET_TEST_S3")))
        .arg(format!("large.message.s3.region={REGION}"))
        .arg(format!("large.message.s3.access.key={}", service("WHIPPET_TEST_S3_KEY")))
        .arg(format!("large.message.s3.secret.key={}", service("WHIPPET_TEST_S3_SECRET")))
        .arg("large.message.s3.path.style.access=true")
        .arg("max.partition.fetch.bytes=100000000")
        .output()
        .unwrap();
    match output.status.success() {
        true => {
            let lines = String::from_utf8(output.stdout).unwrap();
            Ok(lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
        }
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Bytes::copy_from_slice(&Sha256::digest(bytes)))
}

const BACKED: &str = "__large.message.backed.value";

async fn produce(topic: &str, key: &str, value: Option<&[u8]>, flag: Option<u8>) {
    let producer: FutureProducer = ClientConfig::new().set("bootstrap.servers", kafka()).create().unwrap();
    let flag = flag.map(|flag| [flag]);
    let headers = flag.iter().fold(OwnedHeaders::new(), |headers, flag| {
        headers.insert(Header { key: BACKED, value: Some(&flag[..]) })
    });
    let mut record = FutureRecord::to(topic).key(key).headers(headers);
    record.payload = value;
    producer.send(record, SOON).await.unwrap();
}

#[tokio::test]
async fn javas_reader_takes_our_objects_and_uris() {
    let (world, bucket) = (World::new("bakdata").await, Bucket::new("bakdata").await);
    let topic = world.create_topic("orders", 1, &[]).await;
    let store = bucket.store("some/prefix");
    let mut expected: HashMap<String, Option<Vec<u8>>> = HashMap::new();
    for (key, size) in [("plain", 1 << 20), ("in parts", 20 << 20), ("empty", 0), ("ümlaut ?%#/..", 10)] {
        let content = vec![u8::try_from(key.len()).unwrap(); size];
        let object = safe_key(&format!("{topic}/{key}"));
        store.put(&object, Bytes::from(content.clone()), "application/json").await.unwrap();
        produce(&topic, key, Some(store.uri(&object).as_bytes()), Some(1)).await;
        expected.insert(key.to_owned(), Some(content));
    }
    produce(&topic, "inline", Some(b"small"), Some(0)).await;
    expected.insert("inline".into(), Some(b"small".to_vec()));
    produce(&topic, "gone", None, Some(0)).await;
    expected.insert("gone".into(), None);

    let read_back = read(&topic).unwrap();
    assert_eq!(read_back.len(), expected.len());
    for one in read_back {
        let value = &expected[one.key.as_deref().unwrap()];
        assert_eq!(one.size, value.as_ref().map(Vec::len), "{one:?}");
        assert_eq!(one.sha256, value.as_deref().map(sha256), "{one:?}");
    }
}

/// Claim-checked and inline in one topic: of a table with both dialects, and of one with this alone, whose
/// objects are encoded.
#[tokio::test(flavor = "multi_thread")]
async fn javas_reader_reads_the_relays_own_records() {
    let mut stage = Large::set("bakdata_relay", &[]).await;
    let tables = "[{ name: outbox }, { name: alone, payload: { inline_max: 0, \
                  encode: { codec: zstd }, reference: { dialects: [bakdata] } } }]";
    let config = stage.world.config(tables, &stage.bucket.config("payloads", &[]));
    let relay = stage.relay(&config).await;
    let mut expected = HashMap::new();
    for (table, key, payload) in [
        ("outbox", "small", b"small".to_vec()),
        ("outbox", "large", noise(1, 2 * MIB)),
        ("outbox", "empty", Vec::new()),
        ("outbox", "ümlaut ?%#/..", noise(2, 17 * MIB)),
        ("outbox", "inline", noise(3, 500_000)),
        ("alone", "alone", b"small".to_vec()),
        ("alone", "alone, encoded", vec![7; 3 * MIB]),
        ("alone", "alone, empty", Vec::new()),
    ] {
        stage.insert_into(table, key, payload.clone()).await;
        expected.insert(key.to_owned(), payload);
    }
    stage.world.sql(&format!("INSERT INTO alone (topic, key) VALUES ('{}', 'gone')", stage.topic)).await;
    for table in ["outbox", "alone"] {
        stage.world.until(&format!("SELECT count(*) FROM {table}"), 0).await;
    }
    assert_eq!(relay.stop().0, Some(0));
    let read_back = read(&stage.topic).unwrap();
    assert_eq!(read_back.len(), expected.len() + 1);
    for one in read_back {
        let value = expected.get(one.key.as_deref().unwrap());
        assert_eq!(one.size, value.map(Vec::len), "{one:?}");
        assert_eq!(one.sha256, value.map(|value| sha256(value)), "{one:?}");
    }
}

/// What the dialect has to keep to: an object that is there, and a flag on every record.
#[tokio::test]
async fn javas_reader_stops_at_what_it_cannot_take() {
    let (world, bucket) = (World::new("bakdata_bad").await, Bucket::new("bakdata-bad").await);
    let missing = world.create_topic("missing", 1, &[]).await;
    produce(&missing, "k", Some(bucket.store("").uri("nothing").as_bytes()), Some(1)).await;
    assert!(read(&missing).unwrap_err().contains("specified key does not exist"));
    let unflagged = world.create_topic("unflagged", 1, &[]).await;
    produce(&unflagged, "k", Some(b"small"), None).await;
    assert!(read(&unflagged).is_err());
}
