//! Where records go. A sink takes records without waiting and reports on each of them later.
//!
//! The contract between the relay and a sink:
//!
//! - [`Sink::send`] never waits. Every ticket that it accepted gets exactly one [`Report`], unless
//!   the sink is rebuilt first: then the reports of the older generation mean nothing.
//! - Records of one partition that were accepted by one producer appear in the order in which they
//!   were sent, without a gap: when one is refused by the broker, the producer dies (`Fatal`)
//!   rather than let a later one pass. See docs/decisions/0003-never-overtake.md.
//! - A sink knows no table and no database.

pub mod classify;
mod client;
mod credentials;
mod kafka;
pub mod probe;
mod settings;
mod survey;
mod topics;
mod transactions;

use std::{collections::HashMap, future::Future, time::Duration};

use rdkafka::{error::KafkaError, types::RDKafkaErrorCode};
use tokio_util::sync::CancellationToken;

pub use self::{
    kafka::Kafka,
    settings::Settings,
    survey::{Cleanup, Survey, survey},
};
use crate::record::{Landed, Record};

/// Names one attempt at one event: which generation of the producers sent it, and the ledger's slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    pub generation: u32,
    pub slot: u32,
}

impl Ticket {
    /// The ticket as the opaque word that librdkafka carries: no allocation for each record.
    pub fn to_opaque(self) -> usize {
        (self.generation as usize) << 32 | self.slot as usize
    }

    pub fn from_opaque(opaque: usize) -> Ticket {
        Ticket { generation: (opaque >> 32) as u32, slot: opaque as u32 }
    }
}

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    pub ticket: Ticket,
    pub result: Result<Landed, RDKafkaErrorCode>,
}

/// What the caller does next; chosen by `classify`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Try again: the cause lies outside the record and ends by itself or by an operator.
    Transient,
    /// This record never: it parks its key.
    Rejected,
    /// This producer never: it is rebuilt, and what it had not delivered is read again.
    Fatal,
}

impl Kind {
    /// The value of the metric label `kind`.
    pub fn label(self) -> &'static str {
        match self {
            Kind::Transient => "transient",
            Kind::Rejected => "rejected",
            Kind::Fatal => "fatal",
        }
    }
}

/// Which of the two producers sends: the pipelined one, or the careful one that has one record in
/// flight at a time and tries the suspects of a refused batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Main,
    Suspects,
}

/// The largest batch, in bytes, where no topic asks for smaller ones: just below what a broker takes
/// unless it was told otherwise (`message.max.bytes`, 1048588).
pub const MAX_BATCH_BYTES: usize = 1_000_000;

/// What is known about a topic that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopicFacts {
    pub partitions: i32,
    /// `None` where the broker has not answered in time, or does not tell us: it is what was known before.
    pub takes: Option<Takes>,
}

/// What a topic takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Takes {
    /// `max.message.bytes` of the topic, where the broker tells it to us, in bytes.
    pub max_message_bytes: Option<usize>,
    /// Whether the broker keeps only the last record of a key (`cleanup.policy`).
    pub compacted: bool,
}

/// Key and value of a record of the position topic.
pub type PositionRecord = (String, Vec<u8>);

/// Delivery units of a source that are to be taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Units {
    /// What the ids of all units of the source begin with.
    pub all: String,
    /// The one that is produced as from now on.
    pub main: String,
    /// Nobody is to produce as these.
    pub others: Vec<String>,
}

/// What is found when a delivery unit is taken over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The identity of the Kafka cluster.
    pub cluster: String,
    /// The last records of the position topic, by key: those of all units of the source.
    pub positions: HashMap<String, Vec<u8>>,
    /// Whether another producer had fenced the one that was thrown away.
    pub was_fenced: bool,
}

pub trait Sink: Send + Sync + 'static {
    /// Hands a record over without waiting. An error means that it was not taken.
    fn send(&self, unit: Unit, ticket: Ticket, record: &Record<'_>) -> Result<(), RDKafkaErrorCode>;

    /// The reports that came in; waits for at least one.
    /// Cancel safe: reports stay where they are until this returns.
    fn reports(&self) -> impl Future<Output = Vec<Report>> + Send;

    /// Throws both producers away with everything that they have not delivered, and makes new
    /// ones, which send batches of at most `batch_bytes`. What an old one had already sent may still
    /// land, as a repeat.
    fn rebuild(&self, batch_bytes: usize) -> impl Future<Output = Result<(), KafkaError>> + Send;

    /// Exactly once: throws the producers away and makes those of the transactions of a unit. Whoever else produces as
    /// one of these units cannot any more, what they had not committed is gone, and what they had is found. A
    /// transaction is open then, which is committed before anything else is sent: only after that is nobody else at
    /// work. `None` where there is no topic for positions, and none may be created. Fails soon where it is given up.
    fn take_over(
        &self,
        units: Units,
        batch_bytes: usize,
        may_create: bool,
        given_up: CancellationToken,
    ) -> impl Future<Output = Result<Option<Found>, String>> + Send;

    /// Has the other producer of transactions take what is sent from now on, in the next transaction.
    fn relieve(&self);

    /// Commits the transaction of the producer that was relieved, with this position, once everything that was sent in it is
    /// acknowledged. It may be relieved of the next one when this has answered. After an error nobody knows whether it is
    /// committed.
    fn commit(
        &self,
        position: Vec<PositionRecord>,
    ) -> impl Future<Output = Result<(), String>> + Send + 'static;

    /// Drops the transaction, and opens the next one; nothing is sent until it has answered.
    fn abort(&self) -> impl Future<Output = Result<(), String>> + Send + 'static;

    /// Asks the broker whether a topic is there and what it takes.
    fn look_up(
        &self,
        topic: String,
        within: Duration,
    ) -> impl Future<Output = Result<TopicFacts, RDKafkaErrorCode>> + Send + 'static;
}

/// What an error is called. One without a code is of the client itself.
fn code_of(error: &KafkaError) -> RDKafkaErrorCode {
    match error {
        // The crate does not count it among those with a code.
        KafkaError::AdminOp(code) => *code,
        error => error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_survives_the_opaque_word() {
        for (generation, slot) in [(0, 0), (1, u32::MAX), (u32::MAX, 7)] {
            let ticket = Ticket { generation, slot };
            assert_eq!(Ticket::from_opaque(ticket.to_opaque()), ticket);
        }
    }
}
