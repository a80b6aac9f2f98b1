//! What this machine's device does, without a model: a training step of a published model's size against its memory plan ([`measure`]), and the device's
//! numbers against the CPU's ([`numerics`]). Weights, pictures and prompts are random: neither time nor memory depends on them.

mod numerics;

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tempfile::TempDir;

use super::setup;
use super::step::{self, Example, LatentScaling, MicroBatch, Objective};
use super::{device, division};
use finetune_api::plan::{FrozenWeights, GpuTooSmall, MemoryPlan, TrainingConfig, memory_plan, run_flops};
use finetune_common::rng::{Purpose, Stream};
use finetune_common::tensor::{HostTensor, ShapeError};
use finetune_compute::kernels::{DeviceError, Engine};
use finetune_compute::nn::flow_matching::SigmaTable;
use finetune_model::learner::{self, Learner};
use finetune_model::lora::{LoraError, LoraLayout};
use finetune_model::mmdit::{MmditConfig, MmditError};
use finetune_model::random::write_transformer;
use finetune_model::weights::Weights;

pub use numerics::{Check, numerics};

/// Steps before the first that is measured: a GPU sees the sizes first, then records the step.
const WARM_UP: usize = 3;

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// No such size.
    #[error("{0:?} is not a size such as 512/4: pixels of a side, pictures of a batch")]
    Workload(String),
    /// It does not fit the device.
    #[error(transparent)]
    TooSmall(#[from] GpuTooSmall),
    /// The model failed.
    #[error("failed to compute a training step")]
    Model(#[from] MmditError),
    /// The device failed.
    #[error("the device failed")]
    Device(#[from] DeviceError),
    /// The LoRA does not fit the model.
    #[error("failed to add the LoRA")]
    Lora(#[from] LoraError),
    /// Inputs have wrong shapes.
    #[error("failed to make a batch")]
    Shape(#[from] ShapeError),
    /// Random weights could not be written or read.
    #[error("failed to write random weights")]
    Weights(#[source] std::io::Error),
}

/// Pixels of a side and pictures of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Side in pixels.
    pub resolution: u32,
    /// Pictures.
    pub batch: u32,
}

impl FromStr for Workload {
    type Err = BenchError;

    fn from_str(text: &str) -> Result<Self, BenchError> {
        let parsed = text.split_once('/').and_then(|(resolution, batch)| Some(Self { resolution: resolution.parse().ok()?, batch: batch.parse().ok()? }));
        parsed.filter(|w| w.resolution > 0 && w.resolution.is_multiple_of(16) && w.batch > 0).ok_or_else(|| BenchError::Workload(text.to_owned()))
    }
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.resolution, self.batch)
    }
}

/// Random weights in a folder that is deleted with them.
#[derive(Debug)]
pub struct RandomWeights {
    weights: Arc<Weights>,
    _folder: TempDir,
}

impl RandomWeights {
    /// Writes the weights of a transformer into a new folder in `place`, or where the system keeps temporary files.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write(config: &MmditConfig, place: Option<&Path>) -> Result<Self, BenchError> {
        let folder = place.map_or_else(tempfile::tempdir, tempfile::tempdir_in).map_err(BenchError::Weights)?;
        write_transformer(config, folder.path()).map_err(BenchError::Weights)?;
        Ok(Self { weights: Arc::new(Weights::open(folder.path()).map_err(MmditError::from)?), _folder: folder })
    }
}

/// A measured step: forward, loss and backward of one batch, its gradients added to those of the update.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Measured {
    /// As `512/4`.
    pub workload: String,
    /// How the blocks' frozen weights were kept.
    pub weights: FrozenWeights,
    /// Pictures per pass.
    pub micro_batch: u32,
    /// Blocks that were computed again in the backward pass.
    pub recomputed_blocks: u32,
    /// Milliseconds of a batch, the median.
    pub step_ms: f64,
    /// Milliseconds of the fastest and of the slowest.
    pub range_ms: [f64; 2],
    /// 10^12 floating-point operations per second: those of the plan, which counts what is computed again.
    pub tflops: f64,
    /// Bytes that training should take on the device by the plan, libraries included.
    pub planned_bytes: u64,
    /// What the driver reports as taken on the whole card, by whatever runs there.
    pub card_bytes: Option<u64>,
}

/// Times `steps` batches of a workload as `training` says, on weights of this configuration. `progress` gets the number of batches done.
///
/// # Errors
/// If it does not fit, or the device fails.
pub fn measure(
    config: &MmditConfig,
    weights: &RandomWeights,
    engine: &Engine,
    training: &TrainingConfig,
    steps: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Measured, BenchError> {
    // What an earlier one has left in the pool.
    engine.trim();
    let (shape, budget) = (division::shape(config), device::limit_memory(engine));
    let memory = memory_plan(training, None, &shape, budget)?;
    let MemoryPlan { weights: format, micro_batch, recomputed_blocks, .. } = memory;
    if let Some(bytes) = memory.buffer_bytes() {
        engine.set_memory_cap(bytes as usize);
    }
    let layout = LoraLayout::new(&setup::lora(&training.lora), &config.linear_sites())?;
    let (params, optimizer) = (layout.init(training.seed), setup::optimizer(&training.optimizer));
    let mut learner = learner::load(Arc::clone(&weights.weights), config.clone(), engine, setup::format(format), layout, &params, optimizer)?;
    learner.set_recompute(&vec![true; recomputed_blocks as usize]);
    let batches = batches(config, training, micro_batch)?;
    let mut times = Vec::with_capacity(steps);
    learner.begin()?;
    for step in 0..steps + WARM_UP {
        let began = Instant::now();
        once(learner.as_mut(), &batches)?;
        if step >= WARM_UP {
            times.push(began.elapsed().as_secs_f64() * 1e3);
            progress(times.len());
        }
    }
    let card_bytes = engine.device_memory().map(|(free, total)| (total - free) as u64);
    times.sort_by(f64::total_cmp);
    let step_ms = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
    let one = TrainingConfig { gradient_accumulation_steps: 1, ..training.clone() };
    Ok(Measured {
        workload: Workload { resolution: training.resolution, batch: training.batch_size }.to_string(),
        weights: format,
        micro_batch,
        recomputed_blocks,
        step_ms,
        range_ms: [times.first().copied().unwrap_or(f64::NAN), times.last().copied().unwrap_or(f64::NAN)],
        tflops: run_flops(&one, &shape, &memory, 1) / step_ms / 1e9,
        planned_bytes: memory.stages.last().map_or(0, finetune_api::plan::Stage::bytes),
        card_bytes,
    })
}

/// All micro-batches of a batch, their losses read late as in training.
fn once(learner: &mut dyn Learner, batches: &[MicroBatch]) -> Result<(), BenchError> {
    for batch in batches {
        step::micro_batch(learner, batch)?;
    }
    for _ in batches {
        learner.losses()?;
    }
    Ok(())
}

/// A batch of random pictures and prompts in passes of `micro_batch`.
fn batches(config: &MmditConfig, training: &TrainingConfig, micro_batch: u32) -> Result<Vec<MicroBatch>, ShapeError> {
    let side = training.resolution as usize / 8;
    let shape = [config.in_channels, side, side];
    let examples = (0..training.batch_size).map(|index| example(config, shape, training.max_sequence_length, u64::from(index)));
    let examples = examples.collect::<Result<Vec<_>, _>>()?;
    let objective = objective(training);
    let coefficient = 1.0 / f64::from(training.batch_size);
    let passes = examples.chunks(micro_batch.max(1) as usize).enumerate().map(|(pass, examples)| {
        let ordinals: Vec<u64> = (0..examples.len()).map(|i| (pass * micro_batch as usize + i) as u64).collect();
        MicroBatch::draw(&objective, examples, &ordinals, 0, vec![coefficient; examples.len()])
    });
    passes.collect()
}

fn objective(training: &TrainingConfig) -> Objective {
    let (density, kind) = setup::flow_matching(&training.flow_matching);
    let latents = LatentScaling { scale: 1.5305, shift: 0.0609 };
    Objective { table: SigmaTable::default(), table_of: std::collections::BTreeMap::new(), density, kind, latents, seed: training.seed, dropout: false }
}

/// A picture's latents and a prompt of CLIP's 77 tokens and T5's.
fn example(config: &MmditConfig, shape: [usize; 3], t5_tokens: u32, index: u64) -> Result<Example, ShapeError> {
    let random = |purpose, len: usize| {
        let mut values = vec![0.0; len];
        Stream::new(1, purpose, index, 0).fill_normal(&mut values);
        values
    };
    let (tokens, joint) = (77 + t5_tokens as usize, config.joint_attention_dim);
    Ok(Example {
        mean: random(Purpose::Posterior, shape.iter().product()),
        logvar: vec![-6.0; shape.iter().product()],
        shape,
        embeds: HostTensor::new(random(Purpose::Noise, tokens * joint), [tokens, joint])?,
        pooled: HostTensor::new(random(Purpose::Timestep, config.pooled_projection_dim), [config.pooled_projection_dim])?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_others_are_refused() {
        assert_eq!("512/4".parse::<Workload>().unwrap(), Workload { resolution: 512, batch: 4 });
        for bad in ["512", "512/0", "0/4", "500/4", "512x4", "a/b", ""] {
            assert!(bad.parse::<Workload>().unwrap_err().to_string().contains("is not a size such as 512/4"), "{bad}");
        }
    }

    /// A batch in parts has the inputs of the whole: a pass is named by its place.
    #[test]
    fn a_batch_is_divided_without_a_rest() {
        let training = numerics::tests::training(5);
        let config = numerics::config();
        for (micro_batch, passes) in [(5, 1), (2, 3), (1, 5)] {
            assert_eq!(batches(&config, &training, micro_batch).unwrap().len(), passes);
        }
    }
}
