//! `PodsScheduled` and `Running`: what the newest pod is doing, or what keeps it from it.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::{Job, JobStatus};
use k8s_openapi::api::core::v1::{ContainerStateWaiting, Pod};

use super::progress::{running_reason, was_training};
use super::{Inputs, obstacles};
use crate::reconcile::conditions::{Builder, Truth};
use crate::reconcile::decide;
use crate::reconcile::world::{self, World};
use finetune_api::{AttemptCause, ConditionType, PROGRESS_PORT, PodsScheduledReason, Reason, RunningReason};

/// How long a trainer may leave its progress unanswered before the status reports it.
const SILENCE: SignedDuration = SignedDuration::from_secs(60);
/// How long after its grace period a pod is believed to end by itself.
const LOST: SignedDuration = SignedDuration::from_secs(30);

/// `PodsScheduled` of the newest pod; dropped while there is none.
pub(super) fn pods_scheduled(list: &mut Builder<'_>, world: &World) {
    let Some(pod) = world.current_pod() else {
        if let Some(warning) = world.warning.as_ref().filter(|_| world.live_pod().is_none()) {
            let text = format!("the API server refuses the pod: {}", warning.note);
            list.set(ConditionType::PodsScheduled, Truth::False, obstacles::refusal(&warning.note).as_str(), &text);
        }
        return;
    };
    let mut set = |truth, reason: PodsScheduledReason, message: &str| list.set(ConditionType::PodsScheduled, truth, reason.as_str(), message);
    match world::pod_condition(pod, "PodScheduled") {
        Some(("True", ..)) => {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
            set(Truth::True, PodsScheduledReason::Scheduled, &format!("on node {node:?}"));
        }
        Some(("False", "Unschedulable", message)) if world.node_matches == Some(false) => {
            let text = format!("no node of this cluster has such a GPU (scheduling.gpu, nodeSelector, affinity). The scheduler: {message}");
            set(Truth::False, PodsScheduledReason::NoMatchingGPUNode, &text);
        }
        Some(("False", "Unschedulable", message)) => set(Truth::False, PodsScheduledReason::Unschedulable, message),
        _ => list.keep_scheduling(),
    }
}

/// `Running`.
pub(super) fn running(list: &mut Builder<'_>, inputs: &Inputs<'_>) {
    let Inputs { job, before, world, attempts, now, .. } = *inputs;
    let (truth, reason, message) = if world.job.as_deref().and_then(|child| attempts.job_end(job, child)).is_some() {
        (Truth::False, RunningReason::Finished, String::new())
    } else if let Some(pod) = world.current_pod().or_else(|| world.live_pod()) {
        if attempts.makes_no_progress() {
            let limit = job.spec.progress_deadline_seconds.unwrap_or_default();
            let text = format!("no step was finished within progressDeadlineSeconds ({limit}); the trainer is restarted");
            list.set(ConditionType::Running, Truth::False, RunningReason::NoProgress.as_str(), &text);
            return;
        }
        // A pod without a status yet reports the same as no pod: no write for it.
        doing(pod, world, was_training(before), now).unwrap_or_else(not_started)
    } else if job.spec.suspend && world.job.is_none() {
        (Truth::False, RunningReason::Suspended, "suspended by spec.suspend".to_owned())
    } else if matches!(inputs.intent, super::Intent::Fail { .. }) || attempts.spent(job).is_some() {
        (Truth::False, RunningReason::Finished, String::new())
    } else if let Some(child) = world.job.as_deref().filter(|child| world::runs_elsewhere(child) && !world::is_deleting(child)) {
        elsewhere(inputs, child)
    } else if attempts.counts.started > 0 {
        // Between a pod's success and its Job's Complete there is nothing to report.
        if attempts.history.last().is_some_and(|last| matches!(last.cause, None | Some(AttemptCause::Succeeded))) {
            list.keep(ConditionType::Running);
            return;
        }
        (Truth::False, RunningReason::Restarting, restarting(inputs))
    } else {
        not_started()
    };
    list.set(ConditionType::Running, truth, reason.as_str(), &message);
}

/// What comes after the last pod, and when.
fn restarting(inputs: &Inputs<'_>) -> String {
    let Inputs { job, world, attempts, .. } = *inputs;
    let last = attempts.history.last();
    let ended = match last.and_then(|last| last.cause) {
        Some(AttemptCause::Failed) => format!("the last pod failed ({})", last.and_then(|last| last.reason).unwrap_or(Reason::TrainerCrashed)),
        Some(AttemptCause::Lost) => "the last pod vanished".to_owned(),
        _ => "the last pod was asked to end".to_owned(),
    };
    let Some(child) = world.job.as_deref().filter(|child| !world::is_deleting(child)) else { return format!("{ended}; the next one follows at once") };
    if world.warning.is_some() {
        return format!("{ended}, and the API server refuses the next one");
    }
    match attempts.next_start(child) {
        _ if attempts.ended_free(child) && decide::is_renewable(job, child) => format!("{ended}; the next one follows at once"),
        Some(due) => format!("{ended}; the Job controller starts the next one at {due}"),
        None => format!("{ended}; the next one is to start"),
    }
}

/// What a Job does whose pods are in another cluster, by the status that MultiKueue mirrors.
fn elsewhere(inputs: &Inputs<'_>, child: &Job) -> (Truth, RunningReason, String) {
    let Inputs { job, world, .. } = *inputs;
    if child.spec.as_ref().is_some_and(|spec| spec.suspend == Some(true)) {
        // What it waits for `Admitted` says.
        return not_started();
    }
    let place = match world.workload.as_ref().and_then(|workload| workload.cluster.as_deref()) {
        Some(cluster) => format!("worker cluster {cluster:?}"),
        None => "a worker cluster".to_owned(),
    };
    let count = |of: fn(&JobStatus) -> Option<i32>| child.status.as_ref().and_then(of).unwrap_or(0);
    let failed = match count(|status| status.failed) {
        0 => String::new(),
        1 => "; one pod has failed before it".to_owned(),
        failed => format!("; {failed} pods have failed before it"),
    };
    if count(|status| status.ready) > 0 {
        let limits = [("maxGPUSeconds", job.spec.max_gpu_seconds.is_some()), ("progressDeadlineSeconds", job.spec.progress_deadline_seconds.is_some())];
        let limits: Vec<&str> = limits.into_iter().filter_map(|(name, given)| given.then_some(name)).collect();
        let limits = if limits.is_empty() { String::new() } else { format!("; {} cannot be enforced there", limits.join(" and ")) };
        let text = format!("the pod runs in {place}: its progress is shown there (port {PROGRESS_PORT}) and in the output folder{failed}{limits}");
        return (Truth::Unknown, RunningReason::RunningOnWorkerCluster, text);
    }
    let waits = if count(|status| status.active) > 0 { "its pod to be ready" } else { "a pod" };
    (Truth::False, RunningReason::StartingOnWorkerCluster, format!("MultiKueue has given the Job to {place}, which waits for {waits}{failed}"))
}

fn not_started() -> (Truth, RunningReason, String) {
    (Truth::False, RunningReason::Starting, "no pod has started yet".to_owned())
}

/// What a pod that has not ended is doing.
fn doing(pod: &Pod, world: &World, was_training: bool, now: Timestamp) -> Option<(Truth, RunningReason, String)> {
    if is_lost(pod, now) {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
        let text = format!(
            "node {node:?} does not confirm that the pod has ended, and no other may start before. Either the node comes back, or it is deleted (kubectl delete node {node}), or, if it is certainly off, it is tainted: kubectl taint node {node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
        );
        return Some((Truth::False, RunningReason::NodeLost, text));
    }
    let state = world::trainer(pod).and_then(|container| container.state.as_ref());
    if let Some(waiting) = state.and_then(|state| state.waiting.as_ref()) {
        return Some(waiting_for(waiting, world));
    }
    if state.is_some_and(|state| state.running.is_some()) {
        return Some(training(world, was_training, now));
    }
    match world::pod_condition(pod, "PodScheduled") {
        Some(("False", _, message)) if message.contains("persistentvolumeclaim") => Some((Truth::False, RunningReason::VolumeNotFound, message.to_owned())),
        Some(("False", ..)) => Some((Truth::False, RunningReason::Starting, "the pod waits for a node".to_owned())),
        _ => None,
    }
}

/// A pod that should have ended and has not: its node does not answer.
fn is_lost(pod: &Pod, now: Timestamp) -> bool {
    // A pod's deletion timestamp already holds its grace period.
    pod.metadata.deletion_timestamp.as_ref().is_some_and(|deadline| now.duration_since(deadline.0) > LOST)
}

/// When a pod that is ending has to be looked at again, since it may be lost then.
pub(crate) fn lost_at(pod: &Pod) -> Option<Timestamp> {
    pod.metadata.deletion_timestamp.as_ref()?.0.checked_add(LOST + SignedDuration::from_secs(1)).ok()
}

/// A trainer that runs, by its own word.
fn training(world: &World, was_training: bool, now: Timestamp) -> (Truth, RunningReason, String) {
    let silent = world.report.failing_since.is_some_and(|since| now.duration_since(since) > SILENCE);
    match &world.report.progress {
        _ if silent => (
            Truth::Unknown,
            RunningReason::ProgressUnknown,
            "the trainer does not answer on port 9400; a NetworkPolicy or service mesh may keep the operator out".to_owned(),
        ),
        Some(progress) => {
            let (truth, reason) = running_reason(progress.stage);
            (truth, reason, String::new())
        }
        // A trainer that was not asked yet by this process, or not answered in time, goes on as before.
        None if was_training => (Truth::True, RunningReason::Training, String::new()),
        None => (Truth::False, RunningReason::Starting, "the trainer starts".to_owned()),
    }
}

/// A container that waits, by the kubelet's word.
fn waiting_for(waiting: &ContainerStateWaiting, world: &World) -> (Truth, RunningReason, String) {
    let reason = waiting.reason.as_deref().unwrap_or_default();
    let message = waiting.message.clone().unwrap_or_default();
    match reason {
        "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" | "ImageInspectError" | "RegistryUnavailable" => {
            (Truth::False, RunningReason::ImagePullBackOff, message)
        }
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => (Truth::False, obstacles::container(&message), message),
        _ => match &world.warning {
            Some(warning) => (Truth::False, obstacles::start(warning), warning.note.clone()),
            None => (Truth::False, RunningReason::PullingImage, "the node pulls the image and mounts the volumes".to_owned()),
        },
    }
}

/// Whether the job waits for a node.
pub(crate) fn is_unschedulable(pod: &Pod) -> bool {
    matches!(world::pod_condition(pod, "PodScheduled"), Some(("False", "Unschedulable", _)))
}
