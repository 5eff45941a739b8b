//! The relay as a process, on real PostgreSQL and real Kafka. Start them with `scripts/services up`;
//! `scripts/test` does it by itself.

mod bad_input;
mod broker;
mod bucket;
mod checker;
mod cli;
mod consume;
mod crash;
mod database;
mod doctor;
mod failures;
mod faults;
mod harness;
mod impostor;
mod leases;
mod load;
mod proxy;
mod purge;
mod records;
mod sqlite;
mod store;
mod stream;
mod stream_changes;
mod stream_faults;
mod stream_rows;
mod stream_sizes;
mod verbs;
