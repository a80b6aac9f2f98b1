//! What a run hands to its page. Whatever goes wrong here is logged and costs no step: the page is for people, and the run goes on without it.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use image::ImageFormat;
use tokio::time::Instant;

use super::Run;
use crate::comparison;
use crate::device;
use crate::history::Picture;
use crate::page::{self, COMPARISON, Embedded, Gallery, PageError, TRAINING, TRAINING_PICTURES, TrainingPicture};
use crate::prepare::sheet;
use crate::result::RunResult;
use crate::trainer::Trainer;
use crate::validation;

/// How long training pictures for the page may take.
const LIMIT: Duration = Duration::from_secs(30);

impl Run<'_> {
    /// What is known before the first step: the run itself, training pictures, and what earlier attempts have drawn.
    pub(super) async fn show_run(&self, trainer: &Trainer) {
        let reporter = &self.environment.reporter;
        let run = page::Run {
            config: self.config.clone(),
            dataset_digest: self.dataset.digest.clone(),
            model_digest: self.checkpoints.digests().model.clone(),
            samples: self.dataset.samples.len(),
            buckets: self.shapes.buckets().to_vec(),
            device: device::name(&self.engine).to_owned(),
            dtype: self.engine.precision().to_string(),
        };
        reporter.show(|page| page.run = Some(run));
        reporter.history(trainer.history());
        let training = self.training_pictures(trainer).await;
        reporter.show(|page| page.training = training);
        if trainer.step() > 0 {
            match validation::kept(&self.checkpoints, trainer).await {
                Ok(pictures) => self.show_pictures(&pictures),
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "the page lacks the validation pictures of earlier attempts"),
            }
        }
    }

    /// Pictures from all over the dataset, as they are trained.
    async fn training_pictures(&self, trainer: &Trainer) -> Vec<TrainingPicture> {
        let store = match self.environment.open(&self.config.dataset.uri, self.config) {
            Ok(store) => store,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the page shows no training pictures");
                return Vec::new();
            }
        };
        let samples = self.dataset.samples.len();
        let shown = samples.min(TRAINING_PICTURES);
        let chosen = (0..shown).map(|i| i * samples / shown);
        let mut pixels = std::pin::pin!(sheet(&self.dataset, &store, trainer.prepared(), chosen));
        let mut pictures = Vec::new();
        let deadline = Instant::now() + LIMIT;
        while pictures.len() < shown && !self.environment.interrupt.requested() {
            let Ok(Some((sample, loaded))) = tokio::time::timeout_at(deadline, pixels.next()).await else {
                tracing::warn!(shown = pictures.len(), of = shown, "the page shows fewer training pictures: they were not loaded in {} s", LIMIT.as_secs());
                break;
            };
            let embedded = loaded.map_err(|error| error.to_string()).and_then(|pixels| {
                tokio::task::block_in_place(|| Embedded::new(&comparison::to_picture(&pixels), TRAINING)).map_err(|error| error.to_string())
            });
            let bucket = self.config.training.buckets.is_some().then(|| page::shape(self.shapes.of(sample)));
            let sample = &self.dataset.samples[sample];
            let (picture, problem) = match embedded {
                Ok(picture) => (Some(picture), None),
                Err(problem) => (None, Some(problem)),
            };
            let captions = self.dataset.captions_of(sample).cloned().collect();
            pictures.push(TrainingPicture { file: sample.file_name.clone(), captions, bucket, picture, problem });
        }
        pictures
    }

    /// Validation pictures that have just been drawn.
    pub(super) fn show_pictures(&self, pictures: &[Picture]) {
        self.environment.reporter.show(|page| {
            if let Err(error) = page.gallery.add(pictures) {
                tracing::warn!(error = &error as &dyn std::error::Error, "the page lacks validation pictures");
            }
        });
    }

    /// The end: all pictures, the comparison, the result.
    pub(super) fn show_result(&self, pictures: &[Picture], result: &RunResult, comparison: Option<&Bytes>) {
        let mut gallery = Gallery::default();
        if let Err(error) = gallery.add(pictures) {
            tracing::warn!(error = &error as &dyn std::error::Error, "the page lacks validation pictures");
        }
        let embed = |png: &Bytes| Embedded::new(&image::load_from_memory_with_format(png, ImageFormat::Png)?.into_rgb8(), COMPARISON);
        let comparison = comparison.map(embed).transpose().unwrap_or_else(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "the page lacks the held-out pictures");
            None
        });
        self.environment.reporter.show(|page| {
            page.gallery = gallery;
            page.comparison = comparison;
            page.result = Some(result.clone());
        });
    }

    /// The page as of now; none, with a word in the log, where it cannot be made.
    pub(super) fn page(&self, trainer: &Trainer) -> Option<String> {
        let (reporter, warnings) = (&self.environment.reporter, self.warnings(trainer));
        reporter.history(trainer.history());
        reporter.show(|page| page.warnings = warnings);
        let made: Result<String, PageError> = tokio::task::block_in_place(|| reporter.page().html());
        made.inspect_err(|error| tracing::warn!(error = error as &dyn std::error::Error, "failed to make the page")).ok()
    }
}
