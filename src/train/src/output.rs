//! What a run publishes: LoRA files, the model card, metrics, pictures and `result.json`.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;

use super::about::{self, About};
use super::card;
use super::checkpoint::Checkpoints;
use super::device;
use super::error::TrainError;
use super::evaluate;
use super::history::{History, Picture};
use super::log::{self, LogTail};
use super::lora_files::{self, LoraFile};
use super::page;
use super::result::{Artifact, Evaluation, FileDigest, LoraSummary, LossSummary, RunResult, VERSION};
use super::trainer::Trainer;
use finetune_api::plan::TrainConfig;
use finetune_compute::kernels::Engine;
use finetune_data::buckets::Shapes;
use finetune_data::dataset::Dataset;
use finetune_model::survey;
use finetune_store::{Store, StoreError};

/// What was measured.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// All files of a finished run and its result.
///
/// # Errors
/// If the LoRA has no kohya form, or a number cannot be written.
#[expect(clippy::too_many_arguments, reason = "each is a part of the run; together they are nothing else")]
pub fn make(
    config: &TrainConfig,
    dataset: &Dataset,
    shapes: &Shapes,
    checkpoints: &Checkpoints,
    text_encoders: &[&str],
    warnings: Vec<String>,
    trainer: &Trainer,
    pictures: &[Picture],
    compute: &Engine,
) -> Result<(RunResult, BTreeMap<String, Bytes>), TrainError> {
    let lora = &config.training.lora;
    let transformer = trainer.learner().config();
    let about = About {
        config,
        published: survey::published(transformer),
        base_digest: &checkpoints.digests().model,
        common_caption: about::common_caption(&dataset.samples),
        pictures: dataset.samples.len(),
        shapes: Some(shapes),
        steps: trainer.step(),
        epochs: trainer.epochs(),
        precision: compute.precision(),
        weights: trainer.plan().weights,
    };
    let mut files = BTreeMap::new();
    let mut artifacts = Vec::new();
    let written = lora_files::make(&about, &trainer.params()?, trainer.layout(), transformer.num_layers)?;
    for LoraFile { format, name, bytes } in written.files {
        let FileDigest { size, sha256 } = FileDigest::of(&bytes);
        artifacts.push(Artifact { format, file: name.clone(), dtype: written.dtype, sha256, size_bytes: size });
        files.insert(name, Bytes::from(bytes));
    }
    files.insert(card::FILE_NAME.to_owned(), Bytes::from(card::make(&about, pictures, written.dtype)));
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
        warnings: warnings.into_iter().chain(written.warning).collect(),
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
        weights: trainer.plan().weights,
        started: rfc3339(trainer.started()),
        completed: Timestamp::now().to_string(),
        training_seconds: trainer.training_seconds(),
        artifacts,
        output_dtype: config.output.dtype,
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
