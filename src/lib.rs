//! Whippet, a resilient transactional-outbox relay.
//!
//! An application commits its business rows and its outbox rows in one transaction. Whippet reads
//! the committed outbox rows and publishes them to Kafka, in order per key, whatever fails in
//! between. The modules, in the order in which an event meets them:

pub mod event;
pub mod ingest;
pub mod record;
pub mod relay;
pub mod sink;
pub mod source;
pub mod store;

pub mod coordinate;

// The other half: what reads the records.
pub mod consume;

pub mod admin;
pub mod app;
pub mod cli;
mod command;
pub mod config;
#[cfg(feature = "sqlite")]
pub mod demo;
pub mod doctor;
mod http;
pub mod import;
pub mod kafka_token;
pub mod telemetry;
