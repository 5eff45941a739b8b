//! The binlog of MySQL and MariaDB: `wire` is the connection, `event` what it says, `payload` what is
//! compressed in it, `map` how rows are written, `rows`, `kind` and `cell` how they become events, `json`,
//! `number` and `time` what some values are, `decoder` what belongs to which table, `server` what the server
//! needs for it, `stream` the loop.
//!
//! Where rows stay in their table no place in the log has to be remembered: the log is read from where it
//! is, and what was before is in the tables, which are polled first (docs/decisions/0009). Where they do not,
//! `transient` reads it from a place that is stored (docs/decisions/0014).

mod cell;
mod decoder;
pub mod event;
pub mod json;
mod kind;
pub mod map;
pub mod number;
pub mod payload;
pub mod rows;
pub mod server;
mod statement;
pub mod stream;
mod time;
mod transient;
pub mod wire;
