//! What runs the reconciliations: leader lease, watches and their caches, the work queue and its workers, and what they share.

pub mod backoff;
pub mod caches;
pub mod client;
pub mod context;
pub mod departed;
pub mod drive;
pub mod lease;
pub mod pod_names;
pub mod progress;
pub mod queue;
pub mod readiness;
mod strip;
pub mod workloads;
