//! The root: `FineTuneJob` and its spec.

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use super::defaults::default_values;
use super::rules::immutable;
use super::{
    CheckpointSpec, DatasetSpec, FailurePolicy, FineTuneJobStatus, ModelSpec, OutputSpec, PodTemplate, ResourcesSpec, ResumeSpec, SchedulingSpec, StorageSpec,
    TrainingSpec, TtlScope, ValidationSpec,
};

/// Fine-tunes Stable Diffusion 3 with LoRA.
///
/// Everything is fixed at creation except `suspend`, `ttlSecondsAfterFinished`, `activeDeadlineSeconds` (its value), `failurePolicy.maxRetries`,
/// and, while suspended, `scheduling`, `resources`, `image`, `queueName` and `workloadPriorityClassName`.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "finetune.dev",
    version = "v1alpha1",
    kind = "FineTuneJob",
    plural = "finetunejobs",
    singular = "finetunejob",
    shortname = "ftj",
    category = "all",
    namespaced,
    status = "FineTuneJobStatus",
    derive = "PartialEq",
    doc = "Fine-tunes Stable Diffusion 3 with LoRA on a 16 GB GPU and puts the LoRA into a bucket.",
    selectable = ".status.phase",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase", description = "Where the job is"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress.summary", description = "Steps done"),
    printcolumn(name = "Loss", type_ = "string", json_path = ".status.progress.loss", description = "Smoothed training loss"),
    printcolumn(name = "ETA", type_ = "string", json_path = ".status.progress.estimatedCompletionTime", description = "Estimated time of completion", priority = 1),
    printcolumn(name = "Attempts", type_ = "integer", json_path = ".status.attempts.started", description = "Pods started", priority = 1),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason", description = "Why the job is not running"),
    printcolumn(name = "Queue", type_ = "string", json_path = ".spec.queueName", description = "Kueue queue", priority = 1),
    printcolumn(name = "Output", type_ = "string", json_path = ".spec.output.uri", description = "Where the LoRA goes", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 50")
        .message("metadata.name must begin with a letter, consist of lower-case letters, digits and \"-\", and have at most 50 characters: the names of its pods need room")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!self.output.uri.startsWith(self.dataset.uri) && !self.dataset.uri.startsWith(self.output.uri)")
    .message("output.uri and dataset.uri must not contain each other, or outputs would become training data"))]
#[x_kube(validation = Rule::new("!has(self.checkpoint.uri) || (!self.checkpoint.uri.startsWith(self.dataset.uri) && !self.dataset.uri.startsWith(self.checkpoint.uri))")
    .message("checkpoint.uri and dataset.uri must not contain each other"))]
#[x_kube(validation = Rule::new("!has(self.checkpoint.uri) || !self.output.uri.startsWith(self.checkpoint.uri)")
    .message("checkpoint.uri must not be output.uri or contain it; a folder of its own below output.uri is fine"))]
#[x_kube(validation = Rule::new("!has(self.validation) || !has(self.validation.datasetUri) || (!self.output.uri.startsWith(self.validation.datasetUri) && !self.validation.datasetUri.startsWith(self.output.uri) && (!has(self.checkpoint.uri) || (!self.checkpoint.uri.startsWith(self.validation.datasetUri) && !self.validation.datasetUri.startsWith(self.checkpoint.uri))))")
    .message("validation.datasetUri must not contain output.uri or checkpoint.uri, or lie in one of them"))]
#[x_kube(validation = Rule::new("!has(self.model.source.objectStore) || has(self.model.source.objectStore.storage) || (!self.output.uri.startsWith(self.model.source.objectStore.uri) && !self.model.source.objectStore.uri.startsWith(self.output.uri) && (!has(self.checkpoint.uri) || (!self.checkpoint.uri.startsWith(self.model.source.objectStore.uri) && !self.model.source.objectStore.uri.startsWith(self.checkpoint.uri))))")
    .message("model.source.objectStore.uri must not contain output.uri or checkpoint.uri, or lie in one of them"))]
#[x_kube(validation = Rule::new("!has(self.workloadPriorityClassName) || has(self.queueName)").message("workloadPriorityClassName needs queueName"))]
#[x_kube(validation = Rule::new("has(self.validation) == has(oldSelf.validation)").message("validation is immutable: create a job with a new name").reason(Reason::FieldValueForbidden))]
#[x_kube(validation = Rule::new("has(self.storage) == has(oldSelf.storage)").message("storage is immutable: create a job with a new name").reason(Reason::FieldValueForbidden))]
#[x_kube(validation = Rule::new("oldSelf.suspend || self.scheduling == oldSelf.scheduling").message("scheduling can only be changed while the job is suspended").field_path(".scheduling").reason(Reason::FieldValueForbidden))]
#[x_kube(validation = Rule::new("oldSelf.suspend || self.resources == oldSelf.resources").message("resources can only be changed while the job is suspended").field_path(".resources").reason(Reason::FieldValueForbidden))]
#[x_kube(validation = Rule::new("oldSelf.suspend || self.image == oldSelf.image").message("image can only be changed while the job is suspended").field_path(".image").reason(Reason::FieldValueForbidden))]
#[x_kube(validation = Rule::new("oldSelf.suspend || (has(self.queueName) == has(oldSelf.queueName) && (!has(self.queueName) || self.queueName == oldSelf.queueName))").message("queueName can only be changed while the job is suspended").reason(Reason::FieldValueForbidden))]
#[x_kube(validation = Rule::new("oldSelf.suspend || (has(self.workloadPriorityClassName) == has(oldSelf.workloadPriorityClassName) && (!has(self.workloadPriorityClassName) || self.workloadPriorityClassName == oldSelf.workloadPriorityClassName))").message("workloadPriorityClassName can only be changed while the job is suspended").reason(Reason::FieldValueForbidden))]
#[x_kube(validation = Rule::new("has(self.activeDeadlineSeconds) == has(oldSelf.activeDeadlineSeconds)").message("activeDeadlineSeconds can be changed, but not added or removed").reason(Reason::FieldValueForbidden))]
pub struct FineTuneJobSpec {
    /// Saves a checkpoint and gives the GPU back; false continues.
    #[serde(default)]
    pub suspend: bool,
    /// Kueue queue of the job's namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub queue_name: Option<String>,
    /// Kueue WorkloadPriorityClass.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub workload_priority_class_name: Option<String>,
    /// The base model.
    #[x_kube(validation = immutable("model"))]
    pub model: ModelSpec,
    /// The training pictures and their captions.
    #[x_kube(validation = immutable("dataset"))]
    pub dataset: DatasetSpec,
    /// How the LoRA is trained.
    #[serde(default)]
    #[x_kube(validation = immutable("training"))]
    pub training: TrainingSpec,
    /// Sample pictures during training.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = immutable("validation"))]
    pub validation: Option<ValidationSpec>,
    /// When to save checkpoints.
    #[serde(default)]
    #[x_kube(validation = immutable("checkpoint"))]
    pub checkpoint: CheckpointSpec,
    /// How to continue from checkpoints.
    #[serde(default)]
    #[x_kube(validation = immutable("resume"))]
    pub resume: ResumeSpec,
    /// Where the LoRA goes.
    #[x_kube(validation = immutable("output"))]
    pub output: OutputSpec,
    /// How trainer pods reach the buckets; the operator's defaults where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = immutable("storage"))]
    pub storage: Option<StorageSpec>,
    /// Service account of the trainer pod, for workload identity. Its token is never mounted.
    #[serde(default = "service_account_name")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    #[x_kube(validation = immutable("serviceAccountName"))]
    pub service_account_name: String,
    /// CPU, memory and disk of the trainer pod.
    #[serde(default)]
    pub resources: ResourcesSpec,
    /// Where the trainer pod runs.
    #[serde(default)]
    pub scheduling: SchedulingSpec,
    /// What may be added to the trainer pod.
    #[serde(default)]
    #[x_kube(validation = immutable("podTemplate"))]
    pub pod_template: PodTemplate,
    /// Trainer image; the operator's default where empty. It is frozen in status at the first start, until it is changed here while the job is suspended.
    #[serde(default)]
    #[schemars(length(max = 512), regex(pattern = r"^([A-Za-z0-9][-A-Za-z0-9._/:@]*)?$"))]
    pub image: String,
    /// How many failures the job may have.
    #[serde(default)]
    pub failure_policy: FailurePolicy,
    /// Seconds that the job may run (time in a queue is not counted); afterwards it fails with `DeadlineExceeded`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub active_deadline_seconds: Option<i64>,
    /// Seconds that the job may wait for its first start; afterwards it fails with `StartDeadlineExceeded`. 0 waits for ever.
    #[serde(default)]
    #[schemars(range(min = 0, max = 31_536_000))]
    #[x_kube(validation = immutable("startDeadlineSeconds"))]
    pub start_deadline_seconds: i64,
    /// Seconds that a trainer may train without finishing another step; afterwards it is restarted, which counts as a failure (`NoProgress`). It must be
    /// longer than a step and than the drawing of validation pictures. Without it a trainer may take as long as it likes. It can be changed at any time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 60, max = 31_536_000))]
    pub progress_deadline_seconds: Option<i64>,
    /// Seconds for which the job may hold GPUs, all attempts together (`status.usage.gpuSeconds`). Then the trainer saves a checkpoint and ends, and the
    /// job fails with `GPUSecondsExceeded`; another job of the same spec goes on from the checkpoint. It can be changed at any time.
    #[serde(rename = "maxGPUSeconds", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 60, max = 1_000_000_000))]
    pub max_gpu_seconds: Option<u64>,
    /// Seconds after which a finished job is cleaned up, as `ttlScope` says.
    #[serde(default = "ttl_seconds_after_finished")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: i32,
    /// What `ttlSecondsAfterFinished` deletes.
    #[serde(default)]
    #[x_kube(validation = immutable("ttlScope"))]
    pub ttl_scope: TtlScope,
}

default_values! {
    service_account_name: String = "default".to_owned();
    ttl_seconds_after_finished: i32 = 86_400;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimal_spec_gets_every_default() {
        let spec: FineTuneJobSpec = serde_json::from_value(serde_json::json!({
            "model": {"source": {"objectStore": {"uri": "s3://models/sd3/"}}},
            "dataset": {"uri": "s3://data/corgi/"},
            "output": {"uri": "s3://loras/corgi/"},
        }))
        .unwrap();
        assert_eq!(spec.training, TrainingSpec::default());
        assert_eq!(spec.training.resolution, 512);
        assert_eq!(spec.training.lora.target_modules.len(), 4);
        assert_eq!(spec.scheduling.gpu.max_memory_mib, 17_000);
        assert_eq!(spec.resources.limits.memory.as_ref().unwrap().0, "12Gi");
        assert_eq!(spec.ttl_seconds_after_finished, 86_400);
    }
}
