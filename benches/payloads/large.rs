//! Rows with large payloads, and the relay that publishes them.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use rdkafka::{
    Message as _,
    consumer::BaseConsumer,
    message::{BorrowedMessage, Headers as _},
};
use whippet::record::wire;

use crate::common::{Bench, Program, on_thread};

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    pub mib_per_second: f64,
    pub cpu_seconds: f64,
}

/// What the relay did.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    pub figure: Figure,
    pub peak_mib: f64,
    /// The largest value of a record.
    pub value_bytes: usize,
}

impl Figure {
    pub fn new(payloads: &[Bytes], took: Duration, cpu_seconds: f64) -> Figure {
        let bytes: usize = payloads.iter().map(Bytes::len).sum();
        let mib = bytes as f64 / f64::from(1 << 20);
        Figure { mib_per_second: mib / took.as_secs_f64(), cpu_seconds }
    }
}

/// Slices of the same random bytes, none like another.
pub fn payloads(count: usize, size: usize) -> Vec<Bytes> {
    let mut random = vec![0; size + count];
    fastrand::fill(&mut random);
    let random = Bytes::from(random);
    (0..count).map(|n| random.slice(n..n + size)).collect()
}

pub fn key(n: usize) -> String {
    format!("key-{n}")
}

/// A small row, whose record tells that the relay is at work, and then these.
pub async fn fill(bench: &Bench, topic: &str, payloads: &[Bytes]) -> anyhow::Result<()> {
    let mut transaction = bench.db.begin().await?;
    let insert = "INSERT INTO outbox (topic, key, type, payload) VALUES ($1, $2, 'Benched', $3)";
    let small = (String::from("small"), &b"small"[..]);
    let large = payloads.iter().enumerate().map(|(n, payload)| (key(n), &payload[..]));
    for (key, payload) in std::iter::once(small).chain(large) {
        sqlx::query(insert).bind(topic).bind(key).bind(payload).execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    sqlx::raw_sql("VACUUM ANALYZE outbox").execute(&bench.db).await?;
    sqlx::raw_sql("CHECKPOINT").execute(&bench.db).await?;
    Ok(())
}

/// The relay at its work, from its first record to its last.
pub async fn drain(bench: &Bench, topic: &str, config: &str, payloads: &[Bytes]) -> anyhow::Result<Drain> {
    let (consumer, rows) = (bench.consumer(topic)?, payloads.len());
    let followed = on_thread(move || follow(&consumer, rows));
    let relay = Program::relay(config)?;
    let (took, value_bytes) = followed.await?;
    while sqlx::query_scalar::<_, i64>("SELECT count(*) FROM outbox").fetch_one(&bench.db).await? > 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let figure = Figure::new(payloads, took, relay.cpu_seconds()?);
    Ok(Drain { figure, peak_mib: relay.peak_mib()?, value_bytes })
}

/// From the small record to the last one of all rows, and the size of the largest value.
pub fn follow(consumer: &BaseConsumer, rows: usize) -> anyhow::Result<(Duration, usize)> {
    let (mut begin, mut seen, mut expected, mut value_bytes) = (None, 0, 1 + rows, 0);
    while seen < expected {
        let (message, at) = crate::common::next(consumer, seen, expected)?;
        let begin: &mut Instant = begin.get_or_insert(at);
        seen += 1;
        if message.key() == Some(b"small") {
            *begin = (*begin).min(at);
            continue;
        }
        let records = match (header(&message, wire::REF_URI), header(&message, wire::CHUNK_COUNT)) {
            (Some(_), None) => 1,
            (None, Some(count)) => count.parse()?,
            _ => anyhow::bail!("a large payload went into one record"),
        };
        expected = 1 + rows * records;
        value_bytes = value_bytes.max(message.payload_len());
    }
    Ok((begin.context("no record")?.elapsed(), value_bytes))
}

fn header<'a>(message: &'a BorrowedMessage<'_>, name: &str) -> Option<&'a str> {
    let found = message.headers()?.iter().find(|header| header.key == name)?;
    std::str::from_utf8(found.value?).ok()
}

/// User and system time of this process (proc(5), stat), in ticks of 10 ms.
pub fn cpu_seconds() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10).as_secs_f64())
}

/// The medians of both sides, and their ratio.
pub fn print(without: &str, figures: &[Figure], drains: &[Drain]) {
    use crate::common::median;
    let of = |of: fn(&Figure) -> f64, figures: &[Figure]| median(figures.iter().map(of).collect());
    let relayed: Vec<Figure> = drains.iter().map(|drain| drain.figure).collect();
    let (bound, rate) = (of(|f| f.mib_per_second, figures), of(|f| f.mib_per_second, &relayed));
    println!("  {without:<14} {bound:>6.0} MiB/s   {:.2} CPU-s", of(|f| f.cpu_seconds, figures));
    println!(
        "  {:<14} {rate:>6.0} MiB/s   {:.2} CPU-s   peak {:.0} MiB   ratio {:.2}",
        "relay",
        of(|f| f.cpu_seconds, &relayed),
        median(drains.iter().map(|drain| drain.peak_mib).collect()),
        rate / bound,
    );
}

pub fn print_round(round: usize, without: &str, figure: Figure, drain: Drain) {
    println!(
        "round {round}: {without} {:.0} MiB/s, {:.2} CPU-s; relay {:.0} MiB/s, {:.2} CPU-s, peak {:.0} MiB; ratio {:.2}",
        figure.mib_per_second,
        figure.cpu_seconds,
        drain.figure.mib_per_second,
        drain.figure.cpu_seconds,
        drain.peak_mib,
        drain.figure.mib_per_second / figure.mib_per_second,
    );
}
