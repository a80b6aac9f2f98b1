//! From a picture to the model's input: resize, flip, crop, scale; and the choice of crop and flip for each copy.

use super::image::RgbImage;
use super::resample;
use finetune_common::digest::{Sha256Digest, leading_u64, sha256_parts};
use finetune_common::rng::{Purpose, Stream};

/// What is done to one picture. Two equal values on equal bytes give equal pixels, so this is part of the cache's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Transform {
    /// Width W and height H of the result; the picture is resized to cover it.
    pub size: (u32, u32),
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
    /// `[3, H, W]` in [-1, 1].
    pub data: Vec<f32>,
    /// W and H.
    pub size: (u32, u32),
}

/// How crops and flips are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Augmentation {
    /// The middle rather than a random place.
    pub center_crop: bool,
    /// Mirror half of the copies.
    pub random_flip: bool,
    /// The job's seed.
    pub seed: u64,
}

/// `(width, height)` of a picture that is resized to cover `to`: one side is as long as there, the other is truncated and at least as long. Of a square the
/// short side is the one, as in the reference.
pub fn cover((width, height): (u32, u32), to: (u32, u32)) -> (u32, u32) {
    let (width, height) = (u64::from(width.max(1)), u64::from(height.max(1)));
    let (to_width, to_height) = (u64::from(to.0), u64::from(to.1));
    let side = |side: u64| side.min(u64::from(u32::MAX)) as u32;
    if width * to_height <= height * to_width { (to.0, side(to_width * height / width)) } else { (side(to_height * width / height), to.1) }
}

impl Augmentation {
    /// The transform of a copy of a picture to `target`, from its content digest and its upright `(width, height)`.
    ///
    /// Crop and flip are drawn once per copy and run (not anew in each epoch), from the streams
    /// `(seed, Crop | Flip, first 64 bits of the digest, copy)`: the order and number of other pictures do not matter.
    pub fn transform(&self, image_digest: &Sha256Digest, size: (u32, u32), target: (u32, u32), copy: u32) -> Transform {
        let (width, height) = cover(size, target);
        let (free_rows, free_columns) = (height - target.1, width - target.0);
        let stream = |purpose| Stream::new(self.seed, purpose, leading_u64(image_digest), u64::from(copy));
        let (top, left) = if self.center_crop {
            (round_half_even(free_rows), round_half_even(free_columns))
        } else {
            let mut crop = stream(Purpose::Crop);
            let mut draw = |free: u32| crop.below(u64::from(free) + 1) as u32;
            (draw(free_rows), draw(free_columns))
        };
        let flip = self.random_flip && stream(Purpose::Flip).uniform_f32() < 0.5;
        Transform { size: target, flip, top, left }
    }
}

/// `round(n / 2)` as Python rounds: a half goes to the even neighbour.
fn round_half_even(n: u32) -> u32 {
    let half = n / 2;
    if n % 2 == 1 && half % 2 == 1 { half + 1 } else { half }
}

impl Transform {
    /// The middle crop to `target` without a flip, for a picture of this upright `(width, height)`.
    pub fn center(size: (u32, u32), target: (u32, u32)) -> Self {
        Augmentation { center_crop: true, random_flip: false, seed: 0 }.transform(&[0; 32], size, target, 0)
    }

    /// Applies the transform: resize, flip, crop, then `v / 255` and `(v - 0.5) / 0.5`.
    ///
    /// A crop that does not fit in the resized picture is moved to its edge.
    pub fn apply(&self, picture: &RgbImage) -> Pixels {
        let (columns, rows) = (self.size.0 as usize, self.size.1 as usize);
        let (width, height) = cover((picture.width, picture.height), self.size);
        let top = self.top.min(height - self.size.1) as usize;
        let left = self.left.min(width - self.size.0) as usize;
        // The crop's place in the picture before it is mirrored.
        let first_column = if self.flip { width as usize - left - columns } else { left };
        let from = (picture.width as usize, picture.height as usize);
        let crop = resample::bilinear_rgb(&picture.data, from, (width as usize, height as usize), first_column..first_column + columns, top..top + rows);
        let mut data = vec![0.0; 3 * rows * columns];
        for y in 0..rows {
            for x in 0..columns {
                let at = (y * columns + if self.flip { columns - 1 - x } else { x }) * 3;
                for c in 0..3 {
                    data[(c * rows + y) * columns + x] = (f32::from(crop[at + c]) / 255.0 - 0.5) / 0.5;
                }
            }
        }
        Pixels { data, size: self.size }
    }

    /// Digest of the transform and of the arithmetic behind it, for cache keys.
    pub fn digest(&self) -> Sha256Digest {
        let (width, height) = self.size;
        let place = [u32::from(self.flip), self.top, self.left];
        if width == height {
            let numbers = [[width].as_slice(), &place].concat();
            return of_numbers(b"rgb8 bilinear-antialias short-side flip crop [-1,1] v1", &numbers);
        }
        of_numbers(b"rgb8 bilinear-antialias cover flip crop [-1,1] v1", &[[width, height].as_slice(), &place].concat())
    }
}

fn of_numbers(what: &[u8], numbers: &[u32]) -> Sha256Digest {
    let numbers: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    sha256_parts([what, &numbers])
}
