//! The order of training: a seeded permutation per epoch, batches, accumulation windows.
//!
//! Each of the `samples * repeats` copies appears once per epoch; copies of a sample are neighbours before the permutation
//! (a, a, b, b). The last batch of an epoch may be smaller. Gradients are applied after every `accumulation` batches and
//! after the last batch of an epoch, where the count begins anew.
//!
//! With class pictures (prior preservation) every item brings one along, and an epoch is as long as the larger of the two
//! sets: place i of the order before the permutation has copy i and class picture i, both modulo their numbers.
//!
//! The order is a function of `(seed, epoch)` alone, so any position can be resumed without replaying what came before.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use finetune_common::digest::Sha256Digest;
use finetune_common::rng::{Purpose, Stream};

/// What the order depends on.
#[derive(Debug, Clone)]
pub struct SamplerConfig {
    /// The content key of each sample, in the dataset's order.
    pub samples: Arc<[Sha256Digest]>,
    /// Copies of each sample per epoch.
    pub repeats: u32,
    /// Class pictures of prior preservation; 0: none.
    pub class_pictures: u32,
    /// Items of a full batch.
    pub batch_size: u32,
    /// Batches per update.
    pub accumulation: u32,
    /// Seed of the permutations.
    pub seed: u64,
}

/// Why a sampler could not be made or moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SamplerError {
    /// No sample, or a count of zero.
    #[error("the sampler needs at least one sample, repeat, batch item and accumulated batch")]
    Empty,
    /// An epoch is too long.
    #[error("an epoch has {items} items, at most {MAX_ITEMS} are possible: lower dataset.repeats")]
    TooMany {
        /// Items of an epoch.
        items: u64,
    },
    /// The position does not exist.
    #[error("batch {batch} is beyond the {batches} batches of an epoch")]
    Position {
        /// The wanted batch.
        batch: u64,
        /// Batches per epoch.
        batches: u64,
    },
}

/// Items of an epoch at most: ordinals of class pictures lie above those of the items.
const MAX_ITEMS: u64 = 1 << 31;

/// The next batch: all that a checkpoint needs of the sampler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Batch within the epoch, from 0.
    pub batch: u64,
}

/// One copy of one sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// Index in the dataset.
    pub sample: usize,
    /// Content key of the sample. Image, caption, latents and embeddings are looked up by content, never by position.
    pub key: Sha256Digest,
    /// Which of the `repeats` copies, from 0.
    pub copy: u32,
    /// Place in the epoch's order, from 0: with the epoch it names the random numbers of this item.
    pub ordinal: u64,
    /// The class picture that is trained along.
    pub class: Option<ClassItem>,
}

impl Item {
    /// Which of a picture's captions it is trained with in this epoch, of as many as there are.
    pub fn caption(&self, seed: u64, epoch: u64, captions: usize) -> usize {
        if captions < 2 { 0 } else { Stream::new(seed, Purpose::Caption, epoch, self.ordinal).below(captions as u64) as usize }
    }

    /// Whether it is trained with the empty caption in this epoch, as this share of all is.
    pub fn drops_caption(&self, seed: u64, epoch: u64, share: f64) -> bool {
        share > 0.0 && Stream::new(seed, Purpose::CaptionDropout, epoch, self.ordinal).uniform_f64() < share
    }
}

/// A class picture of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassItem {
    /// Which picture, from 0.
    pub index: u32,
    /// Names its random numbers, as [`Item::ordinal`]; no item has it.
    pub ordinal: u64,
}

/// Items that go through the model together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Batch within the epoch, from 0.
    pub index_in_epoch: u64,
    /// Whether this is the epoch's last batch.
    pub last_of_epoch: bool,
    /// Batch within the accumulation window, from 0.
    pub index_in_window: u32,
    /// Whether the gradients are applied after this batch.
    pub sync: bool,
    /// The items; fewer than the batch size only in the epoch's last batch.
    pub items: Vec<Item>,
}

/// An endless sequence of batches.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    position: Position,
    /// The permutation of one epoch, made when first needed.
    order: Option<(u64, Vec<u32>)>,
}

impl Sampler {
    /// A sampler at the first batch of the first epoch.
    ///
    /// # Errors
    /// If there is nothing to sample or a count is zero.
    pub fn new(config: SamplerConfig) -> Result<Self, SamplerError> {
        let counts = [config.repeats, config.batch_size, config.accumulation];
        if counts.contains(&0) || config.samples.is_empty() {
            return Err(SamplerError::Empty);
        }
        let sampler = Self { config, position: Position::default(), order: None };
        match sampler.items_per_epoch() {
            items if items > MAX_ITEMS => Err(SamplerError::TooMany { items }),
            _ => Ok(sampler),
        }
    }

    /// Copies of all samples.
    fn copies(&self) -> u64 {
        (self.config.samples.len() as u64).saturating_mul(u64::from(self.config.repeats))
    }

    /// Items per epoch.
    pub fn items_per_epoch(&self) -> u64 {
        self.copies().max(u64::from(self.config.class_pictures))
    }

    /// Batches per epoch; the last one may be partial.
    pub fn batches_per_epoch(&self) -> u64 {
        self.items_per_epoch().div_ceil(u64::from(self.config.batch_size))
    }

    /// Updates per epoch; the last accumulation window may be short.
    pub fn updates_per_epoch(&self) -> u64 {
        self.batches_per_epoch().div_ceil(u64::from(self.config.accumulation))
    }

    /// The next batch's place.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes to a place without replaying.
    ///
    /// # Errors
    /// If an epoch has no such batch.
    pub fn seek(&mut self, position: Position) -> Result<(), SamplerError> {
        if position.batch >= self.batches_per_epoch() {
            return Err(SamplerError::Position { batch: position.batch, batches: self.batches_per_epoch() });
        }
        self.position = position;
        Ok(())
    }

    /// The next batch.
    pub fn next_batch(&mut self) -> Batch {
        let batch = self.batch_at(self.position);
        self.position = if batch.last_of_epoch {
            Position { epoch: self.position.epoch + 1, batch: 0 }
        } else {
            Position { batch: self.position.batch + 1, ..self.position }
        };
        batch
    }

    /// The next batch, without moving: to read ahead.
    pub fn peek(&mut self) -> Batch {
        self.batch_at(self.position)
    }

    fn batch_at(&mut self, Position { epoch, batch }: Position) -> Batch {
        let (items, size) = (self.items_per_epoch(), u64::from(self.config.batch_size));
        let last_of_epoch = batch + 1 == self.batches_per_epoch();
        let accumulation = u64::from(self.config.accumulation);
        let (start, end) = (batch * size, ((batch + 1) * size).min(items));
        let (repeats, class_pictures, copies) = (self.config.repeats, self.config.class_pictures, self.copies() as u32);
        let samples = Arc::clone(&self.config.samples);
        let order = self.order(epoch);
        let items = (start..end)
            .map(|ordinal| {
                let place = order[ordinal as usize];
                let copy_index = place % copies;
                let sample = (copy_index / repeats) as usize;
                let class = (class_pictures > 0).then(|| ClassItem { index: place % class_pictures, ordinal: MAX_ITEMS + ordinal });
                Item { sample, key: samples[sample], copy: copy_index % repeats, ordinal, class }
            })
            .collect();
        Batch {
            epoch,
            index_in_epoch: batch,
            last_of_epoch,
            index_in_window: (batch % accumulation) as u32,
            sync: last_of_epoch || (batch + 1).is_multiple_of(accumulation),
            items,
        }
    }

    fn order(&mut self, epoch: u64) -> &[u32] {
        let (count, seed) = (self.items_per_epoch() as u32, self.config.seed);
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            self.order = None;
        }
        let (_, order) = self.order.get_or_insert_with(|| {
            let mut order: Vec<u32> = (0..count).collect();
            Stream::new(seed, Purpose::Shuffle, epoch, 0).shuffle(&mut order);
            (epoch, order)
        });
        order
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use finetune_common::digest::sha256;

    fn keys(n: usize) -> Arc<[Sha256Digest]> {
        (0..n).map(|i| sha256(format!("sample {i}").as_bytes())).collect()
    }

    fn sampler(samples: usize, repeats: u32, batch_size: u32, accumulation: u32, seed: u64) -> Sampler {
        Sampler::new(SamplerConfig { samples: keys(samples), repeats, class_pictures: 0, batch_size, accumulation, seed }).unwrap()
    }

    #[test]
    fn every_copy_appears_once_per_epoch_in_a_new_order() {
        for (samples, repeats, batch_size, accumulation) in [(1, 1, 4, 3), (5, 1, 2, 1), (7, 3, 4, 3), (8, 2, 4, 2), (38, 1, 4, 3)] {
            let mut sampler = sampler(samples, repeats, batch_size, accumulation, 42);
            let mut orders = Vec::new();
            for epoch in 0..4 {
                let mut seen = Vec::new();
                let mut updates = 0;
                for index in 0..sampler.batches_per_epoch() {
                    let batch = sampler.next_batch();
                    assert_eq!((batch.epoch, batch.index_in_epoch), (epoch, index));
                    assert_eq!(batch.last_of_epoch, index + 1 == sampler.batches_per_epoch());
                    assert_eq!(batch.sync, batch.last_of_epoch || batch.index_in_window + 1 == accumulation);
                    assert!(batch.last_of_epoch || batch.items.len() == batch_size as usize);
                    updates += u64::from(batch.sync);
                    seen.extend(batch.items);
                }
                assert_eq!(updates, sampler.updates_per_epoch());
                assert!(seen.iter().enumerate().all(|(i, item)| item.ordinal == i as u64));
                let copies: BTreeSet<(usize, u32)> = seen.iter().map(|i| (i.sample, i.copy)).collect();
                assert_eq!((copies.len(), seen.len()), (samples * repeats as usize, samples * repeats as usize));
                orders.push(seen.iter().map(|i| (i.sample, i.copy)).collect::<Vec<_>>());
            }
            if samples > 4 {
                assert!(orders.windows(2).all(|w| w[0] != w[1]), "each epoch has a permutation of its own");
            }
        }
    }

    #[test]
    fn seeds_change_the_order_and_nothing_else_does() {
        let first = |seed| sampler(20, 2, 8, 1, seed).next_batch();
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }

    #[test]
    fn a_position_resumes_exactly_wherever_it_was_taken() {
        let mut whole = sampler(11, 3, 4, 2, 7);
        let batches: Vec<Batch> = (0..40).map(|_| whole.next_batch()).collect();
        for stop in 0..40 {
            let mut before = sampler(11, 3, 4, 2, 7);
            (0..stop).for_each(|_| drop(before.next_batch()));
            let saved = serde_json::to_string(&before.position()).unwrap();
            let mut after = sampler(11, 3, 4, 2, 7);
            after.seek(serde_json::from_str(&saved).unwrap()).unwrap();
            assert_eq!(after.peek(), batches[stop]);
            let rest: Vec<Batch> = (stop..40).map(|_| after.next_batch()).collect();
            assert_eq!(rest, batches[stop..]);
        }
        assert_eq!(whole.seek(Position { epoch: 0, batch: 9 }), Err(SamplerError::Position { batch: 9, batches: 9 }));
    }

    /// Caption i is trained with image i: both are found by content, whatever the order, copy, batch or resume.
    #[test]
    fn the_caption_always_goes_with_its_image() {
        for (samples, repeats, batch_size, seed) in [(38, 1, 4, 42), (13, 3, 5, 1), (6, 4, 7, 9)] {
            let all = keys(samples);
            let images: BTreeMap<Sha256Digest, String> = all.iter().enumerate().map(|(i, k)| (*k, format!("image {i}"))).collect();
            let captions: BTreeMap<Sha256Digest, String> = all.iter().enumerate().rev().map(|(i, k)| (*k, format!("caption {i}"))).collect();
            let mut sampler = sampler(samples, repeats, batch_size, 3, seed);
            let mut counts: BTreeMap<String, u32> = BTreeMap::new();
            let total = sampler.batches_per_epoch() * 5;
            for step in 0..total {
                if step % 7 == 3 {
                    let position = sampler.position();
                    sampler = self::sampler(samples, repeats, batch_size, 3, seed);
                    sampler.seek(position).unwrap();
                }
                for item in sampler.next_batch().items {
                    let (image, caption) = (&images[&item.key], &captions[&item.key]);
                    assert_eq!(image.strip_prefix("image "), caption.strip_prefix("caption "));
                    assert_eq!(*image, format!("image {}", item.sample));
                    *counts.entry(image.clone()).or_default() += 1;
                }
            }
            assert_eq!(counts.len(), samples);
            assert!(counts.values().all(|n| *n == repeats * 5), "{counts:?}");
        }
    }

    /// As `DreamBoothDataset` of the reference: `len = max(instances, class pictures)`, both indexed modulo.
    #[test]
    fn class_pictures_come_along_and_the_larger_set_decides_the_epoch() {
        for (samples, repeats, class_pictures, items) in [(3, 2, 4, 6), (3, 2, 10, 10), (5, 1, 5, 5), (1, 1, 7, 7)] {
            let config = SamplerConfig { samples: keys(samples), repeats, class_pictures, batch_size: 4, accumulation: 1, seed: 3 };
            let mut sampler = Sampler::new(config).unwrap();
            assert_eq!(sampler.items_per_epoch(), items);
            let copies = samples as u64 * u64::from(repeats);
            let (mut own, mut class) = (BTreeMap::<(usize, u32), u64>::new(), BTreeMap::<u32, u64>::new());
            let mut ordinals = BTreeSet::new();
            for _ in 0..sampler.batches_per_epoch() {
                for item in sampler.next_batch().items {
                    let picture = item.class.unwrap();
                    *own.entry((item.sample, item.copy)).or_default() += 1;
                    *class.entry(picture.index).or_default() += 1;
                    assert!(ordinals.insert(item.ordinal) && ordinals.insert(picture.ordinal), "each names random numbers of its own");
                    // The kernels name dropout masks by 32 bits.
                    assert!(picture.ordinal < 1 << 32);
                    let same_place = |i: u64| i % copies == item.sample as u64 * u64::from(repeats) + u64::from(item.copy);
                    assert!((0..items).any(|i| same_place(i) && i % u64::from(class_pictures) == u64::from(picture.index)));
                }
            }
            assert!(own.len() as u64 == copies && own.values().all(|n| (items / copies..=items.div_ceil(copies)).contains(n)), "{own:?}");
            let number = u64::from(class_pictures);
            assert!(class.len() as u64 == number && class.values().all(|n| (items / number..=items.div_ceil(number)).contains(n)), "{class:?}");
        }
        // Without class pictures the order is the same.
        let of = |class_pictures| {
            let config = SamplerConfig { samples: keys(9), repeats: 1, class_pictures, batch_size: 9, accumulation: 1, seed: 3 };
            Sampler::new(config).unwrap().next_batch().items.iter().map(|i| (i.sample, i.ordinal)).collect::<Vec<_>>()
        };
        assert_eq!(of(0), of(4));
    }

    /// Whether a caption is dropped follows from seed, epoch and ordinal alone: as often as asked for, whatever was drawn before.
    #[test]
    fn captions_are_dropped_as_often_as_asked_for_and_always_the_same_ones() {
        let items: Vec<Item> = sampler(1000, 1, 1000, 1, 42).next_batch().items;
        let dropped = |seed, epoch, share| items.iter().filter(|item| item.drops_caption(seed, epoch, share)).map(|item| item.ordinal).collect::<Vec<_>>();
        assert_eq!((dropped(42, 0, 0.0).len(), dropped(42, 0, 1.0).len()), (0, 1000));
        let tenth = dropped(42, 0, 0.1);
        // Known answers: a resumed run, and one of another version, drop the same.
        assert_eq!((tenth.len(), &tenth[..4]), (97, &[4, 30, 31, 44][..]));
        let backwards: BTreeSet<u64> = items.iter().rev().filter(|item| item.drops_caption(42, 0, 0.1)).map(|item| item.ordinal).collect();
        assert_eq!(backwards.into_iter().collect::<Vec<_>>(), tenth);
        assert!(dropped(42, 1, 0.1) != tenth && dropped(43, 0, 0.1) != tenth, "each epoch and each seed drops others");
        let kept: BTreeSet<u64> = dropped(42, 0, 0.2).into_iter().collect();
        assert!(tenth.iter().all(|ordinal| kept.contains(ordinal)), "a larger share drops more, and those as well");
        let all: usize = (0..100).map(|epoch| dropped(42, epoch, 0.1).len()).sum();
        // Of 100,000 draws: 10,000, with a standard deviation of 95.
        assert!(all.abs_diff(10_000) < 380, "{all}");
        // The choice of a caption is independent of it.
        let first = items.iter().filter(|item| item.drops_caption(42, 0, 0.5) && item.caption(42, 0, 2) == 0).count();
        assert!(first.abs_diff(250) < 60, "{first}");
    }

    #[test]
    fn nothing_to_sample_is_an_error() {
        for (samples, repeats, batch_size, accumulation) in [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)] {
            let config = SamplerConfig { samples: keys(samples), repeats, class_pictures: 0, batch_size, accumulation, seed: 0 };
            assert_eq!(Sampler::new(config).err(), Some(SamplerError::Empty));
        }
        let config = SamplerConfig { samples: keys(2), repeats: u32::MAX, class_pictures: 0, batch_size: 1, accumulation: 1, seed: 0 };
        assert_eq!(Sampler::new(config).err(), Some(SamplerError::TooMany { items: 2 * u64::from(u32::MAX) }));
    }
}
