//! The relay by streaming against its bounds and Debezium, on real PostgreSQL and real Kafka:
//! `scripts/bench stream`.
//!
//! In each round, on the same rows, in an order that rotates: the raw rdkafka loop, `pg_recvlogical`
//! writing the same kind of WAL range to nothing, the drain of the relay and of Debezium. Then the
//! latency at a steady rate, from before INSERT to the consumer: the relay by streaming and by polling,
//! and Debezium. What is printed was measured in this run.
//!
//! The payload is text for all: Debezium's router cannot pass bytes through a converter of strings.

mod common;
#[path = "common/debezium.rs"]
mod debezium;
#[path = "common/rows.rs"]
mod rows;

use std::{
    net::TcpListener,
    process::Command,
    time::{Duration, Instant},
};

use common::{Bench, Program, Shape, median, on_thread};
use debezium::Debezium;
use rdkafka::consumer::Consumer as _;
use rows::{KEYS, arrivals, count, payload, percentiles};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool, postgres::PgConnectOptions};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

const STEADY: usize = 1000;
const STEADY_SECONDS: usize = 20;
const WARM_UP_SECONDS: usize = 3;
/// More than one, so that a commit that takes long does not delay the next.
const WRITERS: usize = 8;
/// How long a program may take to be ready, or to end.
const PATIENCE: Duration = Duration::from_mins(1);
/// The name of the slot and of the publication.
const SLOT: &str = "bench";
const WARM: &str = "bench.warm";

const INSERT: &str = "INSERT INTO outbox (topic, key, type, payload) VALUES ($1, $2, 'Benched', $3)";
const CLEAN: &str = "
    SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'bench' AND active;
    SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = 'bench'";

struct Options {
    rounds: usize,
    rows: usize,
    payload: usize,
    /// How many rows of the backlog are written by one transaction.
    transaction: usize,
    /// The relay polls in both places: to try the benchmark itself.
    poll_only: bool,
}

impl Options {
    fn read() -> anyhow::Result<Options> {
        let mut options =
            Options { rounds: 5, rows: 300_000, payload: 256, transaction: 1000, poll_only: false };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut number = || words.next().unwrap_or_default().parse();
            match word.as_str() {
                "--rows" => options.rows = number()?,
                "--payload" => options.payload = number()?,
                "--transaction" => options.transaction = number()?,
                "--poll-only" => options.poll_only = true,
                "--bench" => {} // by cargo
                rounds => match rounds.parse() {
                    Ok(rounds) => options.rounds = rounds,
                    Err(_) => anyhow::bail!("{rounds}: neither an option nor a number of rounds"),
                },
            }
        }
        anyhow::ensure!(options.payload >= 64, "--payload: at least 64");
        anyhow::ensure!(options.rows > 0 && options.transaction > 0 && options.rounds > 0, "nothing to do");
        Ok(options)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Peer {
    Raw,
    Recvlogical,
    Stream,
    Poll,
    Debezium,
}

impl Peer {
    const fn name(self) -> &'static str {
        match self {
            Peer::Raw => "raw rdkafka loop",
            Peer::Recvlogical => "pg_recvlogical",
            Peer::Stream => "relay, stream",
            Peer::Poll => "relay, poll",
            Peer::Debezium => "Debezium",
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Drain {
    rate: f64,
    /// Also microseconds an event.
    cpu_seconds_per_million: f64,
    /// What of it had been used when the first record came.
    start_cpu_seconds_per_million: f64,
    peak_mib: f64,
    first_record_seconds: f64,
    /// Records beyond one for each row.
    surplus: i64,
}

impl Drain {
    fn line(&self) -> String {
        let mut line = format!("{:>9.0} /s", self.rate);
        if self.cpu_seconds_per_million > 0.0 {
            line += &format!("   {:>5.1} CPU-s per million", self.cpu_seconds_per_million);
        }
        if self.peak_mib > 0.0 {
            line += &format!(
                " ({:.1} before the first record)   peak {:.0} MiB   first record after {:.2} s",
                self.start_cpu_seconds_per_million, self.peak_mib, self.first_record_seconds
            );
        }
        if self.surplus != 0 {
            line += &format!("   {} MORE RECORDS THAN ROWS", self.surplus);
        }
        line
    }

    fn median(all: &[Drain]) -> Drain {
        let of = |field: fn(&Drain) -> f64| median(all.iter().map(field).collect());
        Drain {
            rate: of(|drain| drain.rate),
            cpu_seconds_per_million: of(|drain| drain.cpu_seconds_per_million),
            start_cpu_seconds_per_million: of(|drain| drain.start_cpu_seconds_per_million),
            peak_mib: of(|drain| drain.peak_mib),
            first_record_seconds: of(|drain| drain.first_record_seconds),
            surplus: all.iter().map(|drain| drain.surplus).sum(),
        }
    }
}

/// In milliseconds, from the moment at which the INSERT was due.
#[derive(Clone, Copy, Debug, Default)]
struct Latency {
    p50: f64,
    p99: f64,
    /// p99 of how late the INSERT began: the schedule was kept if this is small.
    late: f64,
}

impl Latency {
    fn line(&self) -> String {
        format!(
            "p50 {:>6.1} ms   p99 {:>6.1} ms   (INSERT begun late, p99 {:.1} ms)",
            self.p50, self.p99, self.late
        )
    }

    fn median(all: &[Latency]) -> Latency {
        let of = |field: fn(&Latency) -> f64| median(all.iter().map(field).collect());
        Latency { p50: of(|one| one.p50), p99: of(|one| one.p99), late: of(|one| one.late) }
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let options = Options::read()?;
    let mut terminated = signal(SignalKind::terminate())?;
    // The work is dropped then, and each program with it.
    tokio::select! {
        done = run(&options) => done,
        _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
        _ = terminated.recv() => anyhow::bail!("terminated"),
    }
}

async fn run(options: &Options) -> anyhow::Result<()> {
    let (rounds, relay) = (options.rounds, if options.poll_only { Peer::Poll } else { Peer::Stream });
    let suite = Suite::new(options).await?;
    let drained = [Peer::Raw, Peer::Recvlogical, relay, Peer::Debezium];
    let timed = [Peer::Debezium, Peer::Poll, Peer::Stream];
    let timed = if options.poll_only { &timed[..2] } else { &timed[..] };
    let mut drains = drained.map(|_| Vec::new());
    let mut latencies = vec![Vec::new(); timed.len()];
    for round in 1..=rounds {
        for turn in 0..drained.len() {
            let ix = (turn + round - 1) % drained.len();
            let drain = suite.drain(drained[ix]).await?;
            println!("round {round}: {:<18}{}", drained[ix].name(), drain.line());
            drains[ix].push(drain);
        }
        for turn in 0..timed.len() {
            let ix = (turn + round - 1) % timed.len();
            let latency = suite.latency(timed[ix]).await?;
            println!("round {round}: {:<18}at {STEADY}/s: {}", timed[ix].name(), latency.line());
            latencies[ix].push(latency);
        }
    }
    println!(
        "\nmedians of {rounds} interleaved rounds, {} rows of {} bytes, {} in a transaction; CPU of the whole \
         process, its start included:",
        options.rows, options.payload, options.transaction
    );
    let drains = drains.map(|drains| Drain::median(&drains));
    for (peer, drain) in drained.iter().zip(&drains) {
        println!("  {:<18}{}", peer.name(), drain.line());
    }
    for (peer, latencies) in timed.iter().zip(&latencies) {
        println!("  {:<18}at {STEADY}/s: {}", peer.name(), Latency::median(latencies).line());
    }
    let [raw, recvlogical, relay, debezium] = drains;
    println!("  rate: relay / Debezium             {:.2}", relay.rate / debezium.rate);
    println!("  rate: relay / pg_recvlogical       {:.2}", relay.rate / recvlogical.rate);
    println!("  rate: relay / raw rdkafka loop     {:.2}", relay.rate / raw.rate);
    println!(
        "  CPU an event: Debezium / relay     {:.1}",
        debezium.cpu_seconds_per_million / relay.cpu_seconds_per_million
    );
    println!(
        "  the same from the first record on  {:.1}",
        (debezium.cpu_seconds_per_million - debezium.start_cpu_seconds_per_million)
            / (relay.cpu_seconds_per_million - relay.start_cpu_seconds_per_million)
    );
    suite.bench.end().await
}

struct Suite {
    bench: Bench,
    recvlogical: String,
    debezium: Debezium,
    rows: usize,
    payload: usize,
    transaction: usize,
}

impl Suite {
    async fn new(options: &Options) -> anyhow::Result<Suite> {
        // A slot that an interrupted run left would keep its database.
        let server = PgPool::connect(&std::env::var("WHIPPET_TEST_PG")?).await?;
        drop_slot(&server).await?;
        let &Options { rows, payload, transaction, .. } = options;
        let bench = Bench::new(Shape { rows, payload, partitions: 12, text: true, fetch_wait: "5" }).await?;
        Ok(Suite {
            debezium: Debezium::new(&bench)?,
            bench,
            recvlogical: std::env::var("WHIPPET_BENCH_PG_RECVLOGICAL")?,
            rows,
            payload,
            transaction,
        })
    }

    async fn drain(&self, peer: Peer) -> anyhow::Result<Drain> {
        self.bench.outbox(&["--dialect", "postgres"]).await?;
        let topic = self.bench.topic("bench.drain".into()).await?;
        let drained = match peer {
            Peer::Raw => self.raw(&topic).await,
            Peer::Recvlogical => self.recvlogical(&topic).await,
            Peer::Stream | Peer::Poll | Peer::Debezium => self.backlog(peer, &topic).await,
        };
        self.clean(&topic).await?;
        drained
    }

    async fn latency(&self, peer: Peer) -> anyhow::Result<Latency> {
        self.bench.outbox(&["--dialect", "postgres"]).await?;
        let topic = self.bench.topic("bench.latency".into()).await?;
        let timed = self.steady(peer, &topic).await;
        self.clean(&topic).await?;
        timed
    }

    async fn clean(&self, topic: &str) -> anyhow::Result<()> {
        drop_slot(&self.bench.db).await?;
        sqlx::raw_sql("DROP PUBLICATION IF EXISTS bench").execute(&self.bench.db).await?;
        self.bench.delete_topic(topic).await
    }

    async fn fill(&self, topic: &str) -> anyhow::Result<()> {
        self.bench.fill(topic, KEYS, self.transaction).await
    }

    async fn raw(&self, topic: &str) -> anyhow::Result<Drain> {
        self.fill(topic).await?;
        Ok(Drain { rate: self.bench.raw(topic).await?, ..Drain::default() })
    }

    /// The bound of whoever reads the log: from its start to the end of the backlog.
    async fn recvlogical(&self, topic: &str) -> anyhow::Result<Drain> {
        let db = &self.bench.db;
        sqlx::raw_sql("CREATE PUBLICATION bench FOR TABLE outbox WITH (publish = 'insert')")
            .execute(db)
            .await?;
        sqlx::raw_sql("SELECT pg_create_logical_replication_slot('bench', 'pgoutput')").execute(db).await?;
        self.fill(topic).await?;
        let end: String = sqlx::query_scalar("SELECT pg_current_wal_lsn()::text").fetch_one(db).await?;
        let (begin, before) = (Instant::now(), ended_cpu_seconds()?);
        let mut program = Program(
            Command::new(&self.recvlogical)
                .args(["--dbname", &self.bench.url, "--slot", SLOT, "--start", "--no-loop"])
                .args(["--endpos", &end, "--file", "/dev/null"])
                .args(["--option", "proto_version=1", "--option", &format!("publication_names={SLOT}")])
                .spawn()?,
        );
        let ended = ended(&mut program, Duration::from_millis(1)).await?;
        anyhow::ensure!(ended.success(), "pg_recvlogical: {ended}");
        Ok(Drain {
            rate: self.rows as f64 / begin.elapsed().as_secs_f64(),
            cpu_seconds_per_million: (ended_cpu_seconds()? - before) * 1e6 / self.rows as f64,
            ..Drain::default()
        })
    }

    /// Started once, so that slot and publication are there; then against the backlog.
    async fn backlog(&self, peer: Peer, topic: &str) -> anyhow::Result<Drain> {
        terminate(self.start_ready(peer).await?).await?;
        self.fill(topic).await?;

        let consumer = self.bench.consumer(topic)?;
        let (sender, first) = oneshot::channel();
        let rows = self.rows;
        let counted = on_thread(move || {
            let rate = count(&consumer, rows, |at| _ = sender.send(at))?;
            Ok((rate, consumer))
        });
        let begin = Instant::now();
        let program = self.start(peer, 5)?.program;
        // If no record comes the other end is dropped, and `counted` has the reason.
        let first = first.await;
        let start_cpu = program.cpu_seconds()?;
        let (rate, consumer) = counted.await?;
        if peer != Peer::Debezium {
            let left = "SELECT EXISTS (SELECT FROM outbox)";
            let deadline = Instant::now() + PATIENCE;
            while sqlx::query_scalar(left).fetch_one(&self.bench.db).await? {
                anyhow::ensure!(Instant::now() < deadline, "rows are still in the outbox after {PATIENCE:?}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        let drain = Drain {
            rate,
            cpu_seconds_per_million: program.cpu_seconds()? * 1e6 / rows as f64,
            start_cpu_seconds_per_million: start_cpu * 1e6 / rows as f64,
            peak_mib: program.peak_mib()?,
            first_record_seconds: first?.saturating_duration_since(begin).as_secs_f64(),
            surplus: 0,
        };
        terminate(program).await?;
        let mut records = -(rows as i64);
        for partition in 0..self.bench.shape.partitions {
            records += consumer.fetch_watermarks(topic, partition, PATIENCE)?.1;
        }
        Ok(Drain { surplus: records, ..drain })
    }

    /// One row a transaction, each at its own moment whatever became of those before it.
    async fn steady(&self, peer: Peer, topic: &str) -> anyhow::Result<Latency> {
        let program = self.start_ready(peer).await?;
        let consumer = self.bench.consumer(topic)?;
        let total = STEADY * (WARM_UP_SECONDS + STEADY_SECONDS);
        let seen = on_thread(move || arrivals(&consumer, total));
        // Time to connect, and for the consumer to be there.
        let begin = Instant::now() + Duration::from_secs(1);
        let due = move |n: usize| begin + Duration::from_secs(1) * n as u32 / STEADY as u32;
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (url, topic, bytes) = (self.bench.url.clone(), topic.to_owned(), self.payload);
                // Threads, because they sleep more exactly than the runtime's timer.
                on_thread(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                    let mut late = Vec::new();
                    let mut db = runtime.block_on(PgConnection::connect(&url))?;
                    for n in (writer..total).step_by(WRITERS) {
                        std::thread::sleep(due(n).saturating_duration_since(Instant::now()));
                        late.push(due(n).elapsed().as_secs_f64() * 1e3);
                        let insert = sqlx::query(INSERT).bind(&topic).bind(n.to_string());
                        runtime.block_on(insert.bind(payload(n, bytes)).execute(&mut db))?;
                    }
                    Ok(late)
                })
            })
            .collect();
        let mut late = Vec::new();
        for writer in writers {
            late.extend(writer.await?);
        }
        let seen = seen.await?;
        terminate(program).await?;
        let delays = seen
            .iter()
            .enumerate()
            .skip(STEADY * WARM_UP_SECONDS)
            .filter_map(|(n, seen)| Some((*seen)?.saturating_duration_since(due(n)).as_secs_f64() * 1e3));
        let (p50, p99) = percentiles(delays.collect());
        Ok(Latency { p50, p99, late: percentiles(late).1 })
    }

    /// Started for the first time, and through with a first row of another topic.
    async fn start_ready(&self, peer: Peer) -> anyhow::Result<Program> {
        self.debezium.forget();
        self.bench.topic(WARM.into()).await?;
        let mut started = self.start(peer, 1)?;
        let deadline = Instant::now() + PATIENCE;
        while !self.ready(peer, &started).await? {
            let ended = started.program.0.try_wait()?;
            anyhow::ensure!(ended.is_none(), "{} ended: {ended:?}{}", peer.name(), self.log(peer));
            let late = Instant::now() > deadline;
            anyhow::ensure!(!late, "{} is not ready after {PATIENCE:?}{}", peer.name(), self.log(peer));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        sqlx::query(INSERT).bind(WARM).bind("warm").bind("{}").execute(&self.bench.db).await?;
        let consumer = self.bench.consumer(WARM)?;
        on_thread(move || count(&consumer, 1, |_| ())).await?;
        Ok(started.program)
    }

    async fn ready(&self, peer: Peer, started: &Started) -> anyhow::Result<bool> {
        let capture = match peer {
            Peer::Stream => "stream",
            Peer::Poll => "poll",
            _ => {
                let active =
                    "SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = 'bench' AND active";
                return Ok(sqlx::query_scalar(active).fetch_one(&self.bench.db).await?);
            }
        };
        let Ok(mut answer) = ureq::get(format!("http://127.0.0.1:{}/status", started.port)).call() else {
            return Ok(false);
        };
        let status: Value = serde_json::from_str(&answer.body_mut().read_to_string()?)?;
        let table = &status["tables"][0];
        Ok(table["state"] == "running" && table["capture"] == capture)
    }

    fn start(&self, peer: Peer, poll_interval_ms: u64) -> anyhow::Result<Started> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let program = match peer {
            Peer::Debezium => self.debezium(port, poll_interval_ms)?,
            _ => self.relay(port, peer == Peer::Stream)?,
        };
        Ok(Started { program, port })
    }

    /// One configuration for drain and latency.
    fn relay(&self, port: u16, stream: bool) -> anyhow::Result<Program> {
        let file = self.bench.folder.path().join("bench.yaml");
        let (source, table) = match stream {
            true => (", stream: { slot: bench, publication: bench }", ", capture: stream"),
            false => ("", ""),
        };
        std::fs::write(
            &file,
            format!(
                "source: {{ url: '{}'{source} }}\nkafka: {{ bootstrap_servers: '{}' }}\n\
                 admin: {{ listen: '127.0.0.1:{port}' }}\nlog: {{ level: warn }}\n\
                 tables: [{{ name: outbox, after_publish: delete{table} }}]\n",
                self.bench.url, self.bench.kafka
            ),
        )?;
        Program::relay(&file.display().to_string())
    }

    fn debezium(&self, port: u16, poll_interval_ms: u64) -> anyhow::Result<Program> {
        let to: PgConnectOptions = self.bench.url.parse()?;
        let connector = format!(
            "connector.class=io.debezium.connector.postgresql.PostgresConnector
database.hostname={}
database.port={}
database.user={}
database.password=
database.dbname={}
plugin.name=pgoutput
slot.name={SLOT}
publication.name={SLOT}
publication.autocreate.mode=filtered
table.include.list=public.outbox",
            to.get_host(),
            to.get_port(),
            to.get_username(),
            to.get_database().unwrap_or_default(),
        );
        self.debezium.start(port, poll_interval_ms, &connector)
    }

    /// The end of what it logged; the relay's warnings are on the screen.
    fn log(&self, peer: Peer) -> String {
        if peer == Peer::Debezium { self.debezium.log() } else { String::new() }
    }
}

struct Started {
    program: Program,
    /// Of its address for HTTP.
    port: u16,
}

async fn drop_slot(db: &PgPool) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    // The server needs a moment to see that whoever read it has gone.
    while let Err(error) = sqlx::raw_sql(AssertSqlSafe(CLEAN)).execute(db).await {
        anyhow::ensure!(Instant::now() < deadline, "cannot drop the slot: {error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

async fn ended(program: &mut Program, every: Duration) -> anyhow::Result<std::process::ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = program.0.try_wait()? {
            return Ok(status);
        }
        anyhow::ensure!(Instant::now() < deadline, "process {} runs after {PATIENCE:?}", program.0.id());
        tokio::time::sleep(every).await;
    }
}

/// SIGTERM, and waits.
async fn terminate(mut program: Program) -> anyhow::Result<()> {
    program.signal("TERM")?;
    ended(&mut program, Duration::from_millis(20)).await?;
    Ok(())
}

/// User and system time of all children of this process that have ended (proc(5), fields 16 and 17).
fn ended_cpu_seconds() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    Ok((fields[13].parse::<f64>()? + fields[14].parse::<f64>()?) / 100.0)
}
