//! Payloads of any size: as they are, encoded, as references to a real MinIO, and in chunks.

use std::collections::{BTreeMap, HashMap, HashSet};

use whippet::{
    record::{
        encode::Codec,
        wire::{self, hex, sha256},
    },
    store::Store,
};

use crate::{
    bucket::Bucket,
    harness::{Seen, World, calm},
};

const MIB: usize = 1 << 20;
/// A topic's `max.message.bytes`, unless it says something else.
const LIMIT: usize = 1_048_588;

/// The payload of an event: the same in SQL.
fn content(number: usize, size: usize) -> Vec<u8> {
    let piece = format!("event {number} ");
    piece.bytes().cycle().take(size).collect()
}

/// Inserts event `number` with a payload of `size` bytes; its type is its number.
fn insert(topic: &str, key: &str, number: usize, size: usize) -> String {
    let piece = format!("event {number} ");
    format!(
        "INSERT INTO outbox (id, topic, key, type, payload) VALUES (md5('{topic}{number}')::uuid, '{topic}', {key}, '{number}', \
         convert_to(left(repeat('{piece}', {}), {size}), 'UTF8'));",
        size / piece.len() + 1
    )
}

/// What a reader makes of the records of a topic: event by event, at its last record.
struct Reader {
    store: Option<Store>,
    chunks: HashMap<String, BTreeMap<usize, Vec<u8>>>,
    joined: HashSet<String>,
}

impl Reader {
    fn new(bucket: Option<&Bucket>) -> Reader {
        let store = bucket.map(|bucket| Store::open(&bucket.url(""), &Bucket::options()).unwrap());
        Reader { store, chunks: HashMap::new(), joined: HashSet::new() }
    }

    /// The number of the event and its payload, where this record completes one.
    async fn read(&mut self, record: &Seen) -> Option<(usize, Vec<u8>)> {
        let number = record.header("eventType").unwrap().parse().unwrap();
        let mut payload = record.payload.clone().unwrap();
        let mut encoding = record.header(wire::CONTENT_ENCODING).map(str::to_owned);
        if let Some(uri) = record.header(wire::REF_URI) {
            assert_eq!(record.text(), uri);
            payload = self.store.as_ref().unwrap().get(uri, 1 << 30).await.unwrap().to_vec();
            assert_eq!(record.header(wire::REF_SIZE).unwrap(), payload.len().to_string());
            assert_eq!(record.header(wire::REF_SHA256).unwrap(), hex(&sha256(&payload)));
            assert!(encoding.is_none());
            encoding = record.header(wire::REF_ENCODING).map(str::to_owned);
        }
        if let Some(id) = record.header(wire::CHUNK_ID) {
            let number_of = |name: &str| record.header(name).unwrap().parse::<usize>().unwrap();
            let chunks = self.chunks.entry(id.to_owned()).or_default();
            chunks.insert(number_of(wire::CHUNK_INDEX), payload);
            if chunks.len() < number_of(wire::CHUNK_COUNT) || !self.joined.insert(id.to_owned()) {
                return None;
            }
            payload = self.chunks.remove(id).unwrap().into_values().flatten().collect();
            assert_eq!(payload.len(), number_of(wire::CHUNK_SIZE));
            assert_eq!(record.header(wire::CHUNK_SHA256).unwrap(), hex(&sha256(&payload)));
        }
        if let Some(encoding) = encoding {
            payload = Codec::from_name(&encoding).unwrap().decode(&payload, 1 << 30).unwrap();
        }
        Some((number, payload))
    }

    /// Every event of these records, by key, in the order of their first appearance.
    async fn read_all(&mut self, records: &[Seen]) -> HashMap<Option<Vec<u8>>, Vec<usize>> {
        let mut orders: HashMap<Option<Vec<u8>>, Vec<usize>> = HashMap::new();
        let mut seen = HashSet::new();
        for record in records {
            if let Some((number, payload)) = self.read(record).await {
                assert!(payload == content(number, payload.len()), "event {number} is not what it was");
                if seen.insert(number) {
                    orders.entry(record.key.clone()).or_default().push(number);
                }
            }
        }
        orders
    }
}

fn assert_in_order(orders: &HashMap<Option<Vec<u8>>, Vec<usize>>, events: usize) {
    assert_eq!(orders.values().map(Vec::len).sum::<usize>(), events);
    for (key, numbers) in orders.iter().filter(|(key, _)| key.is_some()) {
        assert!(numbers.is_sorted(), "{key:?}: {numbers:?}");
    }
}

/// All sizes that the issue names, mixed with small ones of the same and of other keys.
async fn sizes(name: &str, table: &str, bucket: Option<&Bucket>) -> (World, Vec<Seen>, usize) {
    let world = World::new(name).await;
    let topic = world.create_topic("events", 3, &[]).await;
    let store = bucket.map_or_else(String::new, |bucket| bucket.config("payloads", &[]));
    let config = calm(&world.config(table, &store));
    world.install(&config).await;
    let mut number = 0;
    // Around what fits with the headers that these records have.
    let around = (LIMIT - 400..LIMIT - 100).step_by(20);
    let named = [0, 1, LIMIT - 1, LIMIT, LIMIT + 1, 5 * MIB, 50 * MIB, 200 * MIB];
    for size in named.into_iter().chain(around) {
        let mut script = String::from("BEGIN;");
        for (key, size) in [("'a'", 10), ("'a'", size), ("'a'", 20), ("'b'", 30), ("NULL", 40)] {
            script += &insert(&topic, key, number, size);
            number += 1;
        }
        world.sql(&(script + "COMMIT;")).await;
    }
    let relay = world.relay(&config);
    world.until_within("SELECT count(*) FROM outbox", 0, std::time::Duration::from_mins(2)).await;
    // contract.md, 5.4: 40 MiB, twice the window of 12 MiB, three times the largest row.
    let bound = 40.0 + 2.0 * 12.0 + 3.0 * 200.0;
    eprintln!("{name}: peak {:.0} of {bound} MiB", relay.peak_mib());
    assert!(relay.peak_mib() <= bound, "{} MiB", relay.peak_mib());
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("did not take a record"), "the broker was never asked in vain: {log}");
    let mut consumer = world.consumer(&topic);
    (world, consumer.read_to_end().to_vec(), number)
}

#[tokio::test(flavor = "multi_thread")]
async fn claim_checks_of_every_size_arrive_in_order() {
    let bucket = Bucket::new("sizes").await;
    let (_world, records, events) = sizes("refsizes", "[{ name: outbox }]", Some(&bucket)).await;
    assert_eq!(records.len(), events);
    let by_reference = records.iter().filter(|record| record.header(wire::REF_URI).is_some()).count();
    assert!(by_reference >= 6, "{by_reference}");
    for record in &records {
        let (_, flag) = record.headers.iter().find(|(name, _)| name == wire::BACKED_VALUE).unwrap();
        let backed = record.header(wire::REF_URI).is_some();
        assert_eq!(flag.as_deref(), Some(&[u8::from(backed)][..]));
    }
    let orders = Reader::new(Some(&bucket)).read_all(&records).await;
    assert_in_order(&orders, events);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_of_every_size_arrive_in_order() {
    let table = "[{ name: outbox, payload: { oversize: chunk } }]";
    let (_world, records, events) = sizes("chunksizes", table, None).await;
    let mut partitions: HashMap<&str, HashSet<i32>> = HashMap::new();
    let mut next: HashMap<&str, usize> = HashMap::new();
    for record in &records {
        let Some(id) = record.header(wire::CHUNK_ID) else { continue };
        partitions.entry(id).or_default().insert(record.partition);
        // In index order, each once: nothing went wrong.
        let next = next.entry(id).or_default();
        assert_eq!(record.header(wire::CHUNK_INDEX).unwrap(), next.to_string());
        *next += 1;
    }
    assert!(partitions.len() >= 6 && partitions.values().all(|partitions| partitions.len() == 1));
    let orders = Reader::new(None).read_all(&records).await;
    assert_in_order(&orders, events);
}
