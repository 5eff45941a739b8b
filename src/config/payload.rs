//! How the payloads of a table travel.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Deserialize;

use super::units;
use crate::record::encode::Codec;

/// How payloads travel; docs/large-payloads.md has the format.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Payload {
    /// What readers of a claim check are told; also the type of the object.
    pub content_type: String,
    pub encode: Encode,
    /// The largest payload in a record; auto: what the topic takes, after key, headers and overhead.
    #[serde(with = "units::size_or_auto")]
    #[schemars(with = "units::SizeOrAutoText")]
    pub inline_max: Option<usize>,
    /// A row with a larger payload is parked unread.
    #[serde(with = "units::size")]
    #[schemars(with = "units::SizeText")]
    pub max_bytes: usize,
    /// What becomes of a payload that does not fit: by default a claim check where object_store is there,
    /// else the event fails as on_failure says.
    pub oversize: Option<Oversize>,
    pub reference: Reference,
    pub chunk: Chunk,
}

impl Default for Payload {
    fn default() -> Payload {
        Payload {
            content_type: "application/json".into(),
            encode: Encode::default(),
            inline_max: None,
            max_bytes: 256 << 20,
            oversize: None,
            reference: Reference::default(),
            chunk: Chunk::default(),
        }
    }
}

/// Encoding of a single payload, apart from what Kafka does to batches.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Encode {
    pub codec: Encoding,
    /// Payloads up to this size are left as they are, as are those that do not get smaller.
    #[serde(with = "units::size")]
    #[schemars(with = "units::SizeText")]
    pub above: usize,
}

impl Default for Encode {
    fn default() -> Encode {
        Encode { codec: Encoding::None, above: 64 << 10 }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    #[default]
    None,
    Gzip,
    Zstd,
    Lz4,
    Snappy,
}

impl Encoding {
    pub fn codec(self) -> Option<Codec> {
        match self {
            Encoding::None => None,
            Encoding::Gzip => Some(Codec::Gzip),
            Encoding::Zstd => Some(Codec::Zstd),
            Encoding::Lz4 => Some(Codec::Lz4),
            Encoding::Snappy => Some(Codec::Snappy),
        }
    }
}

/// What becomes of a payload that does not fit into a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Oversize {
    /// It is put into the object store, and the record refers to it.
    ClaimCheck,
    /// It is sent in slices, as several records.
    Chunk,
    Park,
    DeadLetter,
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Reference {
    /// What tells readers that a record is a reference.
    pub dialects: BTreeSet<ReferenceDialect>,
    /// Template over columns and {topic}, {id}, {sha256}: the key of an object, below the store's prefix.
    pub key: String,
}

impl Default for Reference {
    fn default() -> Reference {
        Reference {
            dialects: [ReferenceDialect::Whippet, ReferenceDialect::Bakdata].into(),
            key: "{topic}/{id}-{sha256}".into(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReferenceDialect {
    Whippet,
    /// kafka-large-message-serde.
    Bakdata,
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Chunk {
    /// The largest chunk; auto: what the topic takes.
    #[serde(with = "units::size_or_auto")]
    #[schemars(with = "units::SizeOrAutoText")]
    pub size: Option<usize>,
    /// What tells readers which slice it is; whippet always does.
    pub dialects: BTreeSet<ChunkDialect>,
}

impl Default for Chunk {
    fn default() -> Chunk {
        Chunk { size: None, dialects: [ChunkDialect::Whippet].into() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ChunkDialect {
    Whippet,
    Silverback,
    /// The segments of li-apache-kafka-clients, version 3.
    Linkedin,
}
