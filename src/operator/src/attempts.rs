//! Attempts: which pods of a job have started, and how they ended. Pure, and idempotent under replay: each pod is entered once and its end once, by
//! its UID, in the same status that holds the counts.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::world::{self, World};
use finetune_api::{Attempt, AttemptCause, AttemptCounts, FineTuneJobStatus, Progress, Reason, clean};

/// Attempts kept in status.
pub const HISTORY: usize = 20;
/// Window of the storm guard, in seconds.
const HOUR: i64 = 3600;

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
}

impl Attempts {
    /// The attempts after what was seen now, given those in status. `suspending`: the job's user has suspended it.
    pub fn update(status: &FineTuneJobStatus, world: &World, suspending: bool, now: Timestamp) -> Self {
        let mut attempts = Self { counts: status.attempts.unwrap_or_default(), history: status.attempt_history.clone(), ..Self::default() };
        for pod in &world.pods {
            attempts.enter(pod);
        }
        // Stable: of two that started within one second the one entered later is the later one.
        attempts.history.sort_by_key(start);
        for index in 0..attempts.history.len() {
            attempts.end(index, world, suspending, now);
        }
        let surplus = attempts.history.len().saturating_sub(HISTORY);
        attempts.history.drain(..surplus);
        attempts
    }

    /// Enters a pod that has started and is not known yet.
    fn enter(&mut self, pod: &Pod) {
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
            start_time: Some(Time(started)),
            end_time: None,
            cause: None,
            exit_code: None,
            reason: None,
        });
    }

    /// Notes the end of an attempt whose pod has ended or is gone.
    fn end(&mut self, index: usize, world: &World, suspending: bool, now: Timestamp) {
        let newest = index + 1 == self.history.len();
        let Some(attempt) = self.history.get_mut(index).filter(|attempt| attempt.cause.is_none()) else { return };
        let completed = |attempt: &Attempt| {
            world.job_uid() == Some(attempt.job_uid.as_str()) && world.job.as_deref().and_then(world::job_end) == Some(world::JobEnd::Complete)
        };
        let end = match world.pods.iter().find(|pod| pod.metadata.uid.as_deref() == Some(attempt.pod_uid.as_str())) {
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
        attempt.cause = Some(end.cause);
        attempt.exit_code = end.exit_code;
        attempt.reason = end.reason;
        attempt.end_time = Some(Time(end.time));
        match end.cause {
            AttemptCause::Succeeded => {}
            AttemptCause::Failed => self.counts.failed = self.counts.failed.saturating_add(1),
            AttemptCause::Disrupted | AttemptCause::Checkpointed | AttemptCause::Suspended | AttemptCause::Lost => {
                self.counts.disrupted = self.counts.disrupted.saturating_add(1);
            }
        }
        self.ended_now.push(attempt.clone());
    }

    /// The newest attempt that failed, with its number from 1.
    pub fn last_failure(&self) -> Option<(&Attempt, u32)> {
        let (index, attempt) = self.history.iter().enumerate().rev().find(|(_, attempt)| attempt.cause == Some(AttemptCause::Failed))?;
        let cut = self.counts.started.saturating_sub(u32::try_from(self.history.len()).unwrap_or(u32::MAX));
        Some((attempt, cut.saturating_add(u32::try_from(index).unwrap_or(u32::MAX)).saturating_add(1)))
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

fn start(attempt: &Attempt) -> Option<Timestamp> {
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
        // The kubelet always tells the time; a stand-in may not.
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
            // The same order as the rules of the Job's podFailurePolicy.
            if world::pod_condition(pod, "DisruptionTarget").is_some_and(|(status, ..)| status == "True") {
                return end(AttemptCause::Disrupted, None);
            }
            if exit_code == Some(Reason::INTERRUPTED_EXIT_CODE) {
                return end(if suspending { AttemptCause::Suspended } else { AttemptCause::Checkpointed }, None);
            }
            end(AttemptCause::Failed, Some(failure_reason(pod)))
        }
        _ => None,
    }
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
