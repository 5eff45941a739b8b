//! The relay's object store alone: the same 500 payloads of 1 MiB straight through `object_store`, then
//! through the relay's store as it is configured by default and with other ways to check what arrives. The
//! CPU time is that of this process, and of the store.

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{ObjectStoreExt as _, PutPayload, path::Path};
use whippet::store::Store;

use crate::{
    bucket,
    common::median,
    large::{Begun, payloads},
};

const PAYLOADS: usize = 500;
const SIZE: usize = 1 << 20;

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
    store_seconds: f64,
}

pub async fn run(rounds: usize, at_once: usize) -> anyhow::Result<()> {
    bucket::make().await?;
    let raw = bucket::raw()?;
    let stores: Vec<Store> =
        STORES.iter().map(|(_, options)| bucket::open(options)).collect::<anyhow::Result<_>>()?;
    let payloads = payloads(PAYLOADS, SIZE);
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
            let begun = Begun::now()?;
            stream::iter(payloads.iter().cloned().enumerate())
                .map(|(n, payload)| put(n, payload))
                .buffer_unordered(at_once)
                .try_collect::<()>()
                .await?;
            let done = begun.end(&payloads, None)?;
            let figure = Figure {
                rate: PAYLOADS as f64 / done.seconds,
                cpu_seconds: done.cpu_seconds,
                store_seconds: done.services.minio(),
            };
            println!(
                "round {round}: {name:<26} {:>6.0} payloads/s  {:.2} CPU-s, {:.2} of the store",
                figure.rate, figure.cpu_seconds, figure.store_seconds
            );
            figures[index].push(figure);
        }
    }
    println!(
        "\nmedians of {rounds} interleaved rounds, {PAYLOADS} payloads of {SIZE} bytes, {at_once} at once:"
    );
    let bound = median(figures[0].iter().map(|figure| figure.rate).collect());
    for (name, figures) in names.iter().zip(&figures) {
        let rate = median(figures.iter().map(|figure| figure.rate).collect());
        println!(
            "  {name:<26} {rate:>6.0} payloads/s   {:.0}% of object_store   {:.2} CPU-s, {:.2} of the store",
            100.0 * rate / bound,
            median(figures.iter().map(|figure| figure.cpu_seconds).collect()),
            median(figures.iter().map(|figure| figure.store_seconds).collect()),
        );
    }
    bucket::open(&[])?.purge("").await?;
    Ok(())
}
