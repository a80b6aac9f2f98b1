//! Aspect-ratio buckets: the shape that each picture is trained in.
//!
//! The choice is that of kohya's sd-scripts, which users of LoRA trainers know: `make_bucket_resolutions` and `BucketManager.select_bucket`, with and without
//! `--bucket_no_upscale` (<https://github.com/kohya-ss/sd-scripts>, `library/model_util.py` and `library/train_util.py`). It differs in two things: a picture is
//! always resized to cover its bucket, where the scripts cut up to a step less a pixel off the sides of pictures that are smaller than the area; and no bucket
//! is larger than the area, where rounding leads the scripts a few pixels beyond it.
//!
//! # Guarantees
//! - Sides are multiples of the step; no area is larger than that of the square, so that what fits memory as a square fits in every bucket.
//! - A picture's shape follows from its own size alone.

use std::fmt;
use std::sync::Arc;

use super::captions::Names;
use super::dataset::Sample;
use super::transform::cover;
use finetune_api::plan::{BucketsConfig, SidesConfig, TrainingConfig};

/// Width and height in pixels.
pub type Size = (u32, u32);

/// A picture that loses more than this share of its area is mentioned.
const MUCH: f64 = 0.1;

/// How the shape of a picture follows from its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buckets {
    step: u32,
    /// Side of the square with the largest area.
    resolution: u32,
    /// The shapes from which the nearest is chosen; none: each picture's own.
    shapes: Option<Vec<Size>>,
}

impl Buckets {
    /// The buckets of a configuration.
    pub fn new(resolution: u32, config: &BucketsConfig) -> Self {
        let shapes = config.upscale.map(|sides| shapes(resolution, config.step, sides));
        Self { step: config.step, resolution, shapes }
    }

    /// The longest side that a bucket can have, where that does not depend on the pictures.
    pub fn longest_side(&self) -> Option<u32> {
        self.shapes.as_ref()?.iter().flat_map(|&(width, height)| [width, height]).max()
    }

    /// The shape in which a picture of this size is trained; none where a side would be shorter than a step.
    pub fn shape(&self, size: Size) -> Option<Size> {
        let (width, height) = size;
        if width == 0 || height == 0 {
            return None;
        }
        let ratio = f64::from(width) / f64::from(height);
        let Some(shapes) = &self.shapes else { return self.own_shape(size, ratio) };
        if shapes.contains(&size) {
            return Some(size);
        }
        let error = |&(w, h): &Size| (f64::from(w) / f64::from(h) - ratio).abs();
        // The first of several that are as near.
        shapes.iter().copied().min_by(|a, b| error(a).total_cmp(&error(b)))
    }

    /// The picture's own shape: at most of the square's area, sides cut down to the step.
    fn own_shape(&self, (width, height): Size, ratio: f64) -> Option<Size> {
        let floor = |side: f64| (side + 0.5).floor() as u32 / self.step * self.step;
        let whole = |(width, height): Size| (width > 0 && height > 0).then_some((width, height));
        if u64::from(width) * u64::from(height) <= u64::from(self.resolution).pow(2) {
            return whole((width / self.step * self.step, height / self.step * self.step));
        }
        let area = f64::from(self.resolution).powi(2);
        let exact_width = (area * ratio).sqrt();
        // Either side may be cut down first; that of the two which keeps the picture's ratio better is taken.
        // Sides are rounded to whole pixels first, which may lead a few pixels beyond the area: then the side is a step shorter.
        let cut = |exact: f64, shape: &dyn Fn(u32) -> Size| {
            let (width, height) = shape(floor(exact));
            let fits = f64::from(width) * f64::from(height) <= area;
            whole(if fits { (width, height) } else { shape(floor(exact).saturating_sub(self.step)) })
        };
        let by_width = cut(exact_width, &|width| (width, floor(f64::from(width) / ratio)))?;
        let by_height = cut(area / exact_width, &|height| (floor(f64::from(height) * ratio), height))?;
        let error = |(width, height): Size| (f64::from(width) / f64::from(height) - ratio).abs();
        Some(if error(by_width) < error(by_height) { by_width } else { by_height })
    }
}

/// Every shape with sides in these bounds that has as much of the square's area as the step allows, sorted.
fn shapes(resolution: u32, step: u32, SidesConfig { min, max }: SidesConfig) -> Vec<Size> {
    let area = u64::from(resolution).pow(2);
    let square = resolution / step * step;
    let mut shapes = vec![(square, square)];
    for width in (min..=max).step_by(step as usize) {
        let height = (area / u64::from(width) / u64::from(step) * u64::from(step)).min(u64::from(max)) as u32;
        if height >= min {
            shapes.extend([(width, height), (height, width)]);
        }
    }
    shapes.sort_unstable();
    shapes.dedup();
    shapes
}

/// A bucket with pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// Its shape.
    pub size: Size,
    /// Its pictures, each counted once.
    pub pictures: u64,
}

/// Why pictures cannot be trained in buckets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BucketError {
    /// A side would be shorter than a step.
    #[error(
        "training.buckets: {pictures} too small or too narrow for a side of {step} pixels, the step: lower training.buckets.step, enlarge small pictures with \
         training.buckets.upscale, or leave them out"
    )]
    TooNarrow {
        /// Which pictures.
        pictures: Named,
        /// The step.
        step: u32,
    },
    /// The model cannot take a bucket.
    #[error(
        "training.buckets: {pictures} in buckets with a side beyond {largest} pixels, to which the model's table of position embeddings reaches: lower \
         training.resolution, crop them, or leave them out"
    )]
    TooLong {
        /// Which pictures.
        pictures: Named,
        /// The longest side.
        largest: usize,
    },
}

/// Pictures by name and size, with the verb.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Named(Names);

impl Named {
    fn of<'a>(samples: impl Iterator<Item = &'a Sample>) -> Option<Self> {
        let mut names = Names::default();
        samples.for_each(|sample| names.add(&format!("{} ({} x {})", sample.file_name, sample.size.0, sample.size.1)));
        (!names.is_empty()).then_some(Self(names))
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.total() {
            1 => write!(f, "1 picture is ({})", self.0),
            total => write!(f, "{total} pictures are ({})", self.0),
        }
    }
}

/// The shapes of a dataset's pictures. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shapes {
    /// Sorted by shape.
    buckets: Arc<[Bucket]>,
    /// The bucket of each sample.
    of: Arc<[u32]>,
    /// Pictures that lose much by cropping, and the share that the worst one loses.
    cropped: Option<(Names, f64)>,
    /// Mean difference between the ratios of bucket and picture.
    ratio_error: f64,
    bucketed: bool,
}

impl Shapes {
    /// The shapes in which `samples` are trained: squares, or those of the buckets.
    ///
    /// # Errors
    /// Names the pictures that have no bucket.
    pub fn new(training: &TrainingConfig, samples: &[Sample]) -> Result<Self, BucketError> {
        let square = (training.resolution, training.resolution);
        let Some(config) = &training.buckets else {
            let buckets = [Bucket { size: square, pictures: samples.len() as u64 }];
            return Ok(Self { buckets: buckets.into(), of: vec![0; samples.len()].into(), cropped: None, ratio_error: 0.0, bucketed: false });
        };
        let rule = Buckets::new(training.resolution, config);
        let chosen: Vec<Option<Size>> = samples.iter().map(|sample| rule.shape(sample.size)).collect();
        if let Some(pictures) = Named::of(samples.iter().zip(&chosen).filter(|(_, shape)| shape.is_none()).map(|(sample, _)| sample)) {
            return Err(BucketError::TooNarrow { pictures, step: config.step });
        }
        let chosen: Vec<Size> = chosen.into_iter().flatten().collect();
        let mut sizes = chosen.clone();
        sizes.sort_unstable();
        sizes.dedup();
        let of: Vec<u32> = chosen.iter().map(|size| sizes.partition_point(|other| other < size) as u32).collect();
        let mut buckets: Vec<Bucket> = sizes.into_iter().map(|size| Bucket { size, pictures: 0 }).collect();
        of.iter().for_each(|&bucket| buckets[bucket as usize].pictures += 1);
        let (mut names, mut worst, mut errors) = (Names::default(), 0.0_f64, 0.0);
        for (sample, &shape) in samples.iter().zip(&chosen) {
            let lost = lost(sample.size, shape);
            if lost > MUCH {
                names.add(&sample.file_name);
                worst = worst.max(lost);
            }
            errors += (ratio(shape) - ratio(sample.size)).abs();
        }
        let cropped = (!names.is_empty()).then_some((names, worst));
        Ok(Self { buckets: buckets.into(), of: of.into(), cropped, ratio_error: errors / samples.len().max(1) as f64, bucketed: true })
    }

    /// Checks that the model can take every bucket of a dataset.
    ///
    /// # Errors
    /// Names the pictures whose buckets are longer than `largest` pixels.
    pub fn check(&self, samples: &[Sample], largest: usize) -> Result<(), BucketError> {
        let long = samples.iter().enumerate().filter(|(i, _)| self.bucketed && self.of(*i).0.max(self.of(*i).1) as usize > largest);
        Named::of(long.map(|(_, sample)| sample)).map_or(Ok(()), |pictures| Err(BucketError::TooLong { pictures, largest }))
    }

    /// The shape of a sample.
    pub fn of(&self, sample: usize) -> Size {
        self.buckets[self.of[sample] as usize].size
    }

    /// The bucket of each sample; none where all are squares.
    pub fn of_each(&self) -> Option<Arc<[u32]>> {
        self.bucketed.then(|| Arc::clone(&self.of))
    }

    /// The buckets with pictures, sorted by shape; none where all are squares.
    pub fn buckets(&self) -> &[Bucket] {
        if self.bucketed { &self.buckets } else { &[] }
    }

    /// How many pictures each bucket has: what the length of an epoch follows from.
    pub fn pictures(&self) -> Vec<u64> {
        self.buckets.iter().map(|bucket| bucket.pictures).collect()
    }

    /// Mean difference between the ratios (width / height) of bucket and picture.
    pub fn ratio_error(&self) -> f64 {
        self.ratio_error
    }

    /// What is lost of pictures, if that is much.
    pub fn warning(&self) -> Option<String> {
        let (names, worst) = self.cropped.as_ref()?;
        let verb = if names.total() == 1 { "loses" } else { "lose" };
        Some(format!(
            "{} of {} pictures {verb} more than {:.0} % of the area by cropping to a bucket, up to {:.0} %: {names}. A smaller training.buckets.step keeps more",
            names.total(),
            self.of.len(),
            100.0 * MUCH,
            100.0 * worst
        ))
    }
}

/// Such as `2 buckets: 384 x 640 (3 pictures), 512 x 512 (1)`.
impl fmt::Display for Shapes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let buckets = self.buckets();
        write!(f, "{} {}: ", buckets.len(), if buckets.len() == 1 { "bucket" } else { "buckets" })?;
        for (i, Bucket { size: (width, height), pictures }) in buckets.iter().enumerate() {
            let unit = match (i, pictures) {
                (0, 1) => " picture",
                (0, _) => " pictures",
                _ => "",
            };
            write!(f, "{}{width} x {height} ({pictures}{unit})", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

fn ratio((width, height): Size) -> f64 {
    f64::from(width) / f64::from(height.max(1))
}

/// The share of its area that a picture of this size loses when it is cropped to this shape.
fn lost(size: Size, shape: Size) -> f64 {
    let area = |(width, height): Size| f64::from(width) * f64::from(height);
    1.0 - area(shape) / area(cover(size, shape))
}

#[cfg(test)]
#[path = "buckets_tests.rs"]
mod tests;
