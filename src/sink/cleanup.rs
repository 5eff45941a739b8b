//! What the brokers delete of topics by themselves: old records, or all of a key but the last.

use std::time::Duration;

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, ConfigResource, ResourceSpecifier},
    client::DefaultClientContext,
    error::KafkaError,
};

use crate::config;

const WITHIN: Duration = Duration::from_secs(10);

/// How a topic is cleaned up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cleanup {
    pub topic: String,
    /// How long it keeps its records; `None`: for ever.
    pub keeps_for: Option<Duration>,
    /// Whether it keeps only the last record of a key.
    pub compacted: bool,
}

/// How the topics are cleaned up whose names are `wanted`, of those that there are.
pub async fn cleanup(
    kafka: &config::Kafka,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<Cleanup>, KafkaError> {
    let mut client = ClientConfig::new();
    for (name, value) in &kafka.properties {
        client.set(name, value.expose());
    }
    client.set("bootstrap.servers", &kafka.bootstrap_servers).set("allow.auto.create.topics", "false");
    let admin: AdminClient<DefaultClientContext> = client.create()?;
    // librdkafka waits in this call.
    let (admin, metadata) = tokio::task::spawn_blocking(move || {
        let metadata = admin.inner().fetch_metadata(None, WITHIN);
        (admin, metadata)
    })
    .await
    .map_err(|_| KafkaError::Canceled)?;
    let metadata = metadata?;
    let names: Vec<&str> =
        metadata.topics().iter().map(|topic| topic.name()).filter(|name| wanted(name)).collect();
    let mut found = Vec::new();
    for names in names.chunks(500) {
        let resources: Vec<ResourceSpecifier<'_>> =
            names.iter().map(|name| ResourceSpecifier::Topic(name)).collect();
        let options = AdminOptions::new().request_timeout(Some(WITHIN));
        let answers = admin.describe_configs(&resources, &options).await?;
        // A topic that we may not ask about is left out.
        let known = names.iter().zip(answers);
        found.extend(known.filter_map(|(name, answer)| Some(of(name, &answer.ok()?))));
    }
    Ok(found)
}

/// A negative `retention.ms` is for ever, and so is the last record of a key in a compacted topic.
fn of(name: &str, topic: &ConfigResource) -> Cleanup {
    let value = |name: &str| topic.get(name).and_then(|entry| entry.value.as_deref());
    let policy = value("cleanup.policy").unwrap_or("delete");
    let ms = value("retention.ms").and_then(|ms| ms.parse().ok());
    Cleanup {
        topic: name.to_owned(),
        keeps_for: ms.filter(|_| policy.contains("delete")).map(Duration::from_millis),
        compacted: policy.contains("compact"),
    }
}
