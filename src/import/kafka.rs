//! Where events go: the producer's settings, in librdkafka's names.

use super::{Notes, Options, yaml::Node};

/// Java's name and librdkafka's, of settings that mean the same.
const SAME: [(&str, &str); 17] = [
    ("security.protocol", "security.protocol"),
    ("sasl.mechanism", "sasl.mechanisms"),
    ("sasl.kerberos.service.name", "sasl.kerberos.service.name"),
    ("ssl.endpoint.identification.algorithm", "ssl.endpoint.identification.algorithm"),
    ("ssl.cipher.suites", "ssl.cipher.suites"),
    ("client.id", "client.id"),
    ("client.dns.lookup", "client.dns.lookup"),
    ("batch.size", "batch.size"),
    ("request.timeout.ms", "request.timeout.ms"),
    ("metadata.max.age.ms", "metadata.max.age.ms"),
    ("connections.max.idle.ms", "connections.max.idle.ms"),
    ("reconnect.backoff.ms", "reconnect.backoff.ms"),
    ("reconnect.backoff.max.ms", "reconnect.backoff.max.ms"),
    ("retry.backoff.ms", "retry.backoff.ms"),
    ("retry.backoff.max.ms", "retry.backoff.max.ms"),
    ("send.buffer.bytes", "socket.send.buffer.bytes"),
    ("receive.buffer.bytes", "socket.receive.buffer.bytes"),
];

/// Settings that are the relay's own business.
const OURS: [(&str, &str); 11] = [
    (
        "max.request.size",
        "what a topic takes counts, its max.message.bytes; see payload.oversize for what is larger",
    ),
    ("acks", "always all"),
    ("enable.idempotence", "always on"),
    ("retries", "retries never end"),
    ("delivery.timeout.ms", "retries never end"),
    ("max.in.flight.requests.per.connection", "never more than keeps the order"),
    ("max.block.ms", "nothing is given up because the broker is away"),
    ("partitioner.class", "keys land where Java's default partitioner puts them; another has no equal"),
    ("partitioner.ignore.keys", "keys count"),
    ("buffer.memory", "limits.in_flight_bytes bounds what is under way, 12MiB unless told otherwise"),
    ("transactional.id", "delivery is at least once"),
];

pub fn kafka(options: &mut Options, notes: &mut Notes) -> Node {
    let mut entries = vec![("bootstrap_servers", Node::Text(brokers(options, notes)))];
    let mut properties: Vec<(String, Node)> = Vec::new();
    // What a worker says for all its producers stands below what a connector says.
    let mut given = options.take_all("producer.override.");
    for (name, value) in options.take_all("producer.") {
        if !given.iter().any(|(known, _)| *known == name) {
            given.push((name, value));
        }
    }
    for (name, value) in given {
        let option = format!("producer.override.{name}");
        if let Some((_, ours)) = SAME.iter().find(|(theirs, _)| *theirs == name) {
            if value.contains("${") {
                notes.add(
                    &option,
                    format!("came from a configuration provider of Connect: set kafka.properties.{ours}"),
                );
            } else if takes(ours, &value) {
                properties.push(((*ours).to_owned(), Node::literal(&value)));
            } else {
                notes.add(&option, format!("librdkafka does not take this value for {ours}: left out"));
            }
        } else if let Some((_, why)) = OURS.iter().find(|(theirs, _)| *theirs == name) {
            notes.add(&option, format!("left out: {why}"));
        } else if name == "linger.ms" && value.parse::<u32>().is_ok() {
            entries.push(("linger", Node::Text(format!("{value}ms"))));
        } else if name == "compression.type"
            && ["none", "gzip", "snappy", "lz4", "zstd"].contains(&value.as_str())
        {
            entries.push(("compression", Node::Text(value)));
        } else if name == "sasl.jaas.config" {
            properties.extend(login(&value, notes));
        } else if name.starts_with("ssl.truststore")
            || name.starts_with("ssl.keystore")
            || name.starts_with("ssl.key.")
        {
            notes.add(
                &option,
                "not copied: write the certificates as PEM, and set ssl.ca.location, ssl.certificate.location and \
                 ssl.key.location in kafka.properties",
            );
        } else if name == "bootstrap.servers" {
            // `brokers` has looked at it.
        } else {
            notes.add(
                &option,
                "not known here: see librdkafka's list of properties, and set it in kafka.properties",
            );
        }
    }
    if let Some(topics) = topics(options, notes) {
        entries.push(("create_topics", topics));
    }
    if !properties.is_empty() {
        entries.push(("properties", Node::map(properties)));
    }
    Node::map(entries)
}

fn brokers(options: &mut Options, notes: &mut Notes) -> String {
    const DEFAULT: &str = "localhost:9092";
    for option in ["producer.override.bootstrap.servers", "producer.bootstrap.servers", "bootstrap.servers"] {
        if let Some(servers) = options.value(option, DEFAULT, notes) {
            return servers;
        }
    }
    for option in
        ["schema.history.internal.kafka.bootstrap.servers", "database.history.kafka.bootstrap.servers"]
    {
        if let Some(servers) = options.value(option, DEFAULT, notes) {
            notes.add(
                option,
                "taken for kafka.bootstrap_servers, which the connector does not have: see that it is so",
            );
            return servers;
        }
    }
    notes.add(
        "bootstrap.servers",
        "the brokers are the worker's, which are not in this file: set the environment variable KAFKA_BOOTSTRAP_SERVERS, \
         or write them into kafka.bootstrap_servers",
    );
    format!("${{KAFKA_BOOTSTRAP_SERVERS:-{DEFAULT}}}")
}

/// Whether librdkafka takes a value; it connects to nothing.
fn takes(name: &str, value: &str) -> bool {
    rdkafka::ClientConfig::new().set(name, value).create_native_config().is_ok()
}

/// The user of a login; its password is not copied.
fn login(jaas: &str, notes: &mut Notes) -> Vec<(String, Node)> {
    let user = jaas.split_once("username=").and_then(|(_, rest)| {
        let rest = rest.trim_start();
        match rest.chars().next()? {
            quote @ ('"' | '\'') => rest[1..].split_once(quote).map(|(user, _)| user),
            _ => rest.split([' ', ';']).next(),
        }
    });
    let Some(user) = user.filter(|user| !user.is_empty() && !user.contains("${")) else {
        notes.add(
            "producer.override.sasl.jaas.config",
            "not copied: set sasl.username and sasl.password in kafka.properties",
        );
        return Vec::new();
    };
    notes.add(
        "producer.override.sasl.jaas.config",
        "the password is not copied: set the environment variable KAFKA_PASSWORD, or write ${file:PATH} for it",
    );
    vec![
        ("sasl.username".into(), Node::literal(user)),
        ("sasl.password".into(), Node::Text("${KAFKA_PASSWORD:-set KAFKA_PASSWORD}".into())),
    ]
}

fn topics(options: &mut Options, notes: &mut Notes) -> Option<Node> {
    let partitions = options.take("topic.creation.default.partitions");
    let factor = options.take("topic.creation.default.replication.factor");
    let others = options.take_all("topic.creation.");
    if others.iter().any(|(name, _)| name != "enable") {
        notes.add(
            "topic.creation",
            "settings beside partitions and replication factor have no equal: create the topics",
        );
    }
    if partitions.is_none() && factor.is_none() {
        return None;
    }
    let mut topics = vec![("enabled", Node::Text("true".into()))];
    for (option, key, value) in [
        ("topic.creation.default.partitions", "partitions", partitions),
        ("topic.creation.default.replication.factor", "replication_factor", factor),
    ] {
        match value.map(|value| value.parse::<i32>()) {
            Some(Ok(number)) if (1..=1000).contains(&number) => {
                topics.push((key, Node::Text(number.to_string())));
            }
            Some(_) => notes.add(
                option,
                format!("the broker's default cannot be asked for: set kafka.create_topics.{key}"),
            ),
            None => {}
        }
    }
    Some(Node::map(topics))
}
