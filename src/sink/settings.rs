//! What the Kafka clients are made from: what the user set, and what the guarantees ask for.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use rdkafka::{
    ClientConfig, admin::AdminClient, client::DefaultClientContext, config::RDKafkaLogLevel,
    error::KafkaError,
};

use super::Unit;
use crate::{
    config::{self, CreateTopics, Secret},
    kafka_token::{Fed, Tokens},
};

pub(super) type Admin = Fed<AdminClient<DefaultClientContext>>;

/// What the producers are made from.
#[derive(Clone, Debug)]
pub struct Settings {
    pub bootstrap_servers: String,
    pub linger: Duration,
    pub compression: String,
    /// The relay's window, in events; librdkafka's own queue is never the limit.
    pub in_flight_events: usize,
    /// Exactly once: the topic that has the positions.
    pub position_topic: Option<String>,
    pub create_topics: CreateTopics,
    /// librdkafka properties of the user; `config` has refused those that break a guarantee.
    pub properties: BTreeMap<String, Secret>,
    /// What the clients log in with, where it is neither a property nor made by librdkafka.
    pub tokens: Option<Arc<Tokens>>,
}

impl Settings {
    /// As the configuration has them, for one who looks and publishes nothing.
    pub fn of(kafka: &config::Kafka) -> Settings {
        Settings {
            bootstrap_servers: kafka.bootstrap_servers.clone(),
            linger: kafka.linger,
            compression: kafka.compression.as_str().to_owned(),
            in_flight_events: 1,
            position_topic: None,
            create_topics: kafka.create_topics.clone(),
            properties: kafka.properties.clone(),
            tokens: kafka.token_from().map(Tokens::of),
        }
    }

    pub(super) fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        if tracing::enabled!(tracing::Level::DEBUG) {
            config.set_log_level(RDKafkaLogLevel::Debug);
        }
        // Defaults that the user may change come first, then the user's, then what is ours.
        config
            .set("client.id", "whippet")
            .set("socket.keepalive.enable", "true")
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "2000")
            .set("topic.metadata.refresh.interval.ms", "5000");
        for (name, value) in &self.properties {
            config.set(name, value.expose_now());
        }
        config.set("bootstrap.servers", &self.bootstrap_servers).set("allow.auto.create.topics", "false");
        config
    }

    /// One that only asks.
    pub(super) fn admin(&self) -> Result<Admin, KafkaError> {
        let admin: AdminClient<DefaultClientContext> = self.client().create()?;
        Ok(Fed::new(self.tokens.as_ref(), admin, AdminClient::inner))
    }

    pub(super) fn producer(&self, unit: Unit, batch_bytes: usize) -> ClientConfig {
        let mut config = self.client();
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            // A refused batch makes the producer fatal instead of leaving a gap that later
            // records of the same key would pass through. A suspect has nothing behind it.
            .set("enable.gapless.guarantee", (unit == Unit::Main).to_string())
            // Keys land where Java producers put them.
            .set("partitioner", "murmur2_random")
            // An expired message would let later ones pass: never. The stall has its own alarm.
            .set("message.timeout.ms", "0")
            .set("compression.type", &self.compression)
            .set("linger.ms", (self.linger.as_secs_f64() * 1e3).to_string())
            .set("batch.num.messages", "10000")
            .set("batch.size", batch_bytes.to_string())
            // The topic's limit decides, not the client's: refused early by the relay, and by the
            // broker where the limit changed since.
            .set("message.max.bytes", "1000000000")
            // The relay's window is the limit of what is queued, so this queue is never full.
            .set("queue.buffering.max.messages", (2 * self.in_flight_events).max(10_000).to_string())
            .set("queue.buffering.max.kbytes", "2097151")
            // See `Statistics` of `client`.
            .set("statistics.interval.ms", "5000");
        config
    }
}
