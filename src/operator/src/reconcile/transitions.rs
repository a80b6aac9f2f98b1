//! What a change of status means for events and metrics. Pure; only changes are reported.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::events::{Event, EventType};

use crate::reconcile::conditions::{find, is_false, is_stuck, is_terminal, is_true};
use crate::reconcile::usage;
use finetune_api::{Attempt, AttemptCause, ConditionType, FineTuneJobStatus, Reason, ResumePolicy, RunningReason, ValidatedReason, clean};

/// Longest note of an event, in bytes.
const NOTE: usize = 1000;

/// A metric to update.
#[derive(Debug, Clone, PartialEq)]
pub enum Measure {
    /// The job ended.
    Ended {
        /// "succeeded" or "failed".
        result: &'static str,
        /// The final condition's reason.
        reason: String,
        /// From its first running pod.
        duration: Option<Duration>,
    },
    /// Quota was reserved this long after the job was created or resumed.
    Admitted(Duration),
    /// The first pod started this long after the job was created.
    Started(Duration),
    /// Another attempt follows one that ended so.
    Restarted(&'static str),
    /// Attempts have ended that had held GPUs for so long.
    GpuSeconds(u64),
}

/// The events that tell of the change from `before` to `after`.
pub fn events(before: &FineTuneJobStatus, after: &FineTuneJobStatus, ended: &[Attempt], resume: ResumePolicy) -> Vec<Event> {
    let changed = |type_| changed(before, after, type_);
    let mut events = Vec::new();
    let followed = |what: &str| format!("{what}; {}", continuation(after, resume));
    let mut tell = |type_: EventType, action: &str, reason: &str, note: &str| {
        events.push(Event { type_, reason: reason.to_owned(), note: Some(clean(note, NOTE)), action: action.to_owned(), secondary: None });
    };
    if let Some(condition) = changed(ConditionType::Validated)
        && (condition.status == "False" || condition.reason == ValidatedReason::OutputShared.as_str())
    {
        tell(EventType::Warning, "Validate", &condition.reason, &condition.message);
    }
    if let Some(condition) = changed(ConditionType::JobCreated) {
        let type_ = if condition.status == "True" { EventType::Normal } else { EventType::Warning };
        let reason = if condition.status == "True" { "JobCreated" } else { condition.reason.as_str() };
        tell(type_, "CreateJob", reason, &condition.message);
    }
    if let Some(condition) = changed(ConditionType::Admitted)
        && after.queue.is_some()
    {
        let lost = ["Evicted", "Preempted"].contains(&condition.reason.as_str());
        tell(if lost { EventType::Warning } else { EventType::Normal }, "Queue", &condition.reason, &condition.message);
    }
    if let Some(condition) = changed(ConditionType::PodsScheduled)
        && condition.status == "False"
    {
        tell(EventType::Warning, "Schedule", &condition.reason, &condition.message);
    }
    for attempt in ended.iter().filter(|attempt| is_followed(attempt)) {
        let (reason, note) = match attempt.cause {
            Some(AttemptCause::Disrupted) => ("Disrupted", followed("the pod was evicted, preempted or deleted, or lost its node")),
            Some(AttemptCause::Checkpointed) => ("Interrupted", followed("the trainer was asked to end")),
            Some(AttemptCause::Superseded) => ("Superseded", followed("a newer attempt had taken over, and the trainer stopped")),
            Some(AttemptCause::Lost) => ("PodLost", followed("the pod vanished before its end was seen")),
            Some(AttemptCause::Failed) => (
                attempt.reason.map_or("TrainerCrashed", Reason::as_str),
                after.failure.as_ref().map_or_else(|| "the trainer failed".to_owned(), |failure| failure.message.clone()),
            ),
            Some(AttemptCause::Succeeded | AttemptCause::Suspended) | None => continue,
        };
        tell(EventType::Warning, "Train", reason, &note);
    }
    if let Some(condition) = changed(ConditionType::Running) {
        if is_stuck(&condition.reason) || condition.reason == RunningReason::NodeLost.as_str() {
            tell(EventType::Warning, "Train", &condition.reason, &condition.message);
        } else if condition.status == "True" && !is_true(&before.conditions, ConditionType::Running) {
            tell(EventType::Normal, "Train", &condition.reason, "the trainer trains");
        }
    }
    if let Some(condition) = changed(ConditionType::Suspended) {
        let reason = if condition.status == "True" { "Suspended" } else { "Resumed" };
        tell(EventType::Normal, "Suspend", reason, &condition.message);
    }
    // A job that cannot be carried out has said so above.
    let judged = !is_false(&after.conditions, ConditionType::Validated);
    for (type_, kind) in [(ConditionType::Complete, EventType::Normal), (ConditionType::Failed, EventType::Warning)] {
        if let Some(condition) = changed(type_).filter(|_| judged) {
            tell(kind, "Finish", &condition.reason, &condition.message);
        }
    }
    events
}

/// Where the next attempt begins. Without numbers: of an event that comes again the API keeps the first text.
fn continuation(after: &FineTuneJobStatus, resume: ResumePolicy) -> String {
    match &after.last_checkpoint {
        _ if resume == ResumePolicy::Never => "the next one starts from the beginning, as resume.policy: Never says".to_owned(),
        Some(_) => "the next one continues from the newest checkpoint".to_owned(),
        None => "no checkpoint had been saved, and the next one starts from the beginning".to_owned(),
    }
}

/// The metrics of the change from `before` to `after`. `created` is the job's creation.
pub fn measures(before: &FineTuneJobStatus, after: &FineTuneJobStatus, ended: &[Attempt], created: Option<Timestamp>, now: Timestamp) -> Vec<Measure> {
    let since = |time: Timestamp, until: Timestamp| Duration::try_from(until.duration_since(time)).unwrap_or_default();
    let mut measures = Vec::new();
    if let (None, Some(start), Some(created)) = (&before.start_time, &after.start_time, created) {
        measures.push(Measure::Started(since(created, start.0)));
    }
    if let (Some(condition), Some(_), Some(created)) = (changed(before, after, ConditionType::Admitted), &after.queue, created)
        && condition.status == "True"
    {
        // After an eviction or a suspension the queue is entered anew.
        let entered = find(&before.conditions, ConditionType::Admitted).map_or(created, |before| before.last_transition_time.0);
        measures.push(Measure::Admitted(since(entered, now)));
    }
    let used = after.usage.map_or(0, |usage| usage.ended_gpu_seconds).saturating_sub(usage::written(before).ended_gpu_seconds);
    if used > 0 {
        measures.push(Measure::GpuSeconds(used));
    }
    let terminal = is_terminal(&after.conditions);
    for attempt in ended.iter().filter(|attempt| is_followed(attempt)) {
        let cause = match attempt.cause {
            Some(AttemptCause::Disrupted) => "Disrupted",
            Some(AttemptCause::Checkpointed) => "Checkpointed",
            Some(AttemptCause::Superseded) => "Superseded",
            Some(AttemptCause::Suspended) => "Suspended",
            Some(AttemptCause::Lost) => "Lost",
            Some(AttemptCause::Failed) => "Failed",
            Some(AttemptCause::Succeeded) | None => continue,
        };
        if !terminal {
            measures.push(Measure::Restarted(cause));
        }
    }
    for (type_, result) in [(ConditionType::Complete, "succeeded"), (ConditionType::Failed, "failed")] {
        if let Some(condition) = changed(before, after, type_).filter(|_| terminal) {
            let duration = after.start_time.as_ref().map(|start| since(start.0, now));
            measures.push(Measure::Ended { result, reason: condition.reason.clone(), duration });
        }
    }
    measures
}

/// Whether another attempt may come after this one: not where the operator has stopped it for good.
fn is_followed(attempt: &Attempt) -> bool {
    attempt.reason != Some(Reason::GPUSecondsExceeded)
}

/// The condition after, if its status or reason has changed.
fn changed<'a>(before: &FineTuneJobStatus, after: &'a FineTuneJobStatus, type_: ConditionType) -> Option<&'a Condition> {
    let condition = find(&after.conditions, type_)?;
    let same = find(&before.conditions, type_).is_some_and(|before| before.status == condition.status && before.reason == condition.reason);
    (!same).then_some(condition)
}
