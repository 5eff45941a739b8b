//! The admin address: metrics, probes, status, and the operator's verbs.

pub mod metrics;
pub mod server;
pub mod status;
mod token;
pub mod verbs;
