//! What the operator reports.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::lenient::{self, UnknownName};
use super::{OutputFormat, Reason};

/// What the operator knows of a job. The conditions are the API; `phase` is derived from them.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FineTuneJobStatus {
    /// The `metadata.generation` that this status is about. -1: no operator has seen the job.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the job is, in one word.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Why the job is not running, in one word: what it failed of, or what it waits for; the conditions have the details.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub reason: Option<String>,
    /// SHA-256 of what determines the weights; also in the bucket's `result.json`.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub spec_hash: Option<String>,
    /// SHA-256 of the metadata file and of every picture that it names.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub dataset_digest: Option<String>,
    /// Image of the trainer, fixed at the first start, and again when `spec.image` was changed while suspended.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub trainer_image: Option<String>,
    /// `spec.image` when `trainerImage` was fixed; empty for the operator's default.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub trainer_image_from: Option<String>,
    /// Version of the configuration that this image is given. An operator that makes another version starts the image anew, too.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub config_version: Option<u32>,
    /// When the first pod started.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the job ended.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// The batch Job.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub job_ref: Option<JobRef>,
    /// The Kueue queue and workload.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub queue: Option<QueueStatus>,
    /// Attempts counted.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub attempts: Option<AttemptCounts>,
    /// The last 20 attempts.
    #[serde(default, deserialize_with = "lenient::list", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20))]
    pub attempt_history: Vec<Attempt>,
    /// What the job has used.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub usage: Option<UsageStatus>,
    /// Nodes on which the job runs.
    #[serde(default, deserialize_with = "lenient::list", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub nodes: Vec<String>,
    /// How far training is.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// The newest checkpoint.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub last_checkpoint: Option<CheckpointStatus>,
    /// Published files.
    #[serde(default, deserialize_with = "lenient::list", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub artifacts: Vec<ArtifactStatus>,
    /// Why the last attempt failed, or why none is made.
    #[serde(default, deserialize_with = "lenient::field", skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureStatus>,
    /// The state in detail.
    #[serde(default, deserialize_with = "lenient::list", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Where the job is, in one word.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Phase {
    /// Accepted, nothing created yet.
    Pending,
    /// Waits for quota in a Kueue queue.
    Queued,
    /// A pod is being scheduled or prepares.
    Starting,
    /// Trains.
    Running,
    /// Suspended by its user.
    Suspended,
    /// The LoRA is in the bucket.
    Succeeded,
    /// Ended without one.
    Failed,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 7] = [Self::Pending, Self::Queued, Self::Starting, Self::Running, Self::Suspended, Self::Succeeded, Self::Failed];

    /// The phase's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Queued => "Queued",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Suspended => "Suspended",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

/// The batch Job.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JobRef {
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
}

/// The Kueue queue and workload.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct QueueStatus {
    /// Name of the queue.
    pub name: String,
    /// Name of the Workload, once it exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
}

/// Attempts counted.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptCounts {
    /// Pods that started.
    pub started: u32,
    /// Pods that ended by disruption, or after a checkpoint on request; they do not count as failures.
    pub disrupted: u32,
    /// Pods that failed; compared with `failurePolicy.maxRetries`.
    pub failed: u32,
}

/// What a job has used, by the times of its pods.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UsageStatus {
    /// Seconds for which the job has held GPUs, all attempts together: from the start of each trainer to its end, times its GPUs. Of one that runs, until it
    /// was last heard.
    pub gpu_seconds: u64,
    /// Of these, the seconds of the attempts that have ended.
    #[serde(rename = "endedGPUSeconds")]
    pub ended_gpu_seconds: u64,
}

/// One pod of the job.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// UID of the pod.
    #[serde(rename = "podUID")]
    pub pod_uid: String,
    /// UID of its batch Job.
    #[serde(rename = "jobUID")]
    pub job_uid: String,
    /// Node on which it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// GPUs that it held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpus: Option<u32>,
    /// When its trainer started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_time: Option<Time>,
    /// How it ended.
    #[serde(default, deserialize_with = "lenient::optional_name", skip_serializing_if = "Option::is_none")]
    pub cause: Option<AttemptCause>,
    /// Exit code of its trainer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Reason of a failure, or why the operator has stopped it.
    #[serde(default, deserialize_with = "lenient::optional_name", skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum AttemptCause {
    /// The trainer ended well.
    Succeeded,
    /// Evicted, preempted, drained, or its node was lost.
    Disrupted,
    /// Ended when asked to, with a checkpoint if there was something to save.
    Checkpointed,
    /// Stopped because a newer attempt had taken over.
    Superseded,
    /// Ended by suspension.
    Suspended,
    /// Failed; counted.
    Failed,
    /// Vanished before its end was seen.
    Lost,
}

impl UnknownName for AttemptCause {
    /// It has ended.
    const UNKNOWN: Self = Self::Lost;
}

impl UnknownName for Reason {
    const UNKNOWN: Self = Self::TrainerCrashed;
}

impl AttemptCause {
    /// Whether it is the end of an attempt that was not counted, and after which another follows.
    pub const fn is_free(self) -> bool {
        matches!(self, Self::Disrupted | Self::Checkpointed | Self::Superseded | Self::Suspended | Self::Lost)
    }
}

/// How far training is. Numbers with fractions are strings; times are absolute, so that nothing needs rewriting each second.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgressStatus {
    /// Optimizer updates done.
    pub step: u64,
    /// Optimizer updates in all.
    pub total_steps: u64,
    /// Passes over the dataset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<String>,
    /// Share of the steps done, 0 to 100.
    pub percent: u32,
    /// When training will end at the present speed; absent while it does not train.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_completion_time: Option<Time>,
    /// Optimizer updates per second; absent while it does not train.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps_per_second: Option<String>,
    /// Smoothed training loss; absent of a job that does not train and has not succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<String>,
    /// Most memory that the trainer has held on its device, in MiB.
    #[serde(rename = "peakMemoryMiB", skip_serializing_if = "Option::is_none")]
    pub peak_memory_mib: Option<u64>,
    /// Samples per forward pass; fewer than the batch where the batch does not fit the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<u32>,
    /// Blocks of the transformer that are computed again in the backward pass, to save memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recomputed_blocks: Option<u32>,
    /// Captions that are longer than the text encoders read, so that their ends are not trained; the trainer's log and `finetune validate` name them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncated_captions: Option<u64>,
    /// "900/2000 (45%)".
    pub summary: String,
    /// When the trainer was last asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_report_time: Option<Time>,
}

/// A checkpoint.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointStatus {
    /// Optimizer updates done.
    pub step: u64,
    /// Where it is.
    #[schemars(length(max = 2048))]
    pub uri: String,
    /// Digest of its manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// When it was saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
}

/// A published file.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactStatus {
    /// Its format.
    pub format: OutputFormat,
    /// Where it is.
    #[schemars(length(max = 2048))]
    pub uri: String,
    /// Its digest.
    pub sha256: String,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// Why an attempt failed.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureStatus {
    /// The cause, in one word.
    #[serde(deserialize_with = "lenient::name")]
    pub reason: Reason,
    /// Exit code of the trainer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Node on which it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What happened and what to do.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// Which attempt, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// What an operator of this version writes: newer ones must be able to read all of it.
    const STORED: &str = include_str!("samples/v1alpha1-status.json");

    #[test]
    fn the_stored_status_of_this_version_is_read_without_loss() {
        let stored: Value = serde_json::from_str(STORED).unwrap();
        let read: FineTuneJobStatus = serde_json::from_value(stored.clone()).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), stored);
    }

    #[test]
    fn what_a_newer_version_has_written_is_left_out_and_nothing_else() {
        let stored: FineTuneJobStatus = serde_json::from_str(STORED).unwrap();
        let read = |change: &dyn Fn(&mut Value)| -> FineTuneJobStatus {
            let mut value: Value = serde_json::from_str(STORED).unwrap();
            change(&mut value);
            serde_json::from_value(value).unwrap()
        };
        assert_eq!(read(&|status| status["surprise"] = json!({"a": 1})), stored);
        assert_eq!(read(&|status| status["phase"] = json!("Paused")), FineTuneJobStatus { phase: None, ..stored.clone() });
        assert_eq!(read(&|status| status["progress"] = json!({"steps": 1})), FineTuneJobStatus { progress: None, ..stored.clone() });
        assert_eq!(read(&|status| status["attemptHistory"][0]["cause"] = json!("Migrated")).attempt_history[0].cause, Some(AttemptCause::Lost), "it has ended");
        assert_eq!(read(&|status| status["failure"]["reason"] = json!("Surprise")).failure.unwrap().reason, Reason::TrainerCrashed);
        assert!(read(&|status| status["artifacts"][0]["format"] = json!("Surprise")).artifacts.is_empty());
        assert_eq!(read(&|status| status["conditions"][0] = json!(7)).conditions.len() + 1, stored.conditions.len());
    }
}
