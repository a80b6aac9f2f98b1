//! Class pictures of prior preservation: drawn by the base model from the class prompt, once, before training.
//!
//! As the reference: flow-matching sampling with the pipeline's defaults (28 steps, guidance 7, empty negative prompt), 8-bit pictures.
//! Other than the reference, which draws at the model's own size with unnamed noise and stretches the files: at the training's
//! resolution, so that nothing is resized or cropped, and with noise named by (seed, index), so that each picture can be drawn by itself.

use std::ops::ControlFlow;

use safetensors::Dtype;

use super::PreparedError;
use finetune_common::digest::Sha256Digest;
use finetune_common::rng::{Purpose, Stream};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Engine, WeightFormat};
use finetune_data::cache::{CacheError, CachedTensor, TensorCache};
use finetune_data::image::RgbImage;
use finetune_model::ModelDir;
use finetune_model::layout::{Part, SchedulerConfig};
use finetune_model::mmdit::MmditConfig;
use finetune_model::sample::{Denoise, PromptBatch, SampleError, Velocity, denoise, to_pictures, transformer};
use finetune_model::text::PromptEmbedding;
use finetune_model::vae::VaeDecoder;
use finetune_model::weights::Weights;

/// Name of the tensor in the cache's entry.
const PICTURE: &str = "picture";

/// How class pictures are denoised.
pub(super) fn settings() -> Denoise {
    Denoise { lora_scale: 0.0, ..Denoise::default() }
}

/// The base model, ready to draw.
pub(super) struct ClassPainter {
    transformer: Box<dyn Velocity + Send + Sync>,
    /// Channels of latents.
    channels: usize,
    decoder: VaeDecoder,
    scheduler: SchedulerConfig,
    prompt: PromptEmbedding,
    negative: PromptEmbedding,
    seed: u64,
    resolution: u32,
}

impl ClassPainter {
    /// Loads transformer and decoder. `prompt` and `negative` are embeddings on the host.
    pub(super) fn load(
        model: &ModelDir,
        prompt: PromptEmbedding,
        negative: PromptEmbedding,
        seed: u64,
        resolution: u32,
        (engine, format): (&Engine, WeightFormat),
    ) -> Result<Self, SampleError> {
        let folder = model.path(Part::Transformer);
        let config = MmditConfig::open(&folder)?;
        Ok(Self {
            channels: config.in_channels,
            transformer: transformer(Weights::open(&folder)?, config, engine, format, None)?,
            decoder: VaeDecoder::load(model, engine)?,
            scheduler: model.scheduler()?,
            prompt,
            negative,
            seed,
            resolution,
        })
    }

    /// The pictures of these numbers; `on_step` may `Break` to stop.
    pub(super) fn draw(&self, indices: &[u32], on_step: &mut dyn FnMut(usize) -> ControlFlow<()>) -> Result<Vec<RgbImage>, SampleError> {
        let (channels, side) = (self.channels, self.resolution as usize / self.decoder.config().downscale());
        let mut noise = vec![0.0; indices.len() * channels * side * side];
        for (values, index) in noise.chunks_mut(channels * side * side).zip(indices) {
            Stream::new(self.seed, Purpose::PriorPictures, u64::from(*index), 0).fill_normal(values);
        }
        let noise = HostTensor::new(noise, [indices.len(), channels, side, side])?;
        let prompts = PromptBatch::stack(&vec![&self.prompt; indices.len()])?;
        let negatives = PromptBatch::stack(&vec![&self.negative; indices.len()])?;
        let latents = denoise(self.transformer.as_ref(), &self.scheduler, &noise, &prompts, &negatives, &settings(), on_step)?;
        let mut pictures = Vec::with_capacity(indices.len());
        for i in 0..indices.len() {
            let decoded = self.decoder.decode(&self.decoder.config().unscale(latents.part(i..i + 1)?))?;
            for picture in to_pictures(&decoded)? {
                pictures.push(RgbImage { width: picture.width(), height: picture.height(), data: picture.into_raw() });
            }
        }
        Ok(pictures)
    }
}

/// Keeps a drawn picture.
pub(super) fn put(cache: &mut TensorCache, key: Sha256Digest, picture: RgbImage) -> Result<(), CacheError> {
    let shape = [picture.height as usize, picture.width as usize, 3];
    cache.put(key, &[(PICTURE, CachedTensor::u8(picture.data, &shape)?)])
}

/// A kept picture.
pub(super) fn get(cache: &TensorCache, key: &Sha256Digest, index: usize) -> Result<RgbImage, PreparedError> {
    let picture = cache.get(key, PICTURE)?.ok_or(PreparedError::Missing { what: "class picture", index })?;
    match picture.shape() {
        &[height, width, 3] if picture.dtype() == Dtype::U8 => Ok(RgbImage { width: width as u32, height: height as u32, data: picture.bytes().to_vec() }),
        _ => Err(PreparedError::Malformed { what: "a class picture" }),
    }
}
