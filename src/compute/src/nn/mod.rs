//! Differentiable layers: each forward is directly followed by its backward.
//!
//! Shape legend: `rows` = batch · tokens; buffers are [rows, width] row-major. `d_` is the gradient of the loss by what
//! follows. A backward *assigns* what it returns and *accumulates* into [`Gradients`] and into buffers lent as `&mut`.
//! Frozen weights get no gradient.

mod attention;
mod feed_forward;
pub mod flow_matching;
mod linear;

pub use attention::{Attention, AttentionSaved, Projections};
pub use feed_forward::{FeedForward, FeedForwardSaved};
pub use linear::{Gradients, Linear, LinearSaved};

use crate::kernels::Engine;

/// Names the LoRA dropout masks of a batch: one stream per sample and module, so that micro-batch splits, threads and
/// recomputation do not change them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// For each sample of the batch: (epoch or step, ordinal within it). Ordinals are below 2^32.
    pub samples: Vec<(u64, u64)>,
}

/// What a pass through the layers has in common.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// Where to compute.
    pub engine: &'a Engine,
    /// Factor of every LoRA's output; 0 leaves LoRA out. 1 while training.
    pub lora_scale: f32,
    /// LoRA dropout: the masks' names and the probability.
    pub dropout: Option<(&'a DropoutKey, f64)>,
}
