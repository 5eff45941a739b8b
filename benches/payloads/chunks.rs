//! 100 payloads of 5 MiB, from their rows in PostgreSQL to chunks in Kafka, against a loop that produces the
//! same bytes from memory, in records of the same sizes and with the same settings of the client. Both until
//! a consumer has everything.

use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::producer::{BaseRecord, Producer as _};

use crate::{
    common::{Bench, Shape, next, on_thread},
    large::{self, Drain, Figure},
};

const SHAPE: Shape = Shape { rows: 100, payload: 5 << 20, partitions: 6, text: false, fetch_wait: "500" };

pub async fn run(rounds: usize) -> anyhow::Result<()> {
    let bench = Bench::new(SHAPE).await?;
    let payloads = large::payloads(SHAPE.rows, SHAPE.payload);
    let (mut figures, mut drains) = (Vec::<Figure>::new(), Vec::<Drain>::new());
    for round in 1..=rounds {
        // Neither is always the first, once the size of a chunk is known.
        let (figure, drain) = match drains.last() {
            Some(before) if round % 2 == 0 => {
                let figure = raw(&bench, round, before.value_bytes, &payloads).await?;
                (figure, relayed(&bench, round, &payloads).await?)
            }
            _ => {
                let drain = relayed(&bench, round, &payloads).await?;
                (raw(&bench, round, drain.value_bytes, &payloads).await?, drain)
            }
        };
        large::print_round(round, "raw rdkafka", figure, drain);
        figures.push(figure);
        drains.push(drain);
    }
    println!(
        "\nchunks, medians of {rounds} interleaved rounds, {} payloads of {} bytes in slices of {}:",
        SHAPE.rows,
        SHAPE.payload,
        drains.last().map_or(0, |drain| drain.value_bytes)
    );
    large::print("raw rdkafka", &figures, &drains);
    bench.end().await
}

async fn raw(bench: &Bench, round: usize, slice: usize, payloads: &[Bytes]) -> anyhow::Result<Figure> {
    let topic = bench.topic(format!("bench.raw-chunks.{round}")).await?;
    let (consumer, producer) = (bench.consumer(&topic)?, bench.producer()?);
    // As in the relay's part, connecting is over when the clock starts.
    producer.send(BaseRecord::to(&topic).key("small").payload("small")).map_err(|(error, _)| error)?;
    producer.flush(Duration::from_mins(1))?;
    let records = 1 + payloads.iter().map(|payload| payload.len().div_ceil(slice)).sum::<usize>();
    let (begin, cpu) = (Instant::now(), large::cpu_seconds()?);
    let consumed = on_thread(move || {
        for seen in 0..records {
            next(&consumer, seen, records)?;
        }
        Ok(Instant::now())
    });
    for (n, payload) in payloads.iter().enumerate() {
        let key = large::key(n);
        for slice in payload.chunks(slice) {
            let record = BaseRecord::to(&topic).key(&key).payload(slice);
            producer.send(record).map_err(|(error, _)| error)?;
        }
    }
    producer.flush(Duration::from_mins(1))?;
    let took = consumed.await?.saturating_duration_since(begin);
    let figure = Figure::new(payloads, took, large::cpu_seconds()? - cpu);
    bench.delete_topic(&topic).await?;
    Ok(figure)
}

async fn relayed(bench: &Bench, round: usize, payloads: &[Bytes]) -> anyhow::Result<Drain> {
    let topic = bench.topic(format!("bench.chunks.{round}")).await?;
    let file = bench.folder.path().join("bench.yaml").display().to_string();
    let config = format!(
        "source: {{ url: '{}' }}\nkafka: {{ bootstrap_servers: '{}' }}\nadmin: {{ listen: null }}\n\
         log: {{ level: warn }}\ntables: [{{ name: outbox, payload: {{ oversize: chunk }} }}]\n",
        bench.url, bench.kafka,
    );
    std::fs::write(&file, config)?;
    bench.outbox(&["--config", &file]).await?;
    large::fill(bench, &topic, payloads).await?;
    let drain = large::drain(bench, &topic, &file, payloads).await?;
    bench.delete_topic(&topic).await?;
    Ok(drain)
}
