//! The parameters in training with their sums of gradients and their optimizer: on the host, or where the model is.

use super::step::{self, MicroBatch};
use super::trainer::TrainerError;
use finetune_api::plan::OptimizerConfig;
use finetune_compute::kernels::Engine;
#[cfg(feature = "cuda")]
use finetune_compute::optim::gpu::{GpuAdamW, HostAdamW};
use finetune_compute::optim::{self, Optimizer, Param, StateTensor};
use finetune_model::lora::LoraLayout;
use finetune_model::mmdit::{Mmdit, MmditError};

/// Parameters, sums of gradients, optimizer.
pub struct Parameters(Place);

enum Place {
    Host(Host),
    #[cfg(feature = "cuda")]
    Gpu(Box<GpuAdamW>),
}

struct Host {
    params: Vec<Param>,
    optimizer: Box<dyn Optimizer>,
    sums: Vec<Vec<f32>>,
}

impl Parameters {
    /// Parameters at update 0. On a GPU the optimizer runs there if it can.
    ///
    /// # Errors
    /// If the device has too little memory.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, clippy::unnecessary_wraps, reason = "used with the feature"))]
    pub fn new(engine: &Engine, config: &OptimizerConfig, params: Vec<Param>) -> Result<Self, TrainerError> {
        #[cfg(feature = "cuda")]
        if engine.is_cuda() {
            let host = match super::setup::adamw(config) {
                Some((settings, false)) => Some(HostAdamW::Full(optim::AdamW::new(settings, &params))),
                Some((settings, true)) => Some(HostAdamW::Codes(Box::new(optim::AdamW8bit::new(settings, &params)))),
                None => None,
            };
            if let Some(host) = host
                && let Some(gpu) = GpuAdamW::new(engine, &params, host)?
            {
                return Ok(Self(Place::Gpu(Box::new(gpu))));
            }
        }
        let (optimizer, sums) = (super::setup::optimizer(config, &params), Vec::new());
        Ok(Self(Place::Host(Host { params, optimizer, sums })))
    }

    /// Begins an update: sums of gradients are zero.
    ///
    /// # Errors
    /// If the device fails.
    pub fn begin(&mut self) -> Result<(), TrainerError> {
        match &mut self.0 {
            Place::Host(host) => host.sums = host.params.iter().map(|p| vec![0.0; p.value.len()]).collect(),
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => gpu.begin()?,
        }
        Ok(())
    }

    /// Adds the gradients of a micro-batch; returns each sample's loss.
    ///
    /// # Errors
    /// If the model refuses the inputs, or the device fails.
    pub fn add(&mut self, model: &Mmdit, batch: &MicroBatch) -> Result<Vec<f64>, MmditError> {
        match &mut self.0 {
            Place::Host(host) => {
                let (losses, grads) = step::micro_batch(model, batch)?;
                for (sum, grad) in host.sums.iter_mut().zip(&grads) {
                    sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g);
                }
                Ok(losses)
            }
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => step::micro_batch_into(model, batch, gpu.sums()),
        }
    }

    /// The gradients' global norm, to which they are clipped if `max_norm` is above 0 and below it.
    ///
    /// # Errors
    /// If the device fails.
    #[cfg_attr(not(feature = "cuda"), expect(clippy::unnecessary_wraps, reason = "used with the feature"))]
    pub fn clip(&mut self, max_norm: f64) -> Result<f64, TrainerError> {
        match &mut self.0 {
            Place::Host(host) if max_norm > 0.0 => Ok(optim::clip_global_norm(&mut host.sums, max_norm)),
            Place::Host(host) => Ok(optim::clip::global_norm(&host.sums)),
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => Ok(gpu.clip(max_norm)?),
        }
    }

    /// One update; the model gets the new parameters.
    ///
    /// # Errors
    /// If the device fails.
    pub fn step(&mut self, model: &mut Mmdit, learning_rate: f64) -> Result<(), TrainerError> {
        match &mut self.0 {
            Place::Host(host) => host.optimizer.step(&mut host.params, &host.sums, learning_rate),
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => gpu.step(learning_rate)?,
        }
        self.give(model)
    }

    /// Gives the parameters to the model.
    ///
    /// # Errors
    /// If they are not the model's, or the device fails.
    pub fn give(&self, model: &mut Mmdit) -> Result<(), TrainerError> {
        match &self.0 {
            Place::Host(host) => model.set_lora(&host.params)?,
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => {
                if !model.set_lora_from(gpu.values())? {
                    model.set_lora(&gpu.params()?)?;
                }
            }
        }
        Ok(())
    }

    /// A copy of the parameters.
    ///
    /// # Errors
    /// If the device fails.
    #[cfg_attr(not(feature = "cuda"), expect(clippy::unnecessary_wraps, reason = "used with the feature"))]
    pub fn params(&self) -> Result<Vec<Param>, TrainerError> {
        match &self.0 {
            Place::Host(host) => Ok(host.params.clone()),
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => Ok(gpu.params()?),
        }
    }

    /// The optimizer's state.
    ///
    /// # Errors
    /// If the device fails.
    #[cfg_attr(not(feature = "cuda"), expect(clippy::unnecessary_wraps, reason = "used with the feature"))]
    pub fn state(&self) -> Result<Vec<StateTensor>, TrainerError> {
        match &self.0 {
            Place::Host(host) => Ok(host.optimizer.state()),
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => Ok(gpu.state()?),
        }
    }

    /// Replaces parameters (those of the layout, in any order) and state.
    ///
    /// # Errors
    /// If they do not fit, or the device fails.
    pub fn restore(&mut self, layout: &LoraLayout, params: Vec<Param>, state: Vec<StateTensor>) -> Result<(), TrainerError> {
        let mut by_name: std::collections::BTreeMap<String, Param> = params.into_iter().map(|p| (p.name.clone(), p)).collect();
        let mut params: Vec<Param> = layout.parameters().iter().filter_map(|(name, _)| by_name.remove(name)).collect();
        // What does not belong to it is refused with its name.
        params.extend(by_name.into_values());
        layout.check(&params)?;
        match &mut self.0 {
            Place::Host(host) => {
                host.optimizer.load_state(state)?;
                host.params = params;
            }
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => gpu.restore(&params, state).map_err(|error| match error {
                optim::gpu::RestoreError::State(error) => TrainerError::Optimizer(error),
                optim::gpu::RestoreError::Device(error) => error.into(),
            })?,
        }
        Ok(())
    }
}
