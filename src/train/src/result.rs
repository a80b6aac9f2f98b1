//! `result.json`: which attempt won, what it made, and how to check it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::checkpoint::Digests;
use finetune_api::plan::FrozenWeights;
use finetune_api::{OutputDtype, OutputFormat};
use finetune_common::digest;

/// The name below the output prefix.
pub const FILE_NAME: &str = "result.json";

/// The only version of the format so far.
pub const VERSION: u32 = 1;

/// What `result.json` holds. A run is complete when this file exists: it is created if absent, after all files of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunResult {
    /// [`VERSION`].
    pub version: u32,
    /// The job's name.
    pub job: String,
    /// UID of the FineTuneJob, or `local-…` for a run without a cluster; results of earlier versions do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_uid: Option<String>,
    /// `sha256:<hex>` of what determines the weights.
    pub spec_hash: String,
    /// `sha256:<hex>` of metadata and pictures.
    pub dataset_digest: String,
    /// `sha256:<hex>` of the base model's files; absent in results of versions that did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
    /// The attempt that won.
    pub attempt: u64,
    /// Its folder below the output prefix, as `runs/e3/`; the files at the prefix itself are copies.
    pub run: String,
    /// Optimizer updates.
    pub steps: u64,
    /// Passes over the dataset.
    pub epochs: f64,
    /// Pictures in the dataset.
    pub samples: u64,
    /// Bad samples that were left out (`dataset.onBadSample: Skip`).
    #[serde(default)]
    pub skipped_samples: u64,
    /// Captions that are longer than what the text encoders read.
    #[serde(default)]
    pub truncated_captions: u64,
    /// The text encoders that have read the captions; a model may leave T5 out.
    #[serde(default)]
    pub text_encoders: Vec<String>,
    /// What a person should know about this run besides, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Training loss.
    pub loss: LossSummary,
    /// Loss with fixed noise and timesteps, before and after.
    pub evaluation: Evaluation,
    /// Held-out pictures against drawn ones (`validation.datasetUri`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comparison: Option<Comparison>,
    /// What was trained.
    pub lora: LoraSummary,
    /// The base model's source, as in the spec.
    pub base_model: serde_json::Value,
    /// `cpu` or the accelerator's name.
    pub device: String,
    /// Type of frozen weights and activations.
    pub dtype: String,
    /// How the blocks' frozen weights were kept.
    #[serde(default, skip_serializing_if = "FrozenWeights::is_float")]
    pub weights: FrozenWeights,
    /// When the first attempt began (RFC 3339).
    pub started: String,
    /// When the winner was done (RFC 3339).
    pub completed: String,
    /// Seconds spent training, all attempts together.
    pub training_seconds: f64,
    /// LoRA files.
    pub artifacts: Vec<Artifact>,
    /// Their number format as the job has asked for it; absent where it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_dtype: Option<OutputDtype>,
    /// Every published file by name, LoRA files included.
    pub files: BTreeMap<String, FileDigest>,
    /// Programs by name.
    pub versions: BTreeMap<String, String>,
}

/// What a run was made from that is not what there is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// `dataset` or `base model`.
    pub what: &'static str,
    /// Its digest then.
    pub theirs: String,
    /// Its digest now.
    pub ours: String,
}

impl RunResult {
    /// Whether an attempt of the run with this id has made it.
    pub fn is_of(&self, run: &str) -> bool {
        self.job_uid.as_deref() == Some(run)
    }

    /// Whether the LoRA files are what a job with `output.dtype` asks for: in that format, or as near to it as their values allowed.
    pub fn is_written_as(&self, dtype: OutputDtype) -> bool {
        self.output_dtype == Some(dtype) || self.artifacts.iter().all(|artifact| artifact.dtype == dtype)
    }

    /// What differs between dataset and model of this result and those of now. A result that does not tell its model is taken to be of this one.
    pub fn differs_in(&self, now: &Digests) -> Option<Difference> {
        let model = self.model_digest.as_ref().unwrap_or(&now.model);
        [("dataset", &self.dataset_digest, &now.dataset), ("base model", model, &now.model)]
            .into_iter()
            .find(|(_, theirs, ours)| theirs != ours)
            .map(|(what, theirs, ours)| Difference { what, theirs: theirs.clone(), ours: ours.clone() })
    }
}

/// Training loss of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LossSummary {
    /// Of the first update.
    pub first: f64,
    /// Of the last update.
    pub last: f64,
    /// Smoothed at the end: one update's loss says little.
    pub smoothed: f64,
}

/// The evaluation loss of a run: fixed pictures, noise and timesteps, no dropout.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Evaluation {
    /// Before the first update.
    pub start: f64,
    /// After the last update.
    pub end: f64,
    /// `(start - end) / start`.
    pub improvement: f64,
    /// Pictures.
    pub samples: u64,
    /// Timesteps per picture, stratified over the noise levels.
    pub timesteps: u64,
}

/// How far pictures drawn from held-out captions are from the real ones: root mean square difference of values in [0, 1].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Comparison {
    /// Pictures compared.
    pub pictures: u64,
    /// Drawn by the base model.
    pub base_distance: f64,
    /// Drawn with the LoRA, from the same noise.
    pub lora_distance: f64,
}

/// The trained LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoraSummary {
    /// r.
    pub rank: u32,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Modules with LoRA.
    pub modules: u64,
    /// Trained numbers.
    pub parameters: u64,
}

const fn f32() -> OutputDtype {
    OutputDtype::F32
}

/// A LoRA file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Artifact {
    /// Which one.
    pub format: OutputFormat,
    /// Name below the output prefix.
    pub file: String,
    /// Number format of its values; results of versions that wrote no other do not report it.
    #[serde(default = "f32")]
    pub dtype: OutputDtype,
    /// `sha256:<hex>`.
    pub sha256: String,
    /// Bytes.
    pub size_bytes: u64,
}

/// Size and digest of a published file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileDigest {
    /// Bytes.
    pub size: u64,
    /// `sha256:<hex>`.
    pub sha256: String,
}

impl FileDigest {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self { size: bytes.len() as u64, sha256: digest::to_text(&digest::sha256(bytes)) }
    }

    /// Whether `bytes` are the ones that were written.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        *self == Self::of(bytes)
    }
}
