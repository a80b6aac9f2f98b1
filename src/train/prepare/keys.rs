//! Cache keys: what prepared data depends on, and nothing else.

use crate::data::cache;
use crate::data::dataset::Dataset;
use crate::data::transform::{Augmentation, Transform};
use crate::digest::{Sha256Digest, sha256_parts};
use crate::plan::TrainConfig;

/// The keys of everything that a run needs prepared.
#[derive(Debug, Clone)]
pub struct Keys {
    encoders: Sha256Digest,
    vae: Sha256Digest,
    tokens: u32,
    augmentation: Augmentation,
}

impl Keys {
    /// Keys for a run. `encoders` and `vae` are the fingerprints of the model's parts.
    pub fn new(config: &TrainConfig, encoders: Sha256Digest, vae: Sha256Digest) -> Self {
        let training = &config.training;
        let augmentation =
            Augmentation { resolution: training.resolution, center_crop: training.center_crop, random_flip: training.random_flip, seed: training.seed };
        Self { encoders, vae, tokens: training.max_sequence_length, augmentation }
    }

    /// Of the embedding of a caption.
    pub fn prompt(&self, caption: &str) -> Sha256Digest {
        cache::prompt_key(caption, &self.encoders, self.tokens)
    }

    /// What is done to a copy of a sample's picture.
    pub fn transform(&self, dataset: &Dataset, sample: usize, copy: u32) -> Transform {
        let sample = &dataset.samples[sample];
        self.augmentation.transform(&sample.image_digest, sample.size, copy)
    }

    /// Of the latents of a copy of a sample's picture.
    pub fn latents(&self, dataset: &Dataset, sample: usize, copy: u32) -> Sha256Digest {
        cache::latents_key(&dataset.samples[sample].image_digest, &self.transform(dataset, sample, copy), &self.vae)
    }

    /// Of the normalisation that the VAE's configuration gives.
    pub fn scaling(&self) -> Sha256Digest {
        sha256_parts([&b"latent scaling 1"[..], &self.vae])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_prompts_key_counts() {
        let augmentation = Augmentation { resolution: 64, center_crop: true, random_flip: false, seed: 1 };
        let keys = Keys { encoders: [1; 32], vae: [2; 32], tokens: 77, augmentation };
        let key = keys.prompt("a");
        assert_eq!(key, keys.clone().prompt("a"));
        assert_ne!(key, keys.prompt("b"));
        assert_ne!(key, Keys { encoders: [3; 32], ..keys.clone() }.prompt("a"));
        assert_ne!(key, Keys { tokens: 76, ..keys.clone() }.prompt("a"));
        // The VAE has no part in captions.
        assert_eq!(key, Keys { vae: [9; 32], ..keys }.prompt("a"));
    }
}
