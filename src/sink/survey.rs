//! What the brokers say of topics: how many partitions, what they take, and what they delete by themselves.

use std::time::Duration;

use rdkafka::{
    admin::{AdminOptions, ConfigResource, ConfigResourceResult, ResourceSpecifier},
    error::KafkaError,
    metadata::MetadataTopic,
};

use super::Settings;
use crate::config;

const WITHIN: Duration = Duration::from_secs(10);

/// The brokers, and what they have of the topics that were asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    pub brokers: usize,
    pub topics: Vec<Cleanup>,
}

/// How a topic is kept and cleaned up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cleanup {
    pub topic: String,
    pub partitions: usize,
    pub replicas: usize,
    /// Of its replicas, so many have to have a record before it is acknowledged.
    pub min_in_sync: Option<usize>,
    pub max_message_bytes: Option<usize>,
    /// How long it keeps its records; `None`: for ever.
    pub keeps_for: Option<Duration>,
    /// Whether it keeps only the last record of a key.
    pub compacted: bool,
}

/// Where a topic is.
struct Placed {
    name: String,
    partitions: usize,
    replicas: usize,
}

impl Placed {
    fn of(topic: &MetadataTopic) -> Placed {
        let partitions = topic.partitions();
        Placed {
            name: topic.name().to_owned(),
            partitions: partitions.len(),
            replicas: partitions.iter().map(|one| one.replicas().len()).min().unwrap_or(0),
        }
    }
}

/// Asks for the topics whose names are `wanted`, of those that there are.
pub async fn survey(kafka: &config::Kafka, wanted: impl Fn(&str) -> bool) -> Result<Survey, KafkaError> {
    let admin = Settings::of(kafka).admin()?;
    // librdkafka waits in this call.
    let (admin, metadata) = tokio::task::spawn_blocking(move || {
        let metadata = admin.inner().fetch_metadata(None, WITHIN);
        (admin, metadata)
    })
    .await
    .map_err(|_| KafkaError::Canceled)?;
    let metadata = metadata?;
    let topics = metadata.topics().iter();
    let topics = topics.filter(|topic| topic.error().is_none() && wanted(topic.name()));
    let topics: Vec<Placed> = topics.map(Placed::of).collect();
    let brokers = metadata.brokers().len();
    drop(metadata);
    let mut found = Vec::new();
    for topics in topics.chunks(500) {
        let resources: Vec<ResourceSpecifier<'_>> =
            topics.iter().map(|topic| ResourceSpecifier::Topic(&topic.name)).collect();
        let options = AdminOptions::new().request_timeout(Some(WITHIN));
        let answers = admin.describe_configs(&resources, &options).await?;
        // A topic that we may not ask about is left out.
        let known = topics.iter().zip(answers);
        let told = |answer: ConfigResourceResult| answer.ok().filter(|config| !config.entries.is_empty());
        found.extend(known.filter_map(|(topic, answer)| Some(of(topic, &told(answer)?))));
    }
    Ok(Survey { brokers, topics: found })
}

/// A negative `retention.ms` is for ever, and so is the last record of a key in a compacted topic.
fn of(topic: &Placed, config: &ConfigResource) -> Cleanup {
    let value = |name: &str| config.get(name).and_then(|entry| entry.value.as_deref());
    let policy = value("cleanup.policy").unwrap_or("delete");
    let ms = value("retention.ms").and_then(|ms| ms.parse().ok());
    let number = |name: &str| value(name).and_then(|value| value.parse().ok());
    Cleanup {
        topic: topic.name.clone(),
        partitions: topic.partitions,
        replicas: topic.replicas,
        min_in_sync: number("min.insync.replicas"),
        max_message_bytes: number("max.message.bytes"),
        keeps_for: ms.filter(|_| policy.contains("delete")).map(Duration::from_millis),
        compacted: policy.contains("compact"),
    }
}
