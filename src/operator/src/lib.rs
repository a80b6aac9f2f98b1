//! The controller: reconciles FineTuneJobs into GPU pods.
//!
//! | folder | what is in it |
//! |---|---|
//! | [`controller`] | what runs the reconciliations: leader lease, watches and caches, the work queue and its workers |
//! | [`reconcile`](mod@reconcile) | the steps of one reconciliation |
//! | [`telemetry`] | what the operator shows: events, metrics, probes |
//!
//! `docs/concepts/operator.md` describes what it guarantees.

pub mod controller;
pub mod error;
#[cfg(test)]
mod fixtures;
pub mod reconcile;
pub mod run;
pub mod settings;
pub mod telemetry;
