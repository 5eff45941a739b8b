//! Events by HTTP, for callers that have no transaction to join. An event is answered with 202 once it is
//! in the spool, an outbox of the relay's own on the local disk; from there it is relayed like a row of any
//! other table.
//!
//! `request` makes events of what came by HTTP, `server` is the address, `spool` the file, `writer` puts into it
//! what many requests bring in one transaction, `volume` tells what the file is on, `check` what `whippet doctor` finds of it.

#[cfg(feature = "sqlite")]
pub mod check;
#[cfg(feature = "sqlite")]
pub mod request;
#[cfg(feature = "sqlite")]
pub mod server;
#[cfg(feature = "sqlite")]
pub mod spool;
pub mod volume;
#[cfg(feature = "sqlite")]
mod writer;
