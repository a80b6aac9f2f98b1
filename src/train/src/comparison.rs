//! Held-out pictures against what the base model and the LoRA make of their captions, from the same noise.

use std::io::Cursor;

use image::{ImageFormat, RgbImage};

use super::error::TrainError;
use super::interrupt::Interrupt;
use super::result::Comparison;
use super::trainer::Trainer;
use super::validation::{Painter, ValidationError};
use finetune_api::plan::{TrainConfig, ValidationConfig};
use finetune_compute::kernels::Engine;
use finetune_data::buckets::Shapes;
use finetune_data::dataset::Dataset;
use finetune_data::transform::{Pixels, Transform};
use finetune_model::ModelDir;
use finetune_model::sample::{COLUMNS, Sheet, SheetRow, in_groups};
use finetune_store::Store;

/// Name of the picture below the output prefix.
pub const FILE_NAME: &str = "before-after.png";

/// Held-out pictures that are drawn at most.
const MAX_PICTURES: usize = 16;

/// Small pictures are enlarged on the sheet to this width.
const SHEET_WIDTH: u32 = 128;

/// Captions and pictures that training never sees.
#[derive(Debug, Clone)]
pub struct HeldOut {
    /// The captions.
    pub captions: Vec<String>,
    /// The real pictures, resized and cropped in the middle.
    truth: Vec<RgbImage>,
}

impl HeldOut {
    /// Reads the first pictures of the folder at `store`, by file name, each with its (first) caption: in the form of the run's dataset, cropped as the run's
    /// pictures are, to sides of at most `largest` pixels.
    ///
    /// # Errors
    /// If the folder is not a dataset, or a picture fits no bucket; every problem is listed.
    pub async fn load(store: &Store, config: &TrainConfig, largest: usize) -> Result<Self, TrainError> {
        let found = Dataset::scan(store, &config.dataset.held_out(store.uri())).await?;
        found.log();
        let pictures = found.pictures(store);
        let mut samples = found.samples;
        samples.truncate(MAX_PICTURES);
        let shapes = Shapes::new(&config.training, &samples)?;
        shapes.check(&samples, largest)?;
        let mut held_out = Self { captions: Vec::new(), truth: Vec::new() };
        for (i, sample) in samples.into_iter().enumerate() {
            let picture = pictures.load(&sample).await?;
            held_out.truth.push(to_picture(&Transform::center(sample.size, shapes.of(i)).apply(&picture)));
            held_out.captions.extend(sample.captions.into_iter().next());
        }
        Ok(held_out)
    }

    /// Captions, and the sizes of their pictures.
    fn wanted(&self) -> Vec<(&str, (u32, u32))> {
        self.captions.iter().map(String::as_str).zip(self.truth.iter().map(RgbImage::dimensions)).collect()
    }
}

/// A model's input as people see it.
pub(super) fn to_picture(Pixels { data, size: (width, height) }: &Pixels) -> RgbImage {
    let (columns, rows) = (*width as usize, *height as usize);
    let level = |c: usize, x: u32, y: u32| ((data[(c * rows + y as usize) * columns + x as usize] / 2.0 + 0.5) * 255.0).round() as u8;
    RgbImage::from_fn(*width, *height, |x, y| image::Rgb([level(0, x, y), level(1, x, y), level(2, x, y)]))
}

/// Draws the comparison: its numbers and its sheet as PNG; none if the run is asked to stop meanwhile.
///
/// # Errors
/// If a part of the model is missing or fails.
pub fn draw(
    config: &ValidationConfig,
    held_out: &HeldOut,
    model: &ModelDir,
    trainer: &Trainer,
    engine: &Engine,
    interrupt: &Interrupt,
) -> Result<Option<(Comparison, Vec<u8>)>, ValidationError> {
    let painter = Painter::new(config, model, trainer, engine, interrupt)?;
    let wanted = held_out.wanted();
    let Some(base) = painter.draw(&wanted, 0.0)? else { return Ok(None) };
    let Some(lora) = painter.draw(&wanted, 1.0)? else { return Ok(None) };
    let comparison =
        Comparison { pictures: held_out.truth.len() as u64, base_distance: distance(&held_out.truth, &base), lora_distance: distance(&held_out.truth, &lora) };
    let row = |label: String, pictures: &[RgbImage], captions: bool| SheetRow {
        label,
        cells: pictures.iter().cloned().zip(held_out.captions.iter().map(|c| if captions { c.clone() } else { String::new() })).collect(),
        space: 0,
    };
    let rows = [
        row("held-out pictures, never trained on".to_owned(), &held_out.truth, true),
        row(format!("base model (distance {:.3})", comparison.base_distance), &base, false),
        row(format!("with the LoRA, same noise (distance {:.3})", comparison.lora_distance), &lora, false),
    ];
    let sheet = Sheet { rows: in_groups(&rows, COLUMNS), least_width: SHEET_WIDTH };
    let mut png = Cursor::new(Vec::new());
    sheet.draw().write_to(&mut png, ImageFormat::Png)?;
    Ok(Some((comparison, png.into_inner())))
}

/// Root mean square difference of the pictures' values in [0, 1], over all pictures.
fn distance(truth: &[RgbImage], drawn: &[RgbImage]) -> f64 {
    let (mut sum, mut count) = (0.0, 0_usize);
    for (a, b) in truth.iter().zip(drawn) {
        for (x, y) in a.as_raw().iter().zip(b.as_raw()) {
            sum += ((f64::from(*x) - f64::from(*y)) / 255.0).powi(2);
            count += 1;
        }
    }
    (sum / count.max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_is_zero_for_equal_pictures_and_one_for_black_and_white() {
        let flat = |v| RgbImage::from_pixel(4, 4, image::Rgb([v; 3]));
        assert!(distance(&[flat(7)], &[flat(7)]) < 1e-12);
        assert!((distance(&[flat(0)], &[flat(255)]) - 1.0).abs() < 1e-12);
        assert!((distance(&[flat(0), flat(0)], &[flat(255), flat(0)]) - 0.5_f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn values_become_pixels_in_their_places() {
        let mut data = vec![-1.0; 18];
        data[2] = 1.0; // red, row 0, column 2
        data[6 + 4] = 1.0; // green, row 1, column 1
        let picture = to_picture(&Pixels { data, size: (3, 2) });
        assert_eq!(picture.dimensions(), (3, 2));
        for (x, y, pixel) in picture.enumerate_pixels() {
            let expected = match (x, y) {
                (2, 0) => [255, 0, 0],
                (1, 1) => [0, 255, 0],
                _ => [0, 0, 0],
            };
            assert_eq!(pixel.0, expected, "{x} {y}");
        }
    }
}
