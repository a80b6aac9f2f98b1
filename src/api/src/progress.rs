//! What the trainer reports to the operator: `GET /progress` while it runs, the termination message when it ends.
//!
//! The operator treats it as untrusted: numbers are checked, control characters are taken out. And as the word of a neighbouring version: fields and
//! names that it does not know are left out, for the rest is still true.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{OutputFormat, Reason, clean};

/// Longest body of `/progress` that is read.
pub const PROGRESS_MAX_BYTES: usize = 16 * 1024;
/// Longest termination message that Kubernetes keeps.
pub const TERMINATION_MESSAGE_MAX_BYTES: usize = 4096;
/// Longest text field.
const TEXT_MAX_BYTES: usize = 1024;
/// Longest URI; the status has room for as long a one (its bound in the schema is this, too).
const URI_MAX_BYTES: usize = 2048;
/// A size beyond this is not believed: JSON has no larger whole number.
const SIZE_MAX: u64 = 1 << 53;
/// Most artifacts.
const ARTIFACTS_MAX: usize = 8;
/// Samples or blocks beyond this are not believed.
const DIVISION_MAX: u32 = 65_536;
/// Steps beyond this are not believed.
const STEPS_MAX: u64 = 1_000_000_000;

/// State of a trainer. The same type is the body of `/progress` and the termination message.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// What the trainer is doing.
    pub stage: Stage,
    /// Optimizer updates done.
    #[serde(default)]
    pub step: u64,
    /// Optimizer updates in all; 0 while unknown.
    #[serde(default)]
    pub total_steps: u64,
    /// Passes over the dataset, with the fraction of the present one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<f64>,
    /// Optimizer updates per second, smoothed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps_per_second: Option<f64>,
    /// Training loss, smoothed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// When training will end at the present speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimated_completion_time: Option<Timestamp>,
    /// Memory in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryReport>,
    /// Samples per forward pass; smaller than the batch where the batch does not fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<u32>,
    /// Blocks of the transformer that are computed again in the backward pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recomputed_blocks: Option<u32>,
    /// The newest checkpoint in the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_checkpoint: Option<ReportedCheckpoint>,
    /// Why the last attempt to save one failed, until one succeeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_error: Option<String>,
    /// Published files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub artifacts: Vec<ReportedArtifact>,
    /// Hash of the configuration in use, `sha256:<hex>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec_hash: Option<String>,
    /// Digest of the dataset in use, `sha256:<hex>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset_digest: Option<String>,
    /// Samples left out under `onBadSample: Skip`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped_samples: Option<u64>,
    /// Captions that are longer than what the text encoders read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncated_captions: Option<u64>,
    /// How it ended; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<TrainingResult>,
}

/// What a trainer is doing.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum Stage {
    /// Begins.
    #[default]
    Starting,
    /// Fetches the model.
    DownloadingModel,
    /// Reads the dataset.
    DownloadingDataset,
    /// Encodes captions and pictures.
    PreparingData,
    /// Restores a checkpoint.
    RestoringCheckpoint,
    /// Does steps.
    Training,
    /// Writes the outputs.
    Publishing,
    /// Has ended.
    Finished,
}

/// Memory in use, in bytes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryReport {
    /// On the training device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_bytes: Option<u64>,
    /// Most on the training device so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_peak_bytes: Option<u64>,
    /// Of the process on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_bytes: Option<u64>,
    /// Most of the process on the host so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_peak_bytes: Option<u64>,
}

/// A checkpoint in the bucket.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReportedCheckpoint {
    /// Optimizer updates done.
    pub step: u64,
    /// Where it is.
    pub uri: String,
    /// Digest of its manifest.
    pub sha256: String,
    /// When it was saved.
    pub time: Timestamp,
}

/// A published file.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReportedArtifact {
    /// Its format.
    pub format: OutputFormat,
    /// Where it is.
    pub uri: String,
    /// Its digest.
    pub sha256: String,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// How a trainer ended.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TrainingResult {
    /// The output folder already held the result of this very spec and dataset.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub already_completed: bool,
    /// Absent on success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureReport>,
}

/// Why a trainer ended without success.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureReport {
    /// The cause, in one word.
    pub reason: Reason,
    /// Exit code that follows.
    pub exit_code: u8,
    /// What happened and what to do.
    pub message: String,
}

/// A report that is not believed.
#[derive(Debug, thiserror::Error)]
pub enum ProgressError {
    /// Too long.
    #[error("the report has {length} bytes, more than {limit}")]
    TooLong {
        /// Its length.
        length: usize,
        /// The most that is read.
        limit: usize,
    },
    /// Not such an object.
    #[error("failed to read the report")]
    Malformed(#[source] serde_json::Error),
    /// A value that cannot be.
    #[error("the report's {field} is out of range")]
    OutOfRange {
        /// Which one.
        field: &'static str,
    },
}

impl Progress {
    /// Reads the body of `/progress` or a termination message, checks it and cleans its text.
    ///
    /// # Errors
    /// If it is too long, misses fields, or has values that cannot be.
    pub fn parse(body: &[u8]) -> Result<Self, ProgressError> {
        if body.len() > PROGRESS_MAX_BYTES {
            return Err(ProgressError::TooLong { length: body.len(), limit: PROGRESS_MAX_BYTES });
        }
        let mut value: Value = serde_json::from_slice(body).map_err(ProgressError::Malformed)?;
        translate(&mut value);
        let mut progress: Self = serde_json::from_value(value).map_err(ProgressError::Malformed)?;
        progress.clean();
        progress.check()?;
        Ok(progress)
    }

    /// The termination message: at most [`TERMINATION_MESSAGE_MAX_BYTES`] of JSON that [`Progress::parse`] reads.
    /// Where it would be longer, the failure's message, then the rest of the text, is cut.
    ///
    /// # Errors
    /// None in practice: the type has nothing that JSON cannot express.
    pub fn to_termination_message(&self) -> Result<String, serde_json::Error> {
        let mut progress = self.clone();
        progress.clean();
        let mut text = serde_json::to_string(&progress)?;
        let mut limit = TEXT_MAX_BYTES;
        while text.len() > TERMINATION_MESSAGE_MAX_BYTES && limit > 0 {
            limit /= 2;
            if let Some(failure) = progress.result.as_mut().and_then(|result| result.failure.as_mut()) {
                failure.message = clean(&failure.message, limit);
            }
            progress.checkpoint_error = progress.checkpoint_error.as_deref().map(|text| clean(text, limit));
            text = serde_json::to_string(&progress)?;
        }
        while text.len() > TERMINATION_MESSAGE_MAX_BYTES && progress.artifacts.pop().is_some() {
            text = serde_json::to_string(&progress)?;
        }
        if text.len() > TERMINATION_MESSAGE_MAX_BYTES {
            progress.last_checkpoint = None;
            text = serde_json::to_string(&progress)?;
        }
        Ok(text)
    }

    /// The trainer ended well.
    pub fn succeeded(&self) -> bool {
        self.result.as_ref().is_some_and(|result| result.failure.is_none())
    }

    /// Why the trainer ended without success.
    pub fn failure(&self) -> Option<&FailureReport> {
        self.result.as_ref().and_then(|result| result.failure.as_ref())
    }

    fn clean(&mut self) {
        let clean_text = |text: &mut String, limit| *text = clean(text, limit);
        for text in self.checkpoint_error.iter_mut().chain(self.result.iter_mut().filter_map(|r| r.failure.as_mut()).map(|f| &mut f.message)) {
            clean_text(text, TEXT_MAX_BYTES);
        }
        // Half a URI is none.
        let fits = |uri: &str| uri.len() <= URI_MAX_BYTES;
        self.artifacts.retain(|artifact| fits(&artifact.uri));
        self.last_checkpoint = self.last_checkpoint.take().filter(|checkpoint| fits(&checkpoint.uri));
        for text in self.artifacts.iter_mut().map(|a| &mut a.uri).chain(self.last_checkpoint.iter_mut().map(|c| &mut c.uri)) {
            clean_text(text, URI_MAX_BYTES);
        }
    }

    fn check(&self) -> Result<(), ProgressError> {
        let digest =
            |text: &String| text.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
        let number = |value: Option<f64>, range: std::ops::RangeInclusive<f64>| value.is_none_or(|value| range.contains(&value));
        let checks = [
            ("step", self.step <= STEPS_MAX && (self.total_steps == 0 || self.step <= self.total_steps)),
            ("totalSteps", self.total_steps <= STEPS_MAX),
            ("epoch", number(self.epoch, 0.0..=1e9)),
            ("stepsPerSecond", number(self.steps_per_second, 0.0..=1e6)),
            ("loss", number(self.loss, -1e12..=1e12)),
            ("microBatch", self.micro_batch.is_none_or(|samples| (1..=DIVISION_MAX).contains(&samples))),
            ("recomputedBlocks", self.recomputed_blocks.is_none_or(|blocks| blocks <= DIVISION_MAX)),
            ("specHash", self.spec_hash.as_ref().is_none_or(digest)),
            ("datasetDigest", self.dataset_digest.as_ref().is_none_or(digest)),
            ("lastCheckpoint", self.last_checkpoint.as_ref().is_none_or(|c| c.step <= STEPS_MAX && digest(&c.sha256) && !c.uri.is_empty())),
            (
                "artifacts",
                self.artifacts.len() <= ARTIFACTS_MAX && self.artifacts.iter().all(|a| digest(&a.sha256) && !a.uri.is_empty() && a.size_bytes <= SIZE_MAX),
            ),
            ("result.failure.exitCode", self.failure().is_none_or(|failure| failure.exit_code != 0)),
        ];
        match checks.iter().find(|(_, good)| !good) {
            Some((field, _)) => Err(ProgressError::OutOfRange { field }),
            None => Ok(()),
        }
    }
}

/// Puts known names in the place of those that only a newer trainer knows.
fn translate(report: &mut Value) {
    let known = |name: &Value, is_known: &dyn Fn(&str) -> bool| name.as_str().is_some_and(is_known);
    let training = report.get("totalSteps").and_then(Value::as_u64).is_some_and(|total| total > 0);
    if let Some(stage) = report.get_mut("stage").filter(|stage| stage.is_string())
        && serde_json::from_value::<Stage>(stage.clone()).is_err()
    {
        *stage = json!(if training { Stage::Training } else { Stage::Starting });
    }
    if let Some(failure) = report.pointer_mut("/result/failure") {
        let code = failure.get("exitCode").and_then(Value::as_i64).and_then(|code| i32::try_from(code).ok());
        if let Some(reason) = failure.get_mut("reason").filter(|reason| reason.is_string() && !known(reason, &|name| Reason::parse(name).is_some())) {
            *reason = json!(code.and_then(Reason::from_exit_code).unwrap_or(Reason::TrainerCrashed));
        }
    }
    if let Some(artifacts) = report.get_mut("artifacts").and_then(Value::as_array_mut) {
        artifacts.retain(|artifact| artifact.get("format").is_none_or(|format| serde_json::from_value::<OutputFormat>(format.clone()).is_ok()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Progress {
        let digest = finetune_common::digest::to_text(&finetune_common::digest::sha256(b"x"));
        Progress {
            stage: Stage::Finished,
            step: 9,
            total_steps: 10,
            epoch: Some(1.5),
            steps_per_second: Some(0.84),
            loss: Some(0.0831),
            estimated_completion_time: Some("2026-08-24T10:12:00Z".parse().unwrap()),
            memory: Some(MemoryReport { device_peak_bytes: Some(1 << 33), ..MemoryReport::default() }),
            micro_batch: Some(4),
            recomputed_blocks: Some(10),
            last_checkpoint: Some(ReportedCheckpoint {
                step: 5,
                uri: "s3://b/step-5/".into(),
                sha256: digest.clone(),
                time: "2026-08-24T10:00:00Z".parse().unwrap(),
            }),
            checkpoint_error: None,
            artifacts: vec![ReportedArtifact { format: OutputFormat::Kohya, uri: "s3://b/k.safetensors".into(), sha256: digest.clone(), size_bytes: 7 }],
            spec_hash: Some(digest.clone()),
            dataset_digest: Some(digest),
            skipped_samples: Some(2),
            truncated_captions: Some(3),
            result: Some(TrainingResult {
                already_completed: false,
                failure: Some(FailureReport { reason: Reason::Diverged, exit_code: 13, message: "loss is NaN".into() }),
            }),
        }
    }

    #[test]
    fn a_full_report_survives_the_way() {
        let text = full().to_termination_message().unwrap();
        assert_eq!(Progress::parse(text.as_bytes()).unwrap(), full());
        assert!(!full().succeeded());
        let done = Progress { result: Some(TrainingResult { already_completed: true, failure: None }), ..Progress::default() };
        assert!(Progress::parse(done.to_termination_message().unwrap().as_bytes()).unwrap().succeeded());
    }

    #[test]
    fn a_long_report_is_cut_to_what_kubernetes_keeps() {
        let mut progress = full();
        progress.checkpoint_error = Some("\u{1}é\"".repeat(5000));
        for artifact in std::iter::repeat_n(progress.artifacts[0].clone(), 7) {
            progress.artifacts.push(ReportedArtifact { uri: format!("s3://{}", "u".repeat(600)), ..artifact });
        }
        if let Some(failure) = progress.result.as_mut().and_then(|r| r.failure.as_mut()) {
            failure.message = "line\n\"quoted\"\u{1b}".repeat(500);
        }
        let text = progress.to_termination_message().unwrap();
        assert!(text.len() <= TERMINATION_MESSAGE_MAX_BYTES, "{}", text.len());
        let read = Progress::parse(text.as_bytes()).unwrap();
        assert_eq!(read.failure().unwrap().reason, Reason::Diverged);
        assert!(!read.failure().unwrap().message.contains(char::is_control));
    }

    #[test]
    fn the_report_of_a_newer_trainer_is_read_as_far_as_it_is_known() {
        let read = |change: fn(&mut Value)| {
            let mut value = serde_json::to_value(full()).unwrap();
            change(&mut value);
            Progress::parse(value.to_string().as_bytes()).unwrap()
        };
        assert_eq!(read(|v| v["surprise"] = 1.into()), full());
        assert_eq!(read(|v| v["memory"]["surprise"] = 1.into()), full());
        assert_eq!(read(|v| v["stage"] = "Dancing".into()).stage, Stage::Training);
        assert_eq!(read(|v| v["result"]["failure"]["reason"] = "Surprise".into()).failure().unwrap().reason, Reason::Diverged, "by its exit code");
        assert!(read(|v| v["artifacts"][0]["format"] = "Surprise".into()).artifacts.is_empty());
        assert!(read(|v| v["artifacts"][0]["uri"] = "u".repeat(3000).into()).artifacts.is_empty(), "half a URI is none");
    }

    /// What a trainer of this version says: newer operators must be able to read it.
    #[test]
    fn the_stored_report_of_this_version_is_read() {
        let stored = include_str!("samples/v1alpha1-report.json");
        assert_eq!(Progress::parse(stored.as_bytes()).unwrap(), full());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused = |change: fn(&mut serde_json::Value)| {
            let mut value = serde_json::to_value(full()).unwrap();
            change(&mut value);
            Progress::parse(value.to_string().as_bytes()).is_err()
        };
        assert!(!refused(|_| {}));
        assert!(refused(|v| v["step"] = 11.into()));
        assert!(refused(|v| v["step"] = (-1).into()));
        assert!(refused(|v| v["totalSteps"] = 1e18.into()));
        assert!(refused(|v| v["loss"] = 1e300.into()));
        assert!(refused(|v| v["microBatch"] = 0.into()));
        assert!(refused(|v| v["recomputedBlocks"] = 1_000_000.into()));
        assert!(refused(|v| v["specHash"] = "sha256:XYZ".into()));
        assert!(refused(|v| v["artifacts"][0]["sha256"] = "".into()));
        assert!(refused(|v| v["artifacts"][0]["sizeBytes"] = u64::MAX.into()));
        assert!(refused(|v| v["result"]["failure"]["reason"] = 1.into()));
        assert!(refused(|v| v["result"]["failure"]["exitCode"] = 0.into()));
        assert!(refused(|v| v["stage"] = 1.into()));
        assert!(Progress::parse(&vec![b' '; PROGRESS_MAX_BYTES + 1]).is_err());
        assert!(Progress::parse(b"null").is_err());
    }
}
