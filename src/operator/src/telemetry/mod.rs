//! What the operator shows of itself: events, metrics, and the server for metrics and probes.

pub mod events;
pub mod http;
pub mod metrics;
