//! What the operator's administrator decides. No I/O.

use std::time::Duration;

use serde::Deserialize;

use super::build::affinity::{NodeClass, NodeClassError, check_node_classes};
use finetune_api::StorageSpec;

/// The configuration file (`--config`), as the Helm chart renders it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConfigFile {
    /// What runs in the pods of jobs that name no image of their own.
    #[serde(default)]
    pub trainer: TrainerDefaults,
    /// Used where a job has no `spec.storage`, and field by field where its `spec.storage` leaves one out.
    #[serde(default)]
    pub default_storage: Option<StorageSpec>,
    /// Nodes with a suitable GPU that GPU Feature Discovery has not labelled.
    #[serde(default)]
    pub node_affinity_terms: Vec<NodeClass>,
}

/// Defaults of the trainer's image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainerDefaults {
    /// Image reference.
    #[serde(default)]
    pub image: Option<String>,
    /// `Always`, `IfNotPresent` or `Never`; Kubernetes' own default where absent.
    #[serde(default)]
    pub image_pull_policy: Option<String>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SettingsError {
    /// There is no image for trainers.
    #[error("no trainer image: set trainer.image in the configuration file or --trainer-image")]
    NoTrainerImage,
    /// Not one of Kubernetes' policies.
    #[error("trainer.imagePullPolicy is {0:?}; use Always, IfNotPresent or Never")]
    PullPolicy(String),
    /// A node class cannot be used.
    #[error(transparent)]
    NodeClass(#[from] NodeClassError),
}

/// Everything that the pure steps need to know besides the job itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Image of trainers whose job names none.
    pub trainer_image: String,
    /// Pull policy of the trainer's container.
    pub image_pull_policy: Option<String>,
    /// Defaults of `spec.storage`.
    pub default_storage: StorageSpec,
    /// Nodes with a suitable GPU that GPU Feature Discovery has not labelled.
    pub node_classes: Vec<NodeClass>,
    /// For tests on clusters whose GPUs are imaginary: trainers of GPU jobs may use the CPU.
    pub allow_cpu_fallback: bool,
    /// Whether `ttlScope: All` deletes FineTuneJobs.
    pub allow_ttl_scope_all: bool,
    /// Least time between two status writes that only bring progress or texts.
    pub progress_interval: Duration,
}

impl Settings {
    /// Settings of a configuration file, checked.
    pub fn new(file: ConfigFile) -> Result<Self, SettingsError> {
        let trainer_image = file.trainer.image.filter(|image| !image.is_empty()).ok_or(SettingsError::NoTrainerImage)?;
        if let Some(policy) = &file.trainer.image_pull_policy
            && !["Always", "IfNotPresent", "Never"].contains(&policy.as_str())
        {
            return Err(SettingsError::PullPolicy(policy.clone()));
        }
        check_node_classes(&file.node_affinity_terms)?;
        Ok(Self {
            trainer_image,
            image_pull_policy: file.trainer.image_pull_policy,
            default_storage: file.default_storage.unwrap_or_default(),
            node_classes: file.node_affinity_terms,
            allow_cpu_fallback: false,
            allow_ttl_scope_all: false,
            progress_interval: Duration::from_secs(30),
        })
    }

    /// The job's storage, with the operator's defaults for what it leaves out.
    pub fn storage(&self, job: Option<&StorageSpec>) -> StorageSpec {
        let job = job.cloned().unwrap_or_default();
        // A server of the job's own is not reached with the certificates, the region or the credentials of another.
        let defaults =
            if job.endpoint.is_some() && job.endpoint != self.default_storage.endpoint { StorageSpec::default() } else { self.default_storage.clone() };
        StorageSpec {
            endpoint: job.endpoint.or(defaults.endpoint),
            region: job.region.or(defaults.region),
            ca_bundle_config_map_ref: job.ca_bundle_config_map_ref.or(defaults.ca_bundle_config_map_ref),
            credentials: job.credentials.or(defaults.credentials),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_api::{CredentialsSpec, LocalRef};

    fn file() -> ConfigFile {
        serde_json::from_str(r#"{"trainer": {"image": "trainer:1", "imagePullPolicy": "IfNotPresent"}, "defaultStorage": {"endpoint": "http://s3:8333", "region": "here", "credentials": {"secretRef": {"name": "default-s3"}}}}"#).unwrap()
    }

    #[test]
    fn a_configuration_without_image_or_with_misspelt_keys_is_refused() {
        assert!(Settings::new(file()).is_ok());
        assert_eq!(Settings::new(ConfigFile::default()), Err(SettingsError::NoTrainerImage));
        let mut wrong = file();
        wrong.trainer.image_pull_policy = Some("Sometimes".into());
        assert_eq!(Settings::new(wrong), Err(SettingsError::PullPolicy("Sometimes".into())));
        assert!(serde_json::from_str::<ConfigFile>(r#"{"trainr": {}}"#).is_err());
    }

    #[test]
    fn storage_defaults_fill_what_a_job_leaves_out_but_never_go_to_another_server() {
        let settings = Settings::new(file()).unwrap();
        let secret = |name: &str| Some(CredentialsSpec { secret_ref: Some(LocalRef { name: name.into() }) });
        assert_eq!(settings.storage(None), settings.default_storage);
        let own_secret = StorageSpec { credentials: secret("mine"), ..StorageSpec::default() };
        assert_eq!(settings.storage(Some(&own_secret)), StorageSpec { credentials: secret("mine"), ..settings.default_storage.clone() });
        let own_server = StorageSpec { endpoint: Some("https://elsewhere".into()), ..StorageSpec::default() };
        assert_eq!(settings.storage(Some(&own_server)), own_server, "credentials of one server must not be sent to another");
    }
}
