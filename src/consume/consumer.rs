//! A Kafka consumer with a reader and an object store around it: at least once, commits by hand.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use rdkafka::{
    ClientConfig, ClientContext, Message, Offset, TopicPartitionList,
    config::FromClientConfigAndContext,
    consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, Rebalance, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Headers as _},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Event, Fetch, Headers, Incoming, Limits, Place, Problem, ReadError, Reader, Step};
use crate::{
    kafka_token::{Fed, TokenFrom, Tokens},
    store::Store,
};

/// How long a question to the brokers may take.
const ASKING: Duration = Duration::from_secs(30);
/// How often [`Consumer::run`] commits.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// How soon, and how seldom at last, a store that is away is tried again.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Where to begin where a group has committed nothing, or without a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    Beginning,
    #[default]
    End,
}

#[derive(Clone, Debug)]
pub struct Settings {
    pub bootstrap_servers: String,
    pub topics: Vec<String>,
    /// Without a group all partitions are read, and nothing is committed.
    pub group: Option<String>,
    pub start: Start,
    pub limits: Limits,
    /// The header that has all of the context: the relay's `headers.blob`.
    pub blob: Option<String>,
    /// librdkafka properties. Those of commits are this module's own.
    pub properties: BTreeMap<String, String>,
    /// With `sasl.mechanisms: OAUTHBEARER`: where its tokens come from, if librdkafka does not make them.
    pub token: Option<TokenFrom>,
}

impl Settings {
    pub fn new(bootstrap_servers: &str, topics: &[&str]) -> Settings {
        Settings {
            bootstrap_servers: bootstrap_servers.to_owned(),
            topics: topics.iter().map(|&topic| topic.to_owned()).collect(),
            group: None,
            start: Start::default(),
            limits: Limits::default(),
            blob: None,
            properties: BTreeMap::new(),
            token: None,
        }
    }

    pub fn group(mut self, group: &str) -> Settings {
        self.group = Some(group.to_owned());
        self
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        // Defaults that the user may change come first, then the user's, then what is ours.
        config
            .set("client.id", "whippet-consume")
            .set("socket.keepalive.enable", "true")
            .set("queued.max.messages.kbytes", "16384");
        for (name, value) in &self.properties {
            config.set(name, value);
        }
        let start = if self.start == Start::Beginning { "earliest" } else { "latest" };
        config
            .set("bootstrap.servers", &self.bootstrap_servers)
            // librdkafka wants a name even where there is no group to join.
            .set("group.id", self.group.as_deref().unwrap_or("whippet-consume"))
            .set("auto.offset.reset", start)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("allow.auto.create.topics", "false");
        config
    }
}

/// Why a consumer cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the consumer cannot be made: {0}")]
    Kafka(#[from] KafkaError),
    #[error("the brokers at {servers} do not answer: {source}")]
    NoAnswer { servers: String, source: KafkaError },
    #[error("there is no topic {0}, or it may not be read")]
    NoTopic(String),
}

/// Why there is no next event.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// This event cannot be read; the next one may.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Kafka does not let this consumer read on.
    #[error("Kafka: {0}")]
    Kafka(#[from] KafkaError),
}

/// Why [`Consumer::run`] has ended early.
#[derive(Debug, thiserror::Error)]
pub enum RunError<E> {
    #[error("Kafka: {0}")]
    Kafka(KafkaError),
    #[error("{0}")]
    Handler(E),
}

struct Context {
    /// Partitions that were taken away, until the reader is told.
    revoked: Arc<Mutex<Vec<(String, i32)>>>,
    tokens: Option<Arc<Tokens>>,
}

impl ClientContext for Context {
    /// Whoever asks for a record is told.
    fn error(&self, error: KafkaError, _: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::Authentication) {
            self.tokens.iter().for_each(|tokens| tokens.refused());
        }
    }
}

impl ConsumerContext for Context {
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let Rebalance::Revoke(partitions) = rebalance else { return };
        // What is done need not be read again by the next owner. Nothing stored is no failure.
        if let Err(error) = consumer.commit_consumer_state(CommitMode::Sync) {
            debug!(%error, "nothing was committed as partitions were taken away");
        }
        let mut revoked = self.revoked.lock().unwrap_or_else(PoisonError::into_inner);
        revoked.extend(partitions.elements().iter().map(|one| (one.topic().to_owned(), one.partition())));
    }
}

/// Events as they were written, from one or several topics.
///
/// Whoever drops a future of it loses nothing: an event whose object was being fetched is fetched by
/// the next call. While a store is away, [`recv`](Consumer::recv) tries again for as long as that
/// takes. Beyond `max.poll.interval.ms` Kafka gives the partitions to somebody else, who begins with what was
/// not committed.
pub struct Consumer {
    kafka: Arc<Fed<StreamConsumer<Context>>>,
    revoked: Arc<Mutex<Vec<(String, i32)>>>,
    reader: Reader,
    store: Option<Store>,
    pending: Option<Fetch>,
    /// Each topic's name once.
    topics: Vec<Arc<str>>,
    has_group: bool,
}

impl Consumer {
    /// Connects. References are fetched from `store` only; without one they are errors.
    pub async fn open(settings: &Settings, store: Option<Store>) -> Result<Consumer, OpenError> {
        let tokens = settings.token.clone().map(Tokens::of);
        let context = Context { revoked: Arc::default(), tokens: tokens.clone() };
        let revoked = context.revoked.clone();
        let kafka = StreamConsumer::from_config_and_context(&settings.client(), context)?;
        let kafka = Arc::new(Fed::new(tokens.as_ref(), kafka, |kafka: &StreamConsumer<_>| kafka.client()));
        let topics: Vec<&str> = settings.topics.iter().map(String::as_str).collect();
        if settings.group.is_some() {
            kafka.subscribe(&topics)?;
        } else {
            let (asking, names, servers) =
                (kafka.clone(), settings.topics.clone(), settings.bootstrap_servers.clone());
            let start = settings.start;
            let all = tokio::task::spawn_blocking(move || all_partitions(&asking, &names, &servers, start));
            kafka.assign(&all.await.expect("asking does not panic")?)?;
        }
        Ok(Consumer {
            kafka,
            revoked,
            reader: Reader::new(settings.limits).with_blob(settings.blob.clone()),
            store,
            pending: None,
            topics: topics.into_iter().map(Arc::from).collect(),
            has_group: settings.group.is_some(),
        })
    }

    /// The next event, or why it cannot be read. Call [`done`](Consumer::done) with the place of either.
    pub async fn recv(&mut self) -> Result<Event, RecvError> {
        loop {
            if let Some(lost) = self.reader.lost() {
                return Err(lost.into());
            }
            if let Some(fetch) = &self.pending {
                let object = fetched(self.store.as_ref(), fetch).await;
                let Some(fetch) = self.pending.take() else { continue };
                return match object {
                    Ok(object) => Ok(self.reader.fetched(fetch, object)?),
                    Err(error) => Err(error.into()),
                };
            }
            let record = match self.kafka.recv().await {
                Ok(message) => incoming(&mut self.topics, &message),
                Err(error) if stops(&error) => return Err(error.into()),
                Err(error) => {
                    warn!(%error, "Kafka; the client connects again by itself");
                    continue;
                }
            };
            self.forget_revoked();
            match self.reader.accept(record)? {
                Step::Event(event) => return Ok(event),
                Step::Fetch(fetch) => self.pending = Some(fetch),
                Step::Nothing => {}
            }
        }
    }

    /// The event is processed, or the error is looked at: commits may pass it.
    pub fn done(&mut self, place: &Place) {
        self.reader.done(place);
        // For the commit that is made when the partition is taken away. It may have been: then it does not matter.
        let mut safe = TopicPartitionList::new();
        if let Some(offset) = self.reader.safe_offset(&place.topic, place.partition)
            && safe.add_partition_offset(&place.topic, place.partition, Offset::Offset(offset)).is_ok()
        {
            self.kafka.store_offsets(&safe).ok();
        }
    }

    /// Commits what is safe: everything before the oldest that is not done, and before the first chunk
    /// of the oldest event that is not complete.
    pub async fn commit(&mut self) -> Result<(), KafkaError> {
        self.forget_revoked();
        if !self.has_group {
            return Ok(());
        }
        let mut safe = TopicPartitionList::new();
        for (topic, partition, offset) in self.reader.safe_offsets() {
            safe.add_partition_offset(topic, partition, Offset::Offset(offset))?;
        }
        if safe.count() == 0 {
            return Ok(());
        }
        self.kafka.store_offsets(&safe)?;
        let kafka = self.kafka.clone();
        let committed = tokio::task::spawn_blocking(move || kafka.commit_consumer_state(CommitMode::Sync));
        match committed.await.expect("committing does not panic") {
            // Nothing has changed since the last time.
            Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => Ok(()),
            result => result,
        }
    }

    /// Gives every event, and every error, to `handler`, commits once a second, and once more at the end.
    /// What the handler has returned `Ok` for is done; an `Err` ends it, and that event comes again.
    pub async fn run<H, F, E>(&mut self, stop: &CancellationToken, mut handler: H) -> Result<(), RunError<E>>
    where
        H: FnMut(Result<Event, ReadError>) -> F,
        F: Future<Output = Result<(), E>>,
    {
        let mut tick = tokio::time::interval(COMMIT_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let ended = loop {
            let next = tokio::select! {
                biased;
                () = stop.cancelled() => break Ok(()),
                _ = tick.tick() => {
                    self.commit_or_say().await;
                    continue;
                }
                next = self.recv() => next,
            };
            let (place, event) = match next {
                Ok(event) => (event.place.clone(), Ok(event)),
                Err(RecvError::Read(error)) => (error.place.clone(), Err(error)),
                Err(RecvError::Kafka(error)) => break Err(RunError::Kafka(error)),
            };
            match handler(event).await {
                Ok(()) => self.done(&place),
                Err(error) => break Err(RunError::Handler(error)),
            }
        };
        self.commit_or_say().await;
        ended
    }

    /// A commit that failed is made up for by the next one, or by repeats.
    async fn commit_or_say(&mut self) {
        if let Err(error) = self.commit().await {
            warn!(%error, "not committed; what is done may come again");
        }
    }

    fn forget_revoked(&mut self) {
        let revoked = std::mem::take(&mut *self.revoked.lock().unwrap_or_else(PoisonError::into_inner));
        for (topic, partition) in revoked {
            self.reader.forget(&name(&mut self.topics, &topic), partition);
        }
    }
}

/// The object, for as long as its store is only away.
async fn fetched(store: Option<&Store>, fetch: &Fetch) -> Result<Bytes, ReadError> {
    let Some(store) = store else {
        return Err(fetch.failed(Problem::NoStore { uri: fetch.uri().to_owned() }));
    };
    let mut wait = TRY_AGAIN.0;
    loop {
        match store.get(fetch.uri(), fetch.at_most()).await {
            Ok(object) => return Ok(object),
            Err(error) if error.is_transient() => {
                warn!(uri = fetch.uri(), %error, "waiting for the object store");
                tokio::time::sleep(wait).await;
                wait = (2 * wait).min(TRY_AGAIN.1);
            }
            Err(error) => return Err(fetch.refused(error)),
        }
    }
}

fn all_partitions(
    kafka: &StreamConsumer<Context>,
    topics: &[String],
    servers: &str,
    start: Start,
) -> Result<TopicPartitionList, OpenError> {
    let mut all = TopicPartitionList::new();
    for topic in topics {
        let metadata = kafka.fetch_metadata(Some(topic), ASKING);
        let metadata =
            metadata.map_err(|source| OpenError::NoAnswer { servers: servers.to_owned(), source })?;
        let partitions = metadata.topics().iter().flat_map(|found| found.partitions());
        let offset = if start == Start::Beginning { Offset::Beginning } else { Offset::End };
        let before = all.count();
        for partition in partitions {
            all.add_partition_offset(topic, partition.id(), offset)?;
        }
        if all.count() == before {
            return Err(OpenError::NoTopic(topic.clone()));
        }
    }
    Ok(all)
}

/// Whether there is no use in waiting.
fn stops(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        error.rdkafka_error_code(),
        Some(
            Code::Fatal
                | Code::UnknownTopicOrPartition
                | Code::UnknownTopic
                | Code::TopicAuthorizationFailed
                | Code::GroupAuthorizationFailed
                | Code::SaslAuthenticationFailed
        )
    )
}

fn name(topics: &mut Vec<Arc<str>>, topic: &str) -> Arc<str> {
    if let Some(known) = topics.iter().find(|known| ***known == *topic) {
        return known.clone();
    }
    topics.push(topic.into());
    topics[topics.len() - 1].clone()
}

fn incoming(topics: &mut Vec<Arc<str>>, message: &BorrowedMessage<'_>) -> Incoming {
    let headers = message.headers().map_or_else(Vec::new, |headers| {
        let owned = |value: &[u8]| Bytes::copy_from_slice(value);
        headers.iter().map(|header| (header.key.to_owned(), header.value.map(owned))).collect()
    });
    Incoming {
        topic: name(topics, message.topic()),
        partition: message.partition(),
        offset: message.offset(),
        timestamp_ms: message.timestamp().to_millis(),
        key: message.key().map(Bytes::copy_from_slice),
        value: message.payload().map(Bytes::copy_from_slice),
        headers: Headers(headers),
    }
}
