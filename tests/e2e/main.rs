//! End to end, with real kubelets: the chart installed by Helm, the product's image, SeaweedFS as the bucket.
//!
//! `cargo test --test e2e -- --ignored --test-threads=1` with a cluster (`make cluster-up`). One GPU of the 16 GB class is all that the
//! cluster has, so the tests take turns; each has a namespace of its own.
#![cfg(all(feature = "operator", feature = "train"))]

#[path = "../kit/mod.rs"]
mod kit;

mod chart;
mod disruption;
mod gitops;
mod jobs;
mod queue;
mod quickstart;
mod stage;
