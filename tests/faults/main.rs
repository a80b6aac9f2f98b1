//! Faults that take their time: lost kubelets, drained nodes, restarted API servers, absent buckets, wrong credentials.
//!
//! `cargo test --test faults -- --ignored --test-threads=1` with a cluster of two nodes (`KCM_FLAGS=--node-monitor-grace-period=16s make cluster-up`). Each test ends with the LoRA of
//! an undisturbed run, or with the condition and the reason that people need.
#![cfg(all(feature = "operator", feature = "train"))]

#[path = "../kit/mod.rs"]
mod kit;

#[path = "../e2e/jobs.rs"]
mod jobs;
#[path = "../e2e/stage.rs"]
mod stage;

mod disturbed;
mod lifecycle;
mod nodes;
mod refused;
