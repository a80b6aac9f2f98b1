//! Prepared data, looked up by content.

use candle_core::{Device, Tensor};

use super::{Keys, PreparedError};
use crate::data::cache::TensorCache;
use crate::data::dataset::Dataset;
use crate::digest::Sha256Digest;
use crate::train::step::{Example, LatentScaling};

/// Prepared data of a dataset. Tensors stay on disk, memory-mapped, until a batch needs them.
pub struct Prepared {
    cache: TensorCache,
    keys: Keys,
    /// Of each sample's caption.
    prompts: Vec<Sha256Digest>,
    /// Of each copy of each sample's picture: `[sample · repeats + copy]`.
    latents: Vec<Sha256Digest>,
    repeats: u32,
    scaling: LatentScaling,
}

impl Prepared {
    pub(super) fn new(cache: TensorCache, keys: &Keys, dataset: &Dataset, repeats: u32, scaling: LatentScaling) -> Self {
        let samples = 0..dataset.samples.len();
        Self {
            prompts: dataset.samples.iter().map(|s| keys.prompt(&s.caption)).collect(),
            latents: samples.flat_map(|sample| (0..repeats).map(move |copy| (sample, copy))).map(|(s, c)| keys.latents(dataset, s, c)).collect(),
            keys: keys.clone(),
            cache,
            repeats,
            scaling,
        }
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.prompts.len()
    }

    /// The VAE's normalisation.
    pub fn scaling(&self) -> LatentScaling {
        self.scaling
    }

    /// The data of one copy of a sample: the latents of its picture and the embedding of its caption.
    ///
    /// # Errors
    /// If the cache has lost or damaged it.
    pub fn example(&self, sample: usize, copy: u32) -> Result<Example, PreparedError> {
        let missing = |what| PreparedError::Missing { what, sample };
        let latents = self.latents.get(sample * self.repeats as usize + copy as usize).ok_or(missing("latents"))?;
        let mean = read(&self.cache, latents, "mean")?.ok_or(missing("latents"))?;
        let logvar = read(&self.cache, latents, "logvar")?.ok_or(missing("latents"))?;
        let (c, h, w) = mean.dims3()?;
        if logvar.dims() != mean.dims() {
            return Err(PreparedError::Malformed { what: "latents" });
        }
        let (embeds, pooled) = self.prompt_of(self.prompts.get(sample).ok_or(missing("the caption"))?)?.ok_or(missing("the caption"))?;
        Ok(Example { mean: mean.flatten_all()?.to_vec1()?, logvar: logvar.flatten_all()?.to_vec1()?, shape: [c, h, w], embeds, pooled })
    }

    /// The embedding of a prompt that the run needs besides the dataset's: `[S, J]` and `[P]`.
    ///
    /// # Errors
    /// If the cache has lost or damaged it.
    pub fn prompt(&self, prompt: &str) -> Result<(Tensor, Tensor), PreparedError> {
        self.prompt_of(&self.keys.prompt(prompt))?.ok_or(PreparedError::Malformed { what: "a validation prompt" })
    }

    fn prompt_of(&self, key: &Sha256Digest) -> Result<Option<(Tensor, Tensor)>, PreparedError> {
        Ok(read(&self.cache, key, "embeds")?.zip(read(&self.cache, key, "pooled")?))
    }
}

/// The normalisation that an earlier run has found in the VAE's configuration.
pub(super) fn read_scaling(cache: &TensorCache, keys: &Keys) -> Result<Option<LatentScaling>, PreparedError> {
    let Some(tensor) = read(cache, &keys.scaling(), "scaling")? else { return Ok(None) };
    match tensor.to_vec1::<f32>()?[..] {
        [scale, shift] => Ok(Some(LatentScaling { scale, shift })),
        _ => Err(PreparedError::Malformed { what: "the latents' scaling" }),
    }
}

/// A tensor of an entry, on the host.
fn read(cache: &TensorCache, key: &Sha256Digest, name: &str) -> Result<Option<Tensor>, PreparedError> {
    Ok(cache.get(key, name)?.map(|view| view.to_tensor(&Device::Cpu)).transpose()?)
}
