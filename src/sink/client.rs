//! One producer, and what librdkafka says on a thread of its own: delivery reports, errors, statistics and
//! lines of its log. Reports wait in one list until the relay fetches them.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rdkafka::{
    ClientConfig, ClientContext, Message,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    error::{KafkaError, RDKafkaErrorCode},
    message::DeliveryResult,
    producer::{Producer as _, ProducerContext, ThreadedProducer},
};
use serde::Deserialize;
use tokio::sync::Notify;
use tracing::{debug, error, warn};

use super::{
    Report, Ticket, code_of,
    settings::Settings,
    transactions::{self, Positions},
};
use crate::{
    kafka_token::{Fed, Tokens},
    record::Landed,
};

pub(super) type Client = Fed<ThreadedProducer<Context>>;

/// A producer whose reports come to this mailbox.
pub(super) fn made_from(
    config: &ClientConfig,
    settings: &Settings,
    mailbox: &Arc<Mailbox>,
) -> Result<Client, KafkaError> {
    let tokens = settings.tokens.clone();
    let context = Context { mailbox: mailbox.clone(), superseded: AtomicBool::new(false), tokens };
    let client = ThreadedProducer::from_config_and_context(config, context)?;
    Ok(Fed::new(settings.tokens.as_ref(), client, |client| client.client()))
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

/// Delivery reports on their way from librdkafka's thread to the relay.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    reports: Mutex<Vec<Report>>,
    pub(super) arrived: Notify,
    /// Those of position records, which their sender waits for.
    pub(super) positions: Positions,
    /// Topics that cannot be in a transaction. That is told in a line of the client's log alone; the records
    /// are said to be purged.
    refused: Mutex<HashMap<String, RDKafkaErrorCode>>,
    /// Another producer of this unit has fenced ours.
    fenced: AtomicBool,
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

    pub(super) fn take(&self) -> Vec<Report> {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let room = reports.len();
        std::mem::replace(&mut *reports, Vec::with_capacity(room))
    }

    /// Whether a producer knows no broker any more; asked once.
    pub(super) fn take_adrift(&self) -> bool {
        self.adrift.swap(false, Ordering::Acquire)
    }

    /// Whether another producer had fenced one of ours; asked once.
    pub(super) fn take_fenced(&self) -> bool {
        self.fenced.swap(false, Ordering::Relaxed)
    }

    /// The producers are new ones: what the old ones said of themselves is not true of them.
    pub(super) fn begin_anew(&self) {
        self.adrift.store(false, Ordering::Release);
        self.refused().clear();
    }
}

pub(super) struct Context {
    mailbox: Arc<Mailbox>,
    /// This relay itself has fenced it, or is about to.
    superseded: AtomicBool,
    tokens: Option<Arc<Tokens>>,
}

impl Context {
    /// It will be fenced by a producer that this relay makes: no news then.
    pub(super) fn supersede(&self) {
        self.superseded.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_fenced(&self, reason: &str) {
        if self.superseded.load(Ordering::Relaxed) {
            debug!(reason, "a producer that was thrown away has heard of it");
        } else if !self.mailbox.fenced.swap(true, Ordering::Relaxed) {
            warn!(reason, "another producer of this unit has fenced this relay's");
        }
    }
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
            Some(RDKafkaErrorCode::Fenced) => self.is_fenced(reason),
            code => {
                if code == Some(RDKafkaErrorCode::Authentication) {
                    self.tokens.iter().for_each(|tokens| tokens.refused());
                }
                warn!(%error, %reason, "kafka is in trouble; the client goes on trying");
            }
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
            Ok(message) => {
                let offset = Some(message.offset()).filter(|offset| *offset >= 0);
                Ok(Landed { partition: message.partition(), offset })
            }
            Err((error, message)) => {
                let code = code_of(error);
                let code = self.mailbox.refused().get(message.topic()).copied().unwrap_or(code);
                debug!(topic = message.topic(), partition = message.partition(), ?code, "refused");
                Err(code)
            }
        };
        let ticket = Ticket::from_opaque(opaque);
        match Positions::commit_of(ticket) {
            Some(commit) => self.mailbox.positions.put(commit, result.map(|_| ())),
            None => self.mailbox.put(Report { ticket, result }),
        }
    }
}
