//! The trainer's pod: passes the `restricted` Pod Security level, has no service-account token and a read-only root.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapVolumeSource, Container, ContainerPort, DownwardAPIVolumeFile, DownwardAPIVolumeSource, EmptyDirVolumeSource, EnvFromSource, EnvVar,
    EnvVarSource, KeyToPath, LocalObjectReference, ObjectFieldSelector, PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec,
    ResourceRequirements, SeccompProfile, SecretEnvSource, SecretKeySelector, SecurityContext, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::ObjectMeta;

use super::{affinity, labels, paths};
use crate::reconcile::validate::ValidatedJob;
use crate::settings::{PodIds, Settings};
use finetune_api::plan::MODEL_CREDENTIALS_PREFIX;
use finetune_api::{CONFIG_ANNOTATION, ConfigMapKeyRef, JOB_UID_VARIABLE, PROGRESS_PORT, ResourceAmounts, StorageSpec, TRAINER_CONTAINER};

/// How long the pod stays bound to a node that does not answer.
const LOST_NODE_SECONDS: i64 = 60;
/// Variables that name certificates, by whom they are for.
const CA_VARIABLES: [&str; 4] = ["HF_CA_BUNDLE", "AWS_CA_BUNDLE", "GOOGLE_CA_BUNDLE", "AZURE_CA_BUNDLE"];
/// Space in memory for `/tmp`.
const TMP_SIZE: &str = "256Mi";

/// The pod template of the Job.
pub(super) fn template(job: &ValidatedJob, settings: &Settings, image: &str) -> PodTemplateSpec {
    let spec = &job.spec;
    let mounts = mounts(job, settings);
    let mut pod_labels = spec.pod_template.labels.clone();
    pod_labels.extend(labels(job));
    let mut annotations = spec.pod_template.annotations.clone();
    annotations.insert(CONFIG_ANNOTATION.to_owned(), job.config_json.clone());
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(pod_labels), annotations: Some(annotations), ..ObjectMeta::default() }),
        spec: Some(PodSpec {
            // Retries are the Job's: podFailurePolicy allows no other value.
            restart_policy: Some("Never".to_owned()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            service_account_name: Some(spec.service_account_name.clone()),
            termination_grace_period_seconds: Some(spec.pod_template.termination_grace_period_seconds),
            image_pull_secrets: Some(image_pull_secrets(job, settings)).filter(|secrets| !secrets.is_empty()),
            security_context: Some(security_context(&settings.trainer.pod_ids())),
            node_selector: (!spec.scheduling.node_selector.is_empty()).then(|| spec.scheduling.node_selector.clone()),
            affinity: affinity::affinity(&spec.scheduling, &settings.node_classes, &settings.trainer.architectures),
            tolerations: Some(tolerations(&spec.scheduling.tolerations)),
            topology_spread_constraints: (!spec.scheduling.topology_spread_constraints.is_empty()).then(|| spec.scheduling.topology_spread_constraints.clone()),
            priority_class_name: spec.scheduling.priority_class_name.clone(),
            scheduler_name: Some(spec.scheduling.scheduler_name.clone()),
            runtime_class_name: spec.scheduling.runtime_class_name.clone(),
            volumes: Some(mounts.iter().map(|(volume, _)| volume.clone()).collect()),
            containers: vec![container(job, settings, image, mounts.into_iter().map(|(_, mount)| mount).collect())],
            ..PodSpec::default()
        }),
    }
}

/// The job's own first, then the operator's.
fn image_pull_secrets(job: &ValidatedJob, settings: &Settings) -> Vec<LocalObjectReference> {
    let mut secrets = job.spec.pod_template.image_pull_secrets.clone();
    secrets.extend(settings.trainer.image_pull_secrets.iter().filter(|secret| !job.spec.pod_template.image_pull_secrets.contains(secret)).cloned());
    secrets
}

fn security_context(ids: &PodIds) -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: ids.run_as_user,
        run_as_group: ids.run_as_group,
        fs_group: ids.fs_group,
        supplemental_groups: (!ids.supplemental_groups.is_empty()).then(|| ids.supplemental_groups.clone()),
        // A model or cache volume may hold many files; their owner is changed once.
        fs_group_change_policy: Some("OnRootMismatch".to_owned()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
        ..PodSecurityContext::default()
    }
}

/// The trainer. It has no probes: a restart would lose work that a slow step has done, and its progress is watched by the operator.
fn container(job: &ValidatedJob, settings: &Settings, image: &str, mounts: Vec<VolumeMount>) -> Container {
    Container {
        name: TRAINER_CONTAINER.to_owned(),
        image: Some(image.to_owned()),
        image_pull_policy: settings.trainer.image_pull_policy.clone(),
        args: Some(vec!["train".to_owned(), format!("--config={}/{}", paths::CONFIG_DIR, paths::CONFIG_FILE)]),
        env: Some(environment(job, settings)),
        env_from: (!credentials(job).is_empty()).then(|| credentials(job)),
        ports: Some(vec![ContainerPort {
            name: Some("progress".to_owned()),
            container_port: i32::from(PROGRESS_PORT),
            protocol: Some("TCP".to_owned()),
            ..ContainerPort::default()
        }]),
        resources: Some(resources(job)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            ..SecurityContext::default()
        }),
        termination_message_path: Some(paths::TERMINATION_MESSAGE.to_owned()),
        // Never the log: it is not ours to put into status unread.
        termination_message_policy: Some("File".to_owned()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

/// Variables that the trainer reads. They win over those of the credentials' Secrets.
fn environment(job: &ValidatedJob, settings: &Settings) -> Vec<EnvVar> {
    let plain = |name: &str, value: String| EnvVar { name: name.to_owned(), value: Some(value), value_from: None };
    let from = |name: &str, value_from: EnvVarSource| EnvVar { name: name.to_owned(), value: None, value_from: Some(value_from) };
    let field = |name: &str, path: &str| {
        from(
            name,
            EnvVarSource {
                field_ref: Some(ObjectFieldSelector { field_path: path.to_owned(), api_version: Some("v1".to_owned()) }),
                ..EnvVarSource::default()
            },
        )
    };
    let mut variables = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("POD_UID", "metadata.uid"),
        field("NODE_NAME", "spec.nodeName"),
        plain(JOB_UID_VARIABLE, job.uid.clone()),
        plain("FINETUNE_CACHE_DIR", if job.spec.model.cache.is_some() { paths::CACHE_DIR } else { paths::WORK_DIR }.to_owned()),
        plain("FINETUNE_TERMINATION_LOG", paths::TERMINATION_MESSAGE.to_owned()),
        plain("FINETUNE_TERMINATION_GRACE_SECONDS", job.spec.pod_template.termination_grace_period_seconds.to_string()),
        plain("FINETUNE_LOG_FORMAT", "json".to_owned()),
        plain("HOME", paths::WORK_DIR.to_owned()),
        plain("TMPDIR", "/tmp".to_owned()),
    ];
    if let Some(endpoint) = &settings.trainer.hub_endpoint {
        variables.push(plain("HF_ENDPOINT", endpoint.clone()));
    }
    if settings.trainer.ca_bundle_config_map_ref.is_some() {
        variables.extend(CA_VARIABLES.map(|name| plain(name, paths::TRUSTED_CA_BUNDLE.to_owned())));
    }
    variables.extend(settings.trainer.env.iter().cloned());
    if let Some(token) = job.spec.model.source.hugging_face.as_ref().and_then(|hub| hub.token_secret_ref.as_ref()) {
        variables.push(from(
            "HF_TOKEN",
            EnvVarSource {
                secret_key_ref: Some(SecretKeySelector { name: token.name.clone(), key: token.key.clone(), optional: Some(false) }),
                ..EnvVarSource::default()
            },
        ));
    }
    variables
}

/// Secrets as environment variables; the kubelet reads them, the operator never does.
fn credentials(job: &ValidatedJob) -> Vec<EnvFromSource> {
    let source = |storage: &StorageSpec, prefix: Option<&str>| {
        storage.credentials.as_ref().and_then(|credentials| credentials.secret_ref.as_ref()).map(|secret| EnvFromSource {
            prefix: prefix.map(str::to_owned),
            secret_ref: Some(SecretEnvSource { name: secret.name.clone(), optional: Some(false) }),
            config_map_ref: None,
        })
    };
    let own = source(&job.storage, None);
    let model = model_storage(job).and_then(|storage| source(storage, Some(MODEL_CREDENTIALS_PREFIX)));
    own.into_iter().chain(model).collect()
}

/// The model's own storage, where it has one.
fn model_storage(job: &ValidatedJob) -> Option<&StorageSpec> {
    job.spec.model.source.object_store.as_ref()?.storage.as_ref()
}

/// Volumes, each with its mount.
fn mounts(job: &ValidatedJob, settings: &Settings) -> Vec<(Volume, VolumeMount)> {
    let volume = |name: &str| Volume { name: name.to_owned(), ..Volume::default() };
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(read_only),
        ..VolumeMount::default()
    };
    let empty_dir = |name: &str, path: &str, medium: Option<&str>, size: Option<Quantity>| {
        let source = EmptyDirVolumeSource { medium: medium.map(str::to_owned), size_limit: size };
        (Volume { empty_dir: Some(source), ..volume(name) }, mount(name, path, false))
    };
    let ca_bundle = |name: &str, file: &str, reference: &ConfigMapKeyRef| {
        let items = vec![KeyToPath { key: reference.key.clone(), path: "ca.crt".to_owned(), mode: None }];
        let source = ConfigMapVolumeSource { name: reference.name.clone(), items: Some(items), optional: Some(false), default_mode: None };
        (Volume { config_map: Some(source), ..volume(name) }, mount(name, file.trim_end_matches("/ca.crt"), true))
    };
    let claim = |name: &str, path: &str, claim_name: &str, sub_path: Option<&String>, read_only: bool| {
        let source = PersistentVolumeClaimVolumeSource { claim_name: claim_name.to_owned(), read_only: Some(read_only) };
        (Volume { persistent_volume_claim: Some(source), ..volume(name) }, VolumeMount { sub_path: sub_path.cloned(), ..mount(name, path, read_only) })
    };

    // The pod carries its configuration (decision 7), and the kubelet makes a file of it.
    let annotation = ObjectFieldSelector { field_path: format!("metadata.annotations['{CONFIG_ANNOTATION}']"), api_version: Some("v1".to_owned()) };
    let file = DownwardAPIVolumeFile { path: paths::CONFIG_FILE.to_owned(), field_ref: Some(annotation), ..DownwardAPIVolumeFile::default() };
    let config = DownwardAPIVolumeSource { items: Some(vec![file]), default_mode: None };
    let mut mounts = vec![(Volume { downward_api: Some(config), ..volume("config") }, mount("config", paths::CONFIG_DIR, true))];
    // The limit is the job's own, so that a job that needs more disk says so in one place.
    let scratch = job.spec.resources.limits.ephemeral_storage.clone().or_else(|| job.spec.resources.requests.ephemeral_storage.clone());
    mounts.push(empty_dir("work", paths::WORK_DIR, None, scratch));
    mounts.push(empty_dir("tmp", "/tmp", None, Some(Quantity(TMP_SIZE.to_owned()))));
    if let Some(model) = &job.spec.model.source.persistent_volume_claim {
        mounts.push(claim("model", paths::MODEL_DIR, &model.claim_name, model.sub_path.as_ref(), model.read_only));
    }
    if let Some(cache) = &job.spec.model.cache {
        let cache = &cache.persistent_volume_claim;
        mounts.push(claim("cache", paths::CACHE_DIR, &cache.claim_name, cache.sub_path.as_ref(), false));
    }
    if let Some(reference) = &job.storage.ca_bundle_config_map_ref {
        mounts.push(ca_bundle("storage-ca", paths::CA_BUNDLE, reference));
    }
    if let Some(reference) = model_storage(job).and_then(|storage| storage.ca_bundle_config_map_ref.as_ref()) {
        mounts.push(ca_bundle("model-ca", paths::MODEL_CA_BUNDLE, reference));
    }
    if let Some(reference) = &settings.trainer.ca_bundle_config_map_ref {
        mounts.push(ca_bundle("trusted-ca", paths::TRUSTED_CA_BUNDLE, reference));
    }
    mounts
}

/// Requests and limits. Kueue counts requests, so all covered resources have one.
fn resources(job: &ValidatedJob) -> ResourceRequirements {
    let amounts = |amounts: &ResourceAmounts| -> BTreeMap<String, Quantity> {
        [("cpu", &amounts.cpu), ("memory", &amounts.memory), ("ephemeral-storage", &amounts.ephemeral_storage)]
            .into_iter()
            .filter_map(|(name, amount)| Some((name.to_owned(), amount.clone()?)))
            .collect()
    };
    let (mut requests, mut limits) = (amounts(&job.spec.resources.requests), amounts(&job.spec.resources.limits));
    let gpu = &job.spec.scheduling.gpu;
    if gpu.per_replica > 0 {
        // Extended resources cannot be overcommitted: request and limit are equal.
        let count = Quantity(gpu.per_replica.to_string());
        requests.insert(gpu.resource_name.clone(), count.clone());
        limits.insert(gpu.resource_name.clone(), count);
    }
    ResourceRequirements { requests: Some(requests), limits: Some(limits), claims: None }
}

/// The job's own tolerations, and a minute for nodes that do not answer.
fn tolerations(own: &[Toleration]) -> Vec<Toleration> {
    let lost = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"].map(|key| Toleration {
        key: Some(key.to_owned()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        toleration_seconds: Some(LOST_NODE_SECONDS),
        ..Toleration::default()
    });
    own.iter().cloned().chain(lost.into_iter().filter(|lost| !own.iter().any(|own| own.key == lost.key && own.effect == lost.effect))).collect()
}
