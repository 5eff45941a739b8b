//! The consumer kit: events as they were written, whatever size they have and however they travelled.
//!
//! A record may be the payload, a reference to an object, or one slice of many, encoded or not, and
//! any of them may come again. This is the mirror image of `record`; docs/large-payloads.md is the
//! format between the two. Three layers, each of use without the next:
//!
//! - [`Reader`] is pure: records in, events out, in memory that is bounded. It says which object it
//!   needs and which offsets are safe to commit.
//! - [`Consumer`] is a Kafka consumer with a [`Reader`] and an object store around it, for at-least-once
//!   processing with commits by hand.
//! - `whippet consume` prints what a [`Consumer`] hands over.
//!
//! ```no_run
//! use whippet::{consume::{Consumer, Settings}, store::Store};
//!
//! # async fn example() -> anyhow::Result<()> {
//! let store = Store::open("s3://payloads/prod", &[("region".into(), "eu-west-1".into())].into())?;
//! let settings = Settings::new("kafka:9092", &["orders"]).group("billing");
//! let mut consumer = Consumer::open(&settings, Some(store)).await?;
//! loop {
//!     let event = consumer.recv().await?;
//!     // What is produced because of this event carries its request context on; `Onward` filters it, and
//!     // traces what is done.
//!     let _headers: rdkafka::message::OwnedHeaders = event.headers.onward().into();
//!     consumer.done(&event.place);
//!     consumer.commit().await?;
//! }
//! # }
//! ```
//!
//! What is handed over is right, or it is an error: sizes and checksums are looked at before, and limits
//! are kept while bytes are fetched, joined and decoded. An error has a [`Place`] as an event has one, and
//! holds the commits back there until it is [`done`](Consumer::done) too; so nothing is passed over silently.

mod chunks;
mod consumer;
mod error;
mod headers;
mod onward;
mod progress;
mod reader;
mod seen;
mod shape;
#[cfg(test)]
mod tests;
mod unfold;

use std::{fmt, sync::Arc};

use bytes::Bytes;

pub use self::{
    consumer::{Consumer, OpenError, RecvError, RunError, Settings, Start},
    error::{Problem, ReadError},
    headers::Headers,
    onward::{Onward, Work},
    reader::{Fetch, Reader, Step},
};
pub use crate::kafka_token::TokenFrom;

/// What a reader takes at most, and how much it remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest payload, encoded or not, in bytes.
    pub payload_bytes: usize,
    /// The memory of all incomplete sets of chunks together, in bytes; a set counts in full from its
    /// first chunk on.
    pub chunk_bytes: usize,
    /// Incomplete sets of chunks.
    pub chunk_sets: usize,
    /// How many offsets after its last chunk a set is given up. The default is the default window of a relay:
    /// no more of its events lie between the chunks of one.
    pub chunk_gap: i64,
    /// The ids that are remembered of each partition, to drop repeats; about 50 bytes each.
    pub remembered_ids: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            payload_bytes: 256 << 20,
            chunk_bytes: 512 << 20,
            chunk_sets: 10_000,
            chunk_gap: 100_000,
            remembered_ids: 100_000,
        }
    }
}

/// A record as Kafka has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    pub topic: Arc<str>,
    pub partition: i32,
    pub offset: i64,
    /// Milliseconds since the Unix epoch.
    pub timestamp_ms: Option<i64>,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    pub headers: Headers,
}

/// An event as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub place: Place,
    pub timestamp_ms: Option<i64>,
    pub key: Option<Bytes>,
    /// `None` is a tombstone.
    pub payload: Option<Bytes>,
    /// How the payload is still encoded, where the application did that itself, in a way that
    /// this reader does not know (`content-encoding: br`).
    pub still_encoded: Option<String>,
    /// As they came; those of a chunked event are those of its last chunk to come. What was folded up in one
    /// header, or is the context of a CloudEvent, is laid open.
    pub headers: Headers,
    pub travelled: Travelled,
}

impl Event {
    /// The event's id, which repeats share.
    pub fn id(&self) -> Option<&str> {
        self.headers.text(crate::record::wire::ID).or_else(|| self.headers.text("ce_id"))
    }

    /// The event's type.
    pub fn kind(&self) -> Option<&str> {
        self.headers.text("eventType").or_else(|| self.headers.text("ce_type"))
    }
}

/// How a payload came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Travelled {
    Inline,
    Reference,
    Chunks(u32),
}

impl Travelled {
    pub fn name(self) -> &'static str {
        match self {
            Travelled::Inline => "inline",
            Travelled::Reference => "reference",
            Travelled::Chunks(_) => "chunks",
        }
    }
}

/// Where an event, or what should have been one, lies in Kafka.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    pub topic: Arc<str>,
    pub partition: i32,
    /// The offset of its first record: while the event is not done, nothing from here on is committed.
    pub first: i64,
    /// The offset of the record that completed it.
    pub last: i64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}] at offset {}", self.topic, self.partition, self.first)?;
        if self.last == self.first { Ok(()) } else { write!(f, " to {}", self.last) }
    }
}
