//! MariaDB and MySQL, on real servers and real Kafka: `scripts/bench mysql`.
//!
//! In each round, each on its own 300,000 rows of 256 bytes: the relay's drain by polling, in delete mode, from
//! both servers; its drain from both binlogs; and Debezium's from MariaDB's. What is printed was measured in this
//! run. A rate is from the first record that a consumer sees to the last.
//!
//! From the binlog the relay drains in two ways. `binlog` is the default: rows stay in their table until they are
//! published, and then the relay deletes them, which Debezium does not do. After a restart it reads what is left
//! from the table, so it is started before, and stopped (SIGSTOP) while the rows are written. `binlog alone` is
//! `rows: transient`: only the log has the rows, nothing is deleted, and a position in the log is stored, as
//! Debezium stores its offset. That one is started anew, as Debezium is.
//!
//! None of the connections has TLS, and both producers linger for 5 ms. The payload is text for all: Debezium's
//! router cannot pass bytes through a converter of strings. Words after the number of rounds pick runs: those
//! whose name has one of them.

#[expect(dead_code, reason = "the other benchmarks use more of it")]
mod common;
#[path = "common/debezium.rs"]
mod debezium;
#[path = "common/rows.rs"]
#[expect(dead_code, reason = "the other benchmarks use more of it")]
mod rows;

use std::{
    fmt::Write as _,
    net::TcpListener,
    process::Command,
    time::{Duration, Instant},
};

use common::{Bench, Process, Program, Shape, median, on_thread};
use debezium::Debezium;
use mysql_async::{Conn, Opts, prelude::Queryable as _};
use rows::{count, payload};
use serde_json::Value;

const ROWS: usize = 300_000;
const PAYLOAD: usize = 256;
const KEYS: usize = 1_000;
const WARM: &str = "bench.warm";
const PATIENCE: Duration = Duration::from_mins(1);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Peer {
    Poll,
    Log,
    Alone,
    Debezium,
}

/// A peer, and its server.
const RUNS: [(Peer, &str, &str); 7] = [
    (Peer::Poll, "mariadb", "relay, poll, MariaDB"),
    (Peer::Poll, "mysql", "relay, poll, MySQL"),
    (Peer::Log, "mariadb", "relay, binlog, MariaDB"),
    (Peer::Log, "mysql", "relay, binlog, MySQL"),
    (Peer::Alone, "mariadb", "relay, binlog alone, MariaDB"),
    (Peer::Alone, "mysql", "relay, binlog alone, MySQL"),
    (Peer::Debezium, "mariadb", "Debezium, MariaDB"),
];

#[derive(Clone, Copy, Debug, Default)]
struct Drain {
    rate: f64,
    cpu_seconds_per_million: f64,
    /// Of the database server and of the broker.
    server_cpu_seconds_per_million: f64,
    broker_cpu_seconds_per_million: f64,
    peak_mib: f64,
}

impl Drain {
    fn line(&self) -> String {
        format!(
            "{:>9.0} events/s   {:>5.1} CPU-s per million (server {:.1}, broker {:.1})   peak {:.0} MiB",
            self.rate,
            self.cpu_seconds_per_million,
            self.server_cpu_seconds_per_million,
            self.broker_cpu_seconds_per_million,
            self.peak_mib
        )
    }

    fn median(all: &[Drain]) -> Drain {
        let of = |field: fn(&Drain) -> f64| median(all.iter().map(field).collect());
        Drain {
            rate: of(|drain| drain.rate),
            cpu_seconds_per_million: of(|drain| drain.cpu_seconds_per_million),
            server_cpu_seconds_per_million: of(|drain| drain.server_cpu_seconds_per_million),
            broker_cpu_seconds_per_million: of(|drain| drain.broker_cpu_seconds_per_million),
            peak_mib: of(|drain| drain.peak_mib),
        }
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let rounds: usize = words.iter().find_map(|word| word.parse().ok()).unwrap_or(5);
    let wanted: Vec<&String> = words.iter().filter(|word| word.parse::<usize>().is_err()).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str()));
    let runs: Vec<_> = RUNS.into_iter().filter(|(_, _, name)| is_wanted(name)).collect();
    let shape = Shape { rows: ROWS, payload: PAYLOAD, partitions: 6, text: true, fetch_wait: "5" };
    let bench = Bench::new(shape).await?;
    let debezium = Debezium::new(&bench)?;
    let mut drains: Vec<Vec<Drain>> = vec![Vec::new(); runs.len()];
    for round in 1..=rounds {
        for turn in 0..runs.len() {
            let ix = (turn + round - 1) % runs.len();
            let (peer, server, name) = runs[ix];
            let mut one = One::new(&bench, &debezium, peer, server).await?;
            let drain = one.drain().await?;
            one.clean().await?;
            println!("round {round}: {name:<30}{}", drain.line());
            drains[ix].push(drain);
        }
    }
    println!(
        "\nmedians of {rounds} interleaved rounds, {ROWS} rows of {PAYLOAD} bytes, 1000 in a transaction; CPU of \
         the whole process, its start included:"
    );
    let drains: Vec<Drain> = drains.iter().map(|drains| Drain::median(drains)).collect();
    for ((_, _, name), drain) in runs.iter().zip(&drains) {
        println!("  {name:<30}{}", drain.line());
    }
    let of = |peer, server| {
        let at = runs.iter().position(|(one, its, _)| (*one, *its) == (peer, server))?;
        Some(drains[at])
    };
    let Some(debezium) = of(Peer::Debezium, "mariadb") else { return bench.end().await };
    for (peer, what) in [
        (Peer::Log, "MariaDB's binlog, and rows deleted"),
        (Peer::Alone, "MariaDB's binlog alone, the same work"),
    ] {
        let Some(relay) = of(peer, "mariadb") else { continue };
        println!(
            "  {what}: rate, relay / Debezium {:.2}; CPU an event, Debezium / relay {:.1}",
            relay.rate / debezium.rate,
            debezium.cpu_seconds_per_million / relay.cpu_seconds_per_million
        );
    }
    bench.end().await
}

/// One drain of one server.
struct One<'a> {
    bench: &'a Bench,
    debezium: &'a Debezium,
    peer: Peer,
    url: String,
    db: Conn,
    topic: String,
}

impl One<'_> {
    /// A fresh outbox, and a fresh topic.
    async fn new<'a>(
        bench: &'a Bench,
        debezium: &'a Debezium,
        peer: Peer,
        server: &str,
    ) -> anyhow::Result<One<'a>> {
        let url = std::env::var(format!("WHIPPET_TEST_{}", server.to_uppercase()))?;
        let mut db = Conn::from_url(&url).await?;
        for statement in
            ["DROP DATABASE IF EXISTS whippet_bench", "CREATE DATABASE whippet_bench", "USE whippet_bench"]
        {
            db.query_drop(statement).await?;
        }
        let topic = bench.topic("bench.drain".into()).await?;
        let mut one = One { bench, debezium, peer, url: format!("{url}/whippet_bench"), db, topic };
        let file = one.config(0)?;
        let script = Command::new(env!("CARGO_BIN_EXE_whippet")).args(["sql", "--config", &file]).output()?;
        let script = String::from_utf8(script.stdout)?;
        let lines: Vec<&str> = script.lines().filter(|line| !line.starts_with("--")).collect();
        for statement in lines.join("\n").split(";\n").filter(|statement| !statement.trim().is_empty()) {
            one.db.query_drop(statement).await?;
        }
        one.db.query_drop("ALTER TABLE outbox MODIFY payload LONGTEXT").await?;
        Ok(one)
    }

    async fn clean(mut self) -> anyhow::Result<()> {
        self.db.query_drop("DROP DATABASE whippet_bench").await?;
        self.db.disconnect().await?;
        self.bench.delete_topic(&self.topic).await
    }

    async fn drain(&mut self) -> anyhow::Result<Drain> {
        let program = match self.peer {
            Peer::Poll => {
                self.fill().await?;
                None
            }
            Peer::Log => {
                let program = self.start_ready().await?;
                program.signal("STOP")?;
                self.fill().await?;
                Some(program)
            }
            Peer::Alone | Peer::Debezium => {
                let mut program = self.start_ready().await?;
                program.signal("TERM")?;
                program.0.wait()?;
                self.fill().await?;
                None
            }
        };
        let others = self.others().await?;
        let before = [others[0].cpu_seconds()?, others[1].cpu_seconds()?];
        let consumer = self.bench.consumer(&self.topic)?;
        let counted = on_thread(move || count(&consumer, ROWS, |_| ()));
        let program = match program {
            Some(program) => {
                program.signal("CONT")?;
                program
            }
            None => self.start(5)?.0,
        };
        let rate = counted.await?;
        let deadline = Instant::now() + PATIENCE;
        let left = "SELECT EXISTS (SELECT 1 FROM outbox)";
        let deletes = matches!(self.peer, Peer::Poll | Peer::Log);
        while deletes && self.db.query_first::<u8, _>(left).await? != Some(0) {
            anyhow::ensure!(Instant::now() < deadline, "rows are still in the outbox after {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let per_million = |seconds: f64| seconds * 1e6 / ROWS as f64;
        Ok(Drain {
            rate,
            cpu_seconds_per_million: per_million(program.cpu_seconds()?),
            server_cpu_seconds_per_million: per_million(others[0].cpu_seconds()? - before[0]),
            broker_cpu_seconds_per_million: per_million(others[1].cpu_seconds()? - before[1]),
            peak_mib: program.peak_mib()?,
        })
    }

    /// The database server and the broker.
    async fn others(&mut self) -> anyhow::Result<[Process; 2]> {
        let file: Option<String> = self.db.query_first("SELECT @@GLOBAL.pid_file").await?;
        let of = |file: String| anyhow::Ok(Process(std::fs::read_to_string(file)?.trim().parse()?));
        Ok([of(file.unwrap_or_default())?, of(std::env::var("WHIPPET_TEST_KAFKA_PID")?)?])
    }

    async fn fill(&mut self) -> anyhow::Result<()> {
        for low in (0..ROWS).step_by(1_000) {
            let mut text = String::from("INSERT INTO outbox (topic, `key`, type, payload) VALUES ");
            for n in low..low + 1_000 {
                let comma = if n > low { "," } else { "" };
                write!(
                    text,
                    "{comma}('{}', 'key-{}', 'Benched', '{}')",
                    self.topic,
                    n % KEYS,
                    payload(n, PAYLOAD)
                )?;
            }
            self.db.query_drop(text).await?;
        }
        Ok(())
    }

    /// Started, and through with a first row of another topic from the log.
    async fn start_ready(&mut self) -> anyhow::Result<Program> {
        self.debezium.forget();
        self.bench.topic(WARM.into()).await?;
        let (mut program, port) = self.start(5)?;
        let deadline = Instant::now() + PATIENCE;
        while !self.reads(port).await? {
            let ended = program.0.try_wait()?;
            let log = if self.peer == Peer::Debezium { self.debezium.log() } else { String::new() };
            anyhow::ensure!(ended.is_none(), "{:?} ended: {ended:?}{log}", self.peer);
            anyhow::ensure!(
                Instant::now() < deadline,
                "{:?} is not ready after {PATIENCE:?}{log}",
                self.peer
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let warm =
            format!("INSERT INTO outbox (topic, `key`, type, payload) VALUES ('{WARM}', 'k', 't', '{{}}')");
        self.db.query_drop(warm).await?;
        let consumer = self.bench.consumer(WARM)?;
        on_thread(move || count(&consumer, 1, |_| ())).await?;
        Ok(program)
    }

    /// Whether it has come to the log.
    async fn reads(&mut self, port: u16) -> anyhow::Result<bool> {
        if self.peer == Peer::Debezium {
            let readers =
                "SELECT count(*) FROM information_schema.processlist WHERE command LIKE 'Binlog Dump%'";
            return Ok(self.db.query_first::<u64, _>(readers).await? == Some(1));
        }
        let Ok(mut answer) = ureq::get(format!("http://127.0.0.1:{port}/status")).call() else {
            return Ok(false);
        };
        let status: Value = serde_json::from_str(&answer.body_mut().read_to_string()?)?;
        Ok(status["tables"][0]["capture"] == "stream")
    }

    fn start(&self, poll_interval_ms: u64) -> anyhow::Result<(Program, u16)> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        if self.peer != Peer::Debezium {
            return Ok((Program::relay(&self.config(port)?)?, port));
        }
        let to = Opts::from_url(&self.url)?;
        let connector = format!(
            "connector.class=io.debezium.connector.mariadb.MariaDbConnector
database.hostname={}
database.port={}
database.user={}
database.password=
database.ssl.mode=disable
database.server.id=5401
database.include.list=whippet_bench
table.include.list=whippet_bench.outbox
include.schema.changes=false
schema.history.internal=io.debezium.storage.file.history.FileSchemaHistory
schema.history.internal.file.filename={}",
            to.ip_or_hostname(),
            to.tcp_port(),
            to.user().unwrap_or_default(),
            self.bench.folder.path().join("history").display(),
        );
        Ok((self.debezium.start(port, poll_interval_ms, &connector)?, port))
    }

    /// The lease outlasts the time for which the relay is stopped.
    fn config(&self, port: u16) -> anyhow::Result<String> {
        let file = self.bench.folder.path().join("mysql.yaml");
        let (source, table) = match self.peer {
            Peer::Log => (", stream: { heartbeat: 1m }", ", capture: stream"),
            Peer::Alone => (", stream: { heartbeat: 1m }", ", capture: stream, rows: transient"),
            _ => ("", ""),
        };
        std::fs::write(
            &file,
            format!(
                "source: {{ url: '{}', tls: {{ mode: disable }}{source} }}\nkafka: {{ bootstrap_servers: '{}', linger: 5ms }}\n\
                 admin: {{ listen: '127.0.0.1:{port}' }}\nlog: {{ level: warn }}\nreplicas: {{ lease: 5m }}\n\
                 tables: [{{ name: outbox{table} }}]\n",
                self.url, self.bench.kafka
            ),
        )?;
        Ok(file.display().to_string())
    }
}
