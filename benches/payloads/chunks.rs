//! 100 payloads of 5 MiB, from their rows in PostgreSQL to chunks in Kafka, against a loop that produces the
//! same bytes from memory, in records of the same sizes and with the same settings of the client. Both until
//! a consumer has everything. And against a loop that does what the format asks for, in the relay's window; and against the
//! simplest program that does what the relay is there for: reads the rows by the driver, produces their payloads and deletes
//! them. As that, the relay reads from its database without TLS.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use rdkafka::{
    error::RDKafkaErrorCode,
    message::{Header, OwnedHeaders},
    producer::{BaseRecord, Producer as _},
};
use whippet::record::wire;

use crate::{
    common::{self, Bench, Shape, next, on_thread},
    large::{self, Begun, Drain, Figure, Rows},
};

/// The relay's window, unless its configuration says otherwise.
const WINDOW_KIB: usize = 12 << 10;

const SHAPE: Shape = Shape { rows: 100, payload: 5 << 20, partitions: 6, text: false, fetch_wait: "500" };

pub async fn run(rounds: usize) -> anyhow::Result<()> {
    let bench = Bench::new(SHAPE).await?;
    let payloads = large::payloads(SHAPE.rows, SHAPE.payload);
    std::fs::write(config_file(&bench), config(&bench))?;
    // It knows how large a chunk is.
    let slice = relayed(&bench, 0, &payloads).await?.value_bytes;
    let sides = [large::RELAY, RAWS[0].0, RAWS[1].0, RAWS[2].0];
    let mut runs = 0;
    let run = async |side: usize| {
        runs += 1;
        let Some((_, raw)) = side.checked_sub(1).map(|side| RAWS[side]) else {
            return Ok(relayed(&bench, runs, &payloads).await?.figure);
        };
        let topic = bench.topic(format!("bench.raw-chunks.{runs}")).await?;
        let figure = produce(&bench, &topic, slice, raw, &payloads).await?;
        bench.delete_topic(&topic).await?;
        Ok(figure)
    };
    let database = async || large::database(&bench, &config_file(&bench), &payloads).await;
    let done = large::rounds(rounds, &sides, run, database).await?;
    println!(
        "\nchunks, medians of {rounds} rounds (least to most), {} payloads of {} bytes in slices of {slice}:",
        SHAPE.rows, SHAPE.payload
    );
    large::print(&done)?;
    bench.end().await
}

fn config(bench: &Bench) -> String {
    format!(
        "source: {{ url: '{}', tls: {{ mode: disable }} }}\nkafka: {{ bootstrap_servers: '{}' }}\nadmin: {{ listen: null }}\n\
         log: {{ level: warn }}\ntables: [{{ name: outbox, payload: {{ oversize: chunk }} }}]\n",
        bench.url, bench.kafka,
    )
}

fn config_file(bench: &Bench) -> String {
    bench.folder.path().join("bench.yaml").display().to_string()
}

/// What the loop without the relay does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Raw {
    Produces,
    /// And hashes each payload, as the format asks for, and queues no more than the relay's window has.
    AsAsked,
    /// Reads each payload from its row, two at once, and deletes that once its slices are queued.
    FromRows,
}

const RAWS: [(&str, Raw); 3] = [
    ("raw rdkafka", Raw::Produces),
    ("the same, as the format asks", Raw::AsAsked),
    ("raw rdkafka, from the rows", Raw::FromRows),
];

async fn produce(
    bench: &Bench,
    topic: &str,
    slice: usize,
    raw: Raw,
    payloads: &[Bytes],
) -> anyhow::Result<Figure> {
    let queue = if raw == Raw::Produces { common::QUEUE_KIB } else { WINDOW_KIB };
    let rows = match raw {
        Raw::FromRows => Some(Rows::fill(bench, &config_file(bench), payloads).await?),
        _ => None,
    };
    large::sync()?;
    let (consumer, producer) = (bench.consumer(topic)?, bench.producer(queue)?);
    // As in the relay's part, connecting is over when the clock starts.
    producer.send(BaseRecord::to(topic).key("small").payload("small")).map_err(|(error, _)| error)?;
    producer.flush(Duration::from_mins(1))?;
    let records = 1 + payloads.iter().map(|payload| payload.len().div_ceil(slice)).sum::<usize>();
    let begun = Begun::now()?;
    let consumed = on_thread(move || {
        for seen in 0..records {
            next(&consumer, seen, records)?;
        }
        Ok(Instant::now())
    });
    let send = |n: usize, payload: &Bytes| -> anyhow::Result<()> {
        let key = large::key(n);
        let hash = if raw == Raw::AsAsked { wire::hex(&wire::sha256(payload)) } else { String::new() };
        for slice in payload.chunks(slice) {
            let headers = Header { key: wire::CHUNK_SHA256, value: Some(&hash) };
            let headers = OwnedHeaders::new().insert(headers);
            let mut record = BaseRecord::to(topic).key(&key).payload(slice).headers(headers);
            while let Err((error, refused)) = producer.send(record) {
                anyhow::ensure!(error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull), error);
                std::thread::sleep(Duration::from_micros(100));
                record = refused;
            }
        }
        Ok(())
    };
    match &rows {
        None => payloads.iter().enumerate().try_for_each(|(n, payload)| send(n, payload))?,
        Some(rows) => {
            let read = stream::iter(rows.places.iter().enumerate())
                .map(async |(n, place)| anyhow::Ok((n, *place, rows.read(*place).await?)))
                .buffered(2);
            let queued = read.and_then(async |(n, place, payload)| {
                tokio::task::block_in_place(|| send(n, &payload))?;
                Ok(rows.delete(place))
            });
            queued.try_buffer_unordered(2).try_collect::<()>().await?;
        }
    }
    producer.flush(Duration::from_mins(1))?;
    let end = consumed.await?;
    begun.end(payloads, Some(end))
}

async fn relayed(bench: &Bench, round: usize, payloads: &[Bytes]) -> anyhow::Result<Drain> {
    let topic = bench.topic(format!("bench.chunks.{round}")).await?;
    let file = config_file(bench);
    bench.outbox(&["--config", &file]).await?;
    large::fill(bench, &topic, payloads).await?;
    let drain = large::drain(bench, &topic, &file, payloads).await?;
    bench.delete_topic(&topic).await?;
    Ok(drain)
}
