//! What is trained and how. The defaults are those of the article's command.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::{default_is_empty_object, default_values};
use super::{Decimal, TimestepShift, bounds, shift};

/// How the LoRA is trained.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.maxSteps) && has(self.epochs))").message("set maxSteps or epochs, not both"))]
#[x_kube(validation = Rule::new("!(has(self.buckets) && has(self.priorPreservation))").message("buckets and priorPreservation exclude each other: class pictures are square"))]
#[x_kube(validation = Rule::new("!has(self.buckets) || self.buckets.step <= self.resolution").message("buckets.step must not exceed resolution"))]
#[x_kube(validation = Rule::new("!has(self.buckets) || !has(self.buckets.minSize) || self.buckets.minSize <= self.resolution").message("buckets.minSize must not exceed resolution"))]
#[x_kube(validation = Rule::new("!has(self.buckets) || !has(self.buckets.maxSize) || self.buckets.maxSize >= self.resolution").message("buckets.maxSize must be at least resolution"))]
pub struct TrainingSpec {
    /// Optimizer updates. Where neither this nor `epochs` is given: 2000.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub max_steps: Option<u64>,
    /// Passes over the dataset, in place of `maxSteps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub epochs: Option<u64>,
    /// Side of the square training pictures in pixels. With `buckets`, the area of a training picture is at most that of this square.
    #[serde(default = "resolution")]
    #[schemars(range(min = 32, max = 2048), extend("multipleOf" = 16))]
    pub resolution: u32,
    /// Aspect-ratio buckets: pictures keep their shape, and each batch has pictures of one shape. Where absent: every picture is cropped to a square.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub buckets: Option<BucketsSpec>,
    /// Pictures per forward and backward pass.
    #[serde(default = "batch_size")]
    #[schemars(range(min = 1, max = 256))]
    pub batch_size: u32,
    /// Passes per optimizer update.
    #[serde(default = "gradient_accumulation_steps")]
    #[schemars(range(min = 1, max = 1024))]
    pub gradient_accumulation_steps: u32,
    /// Whether blocks are computed again in the backward pass instead of being kept in memory. Changes memory and speed, not the result.
    #[serde(default)]
    pub gradient_checkpointing: GradientCheckpointing,
    /// Number format of the frozen model and of its activations. The LoRA itself is always kept in 32 bits.
    #[serde(default)]
    pub precision: Precision,
    /// How the frozen weights of the transformer's blocks are kept.
    #[serde(default)]
    pub weights: Weights,
    /// Seed of all random numbers.
    #[serde(default = "seed")]
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub seed: u64,
    /// Tokens of the caption that the T5 encoder reads.
    #[serde(default = "max_sequence_length")]
    #[schemars(range(min = 1, max = 512))]
    pub max_sequence_length: u32,
    /// Crop the middle instead of a random part: of the square, or with `buckets` of the little that is beyond the bucket's shape.
    #[serde(default)]
    pub center_crop: bool,
    /// Mirror half of the pictures.
    #[serde(default)]
    pub random_flip: bool,
    /// Which noise levels are trained, and with what weight.
    #[serde(default)]
    pub flow_matching: FlowMatchingSpec,
    /// The optimizer.
    #[serde(default)]
    pub optimizer: OptimizerSpec,
    /// Gradients are scaled down to this L2 norm. "0" turns clipping off.
    #[serde(default = "max_grad_norm")]
    #[x_kube(validation = bounds::MAX_GRAD_NORM.rule())]
    pub max_grad_norm: Decimal,
    /// How the learning rate changes over the run.
    #[serde(default)]
    pub learning_rate_schedule: LearningRateScheduleSpec,
    /// Shape of the LoRA and the layers that it changes.
    #[serde(default)]
    pub lora: LoraSpec,
    /// Pictures of the class that the base model draws itself, trained along so that it does not forget the class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prior_preservation: Option<PriorPreservationSpec>,
}

/// Aspect-ratio buckets, as kohya's sd-scripts choose them. The sides of a bucket are multiples of `step`, its area is at most resolution * resolution, and a
/// picture is resized to cover its bucket; what is beyond is cropped. Without `upscale` (kohya's `--bucket_no_upscale`) the bucket follows from the picture's own
/// size, and no picture is enlarged.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.upscale || (!has(self.minSize) && !has(self.maxSize))").message("minSize and maxSize need upscale: true; without it the sides follow from the pictures"))]
#[x_kube(validation = Rule::new("(!has(self.minSize) || self.minSize % self.step == 0) && (!has(self.maxSize) || self.maxSize % self.step == 0)").message("minSize and maxSize must be multiples of step"))]
pub struct BucketsSpec {
    /// What the sides of a bucket are multiples of, in pixels. A smaller step crops less and makes more buckets.
    #[serde(default = "bucket_step")]
    #[schemars(range(min = 16, max = 512), extend("multipleOf" = 16))]
    pub step: u32,
    /// Enlarge pictures that are smaller than their bucket. Buckets then have sides from `minSize` to `maxSize` and as much of the area as the step allows.
    #[serde(default)]
    pub upscale: bool,
    /// Shortest side of a bucket. Where absent: 256 or the resolution, whichever is less, as a multiple of the step.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 2048), extend("multipleOf" = 16))]
    pub min_size: Option<u32>,
    /// Longest side of a bucket. Where absent: 1024 or the resolution, whichever is more, as a multiple of the step.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 32, max = 8192), extend("multipleOf" = 16))]
    pub max_size: Option<u32>,
}

/// Whether blocks are computed again in the backward pass.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum GradientCheckpointing {
    /// As many blocks as the 16 GB budget demands, and no more.
    #[default]
    Auto,
    /// Every block.
    Always,
    /// No block.
    Never,
}

/// Number format of the frozen model.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Precision {
    /// BF16 where the GPU has it, else FP16; FP32 on the CPU.
    #[default]
    Auto,
    /// 16 bits with the range of FP32 (compute capability 8.0 and newer).
    BF16,
    /// 16 bits with loss scaling.
    FP16,
    /// 32 bits.
    FP32,
}

/// How frozen weights are kept.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Weights {
    /// `Float` where the training then fits the GPU, else `Int8`; `Float` on the CPU.
    #[default]
    Auto,
    /// In the number format of `precision`.
    Float,
    /// In 8 bits with a scale per output: half the memory of 16 bits, and gradients with the error of the rounding.
    Int8,
}

impl Weights {
    /// Whether it is the default.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    pub(crate) fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// Which noise levels are trained.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowMatchingSpec {
    /// Density of the noise levels, or weight of their losses.
    #[serde(default)]
    pub weighting_scheme: WeightingScheme,
    /// Mean of the normal distribution of `LogitNormal`.
    #[serde(default = "zero")]
    #[x_kube(validation = bounds::LOGIT_MEAN.rule())]
    pub logit_mean: Decimal,
    /// Standard deviation of the normal distribution of `LogitNormal`.
    #[serde(default = "one")]
    #[x_kube(validation = bounds::LOGIT_STD.rule())]
    pub logit_std: Decimal,
    /// Scale of `Mode`.
    #[serde(default = "mode_scale")]
    #[x_kube(validation = bounds::MODE_SCALE.rule())]
    pub mode_scale: Decimal,
    /// How far the noise levels are moved towards more noise: a number, as "3", or ByResolution, which diffusers computes from the number of patches of a
    /// picture (1.88 for 512 pixels, 3.16 for 1024). Where absent: what the model's scheduler says, 3 for SD3. Pictures are always drawn with the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = shift::rule())]
    pub shift: Option<TimestepShift>,
    /// Compare the denoised picture (loss weighted by the squared noise level) instead of the velocity.
    #[serde(default = "yes")]
    pub precondition_outputs: bool,
}

/// Density of the noise levels, or weight of their losses.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum WeightingScheme {
    /// Sigmoid of a normal distribution.
    #[default]
    LogitNormal,
    /// Heavier tails, from `modeScale`.
    Mode,
    /// Uniform, losses weighted by the inverse squared noise level.
    SigmaSqrt,
    /// Uniform, losses weighted as in a cosine schedule.
    CosMap,
    /// Uniform, not weighted.
    None,
}

/// The optimizer.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.prodigy) || self.type == 'Prodigy'").message("prodigy needs type Prodigy"))]
pub struct OptimizerSpec {
    /// Which optimizer.
    #[serde(default, rename = "type")]
    pub kind: OptimizerKind,
    /// Learning rate; "1" is usual for Prodigy, which finds its own.
    #[serde(default = "learning_rate")]
    #[x_kube(validation = bounds::LEARNING_RATE.rule())]
    pub learning_rate: Decimal,
    /// Decay of the mean of the gradients.
    #[serde(default = "beta1")]
    #[x_kube(validation = bounds::FRACTION.rule())]
    pub beta1: Decimal,
    /// Decay of the mean of the squared gradients.
    #[serde(default = "beta2")]
    #[x_kube(validation = bounds::FRACTION.rule())]
    pub beta2: Decimal,
    /// Decoupled weight decay.
    #[serde(default = "weight_decay")]
    #[x_kube(validation = bounds::WEIGHT_DECAY.rule())]
    pub weight_decay: Decimal,
    /// Added to the denominator.
    #[serde(default = "epsilon")]
    #[x_kube(validation = bounds::EPSILON.rule())]
    pub epsilon: Decimal,
    /// Settings of Prodigy alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prodigy: Option<ProdigySpec>,
}

/// Which optimizer.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum OptimizerKind {
    /// AdamW with 32-bit state.
    AdamW,
    /// AdamW with blockwise 8-bit state.
    #[default]
    AdamW8bit,
    /// Prodigy: AdamW that finds its learning rate.
    Prodigy,
}

/// Settings of Prodigy.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProdigySpec {
    /// First estimate of the distance to the solution.
    #[serde(default = "d0")]
    #[x_kube(validation = bounds::D0.rule())]
    pub d0: Decimal,
    /// Factor on the estimate.
    #[serde(default = "one")]
    #[x_kube(validation = bounds::D_COEF.rule())]
    pub d_coef: Decimal,
    /// Largest growth of the estimate per step; unlimited where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = bounds::GROWTH_RATE.rule())]
    pub growth_rate: Option<Decimal>,
    /// Decay of the estimate's running sums; the square root of `beta2` where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = bounds::FRACTION.rule())]
    pub beta3: Option<Decimal>,
    /// Adam's bias correction.
    #[serde(default = "yes")]
    pub use_bias_correction: bool,
    /// Keep the estimate from growing during a warm-up of the learning rate.
    #[serde(default = "yes")]
    pub safeguard_warmup: bool,
}

/// How the learning rate changes over the run.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.type != 'Constant' || self.warmupSteps == 0").message("Constant has no warm-up: use ConstantWithWarmup"))]
#[x_kube(validation = Rule::new("!has(self.cycles) || self.type in ['Cosine', 'CosineWithRestarts']").message("cycles needs type Cosine or CosineWithRestarts"))]
pub struct LearningRateScheduleSpec {
    /// Its shape.
    #[serde(default, rename = "type")]
    pub kind: ScheduleKind,
    /// Updates over which the rate rises from 0.
    #[serde(default)]
    #[schemars(range(max = 10_000_000))]
    pub warmup_steps: u64,
    /// Waves of Cosine ("0.5" where absent: one fall) and CosineWithRestarts ("1" where absent).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = bounds::CYCLES.rule())]
    pub cycles: Option<Decimal>,
    /// Exponent of Polynomial.
    #[serde(default = "one")]
    #[x_kube(validation = bounds::POWER.rule())]
    pub power: Decimal,
}

/// Shape of the learning rate over the run.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ScheduleKind {
    /// The same throughout.
    #[default]
    Constant,
    /// The same after a warm-up.
    ConstantWithWarmup,
    /// Falls to 0 in a straight line.
    Linear,
    /// Falls to 0 along a cosine.
    Cosine,
    /// Falls along a cosine `cycles` times.
    CosineWithRestarts,
    /// Falls to 1e-7 along a polynomial of degree `power`.
    Polynomial,
}

/// Shape of the LoRA.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoraSpec {
    /// Rank of each pair of matrices.
    #[serde(default = "rank")]
    #[schemars(range(min = 1, max = 1024))]
    pub rank: u32,
    /// The LoRA's output is scaled by alpha / rank. Equal to `rank` where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub alpha: Option<u32>,
    /// Scale by alpha / sqrt(rank) instead, as peft's `use_rslora`, so that high ranks learn as fast as low ones. The files have the alpha that gives the
    /// same scale to readers that divide by the rank: alpha times sqrt(rank).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub use_rslora: bool,
    /// Share of the inputs that is set to 0 while training.
    #[serde(default = "zero")]
    #[x_kube(validation = bounds::FRACTION.rule())]
    pub dropout: Decimal,
    /// Layers to train, by the end of their names: "attn.to_q" is every block's; "transformer_blocks.0.attn.to_q" one block's;
    /// "transformer_blocks.0-11.attn.to_q" that of twelve blocks.
    #[serde(default = "target_modules")]
    #[schemars(length(min = 1, max = 512), inner(length(min = 1, max = 128), regex(pattern = r"^[a-z0-9_]+([.]([a-z0-9_]+|[0-9]{1,3}-[0-9]{1,3}))*$")), extend("x-kubernetes-list-type" = "set"))]
    pub target_modules: Vec<String>,
}

/// Prior preservation: before training, the base model draws pictures of `classPrompt` at `training.resolution` (28 steps, guidance 7, noise
/// from `training.seed`); each batch then has as many of them as of the dataset, and the loss is mean(dataset) + weight * mean(class).
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PriorPreservationSpec {
    /// Prompt for the class pictures, for example "a photo of a dog".
    #[schemars(length(min = 1, max = 2000))]
    #[x_kube(validation = Rule::new("self.matches('[^[:space:]]')").message("must not be blank"))]
    pub class_prompt: String,
    /// How many class pictures to draw. They are drawn once and kept in the cache; more than the dataset's make an epoch longer.
    #[serde(default = "class_images")]
    #[schemars(range(min = 1, max = 10_000))]
    pub images: u32,
    /// Weight of their mean loss beside the dataset's.
    #[serde(default = "one")]
    #[x_kube(validation = bounds::PRIOR_WEIGHT.rule())]
    pub weight: Decimal,
    /// Class pictures drawn at once. Changes memory and speed alone.
    #[serde(default = "sample_batch_size")]
    #[schemars(range(min = 1, max = 64))]
    pub sample_batch_size: u32,
    /// Number format while drawing on a GPU. `Auto`: the training's. The CPU draws in 32 bits.
    #[serde(default)]
    pub precision: Precision,
}

/// Sample pictures during training and a comparison with held-out pictures at its end, written below `output.uri`.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("size(self.prompts) > 0 || has(self.datasetUri)").message("give prompts, datasetUri or both"))]
pub struct ValidationSpec {
    /// One picture is drawn for each prompt.
    #[serde(default)]
    #[schemars(length(max = 16), inner(length(min = 1, max = 2000)))]
    pub prompts: Vec<String>,
    /// A folder of held-out pictures in the dataset's form (the same metadata file and caption column), which training never sees; ends with "/".
    /// At the end the first 16 captions are drawn by the base model and with the LoRA from the same noise: `before-after.png`, and their distances
    /// to the real pictures in `result.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new(super::storage::URI_RULE).message(super::storage::URI_MESSAGE))]
    #[x_kube(validation = Rule::new("self.endsWith('/')").message("must end with \"/\", as it is a folder"))]
    pub dataset_uri: Option<String>,
    /// Draw after this many steps, and at the end.
    #[serde(default = "validation_every_steps")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub every_steps: u64,
    /// Seed of the pictures' noise.
    #[serde(default = "seed")]
    #[schemars(range(max = 9_007_199_254_740_991_u64))]
    pub seed: u64,
    /// Steps of the sampler.
    #[serde(default = "sampler_steps")]
    #[schemars(range(min = 1, max = 1000))]
    pub steps: u32,
    /// Classifier-free guidance; "1" turns it off.
    #[serde(default = "guidance_scale")]
    #[x_kube(validation = bounds::GUIDANCE_SCALE.rule())]
    pub guidance_scale: Decimal,
}

default_values! {
    resolution: u32 = 512;
    bucket_step: u32 = 64;
    batch_size: u32 = 4;
    gradient_accumulation_steps: u32 = 3;
    seed: u64 = 42;
    max_sequence_length: u32 = 77;
    max_grad_norm: Decimal = Decimal::new("1.0");
    zero: Decimal = Decimal::new("0.0");
    one: Decimal = Decimal::new("1.0");
    mode_scale: Decimal = Decimal::new("1.29");
    yes: bool = true;
    learning_rate: Decimal = Decimal::new("1e-4");
    beta1: Decimal = Decimal::new("0.9");
    beta2: Decimal = Decimal::new("0.999");
    weight_decay: Decimal = Decimal::new("1e-4");
    epsilon: Decimal = Decimal::new("1e-8");
    d0: Decimal = Decimal::new("1e-6");
    rank: u32 = 4;
    target_modules: Vec<String> = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"].map(str::to_owned).to_vec();
    class_images: u32 = 100;
    sample_batch_size: u32 = 4;
    validation_every_steps: u64 = 500;
    sampler_steps: u32 = 28;
    guidance_scale: Decimal = Decimal::new("5.0");
}
default_is_empty_object!(TrainingSpec, BucketsSpec, FlowMatchingSpec, OptimizerSpec, ProdigySpec, LearningRateScheduleSpec, LoraSpec);
