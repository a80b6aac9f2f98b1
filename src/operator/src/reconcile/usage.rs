//! GPU seconds: what the attempts of a job have held, and the limit of that. Pure. Only times of pods count, so that it does not matter which operator
//! looks, or when; the operator's clock decides only when a running attempt is stopped.

use jiff::{SignedDuration, Timestamp};

use crate::reconcile::attempts::{Attempts, start};
use crate::reconcile::world::World;
use finetune_api::{Attempt, AttemptCause, FineTuneJob, FineTuneJobStatus, Reason, UsageStatus};

/// GPU seconds that `attempt` has held until `until`.
pub(super) fn of(attempt: &Attempt, until: Timestamp) -> u64 {
    let seconds = start(attempt).map_or(0, |start| until.duration_since(start).as_secs());
    u64::try_from(seconds).unwrap_or(0) * u64::from(attempt.gpus.unwrap_or(1))
}

/// The usage of a status. A version that did not count has left the last attempts.
pub(super) fn written(status: &FineTuneJobStatus) -> UsageStatus {
    status.usage.unwrap_or_else(|| {
        let ended = status.attempt_history.iter().filter_map(|attempt| Some(of(attempt, attempt.end_time.as_ref()?.0))).sum();
        UsageStatus { gpu_seconds: ended, ended_gpu_seconds: ended }
    })
}

impl Attempts {
    /// Adds what the running attempt has held until its trainer was last heard, and notes where that is all that the job may use: the operator stops it once
    /// that is written.
    pub(super) fn spend(&mut self, job: &FineTuneJob, before: &FineTuneJobStatus, world: &World, now: Timestamp) {
        let UsageStatus { gpu_seconds: shown, .. } = written(before);
        self.usage.gpu_seconds = self.usage.ended_gpu_seconds;
        let pod = world.current_pod();
        let Some(running) = self.history.last_mut().filter(|attempt| attempt.cause.is_none()) else { return };
        let heard = world.report.at.filter(|_| pod.and_then(|pod| pod.metadata.uid.as_deref()) == Some(running.pod_uid.as_str()));
        self.usage.gpu_seconds += heard.map_or(0, |heard| of(running, heard));
        // An operator that has just started has not heard it yet.
        if self.ended_now.is_empty() && before.attempt_history.iter().any(|attempt| attempt.pod_uid == running.pod_uid) {
            self.usage.gpu_seconds = self.usage.gpu_seconds.max(shown);
        }
        let asked = job.spec.suspend || pod.is_none_or(|pod| pod.metadata.deletion_timestamp.is_some());
        let spent = job.spec.max_gpu_seconds.is_some_and(|most| self.usage.ended_gpu_seconds + of(running, now) >= most);
        if spent && !asked && running.reason.is_none() {
            running.reason = Some(Reason::GPUSecondsExceeded);
        }
    }

    /// `maxGPUSeconds`, where that is used up: by attempts that have ended, or by the newest one, which is stopped for it.
    pub fn spent(&self, job: &FineTuneJob) -> Option<u64> {
        let (most, last) = (job.spec.max_gpu_seconds?, self.history.last()?);
        let ended = last.cause.is_some_and(|cause| cause != AttemptCause::Succeeded) && self.usage.ended_gpu_seconds >= most;
        (ended || last.reason == Some(Reason::GPUSecondsExceeded)).then_some(most)
    }

    /// When the running attempt will have used up `maxGPUSeconds`.
    pub fn spent_at(&self, job: &FineTuneJob) -> Option<Timestamp> {
        let running = self.history.last().filter(|attempt| attempt.cause.is_none() && attempt.reason.is_none())?;
        let left = job.spec.max_gpu_seconds?.saturating_sub(self.usage.ended_gpu_seconds).div_ceil(u64::from(running.gpus.unwrap_or(1)).max(1));
        let gpus = running.gpus != Some(0);
        start(running).filter(|_| gpus)?.checked_add(SignedDuration::from_secs(i64::try_from(left).ok()?)).ok()
    }
}
