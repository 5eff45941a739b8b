//! A service that reads events of any size and produces because of them, at least once.
//!
//! ```sh
//! cargo run --example consume -- localhost:9092 orders billing file:///var/lib/payloads
//! ```

use std::collections::BTreeMap;

use rdkafka::{
    ClientConfig,
    message::OwnedHeaders,
    producer::{FutureProducer, FutureRecord},
    util::Timeout,
};
use tokio_util::sync::CancellationToken;
use whippet::{
    consume::{Consumer, Event, ReadError, Settings, Start},
    store::Store,
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [servers, topic, group, url] = arguments.as_slice() else {
        anyhow::bail!("expected: SERVERS TOPIC GROUP STORE");
    };
    // References are followed to this store, and to no other.
    let store = Store::open(url, &BTreeMap::new())?;
    let mut settings = Settings::new(servers, &[topic]).group(group);
    settings.start = Start::Beginning;
    let producer: FutureProducer =
        ClientConfig::new().set("bootstrap.servers", servers).set("enable.idempotence", "true").create()?;

    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::signal::ctrl_c().await.ok();
        stopping.cancel();
    });
    let mut consumer = Consumer::open(&settings, Some(store)).await?;
    // An event is committed once `handle` has returned; an error ends the service, and the event comes again.
    consumer.run(&stop, |event| handle(event, &producer)).await?;
    Ok(())
}

async fn handle(event: Result<Event, ReadError>, producer: &FutureProducer) -> anyhow::Result<()> {
    let event = match event {
        Ok(event) => event,
        // This one is passed over, and said. Whoever must not miss it returns the error.
        Err(error) => {
            eprintln!("not read: {error}");
            return Ok(());
        }
    };
    let size = event.payload.as_ref().map_or(0, |payload| payload.len());
    println!("{} {}: {size} bytes", event.place, event.kind().unwrap_or("event"));
    // What is produced because of this event belongs to the same request.
    let context: OwnedHeaders = event.headers.onward().into();
    let answer = format!("seen {}", event.id().unwrap_or("?"));
    let key = event.key.as_deref().unwrap_or_default();
    let record = FutureRecord::to("seen").key(key).payload(&answer).headers(context);
    producer.send(record, Timeout::Never).await.map_err(|(error, _)| error)?;
    Ok(())
}
