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
#[derive(Debug)]
pub struct Pass<'a, D> {
    /// Where to compute.
    pub device: &'a D,
    /// Factor of every LoRA's output; 0 leaves LoRA out. 1 while training.
    pub lora_scale: f32,
    /// LoRA dropout: the masks' names and the probability.
    pub dropout: Option<(&'a DropoutKey, f64)>,
}

impl<D> Clone for Pass<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D> Copy for Pass<'_, D> {}
