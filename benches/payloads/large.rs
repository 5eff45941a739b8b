//! Rows with large payloads, and the relay that publishes them.

use std::{
    ops::Add,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use rdkafka::{
    Message as _,
    consumer::BaseConsumer,
    message::{BorrowedMessage, Headers as _},
};
use sqlx::{Connection as _, PgConnection, PgPool, postgres::PgPoolOptions};
use whippet::record::wire;

use crate::{
    common::{Bench, Program, median, on_thread},
    cpu::Cpu,
};

/// What was measured of one run, or of several of one side.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figure {
    pub seconds: f64,
    mib: f64,
    /// Of what is measured, or of the relay, its start included.
    pub cpu_seconds: f64,
    /// Of the relay's reader, where it is not in what is measured.
    reader_seconds: f64,
    pub services: Cpu,
    /// The relay's.
    peak_mib: f64,
}

impl Figure {
    fn rate(&self) -> f64 {
        self.mib / self.seconds
    }

    fn seconds_per_gib(&self, seconds: f64) -> f64 {
        seconds * 1024.0 / self.mib
    }

    /// Processor time of all that took part, in seconds for a GiB.
    fn work(&self) -> f64 {
        self.seconds_per_gib(self.cpu_seconds + self.reader_seconds + self.services.total())
    }
}

impl Add for Figure {
    type Output = Figure;

    fn add(self, other: Figure) -> Figure {
        Figure {
            seconds: self.seconds + other.seconds,
            mib: self.mib + other.mib,
            cpu_seconds: self.cpu_seconds + other.cpu_seconds,
            reader_seconds: self.reader_seconds + other.reader_seconds,
            services: self.services + other.services,
            peak_mib: self.peak_mib.max(other.peak_mib),
        }
    }
}

/// When a measurement began, and what had been used by then.
pub struct Begun {
    at: Instant,
    cpu_seconds: f64,
    services: Cpu,
}

/// What the relay did.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    pub figure: Figure,
    /// The largest value of a record.
    pub value_bytes: usize,
}

fn mib(payloads: &[Bytes]) -> f64 {
    payloads.iter().map(Bytes::len).sum::<usize>() as f64 / f64::from(1 << 20)
}

impl Begun {
    pub fn now() -> anyhow::Result<Begun> {
        Ok(Begun { services: Cpu::now()?, cpu_seconds: cpu_seconds()?, at: Instant::now() })
    }

    /// What this process did until now; or until `end`, if that was earlier.
    pub fn end(&self, payloads: &[Bytes], end: Option<Instant>) -> anyhow::Result<Figure> {
        let took = end.unwrap_or_else(Instant::now).saturating_duration_since(self.at);
        Ok(Figure {
            seconds: took.as_secs_f64(),
            mib: mib(payloads),
            cpu_seconds: cpu_seconds()? - self.cpu_seconds,
            services: Cpu::now()? - self.services,
            ..Figure::default()
        })
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

/// A small row, whose record tells that the relay is at work, and then these. The server has just had a checkpoint, not
/// after they were written: else it would write each of their pages whole into its log when it deletes them (full_page_writes),
/// which is for rows that wait for minutes, and not for those of an outbox.
pub async fn fill(bench: &Bench, topic: &str, payloads: &[Bytes]) -> anyhow::Result<()> {
    sqlx::raw_sql("CHECKPOINT").execute(&bench.db).await?;
    let mut transaction = bench.db.begin().await?;
    let insert = "INSERT INTO outbox (topic, key, type, payload) VALUES ($1, $2, 'Benched', $3)";
    let small = (String::from("small"), &b"small"[..]);
    let large = payloads.iter().enumerate().map(|(n, payload)| (key(n), &payload[..]));
    for (key, payload) in std::iter::once(small).chain(large) {
        sqlx::query(insert).bind(topic).bind(key).bind(payload).execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    sqlx::raw_sql("VACUUM ANALYZE outbox").execute(&bench.db).await?;
    sync()
}

/// What PostgreSQL alone takes for these rows: to read their payloads, one after the other on one connection, and
/// then to delete them.
#[derive(Clone, Copy, Debug)]
pub struct Database {
    reading: Figure,
    deleting: Figure,
}

impl Database {
    /// Processor time of the server, in seconds for a GiB.
    fn work(&self) -> [f64; 2] {
        [self.reading, self.deleting].map(|figure| figure.seconds_per_gib(figure.services.postgres()))
    }
}

const READ: &str = "SELECT payload FROM outbox WHERE seq = $1";
const DELETE: &str = "DELETE FROM outbox WHERE seq = $1";

/// The same rows, for whoever reads them by the driver as it is.
pub struct Rows {
    db: PgPool,
    /// Of those with large payloads.
    pub places: Vec<i64>,
}

impl Rows {
    pub async fn fill(bench: &Bench, config: &str, payloads: &[Bytes]) -> anyhow::Result<Rows> {
        bench.outbox(&["--config", config]).await?;
        fill(bench, "nobody-reads-it", payloads).await?;
        // As many connections as the relay has.
        let db = PgPoolOptions::new().max_connections(4);
        let db = db.connect(&format!("{}?sslmode=disable", bench.url)).await?;
        let places = sqlx::query_scalar("SELECT seq FROM outbox WHERE key <> 'small' ORDER BY seq");
        Ok(Rows { places: places.fetch_all(&db).await?, db })
    }

    pub async fn read(&self, place: i64) -> anyhow::Result<Bytes> {
        let payload: Vec<u8> = sqlx::query_scalar(READ).bind(place).fetch_one(&self.db).await?;
        Ok(payload.into())
    }

    pub async fn delete(&self, place: i64) -> anyhow::Result<()> {
        sqlx::query(DELETE).bind(place).execute(&self.db).await?;
        Ok(())
    }
}

pub async fn database(bench: &Bench, config: &str, payloads: &[Bytes]) -> anyhow::Result<Database> {
    let Rows { places, .. } = Rows::fill(bench, config, payloads).await?;
    let mut connection = PgConnection::connect(&format!("{}?sslmode=disable", bench.url)).await?;
    let mut figures = Vec::new();
    for sql in [READ, DELETE] {
        let begun = Begun::now()?;
        for place in &places {
            sqlx::query(sql).bind(place).fetch_optional(&mut connection).await?;
        }
        figures.push(begun.end(payloads, None)?);
    }
    connection.close().await?;
    Ok(Database { reading: figures[0], deleting: figures[1] })
}

/// The relay at its work, from its first record to its last.
pub async fn drain(bench: &Bench, topic: &str, config: &str, payloads: &[Bytes]) -> anyhow::Result<Drain> {
    let (consumer, rows) = (bench.consumer(topic)?, payloads.len());
    let followed = on_thread(move || follow(&consumer, rows));
    let (services, reader) = (Cpu::now()?, cpu_seconds()?);
    let relay = Program::relay(config)?;
    let (took, value_bytes) = followed.await?;
    while sqlx::query_scalar::<_, i64>("SELECT count(*) FROM outbox").fetch_one(&bench.db).await? > 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let figure = Figure {
        seconds: took.as_secs_f64(),
        mib: mib(payloads),
        cpu_seconds: relay.cpu_seconds()?,
        reader_seconds: cpu_seconds()? - reader,
        services: Cpu::now()? - services,
        peak_mib: relay.peak_mib()?,
    };
    Ok(Drain { figure, value_bytes })
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
fn cpu_seconds() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10).as_secs_f64())
}

/// The first of the sides.
pub const RELAY: &str = "relay";

/// One round: what each side did in its two runs, the relay first; and the database alone.
pub struct Round {
    sides: Vec<(&'static str, Figure)>,
    database: Database,
}

/// Has each side work twice a round, in their order and then in the opposite one: what changes little by little, as the
/// broker's memory does, changes for all alike. And once before the first round, which does not count: the broker compiles
/// what it runs often.
pub async fn rounds(
    rounds: usize,
    sides: &[&'static str],
    mut run: impl AsyncFnMut(usize) -> anyhow::Result<Figure>,
    database: impl AsyncFn() -> anyhow::Result<Database>,
) -> anyhow::Result<Vec<Round>> {
    let mut done = Vec::new();
    for number in 0..=rounds {
        let mut figures = vec![Figure::default(); sides.len()];
        let order = (0..sides.len()).chain((0..sides.len()).rev().filter(|_| number > 0));
        for side in order {
            let figure = run(side).await?;
            println!("round {number}: {:<28} {:>4.0} MiB/s", sides[side], figure.rate());
            figures[side] = figures[side] + figure;
        }
        if number > 0 {
            let sides = sides.iter().copied().zip(figures).collect();
            done.push(Round { sides, database: database().await? });
        }
    }
    Ok(done)
}

/// Waits until what was written is on disk: it is no part of what comes next.
pub fn sync() -> anyhow::Result<()> {
    anyhow::ensure!(Command::new("sync").status()?.success(), "sync failed");
    Ok(())
}

/// The median of something, and its least and its most.
fn spread(rounds: &[Round], of: impl Fn(&Round) -> f64) -> [f64; 3] {
    let mut values: Vec<f64> = rounds.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or_default();
    [median(values.clone()), at(0), at(values.len().saturating_sub(1))]
}

/// How fast the sides were and the relay's ratios to the others, each round by itself. Then what a GiB took of the
/// processors, the rate that these bear, and the ratio which that leaves: to the relay, and to one that would take no more
/// than the other side does and than the database takes for serving the rows.
pub fn print(rounds: &[Round]) -> anyhow::Result<()> {
    let Some(first) = rounds.first() else { return Ok(()) };
    let relay = |round: &Round| round.sides[0].1;
    for (index, (name, _)) in first.sides.iter().enumerate() {
        let [rate, least, most] = spread(rounds, |round| round.sides[index].1.rate());
        print!("  {name:<28} {rate:>5.0} MiB/s ({least:.0} to {most:.0})");
        if index == 0 {
            println!("   peak {:.0} MiB", spread(rounds, |round| relay(round).peak_mib)[2]);
        } else {
            let [ratio, least, most] =
                spread(rounds, |round| relay(round).rate() / round.sides[index].1.rate());
            println!("   ratio {ratio:.2} ({least:.2} to {most:.2})");
        }
    }
    let processors = std::thread::available_parallelism()?.get();
    println!("processor time, in seconds for a GiB:");
    let median = |of: &dyn Fn(&Round) -> f64| spread(rounds, of)[0];
    let part = |index: usize, seconds: &dyn Fn(&Figure) -> f64| {
        median(&|round| round.sides[index].1.seconds_per_gib(seconds(&round.sides[index].1)))
    };
    let [reading, deleting] = [0, 1].map(|index| median(&|round| round.database.work()[index]));
    let all = median(&|round| relay(round).work());
    for (index, (name, _)) in first.sides.iter().enumerate() {
        print!("  {name:<28} itself {:.2}", part(index, &|figure| figure.cpu_seconds));
        if index == 0 {
            print!(", its reader {:.2}", part(index, &|figure| figure.reader_seconds));
        }
        for (service, (name, _)) in Cpu::default().each().enumerate() {
            let seconds = |figure: &Figure| figure.services.each().nth(service).map_or(0.0, |(_, s)| s);
            print!(", {name} {:.2}", part(index, &seconds));
        }
        let work = median(&|round| round.sides[index].1.work());
        // Its own share of the server apart: that of the rows takes its place.
        let without = work - part(index, &|figure| figure.services.postgres());
        print!(": {work:.2}, which {processors} bear at {:.0} MiB/s", processors as f64 * 1024.0 / work);
        if index > 0 {
            let least = without + reading + deleting;
            print!("; ratio {:.2}, and at most {:.2}", work / all, work / least);
        }
        println!();
    }
    println!("  {:<28} reading {reading:.2}, deleting {deleting:.2}", "postgres alone");
    Ok(())
}
