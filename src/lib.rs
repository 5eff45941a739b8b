//! Whippet, a resilient transactional-outbox relay.
//!
//! The modules, in the order in which an event meets them.

pub mod event;
