//! The Kafka sink: librdkafka, idempotent, and strict about order.
//!
//! Two producers (see [`Unit`]): the pipelined one carries everything; the careful one tries the
//! suspects of a batch that the broker refused. What they are made from is in `settings`, what they
//! report in `client`.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, OwnedHeaders},
    producer::{BaseRecord, Producer as _, PurgeConfig},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    Found, MAX_BATCH_BYTES, PositionRecord, Report, Sink, Ticket, TopicFacts, Unit, Units,
    client::{Client, Mailbox, made_from},
    code_of,
    credentials::{Credentials, LOOK_EVERY, Look},
    settings::{Admin, Settings},
    topics, transactions,
};
use crate::record::Record;

const TAKEN_UP: &str = "files of the kafka client have changed and are taken up";

struct Producers {
    /// What a batch of the main one may have.
    batch_bytes: usize,
    /// Shared with what waits for the end of a transaction.
    main: Arc<Client>,
    /// In transactions: takes over from the main one while that is finished and committed. Idle, or so, until then.
    relief: Option<Arc<Client>>,
    /// Made when the first suspect comes: most relays never need it. In transactions the main producer tries
    /// them, each in one of its own.
    suspects: Option<Client>,
}

impl Producers {
    fn new(batch_bytes: usize, main: Arc<Client>) -> Producers {
        Producers { batch_bytes, main, relief: None, suspects: None }
    }

    fn all(&self) -> impl Iterator<Item = &Client> {
        [&*self.main].into_iter().chain(self.relief.as_deref()).chain(&self.suspects)
    }

    /// Nothing is on its way, and nothing has failed that its producer still has to answer for.
    fn are_idle(&self) -> bool {
        let idle = |client: &Client| client.in_flight_count() == 0 && client.client().fatal_error().is_none();
        self.all().all(idle)
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

impl Kafka {
    /// Makes the producers. Connects in the background: a broker that is down is no error.
    pub fn new(settings: Settings) -> Result<Kafka, KafkaError> {
        let mailbox = Arc::new(Mailbox::default());
        let credentials = Mutex::new(Credentials::new(&settings.properties, Instant::now()));
        let main = Arc::new(producer(&settings, &mailbox, Unit::Main, MAX_BATCH_BYTES)?);
        let admin = Arc::new(Mutex::new(Arc::new(settings.admin()?)));
        let producers = Mutex::new(Producers::new(MAX_BATCH_BYTES, main));
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
        match main.and_then(|main| Ok((main, self.settings.admin()?))) {
            Ok((main, admin)) => {
                let old = self.replace(Producers::new(batch_bytes, Arc::new(main)));
                // Closing waits for librdkafka's threads.
                tokio::task::spawn_blocking(move || drop(old));
                self.replace_admin(admin);
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

    fn replace_admin(&self, fresh: Admin) {
        let old = std::mem::replace(&mut *self.admin_slot(), Arc::new(fresh));
        tokio::task::spawn_blocking(move || drop(old));
    }

    pub(super) fn main(&self) -> Arc<Client> {
        self.producers().main.clone()
    }

    /// The producer that was relieved last.
    pub(super) fn relieved(&self) -> Arc<Client> {
        let producers = self.producers();
        producers.relief.as_ref().unwrap_or(&producers.main).clone()
    }

    pub(super) fn admin(&self) -> Arc<Admin> {
        self.admin_slot().clone()
    }

    /// Before a producer is made: it is made of the files as they are now, and so is what asks for topics.
    pub(super) fn take_up_files(&self) {
        if !self.credentials().take_up(&self.settings.properties) {
            return;
        }
        match self.settings.admin() {
            Ok(admin) => {
                self.replace_admin(admin);
                info!("{TAKEN_UP}");
            }
            Err(error) => warn!(%error, "files of the kafka client have changed and cannot be used"),
        }
    }

    /// The producers will be fenced by those that this relay makes now: a commit that is under way may say so.
    pub(super) fn supersede(&self) {
        self.producers().all().for_each(|client| client.context().supersede());
    }

    /// Takes a new producer, or the two of transactions, and throws the old ones away with all that they have.
    pub(super) async fn exchange(&self, main: Arc<Client>, relief: Option<Arc<Client>>, batch_bytes: usize) {
        let old = self.replace(Producers { relief, ..Producers::new(batch_bytes, main) });
        for (code, reason) in old.all().filter_map(|client| client.client().fatal_error()) {
            info!(?code, reason, "the producer that is thrown away had failed");
        }
        // Purging and closing waits for librdkafka's threads.
        tokio::task::spawn_blocking(move || drop(old)).await.ok();
        self.mailbox.begin_anew();
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
        producers.all().for_each(|client| client.purge(everything));
    }
}

fn producer(
    settings: &Settings,
    mailbox: &Arc<Mailbox>,
    unit: Unit,
    batch_bytes: usize,
) -> Result<Client, KafkaError> {
    made_from(&settings.producer(unit, batch_bytes), settings, mailbox)
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
                        .map_err(|error| code_of(&error))?;
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
        client.send(message).map_err(|(error, _)| code_of(&error))
    }

    async fn reports(&self) -> Vec<Report> {
        loop {
            if self.mailbox.take_adrift() {
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
        self.exchange(Arc::new(main), None, batch_bytes).await;
        Ok(())
    }

    async fn take_over(
        &self,
        units: Units,
        batch_bytes: usize,
        may_create: bool,
        given_up: CancellationToken,
    ) -> Result<Option<Found>, String> {
        transactions::take_over(self, units, batch_bytes, may_create, given_up).await
    }

    fn relieve(&self) {
        let Producers { main, relief, .. } = &mut *self.producers();
        if let Some(relief) = relief {
            std::mem::swap(main, relief);
        }
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
            let facts = topics::look_up(&admin, topic, &settings.create_topics, within).await;
            // One that knows no broker any more (see `Statistics` of `client`) would never answer again, and
            // cannot be told from one that only has to wait.
            if let Err(RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::OperationTimedOut) = facts
                && let Ok(fresh) = settings.admin()
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
