//! Why a run ended without a result, and what that means for exit code and condition.

use super::checkpoint::{CheckpointError, IdentityError, Saved};
use super::look::LookError;
use super::prepare::{PrepareError, PreparedError};
use super::publish::PublishError;
use super::start::StartError;
use super::trainer::TrainerError;
use super::validation::ValidationError;
use finetune_api::Reason;
use finetune_api::plan::{GpuTooSmall, Problem};
use finetune_compute::kernels::DeviceError;
use finetune_data::buckets::BucketError;
use finetune_data::cache::CacheError;
use finetune_data::dataset::DatasetError;
use finetune_model::layout::LayoutError;
use finetune_model::lora::LoraError;
use finetune_model::mmdit::MmditError;
use finetune_model::sample::SampleError;
use finetune_model::text::TextError;
use finetune_model::vae::VaeError;
use finetune_model::weights::WeightsError;
use finetune_store::model_source::ModelSourceError;
use finetune_store::{StoreError, StoreErrorKind};

/// Why a run ended without a result.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The device cannot be used.
    #[error("the job asks for a GPU (spec.scheduling.gpu.perReplica: 0 asks for the CPU)")]
    Device(#[from] DeviceError),
    /// The job does not fit the GPU.
    #[error("the GPU is too small for this job")]
    TooSmall(#[from] GpuTooSmall),
    /// A store failed, or a newer attempt has taken over.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The dataset is not as it should be.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// The dataset is not the one that the spec pins.
    #[error("the dataset has changed: its digest is {found}, dataset.expectedDigest is {expected}")]
    DatasetChanged {
        /// What the spec says.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Pictures fit no bucket, or buckets do not fit the model.
    #[error(transparent)]
    Buckets(#[from] BucketError),
    /// The model cannot be fetched.
    #[error("failed to fetch the model")]
    ModelSource(#[from] ModelSourceError),
    /// The model, or the job's settings for it, cannot be used.
    #[error(transparent)]
    Look(#[from] LookError),
    /// There is no LoRA to start from.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The model's folder is not as it should be.
    #[error("failed to load the model")]
    Layout(#[from] LayoutError),
    /// The model's weights are not as they should be.
    #[error("failed to load the model")]
    Weights(#[from] WeightsError),
    /// The transformer cannot be loaded.
    #[error("failed to load the model")]
    Mmdit(#[from] MmditError),
    /// The LoRA does not fit the model.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// Embeddings or latents could not be prepared.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// A checkpoint cannot be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Training cannot go on.
    #[error(transparent)]
    Trainer(#[from] TrainerError),
    /// The job's folders cannot be used together.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Folders(Vec<Problem>),
    /// Results cannot be published or reused.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Something of this machine failed.
    #[error("failed to {what}")]
    Local {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Validation pictures could not be drawn.
    #[error("failed to draw validation pictures")]
    Validation(#[from] ValidationError),
    /// A store refuses what it has accepted before.
    #[error("the credentials were accepted when the run began and are refused now: they have expired or were revoked. Another attempt reads them anew")]
    PermissionLost {
        /// The refusal.
        #[source]
        source: Box<TrainError>,
    },
    /// Asked to stop.
    #[error("{}", interrupted(.checkpoint.as_ref()))]
    Interrupted {
        /// The checkpoint that was saved first.
        checkpoint: Option<Saved>,
    },
}

fn interrupted(checkpoint: Option<&Saved>) -> String {
    match checkpoint {
        Some(saved) => format!("stopped on request after saving a checkpoint at step {} ({}); the same command goes on from there", saved.step, saved.uri),
        None => "stopped on request; the same command goes on from the newest checkpoint".to_owned(),
    }
}

impl TrainError {
    /// The reason for exit code, termination message and condition.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Device(error) => device_reason(error),
            Self::TooSmall(_) => Reason::GPUTooSmall,
            Self::Store(error) | Self::Start(StartError::Store(error)) => store_reason(error),
            Self::Dataset(error) => error.reason(),
            Self::DatasetChanged { .. } => Reason::DatasetChanged,
            Self::ModelSource(error) | Self::Look(LookError::Source(error)) => model_reason(error),
            Self::Look(LookError::Unfit(unfit)) => unfit.reason(),
            Self::Start(StartError::NotFound { .. }) => Reason::NotFound,
            Self::Layout(_) | Self::Weights(_) => Reason::ModelLoadFailed,
            Self::Mmdit(error) => mmdit_reason(error),
            Self::Lora(_) | Self::Folders(_) | Self::Buckets(_) => Reason::InvalidConfig,
            Self::Prepare(error) => match error {
                PrepareError::ModelSource(error) => model_reason(error),
                PrepareError::Store(error) => store_reason(error),
                PrepareError::Dataset(error) => error.reason(),
                PrepareError::Stopped => Reason::Interrupted,
                PrepareError::ClassPrecision(error) | PrepareError::Text(TextError::Device(error)) | PrepareError::Vae(VaeError::Device(error)) => {
                    device_reason(error)
                }
                PrepareError::Text(_) | PrepareError::Vae(_) | PrepareError::Layout(_) => Reason::ModelLoadFailed,
                PrepareError::Draw(error) => draw_reason(error),
                PrepareError::Cache(error) | PrepareError::Prepared(PreparedError::Cache(error)) => cache_reason(error),
                PrepareError::Prepared(_) | PrepareError::Shape(_) => Reason::TrainerCrashed,
            },
            Self::Checkpoint(error) => checkpoint_reason(error),
            Self::Trainer(error) => match error {
                TrainerError::Diverged { .. } | TrainerError::FarAboveStart { .. } => Reason::Diverged,
                TrainerError::Model(error) => mmdit_reason(error),
                TrainerError::Device(error) => device_reason(error),
                TrainerError::Prepared(PreparedError::Cache(error)) => cache_reason(error),
                TrainerError::Lora(_) => Reason::InvalidConfig,
                TrainerError::Prepared(_) | TrainerError::Feed(_) | TrainerError::Optimizer(_) | TrainerError::Sampler(_) => Reason::TrainerCrashed,
            },
            Self::Publish(error) => match error {
                PublishError::Store(error) => store_reason(error),
                PublishError::OutputExists { .. } | PublishError::ForeignResult { .. } | PublishError::Damaged { .. } => Reason::OutputExists,
                PublishError::Json(_) => Reason::TrainerCrashed,
            },
            Self::Validation(ValidationError::Sample(SampleError::NotFinite { .. })) => Reason::Diverged,
            Self::Local { .. } | Self::Validation(_) => Reason::TrainerCrashed,
            Self::PermissionLost { .. } => Reason::PermissionLost,
            Self::Interrupted { .. } => Reason::Interrupted,
        }
    }
}

/// An error and its causes in one line, each cause once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn device_reason(error: &DeviceError) -> Reason {
    if error.is_out_of_memory() { Reason::GPUOutOfMemory } else { Reason::GPUUnavailable }
}

fn store_reason(error: &StoreError) -> Reason {
    match error.kind() {
        StoreErrorKind::InvalidLocation => Reason::InvalidConfig,
        StoreErrorKind::NotFound => Reason::NotFound,
        StoreErrorKind::PermissionDenied => Reason::PermissionDenied,
        StoreErrorKind::Unavailable => Reason::StorageUnavailable,
        StoreErrorKind::Superseded => Reason::Superseded,
        StoreErrorKind::InUse => Reason::OutputInUse,
        StoreErrorKind::Corrupt | StoreErrorKind::LocalDisk => Reason::TrainerCrashed,
    }
}

fn model_reason(error: &ModelSourceError) -> Reason {
    match error {
        ModelSourceError::Store(error) if error.kind() == StoreErrorKind::Corrupt => Reason::ModelLoadFailed,
        ModelSourceError::Store(error) => store_reason(error),
        ModelSourceError::Unusable { .. } => Reason::ModelLoadFailed,
    }
}

fn cache_reason(error: &CacheError) -> Reason {
    match error {
        CacheError::Store(error) => store_reason(error),
        _ => Reason::TrainerCrashed,
    }
}

fn mmdit_reason(error: &MmditError) -> Reason {
    match error {
        MmditError::Lora(_) => Reason::InvalidConfig,
        MmditError::Device(error) => device_reason(error),
        MmditError::Shape(_) | MmditError::Input { .. } => Reason::TrainerCrashed,
        _ => Reason::ModelLoadFailed,
    }
}

/// Drawing class pictures.
fn draw_reason(error: &SampleError) -> Reason {
    match error {
        SampleError::Stopped => Reason::Interrupted,
        SampleError::Mmdit(error) => mmdit_reason(error),
        SampleError::Layout(_) | SampleError::Weights(_) | SampleError::Vae(_) | SampleError::Text(_) | SampleError::NotFinite { .. } => {
            Reason::ModelLoadFailed
        }
        SampleError::Lora(_) | SampleError::Setting { .. } | SampleError::Write { .. } | SampleError::Shape(_) => Reason::TrainerCrashed,
    }
}

fn checkpoint_reason(error: &CheckpointError) -> Reason {
    match error {
        CheckpointError::Store(error) => store_reason(error),
        CheckpointError::Identity(IdentityError::DatasetChanged { .. }) => Reason::DatasetChanged,
        CheckpointError::Identity(IdentityError::ModelChanged { .. }) => Reason::ModelChanged,
        CheckpointError::Identity(_) => Reason::InvalidConfig,
        CheckpointError::NotFound { .. } => Reason::NotFound,
        CheckpointError::Snapshot(_) | CheckpointError::Json { .. } => Reason::TrainerCrashed,
    }
}
