//! A whole run: look at the output, claim it, prepare, train, checkpoint, publish. See `docs/concepts/checkpoints.md`.
//!
//! One model is in memory at a time: text encoders, then the VAE, then the transformer.

mod show;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::block_in_place;

use super::checkpoint::{CheckpointError, Checkpoints, Digests, Due, ExecutionPlan, Identity, LeftAlone, PREPARED, Saved, Snapshot, log_folder};
use super::comparison::{self, HeldOut};
use super::environment::{self, JobEnvironment};
use super::error::{self, TrainError};
use super::folders;
use super::log;
use super::output;
use super::page;
use super::prepare::{self, PrepareError, Prepared};
use super::publish::{self, Decision, Published};
use super::result::{FileDigest, RunResult};
use super::setup;
use super::step::Objective;
use super::trainer::{Settings, Trainer, Update};
use super::validation;
use super::{device, look, model_files, start};
use finetune_api::plan::{MemoryBudget, MemoryPlan, ResumePolicy, ShiftConfig, StepPlan, TrainConfig, ValidationConfig, warnings};
use finetune_api::{Reason, Stage};
use finetune_common::digest;
use finetune_compute::kernels::Engine;
use finetune_compute::optim::Param;
use finetune_data::buckets::Shapes;
use finetune_data::dataset::Dataset;
use finetune_data::sampler::{Sampler, SamplerConfig};
use finetune_model::ModelDir;
use finetune_model::layout::{LayoutError, Part};
use finetune_model::learner;
use finetune_model::lora::LoraLayout;
use finetune_model::mmdit::MmditConfig;
use finetune_model::survey::Model;
use finetune_model::weights::Weights;
use finetune_store::claims::{self, Claim, KeptAlive, Owner};
use finetune_store::model_source::{ModelFolder, Parts};
use finetune_store::{Store, StoreError, StoreErrorKind};

/// After the last checkpoint could not be saved for lack of storage, the next attempt follows after this time.
const LAST_SAVE_RETRY: Duration = Duration::from_secs(1);
/// How long an attempt that ends tries to put its log into the bucket.
const LAST_LOG: Duration = Duration::from_secs(5);

/// How a run ended well.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The result that stands in the output: trained now, or by another attempt meanwhile.
    pub result: RunResult,
    /// The output already held the result of this spec and dataset.
    pub already_completed: bool,
    /// What a person should know besides, a sentence each.
    pub notes: Vec<String>,
}

/// Runs the job. Must be called within a multi-threaded runtime.
///
/// # Errors
/// [`TrainError`]; its reason gives the exit code.
pub async fn run(config: &TrainConfig, environment: &JobEnvironment) -> Result<Outcome, TrainError> {
    let reporter = &environment.reporter;
    reporter.identity(&config.spec_hash, None, None);
    folders::check(config, environment)?;
    for warning in warnings(&config.training, None) {
        tracing::warn!("{warning}");
    }
    let output = environment.open(&config.output.uri, config)?;
    let store = environment.open(&config.checkpoint.uri, config)?;

    let found = publish::look(&output, store.uri(), config.into()).await?;
    let decide = |found: &publish::Found, digests: Option<&Digests>| publish::decide(output.uri(), config.output.existing, found, &environment.run_id, digests);
    if let (Decision::Compare, publish::Found::SameSpec(result)) = (decide(&found, None)?, &found) {
        return reuse(config, environment, &output, store, &found, result).await;
    }
    // What is done already needs no GPU.
    let engine = device::open(config.device, config.training.precision)?;
    let budget = device::limit_memory(&engine);
    let (folder, base) = look_at_model(config, environment, budget).await?;
    let Sources { dataset, digests } = sources(config, environment, &folder).await?;
    let shapes = shapes(config, &dataset, &base)?;

    let (claim, alive) = claim(config, environment, &output).await?;
    let attempt = async {
        // Whoever was at work there has finished meanwhile.
        let found = publish::look(&output, store.uri(), config.into()).await?;
        if let (Decision::Compare, publish::Found::SameSpec(result)) = (decide(&found, None)?, &found) {
            decide(&found, Some(&digests))?;
            let note = publish::repair(&output, result).await?;
            return Ok(((**result).clone(), note.into_iter().collect()));
        }
        let identity = identity(config, environment, &output, digests);
        let checkpoints = match config.resume.policy {
            ResumePolicy::Never => Checkpoints::restart(store, claim, identity).await?,
            ResumePolicy::Auto | ResumePolicy::Required => Checkpoints::open(store, claim, identity).await?,
        };
        let held_out = held_out(config, environment, &base).await?;
        let run = Run { config, environment, engine, budget, dataset, shapes, folder, held_out, checkpoints, base };
        let trained = run.whole(&output).await;
        if let Err(error) = &trained {
            run.keep_log(error).await;
        }
        trained
    };
    let ended: Result<(RunResult, Vec<String>), TrainError> = attempt.await;
    alive.end().await;
    let (result, left) = ended?;
    let notes = result.warnings.iter().cloned().chain(left).collect();
    Ok(Outcome { result, already_completed: false, notes })
}

/// The output holds a result of this spec: it is the run's own if dataset and model are the same too.
async fn reuse(
    config: &TrainConfig,
    environment: &JobEnvironment,
    output: &Store,
    store: Store,
    found: &publish::Found,
    result: &RunResult,
) -> Result<Outcome, TrainError> {
    let Sources { digests, .. } = sources(config, environment, &open_model(config, environment).await?).await?;
    publish::decide(output.uri(), config.output.existing, found, &environment.run_id, Some(&digests))?;
    let note = publish::repair(output, result).await?;
    let left = delete_leftovers(config, environment, output, store, digests).await.unwrap_or_else(|error| {
        tracing::warn!(error = &error as &dyn std::error::Error, "failed to delete the checkpoints of the completed run");
        LeftAlone::default()
    });
    let notes = result.warnings.iter().cloned().chain(note).chain(notes(&left)).collect();
    Ok(Outcome { result: result.clone(), already_completed: true, notes })
}

/// Reports files that were left alone.
fn notes(left: &LeftAlone) -> Vec<String> {
    if left.is_empty() {
        return Vec::new();
    }
    tracing::warn!(prefix = left.uri, files = left.keys.len(), "left alone: {left}");
    vec![format!("left alone: {left}")]
}

fn identity(config: &TrainConfig, environment: &JobEnvironment, output: &Store, digests: Digests) -> Identity {
    Identity::new(config.spec_hash.clone(), digests, output.uri().to_owned(), environment.run_id.clone())
}

/// Claims the output for this attempt, and says that it lives.
async fn claim(config: &TrainConfig, environment: &JobEnvironment, output: &Store) -> Result<(Claim, KeptAlive), TrainError> {
    let run = claims::Run { job: config.job.clone(), id: environment.run_id.clone(), spec_hash: config.spec_hash.clone() };
    let owner = Owner { name: environment.owner.clone(), run: Some(run) };
    let claim = unless_interrupted(environment, async { Ok(Claim::acquire_for(output, &owner, environment.claim_lease).await?) }).await?;
    let interrupt = environment.interrupt.clone();
    let alive = claim.keep_alive(move || interrupt.requested());
    Ok((claim, alive))
}

/// Deletes what a run that was killed after publishing has left.
async fn delete_leftovers(config: &TrainConfig, environment: &JobEnvironment, output: &Store, store: Store, digests: Digests) -> Result<LeftAlone, TrainError> {
    if config.checkpoint.keep_after_success || !Identity::is_at(&store).await? {
        return Ok(LeftAlone::default());
    }
    let (claim, alive) = claim(config, environment, output).await?;
    let deleted = async { Checkpoints::open(store, claim, identity(config, environment, output, digests)).await?.delete_all().await };
    let left = deleted.await;
    alive.end().await;
    Ok(left?)
}

/// What a run reads.
struct Sources {
    dataset: Dataset,
    digests: Digests,
}

/// Checks the dataset, and makes the digests of it and of the model.
async fn sources(config: &TrainConfig, environment: &JobEnvironment, folder: &ModelFolder) -> Result<Sources, TrainError> {
    let dataset = scan(config, environment).await?;
    let reporter = &environment.reporter;
    reporter.identity(&config.spec_hash, Some(&dataset.digest), Some(dataset.skipped.len() as u64));
    reporter.stage(Stage::DownloadingModel, "making the digest of the model", 0);
    let fingerprint = unless_interrupted(environment, async { Ok(folder.fingerprint(Parts::ALL).await?) }).await?;
    let digests = Digests { dataset: dataset.digest.clone(), model: digest::to_text(&fingerprint) };
    Ok(Sources { dataset, digests })
}

/// The model's files as they are listed.
async fn open_model(config: &TrainConfig, environment: &JobEnvironment) -> Result<ModelFolder, TrainError> {
    environment.reporter.stage(Stage::DownloadingModel, "looking at the model", 0);
    let (source, options) = environment.model_source(config);
    unless_interrupted(environment, async {
        Ok(model_files::open(&source, environment::model_files(&config.model).as_ref(), &options, &environment.cache_dir).await?)
    })
    .await
}

/// The model's files as they are listed, and what it is, if it can be trained as the job says: before anything is downloaded or computed.
async fn look_at_model(config: &TrainConfig, environment: &JobEnvironment, budget: MemoryBudget) -> Result<(ModelFolder, Model), TrainError> {
    let folder = open_model(config, environment).await?;
    unless_interrupted(environment, async {
        let model = look::look(config, &folder).await?;
        look::memory(config, &model, budget, None)?;
        tracing::info!(model = finetune_model::survey::name(&model.transformer), t5 = model.t5, "the model is complete");
        Ok((folder, model))
    })
    .await
}

async fn scan(config: &TrainConfig, environment: &JobEnvironment) -> Result<Dataset, TrainError> {
    environment.reporter.stage(Stage::DownloadingDataset, "reading the dataset", 0);
    let store = environment.open(&config.dataset.uri, config)?;
    let dataset = unless_interrupted(environment, async { Ok(Dataset::scan(&store, &config.dataset).await?) }).await?;
    dataset.log();
    if let Some(captions) = &config.dataset.captions {
        tracing::info!("captions are changed: {captions}");
    }
    match &config.dataset.expected_digest {
        Some(expected) if *expected != dataset.digest && Some(expected) != dataset.metadata_digest.as_ref() => {
            Err(TrainError::DatasetChanged { expected: expected.clone(), found: dataset.digest })
        }
        _ => Ok(dataset),
    }
}

/// What the pictures are cropped to, if the model takes it: before anything is prepared.
fn shapes(config: &TrainConfig, dataset: &Dataset, base: &Model) -> Result<Shapes, TrainError> {
    let shapes = Shapes::new(&config.training, &dataset.samples)?;
    shapes.check(&dataset.samples, base.largest_side())?;
    if config.training.buckets.is_some() {
        tracing::info!("{shapes}");
    }
    if let Some(warning) = shapes.warning() {
        tracing::warn!("{warning}");
    }
    Ok(shapes)
}

/// The held-out pictures, if the job has any.
async fn held_out(config: &TrainConfig, environment: &JobEnvironment, base: &Model) -> Result<Option<HeldOut>, TrainError> {
    let Some(uri) = config.validation.as_ref().and_then(|v| v.dataset_uri.as_ref()) else { return Ok(None) };
    let store = environment.open(uri, config)?;
    let held_out = unless_interrupted(environment, HeldOut::load(&store, config, base.largest_side())).await?;
    Ok(Some(held_out))
}

/// Stops waiting when somebody asks to.
async fn unless_interrupted<T>(environment: &JobEnvironment, work: impl Future<Output = Result<T, TrainError>>) -> Result<T, TrainError> {
    tokio::select! {
        result = work => result,
        () = environment.interrupt.wait() => Err(TrainError::Interrupted { checkpoint: None }),
    }
}

struct Run<'a> {
    config: &'a TrainConfig,
    environment: &'a JobEnvironment,
    engine: Engine,
    /// What the process may hold on the device, as it was found at the start.
    budget: MemoryBudget,
    dataset: Dataset,
    shapes: Shapes,
    folder: ModelFolder,
    held_out: Option<HeldOut>,
    checkpoints: Checkpoints,
    /// What it is.
    base: Model,
}

impl Run<'_> {
    /// All of it.
    async fn whole(&self, output: &Store) -> Result<(RunResult, Vec<String>), TrainError> {
        let (mut trainer, model) = self.load().await?;
        self.train(&mut trainer, &model).await?;
        self.publish(output, &trainer, &model).await
    }

    /// Puts the log up to its end beside the checkpoints, where it can be read when the pod is gone. An attempt that has been superseded writes nothing.
    async fn keep_log(&self, error: &TrainError) {
        let reason = error.reason();
        if matches!(reason, Reason::Superseded | Reason::OutputInUse) {
            return;
        }
        self.environment.log.end(reason, &error::chain(error));
        let put = async { self.logs()?.put(log::FILE_NAME, self.environment.log.text()).await };
        match tokio::time::timeout(LAST_LOG, put).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = &error as &dyn std::error::Error, "failed to put the log into the bucket"),
            Err(_) => tracing::warn!("no time to put the log into the bucket"),
        }
    }

    /// Where this attempt's measurements and log go.
    fn logs(&self) -> Result<Store, StoreError> {
        self.checkpoints.store().child(&log_folder(self.checkpoints.attempt()))
    }

    /// Prepares data, loads the transformer and restores the newest checkpoint.
    async fn load(&self) -> Result<(Trainer, ModelDir), TrainError> {
        let Self { config, environment, dataset, folder, held_out, checkpoints, .. } = self;
        let reporter = &environment.reporter;
        reporter.stage(Stage::RestoringCheckpoint, "looking for a checkpoint", 0);
        let snapshot = self.snapshot().await?;
        let warm = match (&snapshot, &config.resume.from_checkpoint) {
            (None, Some(uri)) => {
                let (folder, file) = start::split(uri);
                Some(start::parameters(&environment.open(folder, config)?, file, &config.training, &self.base.transformer).await?)
            }
            _ => None,
        };

        let memory = self.memory(snapshot.as_ref())?;
        let prepared_store = checkpoints.store().child(PREPARED)?;
        let dataset_store = environment.open(&config.dataset.uri, config)?;
        let prepared = match prepare::prepare(
            config,
            dataset,
            self.shapes.clone(),
            held_out.as_ref().map_or(&[], |h| &h.captions),
            &dataset_store,
            folder,
            &prepared_store,
            &self.engine,
            memory.weights,
            environment,
        )
        .await
        {
            Err(PrepareError::Stopped) => return Err(TrainError::Interrupted { checkpoint: None }),
            prepared => prepared?,
        };
        unless_interrupted(environment, async {
            reporter.stage(Stage::DownloadingModel, "fetching the transformer", 0);
            let parts = Parts::TRANSFORMER | Parts::SCHEDULER;
            // The decoder draws validation pictures.
            Ok(folder.fetch(if config.validation.is_some() { parts | Parts::VAE } else { parts }, reporter).await?)
        })
        .await?;
        let model = ModelDir::open(folder.folder())?;
        let trainer = block_in_place(|| self.trainer(&model, prepared, snapshot, warm, &memory))?;
        Ok((trainer, model))
    }

    async fn snapshot(&self) -> Result<Option<Snapshot>, TrainError> {
        match self.checkpoints.latest().await? {
            Some((place, snapshot)) => {
                tracing::info!(step = place.step, attempt = place.attempt, "resuming from a checkpoint");
                Ok(Some(snapshot))
            }
            None if self.config.resume.policy == ResumePolicy::Required => {
                Err(CheckpointError::NotFound { uri: self.checkpoints.store().uri().to_owned() }.into())
            }
            None => Ok(None),
        }
    }

    /// How the work is divided. A run that goes on where it began keeps its weights as they were.
    fn memory(&self, snapshot: Option<&Snapshot>) -> Result<MemoryPlan, TrainError> {
        let began = snapshot.map(|snapshot| &snapshot.state.plan);
        let here = (device::name(&self.engine), self.engine.precision().to_string());
        let kept = began.filter(|plan| (plan.device.as_str(), &plan.dtype) == (here.0, &here.1)).map(|plan| plan.weights);
        let memory = look::memory(self.config, &self.base, self.budget, kept)?;
        let MemoryPlan { weights, micro_batch, recomputed_blocks, budget_bytes, .. } = memory;
        let bytes = memory.stages.last().map(finetune_api::plan::Stage::bytes);
        tracing::info!(?weights, micro_batch, recomputed_blocks, bytes, budget_bytes, "memory plan");
        self.environment.reporter.show(|page| page.memory = Some(memory.clone()));
        Ok(memory)
    }

    fn trainer(
        &self,
        model: &ModelDir,
        prepared: Prepared,
        snapshot: Option<Snapshot>,
        warm: Option<Vec<Param>>,
        memory: &MemoryPlan,
    ) -> Result<Trainer, TrainError> {
        let training = &self.config.training;
        let scheduler = model.scheduler()?;
        let weights = Arc::new(Weights::open(&model.path(Part::Transformer))?);
        let transformer = MmditConfig::open(&model.path(Part::Transformer))?;
        let layout = LoraLayout::new(&setup::lora(&training.lora), &transformer.linear_sites())?;
        let params = warm.unwrap_or_else(|| layout.init(training.seed));
        let total_steps = self.total_steps();
        let table = |(width, height): (u32, u32)| {
            let latent = [height, width].map(|side| side as usize / self.base.downscale);
            let patches = latent.iter().map(|side| side / transformer.patch_size).product();
            let table = setup::noise_levels(&training.flow_matching, &scheduler, patches);
            table.map(|table| (latent, table)).map_err(|problem| LayoutError::Unsupported { path: model.path(Part::Scheduler), problem })
        };
        let table_of = match training.flow_matching.shift {
            Some(ShiftConfig::ByResolution) => self.shapes.buckets().iter().map(|bucket| table(bucket.size)).collect::<Result<_, _>>()?,
            _ => BTreeMap::new(),
        };
        let (_, table) = table((training.resolution, training.resolution))?;
        let (density, kind) = setup::flow_matching(&training.flow_matching);
        let settings = Settings {
            objective: Objective { table, table_of, density, kind, latents: prepared.scaling(), seed: training.seed, dropout: training.lora.dropout > 0.0 },
            accumulation: training.gradient_accumulation_steps,
            caption_dropout: self.config.dataset.captions.as_ref().map_or(0.0, |captions| captions.dropout),
            prior_weight: training.prior_preservation.as_ref().map(|prior| prior.weight),
            max_grad_norm: training.max_grad_norm,
            schedule: setup::schedule(&training.learning_rate_schedule, training.optimizer.learning_rate, total_steps),
            checkpointing: training.gradient_checkpointing,
            plan: ExecutionPlan {
                device: device::name(&self.engine).to_owned(),
                dtype: self.engine.precision().to_string(),
                weights: memory.weights,
                micro_batch: memory.micro_batch,
                recomputed_blocks: memory.recomputed_blocks,
            },
        };
        let sampler = Sampler::new(SamplerConfig {
            samples: self.dataset.samples.iter().map(|s| s.image_digest).collect(),
            repeats: self.config.dataset.repeats,
            buckets: self.shapes.of_each(),
            class_pictures: training.prior_preservation.as_ref().map_or(0, |prior| prior.images),
            batch_size: training.batch_size,
            accumulation: training.gradient_accumulation_steps,
            seed: training.seed,
        })
        .map_err(super::trainer::TrainerError::from)?;
        layout.check(&params).map_err(super::trainer::TrainerError::from)?;
        if let Some(bytes) = memory.buffer_bytes() {
            self.engine.set_memory_cap(bytes as usize);
        }
        let format = setup::format(memory.weights);
        let mut learner = learner::load(weights, transformer, &self.engine, format, layout, &params, setup::optimizer(&training.optimizer))?;
        learner.set_recompute(&vec![true; memory.recomputed_blocks as usize]);
        let mut trainer = Trainer::new(settings, learner, sampler, prepared);
        if let Some(snapshot) = snapshot {
            trainer.restore(snapshot)?;
        }
        Ok(trainer)
    }

    fn total_steps(&self) -> u64 {
        StepPlan::new(&self.config.training, self.config.dataset.repeats, Some(&self.shapes.pictures())).total_steps.unwrap_or_default()
    }

    /// Updates until the end, with checkpoints on the way and one at the end.
    async fn train(&self, trainer: &mut Trainer, model: &ModelDir) -> Result<(), TrainError> {
        let (interrupt, reporter) = (&self.environment.interrupt, &self.environment.reporter);
        let total = self.total_steps();
        reporter.training(trainer.step(), total);
        // An earlier attempt may have been stopped after the update and before its pictures.
        if trainer.step() > 0 && !self.draw(trainer, model, total).await? {
            return Err(TrainError::Interrupted { checkpoint: None });
        }
        let mut saved_step = (trainer.step() > 0).then(|| trainer.step());
        let mut due = Due::new(&self.config.checkpoint);
        if trainer.step() == 0 && block_in_place(|| trainer.evaluate(interrupt))?.is_none() {
            return Err(self.interrupted(trainer, saved_step).await?);
        }
        self.show_run(trainer).await;
        while trainer.step() < total {
            match block_in_place(|| trainer.update(interrupt))? {
                Update::Interrupted => return Err(self.interrupted(trainer, saved_step).await?),
                Update::Done(record) => {
                    reporter.execution(trainer.plan(), self.engine.peak_memory());
                    reporter.update(&record, trainer.history().smoothed_loss());
                }
            }
            if !self.draw(trainer, model, total).await? {
                return Err(self.interrupted(trainer, saved_step).await?);
            }
            if trainer.step() < total && due.at(trainer.step()) {
                match self.save(trainer).await {
                    Ok(saved) => {
                        saved_step = Some(saved.step);
                        due.saved();
                    }
                    Err(TrainError::Checkpoint(CheckpointError::Store(error))) if error.kind() == StoreErrorKind::Unavailable => {
                        tracing::warn!(step = trainer.step(), error = &error as &dyn std::error::Error, "failed to save a checkpoint; trying again later");
                        reporter.checkpoint_failed(&error.to_string());
                        due.failed();
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        if block_in_place(|| trainer.evaluate(interrupt))?.is_none() {
            return Err(self.interrupted(trainer, saved_step).await?);
        }
        trainer.history().check_end(trainer.step())?;
        if saved_step != Some(trainer.step()) {
            self.save(trainer).await?;
        }
        Ok(())
    }

    /// Draws validation pictures if they are due; false if the run was asked to stop meanwhile.
    async fn draw(&self, trainer: &Trainer, model: &ModelDir, total: u64) -> Result<bool, TrainError> {
        let due = |v: &ValidationConfig| trainer.step() == total || (v.every_steps > 0 && trainer.step().is_multiple_of(v.every_steps));
        let Some(validation) = self.config.validation.as_ref().filter(|v| due(v)) else { return Ok(true) };
        if validation::is_kept(&self.checkpoints, trainer.step(), validation.prompts.len()).await? {
            return Ok(true);
        }
        let resolution = self.config.training.resolution;
        trainer.learner().trim()?;
        let drawn = block_in_place(|| validation::draw(validation, resolution, model, trainer, &self.engine, &self.environment.interrupt))?;
        let Some(pictures) = drawn else { return Ok(false) };
        validation::keep(&self.checkpoints, &pictures).await?;
        self.show_pictures(&pictures);
        Ok(true)
    }

    async fn save(&self, trainer: &Trainer) -> Result<Saved, TrainError> {
        let begin = Instant::now();
        let snapshot = block_in_place(|| trainer.snapshot())?;
        let saved = self.checkpoints.save(&snapshot).await?;
        self.environment.reporter.checkpoint(&saved, begin.elapsed().as_secs_f64());
        self.checkpoints.retain(self.config.checkpoint.keep_last).await?;
        let put = async { output::put_logs(&self.logs()?, trainer.history(), self.page(trainer), &self.environment.log).await };
        // The checkpoint is complete, and the next one brings them again.
        if let Err(error) = put.await {
            tracing::warn!(step = saved.step, error = &error as &dyn std::error::Error, "failed to put metrics and log beside the checkpoint");
        }
        Ok(saved)
    }

    /// Saves what there is (if it is worth it and allowed) and returns the error that says so.
    async fn interrupted(&self, trainer: &Trainer, saved_step: Option<u64>) -> Result<TrainError, TrainError> {
        let worth_it = trainer.step() > 0 && saved_step != Some(trainer.step()) && self.config.checkpoint.on_termination;
        if !worth_it {
            return Ok(TrainError::Interrupted { checkpoint: None });
        }
        loop {
            match self.save(trainer).await {
                Ok(saved) => return Ok(TrainError::Interrupted { checkpoint: Some(saved) }),
                // Until no time is left: `shutdown` ends it.
                Err(TrainError::Checkpoint(CheckpointError::Store(error)))
                    if error.kind() == StoreErrorKind::Unavailable && self.environment.interrupt.has_limit() =>
                {
                    tracing::warn!(error = &error as &dyn std::error::Error, "failed to save the last checkpoint; trying again");
                    tokio::time::sleep(LAST_SAVE_RETRY).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// What the result says besides its numbers.
    fn warnings(&self, trainer: &Trainer) -> Vec<String> {
        let settings = warnings(&self.config.training, Some(self.total_steps())).into_iter().map(|warning| warning.to_string());
        let truncation = trainer.prepared().truncation().map(ToString::to_string);
        let without_t5 = self.folder.is_without_t5().then(|| "the model leaves T5 out: captions were read by CLIP alone, 75 tokens of each".to_owned());
        settings.chain(self.shapes.warning()).chain(truncation).chain(without_t5).chain(trainer.history().worse(trainer.step())).collect()
    }

    /// Writes the results and cleans up.
    async fn publish(&self, output: &Store, trainer: &Trainer, model: &ModelDir) -> Result<(RunResult, Vec<String>), TrainError> {
        self.environment.reporter.stage(Stage::Publishing, "publishing", 0);
        let pictures = validation::kept(&self.checkpoints, trainer).await?;
        let encoders: &[&str] = if self.folder.is_without_t5() { &["CLIP-L", "CLIP-G"] } else { &["CLIP-L", "CLIP-G", "T5"] };
        let warnings = self.warnings(trainer);
        let (mut result, mut files) =
            output::make(self.config, &self.dataset, &self.shapes, &self.checkpoints, encoders, warnings, trainer, &pictures, &self.engine)?;
        if let (Some(validation), Some(held_out)) = (&self.config.validation, &self.held_out) {
            trainer.learner().trim()?;
            let drawn = block_in_place(|| comparison::draw(validation, held_out, model, trainer, &self.engine, &self.environment.interrupt))?;
            let Some((comparison, png)) = drawn else { return Err(TrainError::Interrupted { checkpoint: None }) };
            result.comparison = Some(comparison);
            result.files.insert(comparison::FILE_NAME.to_owned(), FileDigest::of(&png));
            files.insert(comparison::FILE_NAME.to_owned(), png.into());
        }
        self.show_result(&pictures, &result, files.get(comparison::FILE_NAME));
        match self.page(trainer) {
            Some(page) => {
                result.files.insert(page::FILE_NAME.to_owned(), FileDigest::of(page.as_bytes()));
                files.insert(page::FILE_NAME.to_owned(), page.into());
            }
            None => result.warnings.push(format!("{} could not be made; the log says why", page::FILE_NAME)),
        }
        let text = self.environment.log.text();
        let name = format!("logs/{}", log::FILE_NAME);
        result.files.insert(name.clone(), FileDigest::of(&text));
        files.insert(name, text);
        let Published { result, note } = publish::publish(output, &self.checkpoints, &self.config.output, files, &result).await?;
        if self.config.checkpoint.keep_after_success {
            return Ok((result, note.into_iter().collect()));
        }
        let left = self.checkpoints.delete_all().await.unwrap_or_else(|error| {
            // The result stands. Whoever has taken over finds it and cleans up.
            tracing::warn!(error = &error as &dyn std::error::Error, "failed to delete the checkpoints");
            LeftAlone::default()
        });
        Ok((result, note.into_iter().chain(notes(&left)).collect()))
    }
}
