//! What a job reads, looked at before it runs: the dataset to its last picture, the model to the headers of its weights, the captions by their lengths.

use std::time::Duration;

use super::captions::Truncation;
use super::environment::{self, JobEnvironment};
use super::look::{self, LookError};
use super::model_files;
use super::prepare::{PrepareError, captions};
use finetune_api::plan::{DatasetConfig, TrainConfig, TrainingConfig};
use finetune_data::buckets::{BucketError, Shapes};
use finetune_data::dataset::{Dataset, DatasetError};
use finetune_model::survey::Model;
use finetune_store::model_source::{ModelFolder, Parts};
use finetune_store::{RetryPolicy, Store, StoreErrorKind};

/// How long a request to a store is tried: somebody waits for the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was found.
#[derive(Debug)]
pub struct Inspection {
    /// The dataset, every picture decoded once.
    pub dataset: Result<Dataset, DatasetError>,
    /// The held-out pictures, where the job has any.
    pub held_out: Option<Result<Dataset, DatasetError>>,
    /// What the model is.
    pub model: Result<Model, LookError>,
    /// Captions that are cut, where dataset and model are as they should be.
    pub truncation: Option<Result<Option<Truncation>, PrepareError>>,
}

/// Looks at the dataset and the model of `config`. Nothing is written but, in the cache folder, a list of the model's files and the small ones.
pub async fn inspect(config: &TrainConfig, environment: &JobEnvironment) -> Inspection {
    let held_out = match config.validation.as_ref().and_then(|validation| validation.dataset_uri.as_ref()) {
        Some(uri) => Some(dataset(config, &config.dataset.held_out(uri), environment).await),
        None => None,
    };
    let dataset = dataset(config, &config.dataset, environment).await;
    let folder = model(config, environment).await;
    let truncation = match (&dataset, &folder) {
        (Ok(dataset), Ok((folder, _))) => Some(truncation(config, dataset, folder, environment).await),
        _ => None,
    };
    Inspection { dataset, held_out, model: folder.map(|(_, model)| model), truncation }
}

/// The captions against the model's own tokenizers: a few megabytes.
async fn truncation(config: &TrainConfig, dataset: &Dataset, folder: &ModelFolder, environment: &JobEnvironment) -> Result<Option<Truncation>, PrepareError> {
    folder.fetch(Parts::TOKENIZERS, &environment.reporter).await?;
    let (clip_limit, lengths) = tokio::task::block_in_place(|| captions::lengths(folder, dataset))?;
    Ok(Truncation::of(dataset, &lengths, config.training.max_sequence_length, clip_limit, !folder.is_without_t5()))
}

/// The buckets of a dataset's pictures as the end of a sentence (empty without buckets), and what is lost in them. `largest`: the longest side that the model
/// takes, where it is known.
///
/// # Errors
/// Names the pictures that fit no bucket, or whose bucket does not fit the model.
pub fn buckets(training: &TrainingConfig, dataset: &Dataset, largest: Option<usize>) -> Result<(String, Option<String>), BucketError> {
    let shapes = Shapes::new(training, &dataset.samples)?;
    largest.map_or(Ok(()), |largest| shapes.check(&dataset.samples, largest))?;
    Ok((if training.buckets.is_some() { format!(" in {shapes}") } else { String::new() }, shapes.warning()))
}

fn impatient(policy: &RetryPolicy) -> RetryPolicy {
    RetryPolicy { max_retries: 1, total: policy.total.min(PATIENCE), connect_timeout: policy.connect_timeout.min(PATIENCE), ..policy.clone() }
}

async fn dataset(config: &TrainConfig, dataset: &DatasetConfig, environment: &JobEnvironment) -> Result<Dataset, DatasetError> {
    let mut options = environment.store_options(config);
    options.retry = impatient(&options.retry);
    Dataset::scan(&Store::open(&dataset.uri, &options)?, dataset).await
}

async fn model(config: &TrainConfig, environment: &JobEnvironment) -> Result<(ModelFolder, Model), LookError> {
    let (source, mut options) = environment.model_source(config);
    options.retry = impatient(&options.retry);
    let folder = model_files::open(&source, environment::model_files(&config.model).as_ref(), &options, &environment.cache_dir).await?;
    let model = look::look(config, &folder).await?;
    Ok((folder, model))
}

/// Whether a failure says nothing about what is stored: nobody answered, or not to us.
fn is_unreachable(kind: StoreErrorKind) -> bool {
    matches!(kind, StoreErrorKind::Unavailable | StoreErrorKind::PermissionDenied | StoreErrorKind::LocalDisk)
}

/// Whether the dataset could not be looked at, rather than being bad.
pub fn dataset_is_unreachable(error: &DatasetError) -> bool {
    match error {
        DatasetError::Store(source) => is_unreachable(source.kind()),
        DatasetError::Worker(_) => true,
        DatasetError::Problems { .. }
        | DatasetError::NoMetadata { .. }
        | DatasetError::Ambiguous { .. }
        | DatasetError::NoSamples { .. }
        | DatasetError::Changed { .. }
        | DatasetError::Image { .. } => false,
    }
}

/// Whether the model could not be looked at, rather than lacking something.
pub fn model_is_unreachable(error: &LookError) -> bool {
    matches!(error, LookError::Source(error) if error.store_kind().is_some_and(is_unreachable))
}
