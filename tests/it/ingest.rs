//! Events by HTTP: what is answered, and what Kafka has of it.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::Command,
};

use serde_json::{Value, json};

use crate::{
    harness::{Relay, SOON, World, kafka, whippet},
    ingest_disk::on_a_disk_of,
};

/// An answer of an ingest address.
pub struct Answer {
    pub code: u16,
    pub head: String,
    pub body: Value,
}

/// The configuration of a relay with nothing but a spool.
pub fn config(world: &World, topics: &str, keys: &str, more: &str) -> String {
    config_to(world, &kafka(), topics, keys, more)
}

pub fn config_to(world: &World, kafka: &str, topics: &str, keys: &str, more: &str) -> String {
    let token = world.write("token", "tester it-token\n");
    let spool = world.folder.path().join("spool");
    format!(
        "kafka: {{ bootstrap_servers: '{kafka}' }}\nadmin: {{ listen: '127.0.0.1:0', token_file: '{token}' }}\n\
         ingest: {{ listen: '127.0.0.1:0', topics: [{topics}], spool: '{}', {keys} }}\n{more}\n",
        spool.display()
    )
}

/// Where a relay takes events.
pub fn address(relay: &Relay) -> String {
    relay.wait_for("ingest address is open")["address"].as_str().unwrap().to_owned()
}

/// Posts to a topic: `headers` as lines of the request's head.
pub fn post(address: &str, topic: &str, headers: &str, body: &[u8]) -> Answer {
    let length = body.len();
    let head = format!("POST /v1/topics/{topic}/events HTTP/1.1\r\n{headers}Content-Length: {length}\r\n");
    send(address, &head, body)
}

pub fn send(address: &str, head: &str, body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let head = format!("{head}Host: {address}\r\nConnection: close\r\n\r\n");
    // A server that has refused already need not read the rest.
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).ok();
    answer(&mut stream)
}

pub fn answer(stream: &mut TcpStream) -> Answer {
    let mut answer = Vec::new();
    // One that was refused before its end may be reset after the answer.
    stream.read_to_end(&mut answer).ok();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    Answer {
        code: head.split(' ').nth(1).unwrap().parse().unwrap(),
        head: head.to_ascii_lowercase(),
        body: serde_json::from_str(body).unwrap_or(Value::Null),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_posted_is_published_as_it_came() {
    let world = World::new("ingest").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let other = world.create_topic("audit.log", 1, &[]).await;
    let config = config(&world, &format!("{topic}, '{}.audit.*'", world.name), "", "");
    let relay = world.relay(&config);
    let ingest = address(&relay);
    assert_eq!(relay.get("/readyz").0, 200, "a spool alone is ready at once");
    let one = post(
        &ingest,
        &topic,
        "Whippet-Key: customer 7\r\nWhippet-Id: e-1\r\nWhippet-Type: OrderPlaced\r\nContent-Type: text/plain\r\n\
         Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nbaggage: a=1\r\nbaggage: b=2\r\n\
         Whippet-Header-Tenant: acme\r\nX-Other: no\r\n",
        b"\x00\xff payload",
    );
    assert_eq!((one.code, one.body), (202, json!({ "ids": ["e-1"] })));
    let none = post(&ingest, &topic, "", b"");
    assert_eq!(none.code, 202);
    let id = none.body["ids"][0].as_str().unwrap().to_owned();
    let lines = concat!(
        "{\"key\":\"ключ\",\"id\":\"b-1\",\"type\":\"T\",\"headers\":{\"x\":\"y\",\"n\":null},\"payload\":{\"n\" : 1.0}}\n",
        "\r\n",
        "{\"key\":\"ключ\",\"id\":\"b-2\",\"payload\":\"text\"}\n",
        "{\"key\":\"ключ\",\"id\":\"b-3\",\"payload\":null}\n",
        "{\"key\":\"\",\"id\":\"b-4\",\"payload_base64\":\"AP8=\"}",
    );
    let batch = post(
        &ingest,
        &other,
        "Content-Type: application/x-ndjson; charset=utf-8\r\nX-Request-Id: r1\r\n",
        lines.as_bytes(),
    );
    assert_eq!((batch.code, batch.body), (202, json!({ "ids": ["b-1", "b-2", "b-3", "b-4"] })));

    let mut consumer = world.consumer(&topic);
    let seen = consumer.read(2);
    let one = seen.iter().find(|record| record.key.is_some()).unwrap();
    assert_eq!(one.key.as_deref(), Some(&b"customer 7"[..]));
    assert_eq!(one.payload.as_deref(), Some(&b"\x00\xff payload"[..]));
    let names: Vec<&str> = one.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["id", "eventType", "traceparent", "baggage", "tenant", "content-type"]);
    assert_eq!((one.header("id"), one.header("eventType")), (Some("e-1"), Some("OrderPlaced")));
    assert_eq!((one.header("baggage"), one.header("tenant")), (Some("a=1,b=2"), Some("acme")));
    assert_eq!(one.header("content-type"), Some("text/plain"));
    let bare = seen.iter().find(|record| record.key.is_none()).unwrap();
    assert_eq!((bare.payload.as_deref(), bare.header("id")), (Some(&b""[..]), Some(&*id)));

    let mut consumer = world.consumer(&other);
    let seen = consumer.read(4);
    let payloads: Vec<Option<&[u8]>> = seen.iter().map(|record| record.payload.as_deref()).collect();
    assert_eq!(payloads, [Some(&b"{\"n\" : 1.0}"[..]), Some(b"text"), None, Some(b"\x00\xff")]);
    assert_eq!(seen[0].key.as_deref(), Some("ключ".as_bytes()));
    assert_eq!(seen[3].key.as_deref(), Some(&b""[..]), "the empty key is a key");
    assert_eq!((seen[0].header("x"), seen[0].header("x-request-id")), (Some("y"), Some("r1")));
    relay.until_status("/tables/0/pending", 0).await;
    assert_eq!(relay.status()["tables"][0]["name"], "ingest");
    assert_eq!(relay.status()["role"], "owner");
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("the spool is drained"), "{log}");
}

/// Killed between the fsync and the answer: nobody was told, and it is published all the same.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_the_disk_survives_its_relay() {
    let world = World::new("ingestkill").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = config(&world, &topic, "", "");
    let file = world.write("whippet.yaml", &config);
    let relay = Relay::start_with(&file, &[("FAILPOINTS", "ingest-committed=2*off->return")]);
    let ingest = address(&relay);
    for n in 1..=2 {
        assert_eq!(post(&ingest, &topic, &format!("Whippet-Id: {n}\r\nWhippet-Key: k\r\n"), b"x").code, 202);
    }
    let mut cut = TcpStream::connect(&ingest).unwrap();
    let head =
        format!("POST /v1/topics/{topic}/events HTTP/1.1\r\nHost: x\r\nWhippet-Id: 3\r\nWhippet-Key: k\r\n");
    cut.write_all(format!("{head}Content-Length: 1\r\n\r\nx").as_bytes()).unwrap();
    let mut nothing = Vec::new();
    cut.read_to_end(&mut nothing).ok();
    assert!(nothing.is_empty());
    assert!(!relay.ended().success());
    let relay = world.relay(&config);
    let mut consumer = world.consumer(&topic);
    consumer.read_until(|seen| seen.iter().any(|record| record.header("id") == Some("3")));
    let again = post(&address(&relay), &topic, "Whippet-Id: 3\r\nWhippet-Key: k\r\n", b"x");
    assert_eq!(again.code, 202, "its caller tries again");
    assert_eq!(relay.stop().0, Some(0));
    let ids = ids(consumer.read_to_end());
    let mut first = std::collections::HashSet::new();
    let mut distinct = ids.clone();
    distinct.retain(|id| first.insert(*id));
    assert_eq!(ids.iter().filter(|id| **id == "3").count(), 1, "{ids:?}");
    assert_eq!(distinct, ["1", "2", "3"], "{ids:?}");
}

fn ids(seen: &[crate::harness::Seen]) -> Vec<&str> {
    seen.iter().map(|record| record.header("id").unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_taken_once_while_it_waits_and_for_a_while_after() {
    let world = World::new("ingestids").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let other = world.create_topic("others", 1, &[]).await;
    let config = config(&world, &format!("{topic}, {other}"), "dedup: 6s", "");
    let relay = world.relay(&config);
    let ingest = address(&relay);
    relay.operate(&world, &["pause", "--table", "ingest"]);
    let send = |ingest: &str, topic: &str| {
        let answer = post(ingest, topic, "Whippet-Id: once\r\nWhippet-Key: k\r\n", b"1");
        assert_eq!((answer.code, answer.body), (202, json!({ "ids": ["once"] })));
    };
    send(&ingest, &topic);
    send(&ingest, &topic);
    // A batch with one of its own twice, and with the one that waits.
    let lines = ["twice", "once", "twice"].map(|id| format!("{{\"id\":\"{id}\",\"payload\":2}}\n")).concat();
    let batch = post(&ingest, &topic, "Content-Type: application/x-ndjson\r\n", lines.as_bytes());
    assert_eq!((batch.code, batch.body), (202, json!({ "ids": ["twice", "once", "twice"] })));
    // Ids are known per topic.
    send(&ingest, &other);
    assert_eq!(relay.metric("whippet_ingest_repeated_total", ""), 3.0);
    relay.kill();
    let relay = world.relay(&config);
    let ingest = address(&relay);
    send(&ingest, &topic);
    relay.operate(&world, &["resume", "--table", "ingest"]);
    let mut consumer = world.consumer(&topic);
    consumer.read(2);
    relay.until_status("/tables/0/in_flight", 0).await;
    // Published, recorded, and known.
    while relay.metric("whippet_ingest_remembered_ids", "") < 3.0 {
        world.pause().await;
    }
    send(&ingest, &topic);
    relay.until_status("/tables/0/pending", 0).await;
    assert_eq!(ids(consumer.read_to_end()), ["once", "twice"]);
    while relay.metric("whippet_ingest_remembered_ids", "") > 0.0 {
        world.pause().await;
    }
    send(&ingest, &topic);
    assert_eq!(ids(consumer.read(3)), ["once", "twice", "once"], "forgotten after ingest.dedup");
    assert_eq!(ids(world.consumer(&other).read_to_end()), ["once"]);
}

/// Whoever has not heard the answer may be told it again at any time: nothing more is stored for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_knows_what_it_has_taken() {
    let world = World::new("ingestfull").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let relay = world.relay(&config(&world, &topic, "max_bytes: 1MiB", ""));
    let ingest = address(&relay);
    relay.operate(&world, &["pause", "--table", "ingest"]);
    let large = "x".repeat(200 << 10);
    let send = |id: usize| {
        post(&ingest, &topic, &format!("Whippet-Id: {id}\r\nWhippet-Key: k\r\n"), large.as_bytes()).code
    };
    let mut taken = 0;
    while send(taken) == 202 {
        taken += 1;
    }
    assert!(taken > 1, "{taken}");
    assert_eq!((send(0), send(taken), send(taken - 1)), (202, 429, 202));
    let batch = |ids: [usize; 2]| {
        let lines =
            ids.map(|id| format!("{{\"id\":\"{id}\",\"key\":\"k\",\"payload\":\"{large}\"}}\n")).concat();
        post(&ingest, &topic, "Content-Type: application/x-ndjson\r\n", lines.as_bytes())
    };
    let known = batch([1, 0]);
    assert_eq!((known.code, known.body), (202, json!({ "ids": ["1", "0"] })));
    assert_eq!(batch([0, taken]).code, 429, "all of them, or none");
    assert_eq!(post(&ingest, &topic, "", large.as_bytes()).code, 429, "what has no id is new");
    assert_eq!(relay.metric("whippet_ingest_repeated_total", ""), 4.0);
    relay.operate(&world, &["resume", "--table", "ingest"]);
    let mut consumer = world.consumer(&topic);
    consumer.read(taken);
    relay.until_status("/tables/0/pending", 0).await;
    let seen: Vec<String> = ids(consumer.read_to_end()).into_iter().map(str::to_owned).collect();
    assert_eq!(seen, (0..taken).map(|id| id.to_string()).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spool_belongs_to_one_process_and_is_taken_up_by_the_next() {
    let world = World::new("ingestlock").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = config(&world, &topic, "", "");
    let relay = world.relay(&config);
    relay.operate(&world, &["pause", "--table", "ingest"]);
    assert_eq!(post(&address(&relay), &topic, "Whippet-Id: left\r\n", b"x").code, 202);
    let file = world.folder.path().join("whippet.yaml").display().to_string();
    let second = ["20", env!("CARGO_BIN_EXE_whippet"), "run", "--config", &file];
    let second = Command::new("timeout").args(second).output().unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("process {} uses it", relay.id())), "{said}");
    let teardown = whippet(&["teardown", "--config", &file]);
    assert!(String::from_utf8(teardown.stderr).unwrap().contains("uses it"));
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("events stay in the spool"), "{log}");

    let teardown = whippet(&["teardown", "--config", &file]);
    let said = String::from_utf8(teardown.stderr).unwrap();
    assert!(said.contains("1 events are in the spool"), "{said}");
    let relay = world.relay(&config);
    relay.operate(&world, &["resume", "--table", "ingest"]);
    assert_eq!(ids(world.consumer(&topic).read(1)), ["left"]);
    assert_eq!(relay.stop().0, Some(0));
    let doctor = whippet(&["doctor", "--config", &file]);
    let said = String::from_utf8(doctor.stdout).unwrap();
    assert_eq!(doctor.status.code(), Some(0), "{said}");
    assert!(said.contains("ok    ingest: spool: "), "{said}");
    let teardown = whippet(&["teardown", "--config", &file]);
    assert!(teardown.status.success(), "{teardown:?}");
    assert_eq!(std::fs::read_dir(world.folder.path().join("spool")).unwrap().count(), 0);
}

/// A database that is away does not stop the spool, and a table of each is under the operator's verbs.
#[tokio::test(flavor = "multi_thread")]
async fn the_spool_and_the_database_do_not_wait_for_each_other() {
    let world = World::new("ingestboth").await;
    let topic = world.create_topic("events", 1, &[("max.message.bytes", "2000")]).await;
    let spool = world.folder.path().join("spool");
    let ingest_keys = format!(
        "ingest: {{ listen: '127.0.0.1:0', topics: ['{topic}'], spool: '{}' }}\nshutdown: {{ grace: 1s }}",
        spool.display()
    );
    let away =
        world.config_for("postgres://nobody@127.0.0.1:9/x", &kafka(), "[{ name: outbox }]", &ingest_keys);
    let relay = world.relay(&away);
    let mut consumer = world.consumer(&topic);
    assert_eq!(post(&address(&relay), &topic, "Whippet-Id: alone\r\n", b"x").code, 202);
    assert_eq!(ids(consumer.read(1)), ["alone"]);
    relay.until(|status| status["role"] == "unreachable" && status["tables"][1]["state"] == "running").await;
    assert_eq!(relay.get("/readyz").0, 503, "the database was not reached");
    assert_eq!(relay.stop().0, Some(0));

    let config = world.config("[{ name: outbox }]", &ingest_keys);
    world.install(&config).await;
    let relay = world.relay(&config);
    let ingest = address(&relay);
    relay.wait_for("this relay owns the source");
    world.sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', 'row')")).await;
    consumer.read(2);
    // Too large for its topic, and there is no object store: it is parked, and what follows behind it.
    for (id, body) in [("large", vec![b'x'; 5000]), ("behind", b"y".to_vec()), ("after", b"z".to_vec())] {
        let key = if id == "after" { "free" } else { "bad" };
        let headers = format!("Whippet-Id: {id}\r\nWhippet-Key: {key}\r\n");
        assert_eq!(post(&ingest, &topic, &headers, &body).code, 202);
    }
    assert_eq!(*ids(consumer.read(3)).last().unwrap(), "after");
    relay
        .until(|status| {
            status["tables"][1]["parked_events"] == 2 && status["tables"][0]["parked_events"] == 0
        })
        .await;
    let parked = relay.operate(&world, &["parked", "--table", "ingest"]);
    assert_eq!(parked["parked"].as_array().unwrap().len(), 2, "{parked}");
    assert_eq!(
        relay.operate(&world, &["skip", "--table", "ingest", "--id", "large", "--reason", "test"])["events"],
        1
    );
    relay.operate(&world, &["redrive", "--key", "bad"]);
    assert_eq!(*ids(consumer.read(4)).last().unwrap(), "behind");
    let refused = relay.try_to(&world, &["replay", "--table", "ingest", "--id", "after"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("does not keep what is published"), "{said}");
    assert_eq!(relay.metric("whippet_leases_held", "ingest"), 1.0);
}

/// What SIGTERM finds in the spool is published, within its share of the grace.
#[tokio::test(flavor = "multi_thread")]
async fn a_spool_that_is_scaled_away_drains_first() {
    let world = World::new("ingestdrain").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = config(&world, &topic, "", "");
    let relay = world.relay(&config);
    let ingest = address(&relay);
    let mut taken = 0;
    // More than one read brings.
    while taken < 20_000 {
        let lines = (taken..taken + 4_000)
            .fold(String::new(), |text, n| text + &format!("{{\"key\":\"k\",\"payload\":{n}}}\n"));
        let answer = post(&ingest, &topic, "Content-Type: application/x-ndjson\r\n", lines.as_bytes());
        assert_eq!(answer.code, 202);
        taken += 4_000;
    }
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("the spool is drained"), "{log}");
    let mut consumer = world.consumer(&topic);
    let numbers: Vec<usize> =
        consumer.read_to_end().iter().map(|record| record.text().parse().unwrap()).collect();
    assert_eq!(numbers, (0..taken).collect::<Vec<_>>());
}

/// Each answer that the document has, and no other.
#[tokio::test(flavor = "multi_thread")]
async fn the_openapi_document_says_what_the_server_does() {
    let world = World::new("ingestapi").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let tokens = world.write("ingest-token", "shop s3cret\n");
    let config = config(&world, &topic, &format!("token_file: '{tokens}', max_bytes: 1MiB"), "");
    let relay = world.relay(&config);
    let ingest = address(&relay);
    let (code, served) = crate::harness::get(&ingest, "/openapi.json");
    assert_eq!(code, 200);
    let document: Value = serde_json::from_str(&served).unwrap();
    let written = std::fs::read_to_string(crate::harness::path("docs/openapi.yaml")).unwrap();
    assert_eq!(document, serde_saphyr::from_str::<Value>(&written).unwrap());
    let paths: Vec<&String> = document["paths"].as_object().unwrap().keys().collect();
    assert_eq!(paths, ["/v1/topics/{topic}/events", "/openapi.json"]);
    let answers = &document["paths"]["/v1/topics/{topic}/events"]["post"]["responses"];
    let described: BTreeSet<u16> =
        answers.as_object().unwrap().keys().map(|code| code.parse().unwrap()).collect();

    relay.operate(&world, &["pause", "--table", "ingest"]);
    let bearer = "Authorization: Bearer s3cret\r\n";
    let path = format!("POST /v1/topics/{topic}/events HTTP/1.1\r\n");
    let authorized = |more: &str, body: &[u8]| post(&ingest, &topic, &format!("{bearer}{more}"), body);
    let mut found = vec![
        authorized("", b"x"),
        authorized("Content-Type: application/x-ndjson\r\n", b"x"),
        post(&ingest, &topic, "", b"x"),
        post(&ingest, &topic, "Authorization: Bearer wrong\r\n", b"x"),
        post(&ingest, "another", bearer, b"x"),
        post(&ingest, "%ff", bearer, b"x"),
        send(&ingest, &format!("{path}{bearer}Content-Length: 5\r\n"), b"half"),
        send(&ingest, &format!("{path}{bearer}"), b""),
        authorized("", &vec![b'x'; 600 << 10]),
        authorized("Content-Encoding: gzip\r\n", b"x"),
    ];
    let long = authorized(&format!("X-Long: {}\r\n", "x".repeat(200_000)), b"x");
    assert!(long.body.is_null(), "the head was not read");
    // Until it is full, which is told before the body is read.
    while found.last().unwrap().code != 429 {
        found.push(authorized("", &vec![b'x'; 200 << 10]));
    }
    std::fs::remove_file(&tokens).unwrap();
    found.push(authorized("", b"x"));
    found.push(disk_full(&world, &topic));
    let problem = &document["components"]["schemas"]["Problem"]["required"];
    for Answer { code, head, body } in &found {
        if *code == 202 {
            assert!(body["ids"].is_array());
            continue;
        }
        assert!(head.contains("content-type: application/problem+json"), "{head}");
        for member in problem.as_array().unwrap() {
            assert!(!body[member.as_str().unwrap()].is_null(), "{code}: {body}");
        }
        let later = answers[code.to_string()]["$ref"] == "#/components/responses/Later";
        assert_eq!(head.contains("retry-after: 1"), later, "{code}: {head}");
        assert_eq!(head.contains("www-authenticate: bearer"), *code == 401, "{code}: {head}");
    }
    let codes: BTreeSet<u16> = found.iter().chain([&long]).map(|answer| answer.code).collect();
    assert_eq!(codes, described);
    let refused: f64 = relay.metric("whippet_ingest_refused_total", "");
    let of_this_relay = found.iter().filter(|answer| !matches!(answer.code, 202 | 507)).count();
    assert_eq!(refused, of_this_relay as f64);
}

/// What a relay answers whose spool is on a disk with less room than has to stay.
fn disk_full(world: &World, topic: &str) -> Answer {
    let relay = on_a_disk_of(world, "8m", topic, "");
    post(&address(&relay), topic, "", b"x")
}

/// The clients of docs/ingest.md, as they stand there.
#[tokio::test(flavor = "multi_thread")]
async fn the_clients_of_the_docs_publish() {
    let world = World::new("ingestclients").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = config(&world, &topic, "", "");
    let relay = world.relay(&config);
    let ingest = format!("http://{}", address(&relay));
    let docs = std::fs::read_to_string(crate::harness::path("docs/ingest.md")).unwrap();
    let (_, clients) = docs.split_once("\n## Clients\n").unwrap();
    let mut consumer = world.consumer(&topic);
    let known = [
        ("sh", "publish.sh", vec!["sh", "publish.sh"]),
        ("python", "publish.py", vec!["python3", "publish.py"]),
        ("js", "publish.js", vec!["node", "publish.js"]),
        ("go", "publish.go", vec!["go", "run", "publish.go"]),
        ("java", "Publish.java", vec!["java", "Publish.java"]),
    ];
    assert_eq!(clients.matches("```").count(), 2 * known.len(), "a client that is not tested");
    for (count, (language, name, command)) in known.into_iter().enumerate() {
        let (_, code) = clients.split_once(&format!("```{language}\n")).unwrap();
        let (code, _) = code.split_once("\n```").unwrap();
        world.write(name, code);
        let done = Command::new(command[0])
            .args(&command[1..])
            .current_dir(world.folder.path())
            .envs([("INGEST", &*ingest), ("TOPIC", &topic), ("ID", language)])
            .output()
            .unwrap();
        assert!(done.status.success(), "{language}: {}", String::from_utf8_lossy(&done.stderr));
        let record = consumer.read(count + 1).last().unwrap();
        assert_eq!((record.header("id"), record.header("eventType")), (Some(language), Some("OrderPlaced")));
        assert_eq!((record.key.as_deref(), record.text()), (Some(&b"customer-7"[..]), "{\"order\": 1}"));
        assert_eq!(record.header("content-type"), Some("application/json"), "{language}");
    }
}
