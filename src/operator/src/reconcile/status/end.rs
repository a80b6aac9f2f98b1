//! How a job ends, and why its attempts fail.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use super::{Inputs, Refusal};
use crate::reconcile::attempts::{Attempts, failure_message, termination_report};
use crate::reconcile::conditions::{Builder, Truth};
use crate::reconcile::decide::Intent;
use crate::reconcile::world::{self, JobEnd, World};
use finetune_api::{AttemptCause, CompleteReason, ConditionType, FailureStatus, FineTuneJobStatus, Progress, Reason, clean};

/// The end of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct End {
    /// When it was seen.
    pub(super) time: Timestamp,
    verdict: Verdict,
    message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Complete(CompleteReason),
    Failed(Reason),
}

impl End {
    /// Sets the final condition.
    pub(super) fn set(&self, list: &mut Builder<'_>) {
        match self.verdict {
            Verdict::Complete(reason) => list.set(ConditionType::Complete, Truth::True, reason.as_str(), &self.message),
            Verdict::Failed(reason) => list.set(ConditionType::Failed, Truth::True, reason.as_str(), &self.message),
        }
    }

    /// Reason and message where it is a failure.
    pub(super) fn failure(&self) -> Option<(&'static str, &str)> {
        match self.verdict {
            Verdict::Complete(_) => None,
            Verdict::Failed(reason) => Some((reason.as_str(), &self.message)),
        }
    }
}

/// The end, if there is one; fills in what is known of it in `after`.
pub(super) fn end(inputs: &Inputs<'_>, after: &mut FineTuneJobStatus) -> Option<End> {
    let Inputs { job, world, attempts, now, .. } = *inputs;
    if let Intent::Fail { reason, message } = inputs.intent {
        let failure = after.failure.take();
        after.failure = Some(operator_failure(*reason, message, failure));
        return Some(End { time: now, verdict: Verdict::Failed(*reason), message: message.clone() });
    }
    match attempts.job_end(job, world.job.as_ref()?)? {
        JobEnd::Complete => {
            let report = world.pods.iter().rev().filter(|pod| world::phase(pod) == "Succeeded").find_map(|pod| termination_report(pod));
            let reused = report.as_ref().and_then(|report| report.result.as_ref()).is_some_and(|result| result.already_completed);
            after.failure = None;
            let (reason, message) = if reused {
                (CompleteReason::AlreadyCompleted, "the output folder already held the result of this very spec and dataset")
            } else if world.job.as_deref().is_some_and(world::runs_elsewhere) {
                (CompleteReason::TrainingSucceeded, "the LoRA is in the output folder; the pod ran in another cluster: result.json there tells the rest")
            } else if after.artifacts.is_empty() {
                (CompleteReason::TrainingSucceeded, "the LoRA is in the output folder; the pod vanished before it was heard: result.json there tells the rest")
            } else {
                (CompleteReason::TrainingSucceeded, "the LoRA is in the output folder")
            };
            Some(End { time: now, verdict: Verdict::Complete(reason), message: message.to_owned() })
        }
        JobEnd::Failed { reason, message } => {
            let (verdict, text) = failed(&reason, &message, attempts, after);
            Some(End { time: now, verdict: Verdict::Failed(verdict), message: text })
        }
    }
}

/// The reason for a Job's condition `Failed`; `after.failure` holds the cause below it.
fn failed(job_reason: &str, job_message: &str, attempts: &Attempts, after: &mut FineTuneJobStatus) -> (Reason, String) {
    let cause = after.failure.clone().filter(|_| attempts.last_failure().is_some());
    match job_reason {
        "DeadlineExceeded" => {
            let message = "ran longer than activeDeadlineSeconds; the checkpoints are kept";
            after.failure = Some(operator_failure(Reason::DeadlineExceeded, message, None));
            (Reason::DeadlineExceeded, message.to_owned())
        }
        "BackoffLimitExceeded" => {
            let message = match &cause {
                Some(failure) => {
                    format!("{} failures, more than failurePolicy.maxRetries; the last: {}: {}", attempts.counts.failed, failure.reason, failure.message)
                }
                None => format!("more failures than failurePolicy.maxRetries: {job_message}"),
            };
            if cause.is_none() {
                after.failure = Some(operator_failure(Reason::RetriesExhausted, &message, None));
            }
            (Reason::RetriesExhausted, message)
        }
        _ => {
            // One attempt was enough. Where its pod is gone, the Job's message still names its exit code.
            let failure = cause.unwrap_or_else(|| {
                let code = exit_code(job_message);
                let reason = code.and_then(Reason::from_exit_code).unwrap_or(Reason::TrainerCrashed);
                FailureStatus { exit_code: code, ..operator_failure(reason, job_message, None) }
            });
            let verdict = (failure.reason, failure.message.clone());
            after.failure = Some(failure);
            verdict
        }
    }
}

/// The code in "Container trainer for pod a/b failed with exit code 65 matching FailJob rule at index 2".
fn exit_code(message: &str) -> Option<i32> {
    let rest = message.split_once("exit code ")?.1;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// A failure that the operator has found; what the last attempt said is kept in the message.
fn operator_failure(reason: Reason, message: &str, last: Option<FailureStatus>) -> FailureStatus {
    let text = match &last {
        Some(last) if !last.message.is_empty() => format!("{message}; the last failure: {}: {}", last.reason, last.message),
        _ => message.to_owned(),
    };
    FailureStatus {
        reason,
        exit_code: last.as_ref().and_then(|last| last.exit_code),
        node: last.as_ref().and_then(|last| last.node.clone()),
        message: clean(&text, 1024),
        attempt: last.and_then(|last| last.attempt),
    }
}

/// Notes why the newest attempt failed, or why there is none.
pub(super) fn last_failure(after: &mut FineTuneJobStatus, inputs: &Inputs<'_>, refusal: Option<&Refusal>) {
    let Inputs { world, attempts, .. } = *inputs;
    let tried = after.failure.as_ref().is_some_and(|failure| failure.attempt.is_some());
    match (refusal, inputs.validated) {
        _ if tried => {}
        // Not the end: another operator, or other settings of this one, may judge otherwise.
        (Some(Refusal { cause, message, .. }), _) => after.failure = Some(operator_failure(*cause, message, None)),
        (None, Err(_)) => {}
        (None, Ok(_)) => after.failure = None,
    }
    let Some((attempt, number)) = attempts.last_failure() else { return };
    let message = match (attempt.reason, pod_of(world, &attempt.pod_uid)) {
        (Some(Reason::NoProgress), _) => {
            let limit = inputs.job.spec.progress_deadline_seconds.unwrap_or_default();
            format!("the trainer finished no step within progressDeadlineSeconds ({limit}), and was stopped")
        }
        (_, Some(pod)) => failure_message(pod),
        (_, None) => return,
    };
    after.failure = Some(FailureStatus {
        reason: attempt.reason.unwrap_or(Reason::TrainerCrashed),
        exit_code: attempt.exit_code,
        node: attempt.node.clone(),
        message,
        attempt: Some(number),
    });
}

fn pod_of<'a>(world: &'a World, uid: &str) -> Option<&'a Pod> {
    world.pods.iter().map(AsRef::as_ref).find(|pod| pod.metadata.uid.as_deref() == Some(uid))
}

/// The last words of the newest pod that has ended.
pub(super) fn last_words(world: &World, attempts: &Attempts) -> Option<Progress> {
    let ended = attempts.history.iter().rev().find(|attempt| matches!(attempt.cause, Some(cause) if cause != AttemptCause::Lost))?;
    termination_report(pod_of(world, &ended.pod_uid)?)
}
