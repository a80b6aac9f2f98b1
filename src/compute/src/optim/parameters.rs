//! The parameters in training with their sums of gradients and their optimizer, on the device of the model.

use super::layout::Layout;
use super::{AdamW, AdamW8bit, AdamWSettings, Optimizer, Param, Prodigy, ProdigySettings, StateError, StateTensor};
use crate::kernels::Device;

/// Which optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OptimizerSettings {
    /// AdamW with moments of 32 bits.
    AdamW(AdamWSettings),
    /// AdamW with moments of 8 bits.
    AdamW8bit(AdamWSettings),
    /// Prodigy.
    Prodigy(ProdigySettings),
}

impl OptimizerSettings {
    /// The optimizer at update 0 of these parameters.
    pub fn build<D: Device>(self, device: &D, params: &[Param]) -> Box<dyn Optimizer<D>> {
        match self {
            Self::AdamW(settings) => Box::new(AdamW::new(device, settings, params)),
            Self::AdamW8bit(settings) => Box::new(AdamW8bit::new(device, settings, params)),
            Self::Prodigy(settings) => Box::new(Prodigy::new(device, settings, params)),
        }
    }
}

/// Parameters, sums of gradients, optimizer.
#[derive(Debug)]
pub struct Parameters<D: Device> {
    device: D,
    layout: Layout,
    values: D::Buffer,
    sums: D::Buffer,
    /// What the next step multiplies gradients with.
    clip: f32,
    optimizer: Box<dyn Optimizer<D>>,
}

impl<D: Device> Parameters<D> {
    /// Parameters at update 0.
    pub fn new(device: &D, settings: OptimizerSettings, params: &[Param]) -> Self {
        let layout = Layout::of(params);
        Self {
            values: device.upload_f32(&layout.values(params)),
            sums: device.zeros_f32(layout.len()),
            clip: 1.0,
            optimizer: settings.build(device, params),
            device: device.clone(),
            layout,
        }
    }

    /// The parameters, laid out as [`crate::kernels::flat_offsets`] says.
    pub fn values(&self) -> &D::Buffer {
        &self.values
    }

    /// Where gradients are added, laid out as the parameters.
    pub fn sums(&mut self) -> &mut D::Buffer {
        &mut self.sums
    }

    /// Begins an update: sums of gradients are zero.
    pub fn begin(&mut self) {
        self.device.clear(&mut self.sums);
    }

    /// The sums of gradients on the host, in order.
    pub fn gradients(&self) -> Vec<Vec<f32>> {
        let values = self.device.download(&self.sums);
        self.layout.spans().map(|(_, span)| values[span].to_vec()).collect()
    }

    /// The gradients' global norm; the next step scales them by `min(1, max_norm / (norm + 1e-6))` if `max_norm` is above 0, as
    /// `torch.nn.utils.clip_grad_norm_`. A norm that is not finite scales nothing: the caller must stop then, nothing can be trained from it.
    pub fn clip(&mut self, max_norm: f64) -> f64 {
        let norm = self.device.square_sum(&self.sums).sqrt();
        let coefficient = max_norm / (norm + 1e-6);
        self.clip = if max_norm > 0.0 && norm.is_finite() && coefficient < 1.0 { coefficient as f32 } else { 1.0 };
        norm
    }

    /// One update at learning rate `lr`.
    pub fn step(&mut self, lr: f64) {
        self.optimizer.step(&mut self.values, &self.sums, self.clip, lr);
    }

    /// A copy of the parameters on the host.
    pub fn params(&self) -> Vec<Param> {
        self.layout.params(&self.device.download(&self.values))
    }

    /// The optimizer's state.
    pub fn state(&self) -> Vec<StateTensor> {
        self.optimizer.state()
    }

    /// Replaces parameters (the same, in the same order) and state.
    ///
    /// # Errors
    /// If the state does not fit; nothing is changed then.
    pub fn restore(&mut self, params: &[Param], state: Vec<StateTensor>) -> Result<(), StateError> {
        let values = self.layout.values(params);
        self.optimizer.load_state(state)?;
        self.device.overwrite(&mut self.values, &values);
        Ok(())
    }
}
