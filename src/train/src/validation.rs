//! Pictures of the validation prompts, drawn while training: below `pictures/` of the checkpoint prefix as they come, and in
//! the output in the end. The same step draws the same pictures, so a resumed run may draw them again.

use std::io::Cursor;
use std::ops::ControlFlow;

use bytes::Bytes;
use image::{ImageFormat, RgbImage};

use super::checkpoint::Checkpoints;
use super::history::{self, Picture};
use super::interrupt::Interrupt;
use super::prepare::PreparedError;
use super::trainer::Trainer;
use finetune_api::plan::ValidationConfig;
use finetune_common::tensor::ShapeError;
use finetune_compute::kernels::Engine;
use finetune_model::ModelDir;
use finetune_model::layout::{LayoutError, SchedulerConfig};
use finetune_model::sample::{Denoise, PromptBatch, SampleError, denoise, initial_latents, to_pictures};
use finetune_model::text::PromptEmbedding;
use finetune_model::vae::{VaeDecoder, VaeError};
use finetune_store::{Store, StoreError};

/// Where pictures lie below the checkpoint prefix while the run lasts.
pub const FOLDER: &str = "pictures";

/// Why pictures could not be drawn.
#[derive(Debug, thiserror::Error)]
pub enum ValidationError {
    /// The sampler failed.
    #[error("failed to sample")]
    Sample(#[from] SampleError),
    /// The VAE's decoder failed.
    #[error("failed to decode")]
    Vae(#[from] VaeError),
    /// The model's folder is not as it should be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A prompt's embedding is gone.
    #[error(transparent)]
    Prepared(#[from] PreparedError),
    /// A tensor does not have the shape that it should have.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The PNG could not be made.
    #[error("failed to encode a picture")]
    Png(#[from] image::ImageError),
}

/// Draws prompts with the weights as they are.
pub struct Painter<'a> {
    trainer: &'a Trainer,
    interrupt: &'a Interrupt,
    decoder: VaeDecoder,
    scheduler: SchedulerConfig,
    negative: PromptEmbedding,
    settings: Denoise,
    seed: u64,
}

impl<'a> Painter<'a> {
    /// Loads the VAE's decoder.
    ///
    /// # Errors
    /// If a part of the model is missing.
    pub fn new(config: &ValidationConfig, model: &ModelDir, trainer: &'a Trainer, engine: &Engine, interrupt: &'a Interrupt) -> Result<Self, ValidationError> {
        let decoder = VaeDecoder::load(model, engine)?;
        let (embeds, pooled) = trainer.prepared().prompt("")?;
        Ok(Self {
            trainer,
            interrupt,
            scheduler: model.scheduler()?,
            negative: PromptEmbedding { embeds, pooled },
            settings: Denoise { steps: config.steps as usize, guidance_scale: config.guidance_scale, lora_scale: 1.0, skip_layers: None },
            seed: config.seed,
            decoder,
        })
    }

    /// One picture for each prompt, of this width and height, the `i`-th from the `i`-th noise; none if the run is asked to stop meanwhile.
    ///
    /// # Errors
    /// If the model fails.
    pub fn draw(&self, prompts: &[(&str, (u32, u32))], lora_scale: f64) -> Result<Option<Vec<RgbImage>>, ValidationError> {
        let negative = PromptBatch::stack(&[&self.negative])?;
        let settings = Denoise { lora_scale, ..self.settings.clone() };
        let channels = self.trainer.learner().config().in_channels;
        let mut pictures = Vec::new();
        for (index, (text, (width, height))) in prompts.iter().enumerate() {
            let (embeds, pooled) = self.trainer.prepared().prompt(text)?;
            let prompt = PromptBatch::stack(&[&PromptEmbedding { embeds, pooled }])?;
            let [height, width] = [height, width].map(|side| *side as usize / self.decoder.config().downscale());
            let noise = initial_latents(self.seed, index as u64, channels, height, width);
            let mut on_step = |_| if self.interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            let latents = match denoise(self.trainer.learner(), &self.scheduler, &noise, &prompt, &negative, &settings, &mut on_step) {
                Err(SampleError::Stopped) => return Ok(None),
                latents => latents?,
            };
            pictures.extend(to_pictures(&self.decoder.decode(&self.decoder.config().unscale(latents))?)?);
        }
        Ok(Some(pictures))
    }
}

/// Draws every prompt with the present weights; none if the run is asked to stop meanwhile.
///
/// # Errors
/// If a part of the model is missing or fails.
pub fn draw(
    config: &ValidationConfig,
    resolution: u32,
    model: &ModelDir,
    trainer: &Trainer,
    engine: &Engine,
    interrupt: &Interrupt,
) -> Result<Option<Vec<Picture>>, ValidationError> {
    let wanted: Vec<_> = config.prompts.iter().map(|prompt| (prompt.as_str(), (resolution, resolution))).collect();
    let Some(drawn) = Painter::new(config, model, trainer, engine, interrupt)?.draw(&wanted, 1.0)? else { return Ok(None) };
    let mut pictures = Vec::new();
    for (prompt, picture) in drawn.iter().enumerate() {
        let mut png = Cursor::new(Vec::new());
        picture.write_to(&mut png, ImageFormat::Png)?;
        let (width, height) = picture.dimensions();
        pictures.push(Picture { step: trainer.step(), time: history::now(), prompt, png: png.into_inner(), width, height });
    }
    Ok(Some(pictures))
}

/// Keeps pictures for the end of the run, and for people to see before.
///
/// # Errors
/// If the store fails.
pub async fn keep(checkpoints: &Checkpoints, pictures: &[Picture]) -> Result<(), StoreError> {
    let folder = checkpoints.store().child(FOLDER)?;
    for picture in pictures {
        folder.put(&picture.file_name(), Bytes::from(picture.png.clone())).await?;
    }
    Ok(())
}

/// Whether all pictures of `step` have been drawn.
///
/// # Errors
/// If the store fails.
pub async fn is_kept(checkpoints: &Checkpoints, step: u64, prompts: usize) -> Result<bool, StoreError> {
    let found = checkpoints.store().child(FOLDER)?.list("").await?;
    Ok(found.iter().filter_map(|o| Picture::parse(&o.key)).filter(|(drawn, _)| *drawn == step).count() >= prompts)
}

/// All pictures of the run so far, whichever attempt has drawn them, up to `step`.
///
/// # Errors
/// If the store fails.
pub async fn kept(checkpoints: &Checkpoints, trainer: &Trainer) -> Result<Vec<Picture>, StoreError> {
    let folder: Store = checkpoints.store().child(FOLDER)?;
    let mut pictures = Vec::new();
    for object in folder.list("").await? {
        let Some((step, prompt)) = Picture::parse(&object.key).filter(|(step, _)| *step <= trainer.step()) else { continue };
        let png = folder.get(&object.key).await?.to_vec();
        let time = trainer.history().records().iter().find(|r| r.step == step).map_or_else(history::now, |r| r.time);
        if let Ok(image) = image::load_from_memory_with_format(&png, ImageFormat::Png) {
            pictures.push(Picture { step, time, prompt, width: image.width(), height: image.height(), png });
        }
    }
    pictures.sort_by_key(|p| (p.step, p.prompt));
    Ok(pictures)
}
