//! The order of training: a seeded permutation per epoch, batches, accumulation windows.
//!
//! Each of the `samples * repeats` copies appears once per epoch; copies of a sample are neighbours before the permutation
//! (a, a, b, b). The last batch of an epoch may be smaller. Gradients are applied after every `accumulation` batches and
//! after the last batch of an epoch, where the count begins anew.
//!
//! With class pictures (prior preservation) every item brings one along, and an epoch is as long as the larger of the two
//! sets: place i of the order before the permutation has copy i and class picture i, both modulo their numbers.
//!
//! With aspect-ratio buckets the copies of each bucket are permuted and cut into batches, whose last one may be smaller, and the batches of all buckets are
//! permuted: a batch has one shape, and an accumulation window goes on from one bucket to the next.
//!
//! The order is a function of `(seed, epoch)` alone, so any position can be resumed without replaying what came before.

use std::collections::BTreeMap;
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
    /// The bucket of each sample; none: all samples have one shape.
    pub buckets: Option<Arc<[u32]>>,
    /// Class pictures of prior preservation; 0: none. Not with buckets.
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
    /// Buckets that are not those of the samples, or class pictures beside them.
    #[error("the sampler needs a bucket for each sample, and no class pictures beside buckets")]
    Buckets,
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
#[derive(Debug, Clone, PartialEq)]
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
    /// What the batch's mean loss counts beside those of the others of its window: with buckets as much as it has items, so that every picture of an update
    /// counts the same (the mean over the window's batches is 1). Always 1 without buckets, as in the reference, where a smaller last batch counts as much.
    pub share: f64,
    /// The items; fewer than the batch size only in the epoch's last batch, and in the last batch of a bucket.
    pub items: Vec<Item>,
}

/// An endless sequence of batches.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    position: Position,
    /// The order of one epoch, made when first needed.
    order: Option<Order>,
    batches: u64,
}

/// The order of an epoch.
#[derive(Debug, Clone)]
struct Order {
    epoch: u64,
    /// Which of the copies is where.
    places: Vec<u32>,
    /// The first place of each batch and, at last, the end; none: all batches but the last are full.
    starts: Option<Vec<u32>>,
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
        if config.buckets.as_ref().is_some_and(|buckets| buckets.len() != config.samples.len() || config.class_pictures > 0) {
            return Err(SamplerError::Buckets);
        }
        let mut sampler = Self { config, position: Position::default(), order: None, batches: 0 };
        match sampler.items_per_epoch() {
            items if items > MAX_ITEMS => Err(SamplerError::TooMany { items }),
            _ => {
                sampler.batches = sampler.count_batches();
                Ok(sampler)
            }
        }
    }

    fn count_batches(&self) -> u64 {
        let size = u64::from(self.config.batch_size);
        let Some(buckets) = &self.config.buckets else { return self.items_per_epoch().div_ceil(size) };
        let mut samples: BTreeMap<u32, u64> = BTreeMap::new();
        buckets.iter().for_each(|bucket| *samples.entry(*bucket).or_default() += 1);
        samples.values().map(|samples| (samples * u64::from(self.config.repeats)).div_ceil(size)).sum()
    }

    /// Copies of all samples.
    fn copies(&self) -> u64 {
        (self.config.samples.len() as u64).saturating_mul(u64::from(self.config.repeats))
    }

    /// Items per epoch.
    pub fn items_per_epoch(&self) -> u64 {
        self.copies().max(u64::from(self.config.class_pictures))
    }

    /// Batches per epoch; the last one may be partial, and with buckets the last one of each bucket.
    pub fn batches_per_epoch(&self) -> u64 {
        self.batches
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
        let (all, size, batches) = (self.items_per_epoch(), u64::from(self.config.batch_size), self.batches);
        let last_of_epoch = batch + 1 == batches;
        let accumulation = u64::from(self.config.accumulation);
        let (repeats, class_pictures, copies) = (self.config.repeats, self.config.class_pictures, self.copies() as u32);
        let samples = Arc::clone(&self.config.samples);
        let Order { places, starts, .. } = self.order(epoch);
        let start_of = |batch: u64| starts.as_ref().map_or_else(|| (batch * size).min(all), |starts| u64::from(starts[batch as usize]));
        let (start, end) = (start_of(batch), start_of(batch + 1));
        let share = if starts.is_some() {
            let first = batch / accumulation * accumulation;
            let after = (first + accumulation).min(batches);
            ((end - start) * (after - first)) as f64 / (start_of(after) - start_of(first)) as f64
        } else {
            1.0
        };
        let items = (start..end)
            .map(|ordinal| {
                let place = places[ordinal as usize];
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
            share,
            items,
        }
    }

    fn order(&mut self, epoch: u64) -> &Order {
        let (count, config) = (self.items_per_epoch() as u32, &self.config);
        if self.order.as_ref().is_none_or(|order| order.epoch != epoch) {
            self.order = None;
        }
        self.order.get_or_insert_with(|| {
            let Some(buckets) = &config.buckets else {
                let mut places: Vec<u32> = (0..count).collect();
                Stream::new(config.seed, Purpose::Shuffle, epoch, 0).shuffle(&mut places);
                return Order { epoch, places, starts: None };
            };
            let mut of_bucket: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
            (0..count).for_each(|place| of_bucket.entry(buckets[(place / config.repeats) as usize]).or_default().push(place));
            // Stream 0 orders the batches, each bucket has one of its own.
            of_bucket.iter_mut().for_each(|(bucket, places)| Stream::new(config.seed, Purpose::Shuffle, epoch, 1 + u64::from(*bucket)).shuffle(places));
            let mut batches: Vec<&[u32]> = of_bucket.values().flat_map(|places| places.chunks(config.batch_size as usize)).collect();
            Stream::new(config.seed, Purpose::Shuffle, epoch, 0).shuffle(&mut batches);
            let mut starts = Vec::with_capacity(batches.len() + 1);
            let mut end = 0;
            for batch in &batches {
                starts.push(end);
                end += batch.len() as u32;
            }
            starts.push(end);
            Order { epoch, places: batches.concat(), starts: Some(starts) }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use finetune_common::digest::sha256;

    fn keys(n: usize) -> Arc<[Sha256Digest]> {
        (0..n).map(|i| sha256(format!("sample {i}").as_bytes())).collect()
    }

    fn sampler(samples: usize, repeats: u32, batch_size: u32, accumulation: u32, seed: u64) -> Sampler {
        Sampler::new(SamplerConfig { samples: keys(samples), repeats, buckets: None, class_pictures: 0, batch_size, accumulation, seed }).unwrap()
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
            let config = SamplerConfig { samples: keys(samples), repeats, buckets: None, class_pictures, batch_size: 4, accumulation: 1, seed: 3 };
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
            let config = SamplerConfig { samples: keys(9), repeats: 1, buckets: None, class_pictures, batch_size: 9, accumulation: 1, seed: 3 };
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

    fn bucketed(buckets: &[u32], repeats: u32, batch_size: u32, accumulation: u32, seed: u64) -> Sampler {
        let samples = keys(buckets.len());
        let config = SamplerConfig { samples, repeats, buckets: Some(buckets.into()), class_pictures: 0, batch_size, accumulation, seed };
        Sampler::new(config).unwrap()
    }

    /// Random datasets: each copy once per epoch, batches of one shape that are full but for the last of a bucket, the same from any position on, and in an
    /// update every picture counts the same.
    #[test]
    fn batches_of_buckets_have_one_shape_and_every_copy_is_in_exactly_one() {
        let mut random = Stream::new(9, Purpose::Noise, 0, 0);
        for round in 0..60 {
            let mut below = |n: u64| random.below(n) as u32;
            let (samples, kinds, repeats, batch_size, accumulation) = (1 + below(40), 1 + below(7), 1 + below(3), 1 + below(6), 1 + below(4));
            let buckets: Vec<u32> = (0..samples).map(|_| 3 * below(u64::from(kinds))).collect();
            let mut whole = bucketed(&buckets, repeats, batch_size, accumulation, round);
            let count = |bucket: u32| (buckets.iter().filter(|b| **b == bucket).count() as u32 * repeats) as usize;
            let distinct: BTreeSet<u32> = buckets.iter().copied().collect();
            assert_eq!(whole.batches_per_epoch(), distinct.iter().map(|b| count(*b).div_ceil(batch_size as usize) as u64).sum::<u64>());
            let mut all = Vec::new();
            let mut orders = Vec::new();
            for epoch in 0..3 {
                let (mut seen, mut short) = (Vec::new(), BTreeMap::<u32, u32>::new());
                let mut window: Vec<(f64, usize)> = Vec::new();
                for index in 0..whole.batches_per_epoch() {
                    let batch = whole.next_batch();
                    assert_eq!((batch.epoch, batch.index_in_epoch, batch.last_of_epoch), (epoch, index, index + 1 == whole.batches_per_epoch()));
                    assert_eq!(batch.sync, batch.last_of_epoch || batch.index_in_window + 1 == accumulation);
                    let bucket = buckets[batch.items[0].sample];
                    assert!(batch.items.iter().all(|item| buckets[item.sample] == bucket), "one shape");
                    assert!(batch.items.iter().enumerate().all(|(i, item)| item.ordinal == (seen.len() + i) as u64 && item.key == keys(40)[item.sample]));
                    if batch.items.len() < batch_size as usize {
                        assert_eq!(batch.items.len(), count(bucket) % batch_size as usize);
                        *short.entry(bucket).or_default() += 1;
                    }
                    window.push((batch.share, batch.items.len()));
                    if batch.sync {
                        let items: usize = window.iter().map(|(_, items)| items).sum();
                        for (share, own) in &window {
                            // The weight of each of its pictures, of all in the window.
                            assert!((share / window.len() as f64 / *own as f64 - 1.0 / items as f64).abs() < 1e-12, "{window:?}");
                        }
                        window.clear();
                    }
                    seen.extend(batch.items.iter().map(|item| (item.sample, item.copy)));
                    all.push(batch);
                }
                assert!(short.values().all(|n| *n == 1), "one short batch of a bucket at most");
                orders.push(seen.clone());
                seen.sort_unstable();
                let copies: Vec<(usize, u32)> = (0..samples as usize).flat_map(|sample| (0..repeats).map(move |copy| (sample, copy))).collect();
                assert_eq!(seen, copies);
            }
            assert!(samples < 8 || orders[0] != orders[1], "each epoch has an order of its own");
            for (stop, expected) in all.iter().enumerate() {
                let mut resumed = bucketed(&buckets, repeats, batch_size, accumulation, round);
                resumed.seek(Position { epoch: expected.epoch, batch: expected.index_in_epoch }).unwrap();
                assert_eq!(resumed.next_batch(), *expected);
                assert!(all.get(stop + 1).is_none_or(|next| resumed.next_batch() == *next));
            }
        }
    }

    #[test]
    fn buckets_that_do_not_belong_to_the_samples_are_an_error() {
        for (buckets, class_pictures) in [(vec![0; 2], 0), (vec![0; 3], 4)] {
            let config = SamplerConfig { samples: keys(3), repeats: 1, buckets: Some(buckets.into()), class_pictures, batch_size: 1, accumulation: 1, seed: 0 };
            assert_eq!(Sampler::new(config).err(), Some(SamplerError::Buckets));
        }
    }

    #[test]
    fn nothing_to_sample_is_an_error() {
        for (samples, repeats, batch_size, accumulation) in [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)] {
            let config = SamplerConfig { samples: keys(samples), repeats, buckets: None, class_pictures: 0, batch_size, accumulation, seed: 0 };
            assert_eq!(Sampler::new(config).err(), Some(SamplerError::Empty));
        }
        let config = SamplerConfig { samples: keys(2), repeats: u32::MAX, buckets: None, class_pictures: 0, batch_size: 1, accumulation: 1, seed: 0 };
        assert_eq!(Sampler::new(config).err(), Some(SamplerError::TooMany { items: 2 * u64::from(u32::MAX) }));
    }
}
