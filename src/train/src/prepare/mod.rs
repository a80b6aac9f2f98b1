//! Prompt embeddings and latents: from the cache where they are known, else made, one model in memory at a time.
//!
//! Everything is keyed by what it is: a caption with the encoders and the sequence length; a picture's bytes with its
//! transform and the VAE. A sample finds its data by those keys, never by position, so that caption i is trained with
//! picture i whatever the order. Where everything is known, neither text encoders nor VAE are fetched.

pub(crate) mod captions;
mod class;
mod error;
mod keys;
mod loader;
mod prepared;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use tokio::task::block_in_place;

use class::ClassPainter;
pub use error::{PrepareError, PreparedError};
pub use keys::{Fingerprints, Keys};
use loader::Loader;
pub use prepared::Prepared;

use super::captions::Truncation;
use super::device;
use super::environment::JobEnvironment;
use super::step::LatentScaling;
use finetune_api::Stage;
use finetune_api::plan::{FrozenWeights, TrainConfig};
use finetune_common::digest::{Sha256Digest, sha256_parts};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Engine, Precision};
use finetune_data::buckets::Shapes;
use finetune_data::cache::{CachedTensor, TensorCache};
use finetune_data::dataset::Dataset;
use finetune_data::transform::Pixels;
use finetune_model::ModelDir;
use finetune_model::text::{PromptEmbedding, PromptEncoder};
use finetune_model::vae::VaeEncoder;
use finetune_store::Store;
use finetune_store::model_source::{ModelFolder, Parts};

/// Prepared latents are written at least this often: what a kill may cost.
const WRITE_INTERVAL: Duration = Duration::from_mins(1);

/// Class pictures are written at least this often: each takes seconds, even on a GPU.
const PICTURE_WRITE_INTERVAL: Duration = Duration::from_secs(10);

/// Prepares all that `dataset` and the `held_out` captions need; what the cache or its mirror beside the checkpoints has is not made again.
///
/// # Errors
/// If the model cannot be fetched or used, a picture has changed since the scan, or the run is asked to stop.
#[expect(clippy::too_many_arguments, reason = "each is a part of the run; together they are nothing else")]
pub async fn prepare(
    config: &TrainConfig,
    dataset: &Dataset,
    shapes: Shapes,
    held_out: &[String],
    pictures: &Store,
    folder: &ModelFolder,
    mirror: &Store,
    engine: &Engine,
    weights: FrozenWeights,
    environment: &JobEnvironment,
) -> Result<Prepared, PrepareError> {
    // What is computed in 16 bits has other last bits than what is computed in 32.
    let computed = |digest: Sha256Digest| match engine.precision() {
        Precision::F32 => digest,
        short => sha256_parts([&digest[..], short.to_string().as_bytes()]),
    };
    let prior = config.training.prior_preservation.as_ref();
    let drawing = prior.map_or(Ok(engine.clone()), |prior| device::drawing(engine, prior.precision)).map_err(PrepareError::ClassPrecision)?;
    let fingerprints = Fingerprints {
        encoders: computed(folder.fingerprint(Parts::TOKENIZERS | Parts::TEXT_ENCODERS).await?),
        vae: computed(folder.fingerprint(Parts::VAE).await?),
        // In a mounted volume this reads the whole file.
        transformer: match prior {
            Some(_) => folder.fingerprint(Parts::TRANSFORMER | Parts::SCHEDULER).await?,
            None => [0; 32],
        },
        drawn_in: drawing.precision(),
        weights,
    };
    let preparation = Preparation {
        config,
        dataset,
        held_out,
        pictures,
        folder,
        engine,
        drawing: (&drawing, weights),
        environment,
        keys: Keys::new(config, shapes, &fingerprints),
    };
    let mut cache = TensorCache::open(&environment.cache_dir.join("prepared"), Some(mirror.clone())).await?;
    let prepared = preparation.all(&mut cache).await;
    // What is done is kept, also when the run was asked to stop; and what another run has left in the folder is mirrored.
    if prepared.is_ok() || matches!(prepared, Err(PrepareError::Stopped)) {
        cache.flush().await?;
    }
    let (scaling, truncation) = prepared?;
    Ok(Prepared::new(cache, &preparation.keys, dataset, config.dataset.repeats, prior, scaling, truncation))
}

/// The pictures of `samples` (their first copies) as they are trained, in that order: for people to look at.
pub(crate) fn sheet<'a>(
    dataset: &'a Dataset,
    pictures: &Store,
    prepared: &'a Prepared,
    samples: impl Iterator<Item = usize> + 'a,
) -> impl futures::Stream<Item = (usize, Result<Pixels, PrepareError>)> + 'a {
    let loader = Loader::new(dataset.pictures(pictures));
    futures::stream::iter(samples)
        .map(move |sample| {
            let loading = loader.load(dataset.samples[sample].clone(), prepared.transform(dataset, sample, 0));
            async move { (sample, loading.wait().await) }
        })
        .buffered(loader::AHEAD)
}

struct Preparation<'a> {
    config: &'a TrainConfig,
    dataset: &'a Dataset,
    held_out: &'a [String],
    pictures: &'a Store,
    folder: &'a ModelFolder,
    engine: &'a Engine,
    drawing: (&'a Engine, FrozenWeights),
    environment: &'a JobEnvironment,
    keys: Keys,
}

/// Where a picture to encode comes from. In the order of encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    /// A sample of the dataset, and which copy.
    Sample(usize, u32),
    /// A class picture.
    Class(u32),
}

impl Preparation<'_> {
    async fn all(&self, cache: &mut TensorCache) -> Result<(LatentScaling, Option<Truncation>), PrepareError> {
        let truncation = self.truncation(cache).await?;
        self.prompts(cache).await?;
        self.class_pictures(cache).await?;
        Ok((self.latents(cache).await?, truncation))
    }

    /// Says which captions are cut, before anything expensive is done with them. Lengths are kept with what is prepared.
    async fn truncation(&self, cache: &mut TensorCache) -> Result<Option<Truncation>, PrepareError> {
        let with_t5 = !self.folder.is_without_t5();
        let key = self.keys.caption_lengths(self.dataset);
        if !cache.contains(&key) {
            self.fetch(Parts::TOKENIZERS, "fetching the tokenizers").await?;
            let (clip_limit, lengths) = block_in_place(|| captions::lengths(self.folder, self.dataset))?;
            captions::keep(cache, key, clip_limit, &lengths)?;
        }
        let (clip_limit, lengths) = captions::kept(cache, &key)?;
        let limit = self.config.training.max_sequence_length;
        let truncation = Truncation::of(self.dataset, &lengths, limit, clip_limit, with_t5);
        if let Some(truncation) = &truncation {
            tracing::warn!(captions = truncation.captions, longest = truncation.longest, limit = truncation.limit, "{truncation}");
        }
        self.environment.reporter.truncated_captions(truncation.as_ref().map_or(0, |truncation| truncation.captions));
        Ok(truncation)
    }

    /// Fetches parts of the model, unless asked to stop meanwhile.
    async fn fetch(&self, parts: Parts, what: &'static str) -> Result<(), PrepareError> {
        let reporter = &self.environment.reporter;
        reporter.stage(Stage::DownloadingModel, what, 0);
        tokio::select! {
            fetched = self.folder.fetch(parts, reporter) => fetched.map(|_| ()).map_err(PrepareError::from),
            () = self.environment.interrupt.wait() => Err(PrepareError::Stopped),
        }
    }

    fn stop_if_asked(&self) -> Result<(), PrepareError> {
        if self.environment.interrupt.requested() { Err(PrepareError::Stopped) } else { Ok(()) }
    }

    /// Every caption that the run needs, each once: those of the dataset, with the empty one where captions are dropped, of validation and of the class
    /// pictures, with the empty negative prompt where pictures are drawn.
    fn captions(&self) -> BTreeSet<String> {
        let validation = self.config.validation.iter().flat_map(|v| v.prompts.iter().cloned().chain([String::new()]));
        let class = self.config.training.prior_preservation.iter().flat_map(|prior| [prior.class_prompt.clone(), String::new()]);
        let dropped = self.config.dataset.captions.iter().filter(|captions| captions.dropout > 0.0).map(|_| String::new());
        self.dataset
            .captions()
            .map(|(_, caption)| caption.to_owned())
            .chain(dropped)
            .chain(self.held_out.iter().cloned())
            .chain(validation)
            .chain(class)
            .collect()
    }

    async fn prompts(&self, cache: &mut TensorCache) -> Result<(), PrepareError> {
        let reporter = &self.environment.reporter;
        let missing: Vec<String> = self.captions().into_iter().filter(|c| !cache.contains(&self.keys.prompt(c))).collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.fetch(Parts::TOKENIZERS | Parts::TEXT_ENCODERS, "fetching the text encoders").await?;
        let model = ModelDir::open(self.folder.folder())?;
        if self.folder.is_without_t5() {
            // The width of T5's place is the transformer's.
            self.fetch(Parts::TRANSFORMER, "fetching the transformer").await?;
        }
        block_in_place(|| {
            let encoder = PromptEncoder::open(&model, self.config.training.max_sequence_length as usize, self.engine)?;
            reporter.stage(Stage::PreparingData, "encoding captions", 0);
            let mut progress = |_| if self.environment.interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            encoder.encode_each::<PrepareError>(&missing, &mut progress, &mut |caption, PromptEmbedding { embeds, pooled }| {
                Ok(cache.put(self.keys.prompt(caption), &[("embeds", CachedTensor::f32(&embeds)), ("pooled", CachedTensor::f32(&pooled))])?)
            })
        })
    }

    /// Draws the class pictures that are not there, neither they nor their latents.
    async fn class_pictures(&self, cache: &mut TensorCache) -> Result<(), PrepareError> {
        let reporter = &self.environment.reporter;
        let training = &self.config.training;
        let Some(prior) = &training.prior_preservation else { return Ok(()) };
        let known = |key: Option<Sha256Digest>| key.is_some_and(|key| cache.contains(&key));
        let missing: Vec<u32> = (0..prior.images).filter(|i| !known(self.keys.class_latents(*i)) && !known(self.keys.class_picture(*i))).collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.fetch(Parts::TRANSFORMER | Parts::SCHEDULER | Parts::VAE, "fetching the transformer").await?;
        let model = ModelDir::open(self.folder.folder())?;
        let embedding = |text: &str| {
            let (embeds, pooled) = prepared::read_prompt(cache, &self.keys.prompt(text))?.ok_or(PreparedError::Malformed { what: "the class prompt" })?;
            Ok::<_, PrepareError>(PromptEmbedding { embeds, pooled })
        };
        let drawing = (self.drawing.0, crate::setup::format(self.drawing.1));
        let (prompt, negative) = (embedding(&prior.class_prompt)?, embedding("")?);
        let painter = block_in_place(|| ClassPainter::load(&model, prompt, negative, training.seed, training.resolution, drawing))?;
        reporter.stage(Stage::PreparingData, "drawing class pictures", missing.len() as u64);
        let mut written = Instant::now();
        for indices in missing.chunks(prior.sample_batch_size.max(1) as usize) {
            let mut on_step = |_| if self.environment.interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            let pictures = block_in_place(|| painter.draw(indices, &mut on_step))?;
            for (index, picture) in indices.iter().zip(pictures) {
                if let Some(key) = self.keys.class_picture(*index) {
                    class::put(cache, key, picture)?;
                }
            }
            reporter.advance(indices.len() as u64);
            if written.elapsed() >= PICTURE_WRITE_INTERVAL {
                cache.flush().await?;
                written = Instant::now();
            }
        }
        Ok(())
    }

    /// The model's input for a class picture.
    fn class_pixels(&self, cache: &TensorCache, index: u32) -> Result<Pixels, PrepareError> {
        let key = self.keys.class_picture(index).ok_or(PreparedError::Malformed { what: "class pictures" })?;
        Ok(self.keys.class_transform().apply(&class::get(cache, &key, index as usize)?))
    }

    async fn latents(&self, cache: &mut TensorCache) -> Result<LatentScaling, PrepareError> {
        let reporter = &self.environment.reporter;
        let mut missing: BTreeMap<_, Source> = BTreeMap::new();
        for sample in 0..self.dataset.samples.len() {
            for copy in 0..self.config.dataset.repeats {
                let key = self.keys.latents(self.dataset, sample, copy);
                if !cache.contains(&key) {
                    missing.entry(key).or_insert(Source::Sample(sample, copy));
                }
            }
        }
        for index in 0..self.config.training.prior_preservation.as_ref().map_or(0, |prior| prior.images) {
            if let Some(key) = self.keys.class_latents(index).filter(|key| !cache.contains(key)) {
                missing.insert(key, Source::Class(index));
            }
        }
        if missing.is_empty()
            && let Some(scaling) = prepared::read_scaling(cache, &self.keys)?
        {
            return Ok(scaling);
        }
        self.fetch(Parts::VAE, "fetching the VAE").await?;
        let model = ModelDir::open(self.folder.folder())?;
        let encoder = block_in_place(|| VaeEncoder::load(&model, self.engine))?;
        reporter.stage(Stage::PreparingData, "encoding pictures", missing.len() as u64);
        // In the dataset's order, so that what is written does not depend on digests.
        let mut missing: Vec<_> = missing.into_iter().collect();
        missing.sort_by_key(|(_, source)| *source);
        let mut written = Instant::now();
        // While one picture is encoded, the next ones are fetched, decoded and resized.
        let loader = Loader::new(self.dataset.pictures(self.pictures));
        let mut pictures = futures::stream::iter(missing)
            .map(|(key, source)| {
                let loading = match source {
                    Source::Sample(sample, copy) => Some(loader.load(self.dataset.samples[sample].clone(), self.keys.transform(self.dataset, sample, copy))),
                    Source::Class(_) => None,
                };
                async move {
                    let loaded = match loading {
                        Some(loading) => Some(loading.wait().await?),
                        None => None,
                    };
                    Ok::<_, PrepareError>((key, source, loaded))
                }
            })
            .buffered(loader::AHEAD)
            // A GPU gets the next picture while it computes one; the CPU is busy with one.
            .ready_chunks(if self.engine.is_cuda() { loader::AHEAD } else { 1 });
        while let Some(chunk) = pictures.next().await {
            self.stop_if_asked()?;
            if written.elapsed() >= WRITE_INTERVAL {
                cache.flush().await?;
                written = Instant::now();
            }
            let (mut ready, mut failed) = (Vec::new(), None);
            for picture in chunk {
                match picture {
                    Ok((key, Source::Class(index), _)) => ready.push((key, block_in_place(|| self.class_pixels(cache, index))?)),
                    Ok((key, Source::Sample(..), pixels)) => ready.extend(pixels.map(|pixels| (key, pixels))),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            for same_shape in ready.chunk_by(|(_, a), (_, b)| a.size == b.size) {
                block_in_place(|| encode(&encoder, cache, same_shape))?;
                reporter.advance(same_shape.len() as u64);
            }
            if let Some(error) = failed {
                return Err(error);
            }
        }
        let config = encoder.config();
        let scaling = LatentScaling { scale: config.scaling_factor as f32, shift: config.shift_factor.unwrap_or(0.0) as f32 };
        cache.put(self.keys.scaling(), &[("scaling", CachedTensor::f32(&HostTensor::vector(vec![scaling.scale, scaling.shift])))])?;
        Ok(scaling)
    }
}

/// Encodes pictures of one shape, and keeps their latents.
fn encode(encoder: &VaeEncoder, cache: &mut TensorCache, pictures: &[(Sha256Digest, Pixels)]) -> Result<(), PrepareError> {
    let Some((_, Pixels { size: (width, height), .. })) = pictures.first() else { return Ok(()) };
    let values = pictures.iter().flat_map(|(_, pixels)| pixels.data.iter().copied()).collect();
    let posterior = encoder.encode(&HostTensor::new(values, [pictures.len(), 3, *height as usize, *width as usize])?)?;
    for (i, (key, _)) in pictures.iter().enumerate() {
        let own = |batch: &HostTensor| {
            let own = batch.part(i..i + 1)?;
            let shape = own.shape()[1..].to_vec();
            own.reshaped(shape).map(|own| CachedTensor::f32(&own))
        };
        cache.put(*key, &[("mean", own(&posterior.mean)?), ("logvar", own(&posterior.logvar)?)])?;
    }
    Ok(())
}
