//! Names that several parts must agree on: the API group, labels, children of a job.

/// API group.
pub const GROUP: &str = "finetune.dev";
/// API version.
pub const VERSION: &str = "v1alpha1";
/// `apiVersion` of a manifest.
pub const API_VERSION: &str = "finetune.dev/v1alpha1";
/// Kind.
pub const KIND: &str = "FineTuneJob";
/// Plural name, as in `kubectl get finetunejobs`.
pub const PLURAL: &str = "finetunejobs";
/// Name of the CustomResourceDefinition.
pub const CRD_NAME: &str = "finetunejobs.finetune.dev";
/// Field manager of everything that the operator writes.
pub const FIELD_MANAGER: &str = "finetune-operator";
/// Label with the FineTuneJob's name on its Job, pods and ConfigMap.
pub const JOB_LABEL: &str = "finetune.dev/job";
/// Label on the Job that hands it to a Kueue queue.
pub const QUEUE_LABEL: &str = "kueue.x-k8s.io/queue-name";
/// Label on the Job that sets its Kueue priority.
pub const QUEUE_PRIORITY_LABEL: &str = "kueue.x-k8s.io/priority-class";
/// Name of the trainer's container; `podFailurePolicy` refers to it.
pub const TRAINER_CONTAINER: &str = "trainer";
/// Port on which the trainer serves `/progress` and `/metrics`.
pub const PROGRESS_PORT: u16 = 9400;
/// Longest name of a FineTuneJob: the suffixes of its children need room.
pub const MAX_NAME_LENGTH: usize = 50;

/// Name of the batch Job of the FineTuneJob `name`.
pub fn job_name(name: &str) -> String {
    format!("{name}-train")
}

/// Name of the ConfigMap with the resolved configuration of the FineTuneJob `name`.
pub fn config_map_name(name: &str) -> String {
    format!("{name}-config")
}
