//! The object store on a real MinIO: objects of every size, and every way in which it fails.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use whippet::{
    record::wire,
    store::{Hashed, Object, Store, StoreError},
};

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

/// A replay whose payload changed writes over an object that somebody reads in parts.
#[tokio::test]
async fn an_object_that_is_written_over_while_it_is_read_is_never_a_mixture() {
    let bucket = Bucket::new("overwritten").await;
    let (store, other) = (bucket.store(""), bucket.store(""));
    let versions = [content(40 * MIB), content(41 * MIB).slice(..40 * MIB)];
    store.put("a", versions[0].clone(), "text/plain").await.unwrap();
    let written = versions.clone();
    let writer = tokio::spawn(async move {
        for version in written.iter().cycle() {
            other.put("a", version.clone(), "text/plain").await.unwrap();
        }
    });
    for _ in 0..10 {
        match store.get(&store.uri("a"), 40 << 20).await {
            Ok(got) => assert!(versions.contains(&got), "a mixture"),
            Err(error) => assert!(error.is_transient(), "{error:?}"),
        }
    }
    writer.abort();
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

/// Passes everything on to MinIO, and keeps what it is sent.
fn overheard() -> (String, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let heard = Arc::new(Mutex::new(Vec::new()));
    let keeps = heard.clone();
    let server = service("WHIPPET_TEST_S3").replace("http://", "");
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut minio) = (client.unwrap(), TcpStream::connect(&server).unwrap());
            let (mut answers, mut answered) = (minio.try_clone().unwrap(), client.try_clone().unwrap());
            // A connection that ends is the peers' business.
            std::thread::spawn(move || std::io::copy(&mut answers, &mut answered));
            let keeps = keeps.clone();
            std::thread::spawn(move || {
                let mut piece = vec![0; 64 << 10];
                while let Ok(length @ 1..) = client.read(&mut piece) {
                    keeps.lock().unwrap().extend_from_slice(&piece[..length]);
                    if minio.write_all(&piece[..length]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    (endpoint, heard)
}

/// What stood in this header of requests.
fn values(heard: &Mutex<Vec<u8>>, name: &str) -> Vec<String> {
    let heard = heard.lock().unwrap();
    let lines = heard.split(|byte| *byte == b'\n').filter_map(|line| str::from_utf8(line).ok());
    let named = lines.filter_map(|line| line.trim_end().split_once(": ")).filter(|(found, _)| *found == name);
    named.map(|(_, value)| value.to_owned()).collect()
}

#[tokio::test]
async fn a_store_that_checks_the_checksum_is_not_asked_to_hash_the_content_once_more() {
    let bucket = Bucket::new("hashedonce").await;
    let signed = async |options: &[(&str, &str)]| {
        let (endpoint, heard) = overheard();
        let store = bucket.open("", &[&[("endpoint", endpoint.as_str())], options].concat()).unwrap();
        for key in ["a", "b", "c"] {
            store.put(key, content(1000), "text/plain").await.unwrap();
        }
        let covered = values(&heard, "authorization");
        assert!(covered.iter().all(|value| value.contains(";x-amz-checksum-")), "{covered:?}");
        values(&heard, "x-amz-content-sha256")
    };
    let sha256 = wire::hex(&wire::sha256(&content(1000)));
    let (sha256, unsigned) = (sha256.as_str(), "UNSIGNED-PAYLOAD");
    // The first answer has shown that it checks.
    assert_eq!(signed(&[]).await, [sha256, unsigned, unsigned]);
    // What an option says is done.
    assert_eq!(signed(&[("unsigned_payload", "false")]).await, [sha256; 3]);
    assert_eq!(signed(&[("checksum_algorithm", "CRC64NVME")]).await, [sha256; 3]);
}

/// What an impostor is told that was signed of the content, in as many requests as three puts take.
async fn three_puts((endpoint, asked): (String, Arc<Mutex<Vec<Vec<u8>>>>)) -> Vec<String> {
    let mut options = Bucket::options();
    options.insert("endpoint".into(), endpoint);
    let store = Store::open("s3://bucket/", &options).unwrap();
    for _ in 0..3 {
        store.put("a", content(1), "text/plain").await.unwrap();
    }
    let heard = Mutex::new(asked.lock().unwrap().concat());
    values(&heard, "x-amz-content-sha256")
}

#[tokio::test]
async fn a_store_that_says_nothing_of_the_checksum_is_sent_signed_contents() {
    let taken = "HTTP/1.1 200 OK\r\nConnection: close\r\nETag: \"1\"\r\nContent-Length: 0\r\n\r\n";
    let sha256 = wire::hex(&wire::sha256(&content(1)));
    assert_eq!(three_puts(impostor(taken)).await, [sha256.as_str(); 3]);
}

/// A policy of the bucket may ask for it.
#[tokio::test]
async fn a_store_that_denies_contents_that_are_not_signed_gets_signed_ones() {
    let denies = impostor_by(|request| {
        let checksum = request.lines().find(|line| line.starts_with("x-amz-checksum-sha256")).unwrap();
        match request.contains("UNSIGNED-PAYLOAD") {
            false => format!(
                "HTTP/1.1 200 OK\r\nConnection: close\r\nETag: \"1\"\r\n{checksum}\r\nContent-Length: 0\r\n\r\n"
            ),
            true => "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".to_owned(),
        }
    });
    let (sha256, unsigned) = (wire::hex(&wire::sha256(&content(1))), "UNSIGNED-PAYLOAD");
    let sha256 = sha256.as_str();
    assert_eq!(three_puts(denies).await, [sha256, unsigned, sha256, sha256]);
}

/// The hash that comes with a content is what the store is sent of it: a wrong one is refused there, signed or not.
#[tokio::test]
async fn what_is_hashed_already_is_not_hashed_again() {
    let bucket = Bucket::new("knownhash").await;
    let store = bucket.store("");
    let content = content(100_000);
    let right = Hashed { sha256: wire::sha256(&content), content: content.clone() };
    let wrong = Hashed { sha256: [7; 32], content };
    for key in ["first", "second"] {
        let refused = store.put_hashed(key, wrong.clone(), "text/plain").await.unwrap_err();
        assert!(!refused.is_transient() && refused.to_string().contains("400"), "{refused}");
        store.put_hashed(key, right.clone(), "text/plain").await.unwrap();
    }
    assert_eq!(listed(&store, "").await.len(), 2);
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
    // A second is for a whole request: a slow disk needs more for a large one.
    let store = bucket.proxied(&[]);
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

    // Abandoned while its parts are on their way, and before the answer has come that names it.
    for late in [false, true] {
        match late {
            false => proxy.limit_to(4 * MIB),
            true => proxy.latency(400),
        }
        let (other, whole) = (store.clone(), content(40 * MIB));
        let upload = tokio::spawn(async move { other.put("large", whole, "text/plain").await });
        until_unfinished(&bucket, "large", 1).await;
        upload.abort();
        until_unfinished(&bucket, "large", 0).await;
        proxy.heal();
    }
    assert_eq!(listed(&store, "").await, []);
    store.put("large", content(40 * MIB), "text/plain").await.unwrap();
    assert_eq!(bucket.unfinished("large").await, 0);
}

/// Answers everything with this, and keeps what it was asked.
fn impostor(answer: &'static str) -> (String, Arc<Mutex<Vec<Vec<u8>>>>) {
    impostor_by(move |_| answer.to_owned())
}

/// Answers a request, of which it sees the head, as it is told to.
fn impostor_by(answer: impl Fn(&str) -> String + Send + 'static) -> (String, Arc<Mutex<Vec<Vec<u8>>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let keeps = asked.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // The head, and with it the body of one byte.
            let mut request = vec![0; 16 << 10];
            let length = stream.read(&mut request).unwrap();
            keeps.lock().unwrap().push(request[..length].to_vec());
            let answer = answer(&String::from_utf8_lossy(&request[..length]));
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
    assert_eq!(asked.lock().unwrap().len(), 3);
}
