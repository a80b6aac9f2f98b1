//! What to do next about a job. Pure: a function of its spec, its attempts and what the cluster holds, so that a killed operator's successor decides
//! the same.

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;

use crate::reconcile::attempts::Attempts;
use crate::reconcile::conditions;
use crate::reconcile::validate::ValidatedJob;
use crate::reconcile::world::{self, World};
use finetune_api::{
    ACTIVE_BEFORE_ANNOTATION, ConditionType, FAILED_BEFORE_ANNOTATION, FineTuneJob, FineTuneJobStatus, Reason, SuspendedReason, config_map_prefix,
};

/// Why a Job is deleted. Its pods get SIGTERM and save a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// `spec.suspend` is true.
    Suspended,
    /// A limit of the job is exceeded.
    Limit(Reason),
    /// Its trainer makes no progress.
    NoProgress,
    /// Its last pod has ended without a failure of its own. The Job controller would wait longer after each such end; for a new Job it does not.
    Renewal,
}

/// What the job waits for before anything else can be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wait {
    /// A pod of an earlier Job has not ended, or the Job itself: two trainers must never run at once.
    Ending(String),
    /// The Job is being deleted.
    JobDeleting,
    /// `queueName` is set and the cluster has no Kueue: the Job would start at once.
    Kueue,
}

/// Fields of a Job that may be patched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct JobPatch {
    /// `activeDeadlineSeconds`.
    pub active_deadline_seconds: Option<i64>,
    /// `backoffLimit`.
    pub backoff_limit: Option<i32>,
    /// `parallelism`, where somebody has changed it.
    pub parallelism: Option<i32>,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intent {
    /// Nothing: the job has ended, is suspended, or cannot be carried out.
    Rest,
    /// The Job is as it should be.
    Keep,
    /// Create the Job.
    Create {
        /// Failures in earlier Jobs: the new one may have so many fewer.
        failed_before: u32,
        /// Seconds that earlier Jobs have been active: the new one may be active so many fewer.
        active_before: i64,
    },
    /// Patch the Job.
    Adjust {
        /// Its UID.
        uid: String,
        /// What to change.
        patch: JobPatch,
    },
    /// Delete the Job.
    Delete {
        /// Its UID.
        uid: String,
        /// What it looked like: if it has changed since, it may have ended, and must not be deleted.
        resource_version: String,
        /// Why.
        why: Stop,
    },
    /// Come back when something has changed.
    Wait(Wait),
    /// Nothing runs any more: the job has failed.
    Fail {
        /// Why.
        reason: Reason,
        /// In words.
        message: String,
    },
}

/// Decides. `validated` is `None` where the spec cannot be carried out; a Job that exists goes on nevertheless.
pub fn decide(job: &FineTuneJob, status: &FineTuneJobStatus, validated: Option<&ValidatedJob>, world: &World, attempts: &Attempts, now: Timestamp) -> Intent {
    if conditions::is_terminal(&status.conditions) || job.metadata.deletion_timestamp.is_some() {
        return Intent::Rest;
    }
    if let Some(existing) = &world.job {
        // How it has ended is for `status` to tell, before anything else can happen to it.
        if attempts.job_end(job, existing).is_some() {
            return Intent::Keep;
        }
        if world::is_deleting(existing) {
            return Intent::Wait(Wait::JobDeleting);
        }
        if job.spec.suspend {
            return delete(existing, Stop::Suspended);
        }
        // Too many failures are not among these: the Job itself fails then, and keeps its pods and their logs.
        if let Some((reason, _)) = storm(job, attempts).or_else(|| never_started(job, status, attempts, now)) {
            return delete(existing, Stop::Limit(reason));
        }
        // Written first: its successor must know that there is none.
        if attempts.spent(job).is_some() {
            let written = status.attempt_history.last() == attempts.history.last();
            return if written { delete(existing, Stop::Limit(Reason::GPUSecondsExceeded)) } else { Intent::Keep };
        }
        // Its pod has not started, and never will; a new Job carries its configuration itself.
        if lacks_config_map(job, world) {
            return delete(existing, Stop::Renewal);
        }
        // Written first: it is by that that its end counts as a failure.
        if attempts.makes_no_progress() {
            return if status.attempt_history.last() == attempts.history.last() { delete(existing, Stop::NoProgress) } else { Intent::Keep };
        }
        // A Job whose failure does not count has no other pod.
        if world::job_end(existing).is_some() || (is_renewable(job, existing) && attempts.ended_free(existing) && world.live_pod().is_none()) {
            // The pods go with it: first their end is written.
            let written = status.attempt_history.last() == attempts.history.last();
            return if written { delete(existing, Stop::Renewal) } else { Intent::Keep };
        }
        return adjust(job, existing);
    }
    if let Some(pod) = world.live_pod() {
        return Intent::Wait(Wait::Ending(format!("pod {:?}", pod.metadata.name.as_deref().unwrap_or_default())));
    }
    if job.spec.suspend || validated.is_none() {
        return Intent::Rest;
    }
    if let Some((reason, message)) = exceeded(job, status, attempts, now) {
        return Intent::Fail { reason, message };
    }
    if let Some(stranger) = &world.stranger {
        return Intent::Wait(Wait::Ending(stranger.clone()));
    }
    if job.spec.queue_name.is_some() && !world.kueue_installed {
        return Intent::Wait(Wait::Kueue);
    }
    Intent::Create { failed_before: attempts.counts.failed, active_before: active_before(job, attempts, now) }
}

/// Whether the pod of a Job that an earlier version of the operator has made waits in vain for the ConfigMap with its configuration: somebody has deleted it.
fn lacks_config_map(job: &FineTuneJob, world: &World) -> bool {
    let Some(warning) = world.warning.as_ref().filter(|_| world.current_pod().is_some()) else { return false };
    let note = warning.note.as_str();
    let prefix = config_map_prefix(job.metadata.name.as_deref().unwrap_or_default());
    note.contains("configmap") && note.contains("not found") && note.split('"').skip(1).step_by(2).any(|name| name.starts_with(&prefix))
}

/// Whether a new Job in place of this one costs nothing but its creation. A queued one would lose its quota and its place.
pub fn is_renewable(job: &FineTuneJob, existing: &Job) -> bool {
    job.spec.queue_name.is_none() && existing.spec.as_ref().is_none_or(|spec| spec.suspend != Some(true))
}

/// Failures that a Job may have when `failed_before` it was created: those of earlier Jobs count.
pub fn backoff_limit(job: &FineTuneJob, failed_before: u32) -> i32 {
    i32::try_from(job.spec.failure_policy.max_retries.saturating_sub(failed_before)).unwrap_or(i32::MAX)
}

/// Seconds that earlier Jobs have been active. Kueue sets the clock of a queued Job back with each admission, so that there is nothing to add up.
fn active_before(job: &FineTuneJob, attempts: &Attempts, now: Timestamp) -> i64 {
    if job.spec.queue_name.is_some() { 0 } else { attempts.active_seconds(now) }
}

/// Seconds for which a Job may be active when earlier ones have been for `active_before`.
pub fn active_deadline(job: &FineTuneJob, active_before: i64) -> Option<i64> {
    job.spec.active_deadline_seconds.map(|seconds| seconds.saturating_sub(active_before).max(1))
}

fn delete(existing: &Job, why: Stop) -> Intent {
    Intent::Delete {
        uid: existing.metadata.uid.clone().unwrap_or_default(),
        resource_version: existing.metadata.resource_version.clone().unwrap_or_default(),
        why,
    }
}

fn adjust(job: &FineTuneJob, existing: &Job) -> Intent {
    let uid = existing.metadata.uid.clone().unwrap_or_default();
    let spec = existing.spec.as_ref();
    let noted = |key: &str| existing.metadata.annotations.as_ref().and_then(|annotations| annotations.get(key));
    let failed_before = noted(FAILED_BEFORE_ANNOTATION).and_then(|text| text.parse().ok()).unwrap_or(0);
    let active_before = noted(ACTIVE_BEFORE_ANNOTATION).and_then(|text| text.parse().ok()).unwrap_or(0);
    let limit = backoff_limit(job, failed_before);
    let deadline = active_deadline(job, active_before);
    let patch = JobPatch {
        active_deadline_seconds: deadline.filter(|wanted| spec.and_then(|spec| spec.active_deadline_seconds) != Some(*wanted)),
        backoff_limit: (spec.and_then(|spec| spec.backoff_limit) != Some(limit)).then_some(limit),
        // Without pods for good; nobody but a person sets it.
        parallelism: spec.and_then(|spec| spec.parallelism).is_some_and(|parallelism| parallelism != 1).then_some(1),
    };
    if patch == JobPatch::default() { Intent::Keep } else { Intent::Adjust { uid, patch } }
}

/// A limit that the job has exceeded, where no Job exists. It stays exceeded: none of these depends on how long ago that was.
fn exceeded(job: &FineTuneJob, status: &FineTuneJobStatus, attempts: &Attempts, now: Timestamp) -> Option<(Reason, String)> {
    storm(job, attempts).or_else(|| spent(job, attempts)).or_else(|| exhausted(job, attempts)).or_else(|| never_started(job, status, attempts, now))
}

fn storm(job: &FineTuneJob, attempts: &Attempts) -> Option<(Reason, String)> {
    let (restarts, most) = (attempts.restarts_per_hour(), job.spec.failure_policy.max_restarts_per_hour);
    (restarts > most).then(|| (Reason::RestartStorm, format!("{restarts} restarts within an hour, more than failurePolicy.maxRestartsPerHour ({most})")))
}

fn spent(job: &FineTuneJob, attempts: &Attempts) -> Option<(Reason, String)> {
    let (most, used) = (attempts.spent(job)?, attempts.usage.ended_gpu_seconds);
    Some((Reason::GPUSecondsExceeded, format!("used {used} GPU seconds of the {most} that maxGPUSeconds allows; the checkpoints are kept")))
}

fn exhausted(job: &FineTuneJob, attempts: &Attempts) -> Option<(Reason, String)> {
    let (failed, most) = (attempts.counts.failed, job.spec.failure_policy.max_retries);
    (failed > most).then(|| (Reason::RetriesExhausted, format!("{failed} failures, more than failurePolicy.maxRetries ({most})")))
}

fn never_started(job: &FineTuneJob, status: &FineTuneJobStatus, attempts: &Attempts, now: Timestamp) -> Option<(Reason, String)> {
    let deadline = start_deadline(job, status, attempts)?;
    (now >= deadline).then(|| (Reason::StartDeadlineExceeded, format!("no pod started within startDeadlineSeconds ({})", job.spec.start_deadline_seconds)))
}

/// Until when the first pod must have started. The time of a suspension does not count.
pub fn start_deadline(job: &FineTuneJob, status: &FineTuneJobStatus, attempts: &Attempts) -> Option<Timestamp> {
    // A start in another cluster is no attempt of this one.
    if job.spec.start_deadline_seconds <= 0 || attempts.counts.started > 0 || status.start_time.is_some() || job.spec.suspend {
        return None;
    }
    let created = job.metadata.creation_timestamp.as_ref()?.0;
    let resumed = conditions::find(&status.conditions, ConditionType::Suspended)
        .filter(|condition| condition.reason == SuspendedReason::Resumed.as_str())
        .map(|condition| condition.last_transition_time.0);
    created.max(resumed.unwrap_or(created)).checked_add(jiff::SignedDuration::from_secs(job.spec.start_deadline_seconds)).ok()
}
