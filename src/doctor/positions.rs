//! Exactly once: whether the brokers take transactions of this relay, and whether source and position topic belong
//! together.

use std::time::Duration;

use rdkafka::error::RDKafkaErrorCode;

use super::{Finding, Fix, topics};
use crate::{
    config::{Config, Delivery},
    relay::position::Position,
    sink::{
        Cleanup,
        probe::{self, Ground, OPEN_FOR, Refused, STATE},
    },
    source::database::{Database, Noted},
};

const CHECK: &str = "kafka: positions";

/// What the source knows of its positions.
struct Source {
    server: String,
    noted: Vec<Noted>,
    /// The statement that has them forgotten.
    forget: String,
}

impl Source {
    async fn of(database: &Database) -> Option<Source> {
        let (noted, forget) = database.noted().await.ok()?;
        Some(Source { server: database.server().await.ok()?, noted, forget })
    }

    fn forget(&self) -> Fix {
        Fix::Sql(self.forget.clone())
    }
}

/// Where the source cannot be asked, that has a finding of its own.
pub(super) async fn examine(config: &Config) -> Vec<Finding> {
    if config.kafka.delivery != Delivery::ExactlyOnce {
        return Vec::new();
    }
    let Ok(ground) = probe::ground(&config.kafka).await else { return Vec::new() };
    let mut findings = of_brokers(config, &ground);
    let database = config.source.as_ref().and_then(|source| Database::new(source).ok());
    let source = match &database {
        Some(database) => Source::of(database).await,
        None => None,
    };
    let known = source.as_ref().filter(|source| !source.noted.is_empty());
    let strange: Vec<Finding> = known
        .into_iter()
        .flat_map(|source| {
            source.noted.iter().filter_map(|noted| of_identity(config, source, noted, &ground))
        })
        .collect();
    // Of another's topic nothing is to be said.
    findings.extend(if strange.is_empty() { of_topic(config, &ground, known) } else { strange });
    if !findings.is_empty() {
        return findings;
    }
    if let Err(refused) = probe::try_out(&config.kafka, !ground.is_missing()).await {
        return vec![of_refusal(config, refused)];
    }
    if let (Some(database), Some(source)) = (&database, &source) {
        for noted in &source.noted {
            findings.extend(of_counters(config, database, source, noted).await);
        }
    }
    if findings.is_empty() {
        let topic = &config.kafka.position_topic;
        findings.push(Finding::ok(
            CHECK,
            match ground.is_missing() {
                true => format!("{topic} is not there; the relay makes it at its first start"),
                false => {
                    format!("{topic} has one partition, is compacted, and takes transactions of this relay")
                }
            },
        ));
    }
    findings
}

/// What no transaction can do without. Whose settings these are, only a restart takes them up.
fn of_brokers(config: &Config, ground: &Ground) -> Vec<Finding> {
    let mut findings = Vec::new();
    let set = |setting: &str| {
        Fix::Shell(format!("echo '{setting}' >> (server.properties of each broker, which then is restarted)"))
    };
    let ms = |duration: Duration| duration.as_millis();
    if let Some(longest) = ground.longest.filter(|longest| *longest < OPEN_FOR) {
        let says = format!(
            "a transaction may be open for {} ms (transaction.max.timeout.ms), and the relay asks for {} ms: it \
             cannot begin one",
            ms(longest),
            ms(OPEN_FOR)
        );
        findings.push(Finding::fail(CHECK, says).mended_by(set("transaction.max.timeout.ms=900000")));
    }
    match &ground.state {
        Some(state) => findings.extend(in_sync(config, state)),
        None => {
            let wanted = ground.state_replicas.filter(|wanted| *wanted > ground.brokers);
            findings.extend(wanted.map(|wanted| {
                let says = format!(
                    "{STATE} is to be on {wanted} brokers (transaction.state.log.replication.factor), and there are \
                     {}: it is never made, and no transaction begins",
                    ground.brokers
                );
                let fix = format!("transaction.state.log.replication.factor={}", ground.brokers);
                Finding::fail(CHECK, says).mended_by(set(&fix))
            }));
        }
    }
    findings
}

/// More than there are have to have each record.
fn in_sync(config: &Config, topic: &Cleanup) -> Option<Finding> {
    let most = topic.min_in_sync.filter(|most| *most > topic.replicas)?;
    let (name, replicas) = (&topic.topic, topic.replicas);
    let says = format!(
        "{name} has {replicas} replica(s) and wants {most} to have each record (min.insync.replicas): no transaction is \
         committed"
    );
    let fix = topics::alter(config, name, &format!("min.insync.replicas={replicas}"));
    Some(Finding::fail(CHECK, says).mended_by(fix))
}

/// Whether this is the source, the cluster and the topic that the positions are of.
fn of_identity(config: &Config, source: &Source, noted: &Noted, ground: &Ground) -> Option<Finding> {
    let (unit, topic) = (&noted.unit, &config.kafka.position_topic);
    if noted.server != source.server {
        let says = format!(
            "the source is on server {}, and the positions of {unit} are those of server {}: this is a copy, or it \
             moved; the relay refuses to start. If it moved, and nothing publishes from the old one any more (what \
             was published last may be repeated)",
            source.server, noted.server
        );
        return Some(Finding::fail(CHECK, says).mended_by(source.forget()));
    }
    if !ground.cluster.is_empty() && noted.cluster != ground.cluster {
        let says = format!(
            "the positions of {unit} are in Kafka cluster {}, and this is {}: the relay refuses to start. If it is to \
             publish here, empty the relay's own table `positions` (what was published last may be repeated)",
            noted.cluster, ground.cluster
        );
        let fix = format!("kafka.bootstrap_servers: (brokers of cluster {})", noted.cluster);
        return Some(Finding::fail(CHECK, says).mended_by(Fix::Config(fix)));
    }
    if noted.topic != *topic {
        let says = format!(
            "the positions of {unit} are in topic {}, and kafka.position_topic says {topic}: the relay refuses to start",
            noted.topic
        );
        let fix = format!("kafka.position_topic: {}", noted.topic);
        return Some(Finding::fail(CHECK, says).mended_by(Fix::Config(fix)));
    }
    None
}

/// How the topic is; `known`: a source that remembers positions in it.
fn of_topic(config: &Config, ground: &Ground, known: Option<&Source>) -> Vec<Finding> {
    let name = &config.kafka.position_topic;
    match (ground.seen, known) {
        (Ok(1), _) => {}
        (Ok(count), _) => {
            let says =
                format!("{name} has {count} partitions, and positions need one: the relay does not start");
            let fix =
                "kafka.position_topic: (a topic of one partition, or a name that the relay makes one of)";
            return vec![Finding::fail(CHECK, says).mended_by(Fix::Config(fix.into()))];
        }
        (Err(_), Some(source)) if ground.is_missing() => {
            let says = format!(
                "{name} has the positions of this source and is gone, so nobody knows what of the last transactions is \
                 published: the relay refuses to start. If it cannot be brought back (what was published last may be \
                 repeated)"
            );
            return vec![Finding::fail(CHECK, says).mended_by(source.forget())];
        }
        (Err(_), None) if ground.is_missing() => return of_making(config, ground).into_iter().collect(),
        (Err(RDKafkaErrorCode::TopicAuthorizationFailed), _) => {
            let says = format!("{name} may not be seen: the relay does not start");
            return vec![Finding::fail(CHECK, says).mended_by(allow_topic(config))];
        }
        (Err(code), _) => {
            let says = format!("{name} cannot be looked at: {code}");
            return vec![Finding::fail(CHECK, says).mended_by(others("can be asked about topics"))];
        }
    }
    let Some(topic) = &ground.topic else { return Vec::new() };
    let mut findings: Vec<Finding> = in_sync(config, topic).into_iter().collect();
    if !topic.compacted || topic.keeps_for.is_some() {
        let says = format!(
            "{name} deletes what is old (cleanup.policy), and the last position of a source is never too old: after a \
             quiet time the relay refuses to start"
        );
        findings.push(Finding::fail(CHECK, says).mended_by(topics::alter(
            config,
            name,
            "cleanup.policy=compact",
        )));
    }
    findings
}

/// The relay makes the topic, if it may.
fn of_making(config: &Config, ground: &Ground) -> Option<Finding> {
    let code = ground.may_make.err()?;
    let name = &config.kafka.position_topic;
    let fix = format!(
        "kafka-topics.sh --bootstrap-server {} --create --topic {name} --partitions 1 --replication-factor {} --config \
         cleanup.policy=compact --config segment.bytes=16777216",
        config.kafka.bootstrap_servers,
        ground.brokers.clamp(1, 3)
    );
    let says = format!("{name} is not there, and the relay may not make it ({code}): it does not start");
    Some(Finding::fail(CHECK, says).mended_by(Fix::Shell(fix)))
}

fn of_refusal(config: &Config, refused: Refused) -> Finding {
    let name = &config.kafka.position_topic;
    match refused {
        Refused::Id(RDKafkaErrorCode::TransactionalIdAuthorizationFailed) => {
            let says = "no transactional id that begins with whippet- may be used, unless those of this source were \
                        allowed by what they begin with: the relay does not start";
            let fix = acl(
                config,
                "--operation Describe --operation Write --transactional-id whippet- --resource-pattern-type prefixed",
            );
            Finding::fail(CHECK, says).mended_by(fix)
        }
        Refused::Position(RDKafkaErrorCode::TopicAuthorizationFailed) => {
            let says = format!("{name} may not be written to: the relay does not start");
            Finding::fail(CHECK, says).mended_by(allow_topic(config))
        }
        Refused::Id(code) => Finding::fail(CHECK, format!("no transaction can be begun: {code}"))
            .mended_by(others("take transactions")),
        Refused::Position(code) => Finding::fail(CHECK, format!("{name} takes no position: {code}"))
            .mended_by(others("have a leader for that topic")),
    }
}

/// What brokers have to be that do not say what is wrong with them.
fn others(can: &str) -> Fix {
    Fix::Config(format!("kafka.bootstrap_servers: (brokers that {can})"))
}

fn allow_topic(config: &Config) -> Fix {
    let name = &config.kafka.position_topic;
    acl(config, &format!("--operation Describe --operation Read --operation Write --topic {name}"))
}

/// Allows something to the relay, by the name that the brokers know it under.
fn acl(config: &Config, what: &str) -> Fix {
    let property =
        |name: &str| config.kafka.properties.get(name).map(|value| value.expose_now().into_owned());
    let who = match (property("sasl.username"), property("security.protocol")) {
        (Some(name), _) => name,
        (None, None) => "ANONYMOUS".to_owned(),
        (None, Some(protocol)) if protocol.eq_ignore_ascii_case("plaintext") => "ANONYMOUS".to_owned(),
        (None, Some(_)) => "(the relay's name)".to_owned(),
    };
    Fix::Shell(format!(
        "kafka-acls.sh --bootstrap-server {} --add --allow-principal 'User:{who}' {what}",
        config.kafka.bootstrap_servers
    ))
}

/// Whether the topic has what the source remembers, and the other way round. A relay may be at work: the source is asked
/// before the topic and after.
async fn of_counters(
    config: &Config,
    database: &Database,
    source: &Source,
    noted: &Noted,
) -> Option<Finding> {
    let (unit, topic) = (&noted.unit, &config.kafka.position_topic);
    let found = probe::positions(&config.kafka, unit).await.and_then(|found| Position::decode(unit, &found));
    let after = database.noted().await.ok()?.0.into_iter().find(|after| after.unit == *unit)?;
    let last = match found {
        Ok(last) => last.unwrap_or_default(),
        Err(error) => {
            let says = format!("the positions of {unit} cannot be read: {error}");
            return Some(Finding::fail(CHECK, says).mended_by(allow_topic(config)));
        }
    };
    let says = if last.counter < noted.counter {
        format!(
            "topic {topic} has position {} of {unit}, and the source remembers {}: it was truncated or made anew, and the \
             relay refuses to start. If it cannot be brought back (what was published last may be repeated)",
            last.counter, noted.counter
        )
    } else if last.noted > after.counter {
        format!(
            "topic {topic} knows that the source has noted position {} of {unit}, and the source remembers {}: it was \
             restored from a backup, and the relay refuses to start. Look at what is in the outbox: it is published again",
            last.noted, after.counter
        )
    } else {
        return None;
    };
    Some(Finding::fail(CHECK, says).mended_by(source.forget()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ground() -> Ground {
        Ground {
            cluster: "here".into(),
            brokers: 2,
            topic: None,
            state: None,
            seen: Err(RDKafkaErrorCode::UnknownTopicOrPartition),
            may_make: Ok(()),
            longest: Some(Duration::from_mins(15)),
            state_replicas: Some(2),
        }
    }

    fn config() -> Config {
        let text = "source: { url: 'postgres://h/d' }\nkafka: { bootstrap_servers: 'b:9092', delivery: exactly_once }\n\
                    tables: [{ name: outbox }]";
        crate::config::parse("test", text, &std::collections::BTreeMap::new()).unwrap()
    }

    /// What no broker of the tests can be brought to: it has had transactions before.
    #[test]
    fn transactions_that_are_to_be_on_more_brokers_than_there_are() {
        assert_eq!(of_brokers(&config(), &ground()), []);
        let findings = of_brokers(&config(), &Ground { state_replicas: Some(3), ..ground() });
        assert!(findings[0].says.contains("never made"), "{findings:?}");
        let fix = findings[0].fix.as_ref().unwrap().text();
        assert!(fix.contains("transaction.state.log.replication.factor=2"), "{fix}");
    }
}
