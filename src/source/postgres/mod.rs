//! PostgreSQL's log, by logical replication: `wire` is the connection, `pgoutput` what it says, `rows` how
//! its rows become events, `decoder` what belongs to which table and what may be confirmed, `slot` and
//! `publication` what the server needs for it, `stream` the loop, `upkeep` what goes on beside it.

mod decoder;
pub mod doctor;
mod message;
pub mod pgoutput;
mod publication;
mod rows;
pub mod slot;
pub mod stream;
mod upkeep;
pub mod wire;
