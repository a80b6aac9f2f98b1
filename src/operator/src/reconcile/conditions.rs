//! Conditions as data: a list that is built anew each time, whose transition times come from the list before.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use finetune_api::{AdmittedReason, ConditionType, FailureStatus, JobCreatedReason, Phase, PodsScheduledReason, RunningReason, clean};

/// Longest message of a condition.
const MESSAGE: usize = 1024;

/// A condition's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truth {
    /// "True".
    True,
    /// "False".
    False,
    /// "Unknown".
    Unknown,
}

impl Truth {
    /// The API's text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Truth {
    fn from(value: bool) -> Self {
        if value { Self::True } else { Self::False }
    }
}

/// Builds the list. What is not set is dropped, unless it is kept by name.
#[derive(Debug)]
pub struct Builder<'a> {
    before: &'a [Condition],
    generation: Option<i64>,
    now: Timestamp,
    list: Vec<Condition>,
}

impl<'a> Builder<'a> {
    /// Starts from the list before.
    pub fn new(before: &'a [Condition], generation: Option<i64>, now: Timestamp) -> Self {
        Self { before, generation, now, list: Vec::new() }
    }

    /// Sets a condition. Its transition time changes only with its status.
    pub fn set(&mut self, type_: ConditionType, status: Truth, reason: &str, message: &str) {
        let before = find(self.before, type_);
        let since = before.filter(|before| before.status == status.as_str()).map_or(self.now, |before| before.last_transition_time.0);
        self.list.retain(|condition| condition.type_ != type_.as_str());
        self.list.push(Condition {
            type_: type_.as_str().to_owned(),
            status: status.as_str().to_owned(),
            reason: reason.to_owned(),
            message: clean(message, MESSAGE),
            last_transition_time: Time(since),
            observed_generation: self.generation,
        });
    }

    /// Keeps a condition as it was, if it was there.
    pub fn keep(&mut self, type_: ConditionType) {
        if let Some(before) = find(self.before, type_)
            && find(&self.list, type_).is_none()
        {
            self.list.push(Condition { observed_generation: self.generation, ..before.clone() });
        }
    }

    /// Keeps what `PodsScheduled` says of a pod that exists: that an earlier one was refused is over.
    pub fn keep_scheduling(&mut self) {
        if !find(self.before, ConditionType::PodsScheduled).is_some_and(is_refusal) {
            self.keep(ConditionType::PodsScheduled);
        }
    }

    /// Reason and message of a condition that was set to False.
    pub fn false_of(&self, type_: ConditionType) -> Option<(String, String)> {
        find(&self.list, type_).filter(|condition| condition.status == "False").map(|condition| (condition.reason.clone(), condition.message.clone()))
    }

    /// Reason and message of what keeps a pod from being created or from starting.
    pub fn cannot_start(&self) -> Option<(&str, &str)> {
        cannot_start(&self.list)
    }

    /// The list, in the order of the documentation.
    pub fn build(mut self) -> Vec<Condition> {
        self.list.sort_by_key(|condition| ConditionType::ALL.iter().position(|type_| type_.as_str() == condition.type_));
        self.list
    }
}

/// The condition of that type.
pub fn find(list: &[Condition], type_: ConditionType) -> Option<&Condition> {
    list.iter().find(|condition| condition.type_ == type_.as_str())
}

/// Whether the condition of that type is True.
pub fn is_true(list: &[Condition], type_: ConditionType) -> bool {
    find(list, type_).is_some_and(|condition| condition.status == "True")
}

/// Whether the condition of that type is False.
pub fn is_false(list: &[Condition], type_: ConditionType) -> bool {
    find(list, type_).is_some_and(|condition| condition.status == "False")
}

/// Whether the job has ended: these conditions are never taken back. A job that cannot be carried out has failed and has not ended: another version or
/// other settings of the operator may judge otherwise.
pub fn is_terminal(list: &[Condition]) -> bool {
    is_true(list, ConditionType::Complete) || (is_true(list, ConditionType::Failed) && !is_false(list, ConditionType::Validated))
}

/// Reasons of `PodsScheduled` of a pod that exists: whether it gets a node is the scheduler's to say.
const SCHEDULING: [PodsScheduledReason; 2] = [PodsScheduledReason::Unschedulable, PodsScheduledReason::NoMatchingGPUNode];
/// Reasons of `Running` of a pod that cannot start until somebody does something.
const STUCK: [RunningReason; 7] = [
    RunningReason::ImagePullBackOff,
    RunningReason::CreateContainerError,
    RunningReason::SecretNotFound,
    RunningReason::ConfigMapNotFound,
    RunningReason::VolumeNotFound,
    RunningReason::VolumeMountFailed,
    RunningReason::PodSandboxFailed,
];
/// Reasons of `Running` that say more than the phase does.
const TELLING: [RunningReason; 6] = [
    RunningReason::NodeLost,
    RunningReason::Restarting,
    RunningReason::NoProgress,
    RunningReason::ProgressUnknown,
    RunningReason::StartingOnWorkerCluster,
    RunningReason::RunningOnWorkerCluster,
];
/// Reasons of `Running` of a pod that runs, though it does not train, or nobody knows.
const RUNS: [RunningReason; 3] = [RunningReason::ProgressUnknown, RunningReason::Publishing, RunningReason::RunningOnWorkerCluster];

/// Whether a reason of `Running` is that of a pod that cannot start.
pub fn is_stuck(reason: &str) -> bool {
    STUCK.iter().any(|stuck| stuck.as_str() == reason)
}

/// Whether `PodsScheduled` says that there is no pod, since it is refused.
fn is_refusal(condition: &Condition) -> bool {
    condition.status == "False" && !SCHEDULING.iter().any(|reason| reason.as_str() == condition.reason)
}

/// Reason and message of what keeps a pod from being created or from starting, other than the lack of a node.
pub fn cannot_start(list: &[Condition]) -> Option<(&str, &str)> {
    let refused = find(list, ConditionType::PodsScheduled).filter(|condition| is_refusal(condition));
    let stuck = || find(list, ConditionType::Running).filter(|condition| condition.status == "False" && is_stuck(&condition.reason));
    refused.or_else(stuck).map(|condition| (condition.reason.as_str(), condition.message.as_str()))
}

/// Why the job is not running, in one word: what it failed of, or what it waits for. `None` where the phase says it all.
pub fn reason(list: &[Condition], failure: Option<&FailureStatus>) -> Option<String> {
    if is_true(list, ConditionType::Failed) || is_false(list, ConditionType::Validated) {
        let of = |type_| find(list, type_).map(|condition| condition.reason.clone());
        return failure.map(|failure| failure.reason.to_string()).or_else(|| of(ConditionType::Failed)).or_else(|| of(ConditionType::Validated));
    }
    if is_true(list, ConditionType::Complete) || is_true(list, ConditionType::Suspended) {
        return None;
    }
    let held = [ConditionType::JobCreated, ConditionType::Admitted, ConditionType::PodsScheduled];
    let waits = held.into_iter().filter_map(|type_| find(list, type_)).find(|condition| condition.status == "False");
    let running = || {
        let telling = |condition: &&Condition| is_stuck(&condition.reason) || TELLING.iter().any(|reason| reason.as_str() == condition.reason);
        find(list, ConditionType::Running).filter(telling)
    };
    waits.or_else(running).map(|condition| condition.reason.clone())
}

/// The phase is a summary of the conditions, and of nothing else.
pub fn phase(list: &[Condition]) -> Phase {
    let reason = |type_| find(list, type_).map(|condition| condition.reason.as_str()).unwrap_or_default();
    if is_true(list, ConditionType::Complete) {
        Phase::Succeeded
    } else if is_true(list, ConditionType::Failed) || is_false(list, ConditionType::Validated) {
        Phase::Failed
    } else if is_true(list, ConditionType::Suspended) {
        Phase::Suspended
    } else if is_true(list, ConditionType::Running) || RUNS.iter().any(|runs| runs.as_str() == reason(ConditionType::Running)) {
        Phase::Running
    } else if reason(ConditionType::JobCreated) == JobCreatedReason::NameConflict.as_str() {
        Phase::Pending
    } else if is_false(list, ConditionType::Admitted)
        && (is_true(list, ConditionType::JobCreated) || reason(ConditionType::Admitted) == AdmittedReason::KueueNotInstalled.as_str())
    {
        Phase::Queued
    } else if is_true(list, ConditionType::JobCreated) || find(list, ConditionType::PodsScheduled).is_some() {
        Phase::Starting
    } else {
        Phase::Pending
    }
}

/// Since when the phase is what it is: since the last change of those conditions that decide it. `None` where none of them is set.
pub fn phase_since(list: &[Condition]) -> Option<Timestamp> {
    const DECISIVE: [ConditionType; 7] = [
        ConditionType::Validated,
        ConditionType::JobCreated,
        ConditionType::Admitted,
        ConditionType::Running,
        ConditionType::Suspended,
        ConditionType::Complete,
        ConditionType::Failed,
    ];
    DECISIVE.iter().filter_map(|type_| find(list, *type_)).map(|condition| condition.last_transition_time.0).max()
}

/// Whether the trainer runs and does not answer.
pub fn is_progress_unknown(list: &[Condition]) -> bool {
    find(list, ConditionType::Running).is_some_and(|condition| condition.reason == RunningReason::ProgressUnknown.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn a_phase_is_as_old_as_the_last_change_of_what_decides_it() {
        let set = |before: &[Condition], now, type_, truth, reason| {
            let mut list = Builder::new(before, Some(1), time(now));
            for type_ in ConditionType::ALL {
                list.keep(*type_);
            }
            list.set(type_, truth, reason, "");
            list.build()
        };
        assert_eq!(phase_since(&[]), None);
        let created = set(&[], 10, ConditionType::JobCreated, Truth::True, "Created");
        let starting = set(&created, 11, ConditionType::Running, Truth::False, "Starting");
        let pulling = set(&starting, 60, ConditionType::Running, Truth::False, "PullingImage");
        let scheduled = set(&pulling, 70, ConditionType::PodsScheduled, Truth::True, "Scheduled");
        assert_eq!((phase(&scheduled), phase_since(&scheduled)), (Phase::Starting, Some(time(11))), "neither a reason nor a node makes it younger");
        let unknown = set(&scheduled, 80, ConditionType::Running, Truth::Unknown, "ProgressUnknown");
        assert_eq!((phase_since(&unknown), is_progress_unknown(&unknown), is_progress_unknown(&scheduled)), (Some(time(80)), true, false));
    }

    #[test]
    fn a_transition_time_changes_with_the_status_only() {
        let mut first = Builder::new(&[], Some(1), time(10));
        first.set(ConditionType::Running, Truth::False, "Starting", "a");
        let first = first.build();
        let mut second = Builder::new(&first, Some(2), time(20));
        second.set(ConditionType::Running, Truth::False, "PullingImage", "b");
        let second = second.build();
        assert_eq!((second[0].last_transition_time.0, second[0].reason.as_str(), second[0].observed_generation), (time(10), "PullingImage", Some(2)));
        let mut third = Builder::new(&second, Some(2), time(30));
        third.set(ConditionType::Running, Truth::True, "Training", "");
        assert_eq!(third.build()[0].last_transition_time.0, time(30));
    }

    #[test]
    fn conditions_have_one_order_and_drop_what_is_not_set() {
        let mut first = Builder::new(&[], None, time(0));
        first.set(ConditionType::Stalled, Truth::False, "NotStalled", "");
        first.set(ConditionType::Checkpointed, Truth::True, "Saved", "");
        first.set(ConditionType::Validated, Truth::True, "SpecAccepted", "");
        let first = first.build();
        let types: Vec<&str> = first.iter().map(|condition| condition.type_.as_str()).collect();
        assert_eq!(types, ["Validated", "Checkpointed", "Stalled"]);
        let mut second = Builder::new(&first, None, time(0));
        second.keep(ConditionType::Checkpointed);
        second.keep(ConditionType::Running);
        assert_eq!(second.build().len(), 1);
    }

    #[test]
    fn messages_are_cleaned_and_bounded() {
        let mut builder = Builder::new(&[], None, time(0));
        builder.set(ConditionType::Failed, Truth::True, "InvalidDataset", &format!("line 1\n{}", "x".repeat(5000)));
        let list = builder.build();
        assert!(list[0].message.starts_with("line 1 x") && list[0].message.len() == 1024);
    }

    #[test]
    fn the_phase_follows_from_the_conditions() {
        use ConditionType as C;
        type Case<'a> = (&'a [(C, bool, &'a str)], Phase);
        let list = |set: &[(C, bool, &str)]| {
            let mut builder = Builder::new(&[], None, time(0));
            for (type_, truth, reason) in set {
                builder.set(*type_, (*truth).into(), reason, "");
            }
            builder.build()
        };
        let cases: [Case<'_>; 12] = [
            (&[], Phase::Pending),
            (&[(C::Validated, true, "SpecAccepted")], Phase::Pending),
            (&[(C::Validated, false, "InvalidSpec")], Phase::Failed),
            (&[(C::JobCreated, false, "NameConflict"), (C::Admitted, true, "NoQueue")], Phase::Pending),
            (&[(C::JobCreated, true, "Created"), (C::Admitted, false, "WaitingForQuota")], Phase::Queued),
            (&[(C::JobCreated, false, "ApiError"), (C::Admitted, false, "KueueNotInstalled")], Phase::Queued),
            (&[(C::JobCreated, true, "Created"), (C::Admitted, true, "NoQueue"), (C::Running, false, "Starting")], Phase::Starting),
            (&[(C::JobCreated, true, "Created"), (C::Running, true, "Training")], Phase::Running),
            (&[(C::JobCreated, true, "Created"), (C::Running, true, "Training"), (C::Suspended, false, "Resumed")], Phase::Running),
            (&[(C::Suspended, true, "UserRequested"), (C::Running, false, "Suspended")], Phase::Suspended),
            (&[(C::Complete, true, "TrainingSucceeded"), (C::Running, false, "Finished")], Phase::Succeeded),
            (&[(C::Failed, true, "Diverged"), (C::Suspended, true, "UserRequested")], Phase::Failed),
        ];
        for (set, want) in cases {
            assert_eq!(phase(&list(set)), want, "{set:?}");
        }
    }
}
