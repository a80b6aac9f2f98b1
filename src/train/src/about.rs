//! What a run's files say of it to people and to other programs: names, numbers, and the phrase that calls what was learned.

use finetune_api::OutputDtype;
use finetune_api::plan::{FrozenWeights, ModelSource, TrainConfig};
use finetune_compute::kernels::Precision;
use finetune_data::buckets::{Bucket, Shapes};
use finetune_data::dataset::Sample;
use finetune_model::survey::Published;

/// A finished run, as its files describe it. Nothing of it depends on the clock or the machine: equal runs write equal files.
#[derive(Debug, Clone)]
pub struct About<'a> {
    /// The job as it was resolved.
    pub config: &'a TrainConfig,
    /// The published model that has the base model's shape.
    pub published: Option<&'static Published>,
    /// `sha256:<hex>` of the base model's files.
    pub base_digest: &'a str,
    /// The one caption that every picture has, if they share one.
    pub common_caption: Option<&'a str>,
    /// Pictures in the dataset.
    pub pictures: usize,
    /// The shapes in which they were trained, where they are known.
    pub shapes: Option<&'a Shapes>,
    /// Optimizer updates.
    pub steps: u64,
    /// Passes over the dataset.
    pub epochs: f64,
    /// Number format of activations, and of frozen weights that are not in 8 bits.
    pub precision: Precision,
    /// How the blocks' frozen weights were kept.
    pub weights: FrozenWeights,
}

impl About<'_> {
    /// `name` of the job `namespace/name`.
    pub fn title(&self) -> &str {
        job_name(&self.config.job)
    }

    /// The word that every caption got.
    pub fn trigger_word(&self) -> Option<&str> {
        self.config.dataset.captions.as_ref()?.trigger_word.as_deref()
    }

    /// What calls what was learned: the trigger word, else the caption of all pictures.
    pub fn trigger_phrase(&self) -> Option<&str> {
        self.trigger_word().or(self.common_caption)
    }

    /// The buckets with pictures; none where all were squares.
    pub fn buckets(&self) -> &[Bucket] {
        self.shapes.map_or(&[], Shapes::buckets)
    }

    /// The base model's name in prose: its repository, or its shape's name.
    pub fn base_name(&self) -> &str {
        self.repository().unwrap_or_else(|| self.published.map_or("a Stable Diffusion 3 model of its own size", |published| published.name))
    }

    /// The base model's repository on the hub, where the job names one.
    pub fn repository(&self) -> Option<&str> {
        match &self.config.model.source {
            ModelSource::HuggingFace { repo, .. } => Some(repo),
            _ => None,
        }
    }

    /// The repository, or the last part of the model's place: buckets and volumes are nobody else's business.
    pub fn base_label(&self) -> String {
        let path = match &self.config.model.source {
            ModelSource::HuggingFace { repo, .. } => return repo.clone(),
            ModelSource::ObjectStore { uri, .. } => uri.clone(),
            ModelSource::Directory { path } => path.display().to_string(),
        };
        path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned()
    }

    /// The files' number format: as the job says, else F16 after training in half precision.
    pub fn dtype(&self) -> OutputDtype {
        self.config.output.dtype.unwrap_or(match self.precision {
            Precision::F32 => OutputDtype::F32,
            Precision::F16 | Precision::Bf16 => OutputDtype::F16,
        })
    }
}

/// `name` of `namespace/name`.
pub fn job_name(job: &str) -> &str {
    job.rsplit('/').next().unwrap_or(job)
}

/// The caption that all pictures have, each that one alone: what DreamBooth calls the instance prompt.
pub fn common_caption(samples: &[Sample]) -> Option<&str> {
    let [first, ..] = samples else { return None };
    let [caption] = first.captions.as_slice() else { return None };
    samples.iter().all(|sample| sample.captions == first.captions).then_some(caption)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A resolved job, changed by `change`.
    pub(crate) fn config(change: impl FnOnce(&mut TrainConfig)) -> TrainConfig {
        let stored = serde_json::from_str(include_str!("../../api/src/plan/samples/config-1.json")).unwrap();
        let mut config = TrainConfig::read(&stored).unwrap().0;
        change(&mut config);
        config
    }

    /// A run of `config`.
    pub(crate) fn about(config: &TrainConfig) -> About<'_> {
        About {
            config,
            published: None,
            base_digest: "sha256:00",
            common_caption: None,
            pictures: 12,
            shapes: None,
            steps: 500,
            epochs: 41.5,
            precision: Precision::Bf16,
            weights: FrozenWeights::Float,
        }
    }

    #[test]
    fn half_precision_is_written_as_f16_unless_the_job_says_otherwise() {
        let config = config(|_| {});
        for (precision, dtype) in [(Precision::F32, OutputDtype::F32), (Precision::F16, OutputDtype::F16), (Precision::Bf16, OutputDtype::F16)] {
            assert_eq!(About { precision, ..about(&config) }.dtype(), dtype);
        }
        let chosen = super::tests::config(|config| config.output.dtype = Some(OutputDtype::BF16));
        assert_eq!(About { precision: Precision::F32, ..about(&chosen) }.dtype(), OutputDtype::BF16);
    }

    #[test]
    fn buckets_are_not_named() {
        let config =
            config(|config| config.model.source = ModelSource::ObjectStore { uri: "s3://secret/models/sd35/".into(), sha256_manifest: None, storage: None });
        assert_eq!((about(&config).base_label().as_str(), about(&config).repository()), ("sd35", None));
        let config = super::tests::config(|config| config.model.source = ModelSource::HuggingFace { repo: "a/b".into(), revision: "0".repeat(40) });
        assert_eq!((about(&config).base_label().as_str(), about(&config).base_name()), ("a/b", "a/b"));
    }

    #[test]
    fn a_trigger_is_the_caption_of_every_picture() {
        let sample = |captions: &[&str]| Sample {
            file_name: String::new(),
            captions: captions.iter().map(|&caption| caption.to_owned()).collect(),
            image_digest: [0; 32],
            size: (1, 1),
        };
        assert_eq!(common_caption(&[sample(&["a sks dog"]), sample(&["a sks dog"])]), Some("a sks dog"));
        assert_eq!(common_caption(&[sample(&["a sks dog"]), sample(&["a dog"])]), None);
        assert_eq!(common_caption(&[sample(&["a", "b"])]), None);
        assert_eq!(common_caption(&[]), None);
    }

    #[test]
    fn the_trigger_word_calls_what_was_learned_even_where_all_captions_are_the_same() {
        let config = config(|config| {
            config.dataset.captions = Some(
                serde_json::from_value(serde_json::json!({
                    "triggerWord": "ohwx corgi", "triggerPosition": "Front", "tagOrders": 1, "keepTags": 0, "dropout": 0.0,
                }))
                .unwrap(),
            );
        });
        let about = About { common_caption: Some("ohwx corgi, a dog"), ..about(&config) };
        assert_eq!(about.trigger_phrase(), Some("ohwx corgi"));
        let config = super::tests::config(|_| {});
        assert_eq!(About { common_caption: Some("a dog"), ..super::tests::about(&config) }.trigger_phrase(), Some("a dog"));
        assert_eq!(super::tests::about(&config).trigger_phrase(), None);
    }
}
