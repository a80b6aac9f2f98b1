//! Why a job failed, and the exit codes with which the trainer says so.

use super::closed_enum::closed_enum;

closed_enum! {
    /// Why a trainer ended, or a job failed. The same word is the condition's reason, the event's reason and the metric's label.
    Reason {
        /// The spec asks for something that cannot be done; the message names the field.
        InvalidConfig,
        /// The dataset has unusable lines or pictures, or none; every one is listed.
        InvalidDataset,
        /// The dataset differs from `expectedDigest`, or from the one that the checkpoints were made with.
        DatasetChanged,
        /// The base model's files differ from those that the checkpoints were made with.
        ModelChanged,
        /// The model, the dataset or a required checkpoint is not where the spec says.
        NotFound,
        /// The model's files are incomplete, damaged, or of a kind that is not supported.
        ModelLoadFailed,
        /// The bucket or the hub refuses the credentials, or a licence has not been accepted.
        PermissionDenied,
        /// The bucket or the hub cannot be reached, or fails; tried again with pauses before giving up.
        StorageUnavailable,
        /// The job asked for a GPU and the trainer cannot use one.
        GPUUnavailable,
        /// No division of the work fits the memory budget; the message has the numbers.
        GPUTooSmall,
        /// The GPU's memory was exhausted in spite of the plan.
        GPUOutOfMemory,
        /// The pod was killed for using more memory than `resources.limits.memory`.
        HostOutOfMemory,
        /// The loss or the gradients are no longer finite numbers, or the loss ended at more than twice that of the base model.
        Diverged,
        /// The output folder holds the result of another spec or dataset, or any result where `existing: Fail`.
        OutputExists,
        /// Another job that is at work has the same output folder; the message names it. Nothing of either is lost.
        OutputInUse,
        /// Asked to end; a checkpoint was saved first. Not a failure: another pod continues.
        Interrupted,
        /// A newer attempt has taken over the output folder; this one stopped and wrote nothing more. Not a failure.
        Superseded,
        /// More failures than `failurePolicy.maxRetries`.
        RetriesExhausted,
        /// More restarts within an hour than `failurePolicy.maxRestartsPerHour`.
        RestartStorm,
        /// Ran longer than `activeDeadlineSeconds`.
        DeadlineExceeded,
        /// Held GPUs for as long as `maxGPUSeconds` allows, all attempts together; a checkpoint was saved first.
        GPUSecondsExceeded,
        /// Waited longer than `startDeadlineSeconds`.
        StartDeadlineExceeded,
        /// The trainer finished no step within `progressDeadlineSeconds`; the operator has stopped it, and another attempt follows.
        NoProgress,
        /// The bucket refuses credentials that it had accepted before: they have expired or were revoked. Another attempt reads the Secret anew.
        PermissionLost,
        /// The trainer ended in a way that has no other name; see its log.
        TrainerCrashed,
    }
}

/// What follows from a trainer's end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Retry {
    /// The job fails at once: another attempt would end in the same way.
    Never,
    /// Another attempt, counted against `failurePolicy.maxRetries`.
    Counted,
    /// Another attempt, not counted.
    Free,
}

impl Reason {
    /// Exit code with which the trainer (and `finetune run`) ends for this reason. Reasons that only the operator gives have the code of
    /// [`Reason::TrainerCrashed`].
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::GPUOutOfMemory | Self::GPUTooSmall => 12,
            Self::Diverged => 13,
            Self::InvalidDataset | Self::DatasetChanged | Self::ModelChanged => 65,
            Self::NotFound | Self::ModelLoadFailed => 66,
            Self::StorageUnavailable | Self::PermissionLost => 69,
            Self::GPUUnavailable => 71,
            Self::Interrupted | Self::Superseded => 75,
            Self::PermissionDenied => 77,
            Self::InvalidConfig | Self::OutputExists | Self::OutputInUse => 78,
            Self::HostOutOfMemory => 137,
            Self::RetriesExhausted
            | Self::RestartStorm
            | Self::DeadlineExceeded
            | Self::GPUSecondsExceeded
            | Self::StartDeadlineExceeded
            | Self::NoProgress
            | Self::TrainerCrashed => 1,
        }
    }

    /// The reason that an exit code stands for where the trainer left no message; `None` for 0, which is success.
    ///
    /// 137 is a crash here: the kernel's kill for lack of memory is recognised by the container's `OOMKilled`, not by the code.
    pub const fn from_exit_code(code: i32) -> Option<Self> {
        Some(match code {
            0 => return None,
            12 => Self::GPUOutOfMemory,
            13 => Self::Diverged,
            64 | 78 => Self::InvalidConfig,
            65 => Self::InvalidDataset,
            66 => Self::NotFound,
            69 => Self::StorageUnavailable,
            71 => Self::GPUUnavailable,
            75 => Self::Interrupted,
            77 => Self::PermissionDenied,
            _ => Self::TrainerCrashed,
        })
    }

    /// What follows when a trainer ends for this reason.
    pub const fn retry(self) -> Retry {
        match self {
            Self::Interrupted | Self::Superseded => Retry::Free,
            Self::StorageUnavailable | Self::PermissionLost | Self::GPUUnavailable | Self::HostOutOfMemory | Self::NoProgress | Self::TrainerCrashed => {
                Retry::Counted
            }
            _ => Retry::Never,
        }
    }

    /// Exit codes after which another attempt would end in the same way: `FailJob` in the Job's `podFailurePolicy`.
    pub const PERMANENT_EXIT_CODES: [i32; 7] = [12, 13, 64, 65, 66, 77, 78];

    /// Exit code after a checkpoint on request: `Ignore` in the Job's `podFailurePolicy`.
    pub const INTERRUPTED_EXIT_CODE: i32 = 75;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_code_has_a_reason_except_success() {
        assert_eq!(Reason::from_exit_code(0), None);
        for code in (-300..600).filter(|&code| code != 0) {
            assert!(Reason::from_exit_code(code).is_some(), "{code}");
        }
    }

    #[test]
    fn codes_and_reasons_agree_on_what_follows() {
        for &reason in Reason::ALL {
            let code = i32::from(reason.exit_code());
            let permanent = Reason::PERMANENT_EXIT_CODES.contains(&code);
            let operator_only = matches!(
                reason,
                Reason::RetriesExhausted | Reason::RestartStorm | Reason::DeadlineExceeded | Reason::GPUSecondsExceeded | Reason::StartDeadlineExceeded
            );
            if !operator_only {
                assert_eq!(permanent, reason.retry() == Retry::Never, "{reason}");
                assert_eq!(code == Reason::INTERRUPTED_EXIT_CODE, reason.retry() == Retry::Free, "{reason}");
                assert_eq!(Reason::from_exit_code(code).unwrap().retry(), reason.retry(), "{reason}");
            }
        }
    }

    #[test]
    fn names_are_those_of_the_api() {
        assert_eq!(Reason::GPUOutOfMemory.to_string(), "GPUOutOfMemory");
        assert_eq!(serde_json::to_value(Reason::GPUOutOfMemory).unwrap(), "GPUOutOfMemory");
        assert_eq!(Reason::parse("Diverged"), Some(Reason::Diverged));
        assert_eq!(Reason::parse("diverged"), None);
        assert!(Reason::ALL.iter().all(|reason| !reason.doc().trim().is_empty()));
    }
}
