//! What tracing costs, on real PostgreSQL and real Kafka: `scripts/bench tracing`.
//!
//! In each round, on the same rows with a context of five headers, of whose traces 1 % are recorded: the relay's
//! drain without telemetry and with it, to a collector in this process that counts what comes. Every second round
//! begins with the other one. What is printed was measured in this run.

#[path = "../tests/it/collector.rs"]
#[expect(dead_code, reason = "tests look at the spans, this one counts them")]
mod collector;
mod common;
#[path = "common/rows.rs"]
#[expect(dead_code, reason = "other figures are other benchmarks'")]
mod rows;

use std::time::Duration;

use collector::Collector;
use common::{Bench, Program, Shape, median, on_thread};
use rows::{KEYS, count};

/// One event in so many is traced.
const ONE_IN: usize = 100;

#[derive(Clone, Copy, Debug)]
struct Drain {
    rate: f64,
    cpu_seconds_per_million: f64,
    peak_mib: f64,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let after =
        |flag: &str| words.iter().skip_while(|word| *word != flag).nth(1).and_then(|word| word.parse().ok());
    let rounds: usize = words.first().and_then(|word| word.parse().ok()).unwrap_or(5);
    let rows = after("--rows").unwrap_or(300_000);
    let bench = Bench::new(Shape { rows, payload: 256, partitions: 6, text: false, fetch_wait: "5" }).await?;
    let (collector, address) = Collector::grpc().await;
    let telemetry = format!("telemetry: {{ otlp_endpoint: 'http://{address}' }}\n");
    let (mut off, mut on, mut share) = (vec![], vec![], vec![]);
    for round in 1..=rounds {
        let mut variants = [("off", "", &mut off), ("on", &*telemetry, &mut on)];
        if round % 2 == 0 {
            variants.reverse();
        }
        for (name, more, drains) in variants {
            let before = collector.seen().len();
            let (drain, traced) = drain(&bench, round, name, more).await?;
            let came = collector.seen().len() - before;
            println!(
                "round {round}: tracing {name:<3} {:>9.0} events/s, {:.1} CPU-s per million, peak {:.0} MiB, \
                 {traced} events traced, {came} spans came",
                drain.rate, drain.cpu_seconds_per_million, drain.peak_mib
            );
            anyhow::ensure!(
                came <= 2 * traced && (came > 0) == (name == "on" && traced > 0),
                "other spans came"
            );
            if name == "on" {
                share.push(came as f64 / (2 * traced).max(1) as f64);
            }
            drains.push(drain);
        }
    }
    println!("\nmedians of {rounds} interleaved rounds, {rows} rows of 256 bytes, 1 in {ONE_IN} traced:");
    let rate = |drains: &[Drain]| median(drains.iter().map(|drain| drain.rate).collect());
    let cpu = |drains: &[Drain]| median(drains.iter().map(|drain| drain.cpu_seconds_per_million).collect());
    for (name, drains) in [("off", &off), ("on", &on)] {
        println!("  tracing {name:<3} {:>9.0} events/s   {:.1} CPU-s per million", rate(drains), cpu(drains));
    }
    println!(
        "  on: {:.1}% of the rate of off; {:.0}% of the spans came",
        100.0 * rate(&on) / rate(&off),
        100.0 * median(share)
    );
    bench.end().await
}

/// A drain, and how many of its events are traced.
async fn drain(bench: &Bench, round: usize, name: &str, more: &str) -> anyhow::Result<(Drain, usize)> {
    let rows = bench.shape.rows;
    let topic = bench.topic(format!("bench.tracing-{name}.{round}")).await?;
    let file = bench.folder.path().join("bench.yaml");
    std::fs::write(
        &file,
        format!(
            "source: {{ url: '{}' }}\nkafka: {{ bootstrap_servers: '{}' }}\nadmin: {{ listen: null }}\n\
             log: {{ level: warn }}\ntables: [{{ name: outbox }}]\n{more}",
            bench.url, bench.kafka
        ),
    )?;
    let file = file.display().to_string();
    bench.outbox(&["--config", &file]).await?;
    // The number of a row tells whether it is traced.
    let context = format!(
        "ALTER TABLE outbox ALTER headers SET DEFAULT json_build_object( \
           'traceparent', '00-' || md5(random()::text) || '-' || left(md5(random()::text), 16) || \
             CASE WHEN currval('outbox_seq_seq') % {ONE_IN} = 0 THEN '-01' ELSE '-00' END, \
           'baggage', 'user=42', 'x-request-id', md5(random()::text), 'user-id', '42', 'tenant', 'acme')"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(context)).execute(&bench.db).await?;
    bench.fill(&topic, KEYS, rows).await?;
    let traced: i64 =
        sqlx::query_scalar("SELECT count(*) FROM outbox WHERE headers->>'traceparent' LIKE '%-01'")
            .fetch_one(&bench.db)
            .await?;

    let consumer = bench.consumer(&topic)?;
    let counted = on_thread(move || count(&consumer, rows, |_| ()));
    let mut relay = Program::relay(&file)?;
    let rate = counted.await?;
    while sqlx::query_scalar::<_, i64>("SELECT count(*) FROM outbox").fetch_one(&bench.db).await? > 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let cpu_seconds_per_million = relay.cpu_seconds()? * 1e6 / rows as f64;
    let drain = Drain { rate, cpu_seconds_per_million, peak_mib: relay.peak_mib()? };
    // Its last spans come as it ends.
    std::process::Command::new("kill").args(["-s", "TERM", &relay.0.id().to_string()]).status()?;
    relay.0.wait()?;
    Ok((drain, usize::try_from(traced)?))
}
