//! Pictures from a model, with or without a LoRA: flow-matching Euler steps with guidance, as diffusers'
//! `StableDiffusion3Pipeline`.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::layout::{LayoutError, SchedulerConfig};
use crate::lora::{LoraError, LoraLayout};
use crate::mmdit::{Mmdit, MmditConfig, MmditError};
use crate::text::{PromptEmbedding, TextError};
use crate::vae::VaeError;
use crate::weights::{Weights, WeightsError};
use finetune_common::rng::{Purpose, Stream};
use finetune_common::tensor::{HostTensor, ShapeError};
use finetune_compute::kernels::{Device, Engine, WeightFormat, catch};
use finetune_compute::optim::Param;
use finetune_compute::with_device;

mod font;
mod picture;
mod pipeline;
mod schedule;
mod sheet;

pub use picture::{save_png, to_pictures, to_unit};
pub use pipeline::{Pipeline, PipelineSettings, Stage};
pub use schedule::sigmas;
pub use sheet::{COLUMNS, Sheet, SheetRow, in_groups};

/// Why pictures could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The model folder is not as it should be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The weights are not as they should be.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The prompts could not be encoded.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The transformer failed.
    #[error(transparent)]
    Mmdit(#[from] MmditError),
    /// The LoRA does not fit.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// The latents could not be decoded.
    #[error(transparent)]
    Vae(#[from] VaeError),
    /// A setting is out of range.
    #[error("{setting} is {value}, it must be {expected}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What fits.
        expected: String,
    },
    /// A picture cannot be written.
    #[error("failed to write {path}")]
    Write {
        /// The file.
        path: std::path::PathBuf,
        /// The cause.
        #[source]
        source: image::ImageError,
    },
    /// A tensor does not have the shape that it should have.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// NaN or infinity came out of a network.
    #[error(
        "the {what} are not finite (NaN or infinity): the weights of the {network} are damaged, or their values are too large for the \
         precision computed in (try fp32), or the LoRA was trained until it diverged"
    )]
    NotFinite {
        /// What was computed.
        what: &'static str,
        /// The network.
        network: &'static str,
    },
    /// The caller asked to stop.
    #[error("sampling was stopped")]
    Stopped,
}

/// Skip-layer guidance, as Stable Diffusion 3.5 Medium is sampled with: away from what the model predicts without some blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct SkipLayers {
    /// Blocks left out (7, 8, 9).
    pub layers: Vec<usize>,
    /// Strength (2.8).
    pub scale: f64,
    /// Fraction of the steps after which it begins (0.01).
    pub start: f64,
    /// Fraction of the steps before which it ends (0.2).
    pub stop: f64,
}

impl Default for SkipLayers {
    fn default() -> Self {
        Self { layers: vec![7, 8, 9], scale: 2.8, start: 0.01, stop: 0.2 }
    }
}

/// How latents are denoised.
#[derive(Debug, Clone, PartialEq)]
pub struct Denoise {
    /// Number of Euler steps.
    pub steps: usize,
    /// Strength of guidance; up to 1 there is none, and the negative prompt is not used.
    pub guidance_scale: f64,
    /// Scale of the LoRA; 0 is the base model.
    pub lora_scale: f64,
    /// Skip-layer guidance.
    pub skip_layers: Option<SkipLayers>,
}

impl Default for Denoise {
    /// 28 steps, guidance 7, as diffusers.
    fn default() -> Self {
        Self { steps: 28, guidance_scale: 7.0, lora_scale: 1.0, skip_layers: None }
    }
}

/// Prompts of a batch: embeddings [B, S, J] and pooled [B, P].
#[derive(Debug, Clone)]
pub struct PromptBatch {
    /// [B, S, J].
    pub embeds: HostTensor,
    /// [B, P].
    pub pooled: HostTensor,
}

impl PromptBatch {
    /// One prompt for each sample.
    ///
    /// # Errors
    /// If the prompts differ in shape.
    pub fn stack(prompts: &[&PromptEmbedding]) -> Result<Self, ShapeError> {
        let embeds: Vec<&HostTensor> = prompts.iter().map(|p| &p.embeds).collect();
        let pooled: Vec<&HostTensor> = prompts.iter().map(|p| &p.pooled).collect();
        Ok(Self { embeds: HostTensor::stack(&embeds)?, pooled: HostTensor::stack(&pooled)? })
    }
}

/// What predicts velocities: the transformer.
pub trait Velocity {
    /// The velocity `[B, C, h, w]` at `x` `[B, C, h, w]` and `timestep` `[B]`.
    ///
    /// # Errors
    /// If an input does not fit or the device fails.
    fn velocity(&self, x: &HostTensor, timestep: &HostTensor, prompts: &PromptBatch, lora_scale: f64, skip_blocks: &[usize])
    -> Result<HostTensor, SampleError>;
}

impl<D: Device> Velocity for Mmdit<D> {
    fn velocity(
        &self,
        x: &HostTensor,
        timestep: &HostTensor,
        prompts: &PromptBatch,
        lora_scale: f64,
        skip_blocks: &[usize],
    ) -> Result<HostTensor, SampleError> {
        Ok(catch(|| self.forward_only(x, timestep, &prompts.embeds, &prompts.pooled, lora_scale, skip_blocks)).map_err(MmditError::from)??)
    }
}

/// Loads a transformer onto the engine's device to sample with it, with a LoRA if there is one. `format`: as [`Mmdit::load_as`].
///
/// # Errors
/// If a weight or the LoRA does not fit, or the device fails.
pub fn transformer(
    weights: Weights,
    config: MmditConfig,
    engine: &Engine,
    format: WeightFormat,
    lora: Option<(LoraLayout, Vec<Param>)>,
) -> Result<Box<dyn Velocity + Send + Sync>, MmditError> {
    fn load<D: Device>(
        weights: Weights,
        config: MmditConfig,
        (device, format): (&D, WeightFormat),
        lora: Option<(LoraLayout, Vec<Param>)>,
    ) -> Result<Mmdit<D>, MmditError> {
        let mut model = Mmdit::load_as(Arc::new(weights), config, device, format)?;
        if let Some((layout, params)) = lora {
            model.attach_layout(layout)?;
            model.set_lora(&params)?;
        }
        Ok(model)
    }
    with_device!(engine, device => Ok(Box::new(catch(|| load(weights, config, (device, format), lora))??)))
}

/// Initial latents [1, channels, height, width] of picture `index`: standard normal, named by (seed, index).
pub fn initial_latents(seed: u64, index: u64, channels: usize, height: usize, width: usize) -> HostTensor {
    let mut latents = HostTensor::zeros([1, channels, height, width]);
    Stream::new(seed, Purpose::SampleLatents, index, 0).fill_normal(latents.values_mut());
    latents
}

/// Denoises `latents` [B, C, h, w], standard normal, to x0. `on_step` gets the number of steps done; `Break` stops.
///
/// Guidance computes unconditional and conditional predictions in one batch, in this order.
///
/// # Errors
/// If a setting is out of range, an input does not fit, the model's output is not finite, or `on_step` asked to stop.
pub fn denoise(
    model: &dyn Velocity,
    scheduler: &SchedulerConfig,
    latents: &HostTensor,
    prompts: &PromptBatch,
    negative: &PromptBatch,
    settings: &Denoise,
    on_step: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<HostTensor, SampleError> {
    if settings.steps == 0 || settings.steps > 10_000 {
        return Err(SampleError::Setting { setting: "the number of steps", value: settings.steps.to_string(), expected: "between 1 and 10000".into() });
    }
    for (setting, value) in [("the guidance scale", settings.guidance_scale), ("the LoRA scale", settings.lora_scale)] {
        if !value.is_finite() {
            return Err(SampleError::Setting { setting, value: value.to_string(), expected: "a finite number".into() });
        }
    }
    let guided = settings.guidance_scale > 1.0;
    let both = if guided {
        PromptBatch { embeds: HostTensor::concat(&[&negative.embeds, &prompts.embeds])?, pooled: HostTensor::concat(&[&negative.pooled, &prompts.pooled])? }
    } else {
        prompts.clone()
    };
    let batch = latents.samples();
    let levels = sigmas(scheduler, settings.steps);
    let steps = settings.steps as f64;
    let mut x = latents.clone();
    for (i, pair) in levels.windows(2).enumerate() {
        let t = pair[0] * scheduler.num_train_timesteps as f32;
        let timestep = |n: usize| HostTensor::full(t, [n]);
        let mut v;
        if guided {
            let predictions = model.velocity(&HostTensor::concat(&[&x, &x])?, &timestep(2 * batch), &both, settings.lora_scale, &[])?;
            let (without, with) = (predictions.part(0..batch)?, predictions.part(batch..2 * batch)?);
            let scale = settings.guidance_scale as f32;
            v = without.zip(&with, |without, with| without + (with - without) * scale)?;
            // As the pipeline: only together with guidance, strictly between the fractions.
            if let Some(skip) = settings.skip_layers.as_ref().filter(|s| i as f64 > steps * s.start && (i as f64) < steps * s.stop) {
                let skipped = model.velocity(&x, &timestep(batch), prompts, settings.lora_scale, &skip.layers)?;
                let scale = skip.scale as f32;
                v = v.zip(&with.zip(&skipped, |with, skipped| (with - skipped) * scale)?, |v, away| v + away)?;
            }
        } else {
            v = model.velocity(&x, &timestep(batch), &both, settings.lora_scale, &[])?;
        }
        let change = pair[1] - pair[0];
        x = x.zip(&v, |x, v| x + v * change)?;
        if !x.is_finite() {
            return Err(SampleError::NotFinite { what: "latents", network: "transformer" });
        }
        if on_step(i + 1).is_break() {
            return Err(SampleError::Stopped);
        }
    }
    Ok(x)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Predicts `pooled - x` plus the number of skipped blocks, and notes every call.
    struct Fake {
        calls: RefCell<Vec<(usize, f32, Vec<usize>)>>,
    }

    impl Velocity for Fake {
        fn velocity(
            &self,
            x: &HostTensor,
            timestep: &HostTensor,
            prompts: &PromptBatch,
            _lora_scale: f64,
            skip_blocks: &[usize],
        ) -> Result<HostTensor, SampleError> {
            self.calls.borrow_mut().push((x.samples(), timestep.values()[0], skip_blocks.to_vec()));
            let mut velocity = x.clone();
            let size = x.values().len() / x.samples();
            for (velocity, target) in velocity.values_mut().chunks_mut(size).zip(prompts.pooled.values()) {
                velocity.iter_mut().for_each(|v| *v = target - *v + skip_blocks.len() as f32);
            }
            Ok(velocity)
        }
    }

    fn prompts(value: f32) -> PromptBatch {
        PromptBatch { embeds: HostTensor::zeros([1, 2, 3]), pooled: HostTensor::full(value, [1, 1]) }
    }

    fn run(settings: &Denoise) -> (Vec<(usize, f32, Vec<usize>)>, f32) {
        let fake = Fake { calls: RefCell::default() };
        let x = initial_latents(1, 0, 2, 3, 4);
        let out = denoise(&fake, &SchedulerConfig::default(), &x, &prompts(2.0), &prompts(0.5), settings, &mut |_| ControlFlow::Continue(())).unwrap();
        (fake.calls.into_inner(), out.values()[0])
    }

    #[test]
    fn guidance_and_skipped_layers_are_called_as_the_pipeline_does() {
        let (calls, plain) = run(&Denoise { steps: 10, guidance_scale: 1.0, ..Denoise::default() });
        assert_eq!(calls.len(), 10);
        assert!(calls.iter().all(|(batch, _, skip)| *batch == 1 && skip.is_empty()));
        assert!((calls[0].1 - 1000.0).abs() < 1e-3);

        let (calls, guided) = run(&Denoise { steps: 10, guidance_scale: 4.0, ..Denoise::default() });
        assert!(calls.iter().all(|(batch, _, _)| *batch == 2));
        // Guidance of 4 makes the constant part of the velocity 0.5 + 4 (2.0 - 0.5) = 6.5 instead of 2, and x goes against it.
        assert!(guided < plain - 4.0, "{guided} {plain}");

        let skip = SkipLayers { layers: vec![7, 8], scale: 2.8, start: 0.0, stop: 0.3 };
        let (calls, _) = run(&Denoise { steps: 10, guidance_scale: 4.0, lora_scale: 1.0, skip_layers: Some(skip) });
        let skipping: Vec<usize> = calls.iter().enumerate().filter(|(_, c)| !c.2.is_empty()).map(|(i, _)| i).collect();
        // Steps 1 and 2: strictly above 0 and strictly below 3. Calls: step 0; step 1 twice; step 2 twice; ...
        assert_eq!(skipping, [2, 4]);
        assert_eq!(calls[2], (1, calls[1].1, vec![7, 8]));
    }

    #[test]
    fn one_step_is_exact() {
        let fake = Fake { calls: RefCell::default() };
        let x = HostTensor::zeros([1, 1, 1, 1]);
        let settings = Denoise { steps: 1, guidance_scale: 3.0, ..Denoise::default() };
        let out = denoise(&fake, &SchedulerConfig::default(), &x, &prompts(2.0), &prompts(1.0), &settings, &mut |_| ControlFlow::Continue(())).unwrap();
        // v = 1 + 3 (2 - 1) = 4, x = 0 + (0 - 1) 4.
        assert!((out.values()[0] + 4.0).abs() < 1e-6);
    }

    #[test]
    fn settings_are_checked_and_stopping_stops() {
        let fake = Fake { calls: RefCell::default() };
        let x = initial_latents(1, 0, 1, 1, 1);
        let go = |settings: &Denoise| denoise(&fake, &SchedulerConfig::default(), &x, &prompts(2.0), &prompts(1.0), settings, &mut |_| ControlFlow::Break(()));
        assert!(matches!(go(&Denoise { steps: 0, ..Denoise::default() }), Err(SampleError::Setting { .. })));
        assert!(matches!(go(&Denoise { guidance_scale: f64::NAN, ..Denoise::default() }), Err(SampleError::Setting { .. })));
        assert!(matches!(go(&Denoise::default()), Err(SampleError::Stopped)));
        assert_eq!(fake.calls.borrow().len(), 1);
    }

    /// A model whose weights hold NaN draws nothing; a picture of it would be black.
    #[test]
    fn a_velocity_that_is_not_finite_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY] {
            let fake = Fake { calls: RefCell::default() };
            let x = HostTensor::zeros([1, 1, 1, 1]);
            let settings = Denoise { steps: 3, guidance_scale: 1.0, ..Denoise::default() };
            let out = denoise(&fake, &SchedulerConfig::default(), &x, &prompts(bad), &prompts(1.0), &settings, &mut |_| ControlFlow::Continue(()));
            assert!(matches!(out, Err(SampleError::NotFinite { what: "latents", .. })), "{out:?}");
            assert_eq!(fake.calls.borrow().len(), 1, "at once");
        }
    }

    #[test]
    fn latents_are_named_by_seed_and_index() {
        let values = |seed, index| initial_latents(seed, index, 4, 3, 2).into_values();
        assert_eq!(values(1, 2), values(1, 2));
        assert_ne!(values(1, 2), values(1, 3));
        assert_ne!(values(1, 2), values(2, 2));
    }
}
