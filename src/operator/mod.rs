//! The controller: reconciles FineTuneJobs into GPU pods.

pub mod backoff;
pub mod client;
pub mod http;
pub mod lease;
pub mod metrics;
