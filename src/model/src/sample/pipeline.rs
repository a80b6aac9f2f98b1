//! From prompts to pictures, one model in memory at a time: text encoders, transformer, VAE decoder.

use std::ops::ControlFlow;

use image::RgbImage;

use super::{Denoise, PromptBatch, SampleError, Velocity, denoise, initial_latents, to_pictures, transformer};
use crate::layout::{ModelDir, Part};
use crate::lora::{LoraState, stack};
use crate::mmdit::MmditConfig;
use crate::text::{EncodeProgress, PromptEncoder};
use crate::vae::{VaeConfig, VaeDecoder};
use crate::weights::Weights;
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Engine, WeightFormat};

/// What a [`Pipeline`] makes.
#[derive(Debug, Clone, PartialEq)]
pub struct PipelineSettings {
    /// Steps and guidance. The LoRA's scale is given with each variant instead.
    pub denoise: Denoise,
    /// What guidance leads away from.
    pub negative_prompt: String,
    /// T5's number of tokens.
    pub max_sequence_length: usize,
    /// Names the noise together with the picture's place among the prompts.
    pub seed: u64,
    /// Width of pictures in pixels.
    pub width: u32,
    /// Height of pictures in pixels.
    pub height: u32,
}

/// How far a [`Pipeline`] has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Prompts are encoded.
    Encoding(EncodeProgress),
    /// Steps done of all pictures, and their number.
    Sampling {
        /// Steps done.
        done: usize,
        /// Steps of all pictures.
        total: usize,
    },
    /// Pictures decoded, and their number.
    Decoding {
        /// Pictures done.
        done: usize,
        /// All pictures.
        total: usize,
    },
}

/// A model folder that makes pictures.
#[derive(Debug)]
pub struct Pipeline {
    model: ModelDir,
    engine: Engine,
    transformer: MmditConfig,
    vae: VaeConfig,
    loras: Vec<(LoraState, f64)>,
    format: WeightFormat,
}

impl Pipeline {
    /// Reads the configurations of a model folder.
    ///
    /// # Errors
    /// If a part is missing or not supported.
    pub fn open(model: &ModelDir, engine: &Engine) -> Result<Self, SampleError> {
        let transformer = MmditConfig::open(&model.path(Part::Transformer))?;
        Ok(Self { model: model.clone(), engine: engine.clone(), vae: VaeConfig::read(model)?, transformer, loras: Vec::new(), format: WeightFormat::Float })
    }

    /// Keeps the weights of the transformer's blocks in this format.
    #[must_use]
    pub fn with_weights(mut self, format: WeightFormat) -> Self {
        self.format = format;
        self
    }

    /// Adds a LoRA with a factor of its own; the scale of all of them is given with each variant.
    #[must_use]
    pub fn with_lora(mut self, lora: LoraState, factor: f64) -> Self {
        self.loras.push((lora, factor));
        self
    }

    /// Pixels that width and height must be multiples of.
    pub fn grain(&self) -> u32 {
        (self.vae.downscale() * self.transformer.patch_size) as u32
    }

    /// Pictures of every prompt at every LoRA scale of `variants` (0: the base model), as `[variant][prompt]`. Pictures of
    /// one prompt begin with the same noise. `on_stage` may `Break` to stop.
    ///
    /// # Errors
    /// If a setting is out of range, a part of the model is not as it should be, or `on_stage` asked to stop.
    pub fn run(
        &self,
        prompts: &[String],
        variants: &[f64],
        settings: &PipelineSettings,
        on_stage: &mut dyn FnMut(Stage) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<RgbImage>>, SampleError> {
        let (height, width) = self.latent_size(settings)?;
        if self.loras.is_empty() && variants.iter().any(|scale| *scale != 0.0) {
            tracing::debug!("no LoRA: every variant is the base model");
        }
        let mut captions = prompts.to_vec();
        captions.push(settings.negative_prompt.clone());
        let encoder = PromptEncoder::open(&self.model, settings.max_sequence_length, &self.engine)?;
        let mut embeddings = encoder.encode(&captions, &mut |progress| on_stage(Stage::Encoding(progress)))?;
        drop(encoder);
        let Some(negative) = embeddings.pop() else { return Ok(Vec::new()) };
        let negative = PromptBatch::stack(&[&negative])?;

        let transformer = self.load_transformer()?;
        let scheduler = self.model.scheduler()?;
        let steps = settings.denoise.steps;
        let total = steps * prompts.len() * variants.len();
        let mut latents: Vec<Vec<HostTensor>> = Vec::with_capacity(variants.len());
        for (variant, scale) in variants.iter().enumerate() {
            let how = Denoise { lora_scale: *scale, ..settings.denoise.clone() };
            let mut row = Vec::with_capacity(prompts.len());
            for (index, prompt) in embeddings.iter().enumerate() {
                let before = (variant * prompts.len() + index) * steps;
                let noise = initial_latents(settings.seed, index as u64, self.transformer.in_channels, height, width);
                let prompt = PromptBatch::stack(&[prompt])?;
                row.push(denoise(transformer.as_ref(), &scheduler, &noise, &prompt, &negative, &how, &mut |done| {
                    on_stage(Stage::Sampling { done: before + done, total })
                })?);
            }
            latents.push(row);
        }
        drop(transformer);

        let decoder = VaeDecoder::load(&self.model, &self.engine)?;
        let total = prompts.len() * variants.len();
        let mut done = 0;
        let mut pictures = Vec::with_capacity(variants.len());
        for row in latents {
            let mut drawn = Vec::with_capacity(row.len());
            for latent in row {
                drawn.extend(to_pictures(&decoder.decode(&self.vae.unscale(latent))?)?);
                done += 1;
                if on_stage(Stage::Decoding { done, total }).is_break() {
                    return Err(SampleError::Stopped);
                }
            }
            pictures.push(drawn);
        }
        Ok(pictures)
    }

    fn load_transformer(&self) -> Result<Box<dyn Velocity + Send + Sync>, SampleError> {
        let weights = Weights::open(&self.model.path(Part::Transformer))?;
        let sites = self.transformer.linear_sites();
        let resolve = |(lora, factor): &(LoraState, f64)| lora.resolve(&sites).map(|(layout, params)| (layout, params, *factor));
        let mut loras = self.loras.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
        let lora = match loras.pop() {
            None => None,
            // One alone keeps its bits.
            Some((layout, params, 1.0)) if loras.is_empty() => Some((layout, params)),
            Some(last) => {
                loras.push(last);
                Some(stack(&loras)?)
            }
        };
        Ok(transformer(weights, self.transformer.clone(), &self.engine, self.format, lora)?)
    }

    /// Height and width of latents; the settings that depend on the model are checked.
    fn latent_size(&self, settings: &PipelineSettings) -> Result<(usize, usize), SampleError> {
        let grain = self.grain();
        let largest = grain * self.transformer.pos_embed_max_size as u32;
        for (setting, value) in [("the width", settings.width), ("the height", settings.height)] {
            if value == 0 || !value.is_multiple_of(grain) || value > largest {
                return Err(SampleError::Setting { setting, value: value.to_string(), expected: format!("a multiple of {grain} up to {largest}") });
            }
        }
        let blocks = self.transformer.num_layers;
        if let Some(skipped) = settings.denoise.skip_layers.as_ref().and_then(|skip| skip.layers.iter().find(|&&layer| layer >= blocks)) {
            let expected = format!("a block of this model, 0 to {}", blocks - 1);
            return Err(SampleError::Setting { setting: "a layer to skip", value: skipped.to_string(), expected });
        }
        let latent = |pixels: u32| pixels as usize / self.vae.downscale();
        Ok((latent(settings.height), latent(settings.width)))
    }
}
