//! Large payloads, on real MinIO, PostgreSQL and Kafka: `scripts/bench payloads`.
//!
//! Three parts, each in interleaved rounds: `store` is the relay's object store alone, `claim_check` is
//! rows of 1 MiB by way of the store, `chunks` is rows of 5 MiB in slices; the last two with the relay as
//! a process, against the same bytes without it. What is printed was measured in this run.

mod bucket;
mod chunks;
mod claim_check;
#[path = "../common/mod.rs"]
mod common;
mod cpu;
mod large;
mod store;

/// As many payloads of 1 MiB as the relay's window has room for, unless its configuration says otherwise.
const AT_ONCE: usize = 11;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let mut numbers = words.iter().filter_map(|word| word.parse().ok());
    let (rounds, at_once) = (numbers.next().unwrap_or(5), numbers.next().unwrap_or(AT_ONCE));
    let parts: Vec<&str> =
        words.iter().map(String::as_str).filter(|word| word.parse::<usize>().is_err()).collect();
    for part in if parts.is_empty() { vec!["store", "claim_check", "chunks"] } else { parts } {
        println!("{part}: load before it {}", load()?);
        match part {
            "store" => store::run(rounds, at_once).await?,
            "claim_check" => claim_check::run(rounds, at_once).await?,
            "chunks" => chunks::run(rounds).await?,
            other => anyhow::bail!("there is no part {other}; expected store, claim_check or chunks"),
        }
        println!("{part}: load after it {}\n", load()?);
    }
    Ok(())
}

/// What else runs here: the load of the last 1, 5 and 15 minutes (proc(5), loadavg).
fn load() -> anyhow::Result<String> {
    let averages = std::fs::read_to_string("/proc/loadavg")?;
    Ok(averages.split_whitespace().take(3).collect::<Vec<_>>().join(" "))
}
