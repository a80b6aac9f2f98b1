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
        let Batch { epoch, items, sync, .. } = batch;
        let (first, end) = (place * self.micro_batch, ((place + 1) * self.micro_batch).min(items.len()));
        let own = &items[first..end];
        let (examples, ordinals) = self.examples(*epoch, own)?;
        let weight = 1.0 / items.len() as f64 / f64::from(self.accumulation);
        let coefficients = step::coefficients(own.len(), weight, self.prior_weight);
        Ok(Fed {
            micro_batch: MicroBatch::draw(&self.objective, &examples, &ordinals, *epoch, coefficients)?,
            samples: own.len(),
            batch: (end == items.len()).then_some(FedBatch { items: items.len(), sync: *sync, next }),
        })
    }

    /// The data of items, after them that of their class pictures, and the names of their random numbers.
    fn examples(&self, epoch: u64, items: &[Item]) -> Result<(Vec<Example>, Vec<u64>), PreparedError> {
        let caption = |item: &Item| item.caption(self.objective.seed, epoch, self.prepared.captions(item.sample));
        let own = items.iter().map(|item| Ok((self.prepared.example(item.sample, item.copy, caption(item))?, item.ordinal)));
        let class = items.iter().filter_map(|item| item.class).map(|class| Ok((self.prepared.class_example(class.index)?, class.ordinal)));
        own.chain(class).collect()
    }
}
