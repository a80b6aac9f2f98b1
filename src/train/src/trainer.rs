//! The state of a run in training: parameters, optimizer, sampler, history; one optimizer update at a time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::checkpoint::{ExecutionPlan, Snapshot, State};
use super::division;
use super::feed::{Fed, Feed, FeedError, Source};
use super::history::{self, History, Record};
use super::interrupt::Interrupt;
use super::prepare::{Prepared, PreparedError};
use super::step::{self, Example, Objective};
use finetune_api::plan::GradientCheckpointing;
use finetune_compute::kernels::DeviceError;
use finetune_compute::optim::{Param, Schedule, StateError};
use finetune_data::sampler::{Position, Sampler, SamplerError};
use finetune_model::learner::{Learner, RestoreError};
use finetune_model::lora::{LoraError, LoraLayout};
use finetune_model::mmdit::MmditError;

/// Why training cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainerError {
    /// The model failed.
    #[error("failed to compute a training step")]
    Model(#[from] MmditError),
    /// The device failed.
    #[error("failed to update the parameters")]
    Device(#[from] DeviceError),
    /// Prepared data is gone or damaged.
    #[error("failed to load prepared data")]
    Prepared(#[from] PreparedError),
    /// The next micro-batch could not be made.
    #[error("failed to make the next micro-batch")]
    Feed(#[from] FeedError),
    /// Loss or gradient is not a number.
    #[error(
        "training diverged at step {step}: the {what} is not finite ({value}). Lower training.optimizer.learningRate or \
         training.maxGradNorm, and check the dataset and the model's weights"
    )]
    Diverged {
        /// The update that failed, from 1.
        step: u64,
        /// What is not finite.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// The loss is a multiple of what the base model has.
    #[error(
        "training diverged: the loss with fixed noise was {start:.4} at the start and is {end:.4} after {step} steps, so the LoRA is worse than none. \
         Lower training.optimizer.learningRate; nothing is published, and the checkpoints are kept"
    )]
    FarAboveStart {
        /// Updates done.
        step: u64,
        /// The loss before the first update.
        start: f64,
        /// The loss now.
        end: f64,
    },
    /// The checkpoint's LoRA does not fit the model.
    #[error("failed to restore the LoRA")]
    Lora(#[from] LoraError),
    /// The checkpoint's optimizer state does not fit.
    #[error("failed to restore the optimizer")]
    Optimizer(#[from] StateError),
    /// The checkpoint's place in the dataset does not exist.
    #[error("failed to restore the place in the dataset")]
    Sampler(#[from] SamplerError),
}

impl From<RestoreError> for TrainerError {
    fn from(error: RestoreError) -> Self {
        match error {
            RestoreError::Lora(error) => error.into(),
            RestoreError::State(error) => error.into(),
            RestoreError::Device(error) => error.into(),
        }
    }
}

/// The fixed parts of a run.
pub struct Settings {
    /// What the loss is made of.
    pub objective: Objective,
    /// Batches per update.
    pub accumulation: u32,
    /// Share of the draws that are trained with the empty caption.
    pub caption_dropout: f64,
    /// What the mean loss of the class pictures counts.
    pub prior_weight: Option<f64>,
    /// Clipping threshold; 0: none.
    pub max_grad_norm: f64,
    /// Learning rates.
    pub schedule: Schedule,
    /// Whether blocks may be recomputed when the device runs out of memory.
    pub checkpointing: GradientCheckpointing,
    /// How the numbers are made.
    pub plan: ExecutionPlan,
}

/// Micro-batches that may be on the device's stream while the losses of the one before them are read: with one, a GPU has work while the host takes the losses
/// and prepares what comes next.
const UNDER_WAY: usize = 1;

/// See the module's documentation.
pub struct Trainer {
    settings: Settings,
    learner: Box<dyn Learner>,
    /// At the first batch of the open accumulation window.
    sampler: Sampler,
    prepared: Arc<Prepared>,
    /// The micro-batches from `sampler` on, once the first is asked for.
    feed: Option<Feed>,
    history: History,
    step: u64,
    training_seconds: f64,
    started: f64,
}

/// What is summed over an update beside the gradients.
#[derive(Default)]
struct Window {
    loss: f64,
    prior_loss: f64,
    batches: u32,
    /// The batch after it.
    end: Position,
}

/// How an update ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// The parameters have changed.
    Done(Record),
    /// Asked to stop before the window was closed: its gradients are dropped, and a resumed run computes them again.
    Interrupted,
}

impl Trainer {
    /// A run at its beginning.
    pub fn new(settings: Settings, learner: Box<dyn Learner>, sampler: Sampler, prepared: Prepared) -> Self {
        Self {
            settings,
            learner,
            sampler,
            prepared: Arc::new(prepared),
            feed: None,
            history: History::default(),
            step: 0,
            training_seconds: 0.0,
            started: history::now(),
        }
    }

    /// Goes on where the snapshot was taken.
    ///
    /// # Errors
    /// If a part of the snapshot does not fit this run.
    pub fn restore(&mut self, snapshot: Snapshot) -> Result<(), TrainerError> {
        let Snapshot { state, params, optimizer, history } = snapshot;
        let (began, now) = (&state.plan, &self.settings.plan);
        if (&began.device, &began.dtype, began.weights) == (&now.device, &now.dtype, now.weights) {
            self.learner.set_recompute(&vec![true; began.recomputed_blocks as usize]);
            self.settings.plan = state.plan.clone();
        } else {
            tracing::warn!(
                ?began,
                ?now,
                "the run goes on with another device, type or format of weights than it began; the results may differ in the last bits"
            );
        }
        self.learner.restore(params, optimizer)?;
        self.sampler.seek(state.position)?;
        self.feed = None;
        self.history = history;
        self.step = state.step;
        self.training_seconds = state.training_seconds;
        self.started = state.started;
        Ok(())
    }

    /// All that a resumed run needs, as of the last update.
    ///
    /// # Errors
    /// If the device fails.
    pub fn snapshot(&self) -> Result<Snapshot, TrainerError> {
        Ok(Snapshot {
            state: State {
                step: self.step,
                position: self.sampler.position(),
                seed: self.settings.objective.seed,
                plan: self.settings.plan.clone(),
                training_seconds: self.training_seconds,
                started: self.started,
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            params: self.learner.params()?,
            optimizer: self.learner.state()?,
            history: self.history.clone(),
        })
    }

    /// One optimizer update: micro-batches until the window closes, clipping, optimizer, schedule. A window for which the device had too
    /// little memory is divided further and computed again.
    ///
    /// # Errors
    /// [`TrainerError::Diverged`] if a loss or the gradient is not finite; the parameters are unchanged then.
    pub fn update(&mut self, interrupt: &Interrupt) -> Result<Update, TrainerError> {
        let update = self.try_update(interrupt);
        if !matches!(update, Ok(Update::Done(_))) {
            // What was handed out of the open window is needed again.
            self.feed = None;
        }
        update
    }

    fn try_update(&mut self, interrupt: &Interrupt) -> Result<Update, TrainerError> {
        let begin = Instant::now();
        let step = self.step + 1;
        let window = loop {
            match self.window(step, interrupt) {
                Ok(Some(window)) => break window,
                Ok(None) => return Ok(Update::Interrupted),
                Err(error) if self.divides_further(&error) => self.feed = None,
                Err(error) => return Err(error),
            }
        };
        let Window { loss, prior_loss, batches, end } = window;
        let gradient_norm = self.learner.clip(self.settings.max_grad_norm)?;
        finite(step, "gradient norm", gradient_norm)?;
        let learning_rate = self.settings.schedule.lr(self.step);
        self.learner.step(learning_rate)?;
        self.step = step;
        self.sampler.seek(end)?;
        let step_seconds = begin.elapsed().as_secs_f64();
        self.training_seconds += step_seconds;
        let (loss, prior_loss) = (loss / f64::from(batches), prior_loss / f64::from(batches));
        let prior = self.settings.prior_weight;
        let record = Record {
            step,
            epoch: self.epochs(),
            time: history::now(),
            loss: Some(prior.map_or(loss, |weight| loss + weight * prior_loss)),
            prior_loss: prior.map(|_| prior_loss),
            learning_rate: Some(learning_rate),
            gradient_norm: Some(gradient_norm),
            step_seconds: Some(step_seconds),
            memory_bytes: history::peak_memory_bytes(),
            evaluation_loss: None,
        };
        self.history.push(record.clone());
        Ok(Update::Done(record))
    }

    /// Losses of the next window, whose gradients are summed; `None` if asked to stop.
    fn window(&mut self, step: u64, interrupt: &Interrupt) -> Result<Option<Window>, TrainerError> {
        let mut window = Window::default();
        self.learner.begin()?;
        let (mut loss, mut prior_loss) = (0.0, 0.0);
        let (mut under_way, mut complete) = (VecDeque::new(), false);
        loop {
            if interrupt.requested() {
                return Ok(None);
            }
            if !complete {
                let Fed { micro_batch, samples, batch } = self.next_micro_batch()?;
                step::micro_batch(self.learner.as_mut(), &micro_batch)?;
                complete = batch.as_ref().is_some_and(|batch| batch.sync);
                under_way.push_back((samples, batch));
            }
            if under_way.len() <= UNDER_WAY && !complete {
                continue;
            }
            let Some((samples, batch)) = under_way.pop_front() else { return Ok(Some(window)) };
            let losses = self.learner.losses()?;
            let (own, class) = losses.split_at(samples);
            let (own, class): (f64, f64) = (own.iter().sum(), class.iter().sum());
            finite(step, "loss", own + class)?;
            loss += own;
            prior_loss += class;
            let Some(batch) = batch else { continue };
            window.loss += std::mem::take(&mut loss) / batch.items as f64 * batch.share;
            window.prior_loss += std::mem::take(&mut prior_loss) / batch.items as f64 * batch.share;
            window.batches += 1;
            window.end = batch.next;
        }
    }

    fn next_micro_batch(&mut self) -> Result<Fed, FeedError> {
        let feed = if let Some(feed) = self.feed.take() {
            feed
        } else {
            let Settings { objective, accumulation, prior_weight, caption_dropout, plan, .. } = &self.settings;
            let source = Source {
                prepared: Arc::clone(&self.prepared),
                objective: objective.clone(),
                accumulation: *accumulation,
                prior_weight: *prior_weight,
                caption_dropout: *caption_dropout,
                micro_batch: plan.micro_batch.max(1) as usize,
            };
            Feed::start(source, self.sampler.clone())?
        };
        self.feed.insert(feed).next()
    }

    /// After an out-of-memory: divides the work further, if that is possible. The sums and the random numbers stay the same.
    fn divides_further(&mut self, error: &TrainerError) -> bool {
        let TrainerError::Model(MmditError::Device(cause)) = error else { return false };
        let layers = self.learner.config().num_layers as u32;
        let plan = cause.is_out_of_memory().then(|| division::smaller(&self.settings.plan, layers, self.settings.checkpointing)).flatten();
        let Some(plan) = plan else { return false };
        tracing::warn!(
            error = cause as &dyn std::error::Error,
            micro_batch = plan.micro_batch,
            recomputed_blocks = plan.recomputed_blocks,
            "out of GPU memory: the step is divided further and computed again"
        );
        self.learner.set_recompute(&vec![true; plan.recomputed_blocks as usize]);
        if let Err(error) = self.learner.trim() {
            tracing::warn!(error = &error as &dyn std::error::Error, "failed to give memory back");
        }
        self.settings.plan = plan;
        true
    }

    /// Measures the evaluation loss and records it, unless this step's is known or the run is asked to stop.
    ///
    /// # Errors
    /// If the model fails or the loss is not finite.
    pub fn evaluate(&mut self, interrupt: &Interrupt) -> Result<Option<f64>, TrainerError> {
        if let Some(known) = self.history.evaluation_at(self.step) {
            return Ok(Some(known));
        }
        self.learner.trim()?;
        let samples = super::evaluate::subset(self.prepared.samples());
        let examples: Vec<(usize, Example)> = samples.into_iter().map(|s| Ok((s, self.prepared.example(s, 0, 0)?))).collect::<Result<_, PreparedError>>()?;
        let Settings { objective, plan, .. } = &self.settings;
        let loss = super::evaluate::evaluate(self.learner.as_ref(), objective, &examples, plan.micro_batch as usize, || !interrupt.requested())?;
        if let Some(loss) = loss {
            finite(self.step, "evaluation loss", loss)?;
            let record = Record { step: self.step, epoch: self.epochs(), time: history::now(), evaluation_loss: Some(loss), ..Record::default() };
            self.history.push(record);
        }
        Ok(loss)
    }

    /// How a step is divided now.
    pub fn plan(&self) -> &ExecutionPlan {
        &self.settings.plan
    }

    /// Optimizer updates done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Passes over the dataset done, with a fraction.
    pub fn epochs(&self) -> f64 {
        let Position { epoch, batch } = self.sampler.position();
        epoch as f64 + batch as f64 / self.sampler.batches_per_epoch() as f64
    }

    /// What was measured.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// A copy of the trained parameters.
    ///
    /// # Errors
    /// If the device fails.
    pub fn params(&self) -> Result<Vec<Param>, TrainerError> {
        Ok(self.learner.params()?)
    }

    /// The modules with LoRA.
    pub fn layout(&self) -> &LoraLayout {
        self.learner.layout()
    }

    /// Prepared data.
    pub fn prepared(&self) -> &Prepared {
        &self.prepared
    }

    /// The model with the present parameters.
    pub fn learner(&self) -> &dyn Learner {
        self.learner.as_ref()
    }

    /// Seconds spent training, all attempts together.
    pub fn training_seconds(&self) -> f64 {
        self.training_seconds
    }

    /// When the first attempt began, in seconds since 1970.
    pub fn started(&self) -> f64 {
        self.started
    }
}

fn finite(step: u64, what: &'static str, value: f64) -> Result<(), TrainerError> {
    if value.is_finite() { Ok(()) } else { Err(TrainerError::Diverged { step, what, value }) }
}
