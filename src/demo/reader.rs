//! The consumer that reads everything back: the kit, as an application would use it.

use std::{collections::BTreeMap, future::ready, time::Instant};

use tokio_util::sync::CancellationToken;

use super::{CLICKS, CONTRACTS, ORDERS, Shared, lock};
use crate::{
    consume::{Consumer, Event, Settings, Start, Travelled},
    record::wire,
    store::Store,
};

/// An event as the kit handed it over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    pub event: Event,
    /// Of the payload, where it did not fit into a record.
    pub sha256: Option<String>,
    pub at: Instant,
}

impl Received {
    fn new(event: Event) -> Received {
        let at = Instant::now();
        let large = event.payload.as_ref().filter(|_| event.travelled != Travelled::Inline);
        let sha256 = large.map(|payload| wire::hex(&wire::sha256(payload)));
        Received { event, sha256, at }
    }

    pub fn id(&self) -> &str {
        self.event.id().unwrap_or_default()
    }

    pub fn key(&self) -> &[u8] {
        self.event.key.as_deref().unwrap_or_default()
    }

    pub fn payload(&self) -> &[u8] {
        self.event.payload.as_deref().unwrap_or_default()
    }
}

pub async fn open(broker: &str, store: Option<Store>) -> anyhow::Result<Consumer> {
    let properties = BTreeMap::from([("fetch.wait.max.ms".to_owned(), "10".to_owned())]);
    let settings = Settings {
        start: Start::Beginning,
        properties,
        ..Settings::new(broker, &[ORDERS.topic, CONTRACTS.topic, CLICKS.topic])
    };
    Ok(Consumer::open(&settings, store).await?)
}

/// Reads until `stop`, or until something cannot be read.
pub async fn run(mut consumer: Consumer, shared: Shared, stop: CancellationToken) {
    let take = |event: Event| lock(&shared).received.push(Received::new(event));
    if let Err(error) = consumer.run(&stop, |event| ready(event.map(take))).await {
        lock(&shared).unread = Some(error.to_string());
    }
}
