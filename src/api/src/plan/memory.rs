//! Memory of each stage, from shapes, against the budget of a 16 GB GPU.
//!
//! The activations are those of the explicit backward: per token and block 11 `D` values are kept (input of both norms, modulated input, query,
//! key, value, attention's output, and the 4 `D` of the feed-forward), 5 `D` more for a second attention; where queries and keys are normalised, 2 `D` more for
//! each attention (both before it). A block that is computed again keeps
//! its input alone; the others then leave the modulated inputs out, and their activations are gone when the first of them is computed again, which
//! keeps all 11 `D` meanwhile. The block at work needs 11 `D` beside what is kept. Attention never holds its scores.
//!
//! Frozen weights in 8 bits take a byte each and four for each output's scale, and while a product reads one it lies beside them in the device's
//! precision, in a place for each size. The driver hands memory out in pages of 2 MiB: what that costs is counted where it is much, for these weights.
//!
//! With buckets the figures are those of the square: no bucket has a larger area, and nothing here depends on a picture's sides otherwise.

use serde::{Deserialize, Serialize};

use super::{GradientCheckpointing, ModelShape, Precision, TrainingConfig, ValidationConfig, Weights};

const GIB: f64 = 1_073_741_824.0;

/// The whole process on a GPU of the 16 GB class, libraries included: 14.5 GiB of the 14.75 that a T4 offers.
pub const BUDGET_BYTES: u64 = 14_848 * 1024 * 1024;
/// CUDA context, cuBLAS workspaces and loaded modules, and the recorded step of the smallest model: the least that is planned for them.
pub const LIBRARY_BYTES: u64 = 1 << 30;
/// Of these, what a process has before a step is recorded.
const CONTEXT_BYTES: u64 = 348 << 20;
/// What the driver keeps for a kernel of a recorded step, fitted to what an H200 showed of the three published models.
const KERNEL_BYTES: u64 = 190_000;
/// The driver's unit of memory.
const PAGE: u64 = 2 << 20;
/// Kernels of a block in a step, forward and backward.
const KERNELS: u64 = 75;
/// More of them for norms of queries and keys.
const KERNELS_NORM: u64 = 8;
/// More of them for a second attention.
const KERNELS_DUAL: u64 = 30;
/// More of them that widen weights in 8 bits.
const KERNELS_WIDEN: u64 = 16;
/// More of them where the block is computed again.
const KERNELS_AGAIN: u64 = 20;
/// Captions that go through a T5 layer at once.
const CAPTION_BATCH: u64 = 64;
/// Values kept per token and block, in units of `D`.
const KEPT: u64 = 11;
/// More of them where a block has a second attention, per picture token.
const KEPT_DUAL: u64 = 5;
/// More of them where queries and keys are normalised, for each attention.
const KEPT_NORM: u64 = 2;
/// Of them, modulated inputs that a block leaves out where others are computed again.
const LEFT_OUT: u64 = 1;
/// Values that the block at work needs per token beside what is kept, in units of `D`.
const AT_WORK: u64 = 11;
/// Values that drawing needs per token, in units of `D`.
const DRAWING: u64 = 25;
/// Name of the stage that draws for prior preservation.
const CLASS_STAGE: &str = "draw class pictures";
/// Forward passes per class picture: 28 steps with guidance.
const CLASS_PASSES: f64 = 56.0;
/// LoRA: value, gradient, the gradients' sum and two moments in 32 bits.
const LORA_BYTES: u64 = 20;
/// Places in which a GPU's products read LoRA's factors, in the precision of the model.
const LORA_PLACES: u64 = 2;

/// Names of the parts of a stage that are not in buffers.
const LIBRARIES: &str = "libraries";
const PAGES: &str = "unused ends of the driver's pages";

/// The device that memory is planned for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MemoryBudget {
    /// A GPU: the whole process may hold this many bytes there.
    Gpu(u64),
    /// The CPU: figures are given, nothing is refused.
    Cpu,
}

/// How the frozen weights of the blocks are kept.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum FrozenWeights {
    /// In the device's precision.
    #[default]
    Float,
    /// In 8 bits.
    Int8,
}

impl FrozenWeights {
    /// Whether they are numbers of the device's precision.
    pub fn is_float(&self) -> bool {
        *self == Self::Float
    }
}

/// A part of a stage.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Part {
    /// What it holds.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
}

/// A stage; no two stages overlap.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stage {
    /// What is done.
    pub name: String,
    /// What it holds at its peak.
    pub parts: Vec<Part>,
}

impl Stage {
    fn new(name: &str, parts: impl IntoIterator<Item = (&'static str, u64)>) -> Self {
        let parts = parts.into_iter().filter(|&(_, bytes)| bytes > 0).map(|(name, bytes)| Part { name: name.to_owned(), bytes }).collect();
        Self { name: name.to_owned(), parts }
    }

    /// Bytes at its peak.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

/// How the work is divided so that it fits, and what each stage holds.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryPlan {
    /// Name of the model that was assumed.
    pub model: String,
    /// Bytes that the process may hold on the GPU; absent on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_bytes: Option<u64>,
    /// How the blocks' frozen weights are kept.
    #[serde(default)]
    pub weights: FrozenWeights,
    /// Blocks that are computed again in the backward pass, from the first.
    pub recomputed_blocks: u32,
    /// Pictures per pass; smaller than the batch where the batch does not fit. Gradients add up to the same.
    pub micro_batch: u32,
    /// The stages in order.
    pub stages: Vec<Stage>,
}

impl MemoryPlan {
    /// Bytes that buffers may take while training, so that the whole process stays within the budget; none on the CPU.
    pub fn buffer_bytes(&self) -> Option<u64> {
        let outside = self.stages.last()?.parts.iter().filter(|part| [LIBRARIES, PAGES].contains(&part.name.as_str())).map(|part| part.bytes);
        Some(self.budget_bytes?.saturating_sub(outside.sum()))
    }

    /// Bytes of the largest stage.
    pub fn peak_bytes(&self) -> u64 {
        self.stages.iter().map(Stage::bytes).max().unwrap_or(0)
    }
}

/// Nothing fits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "stage \"{stage}\" needs {needed:.2} GiB and the budget is {budget:.2} GiB, even with one picture per pass and every block computed again \
     where that is allowed; lower training.resolution{hint}"
)]
pub struct GpuTooSmall {
    /// Which stage.
    pub stage: String,
    /// GiB that it needs at least.
    pub needed: f64,
    /// GiB that there are.
    pub budget: f64,
    /// What else helps.
    pub hint: String,
}

/// Divides the work so that it fits: first the fewest blocks computed again that make the whole batch fit, then smaller passes; where the job leaves it
/// open, frozen weights in 8 bits if nothing else helps.
///
/// # Errors
/// If a stage does not fit in any way.
pub fn memory_plan(
    training: &TrainingConfig,
    validation: Option<&ValidationConfig>,
    shape: &ModelShape,
    budget: MemoryBudget,
) -> Result<MemoryPlan, GpuTooSmall> {
    let with = |weights| plan_with(weights, training, validation, shape, budget);
    match training.weights {
        Weights::Float => with(FrozenWeights::Float),
        Weights::Int8 => with(FrozenWeights::Int8),
        Weights::Auto => with(FrozenWeights::Float).or_else(|_| with(FrozenWeights::Int8)),
    }
}

fn plan_with(
    weights: FrozenWeights,
    training: &TrainingConfig,
    validation: Option<&ValidationConfig>,
    shape: &ModelShape,
    budget: MemoryBudget,
) -> Result<MemoryPlan, GpuTooSmall> {
    let sizes = Sizes::new(training, shape, budget, weights);
    let limit = match budget {
        MemoryBudget::Gpu(bytes) => bytes,
        MemoryBudget::Cpu => u64::MAX,
    };
    let mut stages = sizes.preparation();
    if let Some(prior) = &training.prior_preservation {
        let value = match prior.precision {
            Precision::Auto => sizes.value,
            precision => bytes_of_a_value(precision, matches!(budget, MemoryBudget::Gpu(_))),
        };
        stages.push(sizes.sampling(CLASS_STAGE, u64::from(prior.sample_batch_size), value));
    }
    if validation.is_some() {
        stages.push(sizes.sampling("draw samples", 1, sizes.value));
    }
    let blocks: Vec<u64> = match training.gradient_checkpointing {
        GradientCheckpointing::Never => vec![0],
        GradientCheckpointing::Always => vec![shape.layers],
        GradientCheckpointing::Auto => (0..=shape.layers).collect(),
    };
    let choice = (1..=u64::from(training.batch_size))
        .rev()
        .find_map(|micro| blocks.iter().map(|&recomputed| (micro, recomputed, sizes.training(micro, recomputed))).find(|(_, _, stage)| stage.bytes() <= limit));
    let (micro_batch, recomputed, stage) = choice.unwrap_or_else(|| {
        let most = blocks.last().copied().unwrap_or(0);
        (1, most, sizes.training(1, most))
    });
    stages.push(stage);
    if let Some(stage) = stages.iter().find(|stage| stage.bytes() > limit) {
        let hint = match training.gradient_checkpointing {
            _ if stage.name == CLASS_STAGE => " or training.priorPreservation.sampleBatchSize, or set training.priorPreservation.precision: Auto",
            GradientCheckpointing::Never => " or set training.gradientCheckpointing: Auto",
            _ if weights == FrozenWeights::Float => " or set training.weights: Auto",
            _ => "",
        };
        return Err(GpuTooSmall { stage: stage.name.clone(), needed: stage.bytes() as f64 / GIB, budget: limit as f64 / GIB, hint: hint.to_owned() });
    }
    Ok(MemoryPlan {
        model: shape.name.to_owned(),
        budget_bytes: (limit != u64::MAX).then_some(limit),
        weights,
        recomputed_blocks: recomputed as u32,
        micro_batch: micro_batch as u32,
        stages,
    })
}

fn bytes_of_a_value(precision: Precision, gpu: bool) -> u64 {
    match precision {
        Precision::FP32 => 4,
        Precision::Auto if !gpu => 4,
        _ => 2,
    }
}

/// What all stages need to know.
struct Sizes<'a> {
    shape: &'a ModelShape,
    training: &'a TrainingConfig,
    /// Bytes of a value in the frozen model and its activations.
    value: u64,
    /// Memory of libraries.
    library: u64,
    weights: FrozenWeights,
}

impl<'a> Sizes<'a> {
    fn new(training: &'a TrainingConfig, shape: &'a ModelShape, budget: MemoryBudget, weights: FrozenWeights) -> Self {
        let gpu = matches!(budget, MemoryBudget::Gpu(_));
        let value = bytes_of_a_value(training.precision, gpu);
        Self { shape, training, value, library: if gpu { LIBRARY_BYTES } else { 0 }, weights }
    }

    fn tokens(&self) -> u64 {
        self.shape.tokens(self.training.resolution, self.training.max_sequence_length)
    }

    /// The transformer's weights where a value has `value` bytes.
    fn transformer(&self, value: u64) -> u64 {
        let (in_blocks, outputs) = self.shape.block_weights();
        match self.weights {
            FrozenWeights::Float => self.shape.parameters() * value,
            FrozenWeights::Int8 => (self.shape.parameters() - in_blocks) * value + in_blocks + outputs * 4,
        }
    }

    /// Weights in 8 bits as products read them, in a place for each size: [4 D, D], [3 D, D] and [D, D].
    fn widened(&self, value: u64) -> u64 {
        if self.weights.is_float() { 0 } else { (4 + 3 + 1) * self.shape.hidden.pow(2) * value }
    }

    /// What is left unused of the pages that hold weights in 8 bits: queries, keys and values of a stream together, each other matrix alone.
    fn page_ends(&self) -> u64 {
        if self.weights.is_float() || self.library == 0 {
            return 0;
        }
        let end = |squares: u64| {
            let bytes = squares * self.shape.hidden.pow(2);
            bytes.next_multiple_of(PAGE) - bytes
        };
        let (full, last, dual) = (2 * end(3) + 2 * end(1) + 4 * end(4), end(3) + end(2) + end(1) + 2 * end(4), end(3) + end(1));
        (self.shape.layers - 1) * full + last + self.shape.dual_layers * dual
    }

    /// Text encoders one after the other, T5 layer by layer with the next layer on its way, then the autoencoder, one picture at a time.
    fn preparation(&self) -> Vec<Stage> {
        let encoders = &self.shape.encoders;
        let tokens = CAPTION_BATCH * u64::from(self.training.max_sequence_length);
        let t5 = tokens * (6 * encoders.t5_width + 2 * encoders.t5_feed_forward) * self.value;
        let clip = CAPTION_BATCH * 77 * 12 * 1280 * self.value;
        let pixels = u64::from(self.training.resolution).pow(2);
        let latent_pixels = (u64::from(self.training.resolution) / self.shape.vae_factor).pow(2);
        // Input, normalised input, columns of a convolution over a strip, output, residual; then the scores of the middle attention.
        let vae = (9 * pixels * encoders.vae_channels / 2).max(latent_pixels * latent_pixels) * 4;
        vec![
            Stage::new("encode captions (CLIP)", [("weights", encoders.clip * self.value), ("activations", clip), (LIBRARIES, self.library)]),
            Stage::new("encode captions (T5)", [("weights of two layers", 2 * encoders.t5_layer * self.value), ("activations", t5), (LIBRARIES, self.library)]),
            Stage::new("encode pictures (VAE)", [("weights", encoders.vae_encoder * 4), ("activations", vae), (LIBRARIES, self.library)]),
        ]
    }

    /// Drawing `pictures` at once: the transformer with guidance (two passes each) in values of `value` bytes, and beside it the decoder,
    /// one picture at a time.
    fn sampling(&self, name: &str, pictures: u64, value: u64) -> Stage {
        let encoders = &self.shape.encoders;
        let forward = 2 * pictures * self.tokens() * DRAWING * self.shape.hidden * value;
        let pixels = u64::from(self.training.resolution).pow(2);
        let decode = encoders.vae_decoder * 4 + 3 * pixels * 2 * encoders.vae_channels * 4;
        let parts = [
            ("transformer", self.transformer(value)),
            ("weights in use", self.widened(value)),
            (PAGES, self.page_ends()),
            ("activations", forward.max(decode)),
            (LIBRARIES, self.library),
        ];
        Stage::new(name, parts)
    }

    /// Libraries and the recorded step, of which the first `recomputed` blocks are computed again.
    fn libraries(&self, recomputed: u64) -> u64 {
        let shape = self.shape;
        let of_block = KERNELS + u64::from(shape.qk_norm) * KERNELS_NORM + u64::from(!self.weights.is_float()) * KERNELS_WIDEN;
        let kernels = shape.layers * of_block + shape.dual_layers * KERNELS_DUAL + recomputed * KERNELS_AGAIN;
        if self.library == 0 { 0 } else { self.library.max(CONTEXT_BYTES + kernels * KERNEL_BYTES) }
    }

    /// What LoRA keeps of `blocks` blocks: x Aᵀ of each of its modules.
    fn lora_activations(&self, pictures: u64, blocks: u64) -> u64 {
        let (of_picture, of_text) = self.shape.lora_modules(&self.training.lora.target_modules);
        let picture = self.shape.picture_tokens(self.training.resolution);
        let values = (of_picture * picture + of_text * (self.shape.tokens(self.training.resolution, self.training.max_sequence_length) - picture))
            * u64::from(self.training.lora.rank);
        pictures * values * blocks / self.shape.layers * self.value
    }

    /// One pass over `micro` pictures, of which the first `recomputed` blocks are computed again.
    fn training(&self, micro: u64, recomputed: u64) -> Stage {
        let d = self.shape.hidden;
        let sets = if self.training.prior_preservation.is_some() { 2 } else { 1 };
        let pictures = micro * sets;
        let tokens = pictures * self.tokens();
        let picture_tokens = pictures * self.shape.picture_tokens(self.training.resolution);
        let kept_blocks = self.shape.layers - recomputed;
        let kept_dual = self.shape.dual_layers.saturating_sub(recomputed);
        let left_out = if recomputed > 0 { LEFT_OUT } else { 0 };
        let norm = if self.shape.qk_norm { KEPT_NORM } else { 0 };
        let (of_block, of_dual) = (KEPT + norm, KEPT_DUAL + norm);
        let kept = (kept_blocks * (of_block - left_out) * tokens + kept_dual * (of_dual - left_out) * picture_tokens) * d * self.value;
        let inputs = recomputed * tokens * d * self.value;
        let at_work = AT_WORK * tokens * d * self.value;
        let again = if recomputed > 0 { (of_block * tokens + u64::from(self.shape.dual_layers > 0) * of_dual * picture_tokens) * d * self.value } else { 0 };
        let lora_kept = self.lora_activations(pictures, kept_blocks);
        // What is kept is gone when the first block is computed again.
        let again = again.saturating_sub(kept);
        let lora = self.shape.lora_parameters(u64::from(self.training.lora.rank), &self.training.lora.target_modules) * (LORA_BYTES + LORA_PLACES * self.value);
        let prompts = pictures * ((77 + u64::from(self.training.max_sequence_length)) * self.shape.joint + self.shape.pooled) * self.value;
        // Made in f32 from half precision in two parts; and their gradients.
        let modulations = pictures * (12 * self.shape.layers + 3 * self.shape.dual_layers) * d * 4 * 4;
        let latent = u64::from(self.training.resolution).pow(2) / self.shape.vae_factor.pow(2) * self.shape.channels;
        let latents = pictures * latent * 6 * 4;
        Stage::new(
            "train",
            [
                ("transformer", self.transformer(self.value)),
                ("weights in use", self.widened(self.value)),
                (PAGES, self.page_ends()),
                ("kept activations", kept + lora_kept),
                ("inputs of blocks computed again", inputs),
                ("block at work", at_work),
                ("kept activations of the block computed again, beyond those", again),
                ("LoRA and optimizer", lora),
                ("modulations", modulations),
                ("prompts and latents of the batch", prompts + latents),
                (LIBRARIES, self.libraries(recomputed)),
            ],
        )
    }
}

/// Floating-point operations of the whole run of `updates` updates: forward, gradients of the inputs (none of frozen weights), the blocks
/// computed again, and drawing class pictures.
pub fn run_flops(training: &TrainingConfig, shape: &ModelShape, memory: &MemoryPlan, updates: u64) -> f64 {
    let (weights, attention) = shape.forward_flops(training.resolution, training.max_sequence_length);
    let again = f64::from(memory.recomputed_blocks) / shape.layers as f64;
    let (sets, class_pictures) = training.prior_preservation.as_ref().map_or((1.0, 0.0), |prior| (2.0, f64::from(prior.images)));
    let pictures = updates as f64 * f64::from(training.gradient_accumulation_steps) * f64::from(training.batch_size) * sets;
    pictures * ((1.0 + again) * (weights + attention) + weights + 2.5 * attention) + class_pictures * CLASS_PASSES * (weights + attention)
}

#[cfg(test)]
mod tests;
