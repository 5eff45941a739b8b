//! Large events on their way through a bucket of their own, and what a consumer makes of them: bytes, order
//! and repeats by the outside checker, and no object that nobody refers to.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    time::{Duration, Instant},
};

use futures_util::TryStreamExt as _;
use whippet::{
    consume::{Consumer, Event, RecvError, Settings, Start},
    record::wire,
    store::Object,
};

use crate::{
    bucket::Bucket,
    checker::{Verdict, Written, check},
    harness::{Relay, SOON, Seen, World, kafka},
};

pub const MIB: usize = 1 << 20;

/// Bytes that no codec makes smaller, others for every seed.
pub fn noise(seed: usize, size: usize) -> Vec<u8> {
    let mut content = vec![0; size];
    fastrand::Rng::with_seed(seed as u64).fill(&mut content);
    content
}

/// A topic of one partition, a bucket, and the history of what was committed.
pub struct Large {
    pub world: World,
    pub topic: String,
    pub bucket: Bucket,
    written: Vec<Written>,
}

impl Large {
    pub async fn set(name: &str, topic: &[(&str, &str)]) -> Large {
        let world = World::new(name).await;
        let topic = world.create_topic("events", 1, topic).await;
        Large { world, topic, bucket: Bucket::new(&name.replace('_', "-")).await, written: Vec::new() }
    }

    /// A configuration whose only table has these keys of `payload`, and whose store these options.
    pub fn config(&self, payload: &str, options: &[(&str, &str)], more: &str) -> String {
        let table = format!("[{{ name: outbox, payload: {{ {payload} }} }}]");
        self.world.config(&table, &(self.bucket.config("payloads", options) + more))
    }

    /// The outbox for it, and a relay.
    pub async fn relay(&self, config: &str) -> Relay {
        self.world.install(config).await;
        self.world.relay(config)
    }

    /// Commits an event of so many bytes, and returns its id.
    pub async fn insert(&mut self, key: &str, size: usize) -> String {
        let payload = noise(self.written.len(), size);
        self.insert_into("outbox", key, payload).await
    }

    pub async fn insert_into(&mut self, table: &str, key: &str, payload: Vec<u8>) -> String {
        let id = uuid::Uuid::new_v4().to_string();
        let inserted = Instant::now();
        let insert =
            format!("INSERT INTO {table} (id, topic, key, payload) VALUES ($1::text::uuid, $2, $3, $4)");
        let insert = sqlx::query(sqlx::AssertSqlSafe(insert));
        insert
            .bind(&id)
            .bind(&self.topic)
            .bind(key)
            .bind(&payload)
            .execute(self.world.db.pg())
            .await
            .unwrap();
        self.written.push(Written {
            id: id.clone(),
            key: key.to_owned(),
            payload,
            transaction: self.written.len() as u64,
            inserted,
            nth: 0,
            committed: Some(Instant::now()),
        });
        id
    }

    /// Waits until every one of these events is in Kafka, and returns everything that is there.
    pub fn until_seen(&self, ids: &[&str]) -> Vec<Seen> {
        let mut consumer = self.world.consumer(&self.topic);
        let has = |seen: &[Seen], id: &str| seen.iter().any(|record| record.header("id") == Some(id));
        consumer.read_until(|seen| ids.iter().all(|id| has(seen, id))).to_vec()
    }

    /// Waits until so many rows are held, for this cause and with this reason.
    pub async fn until_held(&self, count: i64, cause: &str, reason: &str) {
        let held = "SELECT count(*) FROM whippet.holds WHERE cause =";
        self.world.until(&format!("{held} '{cause}' AND reason LIKE '%{reason}%'"), count).await;
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.world.consumer(&self.topic).read_to_end().to_vec()
    }

    /// The objects that a topic's records refer to.
    pub fn references(&self) -> BTreeSet<String> {
        let uri = |record: &Seen| record.header(wire::REF_URI).map(str::to_owned);
        self.seen().iter().filter_map(uri).collect()
    }

    /// The URIs of all objects.
    pub async fn objects(&self) -> BTreeSet<String> {
        let store = self.bucket.store("");
        let found: Vec<Object> = store.list("").try_collect().await.unwrap();
        found.iter().map(|object| store.uri(&object.key)).collect()
    }

    /// A reader of the topic from its beginning.
    pub async fn consumer(&self) -> Consumer {
        let settings = Settings { start: Start::Beginning, ..Settings::new(&kafka(), &[&self.topic]) };
        Consumer::open(&settings, Some(self.bucket.store(""))).await.unwrap()
    }

    /// What the consumer kit hands over, up to the event of this id.
    pub async fn events(&self, last: &str) -> Vec<Event> {
        let mut consumer = self.consumer().await;
        let mut events = Vec::new();
        while events.last().and_then(Event::id) != Some(last) {
            events.push(next(&mut consumer).await.unwrap());
        }
        events
    }

    /// Lets the relay finish, and has the outside checker compare what the consumer kit hands over with what
    /// was committed: each event once, each after the one before it, and no object too many.
    pub async fn end(&mut self, relay: Relay) -> (Verdict, Vec<Event>) {
        self.end_of("outbox", relay).await
    }

    /// The same where this is the last table that is not empty.
    pub async fn end_of(&mut self, table: &str, relay: Relay) -> (Verdict, Vec<Event>) {
        let left = format!("SELECT count(*) FROM {table}");
        self.world.until(&left, 0).await;
        let last = self.insert_into(table, "last", Vec::new()).await;
        self.world.until(&left, 0).await;
        self.until_seen(&[&last]);
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        let events = self.events(&last).await;
        let ids: HashSet<_> = events.iter().map(Event::id).collect();
        assert_eq!(ids.len(), events.len(), "an event was handed over twice");
        let mut before: BTreeMap<_, &Event> = BTreeMap::new();
        for event in &events {
            if let Some(earlier) = before.insert(event.key.clone(), event) {
                assert!(
                    earlier.place.last < event.place.first,
                    "{event:?} began before {earlier:?} was whole"
                );
            }
        }
        let seen: Vec<Seen> = events.iter().map(as_seen).collect();
        let verdict = check(&self.written, &seen);
        assert_eq!(
            self.objects().await,
            self.references(),
            "objects that nobody refers to, or that are gone"
        );
        (verdict, events)
    }
}

/// The next event, or why it cannot be read.
pub async fn next(consumer: &mut Consumer) -> Result<Event, RecvError> {
    tokio::time::timeout(SOON, consumer.recv()).await.expect("nothing comes")
}

/// An event as the checker has it: at the record that made it whole.
fn as_seen(event: &Event) -> Seen {
    Seen {
        partition: event.place.partition,
        offset: event.place.last,
        timestamp: event.timestamp_ms,
        key: event.key.as_deref().map(<[u8]>::to_vec),
        payload: event.payload.as_deref().map(<[u8]>::to_vec),
        headers: vec![("id".into(), event.id().map(|id| id.as_bytes().to_vec()))],
    }
}

/// Waits until MinIO knows of no upload that was begun and not ended: an abandoned one is aborted after a while.
pub async fn until_nothing_is_unfinished(bucket: &Bucket) {
    let deadline = Instant::now() + SOON;
    while bucket.unfinished("").await > 0 {
        assert!(Instant::now() < deadline, "uploads are left unfinished");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
