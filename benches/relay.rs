//! The relay against its bounds, on real PostgreSQL and real Kafka: `scripts/bench`.
//!
//! In each round, on the same 300,000 rows of 256 bytes: the raw rdkafka loop, the relay's drain in
//! delete mode and in mark mode, its drain when all rows have one key and when delivery is exactly once, and the latency from commit to
//! consumer at a steady rate. What is printed was measured in this run.
//!
//! Arguments: the number of rounds, and names of figures that alone are measured, beside the raw loop:
//! `delete`, `mark`, `one key`, `once`, `latency`, `once latency`.

mod common;
#[path = "common/rows.rs"]
mod rows;

use std::time::{Duration, Instant};

use common::{Bench, Program, Shape, median, on_thread};
use rows::{KEYS, arrivals, count, payload, percentiles};

const ROWS: usize = 300_000;
const PAYLOAD: usize = 256;
/// The name of what is delivered exactly once, and seen by readers of committed records.
const ONCE: &str = "once";
/// What may be asked for alone.
const FIGURES: [&str; 6] = ["delete", "mark", "one key", ONCE, "latency", "once latency"];
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
    let words: Vec<String> = std::env::args().skip(1).collect();
    let rounds: usize = words.iter().find_map(|word| word.parse().ok()).unwrap_or(5);
    let any = words.iter().any(|word| FIGURES.contains(&word.as_str()));
    let wanted = |figure: &str| !any || words.iter().any(|word| word == figure);
    let shape = Shape { rows: ROWS, payload: PAYLOAD, partitions: 6, text: false, fetch_wait: "5" };
    let bench = Bench::new(shape).await?;
    let (mut raw, mut delete, mut mark, mut hot, mut latency) = (vec![], vec![], vec![], vec![], vec![]);
    let (mut once, mut once_latency) = (vec![], vec![]);
    for round in 1..=rounds {
        let rate = raw_loop(&bench, round).await?;
        println!("round {round}: raw rdkafka loop      {rate:>9.0} records/s");
        raw.push(rate);
        for (name, mode, keys, drains) in [
            ("delete", "delete", KEYS, &mut delete),
            ("mark", "mark", KEYS, &mut mark),
            ("one key", "delete", 1, &mut hot),
            (ONCE, "delete", KEYS, &mut once),
        ] {
            if !wanted(name) {
                continue;
            }
            let drain = drain(&bench, round, name, mode, keys).await?;
            println!(
                "round {round}: relay, {name:<7}        {:>9.0} events/s, {:.1} CPU-s per million, peak {:.0} MiB, {:.0}% of raw",
                drain.rate,
                drain.cpu_seconds_per_million,
                drain.peak_mib,
                100.0 * drain.rate / rate
            );
            drains.push(drain);
        }
        for (figure, name, latency) in
            [("latency", "", &mut latency), ("once latency", ONCE, &mut once_latency)]
        {
            if !wanted(figure) {
                continue;
            }
            let (p50, p99) = commit_to_consumer(&bench, round, name).await?;
            println!(
                "round {round}: commit to consumer at {STEADY}/s: p50 {p50:.1} ms, p99 {p99:.1} ms {name}"
            );
            latency.push((p50, p99));
        }
    }
    let raw = median(raw);
    println!("\nmedians of {rounds} interleaved rounds, {ROWS} rows of {PAYLOAD} bytes:");
    println!("  raw rdkafka loop   {raw:>9.0} records/s");
    let drains = [("delete", delete), ("mark", mark), ("one key", hot), (ONCE, once)];
    for (name, drains) in drains.into_iter().filter(|(_, drains)| !drains.is_empty()) {
        let rate = median(drains.iter().map(|drain| drain.rate).collect());
        println!(
            "  relay, {name:<7}     {rate:>9.0} events/s   {:.0}% of raw   {:.1} CPU-s per million   peak {:.0} MiB",
            100.0 * rate / raw,
            median(drains.iter().map(|drain| drain.cpu_seconds_per_million).collect()),
            median(drains.iter().map(|drain| drain.peak_mib).collect()),
        );
    }
    let latencies = [("", latency), (ONCE, once_latency)];
    for (name, latency) in latencies.into_iter().filter(|(_, latency)| !latency.is_empty()) {
        println!(
            "  commit to consumer at {STEADY}/s: p50 {:.1} ms, p99 {:.1} ms {name}",
            median(latency.iter().map(|pair| pair.0).collect()),
            median(latency.iter().map(|pair| pair.1).collect())
        );
    }
    bench.end().await
}

async fn raw_loop(bench: &Bench, round: usize) -> anyhow::Result<f64> {
    let topic = bench.topic(format!("bench.raw.{round}")).await?;
    install(bench, "delete", false).await?;
    bench.fill(&topic, KEYS, ROWS).await?;
    bench.raw(&topic).await
}

async fn drain(bench: &Bench, round: usize, name: &str, mode: &str, keys: i64) -> anyhow::Result<Drain> {
    let topic = bench.topic(format!("bench.{}.{round}", name.replace(' ', "-"))).await?;
    let config = install(bench, mode, name == ONCE).await?;
    bench.fill(&topic, keys, ROWS).await?;

    let consumer = bench.consumer(&topic)?;
    let counted = on_thread(move || count(&consumer, ROWS, |_| ()));
    let relay = Program::relay(&config)?;
    let rate = counted.await?;
    let left = match mode {
        "mark" => "SELECT count(*) FROM outbox WHERE published_at IS NULL",
        _ => "SELECT count(*) FROM outbox",
    };
    while sqlx::query_scalar::<_, i64>(left).fetch_one(&bench.db).await? > 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(Drain {
        rate,
        cpu_seconds_per_million: relay.cpu_seconds()? * 1e6 / ROWS as f64,
        peak_mib: relay.peak_mib()?,
    })
}

/// p50 and p99 in milliseconds from the return of COMMIT to the consumer.
async fn commit_to_consumer(bench: &Bench, round: usize, name: &str) -> anyhow::Result<(f64, f64)> {
    let topic = bench.topic(format!("bench.latency{name}.{round}")).await?;
    let config = install(bench, "delete", name == ONCE).await?;
    let _relay = Program::relay(&config)?;
    let consumer = bench.consumer(&topic)?;
    let total = (STEADY * (STEADY_SECONDS + 3)) as usize;
    let seen = on_thread(move || arrivals(&consumer, total));
    let mut tick = tokio::time::interval(Duration::from_micros(1_000_000 / STEADY));
    let mut committed = Vec::with_capacity(total);
    for n in 0..total {
        tick.tick().await;
        sqlx::query("INSERT INTO outbox (topic, key, payload) VALUES ($1, $2, $3)")
            .bind(&topic)
            .bind(n.to_string())
            .bind(payload(n, PAYLOAD).into_bytes())
            .execute(&bench.db)
            .await?;
        committed.push(Instant::now());
    }
    // The first three seconds are the start: connections, the producer's id.
    let delays = committed
        .iter()
        .zip(&seen.await?)
        .skip((STEADY * 3) as usize)
        .filter_map(|(committed, seen)| {
            Some(seen.as_ref()?.saturating_duration_since(*committed).as_secs_f64() * 1e3)
        })
        .collect();
    Ok(percentiles(delays))
}

/// A fresh outbox, and the configuration: one for all figures but for `after_publish` and `delivery`.
async fn install(bench: &Bench, mode: &str, once: bool) -> anyhow::Result<String> {
    let delivery = if once { "exactly_once" } else { "at_least_once" };
    let file = bench.folder.path().join("bench.yaml");
    std::fs::write(
        &file,
        format!(
            "source: {{ url: '{}' }}\nkafka: {{ bootstrap_servers: '{}', delivery: {delivery} }}\nadmin: {{ listen: null }}\n\
             log: {{ level: warn }}\ntables: [{{ name: outbox, after_publish: {mode} }}]\n",
            bench.url, bench.kafka
        ),
    )?;
    let file = file.display().to_string();
    bench.outbox(&["--config", &file]).await?;
    Ok(file)
}
