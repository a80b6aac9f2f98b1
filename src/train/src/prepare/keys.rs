//! Cache keys: what prepared data depends on, and nothing else.

use finetune_api::plan::{FrozenWeights, PriorPreservationConfig, TrainConfig, TrainingConfig};
use finetune_common::digest::{Sha256Digest, sha256_parts};
use finetune_compute::kernels::Precision;
use finetune_data::buckets::Shapes;
use finetune_data::cache;
use finetune_data::dataset::Dataset;
use finetune_data::transform::{Augmentation, Transform};
use finetune_model::sample::Denoise;

/// The keys of everything that a run needs prepared.
#[derive(Debug, Clone)]
pub struct Keys {
    encoders: Sha256Digest,
    vae: Sha256Digest,
    tokens: u32,
    augmentation: Augmentation,
    /// What each sample's picture is cropped to.
    shapes: Shapes,
    /// Side of class pictures.
    resolution: u32,
    /// Of all class pictures together.
    class: Option<Sha256Digest>,
}

/// Fingerprints of the model's parts, and what draws.
#[derive(Debug, Clone, Copy)]
pub struct Fingerprints {
    /// Tokenizers and text encoders.
    pub encoders: Sha256Digest,
    /// VAE.
    pub vae: Sha256Digest,
    /// Transformer and scheduler; read for class pictures only.
    pub transformer: Sha256Digest,
    /// What class pictures are drawn in.
    pub drawn_in: Precision,
    /// How the transformer's weights are kept meanwhile.
    pub weights: FrozenWeights,
}

impl Keys {
    /// Keys for a run with this model, whose pictures are trained in these shapes.
    pub fn new(config: &TrainConfig, shapes: Shapes, model: &Fingerprints) -> Self {
        let training = &config.training;
        let augmentation = Augmentation { center_crop: training.center_crop, random_flip: training.random_flip, seed: training.seed };
        let (tokens, resolution) = (training.max_sequence_length, training.resolution);
        let keys = Self { encoders: model.encoders, vae: model.vae, tokens, augmentation, shapes, resolution, class: None };
        let class = training.prior_preservation.as_ref().map(|prior| keys.class(training, prior, model, &super::class::settings()));
        Self { class, ..keys }
    }

    /// What decides the class pictures, besides their numbers. Neither how many there are nor how many are drawn at once does.
    fn class(&self, training: &TrainingConfig, prior: &PriorPreservationConfig, model: &Fingerprints, denoise: &Denoise) -> Sha256Digest {
        let drawn_in = format!("{}{}", model.drawn_in, if model.weights.is_float() { "" } else { " int8" });
        sha256_parts([
            &b"class pictures v1"[..],
            &self.prompt(&prior.class_prompt),
            &self.prompt(""),
            &model.transformer,
            &self.vae,
            &training.seed.to_le_bytes(),
            &(denoise.steps as u64).to_le_bytes(),
            &denoise.guidance_scale.to_le_bytes(),
            &training.resolution.to_le_bytes(),
            drawn_in.as_bytes(),
        ])
    }

    /// Of a class picture; none without prior preservation.
    pub fn class_picture(&self, index: u32) -> Option<Sha256Digest> {
        Some(sha256_parts([&b"class picture v1"[..], &self.class?, &index.to_le_bytes()]))
    }

    /// What is done to class pictures: they have the right size already.
    pub fn class_transform(&self) -> Transform {
        Transform { size: (self.resolution, self.resolution), flip: false, top: 0, left: 0 }
    }

    /// Of the latents of a class picture; none without prior preservation.
    pub fn class_latents(&self, index: u32) -> Option<Sha256Digest> {
        Some(cache::latents_key(&self.class_picture(index)?, &self.class_transform(), &self.vae))
    }

    /// Of the embedding of a caption.
    pub fn prompt(&self, caption: &str) -> Sha256Digest {
        cache::prompt_key(caption, &self.encoders, self.tokens)
    }

    /// Of the lengths of all captions of a dataset, in its order.
    pub fn caption_lengths(&self, dataset: &Dataset) -> Sha256Digest {
        let captions: Vec<Sha256Digest> = dataset.captions().map(|(_, caption)| sha256_parts([caption.as_bytes()])).collect();
        sha256_parts([&b"caption lengths v1"[..], &self.encoders, &captions.concat()])
    }

    /// What is done to a copy of a sample's picture.
    pub fn transform(&self, dataset: &Dataset, sample: usize, copy: u32) -> Transform {
        let target = self.shapes.of(sample);
        let sample = &dataset.samples[sample];
        self.augmentation.transform(&sample.image_digest, sample.size, target, copy)
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
    use crate::captions::tests::dataset_of;
    use finetune_data::dataset::Sample;

    fn config_with(training: &serde_json::Value) -> TrainConfig {
        let spec = serde_json::json!({
            "model": {"source": {"objectStore": {"uri": "s3://m/"}}}, "dataset": {"uri": "s3://d/"}, "output": {"uri": "s3://o/"}, "training": training,
        });
        finetune_api::plan::resolve(&serde_json::from_value(spec).unwrap(), "n", "j", &finetune_api::plan::Facts::default()).unwrap().config
    }

    fn no_shapes() -> Shapes {
        Shapes::new(&config_with(&serde_json::json!({})).training, &[]).unwrap()
    }

    /// Other buckets give other latents; a picture whose bucket is the square has those of a run without buckets.
    #[test]
    fn latents_are_keyed_by_the_shape_of_their_bucket() {
        let sample = |i: u8, size| Sample { file_name: format!("{i}.png"), captions: vec![String::new()], image_digest: [i; 32], size };
        let dataset = dataset_of(vec![sample(0, (900, 600)), sample(1, (512, 512))]);
        let model = Fingerprints { encoders: [1; 32], vae: [2; 32], transformer: [3; 32], drawn_in: Precision::F32, weights: FrozenWeights::Float };
        let keys = |training: serde_json::Value| {
            let config = config_with(&training);
            let keys = Keys::new(&config, Shapes::new(&config.training, &dataset.samples).unwrap(), &model);
            [0, 1].map(|i| (keys.transform(&dataset, i, 0).size, keys.latents(&dataset, i, 0)))
        };
        let square = keys(serde_json::json!({}));
        let buckets = keys(serde_json::json!({"buckets": {}}));
        let fine = keys(serde_json::json!({"buckets": {"step": 16}}));
        assert_eq!([square[0].0, buckets[0].0, fine[0].0], [(512, 512), (576, 384), (624, 416)]);
        assert!(square[0].1 != buckets[0].1 && buckets[0].1 != fine[0].1 && square[0].1 != fine[0].1);
        assert_eq!(square[1], buckets[1]);
    }

    #[test]
    fn every_part_of_a_prompts_key_counts() {
        let augmentation = Augmentation { center_crop: true, random_flip: false, seed: 1 };
        let keys = Keys { encoders: [1; 32], vae: [2; 32], tokens: 77, augmentation, shapes: no_shapes(), resolution: 64, class: None };
        let key = keys.prompt("a");
        assert_eq!(key, keys.clone().prompt("a"));
        assert_ne!(key, keys.prompt("b"));
        assert_ne!(key, Keys { encoders: [3; 32], ..keys.clone() }.prompt("a"));
        assert_ne!(key, Keys { tokens: 76, ..keys.clone() }.prompt("a"));
        // The VAE has no part in captions.
        assert_eq!(key, Keys { vae: [9; 32], ..keys }.prompt("a"));
    }

    #[test]
    fn a_class_pictures_key_has_all_that_decides_it_and_nothing_else() {
        let config = |change: serde_json::Value| {
            let mut spec = serde_json::json!({
                "model": {"source": {"objectStore": {"uri": "s3://m/"}}}, "dataset": {"uri": "s3://d/"}, "output": {"uri": "s3://o/"},
                "training": {"priorPreservation": {"classPrompt": "a dog"}},
            });
            for (key, value) in change.as_object().unwrap() {
                match value {
                    serde_json::Value::Object(inner) => inner.iter().for_each(|(k, v)| spec["training"][key][k] = v.clone()),
                    value => spec["training"][key] = value.clone(),
                }
            }
            finetune_api::plan::resolve(&serde_json::from_value(spec).unwrap(), "n", "j", &finetune_api::plan::Facts::default()).unwrap().config
        };
        let model = Fingerprints { encoders: [1; 32], vae: [2; 32], transformer: [3; 32], drawn_in: Precision::Bf16, weights: FrozenWeights::Float };
        let key = |change, model: &Fingerprints| Keys::new(&config(change), no_shapes(), model).class_picture(0).unwrap();
        let none = || serde_json::json!({});
        let base = key(none(), &model);
        for same in [
            serde_json::json!({"priorPreservation": {"images": 7, "weight": "0.5", "sampleBatchSize": 1}}),
            serde_json::json!({"maxSteps": 7, "batchSize": 1, "centerCrop": true, "randomFlip": true}),
        ] {
            assert_eq!(key(same.clone(), &model), base, "{same}");
        }
        let mut seen = std::collections::BTreeSet::from([base, Keys::new(&config(none()), no_shapes(), &model).class_picture(1).unwrap()]);
        for other in [
            serde_json::json!({"priorPreservation": {"classPrompt": "a cat"}}),
            serde_json::json!({"seed": 7}),
            serde_json::json!({"resolution": 256}),
            serde_json::json!({"maxSequenceLength": 99}),
        ] {
            assert!(seen.insert(key(other.clone(), &model)), "{other}");
        }
        for other in [
            Fingerprints { encoders: [9; 32], ..model },
            Fingerprints { vae: [9; 32], ..model },
            Fingerprints { transformer: [9; 32], ..model },
            Fingerprints { drawn_in: Precision::F32, ..model },
            Fingerprints { weights: FrozenWeights::Int8, ..model },
        ] {
            assert!(seen.insert(key(none(), &other)), "{other:?}");
        }
        // What was asked for has no part in it, what does the drawing has: the CPU draws in f32 whatever is asked.
        assert_eq!(key(none(), &model), key(serde_json::json!({"priorPreservation": {"precision": "FP16"}}), &model));
        let keys = Keys::new(&config(none()), no_shapes(), &model);
        assert_ne!(keys.class_latents(0), keys.class_latents(1));
        assert_ne!(keys.class_latents(0), keys.class_picture(0));
    }
}
