//! A database and topics of a test's own, a relay as a child process, a consumer of its own.

mod consumer;
mod relay;

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    types::RDKafkaErrorCode,
};

pub use self::{
    consumer::{Consumer, Seen},
    relay::{Relay, get},
};
use crate::db::Db;
pub use crate::db::run_on;

/// The longest that anything but the long tests may take.
pub const SOON: Duration = Duration::from_secs(30);

/// Who may change something, and the token that the tests use.
const TOKENS: &str = "tester it-token\n";
pub const TOKEN: &str = "it-token";

pub fn service(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| {
        panic!("{variable} is not set: run `scripts/services up` and `eval \"$(scripts/services env)\"`")
    })
}

pub fn kafka() -> String {
    service("WHIPPET_TEST_KAFKA")
}

/// What a test takes in `scripts/test`, or in `scripts/soak`, which has more time and room.
pub fn in_soak<T>(here: T, soak: T) -> T {
    if std::env::var_os("WHIPPET_SOAK").is_some() { soak } else { here }
}

/// Runs a test that mostly waits for each of these at once. Each has a thread, which it may block.
pub fn at_once<T: Send, F: Future<Output = ()>>(
    each: impl IntoIterator<Item = T>,
    test: impl Fn(T) -> F + Sync,
) {
    std::thread::scope(|all| {
        for one in each {
            let test = &test;
            all.spawn(move || tokio::runtime::Runtime::new().unwrap().block_on(test(one)));
        }
    });
}

/// Runs `scripts/services VERB NAME`.
pub fn services(verb: &str, name: &str) {
    services_with(verb, name, &[]);
}

pub fn services_with(verb: &str, name: &str, environment: &[(&str, &str)]) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/services");
    let status = Command::new(script).args([verb, name]).envs(environment.iter().copied()).status().unwrap();
    assert!(status.success(), "{script} {verb} {name}: {status}");
}

/// For a test in which no relay has to take over soon: a lease that a busy machine keeps too.
pub fn calm(config: &str) -> String {
    config.replace("lease: 2s", "lease: 10s")
}

/// A database, and topics under a prefix, of one test alone.
pub struct World {
    server: String,
    pub name: String,
    pub url: String,
    pub db: Db,
    pub folder: tempfile::TempDir,
    admin: AdminClient<DefaultClientContext>,
}

impl World {
    pub async fn new(name: &str) -> World {
        World::on(&service("WHIPPET_TEST_PG"), name).await
    }

    /// On this server.
    pub async fn on(server: &str, name: &str) -> World {
        let name = format!("it_{name}_{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
        let url = Db::create(server, &name).await;
        let db = Db::open(&url).await;
        World {
            server: server.to_owned(),
            name,
            url,
            db,
            folder: tempfile::tempdir().unwrap(),
            admin: ClientConfig::new().set("bootstrap.servers", kafka()).create().unwrap(),
        }
    }

    /// Runs a script of SQL.
    pub async fn sql(&self, script: &str) {
        self.db.sql(script).await.unwrap_or_else(|e| panic!("{script}: {e}"));
    }

    pub async fn number(&self, sql: &str) -> i64 {
        self.db.number(sql).await.unwrap_or_else(|e| panic!("{sql}: {e}"))
    }

    /// Waits until a query returns this number.
    pub async fn until(&self, sql: &str, expected: i64) {
        self.until_within(sql, expected, SOON).await;
    }

    pub async fn until_within(&self, sql: &str, expected: i64, within: Duration) {
        let deadline = Instant::now() + within;
        loop {
            let found = self.number(sql).await;
            if found == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{sql}: {found}, not {expected}, after {within:?}");
            self.pause().await;
        }
    }

    /// Between two looks at something that tells nobody when it changes.
    pub async fn pause(&self) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    /// A topic's full name.
    pub fn topic(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    pub async fn create_topic(&self, name: &str, partitions: i32, config: &[(&str, &str)]) -> String {
        let topic = self.topic(name);
        let mut new = NewTopic::new(&topic, partitions, TopicReplication::Fixed(1));
        for (key, value) in config {
            new = new.set(key, value);
        }
        let results = self.admin.create_topics([&new], &AdminOptions::new()).await.unwrap();
        results.into_iter().for_each(|result| {
            result.unwrap();
        });
        topic
    }

    pub async fn alter_topic(&self, topic: &str, key: &str, value: &str) {
        use rdkafka::admin::{AlterConfig, ResourceSpecifier};
        let change = AlterConfig::new(ResourceSpecifier::Topic(topic)).set(key, value);
        let results = self.admin.alter_configs([&change], &AdminOptions::new()).await.unwrap();
        results.into_iter().for_each(|result| {
            result.unwrap();
        });
    }

    /// Lowers `max.message.bytes`, and waits until every partition goes by it: the broker takes it up a little
    /// after it has said yes. What it takes before that is there, as records without a key.
    pub async fn lower_limit(&self, topic: &str, partitions: i32, bytes: usize) {
        use rdkafka::producer::{FutureProducer, FutureRecord};
        self.alter_topic(topic, "max.message.bytes", &bytes.to_string()).await;
        let probe: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", kafka())
            .set("message.timeout.ms", "30000")
            .create()
            .unwrap();
        let payload = vec![0; bytes + 1];
        for partition in 0..partitions {
            loop {
                let record = FutureRecord::<(), _>::to(topic).partition(partition).payload(&payload);
                match probe.send(record, Duration::ZERO).await {
                    Ok(_) => self.pause().await,
                    Err((error, _)) => {
                        let code = error.rdkafka_error_code();
                        assert_eq!(code, Some(RDKafkaErrorCode::MessageSizeTooLarge), "{error}");
                        break;
                    }
                }
            }
        }
    }

    /// Until the broker knows of it: it takes records of a topic that is being deleted a little longer, and they are gone with it.
    pub async fn delete_topic(&self, topic: &str) {
        self.admin.delete_topics(&[topic], &AdminOptions::new()).await.unwrap();
        let is_there = || {
            let found = self.admin.inner().fetch_metadata(Some(topic), SOON).unwrap();
            found.topics()[0].error().is_none()
        };
        while tokio::task::block_in_place(is_there) {
            self.pause().await;
        }
    }

    /// Forbids everybody to write to a topic, or no longer.
    pub fn forbid(&self, topic: &str, forbidden: bool) {
        let verb = if forbidden { "--add" } else { "--remove" };
        let libs = format!("{}/*", service("WHIPPET_TEST_KAFKA_LIBS"));
        let done = Command::new("java")
            .args(["-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp", &libs, "org.apache.kafka.tools.AclCommand"])
            .args(["--bootstrap-server", &kafka(), verb, "--force", "--deny-principal", "User:ANONYMOUS"])
            .args(["--operation", "Write", "--topic", topic])
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
    }

    /// The outbox and the relay's tables as `whippet sql` makes them for a configuration.
    pub async fn install(&self, config: &str) {
        let file = self.write("install.yaml", config);
        let output = whippet(&["sql", "--config", &file]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.sql(&String::from_utf8(output.stdout).unwrap()).await;
    }

    pub fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// A library of this folder, to be loaded into a relay by LD_PRELOAD.
    pub fn compile(&self, source: &str) -> String {
        let library = self.folder.path().join(source).with_extension("so");
        let source = path("tests/it").join(source);
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
        assert!(built.unwrap().success());
        library.display().to_string()
    }

    /// A configuration for this world: `tables` is the YAML of that key, `more` other keys.
    pub fn config(&self, tables: &str, more: &str) -> String {
        self.config_for(&self.url, &kafka(), tables, more)
    }

    pub fn config_for(&self, url: &str, kafka: &str, tables: &str, more: &str) -> String {
        let token = self.write("token", TOKENS);
        format!(
            "source: {{ url: '{url}' }}\nkafka: {{ bootstrap_servers: '{kafka}' }}\n\
             admin: {{ listen: '127.0.0.1:0', token_file: '{token}' }}\nreplicas: {{ lease: 2s }}\ntables: {tables}\n{more}\n"
        )
    }

    /// Starts a relay and waits until its admin address is open.
    pub fn relay(&self, config: &str) -> Relay {
        Relay::start(&self.write("whippet.yaml", config))
    }

    pub fn consumer(&self, topic: &str) -> Consumer {
        Consumer::new(topic)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Best effort: a test that failed leaves its database behind to be looked at.
        if std::thread::panicking() {
            return;
        }
        Db::drop(&self.server, &self.name);
    }
}

/// Runs the program to its end.
pub fn whippet(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_whippet")).args(arguments).output().unwrap()
}

pub fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}
