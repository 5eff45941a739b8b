//! 500 payloads of 1 MiB, from their rows in PostgreSQL to records in Kafka that refer to them, against the
//! same puts from memory straight through `object_store`, as many at once as the relay's window has.

use std::time::Instant;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{ObjectStoreExt as _, PutPayload, aws::AmazonS3, path::Path};

use crate::{
    bucket,
    common::{Bench, Shape},
    large::{self, Drain, Figure},
};

const SHAPE: Shape = Shape { rows: 500, payload: 1 << 20, partitions: 6, text: false, fetch_wait: "500" };

pub async fn run(rounds: usize, at_once: usize) -> anyhow::Result<()> {
    bucket::make().await?;
    let (bench, raw) = (Bench::new(SHAPE).await?, bucket::raw()?);
    let payloads = large::payloads(SHAPE.rows, SHAPE.payload);
    let (mut figures, mut drains) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        let straight = straight(&raw, round, at_once, &payloads);
        let relayed = relayed(&bench, round, at_once, &payloads);
        // Neither is always the first.
        let (figure, drain) = if round % 2 == 0 {
            let figure = straight.await?;
            (figure, relayed.await?)
        } else {
            let drain = relayed.await?;
            (straight.await?, drain)
        };
        large::print_round(round, "object_store", figure, drain);
        figures.push(figure);
        drains.push(drain);
    }
    println!(
        "\nclaim check, medians of {rounds} interleaved rounds, {} payloads of {} bytes, {at_once} at once:",
        SHAPE.rows, SHAPE.payload
    );
    large::print("object_store", &figures, &drains);
    bench.end().await
}

async fn straight(
    raw: &AmazonS3,
    round: usize,
    at_once: usize,
    payloads: &[Bytes],
) -> anyhow::Result<Figure> {
    let put = async |n: usize, payload: Bytes| -> anyhow::Result<()> {
        let key = Path::from(format!("round-{round}/{n}"));
        raw.put(&key, PutPayload::from_bytes(payload)).await?;
        Ok(())
    };
    let (begin, cpu) = (Instant::now(), large::cpu_seconds()?);
    stream::iter(payloads.iter().cloned().enumerate())
        .map(|(n, payload)| put(n, payload))
        .buffer_unordered(at_once)
        .try_collect::<()>()
        .await?;
    let figure = Figure::new(payloads, begin.elapsed(), large::cpu_seconds()? - cpu);
    bucket::open(&[])?.purge("").await?;
    Ok(figure)
}

async fn relayed(bench: &Bench, round: usize, at_once: usize, payloads: &[Bytes]) -> anyhow::Result<Drain> {
    let topic = bench.topic(format!("bench.claim-check.{round}")).await?;
    let file = bench.folder.path().join("bench.yaml").display().to_string();
    let config = format!(
        "source: {{ url: '{}' }}\nkafka: {{ bootstrap_servers: '{}' }}\nadmin: {{ listen: null }}\n\
         log: {{ level: warn }}\nlimits: {{ in_flight_bytes: {}MiB }}\n{}tables: [{{ name: outbox }}]\n",
        bench.url,
        bench.kafka,
        at_once + 1,
        bucket::config()?,
    );
    std::fs::write(&file, config)?;
    bench.outbox(&["--config", &file]).await?;
    large::fill(bench, &topic, payloads).await?;
    let drain = large::drain(bench, &topic, &file, payloads).await?;
    bucket::open(&[])?.purge("").await?;
    Ok(drain)
}
