//! The relay against its bounds, on real PostgreSQL and real Kafka: `scripts/bench`.
//!
//! In each round, on the same 300,000 rows of 256 bytes: the raw rdkafka loop, the relay's drain in
//! delete mode and in mark mode, its drain when all rows have one key, and the latency from commit to
//! consumer at a steady rate. What is printed was measured in this run.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, ClientContext, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::DeliveryResult,
    producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer},
};
use sqlx::{AssertSqlSafe, PgPool};

const ROWS: usize = 300_000;
const PAYLOAD: usize = 256;
const KEYS: i64 = 1000;
const PARTITIONS: i32 = 6;
const STEADY: u64 = 500;
const STEADY_SECONDS: u64 = 20;

#[derive(Clone, Copy, Debug, Default)]
struct Drain {
    rate: f64,
    cpu_seconds_per_million: f64,
    peak_mib: f64,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let rounds: usize = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(5);
    let bench = Bench::new().await?;
    let (mut raw, mut delete, mut mark, mut hot, mut latency) = (vec![], vec![], vec![], vec![], vec![]);
    for round in 1..=rounds {
        let rate = bench.raw(round).await?;
        println!("round {round}: raw rdkafka loop      {rate:>9.0} records/s");
        raw.push(rate);
        for (name, mode, keys, drains) in [
            ("delete", "delete", KEYS, &mut delete),
            ("mark", "mark", KEYS, &mut mark),
            ("one key", "delete", 1, &mut hot),
        ] {
            let drain = bench.drain(round, name, mode, keys).await?;
            println!(
                "round {round}: relay, {name:<7}        {:>9.0} events/s, {:.1} CPU-s per million, peak {:.0} MiB, {:.0}% of raw",
                drain.rate,
                drain.cpu_seconds_per_million,
                drain.peak_mib,
                100.0 * drain.rate / rate
            );
            drains.push(drain);
        }
        let (p50, p99) = bench.latency(round).await?;
        println!("round {round}: commit to consumer at {STEADY}/s: p50 {p50:.1} ms, p99 {p99:.1} ms");
        latency.push((p50, p99));
    }
    let raw = median(raw);
    println!("\nmedians of {rounds} interleaved rounds, {ROWS} rows of {PAYLOAD} bytes:");
    println!("  raw rdkafka loop   {raw:>9.0} records/s");
    for (name, drains) in [("delete", delete), ("mark", mark), ("one key", hot)] {
        let rate = median(drains.iter().map(|drain| drain.rate).collect());
        println!(
            "  relay, {name:<7}     {rate:>9.0} events/s   {:.0}% of raw   {:.1} CPU-s per million   peak {:.0} MiB",
            100.0 * rate / raw,
            median(drains.iter().map(|drain| drain.cpu_seconds_per_million).collect()),
            median(drains.iter().map(|drain| drain.peak_mib).collect()),
        );
    }
    println!(
        "  commit to consumer at {STEADY}/s: p50 {:.1} ms, p99 {:.1} ms",
        median(latency.iter().map(|pair| pair.0).collect()),
        median(latency.iter().map(|pair| pair.1).collect())
    );
    bench.db.close().await;
    let server = PgPool::connect(&bench.server).await?;
    sqlx::raw_sql("DROP DATABASE whippet_bench WITH (FORCE)").execute(&server).await?;
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

struct Bench {
    server: String,
    url: String,
    kafka: String,
    db: PgPool,
    admin: AdminClient<DefaultClientContext>,
    folder: tempfile::TempDir,
}

impl Bench {
    async fn new() -> anyhow::Result<Bench> {
        let (server, kafka) = (std::env::var("WHIPPET_TEST_PG")?, std::env::var("WHIPPET_TEST_KAFKA")?);
        let setup = PgPool::connect(&server).await?;
        sqlx::raw_sql("DROP DATABASE IF EXISTS whippet_bench WITH (FORCE)").execute(&setup).await?;
        sqlx::raw_sql("CREATE DATABASE whippet_bench").execute(&setup).await?;
        let url = format!("{}/whippet_bench", server.rsplit_once('/').map_or("", |(host, _)| host));
        let db = PgPool::connect(&url).await?;
        let admin = ClientConfig::new().set("bootstrap.servers", &kafka).create()?;
        Ok(Bench { server, url, kafka, db, admin, folder: tempfile::tempdir()? })
    }

    async fn topic(&self, name: String) -> anyhow::Result<String> {
        let new = NewTopic::new(&name, PARTITIONS, TopicReplication::Fixed(1));
        self.admin.delete_topics(&[&name], &AdminOptions::new()).await?;
        let deadline = Instant::now() + Duration::from_secs(30);
        // Deleting ends in the background; until then the name is taken.
        while let Err((_, code)) = &self.admin.create_topics([&new], &AdminOptions::new()).await?[0] {
            anyhow::ensure!(Instant::now() < deadline, "cannot create topic {name}: {code}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(name)
    }

    fn consumer(&self, topic: &str) -> anyhow::Result<BaseConsumer> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.kafka)
            .set("group.id", "none")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "5")
            .create()?;
        let mut list = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            list.add_partition_offset(topic, partition, Offset::Beginning)?;
        }
        consumer.assign(&list)?;
        Ok(consumer)
    }

    /// The same rows from memory, through the same client settings.
    async fn raw(&self, round: usize) -> anyhow::Result<f64> {
        let topic = self.topic(format!("bench.raw.{round}")).await?;
        self.install("delete").await?;
        self.fill(&topic, KEYS).await?;
        let rows: Vec<(String, Vec<u8>)> =
            sqlx::query_as("SELECT key, payload FROM outbox ORDER BY seq").fetch_all(&self.db).await?;
        let producer: ThreadedProducer<Quiet> = ClientConfig::new()
            .set("bootstrap.servers", &self.kafka)
            .set("enable.idempotence", "true")
            .set("partitioner", "murmur2_random")
            .set("compression.type", "lz4")
            .set("linger.ms", "1")
            .set("batch.size", "1000000")
            .set("queue.buffering.max.messages", "1000000")
            .create_with_context(Quiet)?;
        let begin = Instant::now();
        for (key, payload) in &rows {
            producer.send(BaseRecord::to(&topic).key(key).payload(payload)).map_err(|(error, _)| error)?;
        }
        producer.flush(Duration::from_mins(1))?;
        Ok(ROWS as f64 / begin.elapsed().as_secs_f64())
    }

    /// The rows that every figure is about.
    async fn fill(&self, topic: &str, keys: i64) -> anyhow::Result<()> {
        sqlx::query(
            "INSERT INTO outbox (topic, key, type, payload)
             SELECT $1, 'key-' || n % $4, 'Benched', convert_to(rpad('{\"n\":' || n || ',\"pad\":\"' || md5(n::text), $3,
                 md5((n + 1)::text) || md5((n + 2)::text) || md5((n + 3)::text) || md5((n + 4)::text)), 'UTF8')
             FROM generate_series(0, $2 - 1) n",
        )
        .bind(topic)
        .bind(ROWS as i64)
        .bind(PAYLOAD as i32)
        .bind(keys)
        .execute(&self.db)
        .await?;
        sqlx::raw_sql("VACUUM ANALYZE outbox").execute(&self.db).await?;
        sqlx::raw_sql("CHECKPOINT").execute(&self.db).await?;
        Ok(())
    }

    async fn drain(&self, round: usize, name: &str, mode: &str, keys: i64) -> anyhow::Result<Drain> {
        let topic = self.topic(format!("bench.{}.{round}", name.replace(' ', "-"))).await?;
        let config = self.install(mode).await?;
        self.fill(&topic, keys).await?;

        let consumer = self.consumer(&topic)?;
        let counted = std::thread::spawn(move || count(&consumer));
        let relay = Relay::start(&config)?;
        let rate = counted.join().map_err(|_| anyhow::anyhow!("the consumer panicked"))?;
        let left = match mode {
            "mark" => "SELECT count(*) FROM outbox WHERE published_at IS NULL",
            _ => "SELECT count(*) FROM outbox",
        };
        while sqlx::query_scalar::<_, i64>(left).fetch_one(&self.db).await? > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(Drain {
            rate,
            cpu_seconds_per_million: relay.cpu_seconds()? * 1e6 / ROWS as f64,
            peak_mib: relay.peak_mib()?,
        })
    }

    /// p50 and p99 in milliseconds from the return of COMMIT to the consumer.
    async fn latency(&self, round: usize) -> anyhow::Result<(f64, f64)> {
        let topic = self.topic(format!("bench.latency.{round}")).await?;
        let config = self.install("delete").await?;
        let _relay = Relay::start(&config)?;
        let consumer = self.consumer(&topic)?;
        let total = (STEADY * (STEADY_SECONDS + 3)) as usize;
        let seen = std::thread::spawn(move || {
            let mut seen = vec![None; total];
            let mut left = total;
            while left > 0 {
                if let Some(Ok(message)) = consumer.poll(Duration::from_secs(1)) {
                    let at = Instant::now();
                    let number =
                        message.key().and_then(|key| std::str::from_utf8(key).ok()?.parse::<usize>().ok());
                    if let Some(slot) = number.and_then(|n| seen.get_mut(n)) {
                        left -= usize::from(slot.replace(at).is_none());
                    }
                }
            }
            seen
        });
        let mut tick = tokio::time::interval(Duration::from_micros(1_000_000 / STEADY));
        let mut committed = Vec::with_capacity(total);
        for n in 0..total {
            tick.tick().await;
            sqlx::query("INSERT INTO outbox (topic, key, payload) VALUES ($1, $2, $3)")
                .bind(&topic)
                .bind(n.to_string())
                .bind(payload(n).into_bytes())
                .execute(&self.db)
                .await?;
            committed.push(Instant::now());
        }
        let seen = seen.join().map_err(|_| anyhow::anyhow!("the consumer panicked"))?;
        // The first three seconds are the start: connections, the producer's id.
        let mut delays: Vec<f64> = committed
            .iter()
            .zip(&seen)
            .skip((STEADY * 3) as usize)
            .filter_map(|(committed, seen)| {
                Some(seen.as_ref()?.saturating_duration_since(*committed).as_secs_f64() * 1e3)
            })
            .collect();
        delays.sort_by(f64::total_cmp);
        let at = |share: f64| delays[((delays.len() as f64 * share) as usize).min(delays.len() - 1)];
        Ok((at(0.5), at(0.99)))
    }

    /// A fresh outbox, and the configuration: one for all figures but for `after_publish`.
    async fn install(&self, mode: &str) -> anyhow::Result<String> {
        let file = self.folder.path().join("bench.yaml");
        std::fs::write(
            &file,
            format!(
                "source: {{ url: '{}' }}\nkafka: {{ bootstrap_servers: '{}' }}\nadmin: {{ listen: null }}\n\
                 log: {{ level: warn }}\ntables: [{{ name: outbox, after_publish: {mode} }}]\n",
                self.url, self.kafka
            ),
        )?;
        let file = file.display().to_string();
        let script = Command::new(env!("CARGO_BIN_EXE_whippet")).args(["sql", "--config", &file]).output()?;
        let drop = "DROP TABLE IF EXISTS outbox; DROP SCHEMA IF EXISTS whippet CASCADE;";
        sqlx::raw_sql(drop).execute(&self.db).await?;
        sqlx::raw_sql(AssertSqlSafe(String::from_utf8(script.stdout)?)).execute(&self.db).await?;
        Ok(file)
    }
}

fn payload(n: usize) -> String {
    format!("{{\"n\":{n:0>width$}}}", width = PAYLOAD - 6)
}

/// Records a second, from the first one seen to the last.
fn count(consumer: &BaseConsumer) -> f64 {
    let mut first = None;
    let mut count = 0;
    while count < ROWS {
        if let Some(Ok(_)) = consumer.poll(Duration::from_secs(1)) {
            first.get_or_insert_with(Instant::now);
            count += 1;
        }
    }
    ROWS as f64 / first.map_or(f64::INFINITY, |first| first.elapsed().as_secs_f64())
}

struct Quiet;

impl ClientContext for Quiet {}

impl ProducerContext for Quiet {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            eprintln!("the raw loop lost a record: {error}");
            std::process::exit(1);
        }
    }
}

struct Relay(Child);

impl Relay {
    fn start(config: &str) -> anyhow::Result<Relay> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_whippet"));
        Ok(Relay(command.args(["run", "--config", config]).stdout(Stdio::null()).spawn()?))
    }

    /// User and system time of the process (proc(5), /proc/pid/stat), its start included.
    fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        // utime and stime are fields 14 and 15; the first of `fields` is the third. 100 ticks a second.
        Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
    }

    fn peak_mib(&self) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
        Ok(line.split_whitespace().nth(1).unwrap_or("0").parse::<f64>()? / 1024.0)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
