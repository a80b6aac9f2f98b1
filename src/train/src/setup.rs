//! From the resolved configuration to the parts of a run. Pure.

use finetune_api::plan::{
    FlowMatchingConfig, FrozenWeights, LoraConfig, OptimizerConfig, OptimizerKind, ScheduleConfig, ScheduleKind, ShiftConfig, WeightingScheme,
};
use finetune_compute::kernels::WeightFormat;
use finetune_compute::nn::flow_matching::{LossKind, SigmaTable, TimestepDensity, Weighting};
use finetune_compute::optim::schedule::Shape;
use finetune_compute::optim::{AdamWSettings, OptimizerSettings, ProdigySettings, Schedule};
use finetune_model::layout::SchedulerConfig;
use finetune_model::lora::LoraSpec;

/// The optimizer and its settings.
pub fn optimizer(config: &OptimizerConfig) -> OptimizerSettings {
    let OptimizerConfig { kind, learning_rate: _, beta1, beta2, weight_decay, epsilon, prodigy } = config;
    let (beta1, beta2, weight_decay, epsilon) = (*beta1, *beta2, *weight_decay, *epsilon);
    let adam = AdamWSettings { beta1, beta2, epsilon, weight_decay };
    match kind {
        OptimizerKind::AdamW => OptimizerSettings::AdamW(adam),
        OptimizerKind::AdamW8bit => OptimizerSettings::AdamW8bit(adam),
        OptimizerKind::Prodigy => {
            let defaults = ProdigySettings { beta1, beta2, epsilon, weight_decay, ..ProdigySettings::default() };
            OptimizerSettings::Prodigy(prodigy.as_ref().map_or(defaults, |p| ProdigySettings {
                beta3: Some(p.beta3),
                use_bias_correction: p.use_bias_correction,
                safeguard_warmup: p.safeguard_warmup,
                d0: p.d0,
                d_coef: p.d_coef,
                growth_rate: p.growth_rate.unwrap_or(f64::INFINITY),
                ..defaults
            }))
        }
    }
}

/// How the transformer keeps its blocks' weights.
pub fn format(weights: FrozenWeights) -> WeightFormat {
    match weights {
        FrozenWeights::Float => WeightFormat::Float,
        FrozenWeights::Int8 => WeightFormat::Int8,
    }
}

/// The learning rate of each of `total_steps` updates.
pub fn schedule(config: &ScheduleConfig, learning_rate: f64, total_steps: u64) -> Schedule {
    let ScheduleConfig { kind, warmup_steps, cycles, power } = config;
    let shape = match kind {
        ScheduleKind::Constant => Shape::Constant,
        ScheduleKind::ConstantWithWarmup => Shape::ConstantWithWarmup,
        ScheduleKind::Linear => Shape::Linear,
        ScheduleKind::Cosine => Shape::Cosine,
        ScheduleKind::CosineWithRestarts => Shape::CosineWithRestarts,
        ScheduleKind::Polynomial => Shape::Polynomial,
    };
    Schedule { shape, learning_rate, warmup_steps: *warmup_steps, total_steps, cycles: *cycles, power: *power }
}

/// The noise levels that are trained, for pictures of so many patches.
///
/// # Errors
/// What is wrong with the scheduler's numbers, for a person.
pub fn noise_levels(config: &FlowMatchingConfig, scheduler: &SchedulerConfig, patches: usize) -> Result<SigmaTable, String> {
    let shift = match config.shift {
        None => scheduler.shift,
        Some(ShiftConfig::Number(shift)) => shift,
        Some(ShiftConfig::ByResolution) => scheduler.shift_by_resolution(patches)?,
    };
    Ok(SigmaTable::new(scheduler.num_train_timesteps as usize, shift as f32))
}

/// How timesteps are drawn and what the loss compares.
pub fn flow_matching(config: &FlowMatchingConfig) -> (TimestepDensity, LossKind) {
    let FlowMatchingConfig { weighting_scheme, logit_mean, logit_std, mode_scale, shift: _, precondition_outputs } = config;
    let weighting = match weighting_scheme {
        WeightingScheme::LogitNormal => Weighting::LogitNormal,
        WeightingScheme::Mode => Weighting::Mode,
        WeightingScheme::SigmaSqrt => Weighting::SigmaSqrt,
        WeightingScheme::CosMap => Weighting::Cosmap,
        WeightingScheme::None => Weighting::None,
    };
    let density = TimestepDensity { weighting, logit_mean: *logit_mean, logit_std: *logit_std, mode_scale: *mode_scale };
    (density, LossKind { weighting, precondition_outputs: *precondition_outputs })
}

/// What to train.
pub fn lora(config: &LoraConfig) -> LoraSpec {
    let LoraConfig { rank, alpha, dropout, target_modules } = config;
    LoraSpec { rank: *rank as usize, alpha: *alpha, dropout: *dropout, target_modules: target_modules.clone() }
}
