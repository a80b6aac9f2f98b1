//! `validate`: from what the API server holds to what can be built. It knows no client.
//!
//! After this step there is nothing left that could be refused for its form, so `build` returns no `Result`.

use kube::ResourceExt as _;

use crate::reconcile::build::paths;
use crate::settings::Settings;
use finetune_api::plan::{self, DeviceRequest, Facts, PlanError};
use finetune_api::{FineTuneJob, FineTuneJobSpec, MAX_CONFIG_BYTES, Reason, StorageSpec, ValidatedReason};

/// A FineTuneJob that can be carried out.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidatedJob {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its UID.
    pub uid: String,
    /// Its spec.
    pub spec: FineTuneJobSpec,
    /// Its storage, with the operator's defaults for what the spec leaves out.
    pub storage: StorageSpec,
    /// Name of the batch Job.
    pub job_name: String,
    /// The resolved configuration as JSON.
    pub config_json: String,
    /// Hash of what determines the weights.
    pub spec_hash: String,
    /// Optimizer updates in all, where the spec decides them.
    pub total_steps: Option<u64>,
}

/// Why a FineTuneJob cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum ValidateError {
    /// The API server gave an object without an identity.
    #[error("failed to read the object's {0}")]
    NoIdentity(&'static str),
    /// The spec contradicts itself.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The configuration could not be written as JSON.
    #[error("failed to write the configuration as JSON")]
    Json(#[source] serde_json::Error),
    /// The configuration does not fit into a pod.
    #[error(
        "the resolved configuration has {0} bytes, and a pod carries at most {MAX_CONFIG_BYTES} (annotation finetune.dev/config): shorten the texts of validation, priorPreservation and dataset, or lora.targetModules"
    )]
    TooLong(usize),
}

impl ValidateError {
    /// What it means for `Validated`.
    pub fn reason(&self) -> ValidatedReason {
        match self {
            Self::Plan(PlanError::TooSmall(_)) => ValidatedReason::GPUTooSmall,
            Self::Plan(PlanError::Invalid(_) | PlanError::Identity(_)) | Self::NoIdentity(_) | Self::Json(_) | Self::TooLong(_) => ValidatedReason::InvalidSpec,
        }
    }

    /// What it means for `status.failure`: what a trainer with this spec would say.
    pub fn cause(&self) -> Reason {
        match self.reason() {
            ValidatedReason::GPUTooSmall => Reason::GPUTooSmall,
            _ => Reason::InvalidConfig,
        }
    }
}

/// Checks a FineTuneJob and resolves its configuration.
pub fn validate(job: &FineTuneJob, settings: &Settings) -> Result<ValidatedJob, ValidateError> {
    let name = job.name_any();
    let namespace = job.namespace().ok_or(ValidateError::NoIdentity("namespace"))?;
    let uid = job.uid().ok_or(ValidateError::NoIdentity("UID"))?;
    let storage = settings.storage(job.spec.storage.as_ref());
    let spec = FineTuneJobSpec { storage: (storage != StorageSpec::default()).then(|| storage.clone()), ..job.spec.clone() };
    let facts = Facts {
        model_directory: spec.model.source.persistent_volume_claim.as_ref().map(|_| paths::MODEL_DIR.into()),
        cache_dir: spec.model.cache.as_ref().map(|_| paths::CACHE_DIR.into()),
        ca_bundle: storage.ca_bundle_config_map_ref.as_ref().map(|_| paths::CA_BUNDLE.into()),
        model_ca_bundle: Some(paths::MODEL_CA_BUNDLE.into()),
        ..Facts::default()
    };
    let mut plan = plan::resolve(&spec, &namespace, &name, &facts)?;
    if settings.allow_cpu_fallback {
        // Said by the operator's administrator, never by a missing GPU: the pod still asks for one, and its trainer leaves it alone.
        plan.config.device = DeviceRequest::Cpu;
    }
    let config_json = serde_json::to_string(&plan.config).map_err(ValidateError::Json)?;
    if config_json.len() > MAX_CONFIG_BYTES {
        return Err(ValidateError::TooLong(config_json.len()));
    }
    Ok(ValidatedJob {
        job_name: finetune_api::job_name(&name),
        spec_hash: plan.config.spec_hash,
        total_steps: plan.steps.total_steps,
        config_json,
        name,
        namespace,
        uid,
        spec,
        storage,
    })
}
