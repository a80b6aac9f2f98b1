//! The look at the model that comes before everything expensive: by `validate`, and at the start of a run here or in a pod.
//!
//! JSON files, tokenizers and headers of weights: milliseconds for a folder, a few small requests for a bucket or the hub.

use std::collections::BTreeMap;

use futures::future::try_join_all;

use finetune_api::Reason;
use finetune_api::plan::{FrozenWeights, GpuTooSmall, MemoryBudget, MemoryPlan, Problem, TrainConfig, TrainingConfig, Weights, memory_plan};
use finetune_data::buckets::Buckets;
use finetune_model::ModelDir;
use finetune_model::layout::Part;
use finetune_model::lora::LoraLayout;
use finetune_model::survey::{self, Header, Model, PartTensors, Tensors};
use finetune_store::model_source::{Found, ModelFolder, ModelSourceError, Parts, WeightFile};

use super::{division, setup};

/// So much of each file of weights is read at first; the headers of published models are shorter.
const FIRST_BYTES: usize = 256 << 10;
/// The field that names the model.
const SOURCE: &str = "spec.model.source";

/// What is wrong with a model, or with the job's settings for it: all of it.
#[derive(Debug, thiserror::Error)]
#[error("the model at {location} cannot be used for this job: {}", problems.iter().map(sentence).collect::<Vec<_>>().join("; "))]
pub struct Unfit {
    location: String,
    /// Each with the field of the spec that it concerns.
    pub problems: Vec<Problem>,
}

fn sentence(problem: &Problem) -> String {
    if problem.path == SOURCE { problem.message.clone() } else { problem.to_string() }
}

impl Unfit {
    /// The reason for exit code and condition: settings that another spec can mend, or a model that none can.
    pub fn reason(&self) -> Reason {
        if self.problems.iter().all(|problem| problem.path != SOURCE) { Reason::InvalidConfig } else { Reason::ModelLoadFailed }
    }
}

/// Why a model cannot be looked at, or used.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// It cannot be read.
    #[error("failed to look at the model")]
    Source(#[from] ModelSourceError),
    /// It was read.
    #[error(transparent)]
    Unfit(#[from] Unfit),
}

/// Looks at the model that `folder` has listed, and whether the job's settings fit it. Downloads the model's small files.
///
/// # Errors
/// [`LookError::Unfit`] with every problem at once.
pub async fn look(config: &TrainConfig, folder: &ModelFolder) -> Result<Model, LookError> {
    let unfit = |problems: Vec<Problem>| Unfit { location: folder.location().to_owned(), problems };
    let of_the_model = |messages: Vec<String>| messages.into_iter().map(|message| Problem { path: SOURCE.to_owned(), message }).collect();
    if let Some(other) = folder.class().and_then(survey::other_model) {
        return Err(unfit(of_the_model(vec![other])).into());
    }
    let Found { weights, mut problems } = folder.look(Parts::ALL).await?;
    if !folder.has_contents() {
        return Err(unfit(of_the_model(problems)).into());
    }
    let parts = headers(folder, &weights).await?;
    let draws = config.validation.is_some() || config.training.prior_preservation.is_some();
    let checked = ModelDir::open(folder.folder())
        .map_err(|error| vec![error.to_string()])
        .and_then(|dir| survey::check(&dir, &parts, config.training.max_sequence_length as usize, draws));
    match checked {
        Ok(model) if problems.is_empty() => match settings(config, &model) {
            wrong if wrong.is_empty() => Ok(model),
            wrong => Err(unfit(wrong).into()),
        },
        Ok(_) => Err(unfit(of_the_model(problems)).into()),
        Err(more) => {
            problems.extend(more);
            Err(unfit(of_the_model(problems)).into())
        }
    }
}

/// The tensors of each part, from the headers of its files.
async fn headers(folder: &ModelFolder, weights: &[WeightFile]) -> Result<PartTensors, ModelSourceError> {
    // Collected, for a stream with a closure in it could not be spawned.
    let reads: Vec<_> = weights.iter().map(|file| read_header(folder, &file.path, file.size)).collect();
    let read = try_join_all(reads).await?;
    let mut parts: PartTensors = BTreeMap::new();
    for (WeightFile { folder: name, path, .. }, header) in weights.iter().zip(read) {
        let Some(part) = Part::ALL.into_iter().find(|part| part.folder() == name) else { continue };
        let entry = parts.entry(part).or_insert_with(|| Ok(Tensors::new()));
        match (entry, header) {
            (entry @ Ok(_), Ok(Header::Whole(tensors))) => match (survey::mapped(&folder.folder().join(part.folder()), tensors), entry) {
                (Ok(tensors), Ok(all)) => all.extend(tensors),
                (Err(problem), entry) => *entry = Err(vec![format!("{} {problem}", folder.source_of(path))]),
                (Ok(_), Err(_)) => {}
            },
            (entry @ Ok(_), Err(problem)) => *entry = Err(vec![format!("{path} {problem}")]),
            (Err(problems), Err(problem)) => problems.push(format!("{path} {problem}")),
            (entry @ Ok(_), Ok(Header::Longer(_))) => *entry = Err(vec![format!("{path} is shorter than its header: download it again")]),
            (Err(_), Ok(_)) => {}
        }
    }
    Ok(parts)
}

/// The header of one file, or what the file is instead.
pub(crate) async fn read_header(folder: &ModelFolder, path: &str, size: u64) -> Result<Result<Header, String>, ModelSourceError> {
    Ok(match survey::header(&folder.first_bytes(path, FIRST_BYTES).await?, size) {
        Ok(Header::Longer(end)) => survey::header(&folder.first_bytes(path, end as usize).await?, size),
        header => header,
    })
}

/// What of the job's settings does not fit the model.
fn settings(config: &TrainConfig, model: &Model) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut problem = |field: &str, message: String| problems.push(Problem { path: format!("spec.training.{field}"), message });
    let (resolution, largest, step) = (config.training.resolution as usize, model.largest_side(), model.side_step());
    if resolution > largest {
        problem("resolution", format!("{resolution} is more than this model takes: its table of position embeddings reaches to {largest} pixels"));
    } else if step == 0 || !resolution.is_multiple_of(step) {
        problem("resolution", format!("{resolution} is not a multiple of {step}, a patch of this model"));
    }
    if let Some(buckets) = &config.training.buckets {
        let longest = Buckets::new(config.training.resolution, buckets).longest_side().filter(|&side| side as usize > largest);
        if let Some(longest) = longest {
            problem("buckets.maxSize", format!("buckets have sides up to {longest} pixels: this model's table of position embeddings reaches to {largest}"));
        }
        if step == 0 || !(buckets.step as usize).is_multiple_of(step) {
            problem("buckets.step", format!("{} is not a multiple of {step}, a patch of this model", buckets.step));
        }
    }
    let lora = setup::lora(&config.training.lora);
    if let Err(error) = LoraLayout::new(&lora, &model.transformer.linear_sites()) {
        problem("lora.targetModules", error.to_string());
    }
    problems
}

/// How the training fits a device, before anything is loaded onto it. A run that goes on keeps its `weights` as they were, so that it ends in the same
/// bits; where they do not fit any more, they are kept as a run that begins would keep them.
///
/// # Errors
/// Says what is too large.
pub fn memory(config: &TrainConfig, model: &Model, budget: MemoryBudget, weights: Option<FrozenWeights>) -> Result<MemoryPlan, GpuTooSmall> {
    let plan = |training| memory_plan(training, config.validation.as_ref(), &division::shape(&model.transformer), budget);
    let kept = weights.map(|weights| match weights {
        FrozenWeights::Float => Weights::Float,
        FrozenWeights::Int8 => Weights::Int8,
    });
    match kept.filter(|_| config.training.weights == Weights::Auto) {
        Some(weights) => plan(&TrainingConfig { weights, ..config.training.clone() }).or_else(|_| plan(&config.training)),
        None => plan(&config.training),
    }
}
