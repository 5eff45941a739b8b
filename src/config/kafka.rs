//! `kafka`: where events go, and how often one may be seen there.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Secret, units};
use crate::kafka_token::TokenFrom;

/// Where events go.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    /// host:port, comma-separated.
    pub bootstrap_servers: String,
    /// How often an event is published, at most, as readers with isolation.level=read_committed see it.
    #[serde(default)]
    pub delivery: Delivery,
    /// exactly_once: how many relays share the polled tables, at most. Each has transactional ids, and two producers;
    /// others stand by.
    #[serde(default = "Kafka::eos_units")]
    #[schemars(range(min = 1, max = 64))]
    pub eos_units: u16,
    /// exactly_once: where it is noted, in the transactions of the events, what is published. Compacted,
    /// one partition; relays may share it.
    #[serde(default = "Kafka::position_topic")]
    pub position_topic: String,
    /// How long a batch waits for more records.
    #[serde(default = "Kafka::linger", with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub linger: Duration,
    #[serde(default)]
    pub compression: Compression,
    /// What to do about a topic that is missing.
    #[serde(default)]
    pub create_topics: CreateTopics,
    /// librdkafka's own properties, such as security.protocol; one that would break a guarantee is
    /// refused.
    #[serde(default)]
    pub properties: BTreeMap<String, Secret>,
    /// With sasl.mechanisms: OAUTHBEARER. Holds a token; looked at every second.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// With sasl.mechanisms: OAUTHBEARER. A program and its arguments, which prints a token; run again well before that
    /// one ends.
    #[serde(default)]
    pub token_command: Vec<String>,
}

impl Kafka {
    /// Where the tokens of its clients come from, if they have any that librdkafka does not make.
    pub fn token_from(&self) -> Option<TokenFrom> {
        match (&self.token_file, self.token_command.as_slice()) {
            (Some(file), _) => Some(TokenFrom::File(file.clone())),
            (None, []) => None,
            (None, command) => Some(TokenFrom::Command(command.to_vec())),
        }
    }

    fn linger() -> Duration {
        Duration::from_millis(1)
    }

    fn eos_units() -> u16 {
        4
    }

    fn position_topic() -> String {
        "whippet.positions".into()
    }
}

/// How often an event may be seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    #[default]
    AtLeastOnce,
    ExactlyOnce,
}

/// Topics are made only where this says so.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateTopics {
    pub enabled: bool,
    #[schemars(range(min = 1, max = 100_000))]
    pub partitions: i32,
    #[schemars(range(min = 1, max = 1000))]
    pub replication_factor: i32,
}

impl Default for CreateTopics {
    fn default() -> CreateTopics {
        CreateTopics { enabled: false, partitions: 12, replication_factor: 3 }
    }
}

/// Of each Kafka batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    None,
    #[default]
    Lz4,
    Zstd,
    Snappy,
    Gzip,
}

impl Compression {
    /// As librdkafka names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Compression::None => "none",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
            Compression::Snappy => "snappy",
            Compression::Gzip => "gzip",
        }
    }
}
