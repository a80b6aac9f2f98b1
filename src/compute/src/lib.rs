//! Numerics: kernels for CPU and GPU, differentiable layers over them, optimizers. No files, no network.

pub mod kernels;
pub mod nn;
pub mod optim;
