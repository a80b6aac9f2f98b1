//! Where trainer pods run and what they are given.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Affinity, LocalObjectReference, Toleration, TopologySpreadConstraint};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::{default_is_empty_object, default_values};

/// CPU, memory and disk of the trainer pod. GPUs are in `scheduling.gpu`.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.requests.memory) || !has(self.limits.memory) || !isQuantity(string(self.requests.memory)) || !isQuantity(string(self.limits.memory)) || quantity(string(self.requests.memory)).compareTo(quantity(string(self.limits.memory))) <= 0")
    .message("requests.memory must not exceed limits.memory"))]
pub struct ResourcesSpec {
    /// What the pod reserves.
    #[serde(default = "requests")]
    pub requests: ResourceAmounts,
    /// What the pod may use.
    #[serde(default = "limits")]
    pub limits: ResourceAmounts,
}

/// Amounts by resource.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ResourceAmounts {
    /// Processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Quantity>,
    /// Memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Quantity>,
    /// Disk for models and prepared data where no cache volume holds them.
    #[serde(rename = "ephemeral-storage", skip_serializing_if = "Option::is_none")]
    pub ephemeral_storage: Option<Quantity>,
}

/// Where the trainer pod runs.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SchedulingSpec {
    /// The GPU that the job asks for.
    #[serde(default)]
    pub gpu: GpuSpec,
    /// Labels that the node must have.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that the pod tolerates.
    #[serde(default = "tolerations")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// Affinity, combined with the terms of the GPU class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// How pods are spread.
    #[serde(default)]
    #[schemars(length(max = 8))]
    pub topology_spread_constraints: Vec<TopologySpreadConstraint>,
    /// PriorityClass of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub priority_class_name: Option<String>,
    /// Scheduler of the pod.
    #[serde(default = "scheduler_name")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub scheduler_name: String,
    /// RuntimeClass of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub runtime_class_name: Option<String>,
}

/// The GPU that the job asks for. The defaults describe the 16 GB class.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.maxMemoryMiB == 0 || self.minMemoryMiB <= self.maxMemoryMiB").message("minMemoryMiB must not exceed maxMemoryMiB"))]
pub struct GpuSpec {
    /// Extended resource of the device plugin.
    #[serde(default = "resource_name")]
    #[schemars(length(min = 3, max = 317), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"))]
    pub resource_name: String,
    /// 1, or 0 to train on the CPU.
    #[serde(default = "per_replica")]
    #[schemars(range(max = 1))]
    pub per_replica: u32,
    /// Least memory of the GPU.
    #[serde(default = "min_memory_mib", rename = "minMemoryMiB")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub min_memory_mib: u32,
    /// Most memory of the GPU, which keeps larger ones free for those who need them. 0 lifts the bound; the trainer keeps to 16 GB on any GPU.
    #[serde(default = "max_memory_mib", rename = "maxMemoryMiB")]
    #[schemars(range(max = 1_048_576))]
    pub max_memory_mib: u32,
    /// Accept a GPU that is shared with other pods (time-slicing, MPS): its memory is not divided.
    #[serde(default)]
    pub allow_shared: bool,
    /// GPU products (label `nvidia.com/gpu.product`) to choose from; any where empty.
    #[serde(default)]
    #[schemars(length(max = 32), inner(length(min = 1, max = 63), regex(pattern = r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")))]
    pub products: Vec<String>,
    /// Least compute capability.
    #[serde(default = "min_compute_capability")]
    #[schemars(length(max = 5), regex(pattern = r"^[0-9]{1,2}[.][0-9]{1,2}$"))]
    pub min_compute_capability: String,
}

/// What may be added to the trainer pod. There is no way to add containers or volumes.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodTemplate {
    /// Labels of the pod.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 32), inner(length(max = 63)))]
    #[x_kube(validation = Rule::new(OWN_LABELS).message("finetune.dev/*, batch.kubernetes.io/*, kueue.x-k8s.io/*, job-name, controller-uid and app.kubernetes.io/{name,instance,component,managed-by} are set by the operator and by controllers"))]
    #[x_kube(validation = Rule::new(KEY).message("a label's key is NAME or DOMAIN/NAME, the name of at most 63 letters, digits, \"-\", \"_\" and \".\""))]
    #[x_kube(validation = Rule::new("self.all(key, self[key].matches('^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$'))").message("a label's value has at most 63 letters, digits, \"-\", \"_\" and \".\", the first and last a letter or digit"))]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the pod.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 32), inner(length(max = 4096)))]
    #[x_kube(validation = Rule::new(OWN_ANNOTATIONS).message("finetune.dev/* and batch.kubernetes.io/* are set by the operator and by controllers"))]
    #[x_kube(validation = Rule::new(KEY).message("an annotation's key is NAME or DOMAIN/NAME, the name of at most 63 letters, digits, \"-\", \"_\" and \".\""))]
    pub annotations: BTreeMap<String, String>,
    /// Secrets for the image's registry.
    #[serde(default)]
    #[schemars(length(max = 8))]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Time for the checkpoint when the pod is asked to end.
    #[serde(default = "termination_grace_period_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pub termination_grace_period_seconds: i64,
}

impl GpuSpec {
    /// Most memory of the GPU in MiB, where there is a bound.
    pub fn most_memory_mib(&self) -> Option<u32> {
        Some(self.max_memory_mib).filter(|most| *most > 0)
    }
}

/// Keys of labels and annotations: an optional domain, and a name.
const KEY: &str = "self.all(key, key.matches('^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$'))";
/// Labels that the operator, the Job controller and Kueue set on pods, or read there.
const OWN_LABELS: &str = "self.all(key, !key.matches('^(([^/]*[.])?finetune[.]dev/|batch[.]kubernetes[.]io/|kueue[.]x-k8s[.]io/|(job-name|controller-uid)$|app[.]kubernetes[.]io/(name|instance|component|managed-by)$)'))";
/// The same of annotations.
const OWN_ANNOTATIONS: &str = "self.all(key, !key.matches('^(([^/]*[.])?finetune[.]dev|batch[.]kubernetes[.]io)/'))";

fn quantity(text: &str) -> Quantity {
    Quantity(text.to_owned())
}

default_values! {
    requests: ResourceAmounts = ResourceAmounts { cpu: Some(quantity("2")), memory: Some(quantity("8Gi")), ephemeral_storage: Some(quantity("40Gi")) };
    limits: ResourceAmounts = ResourceAmounts { memory: Some(quantity("12Gi")), ..ResourceAmounts::default() };
    tolerations: Vec<Toleration> = vec![Toleration {
        key: Some("nvidia.com/gpu".to_owned()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoSchedule".to_owned()),
        ..Toleration::default()
    }];
    scheduler_name: String = "default-scheduler".to_owned();
    resource_name: String = "nvidia.com/gpu".to_owned();
    per_replica: u32 = 1;
    min_memory_mib: u32 = 15_000;
    max_memory_mib: u32 = 17_000;
    min_compute_capability: String = "7.5".to_owned();
    termination_grace_period_seconds: i64 = 120;
}
default_is_empty_object!(ResourcesSpec, SchedulingSpec, GpuSpec, PodTemplate);
