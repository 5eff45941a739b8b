//! The admin address: metrics, probes, status, a page for a browser, and the operator's verbs.

pub mod desk;
pub mod metrics;
mod page;
pub mod server;
pub mod status;
pub mod token;
pub mod verbs;
