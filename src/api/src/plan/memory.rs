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
/// Kernels of a block in a step: forward and backward; of its norms of queries and keys; of a second attention; what widens weights; what is computed again.
const KERNELS: [u64; 5] = [75, 8, 30, 16, 20];
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
        let [block, norm, dual, widen, again] = KERNELS;
        let of_block = block + u64::from(shape.qk_norm) * norm + u64::from(!self.weights.is_float()) * widen;
        let kernels = shape.layers * of_block + shape.dual_layers * dual + recomputed * again;
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
mod tests {
    use super::*;
    use crate::FineTuneJobSpec;
    use crate::plan::{Facts, PriorPreservationConfig, resolve};

    fn training(change: impl FnOnce(&mut TrainingConfig)) -> TrainingConfig {
        let spec: FineTuneJobSpec = serde_json::from_value(serde_json::json!({
            "model": {"source": {"objectStore": {"uri": "s3://m/"}}}, "dataset": {"uri": "s3://d/"}, "output": {"uri": "s3://o/"},
        }))
        .unwrap();
        let mut training = resolve(&spec, "n", "j", &Facts::default()).unwrap().config.training;
        change(&mut training);
        training
    }

    fn part(stage: &Stage, name: &str) -> f64 {
        stage.parts.iter().filter(|part| part.name == name).map(|part| part.bytes as f64 / GIB).sum()
    }

    /// The reference's table: (resolution, batch, kept without recompute, inputs with it), in GiB.
    #[test]
    fn activations_are_those_of_the_reference() {
        for (resolution, batch, kept, inputs) in
            [(512, 1, 0.89, 0.08), (512, 4, 3.56, 0.32), (768, 4, 7.43, 0.68), (1024, 1, 3.21, 0.29), (1024, 4, 12.84, 1.17)]
        {
            let training = training(|t| t.resolution = resolution);
            let sizes = Sizes::new(&training, &ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(BUDGET_BYTES), FrozenWeights::Float);
            let close =
                |found: f64, expected: f64| assert!((found - expected).abs() <= 0.012_f64.max(0.02 * expected), "{resolution}/{batch}: {found} for {expected}");
            close(part(&sizes.training(batch, 0), "kept activations"), kept);
            close(part(&sizes.training(batch, 24), "inputs of blocks computed again"), inputs);
            close(part(&sizes.training(batch, 0), "transformer"), 3.78);
        }
    }

    /// What an H100 showed as taken by a process that does such steps: (resolution, batch, blocks computed again, GiB).
    #[test]
    fn plan_and_card_agree_within_five_percent() {
        let shown =
            [(512, 4, 0, 8.48), (512, 4, 24, 5.60), (512, 1, 0, 5.60), (1024, 1, 0, 8.10), (1024, 4, 0, 18.95), (1024, 4, 6, 14.30), (1024, 4, 24, 6.83)];
        for (resolution, batch, recomputed, card) in shown {
            let training = training(|t| t.resolution = resolution);
            let plan = Sizes::new(&training, &ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(BUDGET_BYTES), FrozenWeights::Float).training(batch, recomputed).bytes()
                as f64
                / GIB;
            assert!((plan / card - 1.0).abs() < 0.05, "{resolution} px, batch {batch}, {recomputed} blocks: {plan} GiB planned, {card} shown");
        }
    }

    /// What an H200 showed as taken by whole runs (`benches/memory_table.py`), whose encoders are smaller: (model, weights, resolution, batch, rank, GiB).
    #[test]
    fn plan_and_card_agree_for_every_model() {
        for (shape, weights, resolution, batch, rank, card) in [
            (ModelShape::SD3_MEDIUM, FrozenWeights::Float, 512, 4, 4, 8.11),
            (ModelShape::SD3_MEDIUM, FrozenWeights::Float, 1024, 1, 4, 7.84),
            (ModelShape::SD35_MEDIUM, FrozenWeights::Float, 512, 4, 4, 10.28),
            (ModelShape::SD35_MEDIUM, FrozenWeights::Float, 1024, 1, 4, 9.97),
            (ModelShape::SD35_LARGE, FrozenWeights::Int8, 512, 1, 4, 14.11),
        ] {
            let training = training(|t| {
                (t.resolution, t.max_sequence_length, t.lora.rank) = (resolution, 24, rank);
            });
            let shape = ModelShape { joint: 192, pooled: 160, ..shape };
            let plan = Sizes::new(&training, &shape, MemoryBudget::Gpu(BUDGET_BYTES), weights).training(batch, 0).bytes() as f64 / GIB;
            println!("{} {resolution}/{batch}: {plan:.2} planned, {card} shown, {:.3}", shape.name, card / plan);
            assert!((card / plan - 1.0).abs() < 0.04, "{}, {resolution} px, batch {batch}: {plan} GiB planned, {card} shown", shape.name);
        }
    }

    #[test]
    fn preparation_stays_far_below_the_budget() {
        let plan = memory_plan(&training(|_| {}), None, &ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(BUDGET_BYTES)).unwrap();
        let names: Vec<_> = plan.stages.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(names, ["encode captions (CLIP)", "encode captions (T5)", "encode pictures (VAE)", "train"]);
        let without_library = |index: usize| (plan.stages[index].bytes() - LIBRARY_BYTES) as f64 / GIB;
        assert!((1.2..1.6).contains(&without_library(0)), "{}", without_library(0));
        assert!((0.7..2.0).contains(&without_library(1)), "{}", without_library(1));
        assert!(without_library(2) < 1.0, "{}", without_library(2));
    }

    #[test]
    fn the_articles_job_fits_without_recompute_and_larger_ones_recompute_or_split() {
        let gpu = MemoryBudget::Gpu(BUDGET_BYTES);
        let plan = |change: fn(&mut TrainingConfig), shape: &ModelShape| memory_plan(&training(change), None, shape, gpu).unwrap();
        let article = plan(|_| {}, &ModelShape::SD3_MEDIUM);
        assert_eq!((article.recomputed_blocks, article.micro_batch), (0, 4));
        assert!((8.0..9.5).contains(&(article.peak_bytes() as f64 / GIB)), "{}", article.peak_bytes());

        let large = plan(|t| t.resolution = 1024, &ModelShape::SD3_MEDIUM);
        assert_eq!(large.micro_batch, 4);
        assert!((1..24).contains(&large.recomputed_blocks), "{}", large.recomputed_blocks);
        assert!(large.peak_bytes() <= BUDGET_BYTES);
        // One block fewer would not fit.
        let training_large = training(|t| t.resolution = 1024);
        let sizes = Sizes::new(&training_large, &ModelShape::SD3_MEDIUM, gpu, FrozenWeights::Float);
        assert!(sizes.training(4, u64::from(large.recomputed_blocks) - 1).bytes() > BUDGET_BYTES);

        let split = plan(
            |t| {
                t.resolution = 1024;
                t.batch_size = 64;
            },
            &ModelShape::SD35_MEDIUM,
        );
        // With fewer than two blocks kept, the block computed again is what counts: keeping them costs nothing.
        assert!(split.micro_batch < 64 && (22..=24).contains(&split.recomputed_blocks), "{split:?}");
        let never = plan(
            |t| {
                t.resolution = 1024;
                t.gradient_checkpointing = GradientCheckpointing::Never;
            },
            &ModelShape::SD3_MEDIUM,
        );
        assert_eq!((never.recomputed_blocks, never.micro_batch), (0, 2));
        let always = plan(|t| t.gradient_checkpointing = GradientCheckpointing::Always, &ModelShape::SD3_MEDIUM);
        assert_eq!((always.recomputed_blocks, always.micro_batch), (24, 4));
    }

    /// Twice the pictures per pass, and a stage that draws: sixteen at once with guidance are 32 passes of 1178 tokens, 25 D of 2 bytes each.
    #[test]
    fn prior_preservation_counts_in_every_stage() {
        let with = |change: fn(&mut PriorPreservationConfig)| {
            training(|t| {
                let mut prior =
                    PriorPreservationConfig { class_prompt: "a dog".into(), images: 100, weight: 1.0, sample_batch_size: 16, precision: Precision::Auto };
                change(&mut prior);
                t.prior_preservation = Some(prior);
            })
        };
        let (shape, gpu) = (&ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(BUDGET_BYTES));
        let (plain, prior) = (training(|_| {}), with(|_| {}));
        let plan = memory_plan(&prior, None, shape, gpu).unwrap();
        let stage = |plan: &MemoryPlan, name: &str| plan.stages.iter().find(|s| s.name == name).cloned().unwrap();
        let drawing = stage(&plan, "draw class pictures");
        assert!((part(&drawing, "activations") * GIB - 32.0 * 1178.0 * 25.0 * 1536.0 * 2.0).abs() < 1.0, "{drawing:?}");
        let single = Sizes::new(&plain, shape, gpu, FrozenWeights::Float).training(4, 0);
        assert!(
            (part(&Sizes::new(&prior, shape, gpu, FrozenWeights::Float).training(4, 0), "kept activations") / part(&single, "kept activations") - 2.0).abs()
                < 1e-9
        );
        // The article's job still fits with the whole batch.
        assert_eq!(plan.micro_batch, 4);
        assert!(plan.peak_bytes() <= BUDGET_BYTES);
        // 100 pictures of 56 passes and twice the work per update.
        let flops = |training: &TrainingConfig, updates| run_flops(training, shape, &plan, updates);
        let (weights, attention) = shape.forward_flops(512, 77);
        assert!((flops(&prior, 0) / (5600.0 * (weights + attention)) - 1.0).abs() < 1e-9);
        assert!(((flops(&prior, 10) - flops(&prior, 0)) / flops(&plain, 10) - 2.0).abs() < 1e-9);
        // Too many at once: the message says what to lower.
        let large = |t: &mut PriorPreservationConfig| (t.sample_batch_size, t.precision) = (64, Precision::FP32);
        let error = memory_plan(&with(large), None, shape, gpu).unwrap_err();
        assert_eq!(error.stage, "draw class pictures");
        assert!(error.to_string().contains("training.priorPreservation.sampleBatchSize"), "{error}");
    }

    #[test]
    fn what_cannot_fit_is_refused_with_numbers() {
        let float = training(|t| t.weights = Weights::Float);
        let error = memory_plan(&float, None, &ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(4 << 30)).unwrap_err();
        assert_eq!(error.stage, "train");
        assert!(error.needed > 4.9 && error.needed < 5.5 && error.budget == 4.0, "{error}");
        assert!(error.to_string().contains("training.weights: Auto"), "{error}");
        let fp32 = memory_plan(
            &training(|t| {
                t.precision = Precision::FP32;
                t.resolution = 2048;
                t.gradient_checkpointing = GradientCheckpointing::Never;
            }),
            None,
            &ModelShape::SD35_MEDIUM,
            MemoryBudget::Gpu(BUDGET_BYTES),
        );
        assert!(fp32.unwrap_err().to_string().contains("gradientCheckpointing: Auto"));
        assert!(memory_plan(&training(|t| t.resolution = 2048), None, &ModelShape::SD3_MEDIUM, MemoryBudget::Cpu).is_ok());
    }

    /// 16 GB cards: the medium models stay in 16 bits, the large one fits in 8; so does the smallest on a card of 4 GB.
    #[test]
    fn large_models_fit_in_8_bits() {
        let plan = |shape: &ModelShape, budget: u64, resolution, batch| {
            let training = training(|t| (t.resolution, t.batch_size) = (resolution, batch));
            memory_plan(&training, None, shape, MemoryBudget::Gpu(budget)).unwrap()
        };
        for shape in [ModelShape::SD3_MEDIUM, ModelShape::SD35_MEDIUM] {
            assert_eq!(plan(&shape, BUDGET_BYTES, 1024, 4).weights, FrozenWeights::Float);
        }
        for (resolution, batch) in [(512, 1), (512, 4), (1024, 1), (1024, 4)] {
            let plan = plan(&ModelShape::SD35_LARGE, BUDGET_BYTES, resolution, batch);
            assert!(plan.weights == FrozenWeights::Int8 && plan.peak_bytes() <= BUDGET_BYTES, "{plan:?}");
        }
        assert_eq!(plan(&ModelShape::SD3_MEDIUM, 4 << 30, 512, 4).weights, FrozenWeights::Int8);
        let cpu = memory_plan(&training(|_| {}), None, &ModelShape::SD35_LARGE, MemoryBudget::Cpu).unwrap();
        assert_eq!(cpu.weights, FrozenWeights::Float);
        // 8.06 thousand million parameters, of which 5.33 in the blocks: 5.46 GB and 5.33 GB.
        let training = training(|t| t.weights = Weights::Int8);
        let sizes = Sizes::new(&training, &ModelShape::SD35_LARGE, MemoryBudget::Gpu(BUDGET_BYTES), FrozenWeights::Int8);
        assert!((sizes.transformer(2) as f64 / 10.8e9 - 1.0).abs() < 0.01, "{}", sizes.transformer(2));
    }

    /// The reference: 15.6 TFLOP per batch of four at 512 px without recompute, 22.8 with.
    #[test]
    fn work_of_a_run_is_that_of_the_reference() {
        let training = training(|t| t.gradient_accumulation_steps = 1);
        let mut plan = memory_plan(&training, None, &ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(BUDGET_BYTES)).unwrap();
        assert!((run_flops(&training, &ModelShape::SD3_MEDIUM, &plan, 1) / 15.6e12 - 1.0).abs() < 0.02);
        plan.recomputed_blocks = 24;
        assert!((run_flops(&training, &ModelShape::SD3_MEDIUM, &plan, 1) / 22.8e12 - 1.0).abs() < 0.02);
    }
}
