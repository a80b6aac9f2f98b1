//! Flow matching as Stable Diffusion 3 is trained: the table of noise levels, densities of timesteps, weighting,
//! preconditioning, and the loss with its gradient. Pure; f32 values, f64 sums.
//!
//! `x_t = (1 - σ) x0 + σ noise`; the model predicts `v ≈ noise - x0`. As diffusers' `train_dreambooth_lora_sd3.py`, except
//! that σ and the timestep stay f32 whatever the precision of the model.

use std::str::FromStr;

use finetune_common::rng::Stream;

/// Noise levels and timesteps of the training schedule.
#[derive(Debug, Clone, PartialEq)]
pub struct SigmaTable {
    sigmas: Vec<f32>,
}

impl SigmaTable {
    /// `steps` levels from high noise to low: `σ_lin = (steps - i) / steps`, `σ = s σ_lin / (1 + (s - 1) σ_lin)`.
    /// SD3: 1000 steps, shift 3.
    pub fn new(steps: usize, shift: f32) -> Self {
        let linear = (0..steps).map(|i| (steps - i) as f32 / steps as f32);
        Self { sigmas: linear.map(|s| shift * s / (1.0 + (shift - 1.0) * s)).collect() }
    }

    /// Number of levels.
    pub fn len(&self) -> usize {
        self.sigmas.len()
    }

    /// Whether there is no level.
    pub fn is_empty(&self) -> bool {
        self.sigmas.is_empty()
    }

    /// σ of the level (the last one beyond the table).
    pub fn sigma(&self, index: usize) -> f32 {
        self.sigmas.get(index).or(self.sigmas.last()).copied().unwrap_or(1.0)
    }

    /// The timestep that the model gets: `1000 σ` for 1000 steps.
    pub fn timestep(&self, index: usize) -> f32 {
        self.sigma(index) * self.sigmas.len() as f32
    }

    /// The level of `u` in [0, 1]: `floor(u · steps)`, at most the last.
    pub fn index(&self, u: f64) -> usize {
        ((u * self.sigmas.len() as f64) as usize).min(self.sigmas.len().saturating_sub(1))
    }
}

impl Default for SigmaTable {
    /// SD3's: 1000 steps, shift 3.
    fn default() -> Self {
        Self::new(1000, 3.0)
    }
}

/// Density of timesteps and weighting of the loss (diffusers' `weighting_scheme`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Weighting {
    /// Uniform density, weight 1.
    None,
    /// `u = sigmoid(N(mean, std²))`, weight 1.
    #[default]
    LogitNormal,
    /// `u = 1 - r - m (cos²(π r / 2) - 1 + r)`, weight 1.
    Mode,
    /// Uniform density, weight `σ⁻²`.
    SigmaSqrt,
    /// Uniform density, weight `2 / (π (1 - 2σ + 2σ²))`.
    Cosmap,
}

/// Not a weighting scheme.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown weighting scheme {0:?}; there are none, logit_normal, mode, sigma_sqrt, cosmap")]
pub struct UnknownWeighting(String);

impl FromStr for Weighting {
    type Err = UnknownWeighting;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Ok(match name {
            "none" => Self::None,
            "logit_normal" => Self::LogitNormal,
            "mode" => Self::Mode,
            "sigma_sqrt" => Self::SigmaSqrt,
            "cosmap" => Self::Cosmap,
            _ => return Err(UnknownWeighting(name.to_owned())),
        })
    }
}

impl Weighting {
    /// The weight of a sample's squared error.
    pub fn weight(self, sigma: f32) -> f32 {
        match self {
            Self::SigmaSqrt => 1.0 / (sigma * sigma),
            Self::Cosmap => 2.0 / (std::f32::consts::PI * (1.0 - 2.0 * sigma + 2.0 * sigma * sigma)),
            Self::None | Self::LogitNormal | Self::Mode => 1.0,
        }
    }
}

/// How timesteps are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimestepDensity {
    /// The scheme.
    pub weighting: Weighting,
    /// Mean of the logit (`logit_normal`).
    pub logit_mean: f64,
    /// Standard deviation of the logit (`logit_normal`).
    pub logit_std: f64,
    /// m of `mode`.
    pub mode_scale: f64,
}

impl Default for TimestepDensity {
    /// diffusers' defaults.
    fn default() -> Self {
        Self { weighting: Weighting::LogitNormal, logit_mean: 0.0, logit_std: 1.0, mode_scale: 1.29 }
    }
}

impl TimestepDensity {
    /// Draws `u` in [0, 1]; near 0 is high noise.
    pub fn draw(&self, stream: &mut Stream) -> f64 {
        match self.weighting {
            Weighting::LogitNormal => 1.0 / (1.0 + (-(self.logit_mean + self.logit_std * stream.normal_f64())).exp()),
            Weighting::Mode => self.mode(stream.uniform_f64()),
            Weighting::None | Weighting::SigmaSqrt | Weighting::Cosmap => stream.uniform_f64(),
        }
    }

    /// `u` of `mode` for uniform `r`.
    fn mode(&self, r: f64) -> f64 {
        let cos = (std::f64::consts::FRAC_PI_2 * r).cos();
        1.0 - r - self.mode_scale * (cos * cos - 1.0 + r)
    }
}

/// `(1 - σ_b) x0 + σ_b noise` per sample. All slices `[B, n]`, `sigmas` `[B]`.
pub fn mix(x0: &[f32], noise: &[f32], sigmas: &[f32]) -> Vec<f32> {
    let mut mixed = Vec::with_capacity(x0.len());
    let per_sample = x0.len() / sigmas.len().max(1);
    for ((x0, noise), &sigma) in x0.chunks(per_sample.max(1)).zip(noise.chunks(per_sample.max(1))).zip(sigmas) {
        mixed.extend(x0.iter().zip(noise).map(|(x, n)| (1.0 - sigma) * x + sigma * n));
    }
    mixed
}

/// What the loss compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LossKind {
    /// The weighting scheme.
    pub weighting: Weighting,
    /// true: `x_t - σ v` against `x0`; false: `v` against `noise - x0`.
    pub precondition_outputs: bool,
}

/// A loss with its gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct Loss {
    /// Each sample's weighted mean squared error.
    pub per_sample: Vec<f64>,
    /// d(Σ_b coefficient_b · per_sample_b) / d(velocity), [B, n].
    pub d_velocity: Vec<f32>,
}

impl Loss {
    /// The mean over samples.
    pub fn mean(&self) -> f64 {
        self.per_sample.iter().sum::<f64>() / self.per_sample.len().max(1) as f64
    }
}

/// The weighted squared error of a velocity and its gradient.
///
/// `velocity`, `x0`, `noise` `[B, n]`; `sigmas` `[B]`; `coefficients` `[B]`: what each sample's loss counts in the objective
/// (1 / B / accumulation steps for the mean of an accumulated batch; prior preservation weighs samples differently).
///
/// Preconditioned: `pred - target = (x_t - σ v) - x0 = σ ((noise - x0) - v)`, d/dv = `-σ`; plain: `v - (noise - x0)`, d/dv = 1.
pub fn loss(kind: LossKind, velocity: &[f32], x0: &[f32], noise: &[f32], sigmas: &[f32], coefficients: &[f64]) -> Loss {
    let n = (velocity.len() / sigmas.len().max(1)).max(1);
    let mut per_sample = Vec::with_capacity(sigmas.len());
    let mut d_velocity = Vec::with_capacity(velocity.len());
    for (b, &sigma) in sigmas.iter().enumerate() {
        let range = b * n..(b + 1) * n;
        let (v, x0, noise) = (&velocity[range.clone()], &x0[range.clone()], &noise[range]);
        let weight = kind.weighting.weight(sigma);
        let factor = 2.0 * f64::from(weight) * coefficients[b] / n as f64;
        let mut sum = 0.0_f64;
        for ((&v, &x0), &noise) in v.iter().zip(x0).zip(noise) {
            let (difference, slope) = if kind.precondition_outputs {
                let x_t = (1.0 - sigma) * x0 + sigma * noise;
                ((v * -sigma + x_t) - x0, -sigma)
            } else {
                (v - (noise - x0), 1.0)
            };
            sum += f64::from(weight * difference * difference);
            d_velocity.push((factor * f64::from(difference) * f64::from(slope)) as f32);
        }
        per_sample.push(sum / n as f64);
    }
    Loss { per_sample, d_velocity }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_common::rng::Purpose;

    /// Values of diffusers' FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).
    #[test]
    fn the_table_is_that_of_the_reference_scheduler() {
        let table = SigmaTable::default();
        for (i, sigma) in [(0, 1.0), (1, 0.999_666_44), (499, 0.750_749_25), (500, 0.75), (998, 0.005_976_1), (999, 0.002_994_01)] {
            assert!((table.sigma(i) - sigma).abs() < 1e-7, "{i}: {}", table.sigma(i));
            assert!((table.timestep(i) - 1000.0 * sigma).abs() < 1e-4, "{i}");
        }
        assert_eq!((table.index(0.0), table.index(0.4999), table.index(0.5), table.index(1.0)), (0, 499, 500, 999));
    }

    #[test]
    fn densities_have_the_moments_of_their_formulas() {
        let draw = |weighting| {
            let density = TimestepDensity { weighting, ..TimestepDensity::default() };
            let mut stream = Stream::new(5, Purpose::Timestep, 0, 0);
            let values: Vec<f64> = (0..200_000).map(|_| density.draw(&mut stream)).collect();
            assert!(values.iter().all(|u| (0.0..=1.0).contains(u)));
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let variance = values.iter().map(|u| (u - mean).powi(2)).sum::<f64>() / values.len() as f64;
            let below = values.iter().filter(|u| **u < 0.25).count() as f64 / values.len() as f64;
            (mean, variance, below)
        };
        // logit_normal(0, 1): mean 1/2, P(u < 1/4) = Phi(-ln 3) = 0.13597, variance 0.04338.
        let (mean, variance, below) = draw(Weighting::LogitNormal);
        assert!((mean - 0.5).abs() < 2e-3 && (variance - 0.04338).abs() < 1e-3 && (below - 0.135_97).abs() < 3e-3, "{mean} {variance} {below}");
        for weighting in [Weighting::None, Weighting::SigmaSqrt, Weighting::Cosmap] {
            let (mean, variance, below) = draw(weighting);
            assert!((mean - 0.5).abs() < 2e-3 && (variance - 1.0 / 12.0).abs() < 1e-3 && (below - 0.25).abs() < 4e-3);
        }
        // mode: symmetric around 1/2; mean of cos²(πr/2) - 1 + r is 0.
        let (mean, variance, _) = draw(Weighting::Mode);
        assert!((mean - 0.5).abs() < 2e-3, "{mean}");
        // Variance by quadrature of the formula.
        let density = TimestepDensity { weighting: Weighting::Mode, ..TimestepDensity::default() };
        let n = 100_000;
        let expected = (0..n).map(|i| (density.mode((f64::from(i) + 0.5) / f64::from(n)) - 0.5).powi(2)).sum::<f64>() / f64::from(n);
        assert!((variance - expected).abs() < 1e-3, "{variance} {expected}");
        assert!((density.mode(0.0) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn preconditioned_loss_is_the_velocity_loss_times_sigma_squared() {
        let mut stream = Stream::new(1, Purpose::Noise, 0, 0);
        let mut random = || {
            let mut v = vec![0.0; 12];
            stream.fill_normal(&mut v);
            v
        };
        let (v, x0, noise) = (random(), random(), random());
        let sigmas = [0.3, 0.9];
        let kind = |precondition_outputs| LossKind { weighting: Weighting::None, precondition_outputs };
        let with = loss(kind(true), &v, &x0, &noise, &sigmas, &[0.5, 0.5]);
        let without = loss(kind(false), &v, &x0, &noise, &sigmas, &[0.5, 0.5]);
        for ((with, without), sigma) in with.per_sample.iter().zip(&without.per_sample).zip(sigmas.map(f64::from)) {
            assert!((with - sigma * sigma * without).abs() < 1e-6);
        }
    }

    /// Central differences of the objective, every scheme.
    #[test]
    fn the_gradient_is_that_of_the_loss() {
        let mut stream = Stream::new(2, Purpose::Noise, 0, 0);
        let mut random = || {
            let mut v = vec![0.0; 8];
            stream.fill_normal(&mut v);
            v
        };
        let (v, x0, noise) = (random(), random(), random());
        let (sigmas, coefficients) = ([0.2, 0.7], [0.25, 0.5]);
        for weighting in [Weighting::None, Weighting::LogitNormal, Weighting::Mode, Weighting::SigmaSqrt, Weighting::Cosmap] {
            for precondition_outputs in [false, true] {
                let kind = LossKind { weighting, precondition_outputs };
                let objective = |v: &[f32]| {
                    let loss = loss(kind, v, &x0, &noise, &sigmas, &coefficients);
                    loss.per_sample.iter().zip(coefficients).map(|(l, c)| l * c).sum::<f64>()
                };
                let gradient = loss(kind, &v, &x0, &noise, &sigmas, &coefficients).d_velocity;
                for i in 0..v.len() {
                    let (mut up, mut down) = (v.clone(), v.clone());
                    up[i] += 0.01;
                    down[i] -= 0.01;
                    let slope = (objective(&up) - objective(&down)) / f64::from(up[i] - down[i]);
                    assert!((slope - f64::from(gradient[i])).abs() < 1e-4 * (1.0 + slope.abs()), "{kind:?} {i}: {slope} {}", gradient[i]);
                }
            }
        }
    }
}
