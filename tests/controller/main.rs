//! The controller against a real API server, controller-manager and scheduler. Pods have no kubelet: the tests write their status as one would.
//!
//! `cargo test --test controller -- --ignored` with a cluster (`make cluster-up`, or `KUBECONFIG`).
#![cfg(feature = "operator")]

#[path = "../kit/mod.rs"]
mod kit;

mod failures;
mod faults;
mod leader;
mod lifecycle;
mod ownership;
mod stage;
