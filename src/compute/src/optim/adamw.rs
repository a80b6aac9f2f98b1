//! AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019), in the order of `torch.optim.AdamW`.

use super::layout::Layout;
use super::state::Incoming;
use super::{Optimizer, Param, StateData, StateError, StateTensor};
use crate::kernels::{AdamWScalars, Device};

/// Settings of AdamW and of its 8-bit form.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 1e-4 }
    }
}

impl AdamWSettings {
    /// The f32 numbers of one update, rounded from f64 once, as PyTorch does. `clip`: what gradients are multiplied with first.
    pub(super) fn scalars(&self, step: u64, lr: f64, clip: f32) -> AdamWScalars {
        let correction1 = 1.0 - self.beta1.powf(step as f64);
        let correction2 = 1.0 - self.beta2.powf(step as f64);
        AdamWScalars {
            keep: (1.0 - lr * self.weight_decay) as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            root_correction2: correction2.sqrt() as f32,
            epsilon: self.epsilon as f32,
            step_size: (lr / correction1) as f32,
            clip,
        }
    }
}

/// AdamW with f32 moments. At update t (from 1):
///
/// ```text
/// p -= lr*wd*p
/// m += (1-b1)*(g-m);  v = b2*v + (1-b2)*g*g
/// p -= lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)
/// ```
#[derive(Debug)]
pub struct AdamW<D: Device> {
    device: D,
    settings: AdamWSettings,
    layout: Layout,
    step: u64,
    first: D::Buffer,
    second: D::Buffer,
}

impl<D: Device> AdamW<D> {
    /// An optimizer at update 0 for parameters of this layout.
    pub fn new(device: &D, settings: AdamWSettings, params: &[Param]) -> Self {
        let layout = Layout::of(params);
        let zeros = || device.zeros_f32(layout.len());
        Self { settings, step: 0, first: zeros(), second: zeros(), device: device.clone(), layout }
    }
}

impl<D: Device> Optimizer<D> for AdamW<D> {
    fn step(&mut self, values: &mut D::Buffer, grads: &D::Buffer, clip: f32, lr: f64) {
        self.step += 1;
        let scalars = self.settings.scalars(self.step, lr, clip);
        self.device.adamw(values, grads, &mut self.first, &mut self.second, scalars);
    }

    fn state(&self) -> Vec<StateTensor> {
        let (first, second) = (self.device.download(&self.first), self.device.download(&self.second));
        let mut tensors = vec![StateTensor { name: "step".into(), shape: vec![], data: StateData::U64(vec![self.step]) }];
        for (name, span) in self.layout.spans() {
            tensors.push(StateTensor::f32(format!("exp_avg.{name}"), first[span.clone()].to_vec()));
            tensors.push(StateTensor::f32(format!("exp_avg_sq.{name}"), second[span].to_vec()));
        }
        tensors
    }

    fn load_state(&mut self, tensors: Vec<StateTensor>) -> Result<(), StateError> {
        let mut incoming = Incoming::check(tensors, &self.state())?;
        self.step = incoming.u64("step");
        for (prefix, buffer) in [("exp_avg", &mut self.first), ("exp_avg_sq", &mut self.second)] {
            let moments: Vec<Vec<f32>> = self.layout.spans().map(|(name, _)| incoming.f32(&format!("{prefix}.{name}"))).collect();
            self.device.overwrite(buffer, &self.layout.join(moments.iter().map(Vec::as_slice)));
        }
        Ok(())
    }
}
