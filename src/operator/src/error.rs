//! What can go wrong in the steps that talk to the API server, and what follows from it.

use std::time::Duration;

use finetune_api::JobCreatedReason;

/// An error of a reconciliation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or could not be reached.
    #[error("failed to {}", .operation.describe())]
    Api {
        /// What was tried.
        operation: Operation,
        /// Cause.
        #[source]
        source: Box<kube::Error>,
    },
    /// The API server did not answer.
    #[error("failed to {}: no answer within {limit:?}", .operation.describe())]
    TimedOut {
        /// What was tried.
        operation: Operation,
        /// How long was waited.
        limit: Duration,
    },
    /// This process holds the lease no longer: it must not write.
    #[error("failed to {}: the leader lease was not renewed in time", .operation.describe())]
    NotLeading {
        /// What was tried.
        operation: Operation,
    },
    /// The object in the API server is not a FineTuneJob that this version can read.
    #[error("failed to read the FineTuneJob: {message}")]
    Unreadable {
        /// Cause, in the deserialiser's words.
        message: String,
    },
}

/// What is to be done about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Nothing until the object changes.
    AwaitChange,
    /// Again, with growing pauses.
    Backoff,
}

/// A call of the API server; also the name of the fault points around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Read the FineTuneJob itself.
    GetLive,
    /// Read the pods themselves.
    ListPods,
    /// List the events about a Job without a pod, or a pod that does not start.
    ListEvents,
    /// Create the Job.
    CreateJob,
    /// Read the Job that was in the way.
    GetJob,
    /// Patch the Job.
    PatchJob,
    /// Delete the Job.
    DeleteJob,
    /// Write the status.
    WriteStatus,
    /// Publish an event.
    PublishEvent,
    /// Set the Job's time to live.
    PatchTtl,
    /// Delete the FineTuneJob (`ttlScope: All`).
    DeleteSelf,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 11] = [
        Self::GetLive,
        Self::ListPods,
        Self::ListEvents,
        Self::CreateJob,
        Self::GetJob,
        Self::PatchJob,
        Self::DeleteJob,
        Self::WriteStatus,
        Self::PublishEvent,
        Self::PatchTtl,
        Self::DeleteSelf,
    ];

    /// Label of metrics and name of fault points.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GetLive => "get_live",
            Self::ListPods => "list_pods",
            Self::ListEvents => "list_events",
            Self::CreateJob => "create_job",
            Self::GetJob => "get_job",
            Self::PatchJob => "patch_job",
            Self::DeleteJob => "delete_job",
            Self::WriteStatus => "write_status",
            Self::PublishEvent => "publish_event",
            Self::PatchTtl => "patch_ttl",
            Self::DeleteSelf => "delete_self",
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::GetLive => "get the FineTuneJob",
            Self::ListPods => "list the job's pods",
            Self::ListEvents => "list the events about the pod",
            Self::CreateJob => "create the Job",
            Self::GetJob => "get the Job",
            Self::PatchJob => "patch the Job",
            Self::DeleteJob => "delete the Job",
            Self::WriteStatus => "write the status",
            Self::PublishEvent => "publish an event",
            Self::PatchTtl => "set the Job's time to live",
            Self::DeleteSelf => "delete the finished FineTuneJob",
        }
    }

    /// Whether it changes anything.
    pub fn is_write(self) -> bool {
        !matches!(self, Self::GetLive | Self::ListPods | Self::ListEvents | Self::GetJob)
    }
}

impl Error {
    /// Label of `finetune_reconcile_errors_total`.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Api { operation, .. } => operation.as_str(),
            Self::TimedOut { .. } => "timed_out",
            Self::NotLeading { .. } => "not_leading",
            Self::Unreadable { .. } => "unreadable",
        }
    }

    /// What follows.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Unreadable { .. } => Retry::AwaitChange,
            Self::Api { .. } | Self::TimedOut { .. } | Self::NotLeading { .. } => Retry::Backoff,
        }
    }

    /// The API server's status, where it answered.
    fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            _ => None,
        }
    }

    /// The object exists already.
    pub fn is_already_exists(&self) -> bool {
        self.status().is_some_and(kube::core::Status::is_already_exists)
    }

    /// The object has changed, or is another one of that name.
    pub fn is_conflict(&self) -> bool {
        self.status().is_some_and(|status| status.is_conflict() && !status.is_already_exists())
    }

    /// The object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.status().is_some_and(kube::core::Status::is_not_found)
    }

    /// The API server finds the object itself invalid, and no policy or webhook of the cluster: that never gets better by itself.
    pub fn is_invalid(&self) -> bool {
        self.status().is_some_and(|status| status.is_invalid() && !is_admission(&status.message))
    }

    /// What the API server says, or the error.
    pub fn message(&self) -> String {
        self.status().map_or_else(|| self.to_string(), |status| status.message.clone())
    }

    /// What a refused creation means for `JobCreated`.
    pub fn not_created(&self) -> (JobCreatedReason, String) {
        let message = self.message();
        let reason = match self.status() {
            Some(status) if status.is_forbidden() && message.contains("exceeded quota") => JobCreatedReason::QuotaExceeded,
            Some(_) if is_admission(&message) => JobCreatedReason::AdmissionDenied,
            Some(status) if status.is_forbidden() => JobCreatedReason::Forbidden,
            _ => JobCreatedReason::ApiError,
        };
        (reason, message)
    }
}

/// Whether a refusal comes from a policy or a webhook of the cluster. Policies say "Invalid" where they do not choose another word.
fn is_admission(message: &str) -> bool {
    ["admission webhook", "failed calling webhook", "ValidatingAdmissionPolicy"].iter().any(|words| message.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: u16, reason: &str, message: &str) -> Error {
        let status = kube::core::Status { code, reason: reason.into(), message: message.into(), ..kube::core::Status::default() };
        Error::Api { operation: Operation::CreateJob, source: Box::new(kube::Error::Api(Box::new(status))) }
    }

    #[test]
    fn a_refused_creation_has_a_reason() {
        let cases = [
            (
                refused(403, "Forbidden", "jobs.batch \"a-train\" is forbidden: exceeded quota: q, requested: count/jobs.batch=1"),
                JobCreatedReason::QuotaExceeded,
            ),
            (refused(403, "Forbidden", "jobs.batch is forbidden: User \"x\" cannot create resource"), JobCreatedReason::Forbidden),
            (
                refused(422, "Invalid", "jobs \"a\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no"),
                JobCreatedReason::AdmissionDenied,
            ),
            (refused(403, "Forbidden", "admission webhook \"w\" denied the request: no"), JobCreatedReason::AdmissionDenied),
            (refused(500, "InternalError", "etcdserver: request timed out"), JobCreatedReason::ApiError),
            (Error::TimedOut { operation: Operation::CreateJob, limit: Duration::from_secs(1) }, JobCreatedReason::ApiError),
        ];
        for (error, want) in cases {
            assert_eq!(error.not_created().0, want, "{error}");
        }
    }

    #[test]
    fn an_invalid_object_is_told_apart_from_a_policy() {
        assert!(refused(422, "Invalid", "Job.batch \"a-train\" is invalid: spec.template.labels: Invalid value").is_invalid());
        assert!(!refused(422, "Invalid", "jobs \"a\" is forbidden: ValidatingAdmissionPolicy 'p' denied request: no").is_invalid());
        assert!(!refused(403, "Forbidden", "").is_invalid());
    }

    #[test]
    fn conflict_and_already_exists_are_told_apart() {
        let exists = refused(409, "AlreadyExists", "");
        assert!(exists.is_already_exists() && !exists.is_conflict());
        let conflict = refused(409, "Conflict", "");
        assert!(conflict.is_conflict() && !conflict.is_already_exists());
    }
}
