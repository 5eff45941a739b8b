//! The object store breaks while the relay puts payloads into it: their keys wait, are held or are parked, the
//! others flow, and everything arrives in order.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    bucket::Bucket,
    harness::{Relay, Seen, service},
    large::{Large, MIB, until_nothing_is_unfinished},
    proxy::Proxy,
};

fn proxied() -> String {
    service("WHIPPET_TEST_S3_PROXIED")
}

fn has(seen: &[Seen], id: &str) -> bool {
    seen.iter().any(|record| record.header("id") == Some(id))
}

/// The store is as it should be again: two events of one key arrive by themselves, and everything is right.
async fn resumes(mut stage: Large, relay: Relay, ids: &[&str]) {
    stage.until_seen(ids);
    stage.world.until("SELECT count(*) FROM whippet.holds", 0).await;
    relay.until_status("/tables/0/held_events", 0).await;
    let (verdict, _) = stage.end(relay).await;
    assert_eq!(verdict.repeats, 0, "{verdict:?}");
}

/// Every connection ends in the middle of a payload; what is small comes through, the relay's probe too.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_cut_is_made_again_and_others_flow() {
    let proxy = Proxy::minio();
    let mut stage = Large::set("cut", &[]).await;
    let relay = stage.relay(&stage.config("", &[("endpoint", &proxied())], "")).await;
    proxy.cut_after("upstream", MIB);
    // In one request, and in parts.
    let large = [stage.insert("one", 2 * MIB).await, stage.insert("parts", 20 * MIB).await];
    let after = [stage.insert("one", 10).await, stage.insert("parts", 10).await];
    relay.wait_for("the object store takes small objects and no payload");
    for _ in 0..5 {
        let small = stage.insert("small", 10).await;
        let seen = stage.until_seen(&[&small]);
        assert!(!large.iter().chain(&after).any(|id| has(&seen, id)), "it was not cut, or was overtaken");
    }
    proxy.heal();
    stage.until_seen(&[&after[0], &after[1]]);
    until_nothing_is_unfinished(&stage.bucket).await;
    resumes(stage, relay, &[&after[0], &after[1]]).await;
}

/// In front of MinIO: gives one answer to everything, until it is opened.
struct Gate {
    endpoint: String,
    open: Arc<AtomicBool>,
}

impl Gate {
    fn closed(answer: &'static str) -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let open = Arc::new(AtomicBool::new(false));
        let opened = open.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, open) = (stream.unwrap(), opened.load(Ordering::SeqCst));
                // A client that goes away in the middle of it is no failure.
                std::thread::spawn(move || if open { forward(stream) } else { refuse(stream, answer) });
            }
        });
        Gate { endpoint, open }
    }

    fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}

fn forward(mut client: TcpStream) -> io::Result<()> {
    let mut minio = TcpStream::connect(service("WHIPPET_TEST_S3").trim_start_matches("http://"))?;
    let (mut from, mut to) = (client.try_clone()?, minio.try_clone()?);
    std::thread::spawn(move || io::copy(&mut from, &mut to));
    io::copy(&mut minio, &mut client).map(drop)
}

/// Takes the request to its end: a client that is still sending would see a reset and no answer.
fn refuse(stream: TcpStream, answer: &str) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let (mut line, mut length) = (String::new(), 0);
    while stream.read_line(&mut line)? > 2 {
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        line.clear();
    }
    io::copy(&mut stream.by_ref().take(length), &mut io::sink())?;
    stream.get_mut().write_all(answer.as_bytes())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_busy_is_waited_for_and_others_flow() {
    let gate = Gate::closed(
        "HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: 79\r\n\r\n\
         <Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>",
    );
    let mut stage = Large::set("busy", &[]).await;
    let relay = stage.relay(&stage.config("", &[("endpoint", &gate.endpoint)], "")).await;
    let large = [stage.insert("one", 2 * MIB).await, stage.insert("parts", 17 * MIB).await];
    let after = [stage.insert("one", 10).await, stage.insert("parts", 10).await];
    let said = relay.wait_for("the object store cannot be reached");
    assert!(said["error"].as_str().unwrap().contains("503 SlowDown"), "{said}");
    let small = stage.insert("small", 10).await;
    let seen = stage.until_seen(&[&small]);
    assert!(!large.iter().chain(&after).any(|id| has(&seen, id)));
    gate.open();
    resumes(stage, relay, &[&after[0], &after[1]]).await;
}

/// What does not pass by itself: the key is parked with the cause, and goes on when an operator has mended it.
async fn is_parked(stage: &mut Large, relay: &Relay, why: &str) {
    stage.insert("large", 2 * MIB).await;
    stage.until_held(1, "rejected", why).await;
    stage.insert("large", 10).await;
    stage.until_held(1, "behind", "").await;
    let small = stage.insert("small", 10).await;
    assert_eq!(stage.until_seen(&[&small]).len(), 1);
    // The page is a moment behind.
    relay
        .until(|status| {
            let error = status["tables"][0]["last_error"].as_str().unwrap_or_default();
            error.contains("parked") && error.contains(why)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_forbids_it_parks_the_key_with_the_cause() {
    let mut stage = Large::set("forbids", &[]).await;
    let relay = stage.relay(&stage.config("", &[("secret_access_key", "hunter2")], "")).await;
    is_parked(&mut stage, &relay, "403 SignatureDoesNotMatch").await;
    let (_, log) = relay.stop();
    assert!(!log.contains("hunter2"), "{log}");
    let relay = stage.world.relay(&stage.config("", &[], ""));
    relay.wait_for("this relay owns the source");
    relay.operate(&stage.world, &["redrive", "--all"]);
    stage.end(relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_missing_parks_the_key_until_it_is_made() {
    let mut stage = Large::set("nobucket", &[]).await;
    stage.bucket = Bucket { name: format!("{}-later", stage.bucket.name) };
    let relay = stage.relay(&stage.config("", &[], "")).await;
    is_parked(&mut stage, &relay, "there is no bucket").await;
    assert_eq!(stage.bucket.call("PUT", "", "").await.status, 200);
    relay.operate(&stage.world, &["redrive", "--all"]);
    stage.end(relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_payload_is_put_slowly_its_key_waits_and_others_flow() {
    let proxy = Proxy::minio();
    let mut stage = Large::set("slow", &[]).await;
    let relay = stage.relay(&stage.config("", &[("endpoint", &proxied())], "")).await;
    proxy.limit_to(MIB / 2);
    let large = stage.insert("large", 8 * MIB).await;
    let after = stage.insert("large", 10).await;
    for _ in 0..6 {
        let small = stage.insert("small", 10).await;
        let seen = stage.until_seen(&[&small]);
        assert!(!has(&seen, &large) && !has(&seen, &after), "it was not slow, or was overtaken");
    }
    proxy.heal();
    resumes(stage, relay, &[&large, &after]).await;
}

/// It fills a quarter of the window, so that it is held at once; a relay that starts meanwhile knows of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_down_holds_its_keys_and_they_resume_alone() {
    let proxy = Proxy::minio();
    let mut stage = Large::set("holds", &[]).await;
    let config = stage.config("", &[("endpoint", &proxied())], "limits: { in_flight_bytes: 4MiB }\n");
    let relay = stage.relay(&config).await;
    proxy.cut();
    stage.insert("a", 2 * MIB).await;
    stage.until_held(1, "store", "the object store is away: cannot connect").await;
    let after = stage.insert("a", 10).await;
    stage.until_held(1, "store", "an earlier event of its key waits for the object store").await;
    stage.insert("b", 2 * MIB).await;
    stage.until_held(2, "store", "the object store is away").await;
    let small = stage.insert("small", 10).await;
    assert_eq!(stage.until_seen(&[&small]).len(), 1);
    relay.until_status("/tables/0/held_events", 3).await;
    let error = relay.status()["tables"][0]["last_error"].to_string();
    assert!(error.contains("the object store is away"), "{error}");
    assert_eq!(relay.metric("whippet_held_events", "store"), 3.0);
    assert_eq!(relay.metric("whippet_parked_events", ""), 0.0);
    relay.kill();

    let relay = stage.world.relay(&config);
    let more = stage.insert("b", 10).await;
    stage.until_held(4, "store", "").await;
    let small = stage.insert("small", 10).await;
    let seen = stage.until_seen(&[&small]);
    assert!(!has(&seen, &after) && !has(&seen, &more), "it was overtaken");
    proxy.heal();
    resumes(stage, relay, &[&after, &more]).await;
}
