//! The brokers, and the topics that tables name.

use rdkafka::error::KafkaError;

use super::{Finding, Fix, Pattern};
use crate::{
    config::{Config, Order, Table},
    sink::{Cleanup, Survey},
};

const BROKERS: &str = "kafka: brokers";
const TOPICS: &str = "kafka: topics";
/// What a record has beside payload and headers, at most, in bytes; a key is not long.
const AROUND: usize = 4 << 10;

pub(super) fn unreachable(error: &KafkaError) -> Finding {
    let fix = Fix::Config("kafka.bootstrap_servers: (brokers that can be reached from here)".into());
    Finding::fail(BROKERS, format!("they do not answer: {error}")).mended_by(fix)
}

pub(super) fn examine(config: &Config, survey: &Survey) -> Vec<Finding> {
    let mut findings = vec![Finding::ok(BROKERS, format!("{} answer(s)", survey.brokers))];
    for table in config.all_tables() {
        // Which topics a column names is known only when its events come.
        let Some(Pattern { name: Some(name), .. }) = Pattern::of(table) else { continue };
        match survey.topics.iter().find(|topic| topic.topic == name) {
            Some(topic) => findings.extend(of_topic(config, table, topic)),
            None => findings.push(missing(config, &name, survey.brokers)),
        }
    }
    findings
}

fn missing(config: &Config, name: &str, brokers: usize) -> Finding {
    let create = &config.kafka.create_topics;
    if create.enabled {
        return Finding::ok(TOPICS, format!("{name} is not there; the relay makes it (kafka.create_topics)"));
    }
    let replicas = usize::try_from(create.replication_factor).unwrap_or(1).min(brokers);
    let fix = format!(
        "kafka-topics.sh --bootstrap-server {} --create --topic {name} --partitions {} --replication-factor {replicas}",
        config.kafka.bootstrap_servers, create.partitions
    );
    let says = format!("{name} is not there, or may not be seen: its events wait");
    Finding::fail(TOPICS, says).mended_by(Fix::Shell(fix))
}

fn of_topic(config: &Config, table: &Table, topic: &Cleanup) -> Vec<Finding> {
    let (name, partitions) = (&topic.topic, topic.partitions);
    let mut findings = Vec::new();
    if let Some(most) = topic.min_in_sync.filter(|most| *most > topic.replicas) {
        let says = format!(
            "{name} has {} replica(s) and wants {most} to have each record (min.insync.replicas): it takes nothing",
            topic.replicas
        );
        let fix = alter(config, name, &format!("min.insync.replicas={}", topic.replicas));
        findings.push(Finding::fail(TOPICS, says).mended_by(fix));
    }
    let needs = table.payload.inline_max.map(|payload| payload + table.headers.max_bytes + AROUND);
    if let (Some(needs), Some(takes)) = (needs, topic.max_message_bytes)
        && needs > takes
    {
        let says = format!(
            "{name} takes records of {takes} bytes (max.message.bytes), and payload.inline_max of table {} lets some \
             have {needs}: those are parked",
            table.name
        );
        let fix = alter(config, name, &format!("max.message.bytes={needs}"));
        findings.push(Finding::fail(TOPICS, says).mended_by(fix));
    }
    if table.order == Order::Table && partitions > 1 {
        let says = format!(
            "table {} is one lane (order: table), which is seen as such on a topic of one partition; {name} has \
             {partitions}",
            table.name
        );
        findings.push(Finding::warn(TOPICS, says));
    }
    let create = &config.kafka.create_topics;
    if create.enabled && usize::try_from(create.partitions).is_ok_and(|wanted| wanted != partitions) {
        let says = format!(
            "{name} has {partitions} partition(s) and kafka.create_topics says {}: if they were added while events \
             were in it, a key's order does not hold from before to after",
            create.partitions
        );
        findings.push(Finding::warn(TOPICS, says));
    }
    if findings.is_empty() {
        let takes = topic.max_message_bytes.map_or(String::new(), |bytes| format!(", takes {bytes} bytes"));
        let says = format!(
            "{name} has {partitions} partition(s){takes}; keep their number: the order of a key rests on it"
        );
        findings.push(Finding::ok(TOPICS, says));
    }
    findings
}

/// Changes a setting of a topic.
pub(super) fn alter(config: &Config, topic: &str, setting: &str) -> Fix {
    Fix::Shell(format!(
        "kafka-configs.sh --bootstrap-server {} --alter --entity-type topics --entity-name {topic} --add-config {setting}",
        config.kafka.bootstrap_servers
    ))
}
