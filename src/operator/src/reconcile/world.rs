//! What the cluster holds that concerns one FineTuneJob: the input of the pure steps.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use crate::reconcile::kueue::Workload;
use finetune_api::{Progress, TRAINER_CONTAINER};

/// What was seen. Pods are those of this very FineTuneJob (by its UID), oldest first.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// The batch Job, if it exists and is owned by this FineTuneJob.
    pub job: Option<Arc<Job>>,
    /// A Job or a live pod of an earlier FineTuneJob of the same name, in words; it will be gone by itself.
    pub stranger: Option<String>,
    /// Every pod of this FineTuneJob, also those of earlier Jobs.
    pub pods: Vec<Arc<Pod>>,
    /// Kueue's Workload of the Job.
    pub workload: Option<Workload>,
    /// Whether the cluster has Kueue.
    pub kueue_installed: bool,
    /// What the trainer of the newest pod reports.
    pub report: Report,
    /// Whether any node's labels satisfy the waiting pod; `None` where nodes are not watched or no pod waits.
    pub node_matches: Option<bool>,
    /// Another job that has not ended and has the same output folder, or one inside or around it, in words. Looked for until the Job exists.
    pub shared_output: Option<String>,
    /// What keeps the next pod from being created, or the newest one from starting, by the events about it.
    pub warning: Option<Warning>,
}

/// An event about a Job whose pod is refused, or about a pod that cannot start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The event's reason.
    pub reason: String,
    /// In the words of the API server or the kubelet.
    pub note: String,
}

/// What is known of a trainer by asking it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// The newest answer.
    pub progress: Option<Progress>,
    /// When it came.
    pub at: Option<Timestamp>,
    /// Since when it has reported the same step and stage, by this process's own knowledge.
    pub unchanged_since: Option<Timestamp>,
    /// Since when it does not answer; `None` while it does, or was not asked.
    pub failing_since: Option<Timestamp>,
}

impl World {
    /// UID of the Job.
    pub fn job_uid(&self) -> Option<&str> {
        self.job.as_ref().and_then(|job| job.metadata.uid.as_deref())
    }

    /// The newest pod of the present Job that has not ended.
    pub fn current_pod(&self) -> Option<&Pod> {
        let job_uid = self.job_uid()?;
        self.pods.iter().rev().map(AsRef::as_ref).find(|pod| owner_uid(pod) == Some(job_uid) && !has_ended(pod))
    }

    /// A pod of this FineTuneJob, whichever Job it belongs to, that may still write.
    pub fn live_pod(&self) -> Option<&Pod> {
        self.pods.iter().map(AsRef::as_ref).find(|pod| !has_ended(pod))
    }
}

/// UID of the controller that owns the pod.
pub fn owner_uid(pod: &Pod) -> Option<&str> {
    pod.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true)).map(|owner| owner.uid.as_str())
}

/// Whether the pod has ended, by its phase.
pub fn has_ended(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// The pod's phase; empty where it has none yet.
pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// The trainer's container in the pod's status.
pub fn trainer(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.iter().flatten().find(|container| container.name == TRAINER_CONTAINER)
}

/// When the pod's trainer has ended, by the kubelet's word.
pub fn finished_at(pod: &Pod) -> Option<Timestamp> {
    let finished = trainer(pod)?.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref()?.0;
    (finished.as_second() > 0).then_some(finished)
}

/// The pod's condition of that type: (status, reason, message).
pub fn pod_condition<'a>(pod: &'a Pod, type_: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let condition = pod.status.as_ref()?.conditions.iter().flatten().find(|condition| condition.type_ == type_)?;
    Some((condition.status.as_str(), condition.reason.as_deref().unwrap_or_default(), condition.message.as_deref().unwrap_or_default()))
}

/// How a Job has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEnd {
    /// Condition `Complete`.
    Complete,
    /// Condition `Failed`, with its reason and message.
    Failed {
        /// Kubernetes' reason.
        reason: String,
        /// Kubernetes' message.
        message: String,
    },
}

/// How the Job has ended, by its conditions `Complete` and `Failed` alone: `SuccessCriteriaMet` and `FailureTarget` come while pods still run, and
/// `status.failed` counts pods that are retried.
pub fn job_end(job: &Job) -> Option<JobEnd> {
    let conditions = job.status.as_ref()?.conditions.as_deref().unwrap_or_default();
    conditions.iter().filter(|condition| condition.status == "True").find_map(|condition| match condition.type_.as_str() {
        "Complete" => Some(JobEnd::Complete),
        "Failed" => Some(JobEnd::Failed { reason: condition.reason.clone().unwrap_or_default(), message: condition.message.clone().unwrap_or_default() }),
        _ => None,
    })
}

/// `spec.managedBy` of a Job that Kubernetes' own controller runs; the same as none.
const JOB_CONTROLLER: &str = "kubernetes.io/job-controller";

/// Whether the Job's pods are not in this cluster: another controller runs it elsewhere (Kueue's MultiKueue: `kueue.x-k8s.io/multikueue`) and mirrors its
/// status here.
pub fn runs_elsewhere(job: &Job) -> bool {
    job.spec.as_ref().and_then(|spec| spec.managed_by.as_deref()).is_some_and(|manager| manager != JOB_CONTROLLER)
}

/// When a pod of a Job that runs elsewhere was first seen ready, as near as its mirrored status knows: the start of the Job.
pub fn started_elsewhere(job: &Job) -> Option<Timestamp> {
    let status = job.status.as_ref().filter(|_| runs_elsewhere(job))?;
    let started = [status.ready, status.succeeded, status.failed].into_iter().flatten().any(|pods| pods > 0);
    status.start_time.as_ref().filter(|_| started).map(|time| time.0)
}

/// Whether the Job is being deleted.
pub fn is_deleting(job: &Job) -> bool {
    job.metadata.deletion_timestamp.is_some()
}
