//! A transformer in training: model, parameters, sums of gradients and optimizer on one device, behind an object without its type.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::lora::{LoraError, LoraLayout};
use crate::mmdit::{FlowTarget, Mmdit, MmditConfig, MmditError, MmditInputs, PendingLosses};
use crate::sample::{PromptBatch, SampleError, Velocity};
use crate::weights::Weights;
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Device, DeviceError, Engine, WeightFormat, catch};
use finetune_compute::nn::DropoutKey;
use finetune_compute::optim::{OptimizerSettings, Param, Parameters, StateError, StateTensor};
use finetune_compute::with_device;

/// Why a state could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The parameters do not fit the model.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// The optimizer's state does not fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What trains: see the module's documentation. Every method that computes returns the device's failure as an error.
pub trait Learner: Velocity + Send + Sync {
    /// The transformer's configuration.
    fn config(&self) -> &MmditConfig;

    /// The modules with LoRA.
    fn layout(&self) -> &LoraLayout;

    /// As [`Mmdit::set_recompute`].
    fn set_recompute(&mut self, blocks: &[bool]);

    /// As [`Mmdit::trim`].
    ///
    /// # Errors
    /// If the device fails.
    fn trim(&self) -> Result<(), DeviceError>;

    /// Begins an update: sums of gradients are zero, and losses that were not taken are forgotten.
    ///
    /// # Errors
    /// If the device fails.
    fn begin(&mut self) -> Result<(), DeviceError>;

    /// Adds the gradients of a micro-batch to the sums. On a GPU it may return before they are computed, so that the next micro-batch can be put on the
    /// stream meanwhile; [`Learner::losses`] returns what they are the gradients of.
    ///
    /// # Errors
    /// If the model refuses the inputs, or the device fails.
    fn accumulate(&mut self, inputs: MmditInputs<'_>, dropout: Option<&DropoutKey>, target: &FlowTarget<'_>) -> Result<(), MmditError>;

    /// Each sample's loss in the earliest micro-batch of this update whose losses were not taken yet; waits for it. Empty if there is none.
    ///
    /// # Errors
    /// If the device fails.
    fn losses(&mut self) -> Result<Vec<f64>, DeviceError>;

    /// The velocity [B, C, h, w] with the present parameters, without dropout.
    ///
    /// # Errors
    /// If the model refuses the inputs, or the device fails.
    fn predict(&self, inputs: MmditInputs<'_>) -> Result<HostTensor, MmditError>;

    /// A copy of the sums of gradients, aligned with the parameters.
    ///
    /// # Errors
    /// If the device fails.
    fn gradients(&self) -> Result<Vec<Vec<f32>>, DeviceError>;

    /// The gradients' global norm, to which the next step clips them if `max_norm` is above 0 and below it.
    ///
    /// # Errors
    /// If the device fails.
    fn clip(&mut self, max_norm: f64) -> Result<f64, DeviceError>;

    /// One update; the model gets the new parameters.
    ///
    /// # Errors
    /// If the device fails.
    fn step(&mut self, learning_rate: f64) -> Result<(), DeviceError>;

    /// A copy of the parameters.
    ///
    /// # Errors
    /// If the device fails.
    fn params(&self) -> Result<Vec<Param>, DeviceError>;

    /// The optimizer's state.
    ///
    /// # Errors
    /// If the device fails.
    fn state(&self) -> Result<Vec<StateTensor>, DeviceError>;

    /// Replaces parameters (those of the layout, in any order) and state.
    ///
    /// # Errors
    /// If they do not fit, or the device fails.
    fn restore(&mut self, params: Vec<Param>, state: Vec<StateTensor>) -> Result<(), RestoreError>;
}

/// Loads a transformer onto the engine's device to train these modules, at update 0 from these parameters (the layout's, in canonical order). `format`: as
/// [`Mmdit::load_as`].
///
/// # Errors
/// If a weight or the parameters do not fit, or the device fails.
pub fn load(
    weights: Arc<Weights>,
    config: MmditConfig,
    engine: &Engine,
    format: WeightFormat,
    layout: LoraLayout,
    params: &[Param],
    optimizer: OptimizerSettings,
) -> Result<Box<dyn Learner>, MmditError> {
    with_device!(engine, device => Ok(Box::new(OnDevice::load(weights, config, (device, format), layout, params, optimizer)?)))
}

struct OnDevice<D: Device> {
    model: Mmdit<D>,
    parameters: Parameters<D>,
    /// Of this update's micro-batches, in order.
    losses: VecDeque<PendingLosses<D>>,
}

impl<D: Device> OnDevice<D> {
    fn load(
        weights: Arc<Weights>,
        config: MmditConfig,
        (device, format): (&D, WeightFormat),
        layout: LoraLayout,
        params: &[Param],
        optimizer: OptimizerSettings,
    ) -> Result<Self, MmditError> {
        layout.check(params)?;
        catch(|| {
            let mut model = Mmdit::load_as(weights, config, device, format)?;
            model.attach_layout(layout)?;
            let parameters = Parameters::new(device, optimizer, params);
            model.set_lora_from(parameters.values());
            Ok(Self { model, parameters, losses: VecDeque::new() })
        })?
    }
}

impl<D: Device> Velocity for OnDevice<D> {
    fn velocity(
        &self,
        x: &HostTensor,
        timestep: &HostTensor,
        prompts: &PromptBatch,
        lora_scale: f64,
        skip_blocks: &[usize],
    ) -> Result<HostTensor, SampleError> {
        self.model.velocity(x, timestep, prompts, lora_scale, skip_blocks)
    }
}

impl<D: Device> Learner for OnDevice<D> {
    fn config(&self) -> &MmditConfig {
        self.model.config()
    }

    fn layout(&self) -> &LoraLayout {
        self.model.layout()
    }

    fn set_recompute(&mut self, blocks: &[bool]) {
        self.model.set_recompute(blocks);
    }

    fn trim(&self) -> Result<(), DeviceError> {
        catch(|| self.model.trim())
    }

    fn begin(&mut self) -> Result<(), DeviceError> {
        self.losses.clear();
        catch(|| self.parameters.begin())
    }

    fn accumulate(&mut self, inputs: MmditInputs<'_>, dropout: Option<&DropoutKey>, target: &FlowTarget<'_>) -> Result<(), MmditError> {
        let mut attempt = || catch(|| self.model.flow_step_into(inputs, dropout, target, self.parameters.sums()));
        let step = match attempt() {
            // The sums are as they were: gradients are added to them when all else is done.
            Err(error) if error.is_out_of_memory() && self.model.stop_recording() => {
                tracing::info!("too little GPU memory for the recorded steps of several sizes: steps are not recorded from now on");
                attempt()
            }
            step => step,
        };
        if step.is_err() {
            self.model.clear_recorded();
        }
        self.losses.push_back(step??);
        Ok(())
    }

    fn losses(&mut self) -> Result<Vec<f64>, DeviceError> {
        let Some(losses) = self.losses.pop_front() else { return Ok(Vec::new()) };
        catch(|| losses.receive(self.model.device()))
    }

    fn predict(&self, inputs: MmditInputs<'_>) -> Result<HostTensor, MmditError> {
        let MmditInputs { x, timestep, prompt_embeds, pooled } = inputs;
        catch(|| self.model.forward_only(x, timestep, prompt_embeds, pooled, 1.0, &[]))?
    }

    fn gradients(&self) -> Result<Vec<Vec<f32>>, DeviceError> {
        catch(|| self.parameters.gradients())
    }

    fn clip(&mut self, max_norm: f64) -> Result<f64, DeviceError> {
        catch(|| self.parameters.clip(max_norm))
    }

    fn step(&mut self, learning_rate: f64) -> Result<(), DeviceError> {
        catch(|| {
            self.parameters.step(learning_rate);
            self.model.set_lora_from(self.parameters.values());
        })
    }

    fn params(&self) -> Result<Vec<Param>, DeviceError> {
        catch(|| self.parameters.params())
    }

    fn state(&self) -> Result<Vec<StateTensor>, DeviceError> {
        catch(|| self.parameters.state())
    }

    fn restore(&mut self, params: Vec<Param>, state: Vec<StateTensor>) -> Result<(), RestoreError> {
        let mut by_name: std::collections::BTreeMap<String, Param> = params.into_iter().map(|p| (p.name.clone(), p)).collect();
        let mut params: Vec<Param> = self.layout().parameters().iter().filter_map(|(name, _)| by_name.remove(name)).collect();
        // What does not belong to it is refused with its name.
        params.extend(by_name.into_values());
        self.layout().check(&params)?;
        catch(|| {
            self.parameters.restore(&params, state)?;
            self.model.set_lora_from(self.parameters.values());
            Ok(())
        })?
    }
}
