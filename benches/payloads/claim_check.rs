//! 500 payloads of 1 MiB, from their rows in PostgreSQL to records in Kafka that refer to them, against the
//! same puts from memory straight through `object_store`, as many at once as the relay's window has; and against
//! puts that do what the format asks for; and against the simplest program that does what the relay is there for: reads the
//! rows by the driver, puts their payloads and deletes them. As that, the relay reads from its database without TLS.

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{ObjectStoreExt as _, PutPayload, aws::AmazonS3, path::Path};
use whippet::{record::wire, store::Hashed};

use crate::{
    bucket,
    common::{Bench, Shape},
    large::{self, Begun, Drain, Figure, Rows},
};

const SHAPE: Shape = Shape { rows: 500, payload: 1 << 20, partitions: 6, text: false, fetch_wait: "500" };

const SIDES: [&str; 4] =
    [large::RELAY, "object_store", "the same, as the format asks", "object_store, from the rows"];

pub async fn run(rounds: usize, at_once: usize) -> anyhow::Result<()> {
    bucket::make().await?;
    let (bench, raw) = (Bench::new(SHAPE).await?, bucket::raw()?);
    let payloads = large::payloads(SHAPE.rows, SHAPE.payload);
    std::fs::write(config_file(&bench), config(&bench, at_once)?)?;
    let mut runs = 0;
    let run = async |side: usize| {
        runs += 1;
        match side {
            0 => Ok(relayed(&bench, runs, &payloads).await?.figure),
            1 => straight(&Put::Raw(&raw), runs, at_once, &payloads).await,
            2 => straight(&Put::Store, runs, at_once, &payloads).await,
            _ => from_rows(&bench, &raw, runs, at_once, &payloads).await,
        }
    };
    let database = async || large::database(&bench, &config_file(&bench), &payloads).await;
    let done = large::rounds(rounds, &SIDES, run, database).await?;
    println!(
        "\nclaim check, medians of {rounds} rounds (least to most), {} payloads of {} bytes, {at_once} at once:",
        SHAPE.rows, SHAPE.payload
    );
    large::print(&done)?;
    bench.end().await
}

/// How a payload is put without the relay.
enum Put<'a> {
    Raw(&'a AmazonS3),
    /// Its sha256 is in its key and in its record, and it is checked on its way: what the format promises, by way
    /// of the relay's own store.
    Store,
}

async fn straight(put: &Put<'_>, round: usize, at_once: usize, payloads: &[Bytes]) -> anyhow::Result<Figure> {
    let store = bucket::open(&[])?;
    let put = async |n: usize, payload: Bytes| -> anyhow::Result<()> {
        match put {
            Put::Raw(raw) => {
                raw.put(&Path::from(format!("round-{round}/{n}")), PutPayload::from_bytes(payload)).await?;
            }
            Put::Store => {
                let sha256 = wire::sha256(&payload);
                let key = format!("round-{round}/{n}-{}", wire::hex(&sha256));
                store.put_hashed(&key, Hashed { content: payload, sha256 }, "application/json").await?;
            }
        }
        Ok(())
    };
    large::sync()?;
    let begun = Begun::now()?;
    stream::iter(payloads.iter().cloned().enumerate())
        .map(|(n, payload)| put(n, payload))
        .buffer_unordered(at_once)
        .try_collect::<()>()
        .await?;
    let figure = begun.end(payloads, None)?;
    store.purge("").await?;
    Ok(figure)
}

/// Reads as many rows at once as it puts payloads, and deletes each when its payload is there.
async fn from_rows(
    bench: &Bench,
    raw: &AmazonS3,
    round: usize,
    at_once: usize,
    payloads: &[Bytes],
) -> anyhow::Result<Figure> {
    let rows = Rows::fill(bench, &config_file(bench), payloads).await?;
    let put = async |place: i64| -> anyhow::Result<()> {
        let payload = PutPayload::from_bytes(rows.read(place).await?);
        raw.put(&Path::from(format!("round-{round}/{place}")), payload).await?;
        rows.delete(place).await
    };
    let begun = Begun::now()?;
    stream::iter(&rows.places).map(|place| put(*place)).buffer_unordered(at_once).try_collect::<()>().await?;
    let figure = begun.end(payloads, None)?;
    bucket::open(&[])?.purge("").await?;
    Ok(figure)
}

fn config(bench: &Bench, at_once: usize) -> anyhow::Result<String> {
    Ok(format!(
        "source: {{ url: '{}', tls: {{ mode: disable }} }}\nkafka: {{ bootstrap_servers: '{}' }}\nadmin: {{ listen: null }}\n\
         log: {{ level: warn }}\nlimits: {{ in_flight_bytes: {}MiB }}\n{}tables: [{{ name: outbox }}]\n",
        bench.url,
        bench.kafka,
        at_once + 1,
        bucket::config()?,
    ))
}

fn config_file(bench: &Bench) -> String {
    bench.folder.path().join("bench.yaml").display().to_string()
}

async fn relayed(bench: &Bench, round: usize, payloads: &[Bytes]) -> anyhow::Result<Drain> {
    let topic = bench.topic(format!("bench.claim-check.{round}")).await?;
    let file = config_file(bench);
    bench.outbox(&["--config", &file]).await?;
    large::fill(bench, &topic, payloads).await?;
    let drain = large::drain(bench, &topic, &file, payloads).await?;
    bucket::open(&[])?.purge("").await?;
    Ok(drain)
}
