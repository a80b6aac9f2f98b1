//! How the work of a step is divided so that it fits the device: planned before the run, and divided further where the device ran out of
//! memory all the same. Every division computes the same sums from the same random numbers.

use super::checkpoint::ExecutionPlan;
use finetune_api::plan::{GradientCheckpointing, ModelShape};
use finetune_model::mmdit::MmditConfig;

/// Parts of the blocks that are recomputed more after each failure.
const RECOMPUTE_STEPS: u32 = 4;

/// What the memory plan needs to know of a transformer.
pub fn shape(config: &MmditConfig) -> ModelShape {
    ModelShape {
        name: finetune_model::survey::name(config),
        layers: config.num_layers as u64,
        hidden: config.width() as u64,
        head: config.attention_head_dim as u64,
        // Counted from the first block: a later one with a second attention counts for all before it.
        dual_layers: config.dual_attention_layers.iter().max().map_or(0, |&last| last as u64 + 1),
        qk_norm: config.qk_norm.is_some(),
        joint: config.joint_attention_dim as u64,
        pooled: config.pooled_projection_dim as u64,
        channels: config.in_channels as u64,
        patch: config.patch_size as u64,
        ..ModelShape::SD3_MEDIUM
    }
}

/// The division after the device ran out of memory under `plan`: a quarter of the blocks more are computed again, where that may be
/// chosen; then the passes are halved. `None` if nothing is left to divide.
pub fn smaller(plan: &ExecutionPlan, layers: u32, checkpointing: GradientCheckpointing) -> Option<ExecutionPlan> {
    if checkpointing == GradientCheckpointing::Auto && plan.recomputed_blocks < layers {
        let more = layers.div_ceil(RECOMPUTE_STEPS);
        return Some(ExecutionPlan { recomputed_blocks: (plan.recomputed_blocks + more).min(layers), ..plan.clone() });
    }
    (plan.micro_batch > 1).then(|| ExecutionPlan { micro_batch: plan.micro_batch.div_ceil(2), ..plan.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_api::plan::FrozenWeights;

    fn plan(micro_batch: u32, recomputed_blocks: u32) -> ExecutionPlan {
        ExecutionPlan { device: "cuda".into(), dtype: "bf16".into(), weights: FrozenWeights::Float, micro_batch, recomputed_blocks }
    }

    fn fallbacks(first: ExecutionPlan, layers: u32, checkpointing: GradientCheckpointing) -> Vec<(u32, u32)> {
        std::iter::successors(Some(first), |plan| smaller(plan, layers, checkpointing)).map(|p| (p.micro_batch, p.recomputed_blocks)).collect()
    }

    #[test]
    fn blocks_are_recomputed_before_passes_get_smaller() {
        let auto = fallbacks(plan(3, 0), 10, GradientCheckpointing::Auto);
        assert_eq!(auto, [(3, 0), (3, 3), (3, 6), (3, 9), (3, 10), (2, 10), (1, 10)]);
        assert_eq!(fallbacks(plan(4, 0), 24, GradientCheckpointing::Never), [(4, 0), (2, 0), (1, 0)]);
        assert_eq!(fallbacks(plan(4, 24), 24, GradientCheckpointing::Always), [(4, 24), (2, 24), (1, 24)]);
    }

    #[test]
    fn the_shape_of_a_configuration_is_that_of_the_published_model() {
        let config = MmditConfig::medium(None, vec![]);
        assert_eq!(shape(&config), ModelShape::SD3_MEDIUM);
        let config = MmditConfig::medium(Some("rms_norm"), (0..13).collect());
        assert_eq!(shape(&config), ModelShape::SD35_MEDIUM);
    }
}
