//! Prodigy (Mishchenko and Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", 2023), as the package
//! `prodigyopt` computes it (`slice_p` 1, one parameter group).
//!
//! It computes on the host whatever the device: its sums are over all parameters, and it is done once an update.

use rayon::prelude::*;

use super::layout::Layout;
use super::state::Incoming;
use super::{Optimizer, Param, StateData, StateError, StateTensor};
use crate::kernels::Device;

/// Values per partial sum. Fixed, so that the sum is the same for any number of threads.
const CHUNK: usize = 4096;

/// Settings of Prodigy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProdigySettings {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decay of the sums that estimate the distance; the square root of `beta2` if absent.
    pub beta3: Option<f64>,
    /// Added to the denominator, multiplied by the estimate `d`.
    pub epsilon: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Decay the weights (AdamW) rather than adding to the gradients (L2).
    pub decouple: bool,
    /// Adam's bias correction.
    pub use_bias_correction: bool,
    /// Leave the learning rate out of the estimate's denominator, against trouble in warm-up.
    pub safeguard_warmup: bool,
    /// First estimate of the distance.
    pub d0: f64,
    /// Factor on the estimate.
    pub d_coef: f64,
    /// The estimate grows at most by this factor per update; may be infinite.
    pub growth_rate: f64,
}

impl Default for ProdigySettings {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            beta3: None,
            epsilon: 1e-8,
            weight_decay: 0.0,
            decouple: true,
            use_bias_correction: false,
            safeguard_warmup: false,
            d0: 1e-6,
            d_coef: 1.0,
            growth_rate: f64::INFINITY,
        }
    }
}

/// Prodigy: Adam whose step size follows from an estimate `d` of the distance to the solution. Use learning rate 1.
#[derive(Debug, Clone)]
pub struct Prodigy<D> {
    device: D,
    settings: ProdigySettings,
    layout: Layout,
    slots: Vec<Slot>,
    /// Updates made.
    k: u64,
    d: f64,
    d_max: f64,
    d_numerator: f64,
}

/// State of a parameter.
#[derive(Debug, Clone)]
struct Slot {
    /// First moment.
    first: Vec<f32>,
    /// Second moment.
    second: Vec<f32>,
    /// Decayed sum of scaled gradients.
    s: Vec<f32>,
    /// Values before the first update.
    initial: Vec<f32>,
}

impl<D: Device> Prodigy<D> {
    /// An optimizer at update 0. The values of `params` are the origin from which the distance is estimated.
    pub fn new(device: &D, settings: ProdigySettings, params: &[Param]) -> Self {
        let zeros = |p: &Param| vec![0.0; p.value.len()];
        let slot = |p: &Param| Slot { first: zeros(p), second: zeros(p), s: zeros(p), initial: p.value.clone() };
        let slots = params.iter().map(slot).collect();
        let device = device.clone();
        Self { device, settings, layout: Layout::of(params), slots, k: 0, d: settings.d0, d_max: settings.d0, d_numerator: 0.0 }
    }

    /// The current estimate of the distance; the effective step is `d` times the learning rate.
    pub fn d(&self) -> f64 {
        self.d
    }
}

impl<D: Device> Optimizer<D> for Prodigy<D> {
    fn step(&mut self, values: &mut D::Buffer, grads: &D::Buffer, clip: f32, lr: f64) {
        let mut params = self.layout.params(&self.device.download(values));
        let grads = self.device.download(grads);
        let grads: Vec<Vec<f32>> = self.layout.spans().map(|(_, span)| grads[span].iter().map(|g| g * clip).collect()).collect();
        self.step_on_host(&mut params, &grads, lr);
        self.device.overwrite(values, &self.layout.values(&params));
    }

    fn state(&self) -> Vec<StateTensor> {
        let scalar = |name: &str, value| StateTensor { name: name.into(), shape: vec![], data: StateData::F64(vec![value]) };
        let mut tensors = vec![
            StateTensor { name: "step".into(), shape: vec![], data: StateData::U64(vec![self.k]) },
            scalar("d", self.d),
            scalar("d_max", self.d_max),
            scalar("d_numerator", self.d_numerator),
        ];
        for ((name, _), slot) in self.layout.spans().zip(&self.slots) {
            tensors.push(StateTensor::f32(format!("exp_avg.{name}"), slot.first.clone()));
            tensors.push(StateTensor::f32(format!("exp_avg_sq.{name}"), slot.second.clone()));
            tensors.push(StateTensor::f32(format!("s.{name}"), slot.s.clone()));
            tensors.push(StateTensor::f32(format!("p0.{name}"), slot.initial.clone()));
        }
        tensors
    }

    fn load_state(&mut self, tensors: Vec<StateTensor>) -> Result<(), StateError> {
        let mut incoming = Incoming::check(tensors, &self.state())?;
        self.k = incoming.u64("step");
        self.d = incoming.f64("d");
        self.d_max = incoming.f64("d_max");
        self.d_numerator = incoming.f64("d_numerator");
        for ((name, _), slot) in self.layout.spans().zip(&mut self.slots) {
            *slot = Slot {
                first: incoming.f32(&format!("exp_avg.{name}")),
                second: incoming.f32(&format!("exp_avg_sq.{name}")),
                s: incoming.f32(&format!("s.{name}")),
                initial: incoming.f32(&format!("p0.{name}")),
            };
        }
        Ok(())
    }
}

impl<D: Device> Prodigy<D> {
    fn step_on_host(&mut self, params: &mut [Param], grads: &[Vec<f32>], lr: f64) {
        let set = self.settings;
        let beta3 = set.beta3.unwrap_or_else(|| set.beta2.sqrt());
        let d = self.d;
        let next = (self.k + 1) as f64;
        let bias_correction = if set.use_bias_correction { (1.0 - set.beta2.powf(next)).sqrt() / (1.0 - set.beta1.powf(next)) } else { 1.0 };
        let dlr = d * lr * bias_correction;
        let coupled_decay = if set.decouple { 0.0 } else { set.weight_decay as f32 };

        // Statistics: (sum of g*(p0-p), sum of |s|) per parameter, then in order.
        let s_alpha = (d / set.d0 * if set.safeguard_warmup { d } else { dlr }) as f32;
        let (m_alpha, v_alpha) = ((d * (1.0 - set.beta1)) as f32, (d * d * (1.0 - set.beta2)) as f32);
        let (beta1, beta2, beta3_f32) = (set.beta1 as f32, set.beta2 as f32, beta3 as f32);
        let mut numerator = 0.0;
        let mut denominator = 0.0;
        if lr > 0.0 {
            let sums: Vec<(f64, f64)> = self
                .slots
                .par_iter_mut()
                .zip(&*params)
                .zip(grads)
                .map(|((slot, param), grad)| {
                    let gradient = |i: usize| grad[i] + coupled_decay * param.value[i];
                    let dot = sum_of(grad.len(), |i| f64::from(gradient(i)) * f64::from(slot.initial[i] - param.value[i]));
                    for i in 0..grad.len() {
                        let g = gradient(i);
                        slot.first[i] = slot.first[i] * beta1 + m_alpha * g;
                        slot.second[i] = slot.second[i] * beta2 + v_alpha * g * g;
                        slot.s[i] = slot.s[i] * beta3_f32 + s_alpha * g;
                    }
                    (dot, sum_of(slot.s.len(), |i| f64::from(slot.s[i].abs())))
                })
                .collect();
            for (dot, sum) in sums {
                numerator += d / set.d0 * dlr * dot;
                denominator += sum;
            }
        }
        if denominator == 0.0 {
            return; // no gradient, no progress: as prodigyopt
        }
        let global_numerator = self.d_numerator * beta3 + numerator;
        let d_hat = set.d_coef * global_numerator / denominator;
        let mut grown = d;
        // The estimate is still the initial one, to the bit.
        if d.to_bits() == set.d0.to_bits() {
            grown = d.max(d_hat);
        }
        self.d_max = self.d_max.max(d_hat);
        self.d = self.d_max.min(grown * set.growth_rate);
        self.d_numerator = global_numerator;

        // The step uses the new d in the denominator and the old d in the step size.
        let epsilon = (self.d * set.epsilon) as f32;
        let decay = if set.decouple { (set.weight_decay * dlr) as f32 } else { 0.0 };
        let (dlr_f32, gradient_step) = (dlr as f32, (dlr * d) as f32);
        let with_momentum = set.beta1 > 0.0;
        params.par_iter_mut().zip(grads).zip(&self.slots).for_each(|((param, grad), slot)| {
            for (i, p) in param.value.iter_mut().enumerate() {
                let g = grad[i] + coupled_decay * *p;
                let denom = slot.second[i].sqrt() + epsilon;
                *p -= decay * *p;
                *p -= if with_momentum { dlr_f32 * slot.first[i] / denom } else { gradient_step * g / denom };
            }
        });
        self.k += 1;
    }
}

/// Sum of `term(0..len)` in f64, chunk by chunk in order.
fn sum_of(len: usize, term: impl Fn(usize) -> f64) -> f64 {
    (0..len.div_ceil(CHUNK)).map(|c| (c * CHUNK..((c + 1) * CHUNK).min(len)).map(&term).sum::<f64>()).sum()
}
