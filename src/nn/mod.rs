//! Differentiable layers: each forward is directly followed by its backward.

pub mod flow_matching;

/// Names the LoRA dropout masks of a batch: one stream per sample and module, so that micro-batch splits, threads and
/// recomputation do not change them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// For each sample of the batch: (epoch or step, ordinal within it). Ordinals are below 2^32.
    pub samples: Vec<(u64, u64)>,
}
