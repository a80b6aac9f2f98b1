//! What a run publishes: LoRA files, metrics, pictures and `result.json`.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;

use super::checkpoint::Checkpoints;
use super::device;
use super::error::TrainError;
use super::evaluate;
use super::history::{History, Picture};
use super::log::{self, LogTail};
use super::page;
use super::result::{Artifact, Evaluation, FileDigest, LoraSummary, LossSummary, RunResult, VERSION};
use super::tensor_file::{self, Entry};
use super::trainer::Trainer;
use finetune_api::plan::{LoraConfig, OutputFormat, TrainConfig};
use finetune_compute::kernels::Engine;
use finetune_compute::optim::Param;
use finetune_data::dataset::Dataset;
use finetune_model::lora::{LoraLayout, kohya, metadata_json};
use finetune_store::{Store, StoreError};

/// The LoRA as diffusers' `load_lora_weights` takes it.
pub const DIFFUSERS_FILE: &str = "pytorch_lora_weights.safetensors";
/// What was measured.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// The name of the kohya and ComfyUI file: `<job>.safetensors`, so that it keeps its name among other LoRA files.
pub fn kohya_file(job: &str) -> String {
    format!("{}.safetensors", job_name(job))
}

/// `name` of `namespace/name`.
fn job_name(job: &str) -> &str {
    job.rsplit('/').next().unwrap_or(job)
}

/// `pytorch_lora_weights.safetensors`: diffusers' keys, f32. The adapter's configuration is added where alpha is not the
/// rank, which readers would assume.
pub fn diffusers(params: &[Param], lora: &LoraConfig) -> Vec<u8> {
    let mut metadata: BTreeMap<String, String> = [("format".to_owned(), "pt".to_owned())].into();
    if (lora.alpha - f64::from(lora.rank)).abs() > f64::EPSILON {
        metadata.insert(finetune_model::lora::METADATA_KEY.to_owned(), metadata_json(lora.rank as usize, lora.alpha, lora.dropout, &lora.target_modules));
    }
    tensor_file::write(tensor_file::param_entries(params), &metadata)
}

/// The kohya and ComfyUI file.
fn kohya(params: &[Param], layout: &LoraLayout, lora: &LoraConfig, blocks: usize) -> Result<Vec<u8>, TrainError> {
    let tensors = kohya::convert(layout, params, blocks)?;
    let entries: Vec<Entry> = tensor_file::param_entries(&tensors);
    let metadata = [
        ("format", "pt".to_owned()),
        ("ss_network_module", "networks.lora_sd3".to_owned()),
        ("ss_network_dim", lora.rank.to_string()),
        ("ss_network_alpha", lora.alpha.to_string()),
        ("ss_base_model_version", "sd3".to_owned()),
        ("modelspec.sai_model_spec", "1.0.0".to_owned()),
        ("modelspec.architecture", "stable-diffusion-3-medium/lora".to_owned()),
    ];
    Ok(tensor_file::write(entries, &metadata.map(|(k, v)| (k.to_owned(), v)).into()))
}

/// All files of a finished run and its result.
///
/// # Errors
/// If the LoRA has no kohya form, or a number cannot be written.
#[expect(clippy::too_many_arguments, reason = "each is a part of the run; together they are nothing else")]
pub fn make(
    config: &TrainConfig,
    dataset: &Dataset,
    checkpoints: &Checkpoints,
    text_encoders: &[&str],
    warnings: Vec<String>,
    trainer: &Trainer,
    pictures: &[Picture],
    compute: &Engine,
) -> Result<(RunResult, BTreeMap<String, Bytes>), TrainError> {
    let lora = &config.training.lora;
    let params = trainer.params()?;
    let mut files = BTreeMap::new();
    let mut artifacts = Vec::new();
    for format in &config.output.formats {
        let (file, bytes) = match format {
            OutputFormat::Diffusers => (DIFFUSERS_FILE.to_owned(), diffusers(&params, lora)),
            OutputFormat::Kohya => (kohya_file(&config.job), kohya(&params, trainer.layout(), lora, trainer.learner().config().num_layers)?),
        };
        let FileDigest { size, sha256 } = FileDigest::of(&bytes);
        artifacts.push(Artifact { format: *format, file: file.clone(), sha256, size_bytes: size });
        files.insert(file, Bytes::from(bytes));
    }
    for (name, bytes) in logs(trainer.history(), pictures)? {
        files.insert(name, bytes);
    }
    for picture in pictures {
        files.insert(picture.file_name(), Bytes::from(picture.png.clone()));
    }
    let history = trainer.history();
    let evaluation = |step| history.evaluation_at(step).unwrap_or_default();
    let (start, end) = (evaluation(0), evaluation(trainer.step()));
    let local = |what| move |source: serde_json::Error| TrainError::Local { what, source: Box::new(source) };
    let result = RunResult {
        version: VERSION,
        job: config.job.clone(),
        job_uid: checkpoints.run().map(str::to_owned),
        spec_hash: config.spec_hash.clone(),
        dataset_digest: dataset.digest.clone(),
        model_digest: Some(checkpoints.digests().model.clone()),
        attempt: checkpoints.attempt(),
        run: format!("runs/e{}/", checkpoints.attempt()),
        steps: trainer.step(),
        epochs: trainer.epochs(),
        samples: dataset.samples.len() as u64,
        skipped_samples: dataset.skipped.len(),
        truncated_captions: trainer.prepared().truncation().map_or(0, |truncation| truncation.captions),
        text_encoders: text_encoders.iter().map(|&name| name.to_owned()).collect(),
        warnings,
        loss: LossSummary {
            first: history.losses().next().unwrap_or_default(),
            last: history.losses().next_back().unwrap_or_default(),
            smoothed: history.smoothed_loss().unwrap_or_default(),
        },
        evaluation: Evaluation {
            start,
            end,
            improvement: if start > 0.0 { (start - end) / start } else { 0.0 },
            samples: evaluate::subset(dataset.samples.len()).len() as u64,
            timesteps: evaluate::TIMESTEPS,
        },
        comparison: None,
        lora: LoraSummary {
            rank: lora.rank,
            alpha: lora.alpha,
            modules: trainer.layout().modules.len() as u64,
            parameters: trainer.layout().parameter_count() as u64,
        },
        base_model: serde_json::to_value(&config.model.source).map_err(local("describe the model's source"))?,
        device: device::name(compute).to_owned(),
        dtype: compute.precision().to_string(),
        started: rfc3339(trainer.started()),
        completed: Timestamp::now().to_string(),
        training_seconds: trainer.training_seconds(),
        artifacts,
        files: files.iter().map(|(name, bytes)| (name.clone(), FileDigest::of(bytes))).collect(),
        versions: [("finetune".to_owned(), env!("CARGO_PKG_VERSION").to_owned())].into(),
    };
    Ok((result, files))
}

fn rfc3339(unix_seconds: f64) -> String {
    Timestamp::from_millisecond((unix_seconds * 1000.0) as i64).unwrap_or_default().to_string()
}

/// `metrics.jsonl` and the TensorBoard events.
fn logs(history: &History, pictures: &[Picture]) -> Result<[(String, Bytes); 2], TrainError> {
    let metrics = history.to_jsonl().map_err(|source| TrainError::Local { what: "write the metrics", source: Box::new(source) })?;
    let start = history.records().first().map_or(0.0, |r| r.time);
    let name = format!("logs/{}", super::events::file_name(start as u64, super::events::HOST));
    Ok([(METRICS_FILE.to_owned(), Bytes::from(metrics)), (name, Bytes::from(history.to_events(pictures)))])
}

/// Lets people watch a run that lasts: metrics, events, the page and the log so far, below `folder`.
///
/// # Errors
/// If the store fails.
pub async fn put_logs(folder: &Store, history: &History, page: Option<String>, log: &LogTail) -> Result<(), StoreError> {
    // Metrics that cannot be written are reported when the results are made.
    for (name, bytes) in logs(history, &[]).into_iter().flatten() {
        folder.put(name.strip_prefix("logs/").unwrap_or(&name), bytes).await?;
    }
    if let Some(page) = page {
        folder.put(page::FILE_NAME, Bytes::from(page)).await?;
    }
    folder.put(log::FILE_NAME, log.text()).await
}
