//! The object store on a real MinIO: objects of every size, and every way in which it fails.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use whippet::store::{Object, Store, StoreError};

use crate::{
    bucket::{Answer, Bucket},
    harness::{SOON, service, services},
    proxy::Proxy,
};

const MIB: usize = 1 << 20;

/// Bytes that no part has in common with another.
fn content(size: usize) -> Bytes {
    let mut random = fastrand::Rng::with_seed(size as u64);
    let mut content = vec![0; size];
    random.fill(&mut content);
    content.into()
}

async fn listed(store: &Store, prefix: &str) -> Vec<Object> {
    let mut found: Vec<Object> = store.list(prefix).try_collect().await.unwrap();
    found.sort_by(|a, b| a.key.cmp(&b.key));
    found
}

/// What holds for every store.
async fn round_trips(store: &Store) {
    for size in [0, 1, 5 * MIB, 16 * MIB, 16 * MIB + 1, 41 * MIB] {
        let (key, content) = (format!("sizes/{size}"), content(size));
        let uri = store.uri(&key);
        store.put(&key, content.clone(), "application/json").await.unwrap();
        assert_eq!(store.size(&uri).await, Ok(size as u64));
        assert!(store.get(&uri, size as u64).await.unwrap() == content, "{size}");
        if let Some(less) = (size as u64).checked_sub(1) {
            let refused = StoreError::TooLarge { uri: uri.clone(), size: size as u64, at_most: less };
            assert_eq!(store.get(&uri, less).await, Err(refused));
        }
        // A retry rewrites it.
        store.put(&key, content.clone(), "application/json").await.unwrap();
        assert!(store.get(&uri, size as u64).await.unwrap() == content, "{size}");
    }
    for key in ["customer/4/a", "customer/42/b", "customer/4/c/d"] {
        store.put(key, Bytes::from_static(b"x"), "text/plain").await.unwrap();
    }
    let of = |keys: &[&str]| -> Vec<Object> {
        keys.iter().map(|key| Object { key: (*key).to_owned(), size: 1 }).collect()
    };
    assert_eq!(listed(store, "customer/4").await, of(&["customer/4/a", "customer/4/c/d"]));
    assert_eq!(listed(store, "").await.len(), 9);
    assert_eq!(listed(store, "nobody").await, []);
    store.delete("customer/4/a").await.unwrap();
    store.delete("customer/4/a").await.unwrap();
    let gone = store.uri("customer/4/a");
    assert_eq!(store.get(&gone, 1).await, Err(StoreError::NotFound { uri: gone.clone() }));
    assert_eq!(store.size(&gone).await, Err(StoreError::NotFound { uri: gone }));
    assert!(matches!(store.get("s3://elsewhere/a", 1).await, Err(StoreError::Foreign { .. })));
    assert!(matches!(store.put("../a", Bytes::new(), "").await, Err(StoreError::Misconfigured(_))));
}

#[tokio::test]
async fn objects_of_every_size_come_back_as_they_went() {
    let bucket = Bucket::new("sizes").await;
    round_trips(&bucket.store("some/prefix")).await;
    let object = bucket.call("HEAD", "/some/prefix/customer/42/b", "").await;
    assert_eq!(object.headers["content-type"], "text/plain");
}

#[tokio::test]
async fn a_folder_is_a_store_too() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| format!("file://{}/{name}", folder.path().display());
    std::fs::create_dir(folder.path().join("payloads")).unwrap();
    let store = Store::open(&at("payloads"), &[].into()).unwrap();
    round_trips(&store).await;
    assert_eq!(store.uri("a"), at("payloads/a"));
    let names = std::fs::read_dir(folder.path().join("payloads/sizes")).unwrap();
    assert_eq!(names.count(), 6, "nothing half-written is left");
    let none = Store::open(&at("missing"), &[].into()).unwrap();
    let missing = StoreError::NoSuchBucket { uri: at("missing") };
    assert_eq!(none.put("a", Bytes::new(), "").await, Err(missing));
}

#[tokio::test]
async fn the_store_keeps_a_checksum_of_what_it_took() {
    let bucket = Bucket::new("checksums").await;
    let checksum = async |key: &str, options: &[(&str, &str)], size: usize| -> Answer {
        let store = bucket.open("", options).unwrap();
        store.put(key, content(size), "text/plain").await.unwrap();
        let headers = [("x-amz-checksum-mode", "ENABLED")];
        bucket.call_with("HEAD", &format!("/{key}"), "", &headers).await
    };
    let small = checksum("small", &[], 1000).await;
    assert!(small.headers.contains_key("x-amz-checksum-sha256"), "{small:?}");
    let large = checksum("large", &[], 17 * MIB).await;
    assert!(large.headers.contains_key("x-amz-checksum-sha256"), "{large:?}");
    let other = checksum("other", &[("checksum_algorithm", "CRC64NVME")], 1000).await;
    assert!(other.headers.contains_key("x-amz-checksum-crc64nvme"), "{other:?}");
}

#[tokio::test]
async fn what_an_operator_has_to_mend_is_said() {
    let bucket = Bucket::new("denied").await;
    let put = async |store: &Store| store.put("a", Bytes::from_static(b"x"), "text/plain").await.unwrap_err();
    for (options, code) in [
        (&[("access_key_id", "nobody")][..], "InvalidAccessKeyId"),
        (&[("secret_access_key", "not-the-secret")], "SignatureDoesNotMatch"),
        (&[("skip_signature", "true")], "AccessDenied"),
    ] {
        let store = bucket.open("", options).unwrap();
        let error = put(&store).await;
        assert!(matches!(&error, StoreError::Denied(why) if why.contains(code)), "{error:?}");
        assert!(error.to_string().contains(&store.uri("a")), "{error}");
        for secret in [options[0].1, &service("WHIPPET_TEST_S3_SECRET")] {
            assert!(secret == "true" || !error.to_string().contains(secret), "{error}");
        }
        let large = store.put("a", content(17 * MIB), "text/plain").await.unwrap_err();
        assert!(matches!(large, StoreError::Denied(_)), "{large:?}");
        assert!(matches!(store.get(&store.uri("a"), 1).await, Err(StoreError::Denied(_))));
        assert!(matches!(store.size(&store.uri("a")).await, Err(StoreError::Denied(_))));
        assert!(matches!(store.delete("a").await, Err(StoreError::Denied(_))));
        let list: Result<Vec<Object>, StoreError> = store.list("").try_collect().await;
        assert!(matches!(list, Err(StoreError::Denied(_))), "{list:?}");
    }
    // Allowed to write and not to delete.
    bucket.allow_anybody(&["s3:PutObject"]).await;
    let anybody = bucket.open("", &[("skip_signature", "true")]).unwrap();
    anybody.put("a", Bytes::from_static(b"x"), "text/plain").await.unwrap();
    let error = anybody.delete("a").await.unwrap_err();
    assert!(matches!(error, StoreError::Denied(_)), "{error:?}");

    let nowhere = Store::open("s3://no-such-bucket-here/prefix", &Bucket::options()).unwrap();
    let missing = StoreError::NoSuchBucket { uri: "s3://no-such-bucket-here".into() };
    assert_eq!(put(&nowhere).await, missing);
    assert_eq!(nowhere.put("a", content(17 * MIB), "").await, Err(missing.clone()));
    assert_eq!(nowhere.get(&nowhere.uri("a"), 1).await, Err(missing.clone()));
    assert_eq!(nowhere.delete("a").await, Err(missing.clone()));
    let list: Result<Vec<Object>, StoreError> = nowhere.list("").try_collect().await;
    assert_eq!(list, Err(missing));

    let elsewhere = bucket.open("", &[("region", "eu-west-1")]).unwrap();
    let error = put(&elsewhere).await;
    assert!(matches!(&error, StoreError::Misconfigured(why) if why.contains("region")), "{error:?}");
    let error = bucket.store("").put(&"a".repeat(1025), Bytes::new(), "").await.unwrap_err();
    assert!(matches!(&error, StoreError::Misconfigured(why) if why.contains("KeyTooLong")), "{error:?}");
}

/// Fails in a way that passes, and soon enough for the relay to see to other things.
async fn is_away(store: &Store, size: usize, within: Duration) -> String {
    let since = Instant::now();
    let error = store.put("a", content(size), "text/plain").await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    assert!(since.elapsed() < within, "{error} took {:?}", since.elapsed());
    error.to_string()
}

#[tokio::test]
async fn a_store_that_is_down_is_away_and_comes_back() {
    let bucket = Bucket::new("down").await;
    let store = bucket.store("");
    services("down", "minio");
    for size in [1, 17 * MIB] {
        let error = is_away(&store, size, Duration::from_secs(10)).await;
        assert!(error.contains("cannot connect: "), "{error}");
    }
    services("up", "minio");
    store.put("a", content(1), "text/plain").await.unwrap();
}

#[tokio::test]
async fn faults_of_the_network_pass() {
    let bucket = Bucket::new("network").await;
    let proxy = Proxy::minio();
    let store = bucket.proxied(&[("timeout", "1s")]);
    for size in [1, 17 * MIB] {
        proxy.blackhole();
        let error = is_away(&store, size, Duration::from_secs(10)).await;
        assert!(error.contains("no answer in time"), "{error}");
        proxy.heal();
        proxy.reset_peer(0);
        is_away(&store, size, Duration::from_secs(10)).await;
        proxy.heal();
        proxy.cut();
        is_away(&store, size, Duration::from_secs(10)).await;
        proxy.heal();
    }
    proxy.latency(100);
    store.put("slow", content(3 * MIB), "text/plain").await.unwrap();
    proxy.heal();
    store.put("a", content(17 * MIB), "text/plain").await.unwrap();
    assert_eq!(listed(&store, "").await.len(), 2);
    // A download that is cut off, and cut off again where it goes on, is never a shorter one.
    for cut_after in [2 * MIB, MIB / 4] {
        proxy.cut_after("downstream", cut_after);
        for (key, size) in [("slow", 3 * MIB), ("a", 17 * MIB)] {
            match store.get(&store.uri(key), size as u64).await {
                Ok(got) => assert!(cut_after > MIB && got == content(size), "{key}: {}", got.len()),
                Err(error) => assert!(error.is_transient(), "{key}: {error:?}"),
            }
        }
        proxy.heal();
    }
}

async fn until_unfinished(bucket: &Bucket, key: &str, count: usize) {
    let deadline = Instant::now() + SOON;
    while bucket.unfinished(key).await != count {
        assert!(Instant::now() < deadline, "not {count} unfinished uploads after {SOON:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_upload_that_fails_or_is_abandoned_leaves_nothing() {
    let bucket = Bucket::new("abandoned").await;
    let proxy = Proxy::minio();
    let store = bucket.proxied(&[]);
    // Every connection ends within its first part.
    proxy.cut_after("upstream", 4 * MIB);
    let error = store.put("large", content(40 * MIB), "text/plain").await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    until_unfinished(&bucket, "large", 0).await;
    proxy.heal();

    proxy.limit_to(4 * MIB);
    let (other, whole) = (store.clone(), content(40 * MIB));
    let upload = tokio::spawn(async move { other.put("large", whole, "text/plain").await });
    until_unfinished(&bucket, "large", 1).await;
    upload.abort();
    until_unfinished(&bucket, "large", 0).await;
    proxy.heal();
    assert_eq!(listed(&store, "").await, []);
    store.put("large", content(40 * MIB), "text/plain").await.unwrap();
    assert_eq!(bucket.unfinished("large").await, 0);
}

/// Answers everything with this, and counts.
fn impostor(answer: &'static str) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // The head, and with it the body of one byte.
            let _ = stream.read(&mut [0; 16 << 10]).unwrap();
            counter.fetch_add(1, Ordering::SeqCst);
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    (endpoint, asked)
}

#[tokio::test]
async fn a_busy_store_is_asked_three_times_and_no_more() {
    let busy = "HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: 79\r\n\r\n\
                <Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>";
    let (endpoint, asked) = impostor(busy);
    let mut options = Bucket::options();
    options.insert("endpoint".into(), endpoint);
    let store = Store::open("s3://bucket/", &options).unwrap();
    let error = is_away(&store, 1, Duration::from_secs(10)).await;
    assert!(error.contains("503 SlowDown (Reduce your request rate)"), "{error}");
    assert_eq!(asked.load(Ordering::SeqCst), 3);
}
