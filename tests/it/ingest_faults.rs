//! Ingest while things go wrong: whatever was answered with 202 is in Kafka.

use std::{
    net::TcpListener,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    checker::{Written, check},
    harness::{SOON, World, in_soak, services},
    ingest::{address, config, post},
    ingest_callers::Caller,
};

/// A port that is free now, and is asked for again by every start of a relay.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Fifty callers, ten thousand keys, the broker stopped and started, and the relay killed five times.
#[tokio::test(flavor = "multi_thread")]
async fn every_202_is_in_kafka_in_order_whatever_dies() {
    const CALLERS: usize = 50;
    const KEYS: usize = 200;
    let rounds = in_soak(4, 40);
    let world = World::new("ingestload").await;
    let topic = world.create_topic("events", 6, &[]).await;
    let ingest = format!("127.0.0.1:{}", free_port());
    let config = config(&world, &topic, "", "").replacen(
        "listen: '127.0.0.1:0', topics",
        &format!("listen: '{ingest}', topics"),
        1,
    );
    let mut relay = Some(world.relay(&config));
    let written: Arc<Mutex<Vec<Written>>> = Arc::default();
    let (taken, transaction) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
    let begun = Instant::now();
    let callers: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let (topic, ingest) = (topic.clone(), ingest.clone());
            let (written, taken, transaction) = (written.clone(), taken.clone(), transaction.clone());
            std::thread::spawn(move || {
                let mut client = Caller::new(&ingest);
                let mut own = Vec::new();
                for number in 0..rounds * KEYS {
                    let (id, key) = (format!("{caller}-{number}"), format!("{caller}/{}", number % KEYS));
                    let payload = format!("{caller} {number}").into_bytes();
                    let inserted = Instant::now();
                    // Refused for want of room, cut off, or nobody there: the same again.
                    while client.send(&topic, &key, &id, &payload) != Some(202) {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    taken.fetch_add(1, Ordering::Relaxed);
                    own.push(Written {
                        id,
                        key,
                        payload,
                        transaction: transaction.fetch_add(1, Ordering::Relaxed),
                        inserted,
                        nth: 0,
                        committed: Some(Instant::now()),
                    });
                }
                written.lock().unwrap().extend(own);
            })
        })
        .collect();
    let all = CALLERS * KEYS * rounds;
    let until_taken = |share: f64| {
        while (taken.load(Ordering::Relaxed) as f64) < all as f64 * share {
            assert!(
                begun.elapsed() < in_soak(Duration::from_mins(4), Duration::from_mins(25)),
                "{}",
                taken.load(Ordering::Relaxed)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    for step in 1..=5 {
        until_taken(f64::from(step) * 0.15);
        match step {
            // What is taken while it is away waits in the spool.
            2 => services("kill", "kafka"),
            4 => services("up", "kafka"),
            _ => {}
        }
        relay.take().unwrap().kill();
        relay = Some(world.relay(&config));
    }
    for caller in callers {
        caller.join().unwrap();
    }
    let rate = all as f64 / begun.elapsed().as_secs_f64();
    let relay = relay.unwrap();
    relay.until_status("/tables/0/pending", 0).await;
    relay.until_status("/tables/0/in_flight", 0).await;
    let peak = relay.peak_mib();
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    let written = written.lock().unwrap();
    assert_eq!(written.len(), all);
    let verdict = check(&written, world.consumer(&topic).read_to_end());
    eprintln!("{rate:.0} requests/s, {verdict:?}, peak {peak:.0} MiB");
    assert_eq!(verdict.published, all);
    assert!(verdict.pairs > all / 2, "{verdict:?}");
    // contract.md section 5: 40 MiB and twice the window.
    assert!(peak < 64.0, "{peak} MiB");
}

/// A spool that is full refuses, takes nothing, and goes on when there is room.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_refuses_and_recovers() {
    let world = World::new("ingestfull").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let relay = world.relay(&config(&world, &topic, "max_bytes: 4MiB", ""));
    let ingest = address(&relay);
    relay.operate(&world, &["pause", "--table", "ingest"]);
    let body = vec![b'x'; 100_000];
    let mut taken = 0;
    let refused = loop {
        let answer = post(&ingest, &topic, &format!("Whippet-Id: {taken}\r\nWhippet-Key: k\r\n"), &body);
        if answer.code != 202 {
            break answer;
        }
        taken += 1;
    };
    assert_eq!(refused.code, 429);
    assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
    assert!((30..=42).contains(&taken), "{taken} of 100 kB in 4 MiB");
    let file = world.folder.path().join("spool/ingest.db");
    assert!(std::fs::metadata(file).unwrap().len() <= 5 << 20, "the file is not larger than it may be");
    assert!(relay.metric("whippet_ingest_spool_bytes", "") <= f64::from(4 << 20));
    relay.operate(&world, &["resume", "--table", "ingest"]);
    let deadline = Instant::now() + SOON;
    while post(&ingest, &topic, "Whippet-Id: last\r\nWhippet-Key: k\r\n", &body).code != 202 {
        assert!(Instant::now() < deadline);
        world.pause().await;
    }
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read(taken + 1);
    assert_eq!(seen.last().unwrap().header("id"), Some("last"));
}

/// Payloads of 5 MB become claim checks like any row's, in a bounded memory.
#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_become_claim_checks() {
    let world = World::new("ingestlarge").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let objects = world.folder.path().join("objects");
    std::fs::create_dir(&objects).unwrap();
    let store = format!("object_store: {{ url: 'file://{}' }}", objects.display());
    let relay = world.relay(&config(&world, &topic, "", &store));
    let ingest = address(&relay);
    let body = |caller: usize, number: usize| {
        let mut body = vec![u8::try_from(caller * 10 + number).unwrap(); 5_000_000];
        body[..4].copy_from_slice(b"\x00\xffab");
        body
    };
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let (ingest, topic) = (&ingest, &topic);
            scope.spawn(move || {
                for number in 0..5 {
                    let headers = format!("Whippet-Id: {caller}-{number}\r\nWhippet-Key: {caller}\r\n");
                    assert_eq!(post(ingest, topic, &headers, &body(caller, number)).code, 202);
                }
            });
        }
    });
    let mut consumer = world.consumer(&topic);
    for record in consumer.read(20) {
        let (caller, number) = record.header("id").unwrap().split_once('-').unwrap();
        let uri = record.text();
        assert_eq!(record.header("whippet-ref-size"), Some("5000000"));
        let stored = std::fs::read(uri.strip_prefix("file://").unwrap()).unwrap();
        assert!(stored == body(caller.parse().unwrap(), number.parse().unwrap()), "{uri}");
    }
    for caller in 0..4 {
        let key = caller.to_string().into_bytes();
        let numbers: Vec<&str> = consumer
            .seen
            .iter()
            .filter(|record| record.key.as_ref() == Some(&key))
            .map(|record| record.header("id").unwrap())
            .collect();
        assert_eq!(numbers, (0..5).map(|number| format!("{caller}-{number}")).collect::<Vec<_>>());
    }
    let peak = relay.peak_mib();
    // contract.md section 5: 40 MiB, twice the window, three times the largest row; and a little for code that is not
    // optimised.
    eprintln!("peak {peak:.0} MiB");
    assert!(peak < 40.0 + 24.0 + 15.0 + 5.0, "{peak} MiB");
    let status: Value = relay.status();
    assert_eq!(status["tables"][0]["parked_events"], 0);
}
