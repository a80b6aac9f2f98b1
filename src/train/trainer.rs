//! The state of a run in training: parameters, optimizer, sampler, history; one optimizer update at a time.

use std::time::Instant;

use candle_core::Device;

use super::checkpoint::{ExecutionPlan, Snapshot, State};
use super::division;
use super::history::{self, History, Record};
use super::interrupt::Interrupt;
use super::prepare::{Prepared, PreparedError};
use super::step::{self, Example, Objective};
use crate::data::sampler::{Item, Position, Sampler, SamplerError};
use crate::model::lora::{LoraError, LoraLayout};
use crate::model::mmdit::{Mmdit, MmditError};
use crate::optim::{self, Optimizer, Param, Schedule, StateError};
use crate::plan::GradientCheckpointing;

/// Why training cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainerError {
    /// The model failed.
    #[error("failed to compute a training step")]
    Model(#[from] MmditError),
    /// Prepared data is gone or damaged.
    #[error("failed to load prepared data")]
    Prepared(#[from] PreparedError),
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

/// The fixed parts of a run.
pub struct Settings {
    /// Device of the model.
    pub device: Device,
    /// What the loss is made of.
    pub objective: Objective,
    /// Batches per update.
    pub accumulation: u32,
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

/// See the module's documentation.
pub struct Trainer {
    settings: Settings,
    model: Mmdit,
    layout: LoraLayout,
    params: Vec<Param>,
    optimizer: Box<dyn Optimizer>,
    sampler: Sampler,
    prepared: Prepared,
    history: History,
    step: u64,
    /// The first batch of the open accumulation window.
    boundary: Position,
    training_seconds: f64,
    started: f64,
}

/// What an update is made of.
struct Window {
    grads: Vec<Vec<f32>>,
    loss: f64,
    prior_loss: f64,
    batches: u32,
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
    /// A run at its beginning. `params` must be the layout's.
    ///
    /// # Errors
    /// If the parameters do not fit the layout.
    pub fn new(
        settings: Settings,
        mut model: Mmdit,
        layout: LoraLayout,
        params: Vec<Param>,
        optimizer: Box<dyn Optimizer>,
        sampler: Sampler,
        prepared: Prepared,
    ) -> Result<Self, TrainerError> {
        layout.check(&params)?;
        model.set_lora(&params)?;
        let boundary = sampler.position();
        let started = history::now();
        Ok(Self {
            settings,
            model,
            layout,
            params,
            optimizer,
            sampler,
            prepared,
            history: History::default(),
            step: 0,
            boundary,
            training_seconds: 0.0,
            started,
        })
    }

    /// Goes on where the snapshot was taken.
    ///
    /// # Errors
    /// If a part of the snapshot does not fit this run.
    pub fn restore(&mut self, snapshot: Snapshot) -> Result<(), TrainerError> {
        let Snapshot { state, params, optimizer, history } = snapshot;
        let mut by_name: std::collections::BTreeMap<String, Param> = params.into_iter().map(|p| (p.name.clone(), p)).collect();
        let mut params: Vec<Param> = self.params.iter().filter_map(|p| by_name.remove(&p.name)).collect();
        params.extend(by_name.into_values());
        self.layout.check(&params)?;
        let (began, now) = (&state.plan, &self.settings.plan);
        if (&began.device, &began.dtype) == (&now.device, &now.dtype) {
            self.model.set_recompute(&vec![true; began.recomputed_blocks as usize]);
            self.settings.plan = state.plan.clone();
        } else {
            tracing::warn!(?began, ?now, "the run goes on with another device or type than it began; the results may differ in the last bits");
        }
        self.optimizer.load_state(optimizer)?;
        self.sampler.seek(state.position)?;
        self.model.set_lora(&params)?;
        self.params = params;
        self.history = history;
        self.step = state.step;
        self.boundary = state.position;
        self.training_seconds = state.training_seconds;
        self.started = state.started;
        Ok(())
    }

    /// All that a resumed run needs, as of the last update.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            state: State {
                step: self.step,
                position: self.boundary,
                seed: self.settings.objective.seed,
                plan: self.settings.plan.clone(),
                training_seconds: self.training_seconds,
                started: self.started,
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            params: self.params.clone(),
            optimizer: self.optimizer.state(),
            history: self.history.clone(),
        }
    }

    /// One optimizer update: micro-batches until the window closes, clipping, optimizer, schedule. A window for which the device had too
    /// little memory is divided further and computed again.
    ///
    /// # Errors
    /// [`TrainerError::Diverged`] if a loss or the gradient is not finite; the parameters are unchanged then.
    pub fn update(&mut self, interrupt: &Interrupt) -> Result<Update, TrainerError> {
        let begin = Instant::now();
        let step = self.step + 1;
        let window = loop {
            match self.window(step, interrupt) {
                Ok(Some(window)) => break window,
                Ok(None) => {
                    self.sampler.seek(self.boundary)?;
                    return Ok(Update::Interrupted);
                }
                Err(error) if self.divides_further(&error) => self.sampler.seek(self.boundary)?,
                Err(error) => return Err(error),
            }
        };
        let Window { mut grads, loss, prior_loss, batches } = window;
        let gradient_norm = self.clip(&mut grads);
        finite(step, "gradient norm", gradient_norm)?;
        let learning_rate = self.settings.schedule.lr(self.step);
        self.optimizer.step(&mut self.params, &grads, learning_rate);
        self.model.set_lora(&self.params)?;
        self.step = step;
        self.boundary = self.sampler.position();
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

    /// Gradients and losses of the next window; `None` if asked to stop.
    fn window(&mut self, step: u64, interrupt: &Interrupt) -> Result<Option<Window>, TrainerError> {
        let grads = self.params.iter().map(|p| vec![0.0; p.value.len()]).collect();
        let mut window = Window { grads, loss: 0.0, prior_loss: 0.0, batches: 0 };
        loop {
            if interrupt.requested() {
                return Ok(None);
            }
            let batch = self.sampler.next_batch();
            let Settings { objective, device, accumulation, prior_weight, plan, .. } = &self.settings;
            let weight = 1.0 / batch.items.len() as f64 / f64::from(*accumulation);
            let (mut loss, mut prior_loss) = (0.0, 0.0);
            for items in batch.items.chunks(plan.micro_batch.max(1) as usize) {
                let (examples, ordinals) = self.inputs(items)?;
                let coefficients = step::coefficients(items.len(), weight, *prior_weight);
                let micro = step::micro_batch(&self.model, objective, device, &examples.iter().collect::<Vec<_>>(), batch.epoch, &ordinals, &coefficients)?;
                let (own, class) = micro.losses.split_at(items.len());
                let (own, class): (f64, f64) = (own.iter().sum(), class.iter().sum());
                finite(step, "loss", own + class)?;
                for (sum, grad) in window.grads.iter_mut().zip(&micro.grads) {
                    sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g);
                }
                loss += own;
                prior_loss += class;
            }
            window.loss += loss / batch.items.len() as f64;
            window.prior_loss += prior_loss / batch.items.len() as f64;
            window.batches += 1;
            if batch.sync {
                break;
            }
        }
        Ok(Some(window))
    }

    /// After an out-of-memory: divides the work further, if that is possible. The sums and the random numbers stay the same.
    fn divides_further(&mut self, error: &TrainerError) -> bool {
        let TrainerError::Model(MmditError::Device(cause)) = error else { return false };
        let layers = self.model.config().num_layers as u32;
        let plan = cause.is_out_of_memory().then(|| division::smaller(&self.settings.plan, layers, self.settings.checkpointing)).flatten();
        let Some(plan) = plan else { return false };
        tracing::warn!(
            error = cause as &dyn std::error::Error,
            micro_batch = plan.micro_batch,
            recomputed_blocks = plan.recomputed_blocks,
            "out of GPU memory: the step is divided further and computed again"
        );
        self.model.set_recompute(&vec![true; plan.recomputed_blocks as usize]);
        self.model.trim();
        self.settings.plan = plan;
        true
    }

    /// The data of a batch's items, after them those of their class pictures, and the names of their random numbers.
    fn inputs(&self, items: &[Item]) -> Result<(Vec<Example>, Vec<u64>), PreparedError> {
        let own = items.iter().map(|item| Ok((self.prepared.example(item.sample, item.copy)?, item.ordinal)));
        let class = items.iter().filter_map(|item| item.class).map(|class| Ok((self.prepared.class_example(class.index)?, class.ordinal)));
        own.chain(class).collect()
    }

    fn clip(&self, grads: &mut [Vec<f32>]) -> f64 {
        if self.settings.max_grad_norm > 0.0 { optim::clip_global_norm(grads, self.settings.max_grad_norm) } else { optim::clip::global_norm(grads) }
    }

    /// Measures the evaluation loss and records it, unless this step's is known or the run is asked to stop.
    ///
    /// # Errors
    /// If the model fails or the loss is not finite.
    pub fn evaluate(&mut self, interrupt: &Interrupt) -> Result<Option<f64>, TrainerError> {
        if let Some(known) = self.history.evaluation_at(self.step) {
            return Ok(Some(known));
        }
        let samples = super::evaluate::subset(self.prepared.samples());
        let examples: Vec<(usize, Example)> = samples.into_iter().map(|s| Ok((s, self.prepared.example(s, 0)?))).collect::<Result<_, PreparedError>>()?;
        let Settings { objective, device, plan, .. } = &self.settings;
        let loss = super::evaluate::evaluate(&self.model, objective, device, &examples, plan.micro_batch as usize, || !interrupt.requested())?;
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
        let Position { epoch, batch } = self.boundary;
        epoch as f64 + batch as f64 / self.sampler.batches_per_epoch() as f64
    }

    /// What was measured.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The trained parameters.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The modules with LoRA.
    pub fn layout(&self) -> &LoraLayout {
        &self.layout
    }

    /// Prepared data.
    pub fn prepared(&self) -> &Prepared {
        &self.prepared
    }

    /// The model with the present parameters.
    pub fn model(&self) -> &Mmdit {
        &self.model
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
