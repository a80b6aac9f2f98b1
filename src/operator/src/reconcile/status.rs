//! `status`: from the status before, what the cluster holds and what was done, to the status after. Pure; `now` is an argument.

mod admitted;
mod end;
mod image;
mod obstacles;
mod progress;
mod running;

pub(crate) use admitted::workload_due;
pub(crate) use running::{is_unschedulable, lost_at};

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::reconcile::attempts::Attempts;
use crate::reconcile::conditions::{self, Builder, Truth};
use crate::reconcile::decide::{Intent, Stop, Wait};
use crate::reconcile::validate::{ValidateError, ValidatedJob};
use crate::reconcile::world::{self, World};
use finetune_api::{
    AttemptCause, CheckpointedReason, ConditionType, FineTuneJob, FineTuneJobStatus, JobCreatedReason, JobRef, QueueStatus, Reason, ReconcilingReason,
    RunningReason, StalledReason, SuspendedReason, ValidatedReason,
};

/// What `apply` came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing had to be done, or it was done.
    Done,
    /// The Job could not be created.
    NotCreated {
        /// Why.
        reason: JobCreatedReason,
        /// In words.
        message: String,
    },
    /// The API server finds the Job invalid.
    Invalid {
        /// In its words.
        message: String,
    },
}

/// Why the job cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refusal {
    /// For `Validated`.
    reason: ValidatedReason,
    /// For `Failed` and `status.failure`.
    cause: Reason,
    message: String,
}

impl Refusal {
    /// A Job that exists was made from a spec that could be carried out, by this operator or an earlier one.
    fn of(inputs: &Inputs<'_>) -> Option<Self> {
        match (inputs.validated, inputs.outcome) {
            _ if inputs.world.job.is_some() => None,
            (Err(error), _) => Some(Self { reason: error.reason(), cause: error.cause(), message: error.to_string() }),
            (Ok(_), Outcome::Invalid { message }) => {
                let message = format!("Kubernetes refuses what the spec asks for: {message}");
                Some(Self { reason: ValidatedReason::InvalidSpec, cause: Reason::InvalidConfig, message })
            }
            (Ok(_), _) => None,
        }
    }
}

/// Everything that the status depends on.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The FineTuneJob; its own status may be older than `before`.
    pub job: &'a FineTuneJob,
    /// The newest status known.
    pub before: &'a FineTuneJobStatus,
    /// Whether it can be carried out.
    pub validated: Result<&'a ValidatedJob, &'a ValidateError>,
    /// What the cluster holds, after `apply`.
    pub world: &'a World,
    /// Its attempts.
    pub attempts: &'a Attempts,
    /// What was decided.
    pub intent: &'a Intent,
    /// What came of it.
    pub outcome: &'a Outcome,
    /// Now.
    pub now: Timestamp,
}

/// The status after. Equal inputs give equal statuses, and a job at rest gives the status before.
pub fn status(inputs: &Inputs<'_>) -> FineTuneJobStatus {
    let Inputs { job, before, world, attempts, now, .. } = *inputs;
    if conditions::is_terminal(&before.conditions) {
        // Final: nothing that happens afterwards, such as the deletion of the Job, can change what is known.
        return FineTuneJobStatus { observed_generation: job.metadata.generation, ..before.clone() };
    }
    let refusal = Refusal::of(inputs);
    let refusal = refusal.as_ref();
    let mut after = before.clone();
    after.observed_generation = job.metadata.generation;
    if let Ok(validated) = inputs.validated {
        after.spec_hash = Some(validated.spec_hash.clone());
    }
    if attempts.counts.started > 0 || before.attempts.is_some() {
        after.attempts = Some(attempts.counts);
    }
    after.attempt_history.clone_from(&attempts.history);
    if attempts.counts.started > 0 {
        after.usage = Some(attempts.usage);
    }
    if after.start_time.is_none() {
        let attempts = attempts.history.iter().filter_map(|attempt| attempt.start_time.clone()).min_by_key(|time| time.0);
        after.start_time = attempts.or_else(|| world.job.as_deref().and_then(world::started_elsewhere).map(Time));
    }
    after.nodes = nodes(world);
    if let Some(job) = &world.job {
        after.job_ref = Some(JobRef { name: job.metadata.name.clone().unwrap_or_default(), uid: job.metadata.uid.clone().unwrap_or_default() });
        image::fix(&mut after, before, job, world);
    }
    after.queue = queue(job, before, world);
    progress::report(&mut after, world, attempts, now);
    end::last_failure(&mut after, inputs, refusal);

    let mut list = Builder::new(&before.conditions, job.metadata.generation, now);
    validated_condition(&mut list, inputs, refusal);
    job_created(&mut list, inputs);
    suspended(&mut list, inputs);
    if let Some(Refusal { cause, message, .. }) = refusal {
        // For whoever waits for the end of it.
        list.set(ConditionType::Failed, Truth::True, cause.as_str(), message);
    } else {
        admitted::admitted(&mut list, inputs);
        running::pods_scheduled(&mut list, world);
        running::running(&mut list, inputs);
    }
    progress::checkpointed(&mut list, &after, world);
    let end = end::end(inputs, &mut after);
    if let Some(end) = &end {
        end.set(&mut list);
        after.completion_time = Some(Time(end.time));
        after.nodes = Vec::new();
    }
    reconciling(&mut list, inputs, end.is_some());
    stalled(&mut list, end.as_ref());
    after.conditions = list.build();
    after.phase = Some(conditions::phase(&after.conditions));
    after.reason = conditions::reason(&after.conditions, after.failure.as_ref());
    after
}

/// Whether a lifecycle field changed, which is written immediately. The rest (texts, progress, the checkpoint, that an attempt has started, with which image
/// and on which node, which step of its preparation the trainer does) is written with it, or a little later.
pub fn lifecycle_differs(before: &FineTuneJobStatus, after: &FineTuneJobStatus) -> bool {
    essence(before) != essence(after)
}

fn essence(status: &FineTuneJobStatus) -> FineTuneJobStatus {
    const PREPARING: [RunningReason; 6] = [
        RunningReason::Starting,
        RunningReason::PullingImage,
        RunningReason::DownloadingModel,
        RunningReason::DownloadingDataset,
        RunningReason::PreparingData,
        RunningReason::RestoringCheckpoint,
    ];
    let mut status = FineTuneJobStatus {
        progress: None,
        last_checkpoint: None,
        dataset_digest: None,
        queue: None,
        nodes: Vec::new(),
        start_time: None,
        trainer_image: None,
        ..status.clone()
    };
    // A pod's UID finds its attempt again, whoever looks next: that it has started waits for what comes of it. Its end, and why it is ended, do not.
    if status.attempt_history.pop_if(|attempt| attempt.cause.is_none() && attempt.reason.is_none()).is_some()
        && let Some(counts) = &mut status.attempts
    {
        counts.started = counts.started.saturating_sub(1);
    }
    status.attempts = status.attempts.filter(|counts| counts.started > 0);
    if let Some(usage) = &mut status.usage {
        usage.gpu_seconds = usage.ended_gpu_seconds;
    }
    status.usage = status.usage.filter(|usage| usage.ended_gpu_seconds > 0);
    let is_fleeting = |condition: &Condition| match condition.type_.as_str() {
        type_ if type_ == ConditionType::PodsScheduled.as_str() => condition.status == "True",
        type_ if type_ == ConditionType::Checkpointed.as_str() => condition.reason != CheckpointedReason::UploadFailed.as_str(),
        _ => false,
    };
    status.conditions.retain(|condition| !is_fleeting(condition));
    for condition in &mut status.conditions {
        condition.message.clear();
        if condition.type_ == ConditionType::Running.as_str() {
            if PREPARING.iter().any(|reason| reason.as_str() == condition.reason) {
                RunningReason::Starting.as_str().clone_into(&mut condition.reason);
            } else if condition.reason == RunningReason::Publishing.as_str() {
                // The end of a training that will be told in a moment.
                RunningReason::Training.as_str().clone_into(&mut condition.reason);
                Truth::True.as_str().clone_into(&mut condition.status);
            }
            condition.last_transition_time = Time(Timestamp::UNIX_EPOCH);
        }
    }
    status
}

/// Nodes of the pods that have not ended.
fn nodes(world: &World) -> Vec<String> {
    let nodes: BTreeSet<String> = world.pods.iter().filter(|pod| !world::has_ended(pod)).filter_map(|pod| pod.spec.as_ref()?.node_name.clone()).collect();
    nodes.into_iter().collect()
}

fn queue(job: &FineTuneJob, before: &FineTuneJobStatus, world: &World) -> Option<QueueStatus> {
    let name = job.spec.queue_name.clone()?;
    let kept = before.queue.as_ref().filter(|queue| queue.name == name && world.job.is_some()).and_then(|queue| queue.workload.clone());
    Some(QueueStatus { name, workload: world.workload.as_ref().map(|workload| workload.name.clone()).or(kept) })
}

fn validated_condition(list: &mut Builder<'_>, inputs: &Inputs<'_>, refusal: Option<&Refusal>) {
    if let Some(Refusal { reason, message, .. }) = refusal {
        list.set(ConditionType::Validated, Truth::False, reason.as_str(), message);
        return;
    }
    match (inputs.validated, &inputs.world.shared_output) {
        (Ok(_), Some(other)) => {
            let text = format!(
                "{other}, which has not ended, writes into the same output folder: only one of the two can publish. Give this job an output.uri of its own"
            );
            list.set(ConditionType::Validated, Truth::True, ValidatedReason::OutputShared.as_str(), &text);
        }
        (Ok(_), None) => list.set(ConditionType::Validated, Truth::True, ValidatedReason::SpecAccepted.as_str(), "the spec can be carried out"),
        // A Job that exists was made from a spec that could be carried out, by this operator or an earlier one.
        (Err(_), _) => list.keep(ConditionType::Validated),
    }
}

fn job_created(list: &mut Builder<'_>, inputs: &Inputs<'_>) {
    if let Some(job) = &inputs.world.job {
        let name = job.metadata.name.as_deref().unwrap_or_default();
        list.set(ConditionType::JobCreated, Truth::True, JobCreatedReason::Created.as_str(), &format!("Job {name:?}"));
    } else if let Outcome::NotCreated { reason, message } = inputs.outcome {
        list.set(ConditionType::JobCreated, Truth::False, reason.as_str(), message);
    } else if is_renewed(inputs) {
        // Another takes its place in a moment.
        list.keep(ConditionType::JobCreated);
    }
}

fn suspended(list: &mut Builder<'_>, inputs: &Inputs<'_>) {
    let Inputs { job, before, world, .. } = *inputs;
    if job.spec.suspend {
        // True means that the GPU is free again.
        if world.job.is_none() && world.live_pod().is_none() {
            list.set(ConditionType::Suspended, Truth::True, SuspendedReason::UserRequested.as_str(), "suspended by spec.suspend; nothing runs");
        } else {
            list.keep(ConditionType::Suspended);
        }
    } else if conditions::find(&before.conditions, ConditionType::Suspended).is_some() {
        list.set(ConditionType::Suspended, Truth::False, SuspendedReason::Resumed.as_str(), "spec.suspend is false again");
    }
}

/// Whether the Job is being replaced, after an end that was no failure: only the next start is reported.
fn is_renewed(inputs: &Inputs<'_>) -> bool {
    let Inputs { job, attempts, .. } = *inputs;
    let free = attempts.history.last().and_then(|last| last.cause).is_some_and(|cause| cause.is_free() && cause != AttemptCause::Suspended);
    free && !job.spec.suspend
        && attempts.spent(job).is_none()
        && matches!(inputs.intent, Intent::Delete { why: Stop::Renewal, .. } | Intent::Wait(Wait::JobDeleting) | Intent::Create { .. })
}

fn reconciling(list: &mut Builder<'_>, inputs: &Inputs<'_>, ended: bool) {
    let Inputs { job, world, intent, outcome, .. } = *inputs;
    let message = match (intent, outcome) {
        _ if ended => None,
        (_, Outcome::NotCreated { message, .. }) => Some(format!("the Job could not be created: {message}")),
        (Intent::Delete { why: Stop::Suspended, .. }, _) => Some("the trainer saves a checkpoint and ends".to_owned()),
        _ if is_renewed(inputs) => None,
        (Intent::Delete { why: Stop::NoProgress, .. }, _) => Some("the trainer makes no progress and is restarted".to_owned()),
        (Intent::Delete { why: Stop::Renewal, .. }, _) => Some("a new Job takes the place of this one".to_owned()),
        (Intent::Delete { why: Stop::Limit(reason), .. }, _) => Some(format!("the trainer is stopped: {reason}")),
        (Intent::Wait(Wait::Ending(what)), _) => Some(format!("waits for {what} to end")),
        (Intent::Wait(Wait::JobDeleting), _) => Some("waits for the Job's pods to end".to_owned()),
        (Intent::Wait(Wait::Kueue), _) => Some("waits for Kueue to be installed".to_owned()),
        _ if world.job.is_none() && inputs.validated.is_ok() && !job.spec.suspend => Some("the Job is being created".to_owned()),
        _ => list.cannot_start().map(|(reason, message)| format!("{reason}: {message}")),
    };
    match message {
        Some(message) => list.set(ConditionType::Reconciling, Truth::True, ReconcilingReason::Progressing.as_str(), &message),
        None => list.set(ConditionType::Reconciling, Truth::False, ReconcilingReason::Reconciled.as_str(), ""),
    }
}

/// Repeats what cannot get better by itself, for kstatus.
fn stalled(list: &mut Builder<'_>, end: Option<&end::End>) {
    let repeated = match end {
        Some(end) => end.failure().map(|(reason, message)| (reason.to_owned(), message.to_owned())),
        None => list.false_of(ConditionType::Validated),
    };
    match repeated {
        Some((reason, message)) => list.set(ConditionType::Stalled, Truth::True, &reason, &message),
        None => list.set(ConditionType::Stalled, Truth::False, StalledReason::NotStalled.as_str(), ""),
    }
}
