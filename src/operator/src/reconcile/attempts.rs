//! Attempts: which pods of a job have started, and how they ended. Pure, and idempotent under replay: each pod is entered once and its end once, by
//! its UID, in the same status that holds the counts.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::reconcile::usage;
use crate::reconcile::world::{self, JobEnd, World};
use finetune_api::{Attempt, AttemptCause, AttemptCounts, FineTuneJob, FineTuneJobStatus, Progress, Reason, Stage, UsageStatus, clean};

/// Attempts kept in status.
pub const HISTORY: usize = 20;
/// Window of the storm guard, in seconds.
const HOUR: i64 = 3600;
/// How long the Job controller waits before the next pod after the first end of one: doubled with each further end within the same Job.
const FIRST_PAUSE: i64 = 10;
/// The longest it waits.
const LONGEST_PAUSE: i64 = 600;

/// The attempts of a job.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Attempts {
    /// All that ever were, counted.
    pub counts: AttemptCounts,
    /// The last ones, oldest first.
    pub history: Vec<Attempt>,
    /// Those that ended since the status was written, oldest first.
    pub ended_now: Vec<Attempt>,
    /// How many started since the status was written.
    pub started_now: u32,
    /// GPU seconds of all that ever were.
    pub usage: UsageStatus,
}

impl Attempts {
    /// The attempts after what was seen now, given those in status.
    pub fn update(job: &FineTuneJob, status: &FineTuneJobStatus, world: &World, now: Timestamp) -> Self {
        let mut attempts = Self { counts: status.attempts.unwrap_or_default(), history: status.attempt_history.clone(), ..Self::default() };
        attempts.usage = usage::written(status);
        for pod in &world.pods {
            attempts.enter(pod, job.spec.scheduling.gpu.per_replica);
        }
        // Stable: of two that started within one second the one entered later is the later one.
        attempts.history.sort_by_key(start);
        for index in 0..attempts.history.len() {
            attempts.end(index, status, world, job.spec.suspend, now);
        }
        attempts.give_up(job, world, now);
        attempts.spend(job, status, world, now);
        let surplus = attempts.history.len().saturating_sub(HISTORY);
        attempts.history.drain(..surplus);
        attempts
    }

    /// Enters a pod that has started with so many GPUs and is not known yet.
    fn enter(&mut self, pod: &Pod, gpus: u32) {
        let (Some(uid), Some(job_uid), Some(started)) = (pod.metadata.uid.as_deref(), world::owner_uid(pod), started_at(pod)) else { return };
        if self.history.iter().any(|attempt| attempt.pod_uid == uid) {
            return;
        }
        // The history is cut; what is older than all of it was counted before it was cut.
        if self.history.len() >= HISTORY && self.history.iter().filter_map(start).min().is_some_and(|oldest| started <= oldest) {
            return;
        }
        self.counts.started = self.counts.started.saturating_add(1);
        self.started_now += 1;
        self.history.push(Attempt {
            pod_uid: uid.to_owned(),
            job_uid: job_uid.to_owned(),
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            gpus: Some(gpus),
            start_time: Some(Time(started)),
            end_time: None,
            cause: None,
            exit_code: None,
            reason: None,
        });
    }

    /// Notes the end of an attempt whose pod has ended or is gone.
    fn end(&mut self, index: usize, before: &FineTuneJobStatus, world: &World, suspending: bool, now: Timestamp) {
        let newest = index + 1 == self.history.len();
        let Some(attempt) = self.history.get_mut(index).filter(|attempt| attempt.cause.is_none()) else { return };
        let completed = |attempt: &Attempt| {
            world.job_uid() == Some(attempt.job_uid.as_str()) && world.job.as_deref().and_then(world::job_end) == Some(world::JobEnd::Complete)
        };
        let pod = world.pods.iter().find(|pod| pod.metadata.uid.as_deref() == Some(attempt.pod_uid.as_str()));
        let end = match pod {
            // A Job completes by its last pod.
            None if newest && completed(attempt) => End { cause: AttemptCause::Succeeded, exit_code: None, reason: None, time: now },
            None => End { cause: if suspending { AttemptCause::Suspended } else { AttemptCause::Lost }, exit_code: None, reason: None, time: now },
            Some(pod) => match end_of(pod, suspending, now) {
                // A pod that succeeded says so once its Job does: one write instead of two. One that is being deleted (its node was lost, say) is
                // gone by then, and its last words with it.
                Some(end)
                    if end.cause == AttemptCause::Succeeded
                        && pod.metadata.deletion_timestamp.is_none()
                        && job_of(pod, world).is_some_and(|job| world::job_end(job).is_none()) =>
                {
                    return;
                }
                Some(end) => end,
                None => return,
            },
        };
        // The operator has stopped it for that, whatever it made of the request to end.
        let end = match attempt.reason {
            // It has done nothing wrong.
            Some(Reason::GPUSecondsExceeded) if end.cause.is_free() => End { reason: attempt.reason, ..end },
            Some(reason) if end.cause != AttemptCause::Succeeded => End { cause: AttemptCause::Failed, reason: Some(reason), ..end },
            _ => end,
        };
        attempt.cause = Some(end.cause);
        attempt.exit_code = end.exit_code;
        attempt.reason = end.reason;
        attempt.end_time = Some(Time(end.time));
        let heard = before.progress.as_ref().and_then(|progress| progress.last_report_time.as_ref()).map(|time| time.0);
        // The end of a pod that vanished is when that was seen, which may be days later.
        self.usage.ended_gpu_seconds += usage::of(attempt, heard.filter(|heard| pod.is_none() && Some(*heard) >= start(attempt)).unwrap_or(end.time));
        match end.cause {
            AttemptCause::Succeeded => {}
            AttemptCause::Failed => self.counts.failed = self.counts.failed.saturating_add(1),
            AttemptCause::Disrupted | AttemptCause::Checkpointed | AttemptCause::Superseded | AttemptCause::Suspended | AttemptCause::Lost => {
                self.counts.disrupted = self.counts.disrupted.saturating_add(1);
            }
        }
        self.ended_now.push(attempt.clone());
    }

    /// Notes that the newest attempt makes no progress: the operator stops it once that is written, and its end counts as a failure then. A trainer that
    /// does not answer is not judged.
    fn give_up(&mut self, job: &FineTuneJob, world: &World, now: Timestamp) {
        let (Some(limit), Some(progress), Some(since)) = (job.spec.progress_deadline_seconds, &world.report.progress, world.report.unchanged_since) else {
            return;
        };
        let trains = progress.stage == Stage::Training && world.report.failing_since.is_none() && !job.spec.suspend;
        let pod = world.current_pod().filter(|pod| pod.metadata.deletion_timestamp.is_none()).and_then(|pod| pod.metadata.uid.as_deref());
        let newest = self.history.last_mut().filter(|attempt| attempt.cause.is_none() && attempt.reason.is_none() && Some(attempt.pod_uid.as_str()) == pod);
        if let Some(attempt) = newest.filter(|_| trains && now.duration_since(since).as_secs() >= limit) {
            attempt.reason = Some(Reason::NoProgress);
        }
    }

    /// Whether the newest attempt is to be stopped for making no progress.
    pub fn makes_no_progress(&self) -> bool {
        self.history.last().is_some_and(|attempt| attempt.cause.is_none() && attempt.reason == Some(Reason::NoProgress))
    }

    /// The newest attempt that failed, with its number from 1.
    pub fn last_failure(&self) -> Option<(&Attempt, u32)> {
        let (index, attempt) = self.history.iter().enumerate().rev().find(|(_, attempt)| attempt.cause == Some(AttemptCause::Failed))?;
        let cut = self.counts.started.saturating_sub(u32::try_from(self.history.len()).unwrap_or(u32::MAX));
        Some((attempt, cut.saturating_add(u32::try_from(index).unwrap_or(u32::MAX)).saturating_add(1)))
    }

    /// How the Job has ended. A Job that counts a pod's end as a failure, and ends by it, has not ended where that pod was asked to end: a disruption is
    /// no failure, whatever the exit code.
    pub fn job_end(&self, job: &FineTuneJob, child: &Job) -> Option<JobEnd> {
        let end = world::job_end(child)?;
        let JobEnd::Failed { reason, .. } = &end else { return Some(end) };
        let by_its_pods = matches!(reason.as_str(), "BackoffLimitExceeded" | "PodFailurePolicy");
        // Of a pod that nobody has seen the end of, the Job knows more.
        let free = self.newest_of(child).and_then(|attempt| attempt.cause).is_some_and(|cause| cause.is_free() && cause != AttemptCause::Lost);
        (!by_its_pods || !free || self.counts.failed > job.spec.failure_policy.max_retries).then_some(end)
    }

    /// The newest attempt, if it is the Job's.
    fn newest_of(&self, child: &Job) -> Option<&Attempt> {
        self.history.last().filter(|attempt| child.metadata.uid.as_deref() == Some(attempt.job_uid.as_str()))
    }

    /// Whether the Job's newest attempt has ended without a failure of its own, and the job is not through.
    pub fn ended_free(&self, child: &Job) -> bool {
        self.newest_of(child).and_then(|attempt| attempt.cause).is_some_and(AttemptCause::is_free)
    }

    /// When the Job controller starts the Job's next pod, after the end of its newest.
    pub fn next_start(&self, child: &Job) -> Option<Timestamp> {
        let ended = self.newest_of(child).filter(|attempt| attempt.cause.is_some())?.end_time.as_ref()?.0;
        let ends = self.history.iter().filter(|attempt| child.metadata.uid.as_deref() == Some(attempt.job_uid.as_str())).count();
        let doublings = u32::try_from(ends.saturating_sub(1)).unwrap_or(u32::MAX).min(16);
        ended.checked_add(SignedDuration::from_secs((FIRST_PAUSE << doublings).min(LONGEST_PAUSE))).ok()
    }

    /// Seconds since the first start after the last suspension: of those `activeDeadlineSeconds` the Jobs before have used so many.
    pub fn active_seconds(&self, now: Timestamp) -> i64 {
        let since_suspension = self.history.iter().rev().take_while(|attempt| attempt.cause != Some(AttemptCause::Suspended)).last();
        since_suspension.and_then(start).map_or(0, |start| now.duration_since(start).as_secs().max(0))
    }

    /// Restarts within the hour before the newest start: the first attempt, and those after a suspension, are none. Above what the history holds,
    /// the rate of the kept ones is projected to an hour.
    pub fn restarts_per_hour(&self) -> u32 {
        let restarts: Vec<Timestamp> = self
            .history
            .iter()
            .enumerate()
            .filter(|(index, _)| match index.checked_sub(1).and_then(|before| self.history.get(before)) {
                Some(before) => before.cause != Some(AttemptCause::Suspended),
                // The oldest one kept is a restart unless it is the very first.
                None => self.counts.started as usize > self.history.len(),
            })
            .filter_map(|(_, attempt)| start(attempt))
            .collect();
        let Some(last) = restarts.last() else { return 0 };
        let within = restarts.iter().filter(|time| last.as_second() - time.as_second() < HOUR).count();
        let span = restarts.first().map_or(0, |first| last.as_second() - first.as_second());
        let projected = if self.history.len() >= HISTORY && span < HOUR { within as i64 * HOUR / span.max(1) } else { within as i64 };
        u32::try_from(projected).unwrap_or(u32::MAX)
    }
}

/// When the attempt's trainer started.
pub(super) fn start(attempt: &Attempt) -> Option<Timestamp> {
    attempt.start_time.as_ref().map(|time| time.0)
}

fn job_of<'a>(pod: &Pod, world: &'a World) -> Option<&'a k8s_openapi::api::batch::v1::Job> {
    world.job.as_deref().filter(|job| job.metadata.uid.as_deref() == world::owner_uid(pod))
}

/// When the pod's trainer started.
pub fn started_at(pod: &Pod) -> Option<Timestamp> {
    let container = world::trainer(pod)?;
    let state = container.state.as_ref()?;
    if let Some(running) = &state.running {
        // The kubelet always sets the time; a stand-in may not.
        return Some(running.started_at.as_ref().or(pod.metadata.creation_timestamp.as_ref())?.0);
    }
    let terminated = state.terminated.as_ref()?;
    let started = terminated.started_at.as_ref().map(|time| time.0).filter(|time| time.as_second() > 0);
    // A container that the kubelet killed before it ran has no start, and no exit code of its own.
    started.or_else(|| {
        (terminated.exit_code != 0 && terminated.reason.as_deref() != Some("ContainerStatusUnknown")).then_some(pod.metadata.creation_timestamp.as_ref()?.0)
    })
}

/// The trainer's termination.
fn terminated(pod: &Pod) -> Option<&ContainerStateTerminated> {
    world::trainer(pod)?.state.as_ref()?.terminated.as_ref()
}

/// What the trainer left as its termination message, if that can be believed.
pub fn termination_report(pod: &Pod) -> Option<Progress> {
    Progress::parse(terminated(pod)?.message.as_deref()?.as_bytes()).ok()
}

/// How a pod ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End {
    cause: AttemptCause,
    exit_code: Option<i32>,
    reason: Option<Reason>,
    time: Timestamp,
}

/// `None` while it has not ended.
fn end_of(pod: &Pod, suspending: bool, now: Timestamp) -> Option<End> {
    let container = terminated(pod);
    let exit_code = container.map(|container| container.exit_code);
    let time = container.and_then(|container| container.finished_at.as_ref()).map(|time| time.0).filter(|time| time.as_second() > 0).unwrap_or(now);
    let end = |cause, reason| Some(End { cause, exit_code, reason, time });
    match world::phase(pod) {
        "Succeeded" => end(AttemptCause::Succeeded, None),
        "Failed" => {
            // By its own word, and whatever else has happened to it since: its successor was at work already.
            let interrupted = exit_code == Some(Reason::INTERRUPTED_EXIT_CODE);
            if interrupted && termination_report(pod).as_ref().and_then(Progress::failure).is_some_and(|failure| failure.reason == Reason::Superseded) {
                return end(AttemptCause::Superseded, None);
            }
            // The same order as the rules of the Job's podFailurePolicy.
            if world::pod_condition(pod, "DisruptionTarget").is_some_and(|(status, ..)| status == "True") {
                return end(AttemptCause::Disrupted, None);
            }
            if suspending && (interrupted || was_asked_to_end(pod)) {
                return end(AttemptCause::Suspended, None);
            }
            if interrupted {
                return end(AttemptCause::Checkpointed, None);
            }
            // Its Job was deleted, or suspended by Kueue, or somebody deleted the pod; it could not end in time, or not well.
            if was_asked_to_end(pod) {
                return end(AttemptCause::Disrupted, None);
            }
            end(AttemptCause::Failed, Some(failure_reason(pod)))
        }
        _ => None,
    }
}

/// Whether the pod was deleted before its trainer ended: the end is that of the request, whatever the exit code.
fn was_asked_to_end(pod: &Pod) -> bool {
    let Some(deadline) = pod.metadata.deletion_timestamp.as_ref() else { return false };
    // A pod's deletion timestamp already holds its grace period.
    let grace = SignedDuration::from_secs(pod.metadata.deletion_grace_period_seconds.unwrap_or(0));
    let asked = deadline.0.checked_sub(grace).unwrap_or(deadline.0);
    world::finished_at(pod).is_none_or(|finished| finished >= asked)
}

/// Why the pod failed: the kernel's kill by the kubelet's word, else the trainer's own word, else its exit code.
fn failure_reason(pod: &Pod) -> Reason {
    let Some(container) = terminated(pod) else { return Reason::TrainerCrashed };
    // Exit code 137 alone is no proof: any SIGKILL ends with it.
    if container.reason.as_deref() == Some("OOMKilled") {
        return Reason::HostOutOfMemory;
    }
    let reported = termination_report(pod).and_then(|report| report.failure().map(|failure| failure.reason));
    reported.or_else(|| Reason::from_exit_code(container.exit_code)).unwrap_or(Reason::TrainerCrashed)
}

/// What a failed pod has to say: the trainer's message, else the kubelet's.
pub fn failure_message(pod: &Pod) -> String {
    if let Some(failure) = termination_report(pod).as_ref().and_then(Progress::failure) {
        return clean(&failure.message, 1024);
    }
    let from_pod = pod.status.as_ref().and_then(|status| status.message.as_deref());
    let text = match terminated(pod) {
        Some(container) if container.reason.as_deref() == Some("OOMKilled") => {
            "the kernel killed the trainer for using more memory than resources.limits.memory; raise that limit".to_owned()
        }
        Some(container) => match from_pod {
            Some(text) if !text.is_empty() => format!("the trainer ended with exit code {}: {text}", container.exit_code),
            _ => format!(
                "the trainer ended with exit code {} and no message; its log tells more: kubectl logs {}",
                container.exit_code,
                pod.metadata.name.as_deref().unwrap_or_default()
            ),
        },
        None => from_pod.filter(|text| !text.is_empty()).unwrap_or("the pod failed before its trainer ended").to_owned(),
    };
    clean(&text, 1024)
}
