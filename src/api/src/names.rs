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
/// Label with the FineTuneJob's name on its Job and pods.
pub const JOB_LABEL: &str = "finetune.dev/job";
/// Label with the FineTuneJob's UID on its Job and pods: a FineTuneJob that is deleted and created again is another one.
pub const JOB_UID_LABEL: &str = "finetune.dev/job-uid";
/// Variable in which a trainer finds the UID of its FineTuneJob.
pub const JOB_UID_VARIABLE: &str = "FINETUNE_JOB_UID";
/// Annotation on the Job with the number of failures in earlier Jobs of the FineTuneJob: they count against `failurePolicy.maxRetries`.
pub const FAILED_BEFORE_ANNOTATION: &str = "finetune.dev/failed-before";
/// Annotation of the Job: `spec.image` as it was when the Job was created, empty for the operator's default.
pub const IMAGE_ANNOTATION: &str = "finetune.dev/image";
/// Annotation on the Job with the seconds that earlier Jobs of the FineTuneJob have been active: they count against `activeDeadlineSeconds`.
pub const ACTIVE_BEFORE_ANNOTATION: &str = "finetune.dev/active-before";
/// Annotation on the Job with the version of the configuration that its trainer is given.
pub const CONFIG_VERSION_ANNOTATION: &str = "finetune.dev/config-version";
/// Annotation on the pod with the resolved configuration of its trainer, as JSON. It holds no secrets.
pub const CONFIG_ANNOTATION: &str = "finetune.dev/config";
/// Longest configuration in bytes: half of what Kubernetes allows all annotations of a pod together.
pub const MAX_CONFIG_BYTES: usize = 128 * 1024;
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

/// What follows the FineTuneJob's name in that of its batch Job.
pub const JOB_SUFFIX: &str = "-train";

/// Name of the batch Job of the FineTuneJob `name`.
pub fn job_name(name: &str) -> String {
    format!("{name}{JOB_SUFFIX}")
}

/// What the names of the ConfigMaps begin with from which pods of the FineTuneJob `name` read their configuration before they carried it themselves.
pub fn config_map_prefix(name: &str) -> String {
    format!("{name}-config-")
}
