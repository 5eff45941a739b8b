//! The relay as a process, on real PostgreSQL and real Kafka. Start them with `scripts/services up`;
//! `scripts/test` does it by itself.

mod bad_input;
mod broker;
mod checker;
mod cli;
mod crash;
mod database;
mod failures;
mod faults;
mod harness;
mod impostor;
mod keep;
mod leases;
mod load;
mod proxy;
mod records;
mod sqlite;
mod stream;
mod stream_changes;
mod stream_faults;
mod stream_rows;
mod stream_sizes;
mod verbs;
