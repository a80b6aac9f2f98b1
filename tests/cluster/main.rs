//! Everything that needs a cluster, as one crate. It is compiled only where it is asked for by name:
//!
//! `tests/run --cluster [MODULE...]` starts a cluster, runs these tests one at a time and stops it again;
//! `cargo test --release --test cluster -- --ignored --test-threads=1 controller::leader` uses the one of `KUBECONFIG` or `make cluster-up`.
#![cfg(all(feature = "operator", feature = "train"))]

mod admission;
mod controller;
mod e2e;
mod faults;
mod kueue;
mod support;
