//! The admin address: metrics, probes, status, and the operator's verbs.

pub mod metrics;
pub mod server;
pub mod status;
pub mod token;
pub mod verbs;
