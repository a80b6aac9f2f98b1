//! What the operator's administrator decides. No I/O.

use std::time::Duration;

use k8s_openapi::api::core::v1::{EnvVar, LocalObjectReference};
use serde::Deserialize;

use crate::reconcile::build::affinity::{NodeClass, NodeClassError, check_node_classes};
use finetune_api::{ConfigMapKeyRef, StorageSpec};

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

/// What every trainer pod gets.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainerDefaults {
    /// Image reference.
    #[serde(default)]
    pub image: Option<String>,
    /// `Always`, `IfNotPresent` or `Never`; Kubernetes' own default where absent.
    #[serde(default)]
    pub image_pull_policy: Option<String>,
    /// Secrets for the image's registry, in each job's namespace, besides those that the job names.
    #[serde(default)]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Architectures of the image (label `kubernetes.io/arch`); any where empty. A job that names the label itself decides for itself.
    #[serde(default)]
    pub architectures: Vec<String>,
    /// User and groups of the pod. `{}` leaves them to the cluster, as OpenShift wants; the image's own where absent.
    #[serde(default)]
    pub pod_security_context: Option<PodIds>,
    /// Environment variables, such as a proxy's.
    #[serde(default)]
    pub env: Vec<EnvVar>,
    /// Address of a mirror of the Hugging Face hub.
    #[serde(default)]
    pub hub_endpoint: Option<String>,
    /// ConfigMap in each job's namespace with certificates (PEM) that are trusted besides the usual ones: by the hub's client, and by storage without a
    /// bundle of its own.
    #[serde(default)]
    pub ca_bundle_config_map_ref: Option<ConfigMapKeyRef>,
}

/// User and groups of trainer pods; what is absent is left to the cluster. That they are not root is not up for choice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodIds {
    /// User.
    #[serde(default)]
    pub run_as_user: Option<i64>,
    /// Group.
    #[serde(default)]
    pub run_as_group: Option<i64>,
    /// Group of volumes.
    #[serde(default)]
    pub fs_group: Option<i64>,
    /// More groups.
    #[serde(default)]
    pub supplemental_groups: Vec<i64>,
}

impl PodIds {
    /// User and group of the project's images.
    pub const IMAGE: Self = Self { run_as_user: Some(65_532), run_as_group: Some(65_532), fs_group: Some(65_532), supplemental_groups: Vec::new() };
}

/// Variables that the operator sets itself.
const RESERVED: [&str; 11] = [
    "POD_NAME",
    "POD_NAMESPACE",
    "POD_UID",
    "NODE_NAME",
    "HOME",
    "TMPDIR",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "FINETUNE_CACHE_DIR",
    "FINETUNE_TERMINATION_LOG",
    "FINETUNE_LOG_FORMAT",
];

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SettingsError {
    /// There is no image for trainers.
    #[error("no trainer image: set trainer.image in the configuration file or --trainer-image")]
    NoTrainerImage,
    /// Not one of Kubernetes' policies.
    #[error("trainer.imagePullPolicy is {0:?}; use Always, IfNotPresent or Never")]
    PullPolicy(String),
    /// A variable that is the operator's.
    #[error("trainer.env names {0}, which the operator sets itself{hint}", hint = if .0 == "HF_ENDPOINT" { ": use trainer.hubEndpoint" } else { "" })]
    Reserved(String),
    /// A variable without a name.
    #[error("trainer.env[{0}] has no name")]
    Unnamed(usize),
    /// Root.
    #[error("trainer.podSecurityContext.{0} is {1}: trainers never run as root; use a number from 1 on, or leave it out")]
    Root(&'static str, i64),
    /// Not an address.
    #[error("trainer.hubEndpoint is {0:?}; use an address such as https://hub.example.com, without user, query or fragment")]
    HubEndpoint(String),
    /// A node class cannot be used.
    #[error(transparent)]
    NodeClass(#[from] NodeClassError),
}

/// Everything that the pure steps need to know besides the job itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Image of trainers whose job names none.
    pub trainer_image: String,
    /// What else every trainer pod gets.
    pub trainer: TrainerDefaults,
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

impl TrainerDefaults {
    fn check(&self) -> Result<(), SettingsError> {
        for (index, variable) in self.env.iter().enumerate() {
            if variable.name.is_empty() {
                return Err(SettingsError::Unnamed(index));
            }
            if RESERVED.contains(&variable.name.as_str()) {
                return Err(SettingsError::Reserved(variable.name.clone()));
            }
        }
        let ids = self.pod_ids();
        for (field, id) in [("runAsUser", ids.run_as_user), ("runAsGroup", ids.run_as_group), ("fsGroup", ids.fs_group)] {
            if let Some(id) = id.filter(|id| *id < 1) {
                return Err(SettingsError::Root(field, id));
            }
        }
        let is_address = |text: &str| {
            text.parse::<axum::http::Uri>().is_ok_and(|uri| {
                matches!(uri.scheme_str(), Some("http" | "https"))
                    && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
                    && uri.query().is_none()
            })
        };
        match &self.hub_endpoint {
            Some(endpoint) if !is_address(endpoint) || endpoint.contains('#') => Err(SettingsError::HubEndpoint(endpoint.clone())),
            _ => Ok(()),
        }
    }

    /// User and groups of the pod.
    pub fn pod_ids(&self) -> PodIds {
        self.pod_security_context.clone().unwrap_or(PodIds::IMAGE)
    }
}

impl Settings {
    /// Settings of a configuration file, checked.
    pub fn new(file: ConfigFile) -> Result<Self, SettingsError> {
        let trainer_image = file.trainer.image.clone().filter(|image| !image.is_empty()).ok_or(SettingsError::NoTrainerImage)?;
        if let Some(policy) = &file.trainer.image_pull_policy
            && !["Always", "IfNotPresent", "Never"].contains(&policy.as_str())
        {
            return Err(SettingsError::PullPolicy(policy.clone()));
        }
        file.trainer.check()?;
        check_node_classes(&file.node_affinity_terms)?;
        Ok(Self {
            trainer_image,
            trainer: TrainerDefaults { image: None, ..file.trainer },
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
            addressing_style: job.addressing_style.or(defaults.addressing_style),
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
    fn what_trainers_get_is_checked_before_any_job_gets_it() {
        let check = |trainer: serde_json::Value| {
            let mut file = file();
            file.trainer = TrainerDefaults { image: file.trainer.image, ..serde_json::from_value(trainer).unwrap() };
            Settings::new(file).map(|settings| settings.trainer.pod_ids()).map_err(|error| error.to_string())
        };
        let ids = |user| PodIds { run_as_user: user, ..PodIds::default() };
        assert_eq!(check(serde_json::json!({})), Ok(PodIds::IMAGE), "those of the image");
        assert_eq!(check(serde_json::json!({"podSecurityContext": {}})), Ok(ids(None)), "left to the cluster");
        assert_eq!(
            check(serde_json::json!({"podSecurityContext": {"runAsUser": 1000}, "env": [{"name": "HTTPS_PROXY", "value": "http://p:1"}]})),
            Ok(ids(Some(1000)))
        );
        assert_eq!(check(serde_json::json!({"hubEndpoint": "https://hub.example.com/mirror"})), Ok(PodIds::IMAGE));
        for (trainer, complaint) in [
            (serde_json::json!({"podSecurityContext": {"runAsUser": 0}}), "never run as root"),
            (serde_json::json!({"env": [{"name": "POD_UID", "value": "x"}]}), "trainer.env names POD_UID"),
            (serde_json::json!({"env": [{"name": "HF_ENDPOINT", "value": "x"}]}), "use trainer.hubEndpoint"),
            (serde_json::json!({"env": [{"name": ""}]}), "trainer.env[0] has no name"),
            (serde_json::json!({"hubEndpoint": "hub.example.com"}), "trainer.hubEndpoint"),
            (serde_json::json!({"hubEndpoint": "https://user:secret@hub.example.com"}), "trainer.hubEndpoint"),
        ] {
            let error = check(trainer.clone()).unwrap_err();
            assert!(error.contains(complaint), "{trainer}: {error}");
        }
        assert!(serde_json::from_value::<TrainerDefaults>(serde_json::json!({"podSecurityContext": {"runAsRoot": 1}})).is_err());
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
