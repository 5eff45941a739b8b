//! The Kafka sink: librdkafka, idempotent, and strict about order.
//!
//! Two producers (see [`Unit`]): the pipelined one carries everything; the careful one tries the
//! suspects of a batch that the broker refused. Delivery reports come on librdkafka's own thread
//! and wait in one list until the relay fetches them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, ClientContext, Message,
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    error::{KafkaError, RDKafkaErrorCode},
    message::{DeliveryResult, Header, OwnedHeaders},
    producer::{BaseRecord, Producer, ProducerContext, PurgeConfig, ThreadedProducer},
};
use serde::Deserialize;
use tokio::sync::Notify;
use tracing::{debug, error, info, warn};

use super::{
    Found, MAX_BATCH_BYTES, PositionRecord, Report, Sink, Ticket, TopicFacts, Unit,
    credentials::{Credentials, LOOK_EVERY, Look},
    transactions::{self, Positions},
};
use crate::{
    config::{CreateTopics, Secret},
    record::Record,
};

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
}

impl Settings {
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
            // See `Statistics`.
            .set("statistics.interval.ms", "5000");
        config
    }
}

/// What is read of librdkafka's statistics: which brokers it knows.
///
/// A cluster that is shutting down answers with topics and no brokers. librdkafka (2.10 to 2.13 at
/// least, its issue 5301) then forgets all of them, the bootstrap servers too, and never connects
/// again nor says a word. Such a producer is thrown away, as every producer that cannot go on.
#[derive(Deserialize)]
struct Statistics {
    brokers: serde_json::Map<String, serde_json::Value>,
}

/// How long an answer about a topic's limit is waited for. Without one the broker itself refuses
/// what is too large, which is dearer and as safe.
const LIMIT_WITHIN: Duration = Duration::from_millis(500);

const TAKEN_UP: &str = "files of the kafka client have changed and are taken up";

/// Delivery reports on their way from librdkafka's thread to the relay.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    reports: Mutex<Vec<Report>>,
    arrived: Notify,
    /// Those of position records, which their sender waits for.
    pub(super) positions: Positions,
    /// Topics that cannot be in a transaction. That is told in a line of the client's log alone; the records
    /// are said to be purged.
    refused: Mutex<HashMap<String, RDKafkaErrorCode>>,
    /// A producer knows no broker any more.
    adrift: AtomicBool,
}

impl Mailbox {
    fn put(&self, report: Report) {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports.push(report);
        // One wake-up for each batch that the relay takes, not for each report.
        if reports.len() == 1 {
            self.arrived.notify_one();
        }
    }

    fn refused(&self) -> MutexGuard<'_, HashMap<String, RDKafkaErrorCode>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Vec<Report> {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let room = reports.len();
        std::mem::replace(&mut *reports, Vec::with_capacity(room))
    }
}

pub(super) struct Context {
    mailbox: Arc<Mailbox>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        if let Some((topic, code)) = transactions::refused_partition(facility, message) {
            self.mailbox.refused().insert(topic.to_owned(), code);
        }
        log_librdkafka(level, facility, message);
    }

    fn stats_raw(&self, statistics: &[u8]) {
        if serde_json::from_slice::<Statistics>(statistics).is_ok_and(|known| known.brokers.is_empty()) {
            self.mailbox.adrift.store(true, Ordering::Release);
            self.mailbox.arrived.notify_one();
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::Fatal) => error!(%reason, "kafka producer failed for good"),
            // The relay says what it does about this one.
            Some(RDKafkaErrorCode::GaplessGuarantee) => debug!(%reason, "a batch was refused"),
            _ => warn!(%error, %reason, "kafka is in trouble; the client goes on trying"),
        }
    }
}

/// librdkafka's own log lines; its chatter about reconnecting is for debugging.
fn log_librdkafka(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg
        | RDKafkaLogLevel::Alert
        | RDKafkaLogLevel::Critical
        | RDKafkaLogLevel::Error => debug!(facility, message, "librdkafka error"),
        _ => debug!(facility, message, "librdkafka"),
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, opaque: usize) {
        let result = match result {
            Ok(_) => Ok(()),
            Err((error, message)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail);
                let code = self.mailbox.refused().get(message.topic()).copied().unwrap_or(code);
                debug!(topic = message.topic(), partition = message.partition(), ?code, "refused");
                Err(code)
            }
        };
        let ticket = Ticket::from_opaque(opaque);
        match Positions::commit_of(ticket) {
            Some(commit) => self.mailbox.positions.put(commit, result),
            None => self.mailbox.put(Report { ticket, result }),
        }
    }
}

pub(super) type Client = ThreadedProducer<Context>;

struct Producers {
    /// What a batch of the main one may have.
    batch_bytes: usize,
    /// Shared with what waits for the end of a transaction.
    main: Arc<Client>,
    /// Made when the first suspect comes: most relays never need it. In transactions the main producer tries
    /// them, each in one of its own.
    suspects: Option<Client>,
}

impl Producers {
    /// Nothing is on its way, and nothing has failed that its producer still has to answer for.
    fn are_idle(&self) -> bool {
        let idle = |client: &Client| client.in_flight_count() == 0 && client.client().fatal_error().is_none();
        idle(&self.main) && self.suspects.as_ref().is_none_or(idle)
    }
}

pub struct Kafka {
    pub(super) settings: Settings,
    pub(super) mailbox: Arc<Mailbox>,
    producers: Mutex<Producers>,
    /// Metadata and topic limits; apart from the producers, so that a rebuild leaves it alone.
    admin: Arc<Mutex<Arc<Admin>>>,
    /// Whether the log has it that these producers know no broker.
    said_adrift: AtomicBool,
    credentials: Mutex<Credentials>,
}

pub(super) type Admin = AdminClient<DefaultClientContext>;

impl Kafka {
    /// Makes the producers. Connects in the background: a broker that is down is no error.
    pub fn new(settings: Settings) -> Result<Kafka, KafkaError> {
        let mailbox = Arc::new(Mailbox::default());
        let credentials = Mutex::new(Credentials::new(&settings.properties, Instant::now()));
        let main = Arc::new(producer(&settings, &mailbox, Unit::Main, MAX_BATCH_BYTES)?);
        let admin = Arc::new(Mutex::new(Arc::new(settings.client().create()?)));
        let producers = Mutex::new(Producers { batch_bytes: MAX_BATCH_BYTES, main, suspects: None });
        let said_adrift = AtomicBool::new(false);
        Ok(Kafka { settings, mailbox, producers, admin, said_adrift, credentials })
    }

    fn credentials(&self) -> MutexGuard<'_, Credentials> {
        self.credentials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether files of the clients have changed. A producer of transactions is made by `take_over` alone, and takes them
    /// up there: when the broker refuses the old ones, which ends the transaction.
    fn look(&self) -> Look {
        match self.settings.position_topic {
            Some(_) => Look::Same,
            None => self.credentials().look(&self.settings.properties, Instant::now()),
        }
    }

    /// New clients where nothing has to be repeated for them.
    fn renew(&self) {
        self.credentials().take_up(&self.settings.properties);
        let batch_bytes = self.producers().batch_bytes;
        let main = producer(&self.settings, &self.mailbox, Unit::Main, batch_bytes);
        match main.and_then(|main| Ok((main, self.settings.client().create()?))) {
            Ok((main, admin)) => {
                let old = self.replace(Producers { batch_bytes, main: Arc::new(main), suspects: None });
                let old_admin = std::mem::replace(&mut *self.admin_slot(), Arc::new(admin));
                // Closing waits for librdkafka's threads.
                tokio::task::spawn_blocking(move || drop((old, old_admin)));
                info!("{TAKEN_UP}");
            }
            Err(error) => {
                warn!(%error, "files of the kafka client have changed and cannot be used; it goes on with the old ones");
            }
        }
    }

    fn producers(&self) -> MutexGuard<'_, Producers> {
        self.producers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admin_slot(&self) -> MutexGuard<'_, Arc<Admin>> {
        self.admin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, fresh: Producers) -> Producers {
        std::mem::replace(&mut *self.producers(), fresh)
    }

    pub(super) fn main(&self) -> Arc<Client> {
        self.producers().main.clone()
    }

    pub(super) fn admin(&self) -> Arc<Admin> {
        self.admin_slot().clone()
    }

    /// Before a producer is made: it is made of the files as they are now, and so is what asks for topics.
    pub(super) fn take_up_files(&self) {
        if !self.credentials().take_up(&self.settings.properties) {
            return;
        }
        match self.settings.client().create() {
            Ok(admin) => {
                let old = std::mem::replace(&mut *self.admin_slot(), Arc::new(admin));
                tokio::task::spawn_blocking(move || drop(old));
                info!("{TAKEN_UP}");
            }
            Err(error) => warn!(%error, "files of the kafka client have changed and cannot be used"),
        }
    }

    /// Takes a new producer, and throws the old ones away with all that they have.
    pub(super) async fn exchange(&self, main: Client, batch_bytes: usize) {
        let old = self.replace(Producers { batch_bytes, main: Arc::new(main), suspects: None });
        if let Some((code, reason)) = old.main.client().fatal_error() {
            info!(?code, reason, "the producer that is thrown away had failed");
        }
        // Purging and closing waits for librdkafka's threads.
        tokio::task::spawn_blocking(move || drop(old)).await.ok();
        // What the old ones said of themselves is not true of the new ones.
        self.mailbox.adrift.store(false, Ordering::Release);
        self.mailbox.refused().clear();
        self.said_adrift.store(false, Ordering::Relaxed);
    }

    /// Lets go of what a producer that knows no broker has: its reports say so, and the relay makes
    /// new producers, as after every failure. One without records is found when it has some.
    fn let_go(&self) {
        if !self.said_adrift.swap(true, Ordering::Relaxed) {
            warn!("kafka answered with no brokers at all and the client forgot them; it is made anew");
        }
        self.purge();
    }

    fn purge(&self) {
        let everything = PurgeConfig::default().queue().inflight().non_blocking();
        let producers = self.producers();
        producers.main.purge(everything);
        if let Some(suspects) = &producers.suspects {
            suspects.purge(everything);
        }
    }
}

fn producer(
    settings: &Settings,
    mailbox: &Arc<Mailbox>,
    unit: Unit,
    batch_bytes: usize,
) -> Result<Client, KafkaError> {
    made_from(&settings.producer(unit, batch_bytes), mailbox)
}

pub(super) fn made_from(config: &ClientConfig, mailbox: &Arc<Mailbox>) -> Result<Client, KafkaError> {
    Client::from_config_and_context(config, Context { mailbox: mailbox.clone() })
}

impl Sink for Kafka {
    fn send(&self, unit: Unit, ticket: Ticket, record: &Record<'_>) -> Result<(), RDKafkaErrorCode> {
        let mut producers = self.producers();
        let client = match unit {
            Unit::Main => &*producers.main,
            Unit::Suspects if self.settings.position_topic.is_some() => &*producers.main,
            Unit::Suspects => {
                if producers.suspects.is_none() {
                    let made = producer(&self.settings, &self.mailbox, unit, MAX_BATCH_BYTES)
                        .map_err(|error| error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail))?;
                    producers.suspects = Some(made);
                }
                producers.suspects.as_ref().ok_or(RDKafkaErrorCode::Fail)?
            }
        };
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (name, value) in &record.headers {
            headers = headers.insert(Header { key: name, value: value.as_deref() });
        }
        let mut message: BaseRecord<'_, [u8], [u8], usize> =
            BaseRecord::with_opaque_to(&record.topic, ticket.to_opaque()).headers(headers);
        message.key = record.key.as_deref();
        message.payload = record.payload.as_deref();
        message.partition = record.partition;
        message.timestamp = record.timestamp_ms;
        client
            .send(message)
            .map_err(|(error, _)| error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail))
    }

    async fn reports(&self) -> Vec<Report> {
        loop {
            if self.mailbox.adrift.swap(false, Ordering::Acquire) {
                self.let_go();
            }
            let look = self.look();
            if look == Look::Overdue {
                info!(
                    "files of the kafka client have changed; what is in flight is repeated with new producers"
                );
                self.purge();
            }
            // Asked before the reports are taken: what is answered in between has its report among them.
            let idle = look == Look::Changed && self.producers().are_idle();
            let reports = self.mailbox.take();
            // Nothing is in flight and the relay has had every report. Its loop sends and waits for reports by turns, so
            // nothing is sent meanwhile.
            if idle && reports.is_empty() {
                self.renew();
            }
            if !reports.is_empty() {
                return reports;
            }
            tokio::time::timeout(LOOK_EVERY, self.mailbox.arrived.notified()).await.ok();
        }
    }

    async fn rebuild(&self, batch_bytes: usize) -> Result<(), KafkaError> {
        self.take_up_files();
        let main = producer(&self.settings, &self.mailbox, Unit::Main, batch_bytes)?;
        self.exchange(main, batch_bytes).await;
        Ok(())
    }

    async fn take_over(
        &self,
        unit: String,
        batch_bytes: usize,
        may_create: bool,
    ) -> Result<Option<Found>, String> {
        transactions::take_over(self, unit, batch_bytes, may_create).await
    }

    fn commit(
        &self,
        position: Vec<PositionRecord>,
    ) -> impl Future<Output = Result<(), String>> + Send + 'static {
        transactions::commit(self, position)
    }

    fn abort(&self) -> impl Future<Output = Result<(), String>> + Send + 'static {
        transactions::abort(self)
    }

    fn look_up(
        &self,
        topic: String,
        within: Duration,
    ) -> impl Future<Output = Result<TopicFacts, RDKafkaErrorCode>> + Send + 'static {
        let (settings, shared) = (self.settings.clone(), self.admin.clone());
        async move {
            let admin = shared.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let facts = look_up(&admin, topic, &settings.create_topics, within).await;
            // One that knows no broker any more (see `Statistics`) would never answer again, and
            // cannot be told from one that only has to wait.
            if let Err(RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::OperationTimedOut) = facts
                && let Ok(fresh) = settings.client().create()
            {
                // Closing one waits for librdkafka's threads.
                let replace = move || {
                    let mut current = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    // Another question may have had the same answer.
                    if Arc::ptr_eq(&current, &admin) {
                        *current = Arc::new(fresh);
                    }
                    drop(current);
                    drop(admin);
                };
                tokio::task::spawn_blocking(replace).await.ok();
            }
            facts
        }
    }
}

async fn look_up(
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
    let (max_message_bytes, compacted) = settings_of(admin, &topic, within.min(LIMIT_WITHIN)).await;
    Ok(TopicFacts { partitions, max_message_bytes, compacted })
}

pub(super) fn partition_count(admin: &Admin, topic: &str, within: Duration) -> Result<i32, RDKafkaErrorCode> {
    let metadata = admin
        .inner()
        .fetch_metadata(Some(topic), within)
        .map_err(|error| error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail))?;
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
    let code = |error: KafkaError| error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail);
    match admin.create_topics([&new], &options).await.map_err(code)?.pop() {
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

/// The topic's `max.message.bytes`, `None` where we may not ask or the broker does not know it; and
/// whether it is compacted.
async fn settings_of(admin: &Admin, topic: &str, within: Duration) -> (Option<usize>, bool) {
    let options = AdminOptions::new().request_timeout(Some(within));
    let answers = admin.describe_configs([&ResourceSpecifier::Topic(topic)], &options).await;
    let Some(Ok(resource)) = answers.ok().and_then(|answers| answers.into_iter().next()) else {
        return (None, false);
    };
    let value = |name| resource.get(name).and_then(|entry| entry.value.as_deref());
    let limit = value("max.message.bytes").and_then(|value| value.parse().ok());
    (limit, value("cleanup.policy").is_some_and(|policy| policy.contains("compact")))
}
