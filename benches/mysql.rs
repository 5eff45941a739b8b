//! Polling MariaDB and MySQL in delete mode, on real servers and real Kafka: `scripts/bench mysql`.
//!
//! In each round, for each server: the relay's drain of 300,000 rows of 256 bytes. What is printed was
//! measured in this run.

#[expect(dead_code, reason = "the other benchmarks use more of it")]
mod common;
#[path = "common/rows.rs"]
#[expect(dead_code, reason = "the other benchmarks use more of it")]
mod rows;

use std::{fmt::Write as _, process::Command};

use common::{Bench, Program, Shape, median, on_thread};
use mysql_async::prelude::Queryable as _;
use rows::{count, payload};

const ROWS: usize = 300_000;
const PAYLOAD: usize = 256;
const KEYS: usize = 1_000;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let rounds: usize = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(5);
    let shape = Shape { rows: ROWS, payload: PAYLOAD, partitions: 6, text: false, fetch_wait: "5" };
    let bench = Bench::new(shape).await?;
    let servers = ["mariadb", "mysql"];
    let mut rates = servers.map(|_| Vec::new());
    for round in 1..=rounds {
        for (server, rates) in servers.iter().zip(&mut rates) {
            rates.push(drain(&bench, server, round).await?);
        }
    }
    println!("\nmedians of {rounds} interleaved rounds, {ROWS} rows of {PAYLOAD} bytes:");
    for (server, rates) in servers.iter().zip(rates) {
        println!("  relay, delete, {server:<8} {:>9.0} events/s", median(rates));
    }
    bench.end().await
}

async fn drain(bench: &Bench, server: &str, round: usize) -> anyhow::Result<f64> {
    let url = std::env::var(format!("WHIPPET_TEST_{}", server.to_uppercase()))?;
    let topic = bench.topic(format!("bench.{server}.{round}")).await?;
    let file = bench.folder.path().join("mysql.yaml");
    std::fs::write(
        &file,
        format!(
            "source: {{ url: '{url}/whippet_bench' }}\nkafka: {{ bootstrap_servers: '{}' }}\nadmin: {{ listen: null }}\n\
             log: {{ level: warn }}\ntables: [{{ name: outbox }}]\n",
            bench.kafka
        ),
    )?;
    let file = file.display().to_string();
    let script =
        Command::new(env!("CARGO_BIN_EXE_whippet")).args(["sql", "--config", &file]).output()?.stdout;
    let script = String::from_utf8(script)?;
    let mut db = mysql_async::Conn::from_url(&url).await?;
    db.query_drop("DROP DATABASE IF EXISTS whippet_bench").await?;
    db.query_drop("CREATE DATABASE whippet_bench").await?;
    db.query_drop("USE whippet_bench").await?;
    let lines: Vec<&str> = script.lines().filter(|line| !line.starts_with("--")).collect();
    for statement in lines.join("\n").split(";\n").filter(|statement| !statement.trim().is_empty()) {
        db.query_drop(statement).await?;
    }
    for low in (0..ROWS).step_by(1_000) {
        let mut text = String::from("INSERT INTO outbox (topic, `key`, type, payload) VALUES ");
        for n in low..low + 1_000 {
            let comma = if n > low { "," } else { "" };
            write!(text, "{comma}('{topic}', 'key-{}', 'Benched', '{}')", n % KEYS, payload(n, PAYLOAD))?;
        }
        db.query_drop(text).await?;
    }
    let consumer = bench.consumer(&topic)?;
    let counted = on_thread(move || count(&consumer, ROWS, |_| ()));
    let relay = Program::relay(&file)?;
    let rate = counted.await?;
    while db.query_first::<u64, _>("SELECT count(*) FROM outbox").await? != Some(0) {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    println!(
        "round {round}: relay, delete, {server:<8} {rate:>9.0} events/s, {:.1} CPU-s per million, peak {:.0} MiB",
        relay.cpu_seconds()? * 1e6 / ROWS as f64,
        relay.peak_mib()?
    );
    drop(relay);
    db.query_drop("DROP DATABASE whippet_bench").await?;
    db.disconnect().await?;
    bench.delete_topic(&topic).await?;
    Ok(rate)
}
