//! What the brokers say of transactions and of the topic for their positions, and whether they take one from this client:
//! for `whippet doctor`. What is sent is in a transaction that is dropped, by an id that no relay has.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rdkafka::{
    ClientConfig, ClientContext,
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    config::{FromClientConfigAndContext as _, RDKafkaLogLevel},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord, Producer as _},
};
use tokio_util::sync::CancellationToken;

use super::{
    Cleanup, Settings, code_of,
    survey::survey,
    topics::partition_count,
    transactions::{self, TRANSACTION_TIMEOUT, refused_partition},
};
use crate::{config, kafka_token::Fed};

const WITHIN: Duration = Duration::from_secs(10);
/// Where brokers keep what they know of transactions.
pub const STATE: &str = "__transaction_state";
/// The ids of relays begin like this, so what is allowed to them is allowed to it.
const PROBE: &str = "whippet-doctor";

/// What the brokers say before anything is tried.
#[derive(Clone, Debug)]
pub struct Ground {
    /// The identity of the cluster.
    pub cluster: String,
    pub brokers: usize,
    /// The topic for positions, and the one for transactions. Neither is there before its first use, and of what may not
    /// be asked for nothing is known.
    pub topic: Option<Cleanup>,
    pub state: Option<Cleanup>,
    /// Whether the topic for positions is to be seen: how many partitions.
    pub seen: Result<i32, RDKafkaErrorCode>,
    /// Where it is not there: whether this client may make it.
    pub may_make: Result<(), RDKafkaErrorCode>,
    /// How long a transaction may be open, at most.
    pub longest: Option<Duration>,
    /// Brokers that are to have each record of the topic for transactions, once it is made.
    pub state_replicas: Option<usize>,
}

impl Ground {
    pub fn is_missing(&self) -> bool {
        matches!(self.seen, Err(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic))
    }
}

/// How long a transaction of a relay may be open.
pub const OPEN_FOR: Duration = TRANSACTION_TIMEOUT;

/// At which step the brokers refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A transactional id.
    Id(RDKafkaErrorCode),
    /// A position in the topic.
    Position(RDKafkaErrorCode),
}

pub async fn ground(kafka: &config::Kafka) -> Result<Ground, KafkaError> {
    let topic = &kafka.position_topic;
    let found = survey(kafka, |name| name == topic || name == STATE).await?;
    let (mut of_topic, mut state) = (None, None);
    for one in found.topics {
        if one.topic == *topic {
            of_topic = Some(one);
        } else {
            state = Some(one);
        }
    }
    let admin = Settings::of(kafka).admin()?;
    let name = topic.clone();
    let asked = tokio::task::spawn_blocking(move || {
        let cluster = admin.inner().fetch_cluster_id(WITHIN).unwrap_or_default();
        let broker = admin.inner().fetch_metadata(Some(STATE), WITHIN).ok();
        let broker = broker.and_then(|metadata| metadata.brokers().first().map(|broker| broker.id()));
        let seen = partition_count(&admin, &name, WITHIN);
        (admin, cluster, broker, seen)
    });
    let (admin, cluster, broker, seen) = asked.await.map_err(|_| KafkaError::Canceled)?;
    let settings = match broker {
        Some(broker) => settings_of(&admin, broker).await,
        None => HashMap::new(),
    };
    let number = |name: &str| settings.get(name).and_then(|value| value.parse::<u64>().ok());
    let mut ground = Ground {
        cluster,
        brokers: found.brokers,
        topic: of_topic,
        state,
        seen,
        may_make: Ok(()),
        longest: number("transaction.max.timeout.ms").map(Duration::from_millis),
        state_replicas: number("transaction.state.log.replication.factor").map(|replicas| replicas as usize),
    };
    if ground.is_missing() {
        ground.may_make = may_make(&admin, topic).await;
    }
    Ok(ground)
}

/// What a broker is set to; nothing where it may not be asked.
async fn settings_of(admin: &AdminClient<DefaultClientContext>, broker: i32) -> HashMap<String, String> {
    let options = AdminOptions::new().request_timeout(Some(WITHIN));
    let answers = admin.describe_configs([&ResourceSpecifier::Broker(broker)], &options).await;
    let resource = answers.ok().and_then(|answers| answers.into_iter().next()?.ok());
    let entries = resource.into_iter().flat_map(|resource| resource.entries);
    entries.filter_map(|entry| Some((entry.name, entry.value?))).collect()
}

/// The brokers say so without doing it.
async fn may_make(admin: &AdminClient<DefaultClientContext>, topic: &str) -> Result<(), RDKafkaErrorCode> {
    let options = AdminOptions::new().request_timeout(Some(WITHIN)).validate_only(true);
    let new = NewTopic::new(topic, 1, TopicReplication::Fixed(-1));
    match admin.create_topics([&new], &options).await.map_err(|error| code_of(&error))?.pop() {
        Some(Err((_, code))) => Err(code),
        _ => Ok(()),
    }
}

/// Hears what the client says in its log alone.
#[derive(Clone, Default)]
struct Listener(Arc<Mutex<Option<RDKafkaErrorCode>>>);

impl ClientContext for Listener {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        if let Some((_, code)) = refused_partition(facility, message) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(code);
        }
    }
}

/// Begins a transaction, sends a position (if its topic is there), and drops both.
pub async fn try_out(kafka: &config::Kafka, with_position: bool) -> Result<(), Refused> {
    let begun = |error: &KafkaError| Refused::Id(code_of(error));
    let settings = Settings::of(kafka);
    let mut config: ClientConfig = settings.client();
    config
        .set("transactional.id", PROBE)
        .set("transaction.timeout.ms", OPEN_FOR.as_millis().to_string())
        .set("message.timeout.ms", WITHIN.as_millis().to_string());
    let listener = Listener::default();
    let producer: FutureProducer<Listener> =
        FutureProducer::from_config_and_context(&config, listener.clone()).map_err(|error| begun(&error))?;
    let client = producer.clone();
    let producer = Fed::new(settings.tokens.as_ref(), producer, |producer| producer.client());
    let ready = tokio::task::spawn_blocking(move || {
        client.init_transactions(WITHIN)?;
        client.begin_transaction()
    });
    ready.await.map_err(|_| Refused::Id(RDKafkaErrorCode::Fail))?.map_err(|error| begun(&error))?;
    let sent = if with_position {
        let record = FutureRecord::to(&kafka.position_topic).partition(0).key(PROBE).payload("");
        producer.send(record, WITHIN).await.map(drop).map_err(|(error, _)| error)
    } else {
        Ok(())
    };
    let heard = *listener.0.lock().unwrap_or_else(PoisonError::into_inner);
    tokio::task::spawn_blocking(move || producer.abort_transaction(WITHIN).ok()).await.ok();
    sent.map_err(|error| {
        Refused::Position(heard.or(error.rdkafka_error_code()).unwrap_or(RDKafkaErrorCode::Fail))
    })
}

/// A unit's positions that are committed.
pub async fn positions(kafka: &config::Kafka, unit: &str) -> Result<HashMap<String, Vec<u8>>, String> {
    let (settings, topic, unit) = (Settings::of(kafka), kafka.position_topic.clone(), unit.to_owned());
    let read = tokio::task::spawn_blocking(move || {
        transactions::read(&settings, &topic, &unit, &CancellationToken::new())
    });
    read.await.unwrap_or_else(|error| Err(error.to_string()))
}
