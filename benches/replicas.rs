//! Several relays on one outbox, by polling: `scripts/bench replicas`. What is printed was measured in this run.
//!
//! In each round 1, 2 and 4 relays share 300,000 rows of 256 bytes that one transaction brings, when all have
//! their share: events a second, CPU-seconds of the relays and of the database, deadlocks. Then one of two relays
//! is killed twenty times, and the rows of all keys wait for the other: the time until the last is published.

mod common;
#[path = "common/rows.rs"]
#[expect(dead_code, reason = "rows are counted only")]
mod rows;

use std::time::{Duration, Instant};

use common::{Bench, Program, Shape, median, on_thread};
use rows::{KEYS, count};

const ROWS: usize = 300_000;
const KILLS: usize = 20;

#[derive(Clone, Copy, Debug)]
struct Drain {
    rate: f64,
    relays_cpu: f64,
    database_cpu: f64,
    peak_mib: f64,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let rounds: usize = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(5);
    let shape = Shape { rows: ROWS, payload: 256, partitions: 6, text: false, fetch_wait: "5" };
    let bench = Bench::new(shape).await?;
    let mut drains = [(1, vec![]), (2, vec![]), (4, vec![])];
    for round in 1..=rounds {
        for (relays, drains) in &mut drains {
            let drain = drain(&bench, round, *relays).await?;
            print(&format!("round {round}: "), *relays, drain);
            drains.push(drain);
        }
    }
    println!("\nmedians of {rounds} interleaved rounds, {ROWS} rows of 256 bytes:");
    for (relays, drains) in &drains {
        let of = |get: fn(&Drain) -> f64| median(drains.iter().map(get).collect());
        let drain = Drain {
            rate: of(|drain| drain.rate),
            relays_cpu: of(|drain| drain.relays_cpu),
            database_cpu: of(|drain| drain.database_cpu),
            peak_mib: of(|drain| drain.peak_mib),
        };
        print("  ", *relays, drain);
    }
    let deadlocks: i64 =
        sqlx::query_scalar("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
            .fetch_one(&bench.db)
            .await?;
    println!("  deadlocks          {deadlocks}");
    let times = takeovers(&bench).await?;
    let worst = times.iter().copied().fold(0.0, f64::max);
    println!(
        "  one of two is killed, lease of 10 s: all is published {:.1} s later (median of {KILLS}), worst {worst:.1} s",
        median(times)
    );
    bench.end().await
}

fn print(before: &str, relays: usize, drain: Drain) {
    println!(
        "{before}{relays} relays  {:>9.0} events/s   {:.1} CPU-s of the relays and {:.1} of the database per million   \
         peak {:.0} MiB each",
        drain.rate, drain.relays_cpu, drain.database_cpu, drain.peak_mib
    );
}

async fn drain(bench: &Bench, round: usize, count_of: usize) -> anyhow::Result<Drain> {
    let topic = bench.topic(format!("bench.replicas.{count_of}.{round}")).await?;
    let config = install(bench).await?;
    bench.fill(&topic, KEYS, ROWS).await?;
    // Out of sight until everybody has a share.
    sqlx::raw_sql(
        "DROP TABLE IF EXISTS later; ALTER TABLE outbox RENAME TO later; \
         CREATE TABLE outbox (LIKE later INCLUDING ALL)",
    )
    .execute(&bench.db)
    .await?;
    let relays: Vec<Program> = (0..count_of).map(|_| Program::relay(&config)).collect::<Result<_, _>>()?;
    shares(bench, count_of).await?;
    let consumer = bench.consumer(&topic)?;
    let counted = on_thread(move || count(&consumer, ROWS, |_| ()));
    sqlx::raw_sql("INSERT INTO outbox OVERRIDING SYSTEM VALUE SELECT * FROM later")
        .execute(&bench.db)
        .await?;
    let before = database_cpu_seconds()?;
    let at_first: f64 = relays.iter().filter_map(|relay| relay.cpu_seconds().ok()).sum();
    let rate = counted.await?;
    until_empty(bench).await?;
    let relays_cpu = relays.iter().filter_map(|relay| relay.cpu_seconds().ok()).sum::<f64>() - at_first;
    let peak = relays.iter().filter_map(|relay| relay.peak_mib().ok()).fold(0.0, f64::max);
    Ok(Drain {
        rate,
        relays_cpu: relays_cpu * 1e6 / ROWS as f64,
        database_cpu: (database_cpu_seconds()? - before) * 1e6 / ROWS as f64,
        peak_mib: peak,
    })
}

/// Seconds from a kill until rows of all keys, inserted after it, are published.
async fn takeovers(bench: &Bench) -> anyhow::Result<Vec<f64>> {
    let topic = bench.topic("bench.replicas.takeover".into()).await?;
    let config = install(bench).await?;
    let mut relays = vec![Program::relay(&config)?, Program::relay(&config)?];
    let mut times = Vec::new();
    for _ in 0..KILLS {
        shares(bench, 2).await?;
        drop(relays.remove(0));
        let killed = Instant::now();
        sqlx::query("INSERT INTO outbox (topic, key, payload) SELECT $1, 'key-' || n, 'x' FROM generate_series(1, 1000) n")
            .bind(&topic)
            .execute(&bench.db)
            .await?;
        until_empty(bench).await?;
        times.push(killed.elapsed().as_secs_f64());
        relays.push(Program::relay(&config)?);
    }
    Ok(times)
}

/// Waits until so many relays have fair shares of 64 buckets.
async fn shares(bench: &Bench, relays: usize) -> anyhow::Result<()> {
    let fair = "SELECT count(*) = $1 AND min(buckets) >= 64 / $1 FROM ( \
        SELECT count(*) AS buckets FROM whippet.parts JOIN whippet.members USING (epoch) WHERE part >= 0 GROUP BY epoch) s";
    let deadline = Instant::now() + Duration::from_mins(1);
    // The relays make their tables first.
    while !sqlx::query_scalar::<_, Option<bool>>(fair)
        .bind(relays as i64)
        .fetch_one(&bench.db)
        .await
        .is_ok_and(|fair| fair == Some(true))
    {
        anyhow::ensure!(Instant::now() < deadline, "{relays} relays have no fair shares");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn until_empty(bench: &Bench) -> anyhow::Result<()> {
    while sqlx::query_scalar::<_, bool>("SELECT EXISTS (SELECT FROM outbox)").fetch_one(&bench.db).await? {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// User and system time of all processes of PostgreSQL (proc(5), /proc/pid/stat): of the server of the benchmark,
/// where no other runs.
fn database_cpu_seconds() -> anyhow::Result<f64> {
    let mut ticks = 0.0;
    for process in std::fs::read_dir("/proc")?.flatten() {
        let Ok(stat) = std::fs::read_to_string(process.path().join("stat")) else { continue };
        let Some((name, rest)) = stat.rsplit_once(')') else { continue };
        if name.ends_with("(postgres") {
            let fields: Vec<&str> = rest.split_whitespace().collect();
            ticks += fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        }
    }
    Ok(ticks / 100.0)
}

/// A fresh outbox, and the configuration.
async fn install(bench: &Bench) -> anyhow::Result<String> {
    let file = bench.folder.path().join("bench.yaml");
    let config = format!(
        "source: {{ url: '{}' }}\nkafka: {{ bootstrap_servers: '{}' }}\nadmin: {{ listen: null }}\n\
         log: {{ level: warn }}\ntables: [{{ name: outbox }}]\n",
        bench.url, bench.kafka
    );
    std::fs::write(&file, config)?;
    let file = file.display().to_string();
    bench.outbox(&["--config", &file]).await?;
    Ok(file)
}
