//! The batch Job.

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use kube::api::ObjectMeta;

use super::{labels, owner, pod};
use crate::reconcile::validate::ValidatedJob;
use crate::settings::Settings;
use finetune_api::plan::CONFIG_VERSION;
use finetune_api::{
    ACTIVE_BEFORE_ANNOTATION, CONFIG_VERSION_ANNOTATION, FAILED_BEFORE_ANNOTATION, IMAGE_ANNOTATION, QUEUE_LABEL, QUEUE_PRIORITY_LABEL, Reason,
    TRAINER_CONTAINER,
};

/// What the Job depends on besides the FineTuneJob's spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobInputs {
    /// The image, frozen at the first start.
    pub image: String,
    /// Failures in earlier Jobs.
    pub failed_before: u32,
    /// Failures that are left.
    pub backoff_limit: i32,
    /// Seconds that earlier Jobs have been active.
    pub active_before: i64,
    /// Seconds that are left, where the job has a limit.
    pub active_deadline: Option<i64>,
}

/// The Job. `ttlSecondsAfterFinished` is absent: it is set once the result is saved.
pub fn job(job: &ValidatedJob, settings: &Settings, inputs: &JobInputs) -> Job {
    let mut job_labels = labels(job);
    if let Some(queue) = &job.spec.queue_name {
        job_labels.insert(QUEUE_LABEL.to_owned(), queue.clone());
    }
    if let Some(priority) = &job.spec.workload_priority_class_name {
        job_labels.insert(QUEUE_PRIORITY_LABEL.to_owned(), priority.clone());
    }
    Job {
        metadata: ObjectMeta {
            name: Some(job.job_name.clone()),
            namespace: Some(job.namespace.clone()),
            labels: Some(job_labels),
            annotations: Some(
                [
                    (FAILED_BEFORE_ANNOTATION, inputs.failed_before.to_string()),
                    (ACTIVE_BEFORE_ANNOTATION, inputs.active_before.to_string()),
                    (CONFIG_VERSION_ANNOTATION, CONFIG_VERSION.to_string()),
                    (IMAGE_ANNOTATION, job.spec.image.clone()),
                ]
                .map(|(key, value)| (key.to_owned(), value))
                .into(),
            ),
            owner_references: Some(vec![owner(job)]),
            ..ObjectMeta::default()
        },
        spec: Some(JobSpec {
            // A queued Job starts suspended; from then on the field is Kueue's.
            suspend: Some(job.spec.queue_name.is_some()),
            completion_mode: Some("Indexed".to_owned()),
            completions: Some(1),
            parallelism: Some(1),
            backoff_limit: Some(inputs.backoff_limit),
            pod_replacement_policy: Some("Failed".to_owned()),
            active_deadline_seconds: inputs.active_deadline,
            pod_failure_policy: Some(pod_failure_policy()),
            template: pod::template(job, settings, &inputs.image),
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// First match wins: a disruption is never a failure, whatever the exit code.
fn pod_failure_policy() -> PodFailurePolicy {
    let on_exit_codes = |action: &str, values: &[i32]| PodFailurePolicyRule {
        action: action.to_owned(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            container_name: Some(TRAINER_CONTAINER.to_owned()),
            operator: "In".to_owned(),
            values: values.to_vec(),
        }),
        on_pod_conditions: None,
    };
    PodFailurePolicy {
        rules: vec![
            PodFailurePolicyRule {
                action: "Ignore".to_owned(),
                on_exit_codes: None,
                on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern { type_: "DisruptionTarget".to_owned(), status: "True".to_owned() }]),
            },
            on_exit_codes("Ignore", &[Reason::INTERRUPTED_EXIT_CODE]),
            on_exit_codes("FailJob", &Reason::PERMANENT_EXIT_CODES),
        ],
    }
}
