//! Who the relay is to Kafka, on the real broker: SCRAM, certificates and OAUTHBEARER, and each of them rotated while
//! events flow.

use std::{
    collections::HashSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use serde_json::json;

use crate::{
    certificates::{Certificates, openssl},
    db::Db,
    faults::{kafka_pid, signal},
    harness::{Relay, Seen, World, calm, kafka, service, services},
};

pub fn tls() -> String {
    service("WHIPPET_TEST_KAFKA_TLS")
}

/// One of Kafka's own tools.
fn tool(class: &str, arguments: &[&str]) {
    let libs = format!("{}/*", service("WHIPPET_TEST_KAFKA_LIBS"));
    let done = Command::new("java")
        .args(["-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp", &libs, class, "--bootstrap-server", &kafka()])
        .args(arguments)
        .output()
        .unwrap();
    assert!(done.status.success(), "{arguments:?}: {done:?}");
}

fn set_password(user: &str, password: &str) {
    let credential = format!("SCRAM-SHA-512=[iterations=4096,password={password}]");
    tool(
        "kafka.admin.ConfigCommand",
        &["--alter", "--add-config", &credential, "--entity-type", "users", "--entity-name", user],
    );
}

/// A relay that publishes by one of the broker's other listeners, and a table that it reads.
pub struct Stage {
    pub world: World,
    pub topic: String,
    pub relay: Relay,
    /// The file.
    pub config: String,
    written: u32,
}

impl Stage {
    async fn new(name: &str, listener: &str, properties: impl Fn(&World) -> String) -> Stage {
        Stage::of(name, listener, "at_least_once", properties).await
    }

    async fn of(name: &str, listener: &str, delivery: &str, properties: impl Fn(&World) -> String) -> Stage {
        let keys = |world: &World| format!("delivery: {delivery}, properties: {{ {} }}", properties(world));
        Stage::with(name, listener, keys).await
    }

    /// With these keys of `kafka`.
    pub async fn with(name: &str, listener: &str, keys: impl Fn(&World) -> String) -> Stage {
        let world = World::new(name).await;
        let topic = world.create_topic("events", 1, &[]).await;
        let servers = service(listener);
        let config = calm(&world.config_for(&world.url, &servers, "[{ name: outbox }]", ""));
        let config = config.replace(&format!("'{servers}'"), &format!("'{servers}', {}", keys(&world)));
        world.install(&config).await;
        let config = world.write("whippet.yaml", &config);
        let relay = Relay::start(&config);
        Stage { world, topic, relay, config, written: 0 }
    }

    pub async fn write(&mut self, count: u32) {
        let (from, to) = (self.written + 1, self.written + count);
        self.written = to;
        let rows = format!("SELECT '{}', 'k', convert_to('' || i, 'UTF8')", self.topic);
        let insert =
            format!("INSERT INTO outbox (topic, key, payload) {rows} FROM generate_series({from}, {to}) i");
        self.world.sql(&insert).await;
    }

    /// Writes, and waits until all of it is published.
    pub async fn flows(&mut self) {
        self.write(10).await;
        self.world.until("SELECT count(*) FROM outbox", 0).await;
    }

    /// Everything is there, in order; how often something was repeated.
    pub fn repeats(&self) -> usize {
        let mut consumer = self.world.consumer(&self.topic);
        let mut highest = 0;
        let seen = consumer.read_committed();
        for record in seen {
            let number: u32 = record.text().parse().unwrap();
            assert!(number <= highest + 1, "{number} after {highest}");
            highest = highest.max(number);
        }
        assert_eq!(highest, self.written);
        seen.len() - seen.iter().map(|record| record.text().to_owned()).collect::<HashSet<_>>().len()
    }

    /// `rotate` while rows are written all the time.
    pub async fn under_load(&mut self, rotate: impl AsyncFnOnce(&Stage)) {
        let go = Arc::new(AtomicBool::new(true));
        let (url, topic, from) = (self.world.url.clone(), self.topic.clone(), self.written);
        let on = go.clone();
        let writer = tokio::spawn(async move {
            let db = Db::open(&url).await;
            let mut number = from;
            while on.load(Ordering::Relaxed) {
                number += 1;
                let row = format!("('{topic}', 'k', convert_to('{number}', 'UTF8'))");
                db.sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES {row}")).await.unwrap();
            }
            number
        });
        rotate(self).await;
        go.store(false, Ordering::Relaxed);
        self.written = writer.await.unwrap();
        self.world.until("SELECT count(*) FROM outbox", 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scram_password_and_an_admin_token_are_rotated_under_load() {
    let user = format!("u{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
    let set = |password: &str| set_password(&user, password);
    set("first");
    let mut stage = Stage::new("scram", "WHIPPET_TEST_KAFKA_SASL", |world| {
        let password = world.write("kafka-password", "first\n");
        format!(
            "security.protocol: SASL_SSL, sasl.mechanisms: SCRAM-SHA-512, sasl.username: {user}, \
             sasl.password: '${{file:{password}}}', ssl.ca.location: '{}/ca.crt'",
            tls()
        )
    })
    .await;
    stage.flows().await;
    stage
        .under_load(async |stage| {
            set("second");
            stage.world.write("kafka-password", "second\n");
            stage.relay.wait_for("files of the kafka client have changed and are taken up");
        })
        .await;
    // The new clients had to log in.
    stage.flows().await;
    println!("repeated: {}", stage.repeats());

    // Nothing that is wrong stops what works.
    stage.world.write("kafka-password", "third\n");
    set("third");
    stage.flows().await;
    stage.world.write("token", "somebody new-token\n");
    let body = r#"{"table": "outbox"}"#;
    assert_eq!(stage.relay.post("/v1/pause", Some(crate::harness::TOKEN), body).0, 401);
    assert_eq!(stage.relay.post("/v1/pause", Some("new-token"), body).0, 200);
    let (_, log) = stage.relay.stop();
    for secret in ["first", "second", "third"] {
        assert!(!log.contains(&format!("\"{secret}\"")), "{log}");
    }
}

/// The broker hangs, so there is no moment with nothing in flight: what is, is let go of and published again.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_rotated_while_something_is_always_in_flight() {
    let user = format!("u{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
    set_password(&user, "first");
    let mut stage = Stage::new("scrambusy", "WHIPPET_TEST_KAFKA_SASL", |world| {
        let password = world.write("kafka-password", "first\n");
        format!(
            "security.protocol: SASL_SSL, sasl.mechanisms: SCRAM-SHA-512, sasl.username: {user}, \
             sasl.password: '${{file:{password}}}', ssl.ca.location: '{}/ca.crt'",
            tls()
        )
    })
    .await;
    stage.flows().await;
    stage
        .under_load(async |stage| {
            set_password(&user, "second");
            signal(kafka_pid(), "STOP");
            while stage.relay.metric("whippet_in_flight_events", "") == 0.0 {
                stage.world.pause().await;
            }
            stage.world.write("kafka-password", "second\n");
            stage.relay.wait_for("what is in flight is repeated with new producers");
            signal(kafka_pid(), "CONT");
            stage.relay.wait_for("files of the kafka client have changed and are taken up");
        })
        .await;
    stage.flows().await;
    println!("repeated: {}", stage.repeats());
}

/// The producer of transactions is not exchanged while it works: the new password is taken up when the broker wants one.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_rotated_where_delivery_is_exactly_once() {
    let user = format!("u{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
    let set = |password: &str| set_password(&user, password);
    set("first");
    let mut stage = Stage::of("scramonce", "WHIPPET_TEST_KAFKA_SASL", "exactly_once", |world| {
        let password = world.write("kafka-password", "first\n");
        format!(
            "security.protocol: SASL_SSL, sasl.mechanisms: SCRAM-SHA-512, sasl.username: {user}, \
             sasl.password: '${{file:{password}}}', ssl.ca.location: '{}/ca.crt'",
            tls()
        )
    })
    .await;
    stage.flows().await;
    set("second");
    stage.world.write("kafka-password", "second\n");
    // Every connection has to log in anew.
    tokio::task::spawn_blocking(|| services("restart", "kafka")).await.unwrap();
    stage.write(10).await;
    stage.world.until_within("SELECT count(*) FROM outbox", 0, Duration::from_mins(2)).await;
    stage.relay.wait_for("files of the kafka client have changed and are taken up");
    let mut consumer = stage.world.consumer(&stage.topic);
    let seen: Vec<&str> = consumer.read(20).iter().map(Seen::text).collect();
    assert_eq!(seen, (1..=20).map(|number| number.to_string()).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_rotated_under_load() {
    let certificates = Certificates::of(&tls());
    let unique = &uuid::Uuid::new_v4().simple().to_string()[..8];
    let (first, second) = (format!("first-{unique}"), format!("second-{unique}"));
    certificates.make(&first);
    certificates.make(&second);
    certificates.trust(&first, false);
    certificates.switch_to(&first);
    let mut stage = Stage::new("mtls", "WHIPPET_TEST_KAFKA_MTLS", |_| {
        format!(
            "security.protocol: SSL, ssl.ca.location: '{}', ssl.certificate.location: '{}', ssl.key.location: '{}'",
            certificates.path("current/ca.pem"),
            certificates.path("current/cert.pem"),
            certificates.path("current/key.pem")
        )
    })
    .await;
    stage.relay.wait_for("certificate verify failed");
    certificates.trust(&first, true);
    let taken_up = "files of the kafka client have changed and are taken up";
    stage.relay.wait_for(taken_up);
    stage.flows().await;
    stage
        .under_load(async |stage| {
            certificates.switch_to(&second);
            stage.relay.wait_for_nth(taken_up, 2);
        })
        .await;
    // The first one may not write any more, because others may: what flows is the second's.
    let (principal, topic) = (format!("User:CN={second}"), stage.topic.clone());
    let allow = ["--add", "--allow-principal", &principal, "--allow-principal", "User:ANONYMOUS"];
    let what = ["--operation", "All", "--topic", &topic];
    tool("org.apache.kafka.tools.AclCommand", &[&allow[..], &what[..]].concat());
    stage.flows().await;
    println!("repeated: {}", stage.repeats());
    let events = |cause| stage.relay.metric("whippet_held_events", cause);
    assert_eq!((events("topic"), events("parked")), (0.0, 0.0));
}

/// An issuer of tokens on loopback: what it was asked, and which secret it wants.
#[derive(Clone)]
struct Issuer {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
    wants: Arc<Mutex<String>>,
}

impl Issuer {
    fn start(wants: &str) -> Issuer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/token", listener.local_addr().unwrap());
        let issuer = Issuer { url, asked: Arc::default(), wants: Arc::new(Mutex::new(wants.to_owned())) };
        let answering = issuer.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut reader = BufReader::new(stream.unwrap());
                let (mut head, mut line) = (String::new(), String::new());
                while reader.read_line(&mut line).unwrap() > 2 {
                    head += &line;
                    line.clear();
                }
                let length = head
                    .lines()
                    .find_map(|line| line.to_lowercase().strip_prefix("content-length: ").map(str::to_owned));
                let mut body = vec![0; length.unwrap().trim().parse().unwrap()];
                reader.read_exact(&mut body).unwrap();
                let asked = format!("{head}\n{}", String::from_utf8(body).unwrap());
                let good = asked.contains(&*answering.wants.lock().unwrap());
                let (code, answer) = match good {
                    true => (
                        "200 OK",
                        json!({ "access_token": token(8), "token_type": "Bearer", "expires_in": 8 }),
                    ),
                    false => ("401 Unauthorized", json!({ "error": "invalid_client" })),
                };
                answering.asked.lock().unwrap().push(asked);
                let answer = answer.to_string();
                write!(
                    reader.get_mut(),
                    "HTTP/1.1 {code}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{answer}",
                    answer.len()
                )
                .ok();
            }
        });
        issuer
    }

    fn granted(&self) -> usize {
        let wants = self.wants.lock().unwrap().clone();
        self.asked.lock().unwrap().iter().filter(|asked| asked.contains(&wants)).count()
    }

    /// Waits until it has granted this many tokens for what it wants now.
    async fn until_granted(&self, count: usize) {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while self.granted() < count {
            assert!(std::time::Instant::now() < deadline, "{:?}", self.asked.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A token that the broker takes, good for this many seconds.
pub fn token(seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let part = |value: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({ "iss": "it", "sub": "relay", "aud": "kafka", "iat": now, "exp": now + seconds });
    let signed = format!("{}.{}", part(json!({ "alg": "RS256", "typ": "JWT", "kid": "test" })), part(claims));
    let key = format!("{}/issuer.key", tls());
    let signature = openssl(&["dgst", "-sha256", "-sign", &key], signed.as_bytes());
    format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

/// Tokens that live for seconds, by a client's secret: renewed by themselves, and the secret is rotated.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_come_from_an_issuer_by_a_secret_that_is_rotated() {
    let basic = |secret: &str| format!("Basic {}", BASE64_STANDARD.encode(format!("relay:{secret}")));
    let issuer = Issuer::start(&basic("first"));
    let url = issuer.url.clone();
    let mut stage = Stage::new("oidc", "WHIPPET_TEST_KAFKA_SASL", move |world| {
        let secret = world.write("client-secret", "first\n");
        format!(
            "security.protocol: SASL_SSL, sasl.mechanisms: OAUTHBEARER, sasl.oauthbearer.method: oidc, \
             sasl.oauthbearer.client.id: relay, sasl.oauthbearer.client.secret: '${{file:{secret}}}', \
             sasl.oauthbearer.token.endpoint.url: '{url}', ssl.ca.location: '{}/ca.crt'",
            tls()
        )
    })
    .await;
    stage.flows().await;
    // One for each client at the start, and one more.
    let granted = issuer.granted();
    issuer.until_granted(granted + 1).await;
    stage.flows().await;
    stage
        .under_load(async |stage| {
            *issuer.wants.lock().unwrap() = basic("second");
            stage.world.write("client-secret", "second\n");
            issuer.until_granted(1).await;
        })
        .await;
    stage.flows().await;
    println!("repeated: {}", stage.repeats());
}

/// A token in a file, as Kubernetes projects them, which the issuer changes for its own: read each time anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_in_a_file_is_changed_for_one_of_the_issuer() {
    let issuer = Issuer::start("assertion=first.token");
    let url = issuer.url.clone();
    let mut stage = Stage::new("assertion", "WHIPPET_TEST_KAFKA_SASL", move |world| {
        let token = world.write("projected-token", "first.token");
        format!(
            "security.protocol: SASL_SSL, sasl.mechanisms: OAUTHBEARER, sasl.oauthbearer.method: oidc, \
             sasl.oauthbearer.grant.type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', \
             sasl.oauthbearer.assertion.file: '{token}', \
             sasl.oauthbearer.token.endpoint.url: '{url}', ssl.ca.location: '{}/ca.crt'",
            tls()
        )
    })
    .await;
    stage.flows().await;
    *issuer.wants.lock().unwrap() = "assertion=second.token".into();
    stage.world.write("projected-token", "second.token");
    issuer.until_granted(1).await;
    stage.flows().await;
    println!("repeated: {}", stage.repeats());
}
