//! A step of a small model on a device against the same step on the CPU, which the reference implementation's cases judge (`finetune verify`).

use std::sync::Arc;

use serde::Serialize;

use super::{BenchError, RandomWeights, example, objective, once};
use crate::setup;
use crate::step::MicroBatch;
use crate::verify::relative_error;
use finetune_api::plan::TrainingConfig;
use finetune_compute::kernels::{Engine, Precision, WeightFormat};
use finetune_compute::optim::Param;
use finetune_model::learner;
use finetune_model::lora::LoraLayout;
use finetune_model::mmdit::MmditConfig;

/// One comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// What was computed in what.
    pub name: String,
    /// The largest ‖device − CPU‖ / ‖CPU‖ of any LoRA gradient.
    pub error: f64,
    /// What rounding explains.
    pub allowed: f64,
    /// Whether the error is within that.
    pub passed: bool,
}

/// Compares the gradients of every LoRA tensor of a small model, with weights as numbers and in 8 bits.
///
/// # Errors
/// If the device fails.
pub fn numerics(engine: &Engine, training: &TrainingConfig) -> Result<Vec<Check>, BenchError> {
    let config = config();
    let weights = RandomWeights::write(&config, None)?;
    let allowed = match engine.precision() {
        Precision::F32 => 1e-5,
        Precision::F16 => 1e-2,
        Precision::Bf16 => 8e-2,
    };
    let formats = [("", WeightFormat::Float), (", frozen weights in 8 bits", WeightFormat::Int8)];
    let check = |(name, format)| {
        let (got, want) = (gradients(&config, &weights, engine, format, training)?, gradients(&config, &weights, &Engine::cpu(), format, training)?);
        let error =
            got.iter().zip(&want).map(|(got, want)| relative_error(got, &want.iter().map(|value| f64::from(*value)).collect::<Vec<_>>())).fold(0.0, f64::max);
        Ok(Check { name: format!("gradients in {}{name}", engine.precision()), error, allowed, passed: error <= allowed })
    };
    formats.into_iter().map(check).collect()
}

/// A model with all parts, and heads as large as the published ones have.
pub(super) fn config() -> MmditConfig {
    MmditConfig {
        num_layers: 3,
        num_attention_heads: 2,
        joint_attention_dim: 64,
        caption_projection_dim: 128,
        pooled_projection_dim: 32,
        pos_embed_max_size: 16,
        ..MmditConfig::medium(Some("rms_norm"), vec![0, 1])
    }
}

fn gradients(
    config: &MmditConfig,
    weights: &RandomWeights,
    engine: &Engine,
    format: WeightFormat,
    training: &TrainingConfig,
) -> Result<Vec<Vec<f32>>, BenchError> {
    let layout = LoraLayout::new(&setup::lora(&training.lora), &config.linear_sites())?;
    // B is not zero, so that A has gradients too.
    let nudge =
        |(i, p): (usize, Param)| Param { value: p.value.iter().enumerate().map(|(k, v)| v + 0.02 * ((i * 31 + k * 17) % 13) as f32 - 0.12).collect(), ..p };
    let params: Vec<Param> = layout.init(training.seed).into_iter().enumerate().map(nudge).collect();
    let mut learner = learner::load(Arc::clone(&weights.weights), config.clone(), engine, format, layout, &params, setup::optimizer(&training.optimizer))?;
    let examples = (0..3).map(|index| example(config, [config.in_channels, 18, 14], 19, index)).collect::<Result<Vec<_>, _>>()?;
    let batch = MicroBatch::draw(&objective(training), &examples, &[0, 1, 2], 0, vec![1.0 / 3.0; 3])?;
    learner.begin()?;
    once(learner.as_mut(), &[batch])?;
    Ok(learner.gradients()?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use finetune_api::FineTuneJobSpec;
    use finetune_api::plan::{Facts, resolve};

    pub(in crate::bench) fn training(batch_size: u32) -> TrainingConfig {
        let spec: FineTuneJobSpec = serde_json::from_value(serde_json::json!({
            "model": {"source": {"objectStore": {"uri": "s3://m/"}}}, "dataset": {"uri": "s3://d/"}, "output": {"uri": "s3://o/"},
            "training": {"resolution": 64, "batchSize": batch_size, "maxSequenceLength": 5},
        }))
        .unwrap();
        resolve(&spec, "n", "j", &Facts::default()).unwrap().config.training
    }

    /// The CPU is what everything is compared with: it agrees with itself to the bit, and gradients are there.
    #[test]
    fn the_cpu_agrees_with_itself() {
        for check in numerics(&Engine::cpu(), &training(1)).unwrap() {
            assert!(check.passed && check.error == 0.0, "{check:?}");
        }
    }
}
