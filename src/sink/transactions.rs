//! Exactly once: events and the position are in one Kafka transaction (docs/decisions/0012-exactly-once.md).
//!
//! Two producers by turns: while one has a transaction committed, the other has the next. After a commit the broker has
//! to tell every partition of it, and a producer that adds one before that waits for 20 ms (librdkafka's, and no setting):
//! by turns that is over when its turn comes.
//!
//! librdkafka's transactional calls block, so each is made on a thread of its own.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{
    Message, Offset, TopicPartitionList,
    admin::{NewTopic, TopicReplication},
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseRecord, Producer as _},
};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::{
    Found, PositionRecord, Ticket, Unit, Units,
    client::{Client, Mailbox, made_from},
    kafka::Kafka,
    settings::Settings,
    topics::{make_topic, partition_count},
};
use crate::kafka_token::Fed;

/// After this the broker ends the transaction of a relay that is gone. It looks every 10 s
/// (`transaction.abort.timed.out.transaction.cleanup.interval.ms`), so readers wait for 30 s at most.
pub(super) const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(18);
/// How long a transactional call may take.
const WITHIN: Duration = Duration::from_secs(20);
/// How long the end of the position topic is waited for: others may write to it in transactions of their own.
const END_WITHIN: Duration = Duration::from_secs(45);
/// The transactional ids are the unit's, and that with this behind it.
const RELIEF: &str = "-relief";
/// The generation of the tickets of position records.
const OF_POSITIONS: u32 = u32::MAX;

/// Delivery reports of position records, by the commit that they belong to.
#[derive(Debug, Default)]
pub(super) struct Positions {
    reports: Mutex<(u32, Vec<Result<(), RDKafkaErrorCode>>)>,
    arrived: Condvar,
}

impl Positions {
    /// The commit that a ticket belongs to, if it is one of a position record.
    pub fn commit_of(ticket: Ticket) -> Option<u32> {
        (ticket.generation == OF_POSITIONS).then_some(ticket.slot)
    }

    pub fn put(&self, commit: u32, result: Result<(), RDKafkaErrorCode>) {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        if reports.0 == commit {
            reports.1.push(result);
            self.arrived.notify_all();
        }
    }

    /// Begins to collect the reports of another commit.
    fn begin(&self) -> Ticket {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        *reports = (reports.0.wrapping_add(1), Vec::new());
        Ticket { generation: OF_POSITIONS, slot: reports.0 }
    }

    /// Waits for so many reports, or for one of a failure.
    fn wait(&self, count: usize) -> Result<(), String> {
        let guard = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let waits =
            |reports: &mut (u32, Vec<_>)| reports.1.len() < count && reports.1.iter().all(Result::is_ok);
        let (reports, timeout) =
            self.arrived.wait_timeout_while(guard, WITHIN, waits).unwrap_or_else(PoisonError::into_inner);
        match reports.1.iter().find_map(|result| result.err()) {
            Some(code) => Err(format!("the position was refused: {code} ({code:?})")),
            None if timeout.timed_out() => Err("the position was not acknowledged in time".into()),
            None => Ok(()),
        }
    }
}

/// The topic that a line of the client's log says cannot be in a transaction, and why (librdkafka,
/// `rd_kafka_txn_handle_AddPartitionsToTxn`).
pub(super) fn refused_partition<'a>(facility: &str, message: &'a str) -> Option<(&'a str, RDKafkaErrorCode)> {
    let (_, rest) = message.split_once("Failed to add partition \"").filter(|_| facility == "ADDPARTS")?;
    let (topic, why) = rest.split_once('"')?;
    let known = [RDKafkaErrorCode::TopicAuthorizationFailed, RDKafkaErrorCode::UnknownTopicOrPartition];
    // Others are not attempted because of these.
    let says = ["authorization failed", "Unknown topic"];
    known.into_iter().zip(says).find(|(_, text)| why.contains(text)).map(|(code, _)| (topic, code))
}

/// Makes a transactional call until it is done, or has failed for good.
fn until_done(call: impl Fn(Duration) -> Result<(), KafkaError>) -> Result<(), KafkaError> {
    let deadline = Instant::now() + WITHIN;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match call(left) {
            Err(KafkaError::Transaction(error)) if error.is_retriable() && !left.is_zero() => {}
            ended => return ended,
        }
    }
}

/// Why a call has failed. The client may be thrown away before it says by itself that it was fenced.
fn failed(client: &Client, what: &str, error: &KafkaError) -> String {
    if let Some((RDKafkaErrorCode::Fenced, reason)) = client.client().fatal_error() {
        client.context().is_fenced(&reason);
    }
    format!("{what}: {error}")
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(error.to_string()))
}

pub(super) async fn take_over(
    kafka: &Kafka,
    units: Units,
    batch_bytes: usize,
    may_create: bool,
    given_up: CancellationToken,
) -> Result<Option<Found>, String> {
    let Some(topic) = kafka.settings.position_topic.clone() else {
        return Err("there is no topic for positions".into());
    };
    // First: with secrets of yesterday nothing is answered below.
    kafka.take_up_files();
    if !look_at_topic(kafka, &topic, may_create).await? {
        return Ok(None);
    }
    let made = |id: &str| {
        let mut config = kafka.settings.producer(Unit::Main, batch_bytes);
        config
            .set("transactional.id", id)
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT.as_millis().to_string())
            // A refused batch has the whole transaction dropped, with what was let in after it.
            .set("enable.gapless.guarantee", "false");
        made_from(&config, &kafka.settings, &kafka.mailbox).map(Arc::new).map_err(|error| error.to_string())
    };
    let ids = |unit: &str| [unit.to_owned(), format!("{unit}{RELIEF}")];
    let [first, second] = ids(&units.main);
    let (main, relief) = (made(&first)?, made(&second)?);
    let mut gone = Vec::new();
    for id in units.others.iter().flat_map(|unit| ids(unit)) {
        let client = made(&id)?;
        // Whoever fences it, it was no producer of this relay.
        client.context().supersede();
        gone.push((client, id));
    }
    kafka.supersede();
    kafka.exchange(main.clone(), Some(relief.clone()), batch_bytes).await;
    // The old ones have said all that they had to say.
    let was_fenced = kafka.mailbox.take_fenced();
    let settings = kafka.settings.clone();
    blocking(move || {
        fail::fail_point!("eos-fencing", |_| std::process::abort());
        // Each main one before its relief, all before the positions are read, and the first position is committed by the
        // main one: who gets past that has fenced both producers of the relay before it, and nobody has fenced either of
        // its own.
        for (client, id) in &gone {
            initialise(client, id)?;
        }
        tokio::task::spawn_blocking(move || drop(gone));
        initialise(&main, &first)?;
        fail::fail_point!("eos-half-initialised", |_| std::process::abort());
        initialise(&relief, &second)?;
        fail::fail_point!("eos-initialised", |_| std::process::abort());
        let cluster = main.client().fetch_cluster_id(WITHIN).unwrap_or_default();
        let positions = read(&settings, &topic, &units.all, &given_up)?;
        begin(&main)?;
        begin(&relief)?;
        Ok(Some(Found { cluster, positions, was_fenced }))
    })
    .await
}

/// Fences whoever produced as this before, and has what it left open dropped.
fn initialise(client: &Client, id: &str) -> Result<(), String> {
    let begun = until_done(|left| client.init_transactions(left));
    begun.map_err(|error| match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::TransactionalIdAuthorizationFailed) => format!(
            "the transactional id {id} may not be used: allow Describe and Write for all that begin with whippet-, or \
             with what all of this source begin with (the column `unit` of the relay's own table `positions`, where \
             `part` is -1)"
        ),
        _ => format!("cannot begin as the one producer of a delivery unit ({id}): {error}"),
    })
}

fn begin(client: &Client) -> Result<(), String> {
    client.begin_transaction().map_err(|error| format!("cannot begin a transaction: {error}"))?;
    fail::fail_point!("eos-begun", |_| std::process::abort());
    Ok(())
}

/// Whether the topic for positions is there; the first time it is made.
async fn look_at_topic(kafka: &Kafka, topic: &str, may_create: bool) -> Result<bool, String> {
    let (admin, name) = (kafka.admin(), topic.to_owned());
    let asking = admin.clone();
    let counted = tokio::task::spawn_blocking(move || partition_count(&asking, &name, WITHIN));
    match counted.await.unwrap_or(Err(RDKafkaErrorCode::Fail)) {
        Ok(1) => Ok(true),
        Ok(count) => Err(format!(
            "topic {topic} has {count} partitions and positions need one: name another topic \
             (kafka.position_topic), or make this one anew with one partition and cleanup.policy=compact"
        )),
        Err(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) if may_create => {
            // As the broker replicates by default; small segments, because compaction leaves the last one alone.
            let new = NewTopic::new(topic, 1, TopicReplication::Fixed(-1))
                .set("cleanup.policy", "compact")
                .set("segment.bytes", "16777216");
            make_topic(&admin, new, WITHIN).await.map(|()| true).map_err(|code| {
                format!(
                    "cannot create topic {topic} ({code}): create it with one partition and \
                     cleanup.policy=compact, or allow this relay to"
                )
            })
        }
        Err(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => Ok(false),
        Err(code) => Err(format!("cannot look at topic {topic}: {code}")),
    }
}

/// The last position records of all units whose ids begin with this, to the end of the topic as it is now.
pub(super) fn read(
    settings: &Settings,
    topic: &str,
    units: &str,
    given_up: &CancellationToken,
) -> Result<HashMap<String, Vec<u8>>, String> {
    let consumer = |isolation: &str| -> Result<Fed<BaseConsumer>, KafkaError> {
        let mut config = settings.client();
        let consumer: BaseConsumer = config
            .set("group.id", units)
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .set("fetch.wait.max.ms", "10")
            .set("isolation.level", isolation)
            .create()?;
        Ok(Fed::new(settings.tokens.as_ref(), consumer, |consumer| consumer.client()))
    };
    let said = |error: KafkaError| format!("cannot read topic {topic}: {error}");
    let end = {
        let any = consumer("read_uncommitted").map_err(said)?;
        any.fetch_watermarks(topic, 0, WITHIN).map_err(said)?.1
    };
    let committed = consumer("read_committed").map_err(said)?;
    let deadline = Instant::now() + END_WITHIN;
    // What others have open ends, or is ended by the broker.
    while committed.fetch_watermarks(topic, 0, WITHIN).map_err(said)?.1 < end {
        // That of a relay that is gone ends at once with the next takeover, if this relay has inherited meanwhile.
        if given_up.is_cancelled() || Instant::now() > deadline {
            return Err(format!("a transaction in topic {topic} does not end"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, 0, Offset::Beginning).map_err(said)?;
    committed.assign(&list).map_err(said)?;
    let mut found = HashMap::new();
    loop {
        match committed.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => {
                let key = message.key().and_then(|key| std::str::from_utf8(key).ok()).unwrap_or_default();
                if key.strip_prefix(units).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '/']))
                {
                    match message.payload() {
                        Some(value) => found.insert(key.to_owned(), value.to_vec()),
                        None => found.remove(key),
                    };
                }
            }
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(found),
            // A broker that is restarted: the client finds it again.
            Some(Err(_)) | None if Instant::now() < deadline => {}
            Some(Err(error)) => return Err(said(error)),
            None => return Err(format!("topic {topic} could not be read in time")),
        }
    }
}

pub(super) fn commit(
    kafka: &Kafka,
    position: Vec<PositionRecord>,
) -> impl Future<Output = Result<(), String>> + Send + 'static {
    let (client, mailbox) = (kafka.relieved(), kafka.mailbox.clone());
    let topic = kafka.settings.position_topic.clone().unwrap_or_default();
    blocking(move || {
        fail::fail_point!("eos-before-position", |_| std::process::abort());
        send(&client, &mailbox, &topic, &position)?;
        fail::fail_point!("eos-before-commit", |_| std::process::abort());
        let committed = until_done(|left| client.commit_transaction(left));
        committed.map_err(|error| failed(&client, "cannot commit", &error))?;
        fail::fail_point!("eos-committed", |_| std::process::abort());
        begin(&client)
    })
}

/// Waits for the acknowledgements here, and until the client has forgotten the records, which it does a moment after it
/// has reported on the last: its own flush, which comes with the commit, waits in steps of 100 ms.
fn send(
    client: &Client,
    mailbox: &Arc<Mailbox>,
    topic: &str,
    position: &[PositionRecord],
) -> Result<(), String> {
    let ticket = mailbox.positions.begin();
    for (key, value) in position {
        let mut record: BaseRecord<'_, str, [u8], usize> =
            BaseRecord::with_opaque_to(topic, ticket.to_opaque());
        (record.key, record.payload, record.partition) =
            (Some(key.as_str()), Some(value.as_slice()), Some(0));
        client.send(record).map_err(|(error, _)| format!("the position was not taken: {error}"))?;
    }
    mailbox.positions.wait(position.len())?;
    let deadline = Instant::now() + WITHIN;
    while client.in_flight_count() > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

pub(super) fn abort(kafka: &Kafka) -> impl Future<Output = Result<(), String>> + Send + 'static {
    let client = kafka.main();
    blocking(move || {
        let dropped = until_done(|left| client.abort_transaction(left));
        dropped.map_err(|error| failed(&client, "cannot drop the transaction", &error))?;
        info!("a transaction was dropped");
        begin(&client)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_of_the_client_tells_which_topic_is_to_blame() {
        let line = "[thrd:b/1]: b/1: Failed to add partition \"orders\" [3] to transaction: Broker: Topic \
                    authorization failed";
        let code = RDKafkaErrorCode::TopicAuthorizationFailed;
        assert_eq!(refused_partition("ADDPARTS", line), Some(("orders", code)));
        assert_eq!(refused_partition("TXNERR", line), None);
        let other = line.replace("Topic authorization failed", "Operation not attempted");
        assert_eq!(refused_partition("ADDPARTS", &other), None);
    }
}
