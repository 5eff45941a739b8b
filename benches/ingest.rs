//! Ingest, on real Kafka: `scripts/bench ingest [ROUNDS]`.
//!
//! Fifty callers with a connection each, every one of which waits for its 202 before it sends the next event; the
//! spool is on the disk of the folder for temporary files, and is relayed meanwhile. The callers are on the same
//! cores. What is printed was measured in this run.

#[path = "common/mod.rs"]
#[expect(dead_code, reason = "the other benchmarks use the rest")]
mod common;

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use common::{Bench, Program, Shape, median};

const CALLERS: usize = 50;
const ROUND: Duration = Duration::from_secs(10);
const SHAPE: Shape = Shape { rows: 0, payload: 256, partitions: 6, text: false, fetch_wait: "10" };

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut numbers = std::env::args().skip(1).filter_map(|word| word.parse().ok());
    let rounds: usize = numbers.next().unwrap_or(5);
    let bench = Bench::new(SHAPE).await?;
    println!("{CALLERS} connections, {} bytes, {ROUND:?} a round; load before {}", SHAPE.payload, load()?);
    println!(
        "{:>10} {:>8} {:>8} {:>10} {:>10} {:>8} {:>10}",
        "taken/s", "p50", "p99", "commits/s", "fsyncs/s", "CPU s", "peak MiB"
    );
    let (mut rates, mut p50s, mut p99s) = (vec![], vec![], vec![]);
    for round in 0..rounds {
        let fsyncs = fsyncs(bench.folder.path())?;
        let topic = bench.topic(format!("whippet-bench-ingest-{round}")).await?;
        let folder = bench.folder.path().join(format!("spool-{round}"));
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let admin = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let file = bench.folder.path().join("ingest.yaml");
        std::fs::write(
            &file,
            format!(
                "kafka: {{ bootstrap_servers: '{}' }}\nadmin: {{ listen: '127.0.0.1:{admin}' }}\nlog: {{ level: warn }}\n\
                 ingest: {{ listen: '127.0.0.1:{port}', topics: ['{topic}'], spool: '{}' }}\n",
                bench.kafka,
                folder.display()
            ),
        )?;
        let relay = Program::relay(&file.display().to_string())?;
        let address = format!("127.0.0.1:{port}");
        while TcpStream::connect(&address).is_err() {
            thread::sleep(Duration::from_millis(20));
        }
        let callers: Vec<_> = (0..CALLERS)
            .map(|caller| {
                let (address, topic) = (address.clone(), topic.clone());
                thread::spawn(move || call(&address, &topic, caller))
            })
            .collect();
        let begun = Instant::now();
        let mut answers = Vec::new();
        for caller in callers {
            answers.extend(caller.join().map_err(|_| anyhow::anyhow!("a caller ended"))??);
        }
        let seconds = begun.elapsed().as_secs_f64();
        answers.sort_unstable();
        let commits = metric(admin, "whippet_ingest_commit_seconds_count")?;
        let at = |share: f64| answers[(answers.len() as f64 * share) as usize].as_secs_f64() * 1e3;
        let (rate, p50, p99) = (answers.len() as f64 / seconds, at(0.5), at(0.99));
        println!(
            "{rate:>10.0} {p50:>5.1} ms {p99:>5.1} ms {:>10.0} {fsyncs:>10.0} {:>8.1} {:>10.0}",
            commits / seconds,
            relay.cpu_seconds()?,
            relay.peak_mib()?
        );
        rates.push(rate);
        p50s.push(p50);
        p99s.push(p99);
        drop(relay);
        bench.delete_topic(&topic).await?;
    }
    println!(
        "median: {:.0} taken/s, p50 {:.1} ms, p99 {:.1} ms; load after {}",
        median(rates),
        median(p50s),
        median(p99s),
        load()?
    );
    bench.end().await
}

/// Sends one event after the other; what each answer took.
fn call(address: &str, topic: &str, caller: usize) -> anyhow::Result<Vec<Duration>> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let payload = vec![b'x'; SHAPE.payload];
    let begun = Instant::now();
    let (mut answers, mut line) = (Vec::new(), String::new());
    while begun.elapsed() < ROUND {
        let number = answers.len();
        let mut request = format!(
            "POST /v1/topics/{topic}/events HTTP/1.1\r\nHost: x\r\nWhippet-Key: {caller}\r\n\
             Whippet-Id: {caller}-{number}\r\nContent-Length: {}\r\n\r\n",
            payload.len()
        )
        .into_bytes();
        request.extend_from_slice(&payload);
        let sent = Instant::now();
        stream.get_mut().write_all(&request)?;
        let mut length = 0;
        line.clear();
        stream.read_line(&mut line)?;
        anyhow::ensure!(line.contains(" 202 "), "answered with {line}");
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line)?;
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                length = value.trim().parse()?;
            }
        }
        stream.read_exact(&mut vec![0; length])?;
        answers.push(sent.elapsed());
    }
    Ok(answers)
}

/// The bound of a writer that waits for the disk each time: a page, and fdatasync.
fn fsyncs(folder: &std::path::Path) -> anyhow::Result<f64> {
    let mut file = File::create(folder.join("fsyncs"))?;
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_secs(1) {
        file.write_all(&[0; 4096])?;
        file.sync_data()?;
        count += 1;
    }
    Ok(f64::from(count) / begun.elapsed().as_secs_f64())
}

fn metric(admin: u16, name: &str) -> anyhow::Result<f64> {
    let text = ureq::get(format!("http://127.0.0.1:{admin}/metrics")).call()?.body_mut().read_to_string()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such metric")?;
    Ok(line.trim().parse()?)
}

/// What else runs here: the load of the last 1, 5 and 15 minutes (proc(5), loadavg).
fn load() -> anyhow::Result<String> {
    let averages = std::fs::read_to_string("/proc/loadavg")?;
    Ok(averages.split_whitespace().take(3).collect::<Vec<_>>().join(" "))
}
