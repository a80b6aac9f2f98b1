//! Micro-batches in the order of training, read and drawn by a thread while the device computes.
//!
//! All random numbers are named by epoch and ordinal, so nothing depends on how far ahead the thread is. It draws alone: the threads of rayon belong to
//! whoever computes or copies to the device, and on two processors those would wait for draws.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use super::prepare::{Prepared, PreparedError};
use super::step::{self, Example, MicroBatch, Objective};
use finetune_common::tensor::ShapeError;
use finetune_data::sampler::{Batch, Item, Position, Sampler};

/// Micro-batches that wait for the device, besides the one being drawn. Each holds its prompt embeddings: 20 MB for four captions of 333 tokens.
const AHEAD: usize = 2;

/// Why there is no next micro-batch.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// Prepared data is gone or damaged.
    #[error(transparent)]
    Prepared(#[from] PreparedError),
    /// The examples of a micro-batch have different shapes.
    #[error("failed to stack the examples of a micro-batch")]
    Shape(#[from] ShapeError),
    /// The thread could not be started.
    #[error("failed to start the thread that draws micro-batches")]
    Thread(#[source] std::io::Error),
    /// The thread ended without an error, which only its panic explains; that is on stderr.
    #[error("the thread that draws micro-batches has ended")]
    Ended,
}

/// What micro-batches are made of.
pub(super) struct Source {
    /// Latents and embeddings.
    pub(super) prepared: Arc<Prepared>,
    /// What is drawn.
    pub(super) objective: Objective,
    /// Batches per update.
    pub(super) accumulation: u32,
    /// What the mean loss of the class pictures counts.
    pub(super) prior_weight: Option<f64>,
    /// Share of the draws that are trained with the empty caption.
    pub(super) caption_dropout: f64,
    /// Samples of a micro-batch at most, at least 1.
    pub(super) micro_batch: usize,
}

/// A micro-batch and its place in training.
#[derive(Debug)]
pub(super) struct Fed {
    /// What the model takes.
    pub(super) micro_batch: MicroBatch,
    /// Its samples; class pictures are after them.
    pub(super) samples: usize,
    /// The batch, if it is complete with this one.
    pub(super) batch: Option<FedBatch>,
}

/// A batch whose micro-batches have all been handed out.
#[derive(Debug, Clone, Copy)]
pub(super) struct FedBatch {
    /// Its samples.
    pub(super) items: usize,
    /// As [`Batch::share`].
    pub(super) share: f64,
    /// Whether the gradients are applied after it.
    pub(super) sync: bool,
    /// The place of the batch after it.
    pub(super) next: Position,
}

/// The running thread. It ends when this is dropped.
pub(super) struct Feed {
    micro_batches: Option<Receiver<Result<Fed, FeedError>>>,
    thread: Option<JoinHandle<()>>,
}

impl Feed {
    /// Starts at the sampler's place.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub(super) fn start(source: Source, mut sampler: Sampler) -> Result<Self, FeedError> {
        let (sender, micro_batches) = sync_channel(AHEAD);
        let work = move || {
            loop {
                let batch = sampler.next_batch();
                for place in 0..batch.items.len().div_ceil(source.micro_batch) {
                    let fed = source.micro_batch(&batch, place, sampler.position());
                    let failed = fed.is_err();
                    // Nobody receives any more: the run has ended, or goes on elsewhere.
                    if sender.send(fed).is_err() || failed {
                        return;
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("feed".to_owned()).spawn(work).map_err(FeedError::Thread)?;
        Ok(Self { micro_batches: Some(micro_batches), thread: Some(thread) })
    }

    /// The next micro-batch, as soon as it is drawn.
    ///
    /// # Errors
    /// If it could not be made. There is no next one then.
    pub(super) fn next(&mut self) -> Result<Fed, FeedError> {
        self.micro_batches.as_ref().and_then(|micro_batches| micro_batches.recv().ok()).unwrap_or(Err(FeedError::Ended))
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        drop(self.micro_batches.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _: std::thread::Result<()> = thread.join();
        }
    }
}

impl Source {
    /// The micro-batch `place` of the batch, after which the sampler is at `next`.
    fn micro_batch(&self, batch: &Batch, place: usize, next: Position) -> Result<Fed, FeedError> {
        let Batch { epoch, items, sync, share, .. } = batch;
        let (first, end) = (place * self.micro_batch, ((place + 1) * self.micro_batch).min(items.len()));
        let own = &items[first..end];
        let (examples, ordinals) = self.examples(*epoch, own)?;
        let weight = share / items.len() as f64 / f64::from(self.accumulation);
        let coefficients = step::coefficients(own.len(), weight, self.prior_weight);
        Ok(Fed {
            micro_batch: MicroBatch::draw(&self.objective, &examples, &ordinals, *epoch, coefficients)?,
            samples: own.len(),
            batch: (end == items.len()).then_some(FedBatch { items: items.len(), share: *share, sync: *sync, next }),
        })
    }

    /// The data of items, after them that of their class pictures, and the names of their random numbers.
    fn examples(&self, epoch: u64, items: &[Item]) -> Result<(Vec<Example>, Vec<u64>), PreparedError> {
        let seed = self.objective.seed;
        let example = |item: &Item| {
            if item.drops_caption(seed, epoch, self.caption_dropout) {
                self.prepared.example_without_caption(item.sample, item.copy)
            } else {
                self.prepared.example(item.sample, item.copy, item.caption(seed, epoch, self.prepared.captions(item.sample)))
            }
        };
        let own = items.iter().map(|item| Ok((example(item)?, item.ordinal)));
        let class = items.iter().filter_map(|item| item.class).map(|class| Ok((self.prepared.class_example(class.index)?, class.ordinal)));
        own.chain(class).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::captions::tests::dataset_of;
    use crate::prepare::{Fingerprints, Keys};
    use crate::step::LatentScaling;
    use finetune_api::plan::{Facts, FrozenWeights, TrainConfig, resolve};
    use finetune_common::digest::sha256;
    use finetune_common::rng::{Purpose, Stream};
    use finetune_common::tensor::HostTensor;
    use finetune_compute::kernels::Precision;
    use finetune_compute::nn::flow_matching::{LossKind, SigmaTable, TimestepDensity, Weighting};
    use finetune_data::buckets::Shapes;
    use finetune_data::cache::{CachedTensor, TensorCache};
    use finetune_data::dataset::{Dataset, Sample};
    use finetune_data::sampler::SamplerConfig;

    const SEED: u64 = 42;

    fn config() -> TrainConfig {
        let spec = serde_json::json!({
            "model": {"source": {"objectStore": {"uri": "s3://m/"}}}, "dataset": {"uri": "s3://d/"}, "output": {"uri": "s3://o/"},
        });
        resolve(&serde_json::from_value(spec).unwrap(), "n", "j", &Facts::default()).unwrap().config
    }

    /// Three pictures with these captions each. A folder cannot have empty captions, a dataset can.
    fn dataset(captions: &[&str]) -> Dataset {
        let sample = |i: u8| Sample {
            file_name: format!("{i}.png"),
            captions: captions.iter().map(|caption| if caption.is_empty() { String::new() } else { format!("{caption} {i}") }).collect(),
            image_digest: [i; 32],
            size: (32, 32),
        };
        dataset_of((0..3).map(sample).collect())
    }

    /// A feed of numbers that depend on picture or caption alone.
    async fn source(folder: &Path, dataset: &Dataset, dropout: f64) -> Source {
        let shapes = Shapes::new(&config().training, &dataset.samples).unwrap();
        let keys = Keys::new(
            &config(),
            shapes,
            &Fingerprints { encoders: [1; 32], vae: [2; 32], transformer: [3; 32], drawn_in: Precision::F32, weights: FrozenWeights::Float },
        );
        let mut cache = TensorCache::open(folder, None).await.unwrap();
        let values = |name: &[u8], shape: &[usize]| {
            let mut stream = Stream::new(u64::from(sha256(name)[0]), Purpose::Noise, u64::from(sha256(name)[1]), 0);
            let values = (0..shape.iter().product()).map(|_| stream.normal_f64() as f32).collect();
            CachedTensor::f32(&HostTensor::new(values, shape.to_vec()).unwrap())
        };
        for caption in dataset.captions().map(|(_, caption)| caption).chain([""]) {
            let name = caption.as_bytes();
            cache.put(keys.prompt(caption), &[("embeds", values(name, &[5, 4])), ("pooled", values(name, &[3]))]).unwrap();
        }
        for sample in 0..dataset.samples.len() {
            let name = [sample as u8];
            cache.put(keys.latents(dataset, sample, 0), &[("mean", values(&name, &[2, 4, 4])), ("logvar", values(&name, &[2, 4, 4]))]).unwrap();
        }
        let scaling = LatentScaling { scale: 1.5, shift: 0.1 };
        let objective = Objective {
            table: SigmaTable::default(),
            table_of: BTreeMap::new(),
            density: TimestepDensity::default(),
            kind: LossKind { weighting: Weighting::LogitNormal, precondition_outputs: true },
            latents: scaling,
            seed: SEED,
            dropout: false,
        };
        let prepared = Arc::new(Prepared::new(cache, &keys, dataset, 1, None, scaling, None));
        Source { prepared, objective, accumulation: 1, prior_weight: None, caption_dropout: dropout, micro_batch: 2 }
    }

    /// What the first batches of a feed that starts at `position` are made of, in full.
    async fn fed(dataset: &Dataset, dropout: f64, position: Position, count: usize) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let samples = dataset.samples.iter().map(|sample| sample.image_digest).collect();
        let mut sampler =
            Sampler::new(SamplerConfig { samples, repeats: 1, buckets: None, class_pictures: 0, batch_size: 3, accumulation: 1, seed: SEED }).unwrap();
        sampler.seek(position).unwrap();
        let mut feed = Feed::start(source(folder.path(), dataset, dropout).await, sampler).unwrap();
        (0..count).map(|_| format!("{:?}", feed.next().unwrap())).collect()
    }

    #[tokio::test]
    async fn dropped_captions_are_the_empty_one_and_a_draw_does_not_depend_on_what_came_before() {
        let (captioned, empty) = (dataset(&["a dog", "a cat, red"]), dataset(&[""]));
        let start = Position::default();
        let all = fed(&captioned, 1.0, start, 12).await;
        assert_eq!(all, fed(&empty, 0.0, start, 12).await, "all dropped: as if no picture had a caption");
        let none = fed(&captioned, 0.0, start, 12).await;
        assert!(none.iter().zip(&all).all(|(kept, dropped)| kept != dropped));
        // Two micro-batches an epoch: of two pictures and of one.
        let some = fed(&captioned, 0.5, start, 12).await;
        assert!(some.iter().zip(&all).any(|(a, b)| a == b) && some.iter().zip(&none).any(|(a, b)| a == b), "some whole micro-batches of each kind");
        assert!(some != all && some != none);
        assert_eq!(fed(&captioned, 0.5, Position { epoch: 3, batch: 0 }, 6).await, some[6..], "a feed that starts later draws the same");
    }
}
