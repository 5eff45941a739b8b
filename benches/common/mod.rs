//! What the benchmarks share: the services, the rows, and a program as a process.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, ClientContext, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::{BorrowedMessage, DeliveryResult},
    producer::{ProducerContext, ThreadedProducer},
};
use sqlx::{AssertSqlSafe, PgPool};
use tokio::sync::oneshot;

/// No record for so long: the program that should send them does not.
const STALL: Duration = Duration::from_mins(2);

/// Room for a producer that is to wait for none.
pub const QUEUE_KIB: usize = 2_097_151;

/// What all figures of a run are about.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub rows: usize,
    /// In bytes.
    pub payload: usize,
    pub partitions: i32,
    /// The column `payload` is text, not bytea.
    pub text: bool,
    /// How long the broker waits for records before it answers a consumer, in milliseconds.
    pub fetch_wait: &'static str,
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
            .set("fetch.wait.max.ms", self.shape.fetch_wait)
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

    /// A producer with the relay's own settings, where they have to do with speed, and so much room.
    pub fn producer(&self, queue_kib: usize) -> anyhow::Result<ThreadedProducer<Quiet>> {
        let producer = ClientConfig::new()
            .set("bootstrap.servers", &self.kafka)
            .set("enable.idempotence", "true")
            .set("partitioner", "murmur2_random")
            .set("compression.type", "lz4")
            .set("linger.ms", "1")
            .set("batch.size", "1000000")
            .set("message.max.bytes", "1000000000")
            .set("queue.buffering.max.messages", "1000000")
            .set("queue.buffering.max.kbytes", queue_kib.to_string())
            .create_with_context(Quiet)?;
        Ok(producer)
    }
}

pub struct Quiet;

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

/// The next record, and when it came.
pub fn next(
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

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// A process that ends with its owner.
pub struct Program(pub Child);

impl Program {
    pub fn relay(config: &str) -> anyhow::Result<Program> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_whippet"));
        Ok(Program(command.args(["run", "--config", config]).stdout(Stdio::null()).spawn()?))
    }

    /// User and system time of the process, its start included.
    pub fn cpu_seconds(&self) -> anyhow::Result<f64> {
        Process(self.0.id()).cpu_seconds()
    }

    pub fn peak_mib(&self) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
        Ok(line.split_whitespace().nth(1).unwrap_or("0").parse::<f64>()? / 1024.0)
    }
}

/// One that runs, by its number.
pub struct Process(pub u32);

impl Process {
    /// User and system time (proc(5), /proc/pid/stat).
    pub fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        // utime and stime are fields 14 and 15; the first of `fields` is the third. 100 ticks a second.
        Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
