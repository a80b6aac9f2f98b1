//! The resolved configuration of a training run: what `train` consumes. It holds no secrets.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{
    AddressingStyle, ExistingOutput, GradientCheckpointing, ModelFiles, OnBadSample, OptimizerKind, OutputDtype, OutputFormat, Precision, ResumePolicy,
    ScheduleKind, TriggerPosition, WeightingScheme, Weights,
};

/// Version of the configuration. Higher where a trainer that knows only the one before must not run it: where something that it would leave out changes what
/// is trained. What a trainer may leave out is added without it.
pub const CONFIG_VERSION: u32 = 1;

/// Everything that a training run needs to know. Written by [`super::resolve`], read by `finetune train --config`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TrainConfig {
    /// [`CONFIG_VERSION`] of whoever has written it; 0 from before there were versions.
    #[serde(default)]
    pub config_version: u32,
    /// `namespace/name` of the job, for logs.
    pub job: String,
    /// `sha256:<hex>` of what determines the weights.
    pub spec_hash: String,
    /// The base model.
    pub model: ModelConfig,
    /// The dataset.
    pub dataset: DatasetConfig,
    /// How to train.
    pub training: TrainingConfig,
    /// Sample pictures during training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationConfig>,
    /// Checkpoints.
    pub checkpoint: CheckpointConfig,
    /// How to continue.
    pub resume: ResumeConfig,
    /// Outputs.
    pub output: OutputConfig,
    /// How to reach the buckets; the environment decides where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageConfig>,
    /// What to train on.
    pub device: DeviceRequest,
}

/// The base model.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelConfig {
    /// Where it is.
    pub source: ModelSource,
    /// Which of its files hold which part, where they are not in diffusers' layout; paths within the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<ModelFiles>,
    /// Folder for downloaded files and prepared data that outlives the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
}

/// Where a model is.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum ModelSource {
    /// A repository on the Hugging Face hub; the token comes from the environment (`HF_TOKEN`).
    HuggingFace {
        /// `organisation/name`.
        repo: String,
        /// Commit, 40 hexadecimal digits.
        revision: String,
    },
    /// A folder or a single file in an object store.
    ObjectStore {
        /// The folder, with a "/" at the end, or the file, which ends in ".safetensors".
        uri: String,
        /// File in it with the digests of the others.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha256_manifest: Option<String>,
        /// How to reach it, where it differs from [`TrainConfig::storage`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        storage: Option<StorageConfig>,
    },
    /// A local folder: a mounted volume.
    Directory {
        /// The folder.
        path: PathBuf,
    },
}

/// The dataset.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DatasetConfig {
    /// The folder, with a "/" at the end.
    pub uri: String,
    /// Caption of pictures without one of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caption: Option<String>,
    /// What is done to the captions; nothing where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captions: Option<CaptionsConfig>,
    /// Name of the metadata file; none: those that are usual.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata_file: Option<String>,
    /// Key of the picture's path; none: the usual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_column: Option<String>,
    /// Key of the caption.
    pub caption_column: String,
    /// How often each picture occurs in an epoch.
    pub repeats: u32,
    /// `sha256:<hex>` that the dataset must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_digest: Option<String>,
    /// What to do with unusable samples.
    pub on_bad_sample: OnBadSample,
}

/// What is done to the captions.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CaptionsConfig {
    /// A word that every caption gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trigger_word: Option<String>,
    /// Where it goes.
    pub trigger_position: TriggerPosition,
    /// Orders of the tags.
    pub tag_orders: u32,
    /// The first tags that stay.
    pub keep_tags: u32,
    /// Share of the draws with the empty caption.
    pub dropout: f64,
}

impl fmt::Display for CaptionsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.trigger_position == TriggerPosition::Front { "in front" } else { "behind" };
        let trigger = self.trigger_word.as_ref().map(|word| format!("{word:?} {place}"));
        let kept = match self.keep_tags {
            0 => String::new(),
            1 => " after the first".to_owned(),
            tags => format!(" after the first {tags}"),
        };
        let orders = (self.tag_orders > 1).then(|| format!("{} orders of the tags{kept}", self.tag_orders));
        let dropout = (self.dropout > 0.0).then(|| format!("left out in {} of the draws", self.dropout));
        f.write_str(&[trigger, orders, dropout].into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

impl DatasetConfig {
    /// The configuration of held-out pictures in the same form at `uri`: their captions get the trigger word, and nothing else.
    #[must_use]
    pub fn held_out(&self, uri: &str) -> Self {
        let captions = self.captions.clone().map(|captions| CaptionsConfig { tag_orders: 1, keep_tags: 0, dropout: 0.0, ..captions });
        Self { uri: uri.to_owned(), repeats: 1, expected_digest: None, captions, ..self.clone() }
    }
}

/// How to train.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TrainingConfig {
    /// Optimizer updates; exactly one of this and `epochs` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Passes over the dataset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Side of the training pictures in pixels; with buckets, the side of the square whose area they have at most.
    pub resolution: u32,
    /// Aspect-ratio buckets; square pictures where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buckets: Option<BucketsConfig>,
    /// Pictures per pass.
    pub batch_size: u32,
    /// Passes per update.
    pub gradient_accumulation_steps: u32,
    /// Whether blocks are computed again in the backward pass.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Number format of the frozen model.
    pub precision: Precision,
    /// How frozen weights are kept.
    #[serde(default, skip_serializing_if = "Weights::is_auto")]
    pub weights: Weights,
    /// Seed of all random numbers.
    pub seed: u64,
    /// Tokens of the caption for T5.
    pub max_sequence_length: u32,
    /// Crop the middle.
    pub center_crop: bool,
    /// Mirror half of the pictures.
    pub random_flip: bool,
    /// Noise levels.
    pub flow_matching: FlowMatchingConfig,
    /// Optimizer.
    pub optimizer: OptimizerConfig,
    /// Largest L2 norm of the gradients; 0 is no limit.
    pub max_grad_norm: f64,
    /// Learning rate over the run.
    pub learning_rate_schedule: ScheduleConfig,
    /// The LoRA.
    pub lora: LoraConfig,
    /// Prior preservation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prior_preservation: Option<PriorPreservationConfig>,
}

/// Aspect-ratio buckets.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BucketsConfig {
    /// What sides are multiples of.
    pub step: u32,
    /// The sides of buckets into which small pictures are enlarged; where absent, no picture is enlarged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upscale: Option<SidesConfig>,
}

/// Sides of buckets.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SidesConfig {
    /// The shortest.
    pub min: u32,
    /// The longest.
    pub max: u32,
}

impl fmt::Display for BucketsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sides in steps of {}", self.step)?;
        match self.upscale {
            Some(SidesConfig { min, max }) => write!(f, " from {min} to {max}, small pictures are enlarged"),
            None => f.write_str(", no picture is enlarged"),
        }
    }
}

/// Noise levels.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowMatchingConfig {
    /// Density, or weight of the losses.
    pub weighting_scheme: WeightingScheme,
    /// Mean for `LogitNormal`.
    pub logit_mean: f64,
    /// Standard deviation for `LogitNormal`.
    pub logit_std: f64,
    /// Scale for `Mode`.
    pub mode_scale: f64,
    /// Shift of the noise levels; the model's where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shift: Option<ShiftConfig>,
    /// Compare the denoised picture instead of the velocity.
    pub precondition_outputs: bool,
}

/// Shift of the noise levels.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ShiftConfig {
    /// This one.
    Number(f64),
    /// From the number of patches of a picture.
    ByResolution,
}

/// Optimizer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OptimizerConfig {
    /// Which one.
    pub kind: OptimizerKind,
    /// Learning rate before the schedule.
    pub learning_rate: f64,
    /// Decay of the mean.
    pub beta1: f64,
    /// Decay of the mean square.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Set exactly where `kind` is Prodigy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prodigy: Option<ProdigyConfig>,
}

/// Settings of Prodigy.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProdigyConfig {
    /// First estimate.
    pub d0: f64,
    /// Factor on the estimate.
    pub d_coef: f64,
    /// Largest growth per step; unlimited where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth_rate: Option<f64>,
    /// Decay of the running sums (already the square root of `beta2` where the spec says nothing).
    pub beta3: f64,
    /// Adam's bias correction.
    pub use_bias_correction: bool,
    /// No growth during warm-up.
    pub safeguard_warmup: bool,
}

/// Learning rate over the run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ScheduleConfig {
    /// Shape.
    pub kind: ScheduleKind,
    /// Updates of warm-up.
    pub warmup_steps: u64,
    /// Waves of the cosine schedules: 0.5 for Cosine and 1 for CosineWithRestarts where the spec says nothing.
    pub cycles: f64,
    /// Degree of the polynomial.
    pub power: f64,
}

/// The LoRA.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoraConfig {
    /// Rank.
    pub rank: u32,
    /// Scale times rank, also where the job scales by the rank's root.
    pub alpha: f64,
    /// Share of inputs set to 0.
    pub dropout: f64,
    /// Ends of the names of the layers.
    pub target_modules: Vec<String>,
}

/// Prior preservation.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PriorPreservationConfig {
    /// Prompt of the class pictures.
    pub class_prompt: String,
    /// How many.
    pub images: u32,
    /// Weight of their loss.
    pub weight: f64,
    /// Drawn at once.
    pub sample_batch_size: u32,
    /// Number format while drawing.
    pub precision: Precision,
}

/// Sample pictures during training.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ValidationConfig {
    /// One picture each.
    pub prompts: Vec<String>,
    /// Folder of held-out pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset_uri: Option<String>,
    /// After this many updates, and at the end.
    pub every_steps: u64,
    /// Seed of the noise.
    pub seed: u64,
    /// Steps of the sampler.
    pub steps: u32,
    /// Classifier-free guidance.
    pub guidance_scale: f64,
}

/// Checkpoints.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointConfig {
    /// Where they go, with a "/" at the end.
    pub uri: String,
    /// Save after this many updates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every_steps: Option<u64>,
    /// Save after this many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every_seconds: Option<u64>,
    /// How many to keep.
    pub keep_last: u32,
    /// Save when asked to end.
    pub on_termination: bool,
    /// Keep them after the outputs are published.
    pub keep_after_success: bool,
}

/// How to continue.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ResumeConfig {
    /// Whether to look for a checkpoint.
    pub policy: ResumePolicy,
    /// Another run's checkpoint to start from, with a "/" at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_checkpoint: Option<String>,
}

/// Outputs.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OutputConfig {
    /// Where they go, with a "/" at the end.
    pub uri: String,
    /// Formats, sorted, each once.
    pub formats: Vec<OutputFormat>,
    /// Number format of the files; by the precision of the training where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<OutputDtype>,
    /// What to do where there is a result already.
    pub existing: ExistingOutput,
}

/// How to reach the buckets. Credentials come from the environment.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StorageConfig {
    /// URL of an S3-compatible server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Where a bucket's name goes in the server's addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addressing_style: Option<AddressingStyle>,
    /// Region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// File with additional certificates (PEM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<PathBuf>,
    /// Credentials are read from environment variables whose names begin with this, as in `MODEL_AWS_ACCESS_KEY_ID`; plain names where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_prefix: Option<String>,
}

/// What to train on.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum DeviceRequest {
    /// A GPU; never the CPU in its place.
    Gpu,
    /// The CPU.
    Cpu,
}
