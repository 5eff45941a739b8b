//! A database and topics of a test's own, a relay as a child process, a consumer of its own.

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::Headers as _,
    types::RDKafkaErrorCode,
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

/// Runs `scripts/services VERB NAME`.
pub fn services(verb: &str, name: &str) {
    services_with(verb, name, &[]);
}

pub fn services_with(verb: &str, name: &str, environment: &[(&str, &str)]) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/services");
    let status = Command::new(script).args([verb, name]).envs(environment.iter().copied()).status().unwrap();
    assert!(status.success(), "{script} {verb} {name}: {status}");
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

    pub async fn delete_topic(&self, topic: &str) {
        self.admin.delete_topics(&[topic], &AdminOptions::new()).await.unwrap();
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

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<serde_json::Value>, bool)>,
    more: Condvar,
}

impl Log {
    fn lines(&self) -> MutexGuard<'_, (Vec<serde_json::Value>, bool)> {
        // A test that failed still shows its log.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `whippet run`, as a child process that logs JSON.
pub struct Relay {
    child: Child,
    log: Arc<Log>,
    pub admin: String,
}

impl Relay {
    pub fn start(config: &str) -> Relay {
        Relay::start_with(config, &[])
    }

    pub fn start_with(config: &str, environment: &[(&str, &str)]) -> Relay {
        let mut command = Command::new(env!("CARGO_BIN_EXE_whippet"));
        command.args(["run", "--config", config]).envs(environment.iter().copied());
        Relay::start_by(command)
    }

    /// By a command that becomes `whippet run`.
    pub fn start_by(mut command: Command) -> Relay {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        let (stderr, shared) = (child.stderr.take().unwrap(), log.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or(serde_json::Value::String(line));
                shared.lines().0.push(line);
                shared.more.notify_all();
            }
            shared.lines().1 = true;
            shared.more.notify_all();
        });
        let mut relay = Relay { child, log, admin: String::new() };
        let open = relay.wait_for("admin address is open");
        open["address"].as_str().unwrap().clone_into(&mut relay.admin);
        relay
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a log line that contains `text` anywhere, and returns it.
    pub fn wait_for(&self, text: &str) -> serde_json::Value {
        let deadline = Instant::now() + SOON;
        let mut lines = self.log.lines();
        loop {
            if let Some(line) = lines.0.iter().find(|line| line.to_string().contains(text)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero() && !lines.1, "no line with {text:?} in:\n{}", render(&lines.0));
            lines = self.log.more.wait_timeout(lines, left).unwrap().0;
        }
    }

    pub fn log(&self) -> String {
        render(&self.log.lines().0)
    }

    /// GET of the admin address: status code and body.
    pub fn get(&self, path: &str) -> (u16, String) {
        get(&self.admin, path)
    }

    pub fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.get("/status").1).unwrap()
    }

    /// Waits until the status has this at a JSON pointer: the board is written once in a while.
    pub async fn until_status(&self, pointer: &str, expected: impl Into<serde_json::Value>) {
        let expected = expected.into();
        self.until(|status| status.pointer(pointer) == Some(&expected)).await;
    }

    pub async fn until(&self, good: impl Fn(&serde_json::Value) -> bool) {
        let deadline = Instant::now() + SOON;
        loop {
            let status = self.status();
            if good(&status) {
                return;
            }
            assert!(Instant::now() < deadline, "not after {SOON:?}: {status}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Runs an operator's verb as a user would; what it printed as JSON.
    pub fn operate(&self, world: &World, arguments: &[&str]) -> serde_json::Value {
        let output = self.try_to(world, arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub fn try_to(&self, world: &World, arguments: &[&str]) -> std::process::Output {
        let token = world.folder.path().join("token").display().to_string();
        let common = ["--json", "--admin", &self.admin, "--token-file", &token];
        whippet(&[arguments, &common[..]].concat())
    }

    /// POST to the admin address: status code and body.
    pub fn post(&self, path: &str, token: Option<&str>, body: &str) -> (u16, String) {
        let authorization = token.map_or(String::new(), |token| format!("Authorization: Bearer {token}\r\n"));
        let length = body.len();
        request(
            &self.admin,
            &format!(
                "POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{authorization}\
                 Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}",
                self.admin
            ),
        )
    }

    /// The sum of a metric's samples whose labels contain `labels`.
    pub fn metric(&self, name: &str, labels: &str) -> f64 {
        let text = self.get("/metrics").1;
        let samples = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(labels)
        });
        samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &id]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits until the process has ended by itself.
    pub fn ended(mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it did not end; its log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The most memory that the process has had, in MiB (proc(5), VmHWM).
    pub fn peak_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, then the exit code and everything it logged.
    pub fn stop(mut self) -> (Option<i32>, String) {
        self.signal("TERM");
        let code = self.child.wait().unwrap().code();
        let mut lines = self.log.lines();
        while !lines.1 {
            lines = self.log.more.wait(lines).unwrap();
        }
        (code, render(&lines.0))
    }
}

fn render(lines: &[serde_json::Value]) -> String {
    lines.iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "{line}");
        text
    })
}

impl Drop for Relay {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.child.kill().ok();
            self.child.wait().ok();
        }
        if std::thread::panicking() {
            eprintln!("the relay's log:\n{}", self.log());
        }
    }
}

pub fn get(address: &str, path: &str) -> (u16, String) {
    request(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"))
}

fn request(address: &str, request: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    // A server that has refused already need not read the rest.
    stream.write_all(request.as_bytes()).ok();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// A record as a consumer sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub partition: i32,
    pub offset: i64,
    pub timestamp: Option<i64>,
    pub key: Option<Vec<u8>>,
    pub payload: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(header, _)| header == name)?;
        Some(std::str::from_utf8(value.as_ref()?).unwrap())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(self.payload.as_deref().unwrap()).unwrap()
    }
}

/// Reads all partitions of a topic from the beginning, with no group.
pub struct Consumer {
    consumer: BaseConsumer,
    pub seen: Vec<Seen>,
}

impl Consumer {
    pub fn new(topic: &str) -> Consumer {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", kafka())
            .set("group.id", "none")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "20")
            .set("fetch.message.max.bytes", "50000000")
            .set("receive.message.max.bytes", "200000000")
            .set("isolation.level", "read_committed")
            .create()
            .unwrap();
        let metadata = consumer.fetch_metadata(Some(topic), SOON).unwrap();
        let mut list = TopicPartitionList::new();
        for partition in metadata.topics()[0].partitions() {
            list.add_partition_offset(topic, partition.id(), Offset::Beginning).unwrap();
        }
        assert!(list.count() > 0, "topic {topic} does not exist");
        consumer.assign(&list).unwrap();
        Consumer { consumer, seen: Vec::new() }
    }

    pub fn partitions(&self) -> usize {
        self.consumer.assignment().unwrap().count()
    }

    /// Reads until `enough`; panics after a while.
    pub fn read_until(&mut self, enough: impl Fn(&[Seen]) -> bool) -> &[Seen] {
        let mut deadline = Instant::now() + SOON;
        while !enough(&self.seen) {
            assert!(
                Instant::now() < deadline,
                "saw {} records and no more: {:?}",
                self.seen.len(),
                self.seen.iter().rev().take(3).collect::<Vec<_>>()
            );
            if let Some(seen) = self.poll(Duration::from_millis(100)) {
                self.seen.push(seen);
                deadline = Instant::now() + SOON;
            }
        }
        &self.seen
    }

    pub fn read(&mut self, count: usize) -> &[Seen] {
        self.read_until(|seen| seen.len() >= count)
    }

    /// Reads what is there now, to the end of every partition.
    pub fn read_to_end(&mut self) -> &[Seen] {
        let ends: Vec<(i32, i64)> = self
            .consumer
            .assignment()
            .unwrap()
            .elements()
            .iter()
            .map(|element| (element.partition(), self.end_of(element.topic(), element.partition())))
            .collect();
        let total: i64 = ends.iter().map(|(_, high)| high).sum();
        self.read(usize::try_from(total).unwrap())
    }

    /// The end of a partition. A broker that has just started may not have taken it up.
    fn end_of(&self, topic: &str, partition: i32) -> i64 {
        let deadline = Instant::now() + SOON;
        loop {
            match self.consumer.fetch_watermarks(topic, partition, SOON) {
                Ok((_, high)) => return high,
                Err(error) => {
                    let code = error.rdkafka_error_code();
                    assert_eq!(code, Some(RDKafkaErrorCode::NotLeaderForPartition), "{error}");
                    assert!(Instant::now() < deadline, "{error}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    fn poll(&self, within: Duration) -> Option<Seen> {
        // An error is a broker that is restarted: the client finds it again.
        let Ok(message) = self.consumer.poll(within)? else { return None };
        let headers = message.headers().map_or_else(Vec::new, |headers| {
            headers.iter().map(|h| (h.key.to_owned(), h.value.map(<[u8]>::to_vec))).collect()
        });
        Some(Seen {
            partition: message.partition(),
            offset: message.offset(),
            timestamp: message.timestamp().to_millis(),
            key: message.key().map(<[u8]>::to_vec),
            payload: message.payload().map(<[u8]>::to_vec),
            headers,
        })
    }
}

pub fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}
