//! From the spec to the configuration.

use std::path::PathBuf;

use super::config::{
    BucketsConfig, CONFIG_VERSION, CaptionsConfig, CheckpointConfig, DatasetConfig, DeviceRequest, FlowMatchingConfig, LoraConfig, ModelConfig, ModelSource,
    OptimizerConfig, OutputConfig, PriorPreservationConfig, ProdigyConfig, ResumeConfig, ScheduleConfig, ShiftConfig, SidesConfig, StorageConfig, TrainConfig,
    TrainingConfig, ValidationConfig,
};
use super::folders::{Folder, Use, default_checkpoint_uri, overlaps};
use super::identity::Identity;
use super::{BUDGET_BYTES, GpuTooSmall, MemoryBudget, MemoryPlan, ModelShape, OptimizerKind, ScheduleKind, StepPlan, memory_plan};
use crate::bounds::{self, Bounds};
use crate::{Decimal, FineTuneJobSpec, Reason};

/// Updates of a run whose spec names neither `maxSteps` nor `epochs`.
pub const DEFAULT_MAX_STEPS: u64 = 2000;
/// Prefix of the environment variables with the credentials for a model store of its own.
pub const MODEL_CREDENTIALS_PREFIX: &str = "MODEL_";

/// What is known of the world; each part may be unknown.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Usable samples of the dataset. With buckets an epoch's length depends on their shapes, too, and stays unknown.
    pub dataset_size: Option<u64>,
    /// The device that the trainer has found.
    pub device: Option<DeviceFacts>,
    /// Where a `persistentVolumeClaim` model is mounted.
    pub model_directory: Option<PathBuf>,
    /// Where `model.cache` is mounted, or another folder that outlives the run.
    pub cache_dir: Option<PathBuf>,
    /// Where the certificates of `storage.caBundleConfigMapRef` are mounted.
    pub ca_bundle: Option<PathBuf>,
    /// Where the certificates of the model store's own `caBundleConfigMapRef` are mounted.
    pub model_ca_bundle: Option<PathBuf>,
    /// The operator's defaults for what `spec.storage` leaves out.
    pub storage: Option<StorageConfig>,
    /// The model's shape; where unknown, that which the hub's repository is named after, else Stable Diffusion 3 Medium.
    pub model: Option<ModelShape>,
}

/// A device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DeviceFacts {
    /// The CPU.
    Cpu,
    /// A GPU.
    Gpu {
        /// Its memory in bytes.
        memory_bytes: u64,
        /// Its compute capability, major and minor.
        compute_capability: (u32, u32),
    },
}

/// What will be done.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The configuration of the trainer.
    pub config: TrainConfig,
    /// Length of the run.
    pub steps: StepPlan,
    /// Division of the work and memory of each stage.
    pub memory: MemoryPlan,
}

/// One thing in a spec that cannot be done.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    /// Path of the field, as in `spec.training.maxSteps`.
    pub path: String,
    /// What is wrong, and what to do.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// A spec that cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Every problem of the spec at once.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<Problem>),
    /// Nothing fits the GPU.
    #[error("spec.training: {0}")]
    TooSmall(#[source] GpuTooSmall),
    /// The identity could not be written as JSON.
    #[error("failed to write the spec's identity as JSON")]
    Identity(#[source] serde_json::Error),
}

impl PlanError {
    /// The reason for conditions and exit codes.
    pub fn reason(&self) -> Reason {
        match self {
            Self::TooSmall(_) => Reason::GPUTooSmall,
            Self::Invalid(_) | Self::Identity(_) => Reason::InvalidConfig,
        }
    }
}

/// Resolves the spec of the job `namespace/name` to a plan. Pure: the same arguments give the same plan.
///
/// The spec is one that has passed the API's validation, so that defaults are filled in; what the schema cannot say is checked here.
/// `config` depends on the spec and on where things are mounted, never on the dataset or the device: operator and trainer come to the same one.
///
/// # Errors
/// Every problem of the spec at once.
pub fn resolve(spec: &FineTuneJobSpec, namespace: &str, name: &str, facts: &Facts) -> Result<Plan, PlanError> {
    let mut reader = Reader::default();
    let dataset = DatasetConfig {
        uri: spec.dataset.uri.clone(),
        caption: spec.dataset.caption.clone(),
        captions: spec.dataset.captions.as_ref().and_then(|captions| self::captions(captions, &mut reader)),
        metadata_file: spec.dataset.metadata_file.clone(),
        image_column: spec.dataset.image_column.clone(),
        caption_column: spec.dataset.caption_column.clone(),
        repeats: spec.dataset.repeats,
        expected_digest: spec.dataset.expected_digest.clone(),
        on_bad_sample: spec.dataset.on_bad_sample,
    };
    let training = training(&spec.training, &mut reader);
    let validation = spec.validation.as_ref().map(|validation| ValidationConfig {
        prompts: validation.prompts.clone(),
        dataset_uri: validation.dataset_uri.clone(),
        every_steps: validation.every_steps,
        seed: validation.seed,
        steps: validation.steps,
        guidance_scale: reader.number("spec.validation.guidanceScale", &validation.guidance_scale, bounds::GUIDANCE_SCALE),
    });
    let storage = storage(spec.storage.as_ref(), facts);
    let source = model_source(spec, facts, &mut reader);
    reader.folder("spec.dataset.uri", &spec.dataset.uri);
    reader.folder("spec.output.uri", &spec.output.uri);
    reader.problems.extend(overlaps(&folders(spec, storage.as_ref().and_then(|storage| storage.endpoint.as_deref()))));
    let gpu = &spec.scheduling.gpu;
    if let Some(max) = gpu.most_memory_mib().filter(|&max| max < gpu.min_memory_mib) {
        reader.problem("spec.scheduling.gpu", format!("minMemoryMiB ({}) must not exceed maxMemoryMiB ({max})", gpu.min_memory_mib));
    }
    let (Some(source), true) = (source, reader.problems.is_empty()) else {
        return Err(PlanError::Invalid(reader.problems));
    };
    let mut formats = spec.output.formats.clone();
    formats.sort_unstable();
    formats.dedup();
    let identity = Identity {
        model: &spec.model.source,
        dataset: &dataset,
        training: &training,
        validation: validation.as_ref(),
        from_checkpoint: spec.resume.from_checkpoint.as_deref(),
        formats: &formats,
    };
    let spec_hash = identity.hash().map_err(PlanError::Identity)?;
    let checkpoint_uri = spec.checkpoint.uri.clone().unwrap_or_else(|| default_checkpoint_uri(&spec.output.uri, &spec_hash));
    let nonzero = |value: u64| (value > 0).then_some(value);
    let pictures = facts.dataset_size.filter(|_| training.buckets.is_none()).map(|pictures| [pictures]);
    let steps = StepPlan::new(&training, dataset.repeats, pictures.as_ref().map(|pictures| &pictures[..]));
    let config = TrainConfig {
        config_version: CONFIG_VERSION,
        job: format!("{namespace}/{name}"),
        spec_hash,
        model: ModelConfig { source, files: spec.model.source.files.clone(), cache_dir: facts.cache_dir.clone() },
        dataset,
        training,
        validation,
        checkpoint: CheckpointConfig {
            uri: checkpoint_uri,
            every_steps: nonzero(spec.checkpoint.every_steps),
            every_seconds: nonzero(spec.checkpoint.every_seconds),
            keep_last: spec.checkpoint.keep_last,
            on_termination: spec.checkpoint.on_termination,
            keep_after_success: spec.checkpoint.keep_after_success,
        },
        resume: ResumeConfig { policy: spec.resume.policy, from_checkpoint: spec.resume.from_checkpoint.clone() },
        output: OutputConfig { uri: spec.output.uri.clone(), formats, dtype: spec.output.dtype, existing: spec.output.existing },
        storage,
        device: if spec.scheduling.gpu.per_replica == 0 { DeviceRequest::Cpu } else { DeviceRequest::Gpu },
    };
    let published = || ModelShape::of_source(&spec.model.source);
    let shape = facts.model.or_else(published).unwrap_or(ModelShape::SD3_MEDIUM);
    let budget = memory_budget(gpu, facts);
    let memory = memory_plan(&config.training, config.validation.as_ref(), &shape, budget).map_err(PlanError::TooSmall)?;
    Ok(Plan { config, steps, memory })
}

/// The folders that the spec names on the server of the run's buckets, whose address is `endpoint`.
fn folders(spec: &FineTuneJobSpec, endpoint: Option<&str>) -> Vec<Folder> {
    let folder = |path, uri: &str, used_as| Folder { path, uri: uri.to_owned(), used_as };
    // A bucket of that name on another server is another bucket.
    let own_server = |model: &&crate::ObjectStoreSource| model.storage.as_ref().is_none_or(|storage| storage.endpoint.as_deref() == endpoint);
    let model = spec.model.source.object_store.as_ref().filter(own_server).map(|model| &model.uri);
    let optional = [
        ("spec.checkpoint.uri", spec.checkpoint.uri.as_ref(), Use::Checkpoint),
        ("spec.validation.datasetUri", spec.validation.as_ref().and_then(|validation| validation.dataset_uri.as_ref()), Use::Input),
        ("spec.model.source.objectStore.uri", model, Use::Input),
    ];
    let named = [folder("spec.output.uri", &spec.output.uri, Use::Output), folder("spec.dataset.uri", &spec.dataset.uri, Use::Input)];
    named.into_iter().chain(optional.into_iter().filter_map(|(path, uri, used_as)| Some(folder(path, uri?, used_as)))).collect()
}

/// The 16 GB class is the most that is used on any GPU; a smaller one, asked for or found, is the limit.
fn memory_budget(gpu: &crate::GpuSpec, facts: &Facts) -> MemoryBudget {
    if gpu.per_replica == 0 {
        return MemoryBudget::Cpu;
    }
    let available = match facts.device {
        Some(DeviceFacts::Gpu { memory_bytes, .. }) => memory_bytes,
        _ => u64::from(gpu.min_memory_mib) << 20,
    };
    MemoryBudget::Gpu(BUDGET_BYTES.min(available))
}

/// Collects problems while numbers are read.
#[derive(Default)]
struct Reader {
    problems: Vec<Problem>,
}

impl Reader {
    fn problem(&mut self, path: &str, message: impl Into<String>) {
        self.problems.push(Problem { path: path.to_owned(), message: message.into() });
    }

    /// The number, where it is one within its bounds.
    fn number(&mut self, path: &str, decimal: &Decimal, bounds: Bounds) -> f64 {
        bounds.read(decimal).unwrap_or_else(|problem| {
            self.problem(path, problem);
            0.0
        })
    }

    fn folder(&mut self, path: &str, uri: &str) {
        if !uri.ends_with('/') {
            self.problem(path, "must end with \"/\", as it is a folder");
        }
    }
}

/// None where nothing is done: what is written out and does nothing is as good as absent.
fn captions(spec: &crate::CaptionsSpec, reader: &mut Reader) -> Option<CaptionsConfig> {
    let config = CaptionsConfig {
        trigger_word: spec.trigger_word.clone(),
        trigger_position: spec.trigger_position,
        tag_orders: spec.tag_orders,
        keep_tags: spec.keep_tags,
        dropout: reader.number("spec.dataset.captions.dropout", &spec.dropout, bounds::CAPTION_DROPOUT),
    };
    (config.trigger_word.is_some() || config.tag_orders > 1 || config.dropout > 0.0).then_some(config)
}

fn training(spec: &crate::TrainingSpec, reader: &mut Reader) -> TrainingConfig {
    let flow = &spec.flow_matching;
    let (max_steps, epochs) = match (spec.max_steps, spec.epochs) {
        (Some(_), Some(_)) => {
            reader.problem("spec.training", "set maxSteps or epochs, not both");
            (spec.max_steps, None)
        }
        (None, None) => (Some(DEFAULT_MAX_STEPS), None),
        given => given,
    };
    TrainingConfig {
        max_steps,
        epochs,
        resolution: spec.resolution,
        buckets: spec.buckets.as_ref().map(|buckets| self::buckets(buckets, spec, reader)),
        batch_size: spec.batch_size,
        gradient_accumulation_steps: spec.gradient_accumulation_steps,
        gradient_checkpointing: spec.gradient_checkpointing,
        precision: spec.precision,
        weights: spec.weights,
        seed: spec.seed,
        max_sequence_length: spec.max_sequence_length,
        center_crop: spec.center_crop,
        random_flip: spec.random_flip,
        flow_matching: FlowMatchingConfig {
            weighting_scheme: flow.weighting_scheme,
            logit_mean: reader.number("spec.training.flowMatching.logitMean", &flow.logit_mean, bounds::LOGIT_MEAN),
            logit_std: reader.number("spec.training.flowMatching.logitStd", &flow.logit_std, bounds::LOGIT_STD),
            mode_scale: reader.number("spec.training.flowMatching.modeScale", &flow.mode_scale, bounds::MODE_SCALE),
            shift: flow.shift.as_ref().map(|shift| {
                let number = shift.number().map(|number| reader.number("spec.training.flowMatching.shift", number, bounds::SHIFT));
                number.map_or(ShiftConfig::ByResolution, ShiftConfig::Number)
            }),
            precondition_outputs: flow.precondition_outputs,
        },
        optimizer: optimizer(&spec.optimizer, reader),
        max_grad_norm: reader.number("spec.training.maxGradNorm", &spec.max_grad_norm, bounds::MAX_GRAD_NORM),
        learning_rate_schedule: schedule(&spec.learning_rate_schedule, reader),
        lora: LoraConfig {
            rank: spec.lora.rank,
            alpha: alpha(&spec.lora),
            dropout: reader.number("spec.training.lora.dropout", &spec.lora.dropout, bounds::FRACTION),
            target_modules: super::targets::expand(&spec.lora.target_modules).unwrap_or_else(|problem| {
                reader.problem("spec.training.lora.targetModules", problem);
                Vec::new()
            }),
        },
        prior_preservation: spec.prior_preservation.as_ref().map(|prior| PriorPreservationConfig {
            class_prompt: prior.class_prompt.clone(),
            images: prior.images,
            weight: reader.number("spec.training.priorPreservation.weight", &prior.weight, bounds::PRIOR_WEIGHT),
            sample_batch_size: prior.sample_batch_size,
            precision: prior.precision,
        }),
    }
}

/// The alpha whose quotient by the rank is the scale alpha / sqrt(rank) of a rank-stabilised LoRA (Kalajdzievski, "A Rank Stabilization Scaling Factor for
/// Fine-Tuning with LoRA", 2023).
pub fn rank_stabilised(alpha: f64, rank: u32) -> f64 {
    alpha * f64::from(rank).sqrt()
}

fn alpha(spec: &crate::LoraSpec) -> f64 {
    let alpha = f64::from(spec.alpha.unwrap_or(spec.rank));
    if spec.use_rslora { rank_stabilised(alpha, spec.rank) } else { alpha }
}

/// Shortest and longest side of kohya's buckets, where nothing is said.
const USUAL_SIDES: SidesConfig = SidesConfig { min: 256, max: 1024 };

fn buckets(spec: &crate::BucketsSpec, training: &crate::TrainingSpec, reader: &mut Reader) -> BucketsConfig {
    let (step, resolution) = (spec.step.max(1), training.resolution);
    let min = spec.min_size.unwrap_or_else(|| (USUAL_SIDES.min.min(resolution) / step * step).max(step));
    let max = spec.max_size.unwrap_or_else(|| USUAL_SIDES.max.max(resolution).next_multiple_of(step));
    let mut refuse = |wrong: bool, field: &str, message: &str| {
        if wrong {
            reader.problem(&format!("spec.training.buckets{field}"), message);
        }
    };
    refuse(
        training.prior_preservation.is_some(),
        "",
        "class pictures of priorPreservation are square and share no batch with buckets: leave one of the two out",
    );
    refuse(step > resolution, ".step", "must not exceed training.resolution");
    refuse(!spec.upscale && (spec.min_size.is_some() || spec.max_size.is_some()), ".upscale", "must be true with minSize or maxSize");
    refuse(!min.is_multiple_of(step) || !max.is_multiple_of(step), "", "minSize and maxSize must be multiples of step");
    refuse(spec.min_size.is_some_and(|min| min > resolution), ".minSize", "must not exceed training.resolution");
    refuse(spec.max_size.is_some_and(|max| max < resolution), ".maxSize", "must be at least training.resolution");
    BucketsConfig { step, upscale: spec.upscale.then_some(SidesConfig { min, max }) }
}

fn optimizer(spec: &crate::OptimizerSpec, reader: &mut Reader) -> OptimizerConfig {
    let path = |field: &str| format!("spec.training.optimizer.{field}");
    let beta2 = reader.number(&path("beta2"), &spec.beta2, bounds::FRACTION);
    let prodigy = (spec.kind == OptimizerKind::Prodigy).then(|| {
        let prodigy = spec.prodigy.clone().unwrap_or_default();
        ProdigyConfig {
            d0: reader.number(&path("prodigy.d0"), &prodigy.d0, bounds::D0),
            d_coef: reader.number(&path("prodigy.dCoef"), &prodigy.d_coef, bounds::D_COEF),
            growth_rate: prodigy.growth_rate.as_ref().map(|rate| reader.number(&path("prodigy.growthRate"), rate, bounds::GROWTH_RATE)),
            beta3: prodigy.beta3.as_ref().map_or(beta2.sqrt(), |beta3| reader.number(&path("prodigy.beta3"), beta3, bounds::FRACTION)),
            use_bias_correction: prodigy.use_bias_correction,
            safeguard_warmup: prodigy.safeguard_warmup,
        }
    });
    OptimizerConfig {
        kind: spec.kind,
        learning_rate: reader.number(&path("learningRate"), &spec.learning_rate, bounds::LEARNING_RATE),
        beta1: reader.number(&path("beta1"), &spec.beta1, bounds::FRACTION),
        beta2,
        weight_decay: reader.number(&path("weightDecay"), &spec.weight_decay, bounds::WEIGHT_DECAY),
        epsilon: reader.number(&path("epsilon"), &spec.epsilon, bounds::EPSILON),
        prodigy,
    }
}

fn schedule(spec: &crate::LearningRateScheduleSpec, reader: &mut Reader) -> ScheduleConfig {
    let default_cycles = if spec.kind == ScheduleKind::Cosine { 0.5 } else { 1.0 };
    ScheduleConfig {
        kind: spec.kind,
        warmup_steps: spec.warmup_steps,
        cycles: spec.cycles.as_ref().map_or(default_cycles, |cycles| reader.number("spec.training.learningRateSchedule.cycles", cycles, bounds::CYCLES)),
        power: reader.number("spec.training.learningRateSchedule.power", &spec.power, bounds::POWER),
    }
}

/// What the spec leaves out comes from the operator's defaults, field by field.
fn storage(spec: Option<&crate::StorageSpec>, facts: &Facts) -> Option<StorageConfig> {
    let defaults = facts.storage.clone();
    let Some(spec) = spec else { return defaults };
    let defaults = defaults.unwrap_or_default();
    // An endpoint of one's own comes without the defaults for another server.
    let defaults = if spec.endpoint.is_some() { StorageConfig::default() } else { defaults };
    Some(StorageConfig {
        endpoint: spec.endpoint.clone().or(defaults.endpoint),
        addressing_style: spec.addressing_style.or(defaults.addressing_style),
        region: spec.region.clone().or(defaults.region),
        ca_bundle: if spec.ca_bundle_config_map_ref.is_some() { facts.ca_bundle.clone() } else { defaults.ca_bundle },
        credentials_prefix: None,
    })
}

fn model_source(spec: &FineTuneJobSpec, facts: &Facts, reader: &mut Reader) -> Option<ModelSource> {
    let source = &spec.model.source;
    let file = source.object_store.as_ref().map(|store| store.uri.as_str()).filter(|uri| uri.ends_with(".safetensors"));
    if let (Some(file), Some(named)) = (file, source.files.as_ref().and_then(|files| files.transformer.as_ref())) {
        reader.problem("spec.model.source.files.transformer", format!("names {named:?}, where objectStore.uri is a single file already ({file})"));
    }
    match (&source.hugging_face, &source.object_store, &source.persistent_volume_claim) {
        (Some(hub), None, None) => Some(ModelSource::HuggingFace { repo: hub.repo.clone(), revision: hub.revision.clone() }),
        (None, Some(store), None) => Some(ModelSource::ObjectStore {
            uri: store.uri.clone(),
            sha256_manifest: store.sha256_manifest.clone(),
            storage: store.storage.as_ref().map(|storage| StorageConfig {
                endpoint: storage.endpoint.clone(),
                addressing_style: storage.addressing_style,
                region: storage.region.clone(),
                ca_bundle: storage.ca_bundle_config_map_ref.as_ref().and(facts.model_ca_bundle.clone()),
                credentials_prefix: storage.credentials.as_ref().and_then(|c| c.secret_ref.as_ref()).map(|_| MODEL_CREDENTIALS_PREFIX.to_owned()),
            }),
        }),
        (None, None, Some(claim)) => {
            if facts.model_directory.is_none() {
                reader.problem(
                    "spec.model.source.persistentVolumeClaim",
                    format!("the claim {:?} can only be mounted in a cluster; use objectStore or huggingFace on this machine", claim.claim_name),
                );
            }
            facts.model_directory.clone().map(|path| ModelSource::Directory { path })
        }
        _ => {
            reader.problem("spec.model.source", "set exactly one of huggingFace, objectStore and persistentVolumeClaim");
            None
        }
    }
}

#[cfg(test)]
mod tests;
