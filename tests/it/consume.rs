//! The consumer kit and `whippet consume`, on records that were produced by hand.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::{BufRead as _, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio_util::sync::CancellationToken;
use whippet::{
    consume::{Consumer, Problem, RecvError, Settings, Start},
    record::{encode::Codec, wire},
    store::Store,
};

use crate::{
    bucket::Bucket,
    harness::{SOON, kafka, whippet},
    proxy::Proxy,
};

type Headers = Vec<(String, Vec<u8>)>;

/// A topic of one test, and who writes to it.
struct Topic {
    name: String,
    producer: FutureProducer,
}

impl Topic {
    async fn new(name: &str, partitions: i32) -> Topic {
        let name = format!("it_consume_{name}_{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
        let admin: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", kafka()).create().unwrap();
        let new = NewTopic::new(&name, partitions, TopicReplication::Fixed(1));
        for created in admin.create_topics([&new], &AdminOptions::new()).await.unwrap() {
            created.unwrap();
        }
        let producer = ClientConfig::new()
            .set("bootstrap.servers", kafka())
            .set("enable.idempotence", "true")
            .set("linger.ms", "0")
            .create()
            .unwrap();
        Topic { name, producer }
    }

    async fn produce(&self, partition: i32, key: &str, headers: &Headers, value: Option<&[u8]>) {
        let owned = headers.iter().fold(OwnedHeaders::new(), |owned, (key, value)| {
            owned.insert(Header { key, value: Some(value) })
        });
        let mut record = FutureRecord::to(&self.name).partition(partition).key(key).headers(owned);
        record.payload = value;
        self.producer.send(record, SOON).await.map_err(|(error, _)| error).unwrap();
    }

    async fn small(&self, partition: i32, id: &str) {
        self.produce(partition, "small", &headers(&[("id", id), ("tenant", "acme")]), Some(id.as_bytes()))
            .await;
    }

    /// The first offset that a group has not committed.
    fn committed(&self, group: &str) -> Option<i64> {
        let consumer: BaseConsumer =
            ClientConfig::new().set("bootstrap.servers", kafka()).set("group.id", group).create().unwrap();
        let mut asked = TopicPartitionList::new();
        asked.add_partition(&self.name, 0);
        match consumer.committed_offsets(asked, SOON).unwrap().elements()[0].offset() {
            Offset::Offset(offset) => Some(offset),
            _ => None,
        }
    }

    async fn until_committed(&self, group: &str, expected: i64) {
        let deadline = Instant::now() + SOON;
        loop {
            let committed = tokio::task::block_in_place(|| self.committed(group));
            if committed == Some(expected) {
                return;
            }
            assert!(Instant::now() < deadline, "{group} has committed {committed:?}, not {expected}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn headers(of: &[(&str, &str)]) -> Headers {
    of.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect()
}

/// The chunks of an event, as docs/large-payloads.md has them.
fn chunks(id: &str, payload: &[u8], chunk_bytes: usize, codec: Option<Codec>) -> Vec<(Headers, Vec<u8>)> {
    let whole = codec.map_or_else(|| payload.to_vec(), |codec| codec.encode(payload));
    let sha256 = wire::sha256(&whole);
    let (count, size) = (whole.len().div_ceil(chunk_bytes).to_string(), whole.len().to_string());
    let chunk_id = wire::chunk_id(id, chunk_bytes, &sha256).to_string();
    let chunk = |(index, slice): (usize, &[u8])| {
        let mut of = headers(&[
            ("id", id),
            ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
            (wire::CHUNK_ID, &chunk_id),
            (wire::CHUNK_INDEX, &index.to_string()),
            (wire::CHUNK_COUNT, &count),
            (wire::CHUNK_SIZE, &size),
            (wire::CHUNK_SHA256, &wire::hex(&sha256)),
        ]);
        of.extend(codec.map(|codec| (wire::CONTENT_ENCODING.to_owned(), codec.name().as_bytes().to_vec())));
        (of, slice.to_vec())
    };
    whole.chunks(chunk_bytes).enumerate().map(chunk).collect()
}

fn reference(id: &str, uri: &str, object: &[u8]) -> Headers {
    headers(&[
        ("id", id),
        ("eventType", "OrderPlaced"),
        ("tenant", "acme"),
        (wire::REF_URI, uri),
        (wire::REF_SIZE, &object.len().to_string()),
        (wire::REF_SHA256, &wire::hex(&wire::sha256(object))),
    ])
}

fn payload(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.u8(..)).take(bytes).collect()
}

/// `whippet consume` as a process, and the lines that it prints.
struct Printing {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Printing {
    fn start(topic: &Topic, more: &[&str]) -> Printing {
        let mut child = Command::new(env!("CARGO_BIN_EXE_whippet"))
            .args(["consume", "--bootstrap-servers", &kafka(), "--topic", &topic.name, "--from-beginning"])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Printing { child, lines }
    }

    fn next(&mut self) -> serde_json::Value {
        serde_json::from_str(&self.lines.next().expect("it has ended").unwrap()).unwrap()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Printing {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_is_killed_in_mid_set_loses_no_chunked_event() {
    let topic = Topic::new("killed", 1).await;
    let large = [payload(1, 300_000), payload(2, 250_000)];
    let sets = [chunks("a", &large[0], 100_000, None), chunks("b", &large[1], 100_000, Some(Codec::Zstd))];
    topic.small(0, "first").await;
    // Two sets between one another, with a small event in their midst; neither is complete.
    for (set, index) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
        let (headers, slice) = &sets[set][index];
        topic.produce(0, &set.to_string(), headers, Some(slice)).await;
    }
    topic.small(0, "second").await;

    let group = ["--group", topic.name.as_str(), "--property", "group.instance.id=one"];
    let mut printing = Printing::start(&topic, &group);
    assert_eq!(printing.next()["id"], "first");
    assert_eq!(printing.next()["id"], "second");
    // Everything is printed, and the first chunk of the oldest set is where to begin again.
    topic.until_committed(&topic.name, 1).await;
    printing.kill();

    for set in [1, 0] {
        let (headers, slice) = &sets[set][2];
        topic.produce(0, &set.to_string(), headers, Some(slice)).await;
    }
    let mut printing = Printing::start(&topic, &group);
    assert_eq!(printing.next()["id"], "second", "what lay between the chunks may come again");
    for (id, whole, place) in [("b", &large[1], (2, 6)), ("a", &large[0], (1, 7))] {
        let event = printing.next();
        assert_eq!((&event["id"], &event["size"]), (&id.into(), &whole.len().into()));
        assert_eq!((&event["first_offset"], &event["offset"]), (&place.0.into(), &place.1.into()));
        let text = event["payload_base64"].as_str().unwrap();
        assert!(base64(text) == *whole, "other bytes");
        assert!(event["context"]["traceparent"].is_string());
    }
    topic.until_committed(&topic.name, 8).await;
}

fn base64(text: &str) -> Vec<u8> {
    use ::base64::{Engine as _, prelude::BASE64_STANDARD};
    BASE64_STANDARD.decode(text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn references_are_followed_to_the_one_store_and_no_other() {
    let topic = Topic::new("references", 1).await;
    let folder = tempfile::tempdir().unwrap();
    let (inside, outside) = (folder.path().join("payloads"), folder.path().join("secrets"));
    std::fs::create_dir_all(&inside).unwrap();
    std::fs::create_dir_all(&outside).unwrap();
    std::fs::write(outside.join("key"), b"secret").unwrap();
    let url = format!("file://{}", inside.display());
    let store = Store::open(&url, &BTreeMap::new()).unwrap();
    let object = payload(3, 500_000);
    for (key, bytes) in [("orders/good", &object), ("orders/changed", &payload(4, 500_000))] {
        store.put(key, Bytes::from(bytes.clone()), "application/octet-stream").await.unwrap();
    }
    let (good, changed) = (store.uri("orders/good"), store.uri("orders/changed"));
    let gone = store.uri("orders/gone");
    let foreign = format!("file://{}/key", outside.display());
    for (id, uri) in [("1", &good), ("1", &good), ("2", &changed), ("3", &gone), ("4", &foreign)] {
        let object: &[u8] = if uri == &foreign { b"secret" } else { &object };
        topic.produce(0, "k", &reference(id, uri, object), Some(uri.as_bytes())).await;
    }
    // The dialect of others, on a record that has nothing else, and a tombstone.
    let backed = vec![("id".to_owned(), b"5".to_vec()), (wire::BACKED_VALUE.to_owned(), vec![wire::BACKED])];
    topic.produce(0, "k", &backed, Some(good.as_bytes())).await;
    topic.produce(0, "k", &headers(&[("id", "6")]), None).await;

    let said = whippet(&[
        "consume",
        "--bootstrap-servers",
        &kafka(),
        "--topic",
        &topic.name,
        "--from-beginning",
        "--object-store",
        &url,
        "--max",
        "3",
    ]);
    let (stdout, stderr) = (String::from_utf8(said.stdout).unwrap(), String::from_utf8(said.stderr).unwrap());
    assert_eq!(said.status.code(), Some(1), "{stderr}");
    let events: Vec<serde_json::Value> =
        stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ids: Vec<&str> = events.iter().map(|event| event["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["1", "5", "6"]);
    assert!(events[..2].iter().all(|event| base64(event["payload_base64"].as_str().unwrap()) == object));
    assert_eq!((&events[0]["travelled"], &events[0]["type"]), (&"reference".into(), &"OrderPlaced".into()));
    assert_eq!(events[0]["context"], serde_json::json!({ "tenant": "acme" }));
    assert!(events[2]["payload"].is_null());
    for (offset, expected) in [
        (2, "has another sha256 than was promised"),
        (3, "there is no object"),
        (4, "only objects there are read"),
    ] {
        let line = stderr.lines().find(|line| line.contains(&format!("at offset {offset}:"))).unwrap();
        assert!(line.contains(expected), "{line}");
    }
    assert!(stderr.contains("3 event(s) could not be read"), "{stderr}");
    assert!(!stdout.contains("c2VjcmV0"), "the secret was followed to");

    // Without a store a reference is an error that says so; as raw bytes into a file, one event is itself.
    let file = folder.path().join("out").display().to_string();
    let common = ["consume", "--bootstrap-servers", &kafka(), "--topic", &topic.name, "--from-beginning"];
    let said = whippet(&[&common[..], &["--max", "1"]].concat());
    assert!(String::from_utf8(said.stderr).unwrap().contains("none is configured for this reader"));
    let raw = ["--max", "1", "--format", "raw", "--output", &file, "--object-store", &url];
    let said = whippet(&[&common[..], &raw].concat());
    assert_eq!(said.status.code(), Some(0));
    assert!(std::fs::read(&file).unwrap() == object, "other bytes");
}

#[test]
fn what_cannot_be_read_at_all_is_said_at_once() {
    let said = |more: &[&str]| {
        let output = whippet(&[&["consume", "--bootstrap-servers", &kafka()], more].concat());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stderr) = said(&["--topic", "it_consume_none"]);
    assert_eq!(code, Some(1));
    assert!(stderr.ends_with("\nthere is no topic it_consume_none, or it may not be read\n"), "{stderr}");
    let (code, stderr) = said(&["--topic", "it_consume_none", "--group", "it_consume_none"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("Unknown topic or partition"), "{stderr}");
    let (code, stderr) = said(&["--topic", "x", "--object-store", "nowhere"]);
    assert_eq!(code, Some(1));
    assert!(stderr.starts_with("--object-store: object_store.url"), "{stderr}");
    assert_eq!(said(&["--topic", "x", "--property", "no.such.thing=1"]).0, Some(1));
    assert_eq!(said(&["--topic", "x", "--property", "nothing"]).0, Some(2));
}

/// Nobody looks at a program that says nothing and wonders whether it works.
#[tokio::test]
async fn what_is_waited_for_is_said_before_there_is_an_event() {
    let topic = Topic::new("says", 1).await;
    let said = |servers: &str, more: &[&str], expected: &str| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_whippet"))
            .args(["consume", "--bootstrap-servers", servers, "--topic", &topic.name])
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufRead::lines(BufReader::new(child.stderr.take().unwrap()));
        let found = lines.by_ref().map(Result::unwrap).find(|line| line.contains(expected));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.is_some(), "it has ended without saying {expected:?}");
    };
    said(&kafka(), &[], "what comes from now on");
    said(&kafka(), &["--from-beginning", "--max", "2"], "from the oldest record on; ends with 2 event(s)");
    said("127.0.0.1:1", &[], "connecting to the brokers at 127.0.0.1:1");
    said("127.0.0.1:1", &["--group", "g"], "the client connects again by itself");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_event_is_in_memory_once() {
    let topic = Topic::new("memory", 1).await;
    let whole = payload(6, 100 << 20);
    for (headers, slice) in chunks("1", &whole, 900_000, None) {
        topic.produce(0, "k", &headers, Some(&slice)).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("out").display().to_string();
    let printing = Printing::start(&topic, &["--group", &topic.name, "--format", "raw", "--output", &file]);
    topic.until_committed(&topic.name, whole.len().div_ceil(900_000) as i64).await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", printing.child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    let peak_mib = line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0;
    // Beside it: the program, and what librdkafka fetches ahead.
    assert!(peak_mib < 100.0 + 80.0, "{peak_mib} MiB");
    assert!(std::fs::read(&file).unwrap() == whole, "other bytes");
}

/// Members of one group come and go. What was done and committed need not come again; whatever was not, does.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_move_between_consumers_and_nothing_is_lost() {
    let topic = Topic::new("moves", 4).await;
    let mut expected = HashMap::new();
    for n in 0..40_u64 {
        let (id, whole) = (n.to_string(), payload(n, 5_000));
        for (headers, slice) in chunks(&id, &whole, 1_000, None) {
            topic.produce((n % 4) as i32, "k", &headers, Some(&slice)).await;
        }
        expected.insert(id, whole);
    }
    let settings = Settings { start: Start::Beginning, ..Settings::new(&kafka(), &[&topic.name]) };
    let settings = settings.group(&topic.name);
    let done = Arc::new(Mutex::new(HashMap::<String, Bytes>::new()));
    let enough = CancellationToken::new();
    let member = |take: usize| {
        let (settings, done, enough) = (settings.clone(), done.clone(), enough.clone());
        let (stop, total) = (enough.child_token(), expected.len());
        async move {
            let mut consumer = Consumer::open(&settings, None).await.unwrap();
            let mut taken = 0;
            let handler = |event: Result<whippet::consume::Event, whippet::consume::ReadError>| {
                let event = event.unwrap();
                taken += 1;
                let mut done = done.lock().unwrap();
                done.insert(event.id().unwrap().to_owned(), event.payload.unwrap());
                if done.len() == total {
                    enough.cancel();
                }
                std::future::ready(if taken == take { Err(()) } else { Ok(()) })
            };
            consumer.run(&stop, handler).await.is_err()
        }
    };
    // Two give up at an event that they have not done, one after the other; then two share what is left.
    let (first, second, others) = tokio::time::timeout(2 * SOON, async {
        (member(1).await, member(7).await, tokio::join!(member(usize::MAX), member(usize::MAX)))
    })
    .await
    .unwrap();
    assert_eq!((first, second, others), (true, true, (false, false)));
    let done = done.lock().unwrap();
    let missing: HashSet<&String> = expected.keys().filter(|id| !done.contains_key(*id)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    assert!(done.iter().all(|(id, payload)| *payload == expected[id]), "other bytes");
}

/// Handed over, and not done: a repeat within one assignment, and an event again in the next.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_comes_back_brings_what_was_not_done() {
    let topic = Topic::new("back", 1).await;
    topic.small(0, "0").await;
    let settings = Settings { start: Start::Beginning, ..Settings::new(&kafka(), &[&topic.name]) };
    let settings = settings.group(&topic.name);
    let mut first = Consumer::open(&settings, None).await.unwrap();
    assert_eq!(first.recv().await.unwrap().id(), Some("0"));
    let again = tokio::time::timeout(2 * SOON, async {
        let mut second = Consumer::open(&settings, None).await.unwrap();
        // The one of both that the partition is given to.
        tokio::select! {
            event = first.recv() => return event.unwrap(),
            event = second.recv() => assert_eq!(event.unwrap().id(), Some("0")),
        }
        tokio::task::block_in_place(|| drop(second));
        first.recv().await.unwrap()
    });
    assert_eq!(again.await.unwrap().id(), Some("0"));
}

/// A future that is dropped takes nothing along, and an error holds the commits back until it is done.
#[tokio::test(flavor = "multi_thread")]
async fn errors_and_what_is_not_done_hold_the_commits_back() {
    let topic = Topic::new("held", 1).await;
    topic.small(0, "0").await;
    topic.produce(0, "k", &reference("1", "file:///nowhere/1", b"x"), Some(b"file:///nowhere/1")).await;
    topic.small(0, "2").await;
    topic.small(0, "2").await;
    topic.small(0, "3").await;
    let settings = Settings { start: Start::Beginning, ..Settings::new(&kafka(), &[&topic.name]) };
    let mut consumer = Consumer::open(&settings.group(&topic.name), None).await.unwrap();
    let zero = tokio::time::timeout(SOON, async {
        loop {
            // As a loop with other branches does it, over and over.
            tokio::select! {
                biased;
                event = consumer.recv() => break event.unwrap(),
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
        }
    })
    .await
    .unwrap();
    let Err(RecvError::Read(error)) = consumer.recv().await else { panic!("it was read") };
    assert!(matches!(error.problem, Problem::NoStore { .. }), "{error}");
    let two = consumer.recv().await.unwrap();
    let three = consumer.recv().await.unwrap();
    assert_eq!((zero.id(), two.id(), three.id()), (Some("0"), Some("2"), Some("3")));
    let mut committed = Vec::new();
    for place in [&three.place, &zero.place, &error.place, &two.place] {
        consumer.done(place);
        consumer.commit().await.unwrap();
        committed.push(tokio::task::block_in_place(|| topic.committed(&topic.name)));
    }
    assert_eq!(committed, [Some(0), Some(1), Some(2), Some(5)]);
    // Whoever goes without a commit has committed what is done.
    topic.small(0, "5").await;
    let five = consumer.recv().await.unwrap();
    topic.small(0, "6").await;
    assert_eq!(consumer.recv().await.unwrap().id(), Some("6"));
    consumer.done(&five.place);
    tokio::task::block_in_place(|| drop(consumer));
    assert_eq!(tokio::task::block_in_place(|| topic.committed(&topic.name)), Some(6));
}

/// S3, as it is where nobody keeps payloads in a folder.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_is_waited_for_and_one_that_refuses_is_not() {
    let proxy = Proxy::minio();
    let (topic, bucket) = (Topic::new("away", 1).await, Bucket::new("consume").await);
    let object = payload(5, 1_000_000);
    let store = bucket.store("");
    store.put("orders/a=b c", Bytes::from(object.clone()), "application/octet-stream").await.unwrap();
    let uri = store.uri("orders/a=b c");
    for id in ["1", "2"] {
        topic.produce(0, "k", &reference(id, &uri, &object), Some(uri.as_bytes())).await;
    }
    topic.small(0, "3").await;
    let settings = Settings { start: Start::Beginning, ..Settings::new(&kafka(), &[&topic.name]) };
    let mut consumer = Consumer::open(&settings, Some(bucket.proxied(&[]))).await.unwrap();
    assert!(consumer.recv().await.unwrap().payload.unwrap() == object, "other bytes");
    proxy.cut();
    // Nothing is passed over, and nothing of a call that was given up is lost.
    for _ in 0..3 {
        let waited = tokio::time::timeout(Duration::from_secs(1), consumer.recv()).await;
        assert!(waited.is_err(), "{waited:?}");
    }
    proxy.heal();
    let two = tokio::time::timeout(SOON, consumer.recv()).await.unwrap().unwrap();
    assert!(two.id() == Some("2") && two.payload.as_deref() == Some(&object[..]), "other bytes");
    assert_eq!(consumer.recv().await.unwrap().id(), Some("3"));

    // Another one's credentials: nothing that passes by itself.
    let denied = bucket.open("", &[("secret_access_key", "wrong")]).unwrap();
    let mut consumer = Consumer::open(&settings, Some(denied)).await.unwrap();
    for _ in 0..2 {
        let Err(RecvError::Read(error)) = tokio::time::timeout(SOON, consumer.recv()).await.unwrap() else {
            panic!("it was read")
        };
        assert!(error.to_string().contains("does not allow it"), "{error}");
    }
    assert_eq!(consumer.recv().await.unwrap().id(), Some("3"));
}
