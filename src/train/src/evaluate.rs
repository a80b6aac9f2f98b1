//! The evaluation loss: fixed pictures, noise and timesteps, so that two measurements differ by the weights alone.

use super::step::{self, Draw, Example, Objective};
use finetune_common::rng::{Purpose, Stream};
use finetune_model::learner::Learner;
use finetune_model::mmdit::MmditError;

/// Timesteps per picture, one from each eighth of the noise levels.
pub const TIMESTEPS: u64 = 8;

/// Pictures at most.
const MAX_SAMPLES: usize = 8;

/// Which samples are measured: spread evenly over the dataset.
pub fn subset(samples: usize) -> Vec<usize> {
    let count = samples.min(MAX_SAMPLES);
    (0..count).map(|i| i * samples / count).collect()
}

/// What is fixed for `sample` at its `index`-th timestep. Latents are the posterior's mean.
fn draw(objective: &Objective, example: &Example, sample: usize, index: u64) -> Draw {
    let stream = |purpose| Stream::new(objective.seed, purpose, index, sample as u64);
    let mut noise = vec![0.0; example.mean.len()];
    stream(Purpose::EvaluationNoise).fill_normal(&mut noise);
    let u = (index as f64 + stream(Purpose::EvaluationTimestep).uniform_f64()) / TIMESTEPS as f64;
    let x0 = example.mean.iter().map(|z| objective.latents.normalise(*z)).collect();
    Draw { x0, noise, level: objective.table(example.shape).index(u) }
}

/// The mean loss over the subset and its timesteps. `examples` are those of [`subset`], with their sample numbers; every
/// batch has one picture at all its timesteps, whatever the batch size of training. `proceed` is asked before each batch.
///
/// # Errors
/// If the model refuses the inputs.
pub fn evaluate(
    model: &dyn Learner,
    objective: &Objective,
    examples: &[(usize, Example)],
    batch: usize,
    mut proceed: impl FnMut() -> bool,
) -> Result<Option<f64>, MmditError> {
    let (mut sum, mut count) = (0.0, 0_u64);
    for (sample, example) in examples {
        let draws: Vec<Draw> = (0..TIMESTEPS).map(|i| draw(objective, example, *sample, i)).collect();
        for draws in draws.chunks(batch.clamp(1, TIMESTEPS as usize)) {
            if !proceed() {
                return Ok(None);
            }
            let losses = step::losses(model, objective, &vec![example; draws.len()], draws)?;
            sum += losses.iter().sum::<f64>();
            count += losses.len() as u64;
        }
    }
    Ok(Some(sum / count.max(1) as f64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::LatentScaling;
    use finetune_common::tensor::HostTensor;
    use finetune_compute::nn::flow_matching::{LossKind, SigmaTable, TimestepDensity, Weighting};

    #[test]
    fn the_subset_is_spread_and_never_larger_than_the_dataset() {
        assert_eq!(subset(1), [0]);
        assert_eq!(subset(3), [0, 1, 2]);
        assert_eq!(subset(80), [0, 10, 20, 30, 40, 50, 60, 70]);
    }

    #[test]
    fn timesteps_are_stratified_over_the_noise_levels() {
        let objective = Objective {
            table: SigmaTable::default(),
            table_of: std::collections::BTreeMap::new(),
            density: TimestepDensity::default(),
            kind: LossKind { weighting: Weighting::LogitNormal, precondition_outputs: true },
            latents: LatentScaling { scale: 1.0, shift: 0.0 },
            seed: 3,
            dropout: false,
        };
        let example = Example { mean: vec![0.0; 4], logvar: vec![0.0; 4], shape: [1, 2, 2], embeds: HostTensor::zeros([1]), pooled: HostTensor::zeros([1]) };
        for i in 0..TIMESTEPS {
            let level = draw(&objective, &example, 0, i).level as u64;
            assert!((i * 125..(i + 1) * 125).contains(&level), "{i}: {level}");
        }
    }
}
