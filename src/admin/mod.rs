//! The admin address: metrics, probes, status.

pub mod metrics;
pub mod server;
pub mod status;
