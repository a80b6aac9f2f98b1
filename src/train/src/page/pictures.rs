//! Pictures within the page, each bounded, and all together: [`VALIDATION_BYTES`] and the bounds beside it keep a page below 10 MB.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, FilterType};
use image::{ImageError, ImageFormat, RgbImage};
use serde::{Serialize, Serializer};

use crate::history::Picture;

/// Bytes of all validation pictures together, before base64 makes 4 of 3.
pub(super) const VALIDATION_BYTES: usize = 5_000_000;
/// A validation picture: longest side and bytes.
const VALIDATION: Bound = Bound { side: 512, bytes: 64_000 };
/// Training pictures on the page at most.
pub const TRAINING_PICTURES: usize = 32;
/// A training picture.
pub const TRAINING: Bound = Bound { side: 256, bytes: 24_000 };
/// The sheet with the held-out pictures.
pub const COMPARISON: Bound = Bound { side: 2048, bytes: 1_000_000 };

/// How large a picture in the page may be.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    /// Longest side in pixels.
    side: u32,
    /// Bytes of the file.
    bytes: usize,
}

/// A picture as a `data:` address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Embedded {
    /// `data:image/png;base64,…` or `data:image/jpeg;base64,…`.
    #[serde(serialize_with = "as_text")]
    pub uri: Arc<str>,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Bytes of the file, before base64.
    #[serde(skip)]
    bytes: usize,
}

fn as_text<S: Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

impl Embedded {
    /// The picture, made smaller where it has to be: PNG where that is within the bound, else JPEG.
    ///
    /// # Errors
    /// If the encoder fails.
    pub fn new(picture: &RgbImage, bound: Bound) -> Result<Self, ImageError> {
        let mut picture = within(picture, bound.side);
        let mut png = Cursor::new(Vec::new());
        picture.write_to(&mut png, ImageFormat::Png)?;
        if png.get_ref().len() <= bound.bytes {
            return Ok(Self::of(&picture, "png", png.get_ref()));
        }
        loop {
            for quality in [88, 75, 60] {
                let mut jpeg = Vec::new();
                picture.write_with_encoder(JpegEncoder::new_with_quality(&mut jpeg, quality))?;
                if jpeg.len() <= bound.bytes || picture.width().max(picture.height()) <= 16 {
                    return Ok(Self::of(&picture, "jpeg", &jpeg));
                }
            }
            picture = within(&picture, picture.width().max(picture.height()) * 3 / 4);
        }
    }

    fn of(picture: &RgbImage, format: &str, file: &[u8]) -> Self {
        let uri = format!("data:image/{format};base64,{}", STANDARD.encode(file)).into();
        Self { uri, width: picture.width(), height: picture.height(), bytes: file.len() }
    }
}

/// The picture with its longest side at most `side`.
fn within(picture: &RgbImage, side: u32) -> RgbImage {
    let (width, height) = picture.dimensions();
    let longest = width.max(height);
    if longest <= side {
        return picture.clone();
    }
    let scaled = |x: u32| (u64::from(x) * u64::from(side) / u64::from(longest)).max(1) as u32;
    imageops::resize(picture, scaled(width), scaled(height), FilterType::Triangle)
}

/// Validation pictures over the steps. Where they would be too many bytes, steps are left out evenly; the first and the last stay.
#[derive(Debug, Clone, Default)]
pub struct Gallery {
    steps: BTreeMap<u64, BTreeMap<usize, Embedded>>,
    left_out: usize,
}

impl Gallery {
    /// Adds pictures, in any order.
    ///
    /// # Errors
    /// If one cannot be decoded or encoded.
    pub fn add(&mut self, pictures: &[Picture]) -> Result<(), ImageError> {
        for picture in pictures {
            let decoded = image::load_from_memory_with_format(&picture.png, ImageFormat::Png)?.into_rgb8();
            self.steps.entry(picture.step).or_default().insert(picture.prompt, Embedded::new(&decoded, VALIDATION)?);
        }
        while self.bytes() > VALIDATION_BYTES
            && let Some(step) = self.most_crowded()
        {
            self.steps.remove(&step);
            self.left_out += 1;
        }
        Ok(())
    }

    /// Steps with pictures that were left out.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// The steps with their pictures by prompt.
    pub fn steps(&self) -> impl ExactSizeIterator<Item = (u64, &BTreeMap<usize, Embedded>)> {
        self.steps.iter().map(|(step, pictures)| (*step, pictures))
    }

    fn bytes(&self) -> usize {
        self.steps.values().flat_map(BTreeMap::values).map(|picture| picture.bytes).sum()
    }

    /// The step between the ends whose neighbours are nearest to each other.
    fn most_crowded(&self) -> Option<u64> {
        let steps: Vec<u64> = self.steps.keys().copied().collect();
        steps.windows(3).min_by_key(|three| three[2] - three[0]).map(|three| three[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pixels that no encoder makes small.
    fn noise(side: u32, seed: u64) -> RgbImage {
        let mut stream = finetune_common::rng::Stream::new(seed, finetune_common::rng::Purpose::Noise, 0, 0);
        RgbImage::from_fn(side, side, |_, _| image::Rgb([0; 3].map(|_: u8| (stream.uniform_f32() * 255.0) as u8)))
    }

    fn decoded(picture: &Embedded) -> RgbImage {
        let (_, text) = picture.uri.split_once(";base64,").unwrap();
        image::load_from_memory(&STANDARD.decode(text).unwrap()).unwrap().into_rgb8()
    }

    #[test]
    fn small_pictures_stay_what_they_are_and_large_ones_are_bounded() {
        let small = noise(96, 1);
        let embedded = Embedded::new(&small, VALIDATION).unwrap();
        assert!(embedded.uri.starts_with("data:image/png") && decoded(&embedded) == small);

        let large = Embedded::new(&noise(1024, 2), VALIDATION).unwrap();
        assert!(large.uri.starts_with("data:image/jpeg") && large.bytes <= VALIDATION.bytes, "{}", large.bytes);
        assert_eq!(decoded(&large).dimensions(), (large.width, large.height));
        assert!(large.width <= VALIDATION.side && large.width >= 200, "{}", large.width);

        let wide = Embedded::new(&imageops::resize(&small, 3000, 1000, FilterType::Nearest), COMPARISON).unwrap();
        assert_eq!((wide.width, wide.height), (2048, 682));
    }

    #[test]
    fn pictures_of_a_long_run_stay_within_the_bound_evenly_and_with_both_ends() {
        let mut png = Cursor::new(Vec::new());
        noise(140, 3).write_to(&mut png, ImageFormat::Png).unwrap();
        let png = png.into_inner();
        let mut gallery = Gallery::default();
        for step in 1..=300 {
            let picture = |prompt| Picture { step: step * 10, time: 0.0, prompt, png: png.clone(), width: 140, height: 140 };
            gallery.add(&[picture(0), picture(1)]).unwrap();
        }
        let steps: Vec<u64> = gallery.steps().map(|(step, _)| step).collect();
        assert!(gallery.bytes() <= VALIDATION_BYTES && gallery.bytes() > VALIDATION_BYTES * 9 / 10, "{}", gallery.bytes());
        assert_eq!((steps[0], *steps.last().unwrap(), steps.len() + gallery.left_out()), (10, 3000, 300));
        let widest = steps.windows(2).map(|two| two[1] - two[0]).max().unwrap();
        assert!(widest <= 2 * 3000 / steps.len() as u64 + 20, "{widest} of {} steps", steps.len());
        assert!(gallery.steps().all(|(_, pictures)| pictures.len() == 2));
    }
}
