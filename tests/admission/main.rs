//! The CustomResourceDefinition on a real API server: every CEL rule both ways, immutability, `kubectl explain`, printer columns.
//!
//! `cargo test --test admission -- --ignored` with a cluster (`make cluster-up`).
#![cfg(feature = "operator")]

#[path = "../kit/mod.rs"]
mod kit;

mod explain;
mod fixture;
mod rules;
mod transitions;
