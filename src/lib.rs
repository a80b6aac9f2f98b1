//! Fine-tunes Stable Diffusion 3 with LoRA on 16 GB GPUs.
//!
//! One package, one binary. `docs/architecture.md` tells which module may use which.
#![deny(rustdoc::broken_intra_doc_links)]

pub mod api;
pub mod cli;
#[cfg(feature = "train")]
pub mod data;
pub mod digest;
#[cfg(feature = "train")]
pub mod kernels;
pub mod listen;
#[cfg(feature = "train")]
pub mod model;
#[cfg(feature = "train")]
pub mod nn;
#[cfg(feature = "operator")]
pub mod operator;
#[cfg(feature = "train")]
pub mod optim;
pub mod plan;
pub mod rng;
#[cfg(feature = "train")]
pub mod sample;
#[cfg(feature = "train")]
pub mod store;
pub mod telemetry;
#[cfg(feature = "train")]
pub mod train;
#[cfg(feature = "train")]
pub mod verify;
pub mod yaml;
