//! From a picture to the model's input: resize, flip, crop, scale; and the choice of crop and flip for each copy.

use super::image::RgbImage;
use super::resample;
use finetune_common::digest::{Sha256Digest, leading_u64, sha256_parts};
use finetune_common::rng::{Purpose, Stream};

/// What is done to one picture. Two equal values on equal bytes give equal pixels, so this is part of the cache's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Transform {
    /// Side R of the square result; the short side is resized to it.
    pub resolution: u32,
    /// Mirror left and right, after resizing and before cropping.
    pub flip: bool,
    /// First row of the crop in the resized picture.
    pub top: u32,
    /// First column of the crop in the resized (and flipped) picture.
    pub left: u32,
}

/// The model's input.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// `[3, R, R]` in [-1, 1].
    pub data: Vec<f32>,
    /// R.
    pub resolution: u32,
}

/// How crops and flips are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Augmentation {
    /// Side of the square result.
    pub resolution: u32,
    /// The middle rather than a random place.
    pub center_crop: bool,
    /// Mirror half of the copies.
    pub random_flip: bool,
    /// The job's seed.
    pub seed: u64,
}

/// `(width, height)` after resizing the short side to `resolution`; the long side is truncated.
pub fn resized((width, height): (u32, u32), resolution: u32) -> (u32, u32) {
    let long = |long: u32, short: u32| (u64::from(resolution) * u64::from(long) / u64::from(short.max(1))).min(u64::from(u32::MAX)) as u32;
    if width <= height { (resolution, long(height, width)) } else { (long(width, height), resolution) }
}

impl Augmentation {
    /// The transform of a copy of a picture, from its content digest and its upright `(width, height)`.
    ///
    /// Crop and flip are drawn once per copy and run (not anew in each epoch), from the streams
    /// `(seed, Crop | Flip, first 64 bits of the digest, copy)`: the order and number of other pictures do not matter.
    pub fn transform(&self, image_digest: &Sha256Digest, size: (u32, u32), copy: u32) -> Transform {
        let (width, height) = resized(size, self.resolution);
        let (free_rows, free_columns) = (height - self.resolution, width - self.resolution);
        let stream = |purpose| Stream::new(self.seed, purpose, leading_u64(image_digest), u64::from(copy));
        let (top, left) = if self.center_crop {
            (round_half_even(free_rows), round_half_even(free_columns))
        } else {
            let mut crop = stream(Purpose::Crop);
            let mut draw = |free: u32| crop.below(u64::from(free) + 1) as u32;
            (draw(free_rows), draw(free_columns))
        };
        let flip = self.random_flip && stream(Purpose::Flip).uniform_f32() < 0.5;
        Transform { resolution: self.resolution, flip, top, left }
    }
}

/// `round(n / 2)` as Python rounds: a half goes to the even neighbour.
fn round_half_even(n: u32) -> u32 {
    let half = n / 2;
    if n % 2 == 1 && half % 2 == 1 { half + 1 } else { half }
}

impl Transform {
    /// The middle crop without a flip, for a picture of this upright `(width, height)`.
    pub fn center(size: (u32, u32), resolution: u32) -> Self {
        Augmentation { resolution, center_crop: true, random_flip: false, seed: 0 }.transform(&[0; 32], size, 0)
    }

    /// Applies the transform: resize, flip, crop, then `v / 255` and `(v - 0.5) / 0.5`.
    ///
    /// A crop that does not fit in the resized picture is moved to its edge.
    pub fn apply(&self, picture: &RgbImage) -> Pixels {
        let side = self.resolution as usize;
        let (width, height) = resized((picture.width, picture.height), self.resolution);
        let top = self.top.min(height - self.resolution) as usize;
        let left = self.left.min(width - self.resolution) as usize;
        // The crop's place in the picture before it is mirrored.
        let first_column = if self.flip { width as usize - left - side } else { left };
        let from = (picture.width as usize, picture.height as usize);
        let crop = resample::bilinear_rgb(&picture.data, from, (width as usize, height as usize), first_column..first_column + side, top..top + side);
        let mut data = vec![0.0; 3 * side * side];
        for y in 0..side {
            for x in 0..side {
                let at = (y * side + if self.flip { side - 1 - x } else { x }) * 3;
                for c in 0..3 {
                    data[(c * side + y) * side + x] = (f32::from(crop[at + c]) / 255.0 - 0.5) / 0.5;
                }
            }
        }
        Pixels { data, resolution: self.resolution }
    }

    /// Digest of the transform and of the arithmetic behind it, for cache keys.
    pub fn digest(&self) -> Sha256Digest {
        let numbers = [self.resolution, u32::from(self.flip), self.top, self.left].map(u32::to_le_bytes);
        sha256_parts([&b"rgb8 bilinear-antialias short-side flip crop [-1,1] v1"[..], numbers.as_flattened()])
    }
}
