//! The controller: reconciles FineTuneJobs into GPU pods.
//!
//! One reconciliation is a row of steps, one file each; only `dereference`, `apply` and `write` know a client:
//!
//! | step | file | |
//! |---|---|---|
//! | dereference | [`dereference`], [`warnings`] | what the cluster holds, mostly from caches ([`caches`]): [`world::World`] |
//! | validate | [`validate`] | the spec becomes a [`validate::ValidatedJob`] with its resolved configuration |
//! | decide | [`attempts`], [`decide`] | what to do: [`decide::Intent`] |
//! | build | [`build`] | ConfigMap and Job |
//! | apply | [`apply`] | carries out the intent |
//! | status | [`status`], [`conditions`], [`transitions`] | the new status; events and metrics of its change |
//! | write | [`write`](mod@write) | writes it where it differs |
//!
//! `docs/concepts/operator.md` describes what it guarantees.

pub mod apply;
pub mod attempts;
pub mod backoff;
pub mod build;
pub mod caches;
pub mod client;
pub mod conditions;
pub mod context;
pub mod decide;
pub mod dereference;
pub mod drive;
pub mod error;
pub mod events;
#[cfg(test)]
mod fixtures;
pub mod http;
pub mod kueue;
pub mod lease;
pub mod metrics;
pub mod nodes;
pub mod pod_names;
pub mod progress;
pub mod queue;
pub mod readiness;
pub mod reconcile;
pub mod run;
pub mod settings;
pub mod status;
mod strip;
#[cfg(test)]
mod tests;
pub mod transitions;
pub mod unreadable;
pub mod validate;
pub mod warnings;
pub mod world;
pub mod write;
