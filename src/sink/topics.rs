//! Whether a topic is there and what it takes; makes one that is not.

use std::{sync::Arc, time::Duration};

use rdkafka::{
    admin::{AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    error::RDKafkaErrorCode,
};
use tracing::info;

use super::{Takes, TopicFacts, code_of, settings::Admin};
use crate::config::CreateTopics;

/// How long an answer about what a topic takes is waited for. Without one the broker itself refuses
/// what is too large, which is dearer and as safe.
const LIMIT_WITHIN: Duration = Duration::from_millis(500);

pub(super) async fn look_up(
    admin: &Arc<Admin>,
    topic: String,
    create: &CreateTopics,
    within: Duration,
) -> Result<TopicFacts, RDKafkaErrorCode> {
    let (asking, name) = (admin.clone(), topic.clone());
    let counted = tokio::task::spawn_blocking(move || partition_count(&asking, &name, within));
    let partitions = match counted.await.unwrap_or(Err(RDKafkaErrorCode::Fail)) {
        Err(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) if create.enabled => {
            create_topic(admin, &topic, create, within).await?;
            create.partitions
        }
        answer => answer?,
    };
    let takes = takes(admin, &topic, within.min(LIMIT_WITHIN)).await;
    Ok(TopicFacts { partitions, takes })
}

pub(super) fn partition_count(admin: &Admin, topic: &str, within: Duration) -> Result<i32, RDKafkaErrorCode> {
    let metadata = admin.inner().fetch_metadata(Some(topic), within).map_err(|error| code_of(&error))?;
    let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else {
        return Err(RDKafkaErrorCode::UnknownTopicOrPartition);
    };
    match found.error() {
        Some(error) => Err(error.into()),
        None if found.partitions().is_empty() => Err(RDKafkaErrorCode::UnknownTopicOrPartition),
        None => Ok(i32::try_from(found.partitions().len()).unwrap_or(i32::MAX)),
    }
}

async fn create_topic(
    admin: &Admin,
    topic: &str,
    create: &CreateTopics,
    within: Duration,
) -> Result<(), RDKafkaErrorCode> {
    let new = NewTopic::new(topic, create.partitions, TopicReplication::Fixed(create.replication_factor));
    make_topic(admin, new, within).await
}

pub(super) async fn make_topic(
    admin: &Admin,
    new: NewTopic<'_>,
    within: Duration,
) -> Result<(), RDKafkaErrorCode> {
    let (topic, partitions) = (new.name, new.num_partitions);
    // Until the controller has answered: the topic is to be used next.
    let options = AdminOptions::new().request_timeout(Some(within)).operation_timeout(Some(within));
    match admin.create_topics([&new], &options).await.map_err(|error| code_of(&error))?.pop() {
        // Somebody was quicker: it is asked about again, and has its own number of partitions.
        Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => {
            Err(RDKafkaErrorCode::UnknownTopicOrPartition)
        }
        Some(Err((_, error))) => Err(error),
        _ => {
            info!(topic, partitions, "created the kafka topic");
            Ok(())
        }
    }
}

/// What the topic takes; `None` where no answer came in time, or we may not ask, or the broker does not know it.
async fn takes(admin: &Admin, topic: &str, within: Duration) -> Option<Takes> {
    let options = AdminOptions::new().request_timeout(Some(within));
    let answers = admin.describe_configs([&ResourceSpecifier::Topic(topic)], &options).await;
    let resource = answers.ok()?.into_iter().next()?.ok()?;
    let value = |name| resource.get(name).and_then(|entry| entry.value.as_deref());
    // One that we may not ask about comes without any.
    let policy = value("cleanup.policy")?;
    Some(Takes {
        max_message_bytes: value("max.message.bytes").and_then(|value| value.parse().ok()),
        compacted: policy.contains("compact"),
    })
}
