//! What the benchmarks share: the services, the rows, and a program as a process.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, ClientContext, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::{BorrowedMessage, DeliveryResult},
    producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer},
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use tokio::sync::oneshot;

pub const KEYS: i64 = 1000;

/// No record for so long: the program that should send them does not.
const STALL: Duration = Duration::from_mins(2);

/// What all figures of a run are about.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub rows: usize,
    /// In bytes.
    pub payload: usize,
    pub partitions: i32,
    /// The column `payload` is text, not bytea.
    pub text: bool,
}

pub struct Bench {
    pub url: String,
    pub kafka: String,
    pub db: PgPool,
    pub folder: tempfile::TempDir,
    pub shape: Shape,
    server: String,
    admin: AdminClient<DefaultClientContext>,
}

impl Bench {
    pub async fn new(shape: Shape) -> anyhow::Result<Bench> {
        let (server, kafka) = (std::env::var("WHIPPET_TEST_PG")?, std::env::var("WHIPPET_TEST_KAFKA")?);
        let setup = PgPool::connect(&server).await?;
        sqlx::raw_sql("DROP DATABASE IF EXISTS whippet_bench WITH (FORCE)").execute(&setup).await?;
        sqlx::raw_sql("CREATE DATABASE whippet_bench").execute(&setup).await?;
        let url = format!("{}/whippet_bench", server.rsplit_once('/').map_or("", |(host, _)| host));
        let db = PgPool::connect(&url).await?;
        let admin = ClientConfig::new().set("bootstrap.servers", &kafka).create()?;
        Ok(Bench { url, kafka, db, folder: tempfile::tempdir()?, shape, server, admin })
    }

    pub async fn end(self) -> anyhow::Result<()> {
        self.db.close().await;
        let server = PgPool::connect(&self.server).await?;
        sqlx::raw_sql("DROP DATABASE whippet_bench WITH (FORCE)").execute(&server).await?;
        Ok(())
    }

    /// A new, empty topic.
    pub async fn topic(&self, name: String) -> anyhow::Result<String> {
        let new = NewTopic::new(&name, self.shape.partitions, TopicReplication::Fixed(1));
        self.delete_topic(&name).await?;
        let deadline = Instant::now() + Duration::from_secs(30);
        // Deleting ends in the background; until then the name is taken.
        while let Err((_, code)) = &self.admin.create_topics([&new], &AdminOptions::new()).await?[0] {
            anyhow::ensure!(Instant::now() < deadline, "cannot create topic {name}: {code}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(name)
    }

    pub async fn delete_topic(&self, name: &str) -> anyhow::Result<()> {
        self.admin.delete_topics(&[name], &AdminOptions::new()).await?;
        Ok(())
    }

    pub fn consumer(&self, topic: &str) -> anyhow::Result<BaseConsumer> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.kafka)
            .set("group.id", "none")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "5")
            .create()?;
        let mut list = TopicPartitionList::new();
        for partition in 0..self.shape.partitions {
            list.add_partition_offset(topic, partition, Offset::Beginning)?;
        }
        consumer.assign(&list)?;
        Ok(consumer)
    }

    /// A fresh outbox, as `whippet sql` with these arguments makes it.
    pub async fn outbox(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let script = Command::new(env!("CARGO_BIN_EXE_whippet")).arg("sql").args(arguments).output()?;
        let drop = "DROP TABLE IF EXISTS outbox; DROP SCHEMA IF EXISTS whippet CASCADE;";
        sqlx::raw_sql(drop).execute(&self.db).await?;
        sqlx::raw_sql(AssertSqlSafe(String::from_utf8(script.stdout)?)).execute(&self.db).await?;
        if self.shape.text {
            sqlx::raw_sql("ALTER TABLE outbox ALTER payload TYPE text USING NULL").execute(&self.db).await?;
        }
        Ok(())
    }

    /// The rows that every figure is about, so many in a transaction.
    pub async fn fill(&self, topic: &str, keys: i64, transaction: usize) -> anyhow::Result<()> {
        let Shape { rows, payload, text, .. } = self.shape;
        let padding: Vec<String> =
            (1..=payload.div_ceil(64)).map(|n| format!("md5((n + {n})::text)")).collect();
        let json = format!(
            "rpad('{{\"n\":' || n || ',\"pad\":\"' || md5(n::text), {payload}, {})",
            padding.join(" || ")
        );
        let value = if text { json } else { format!("convert_to({json}, 'UTF8')") };
        let insert = format!(
            "DO $$ BEGIN FOR low IN 0 .. {last} BY {transaction} LOOP
                 INSERT INTO outbox (topic, key, type, payload)
                 SELECT '{topic}', 'key-' || n % {keys}, 'Benched', {value}
                 FROM generate_series(low, least(low + {transaction} - 1, {last})) n;
                 COMMIT;
             END LOOP; END $$",
            last = rows - 1,
        );
        let mut db = PgConnection::connect(&self.url).await?;
        // What is checkpointed below need not be waited for at each COMMIT.
        sqlx::raw_sql("SET synchronous_commit = off").execute(&mut db).await?;
        sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut db).await?;
        db.close().await?;
        sqlx::raw_sql("VACUUM ANALYZE outbox").execute(&self.db).await?;
        sqlx::raw_sql("CHECKPOINT").execute(&self.db).await?;
        Ok(())
    }

    /// The rows of the outbox from memory, through the same client settings: records a second.
    pub async fn raw(&self, topic: &str) -> anyhow::Result<f64> {
        let value = if self.shape.text { "convert_to(payload, 'UTF8')" } else { "payload" };
        let rows: Vec<(String, Vec<u8>)> =
            sqlx::query_as(AssertSqlSafe(format!("SELECT key, {value} FROM outbox ORDER BY seq")))
                .fetch_all(&self.db)
                .await?;
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
            producer.send(BaseRecord::to(topic).key(key).payload(payload)).map_err(|(error, _)| error)?;
        }
        producer.flush(Duration::from_mins(1))?;
        Ok(rows.len() as f64 / begin.elapsed().as_secs_f64())
    }
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

/// Work that blocks, on a thread of its own: one that still runs when the program ends is not waited for.
pub fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> impl Future<Output = anyhow::Result<T>> {
    let (sender, receiver) = oneshot::channel();
    std::thread::spawn(move || sender.send(work()).ok());
    async move { receiver.await? }
}

/// Records a second, from the first one seen to the last.
pub fn count(consumer: &BaseConsumer, rows: usize, on_first: impl FnOnce(Instant)) -> anyhow::Result<f64> {
    let first = next(consumer, 0, rows)?.1;
    on_first(first);
    for seen in 1..rows {
        next(consumer, seen, rows)?;
    }
    Ok(rows as f64 / first.elapsed().as_secs_f64())
}

/// When each of the records came whose keys are the numbers below `total`.
pub fn arrivals(consumer: &BaseConsumer, total: usize) -> anyhow::Result<Vec<Option<Instant>>> {
    let mut seen = vec![None; total];
    let mut left = total;
    while left > 0 {
        let (message, at) = next(consumer, total - left, total)?;
        let number = message.key().and_then(|key| std::str::from_utf8(key).ok()?.parse::<usize>().ok());
        if let Some(slot) = number.and_then(|n| seen.get_mut(n)) {
            left -= usize::from(slot.replace(at).is_none());
        }
    }
    Ok(seen)
}

fn next(
    consumer: &BaseConsumer,
    seen: usize,
    total: usize,
) -> anyhow::Result<(BorrowedMessage<'_>, Instant)> {
    let deadline = Instant::now() + STALL;
    loop {
        if let Some(Ok(message)) = consumer.poll(Duration::from_secs(1)) {
            return Ok((message, Instant::now()));
        }
        anyhow::ensure!(Instant::now() < deadline, "no record for {STALL:?}: {seen} of {total} came");
    }
}

pub fn payload(n: usize, bytes: usize) -> String {
    format!("{{\"n\":{n:0>width$}}}", width = bytes - 6)
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// p50 and p99.
pub fn percentiles(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() as f64 * share) as usize).min(values.len() - 1)];
    (at(0.5), at(0.99))
}

/// A process that ends with its owner.
pub struct Program(pub Child);

impl Program {
    pub fn relay(config: &str) -> anyhow::Result<Program> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_whippet"));
        Ok(Program(command.args(["run", "--config", config]).stdout(Stdio::null()).spawn()?))
    }

    /// User and system time of the process (proc(5), /proc/pid/stat), its start included.
    pub fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        // utime and stime are fields 14 and 15; the first of `fields` is the third. 100 ticks a second.
        Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
    }

    pub fn peak_mib(&self) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
        Ok(line.split_whitespace().nth(1).unwrap_or("0").parse::<f64>()? / 1024.0)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
