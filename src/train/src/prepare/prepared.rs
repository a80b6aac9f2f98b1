//! Prepared data, looked up by content.

use super::{Keys, PreparedError};
use crate::captions::Truncation;
use crate::step::{Example, LatentScaling};
use finetune_api::plan::PriorPreservationConfig;
use finetune_common::digest::Sha256Digest;
use finetune_common::tensor::HostTensor;
use finetune_data::cache::TensorCache;
use finetune_data::dataset::Dataset;
use finetune_data::transform::Transform;

/// Prepared data of a dataset. Tensors stay on disk, memory-mapped, until a batch needs them.
pub struct Prepared {
    cache: TensorCache,
    keys: Keys,
    /// Of each sample's captions.
    prompts: Vec<Vec<Sha256Digest>>,
    /// Of each copy of each sample's picture: `[sample · repeats + copy]`.
    latents: Vec<Sha256Digest>,
    repeats: u32,
    /// Of the class prompt, and of each class picture's latents.
    class: Option<(Sha256Digest, Vec<Sha256Digest>)>,
    scaling: LatentScaling,
    truncation: Option<Truncation>,
}

impl Prepared {
    pub(crate) fn new(
        cache: TensorCache,
        keys: &Keys,
        dataset: &Dataset,
        repeats: u32,
        prior: Option<&PriorPreservationConfig>,
        scaling: LatentScaling,
        truncation: Option<Truncation>,
    ) -> Self {
        let samples = 0..dataset.samples.len();
        Self {
            prompts: dataset.samples.iter().map(|s| s.captions.iter().map(|caption| keys.prompt(caption)).collect()).collect(),
            latents: samples.flat_map(|sample| (0..repeats).map(move |copy| (sample, copy))).map(|(s, c)| keys.latents(dataset, s, c)).collect(),
            class: prior.map(|prior| (keys.prompt(&prior.class_prompt), (0..prior.images).filter_map(|i| keys.class_latents(i)).collect())),
            keys: keys.clone(),
            cache,
            repeats,
            scaling,
            truncation,
        }
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.prompts.len()
    }

    /// What is done to a copy of a sample's picture.
    pub(super) fn transform(&self, dataset: &Dataset, sample: usize, copy: u32) -> Transform {
        self.keys.transform(dataset, sample, copy)
    }

    /// Captions that are cut, if any is.
    pub fn truncation(&self) -> Option<&Truncation> {
        self.truncation.as_ref()
    }

    /// The VAE's normalisation.
    pub fn scaling(&self) -> LatentScaling {
        self.scaling
    }

    /// How many captions a sample has.
    pub fn captions(&self, sample: usize) -> usize {
        self.prompts.get(sample).map_or(0, Vec::len)
    }

    /// The data of one copy of a sample: the latents of its picture and the embedding of one of its captions.
    ///
    /// # Errors
    /// If the cache has lost or damaged it.
    pub fn example(&self, sample: usize, copy: u32, caption: usize) -> Result<Example, PreparedError> {
        let latents = self.latents.get(sample * self.repeats as usize + copy as usize);
        self.find(latents, self.prompts.get(sample).and_then(|prompts| prompts.get(caption)), "the latents or caption of sample", sample)
    }

    /// The data of one copy of a sample with the embedding of the empty caption.
    ///
    /// # Errors
    /// If the cache has lost or damaged it.
    pub fn example_without_caption(&self, sample: usize, copy: u32) -> Result<Example, PreparedError> {
        let latents = self.latents.get(sample * self.repeats as usize + copy as usize);
        self.find(latents, Some(&self.keys.prompt("")), "the latents of sample or the empty caption,", sample)
    }

    /// The data of a class picture: its latents and the embedding of the class prompt.
    ///
    /// # Errors
    /// If the cache has lost or damaged it, or the run has no such picture.
    pub fn class_example(&self, index: u32) -> Result<Example, PreparedError> {
        let (prompt, latents) = self.class.as_ref().map(|(prompt, latents)| (prompt, latents.get(index as usize))).unzip();
        self.find(latents.flatten(), prompt, "the latents or prompt of class picture", index as usize)
    }

    fn find(&self, latents: Option<&Sha256Digest>, prompt: Option<&Sha256Digest>, what: &'static str, index: usize) -> Result<Example, PreparedError> {
        let missing = || PreparedError::Missing { what, index };
        let latents = latents.ok_or_else(missing)?;
        let mean = read(&self.cache, latents, "mean")?.ok_or_else(missing)?;
        let logvar = read(&self.cache, latents, "logvar")?.ok_or_else(missing)?;
        let &[c, h, w] = mean.shape() else { return Err(PreparedError::Malformed { what: "latents" }) };
        if logvar.shape() != mean.shape() {
            return Err(PreparedError::Malformed { what: "latents" });
        }
        let (embeds, pooled) = self.prompt_of(prompt.ok_or_else(missing)?)?.ok_or_else(missing)?;
        Ok(Example { mean: mean.into_values(), logvar: logvar.into_values(), shape: [c, h, w], embeds, pooled })
    }

    /// The embedding of a prompt that the run needs besides the dataset's: `[S, J]` and `[P]`.
    ///
    /// # Errors
    /// If the cache has lost or damaged it.
    pub fn prompt(&self, prompt: &str) -> Result<(HostTensor, HostTensor), PreparedError> {
        self.prompt_of(&self.keys.prompt(prompt))?.ok_or(PreparedError::Malformed { what: "a validation prompt" })
    }

    fn prompt_of(&self, key: &Sha256Digest) -> Result<Option<(HostTensor, HostTensor)>, PreparedError> {
        read_prompt(&self.cache, key)
    }
}

/// The embedding of a prompt: `[S, J]` and `[P]`.
pub(super) fn read_prompt(cache: &TensorCache, key: &Sha256Digest) -> Result<Option<(HostTensor, HostTensor)>, PreparedError> {
    Ok(read(cache, key, "embeds")?.zip(read(cache, key, "pooled")?))
}

/// The normalisation that an earlier run has found in the VAE's configuration.
pub(super) fn read_scaling(cache: &TensorCache, keys: &Keys) -> Result<Option<LatentScaling>, PreparedError> {
    let Some(tensor) = read(cache, &keys.scaling(), "scaling")? else { return Ok(None) };
    match *tensor.values() {
        [scale, shift] => Ok(Some(LatentScaling { scale, shift })),
        _ => Err(PreparedError::Malformed { what: "the latents' scaling" }),
    }
}

/// A tensor of an entry.
fn read(cache: &TensorCache, key: &Sha256Digest, name: &str) -> Result<Option<HostTensor>, PreparedError> {
    Ok(cache.get(key, name)?.map(|tensor| tensor.to_f32()).transpose()?)
}
