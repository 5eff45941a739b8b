//! Payloads to an object store, on a real MinIO: `scripts/bench payloads`.
//!
//! In each round, the same 500 payloads of 1 MiB: straight through `object_store`, then through the relay's
//! store as it is configured by default and with other ways to check what arrives. What is printed was
//! measured in this run; the CPU time is that of this process.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{
    ClientOptions, ObjectStoreExt as _, PutPayload,
    aws::{AmazonS3, AmazonS3Builder, AwsAuthorizer, AwsCredential},
    client::{HttpConnector as _, HttpRequest, HttpRequestBody, ReqwestConnector},
    path::Path,
};
use whippet::store::Store;

const PAYLOADS: usize = 500;
const SIZE: usize = 1 << 20;
const BUCKET: &str = "whippet-bench";
const REGION: &str = "us-east-1";

/// What the relay's store is opened with beside the credentials.
const STORES: [(&str, &[(&str, &str)]); 4] = [
    ("store, as it is", &[]),
    ("store, CRC64NVME", &[("checksum_algorithm", "CRC64NVME")]),
    ("store, not signed", &[("unsigned_payload", "true")]),
    ("store, not signed, CRC64", &[("unsigned_payload", "true"), ("checksum_algorithm", "CRC64NVME")]),
];

#[derive(Clone, Copy, Debug)]
struct Figure {
    /// Payloads a second.
    rate: f64,
    cpu_seconds: f64,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let numbers: Vec<usize> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let (rounds, concurrency) = match numbers[..] {
        [rounds, concurrency, ..] => (rounds, concurrency),
        [rounds] => (rounds, 16),
        [] => (5, 16),
    };
    make_bucket().await?;
    let raw = raw()?;
    let stores: Vec<Store> =
        STORES.iter().map(|(_, options)| open(options)).collect::<anyhow::Result<_>>()?;
    let payloads = payloads();
    let names: Vec<&str> = std::iter::once("object_store").chain(STORES.map(|(name, _)| name)).collect();
    let mut figures: Vec<Vec<Figure>> = vec![Vec::new(); names.len()];
    for round in 1..=rounds {
        for (index, name) in names.iter().enumerate() {
            let (raw, store) = (&raw, index.checked_sub(1).map(|index| &stores[index]));
            let put = async |n: usize, payload: Bytes| -> anyhow::Result<()> {
                let key = format!("round-{round}/{index}/{n}");
                match store {
                    Some(store) => store.put(&key, payload, "application/json").await?,
                    None => drop(raw.put(&Path::from(key), PutPayload::from_bytes(payload)).await?),
                }
                Ok(())
            };
            let (begin, cpu) = (Instant::now(), cpu_seconds()?);
            stream::iter(payloads.iter().cloned().enumerate())
                .map(|(n, payload)| put(n, payload))
                .buffer_unordered(concurrency)
                .try_collect::<()>()
                .await?;
            let figure = Figure {
                rate: PAYLOADS as f64 / begin.elapsed().as_secs_f64(),
                cpu_seconds: cpu_seconds()? - cpu,
            };
            println!(
                "round {round}: {name:<26} {:>6.0} payloads/s  {:.2} CPU-s",
                figure.rate, figure.cpu_seconds
            );
            figures[index].push(figure);
        }
    }
    println!(
        "\nmedians of {rounds} interleaved rounds, {PAYLOADS} payloads of {SIZE} bytes, {concurrency} at once:"
    );
    let bound = median(figures[0].iter().map(|figure| figure.rate));
    for (name, figures) in names.iter().zip(&figures) {
        let rate = median(figures.iter().map(|figure| figure.rate));
        println!(
            "  {name:<26} {rate:>6.0} payloads/s   {:.0}% of object_store   {:.2} CPU-s",
            100.0 * rate / bound,
            median(figures.iter().map(|figure| figure.cpu_seconds)),
        );
    }
    open(&[])?.purge("").await?;
    Ok(())
}

/// Slices of the same random bytes, none like another.
fn payloads() -> Vec<Bytes> {
    let mut random = vec![0; SIZE + PAYLOADS];
    fastrand::fill(&mut random);
    let random = Bytes::from(random);
    (0..PAYLOADS).map(|n| random.slice(n..n + SIZE)).collect()
}

fn service(variable: &str) -> anyhow::Result<String> {
    std::env::var(variable).with_context(|| format!("{variable} is not set: run scripts/bench payloads"))
}

fn open(other: &[(&str, &str)]) -> anyhow::Result<Store> {
    let mut options: BTreeMap<String, String> = BTreeMap::from([
        ("endpoint".to_owned(), service("WHIPPET_TEST_S3")?),
        ("region".to_owned(), REGION.to_owned()),
        ("access_key_id".to_owned(), service("WHIPPET_TEST_S3_KEY")?),
        ("secret_access_key".to_owned(), service("WHIPPET_TEST_S3_SECRET")?),
    ]);
    options.extend(other.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    Ok(Store::open(&format!("s3://{BUCKET}/"), &options)?)
}

/// The bound: the crate, as its documentation has it.
fn raw() -> anyhow::Result<AmazonS3> {
    Ok(AmazonS3Builder::new()
        .with_endpoint(service("WHIPPET_TEST_S3")?)
        .with_region(REGION)
        .with_access_key_id(service("WHIPPET_TEST_S3_KEY")?)
        .with_secret_access_key(service("WHIPPET_TEST_S3_SECRET")?)
        .with_bucket_name(BUCKET)
        .with_allow_http(true)
        .build()?)
}

async fn make_bucket() -> anyhow::Result<()> {
    let credential = AwsCredential {
        key_id: service("WHIPPET_TEST_S3_KEY")?,
        secret_key: service("WHIPPET_TEST_S3_SECRET")?,
        token: None,
    };
    let mut request = HttpRequest::new(HttpRequestBody::empty());
    *request.method_mut() = "PUT".parse()?;
    *request.uri_mut() = format!("{}/{BUCKET}", service("WHIPPET_TEST_S3")?).parse()?;
    AwsAuthorizer::new(&credential, "s3", REGION).try_authorize(&mut request, None)?;
    let client = ReqwestConnector::default().connect(&ClientOptions::new().with_allow_http(true))?;
    let status = client.execute(request).await?.status().as_u16();
    // 409: it is there.
    ensure!(matches!(status, 200 | 409), "cannot make bucket {BUCKET}: {status}");
    Ok(())
}

/// User and system time of this process (proc(5), stat), in ticks of 10 ms.
fn cpu_seconds() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10).as_secs_f64())
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}
