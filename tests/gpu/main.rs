//! Every operation of the engine on the GPU against the same operation on the CPU, in each precision.
//!
//! `cargo test --release --features cuda --test gpu -- --ignored` on a machine with a GPU.
#![cfg(feature = "cuda")]

mod encode;
mod model;
mod operations;
mod optimizer;
mod support;
