//! One micro-batch: draws, forward pass, loss, backward pass.
//!
//! Every random number is a function of (seed, epoch, ordinal of the item within the epoch, purpose): neither the size of
//! the micro-batch nor what ran before changes it.

use std::collections::BTreeMap;

use finetune_common::rng::{Purpose, Stream};
use finetune_common::tensor::{HostTensor, ShapeError};
use finetune_compute::nn::DropoutKey;
use finetune_compute::nn::flow_matching::{self, LossKind, SigmaTable, TimestepDensity};
use finetune_model::learner::Learner;
use finetune_model::mmdit::{FlowTarget, MmditError, MmditInputs};

/// What the loss is made of.
#[derive(Debug, Clone)]
pub struct Objective {
    /// Noise levels.
    pub table: SigmaTable,
    /// Those of latents of these heights and widths, where they differ by shape.
    pub table_of: BTreeMap<[usize; 2], SigmaTable>,
    /// How timesteps are drawn.
    pub density: TimestepDensity,
    /// Target and weighting.
    pub kind: LossKind,
    /// Latents are `(z - shift) · scale`.
    pub latents: LatentScaling,
    /// The run's seed.
    pub seed: u64,
    /// Whether LoRA's dropout is on.
    pub dropout: bool,
}

/// The VAE's normalisation of latents.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentScaling {
    /// `scaling_factor` of the VAE's config.
    pub scale: f32,
    /// `shift_factor` of the VAE's config.
    pub shift: f32,
}

impl LatentScaling {
    /// `(z - shift) · scale`.
    pub fn normalise(self, z: f32) -> f32 {
        (z - self.shift) * self.scale
    }
}

/// The prepared data of one copy of one sample.
#[derive(Debug, Clone)]
pub struct Example {
    /// Posterior mean, [C, h, w].
    pub mean: Vec<f32>,
    /// Posterior log variance, [C, h, w].
    pub logvar: Vec<f32>,
    /// [C, h, w].
    pub shape: [usize; 3],
    /// Prompt embeddings, [S, J].
    pub embeds: HostTensor,
    /// Pooled embeddings, `[P]`.
    pub pooled: HostTensor,
}

/// What is drawn for one item of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// Normalised latents.
    pub x0: Vec<f32>,
    /// Standard normal noise.
    pub noise: Vec<f32>,
    /// Level in the noise table.
    pub level: usize,
}

impl Objective {
    /// The noise levels for latents [C, h, w].
    pub fn table(&self, [_, height, width]: [usize; 3]) -> &SigmaTable {
        self.table_of.get(&[height, width]).unwrap_or(&self.table)
    }

    /// Redraws the posterior, the noise and the timestep of the item `ordinal` of `epoch`.
    pub fn draw(&self, example: &Example, epoch: u64, ordinal: u64) -> Draw {
        let stream = |purpose| Stream::new(self.seed, purpose, epoch, ordinal);
        let mut posterior = stream(Purpose::Posterior);
        let z = |(mean, logvar): (&f32, &f32)| mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * posterior.normal_f32();
        let x0 = example.mean.iter().zip(&example.logvar).map(z).map(|z| self.latents.normalise(z)).collect();
        let mut noise = vec![0.0; example.mean.len()];
        stream(Purpose::Noise).fill_normal(&mut noise);
        let level = self.table(example.shape).index(self.density.draw(&mut stream(Purpose::Timestep)));
        Draw { x0, noise, level }
    }
}

/// A batch as the model takes it.
#[derive(Debug)]
pub struct Inputs {
    x0: Vec<f32>,
    noise: Vec<f32>,
    sigmas: Vec<f32>,
    /// [B, C, h, w].
    x: HostTensor,
    /// [B].
    timestep: HostTensor,
    /// [B, S, J].
    embeds: HostTensor,
    /// [B, P].
    pooled: HostTensor,
}

impl Inputs {
    /// Mixes latents and noise and stacks the batch.
    ///
    /// # Errors
    /// If examples have different shapes.
    pub fn new(objective: &Objective, examples: &[&Example], draws: &[Draw]) -> Result<Self, ShapeError> {
        let [c, h, w] = examples.first().map_or([0; 3], |e| e.shape);
        let table = objective.table([c, h, w]);
        let x0: Vec<f32> = draws.iter().flat_map(|d| d.x0.iter().copied()).collect();
        let noise: Vec<f32> = draws.iter().flat_map(|d| d.noise.iter().copied()).collect();
        let sigmas: Vec<f32> = draws.iter().map(|d| table.sigma(d.level)).collect();
        Ok(Self {
            x: HostTensor::new(flow_matching::mix(&x0, &noise, &sigmas), [draws.len(), c, h, w])?,
            timestep: HostTensor::vector(draws.iter().map(|d| table.timestep(d.level)).collect()),
            embeds: HostTensor::stack(&examples.iter().map(|e| &e.embeds).collect::<Vec<_>>())?,
            pooled: HostTensor::stack(&examples.iter().map(|e| &e.pooled).collect::<Vec<_>>())?,
            x0,
            noise,
            sigmas,
        })
    }
}

impl Inputs {
    fn model(&self) -> MmditInputs<'_> {
        MmditInputs { x: &self.x, timestep: &self.timestep, prompt_embeds: &self.embeds, pooled: &self.pooled }
    }
}

/// A micro-batch with everything drawn: what one forward and backward pass takes.
#[derive(Debug)]
pub struct MicroBatch {
    inputs: Inputs,
    /// Names of the dropout masks, if LoRA's dropout is on.
    dropout: Option<DropoutKey>,
    kind: LossKind,
    /// What each sample's loss counts in the gradients.
    coefficients: Vec<f64>,
}

impl MicroBatch {
    /// Draws the random numbers of the samples (and, after them, of their class pictures), which `epoch` and their `ordinals` name.
    ///
    /// # Errors
    /// If examples have different shapes.
    pub fn draw(objective: &Objective, examples: &[Example], ordinals: &[u64], epoch: u64, coefficients: Vec<f64>) -> Result<Self, ShapeError> {
        let draws: Vec<Draw> = examples.iter().zip(ordinals).map(|(example, ordinal)| objective.draw(example, epoch, *ordinal)).collect();
        let inputs = Inputs::new(objective, &examples.iter().collect::<Vec<_>>(), &draws)?;
        let names = || DropoutKey { seed: objective.seed, samples: ordinals.iter().map(|ordinal| (epoch, *ordinal)).collect() };
        Ok(Self { inputs, dropout: objective.dropout.then(names), kind: objective.kind, coefficients })
    }

    fn target(&self) -> FlowTarget<'_> {
        let Inputs { x0, noise, sigmas, .. } = &self.inputs;
        FlowTarget { kind: self.kind, x0, noise, sigmas, coefficients: &self.coefficients }
    }
}

/// What each sample's loss counts in the gradients: `weight` (1 / samples of the batch / batches per update) for each of `samples`,
/// and with prior preservation `weight · prior` for each of as many class pictures after them:
/// `mean(samples) + prior · mean(class pictures)`, as the reference's chunked batch.
pub fn coefficients(samples: usize, weight: f64, prior: Option<f64>) -> Vec<f64> {
    let mut coefficients = vec![weight; samples];
    coefficients.extend(prior.into_iter().flat_map(|prior| std::iter::repeat_n(weight * prior, samples)));
    coefficients
}

/// Forward, loss and backward of one micro-batch: adds the gradients of the weighted loss to the learner's sums. [`Learner::losses`] returns each sample's loss.
///
/// # Errors
/// If the model refuses the inputs, or the device fails.
pub fn micro_batch(learner: &mut dyn Learner, batch: &MicroBatch) -> Result<(), MmditError> {
    learner.accumulate(batch.inputs.model(), batch.dropout.as_ref(), &batch.target())
}

/// The losses of a batch without gradients, one per sample.
///
/// # Errors
/// If the model refuses the inputs.
pub fn losses(learner: &dyn Learner, objective: &Objective, examples: &[&Example], draws: &[Draw]) -> Result<Vec<f64>, MmditError> {
    let inputs = Inputs::new(objective, examples, draws)?;
    let velocity = learner.predict(inputs.model())?;
    Ok(flow_matching::loss(objective.kind, velocity.values(), &inputs.x0, &inputs.noise, &inputs.sigmas, &vec![1.0; draws.len()]).per_sample)
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_compute::nn::flow_matching::Weighting;

    fn objective() -> Objective {
        Objective {
            table: SigmaTable::default(),
            table_of: BTreeMap::new(),
            density: TimestepDensity::default(),
            kind: LossKind { weighting: Weighting::LogitNormal, precondition_outputs: true },
            latents: LatentScaling { scale: 1.5305, shift: 0.0609 },
            seed: 3,
            dropout: false,
        }
    }

    fn example(n: usize, logvar: f32) -> Example {
        Example { mean: vec![0.5; n], logvar: vec![logvar; n], shape: [1, 1, n], embeds: HostTensor::zeros([1]), pooled: HostTensor::zeros([1]) }
    }

    #[test]
    fn draws_are_named_by_epoch_and_ordinal_only() {
        let (objective, example) = (objective(), example(64, -1.0));
        let draw = objective.draw(&example, 2, 5);
        assert_eq!(draw, objective.draw(&example, 2, 5));
        for other in [objective.draw(&example, 3, 5), objective.draw(&example, 2, 6)] {
            assert_ne!(draw.x0, other.x0);
            assert_ne!(draw.noise, other.noise);
        }
    }

    /// z ~ N(mean, exp(logvar)), then normalised.
    #[test]
    fn the_posterior_is_redrawn_with_its_own_mean_and_variance() {
        let (objective, example) = (objective(), example(20_000, -1.0));
        let x0 = objective.draw(&example, 0, 0).x0;
        let mean = x0.iter().map(|x| f64::from(*x)).sum::<f64>() / x0.len() as f64;
        let variance = x0.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / x0.len() as f64;
        assert!((mean - (0.5 - 0.0609) * 1.5305).abs() < 0.02, "{mean}");
        assert!((variance / ((-1.0_f64).exp() * 1.5305 * 1.5305) - 1.0).abs() < 0.03, "{variance}");
        let sharp = objective.draw(&self::example(10, -1000.0), 0, 0).x0;
        assert!(sharp.iter().all(|x| (x - (0.5 - 0.0609) * 1.5305).abs() < 1e-5), "{sharp:?}");
    }

    /// loss = mean(samples) + weight · mean(class pictures): its gradient is the sum of both parts' gradients, and each sample keeps the
    /// loss that it has alone. Cosmap weighs samples by their noise level, so a weight that is taken from the other half would show.
    #[test]
    fn the_gradient_of_a_batch_with_class_pictures_is_the_sum_of_both_parts() {
        use finetune_compute::kernels::{Engine, WeightFormat};
        use finetune_compute::optim::{AdamWSettings, OptimizerSettings, Param};
        use finetune_model::learner;
        use finetune_model::lora::{LoraLayout, LoraSpec};
        use finetune_model::mmdit::MmditConfig;
        use finetune_model::weights::Weights;

        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/micro-sd3/transformer");
        let weights = std::sync::Arc::new(Weights::open(&folder).unwrap());
        let config = MmditConfig::open(&folder).unwrap();
        let spec = LoraSpec { rank: 2, alpha: 2.0, dropout: 0.0, target_modules: vec!["to_q".into(), "to_v".into(), "add_k_proj".into()] };
        let layout = LoraLayout::new(&spec, &config.linear_sites()).unwrap();
        let random = |n: usize, index: u64| {
            let mut values = vec![0.0; n];
            Stream::new(1, Purpose::Noise, 9, index).fill_normal(&mut values);
            values
        };
        // B is not zero, so that A has gradients too.
        let params: Vec<Param> = layout
            .init(4)
            .into_iter()
            .enumerate()
            .map(|(i, p)| Param { value: random(p.value.len(), i as u64).iter().map(|x| 0.1 * x).collect(), ..p })
            .collect();
        let (channels, joint, pooled) = (config.in_channels, config.joint_attention_dim, config.pooled_projection_dim);
        let adamw = OptimizerSettings::AdamW(AdamWSettings::default());
        let mut learner = learner::load(weights, config, &Engine::cpu(), WeightFormat::Float, layout, &params, adamw).unwrap();
        let tensor = |shape: &[usize], index| HostTensor::new(random(shape.iter().product(), index), shape).unwrap();
        let examples: Vec<Example> = (0..4)
            .map(|i| Example {
                mean: random(channels * 16, 100 + i),
                logvar: vec![-1.0; channels * 16],
                shape: [channels, 4, 4],
                embeds: tensor(&[5, joint], 200 + i),
                pooled: tensor(&[pooled], 300 + i),
            })
            .collect();
        let objective = Objective { kind: LossKind { weighting: Weighting::Cosmap, precondition_outputs: false }, ..objective() };
        let (weight, prior) = (0.25, 0.7);
        let mut run = |range: std::ops::Range<usize>, coefficients: &[f64]| {
            let ordinals: Vec<u64> = range.clone().map(|i| i as u64).collect();
            let batch = MicroBatch::draw(&objective, &examples[range], &ordinals, 3, coefficients.to_vec()).unwrap();
            learner.begin().unwrap();
            micro_batch(learner.as_mut(), &batch).unwrap();
            (learner.losses().unwrap(), learner.gradients().unwrap())
        };
        assert_eq!(coefficients(2, weight, None), [weight; 2]);
        let mixed = run(0..4, &coefficients(2, weight, Some(prior)));
        let (own, class) = (run(0..2, &[weight; 2]), run(2..4, &[weight; 2]));
        let mut largest: f64 = 0.0;
        for ((mixed, own), class) in mixed.1.iter().zip(&own.1).zip(&class.1) {
            let norm = own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            for ((mixed, own), class) in mixed.iter().zip(own).zip(class) {
                let sum = f64::from(*own) + prior * f64::from(*class);
                assert!((f64::from(*mixed) - sum).abs() <= 1e-5 * norm, "{mixed} {sum} {norm}");
                largest = largest.max(sum.abs());
            }
        }
        assert!(largest > 1e-4, "gradients are there: {largest}");
        let alone: Vec<f64> = own.0.iter().chain(&class.0).copied().collect();
        assert!(mixed.0.iter().zip(&alone).all(|(a, b)| (a - b).abs() <= 1e-6 * b), "{:?} {alone:?}", mixed.0);
    }
}
