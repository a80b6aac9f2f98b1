//! AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019), in the order of `torch.optim.AdamW`.

use rayon::prelude::*;

use super::state::Incoming;
use super::{Layout, Optimizer, Param, StateData, StateError, StateTensor};

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

/// AdamW with f32 moments. At update t (from 1):
///
/// ```text
/// p -= lr*wd*p
/// m += (1-b1)*(g-m);  v = b2*v + (1-b2)*g*g
/// p -= lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)
/// ```
#[derive(Debug, Clone)]
pub struct AdamW {
    pub(super) settings: AdamWSettings,
    layout: Layout,
    pub(super) step: u64,
    pub(super) moments: Vec<Moments>,
}

/// First and second moment of a parameter.
#[derive(Debug, Clone, Default)]
pub(super) struct Moments {
    pub(super) first: Vec<f32>,
    pub(super) second: Vec<f32>,
}

impl Moments {
    pub(super) fn zeros(len: usize) -> Self {
        Self { first: vec![0.0; len], second: vec![0.0; len] }
    }
}

/// The f32 numbers of one update, rounded from f64 once, as PyTorch does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scalars {
    pub(super) keep: f32,
    pub(super) one_minus_beta1: f32,
    pub(super) beta2: f32,
    pub(super) one_minus_beta2: f32,
    pub(super) root_correction2: f32,
    pub(super) epsilon: f32,
    pub(super) step_size: f32,
}

impl Scalars {
    pub(super) fn new(settings: &AdamWSettings, step: u64, lr: f64) -> Self {
        let correction1 = 1.0 - settings.beta1.powf(step as f64);
        let correction2 = 1.0 - settings.beta2.powf(step as f64);
        Self {
            keep: (1.0 - lr * settings.weight_decay) as f32,
            one_minus_beta1: (1.0 - settings.beta1) as f32,
            beta2: settings.beta2 as f32,
            one_minus_beta2: (1.0 - settings.beta2) as f32,
            root_correction2: correction2.sqrt() as f32,
            epsilon: settings.epsilon as f32,
            step_size: (lr / correction1) as f32,
        }
    }
}

impl AdamW {
    /// An optimizer at update 0 for parameters of this layout.
    pub fn new(settings: AdamWSettings, params: &[Param]) -> Self {
        Self { settings, layout: Layout::of(params), step: 0, moments: params.iter().map(|p| Moments::zeros(p.value.len())).collect() }
    }
}

/// One update of a tensor with f32 moments, in PyTorch's order.
pub(super) fn update(value: &mut [f32], grad: &[f32], moments: &mut Moments, s: Scalars) {
    for (((p, g), m), v) in value.iter_mut().zip(grad).zip(&mut moments.first).zip(&mut moments.second) {
        *p *= s.keep;
        *m += s.one_minus_beta1 * (g - *m);
        *v = *v * s.beta2 + s.one_minus_beta2 * g * g;
        *p -= s.step_size * *m / (v.sqrt() / s.root_correction2 + s.epsilon);
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, params: &mut [Param], grads: &[Vec<f32>], lr: f64) {
        self.layout.check(params, grads);
        self.step += 1;
        let scalars = Scalars::new(&self.settings, self.step, lr);
        params.par_iter_mut().zip(grads).zip(&mut self.moments).for_each(|((param, grad), moments)| update(&mut param.value, grad, moments, scalars));
    }

    fn state(&self) -> Vec<StateTensor> {
        let mut tensors = vec![StateTensor { name: "step".into(), shape: vec![], data: StateData::U64(vec![self.step]) }];
        for ((name, _), moments) in self.layout.0.iter().zip(&self.moments) {
            tensors.push(StateTensor::f32(format!("exp_avg.{name}"), moments.first.clone()));
            tensors.push(StateTensor::f32(format!("exp_avg_sq.{name}"), moments.second.clone()));
        }
        tensors
    }

    fn load_state(&mut self, tensors: Vec<StateTensor>) -> Result<(), StateError> {
        let mut incoming = Incoming::check(tensors, &self.state())?;
        self.step = incoming.u64("step");
        for ((name, _), moments) in self.layout.0.iter().zip(&mut self.moments) {
            *moments = Moments { first: incoming.f32(&format!("exp_avg.{name}")), second: incoming.f32(&format!("exp_avg_sq.{name}")) };
        }
        Ok(())
    }
}
