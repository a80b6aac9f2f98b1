//! Held-out pictures against what the base model and the LoRA make of their captions, from the same noise.

use std::io::Cursor;

use image::{ImageFormat, RgbImage};

use super::interrupt::Interrupt;
use super::result::Comparison;
use super::trainer::Trainer;
use super::validation::{Painter, ValidationError};
use finetune_api::plan::{DatasetConfig, ValidationConfig};
use finetune_compute::kernels::Engine;
use finetune_data::dataset::{Dataset, DatasetError};
use finetune_data::transform::Transform;
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
    /// Reads the first pictures of the folder at `store`, by file name, each with its (first) caption. `dataset` gives its form.
    ///
    /// # Errors
    /// If the folder is not a dataset; every problem is listed.
    pub async fn load(store: &Store, dataset: &DatasetConfig, resolution: u32) -> Result<Self, DatasetError> {
        let found = Dataset::scan(store, &dataset.held_out(store.uri())).await?;
        found.log();
        let pictures = found.pictures(store);
        let mut samples = found.samples;
        samples.truncate(MAX_PICTURES);
        let mut held_out = Self { captions: Vec::new(), truth: Vec::new() };
        for sample in samples {
            let picture = pictures.load(&sample).await?;
            let pixels = Transform::center(sample.size, resolution).apply(&picture);
            held_out.truth.push(to_picture(&pixels.data, resolution));
            held_out.captions.extend(sample.captions.into_iter().next());
        }
        Ok(held_out)
    }
}

/// The picture of `[3, R, R]` values in [-1, 1]: a model's input as people see it.
pub(super) fn to_picture(values: &[f32], resolution: u32) -> RgbImage {
    let side = resolution as usize;
    let level = |c: usize, x: u32, y: u32| ((values[(c * side + y as usize) * side + x as usize] / 2.0 + 0.5) * 255.0).round() as u8;
    RgbImage::from_fn(resolution, resolution, |x, y| image::Rgb([level(0, x, y), level(1, x, y), level(2, x, y)]))
}

/// Draws the comparison: its numbers and its sheet as PNG; none if the run is asked to stop meanwhile.
///
/// # Errors
/// If a part of the model is missing or fails.
pub fn draw(
    config: &ValidationConfig,
    held_out: &HeldOut,
    resolution: u32,
    model: &ModelDir,
    trainer: &Trainer,
    engine: &Engine,
    interrupt: &Interrupt,
) -> Result<Option<(Comparison, Vec<u8>)>, ValidationError> {
    let painter = Painter::new(config, resolution, model, trainer, engine, interrupt)?;
    let Some(base) = painter.draw(&held_out.captions, 0.0)? else { return Ok(None) };
    let Some(lora) = painter.draw(&held_out.captions, 1.0)? else { return Ok(None) };
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
        let mut values = vec![-1.0; 12];
        values[1] = 1.0; // red, row 0, column 1
        let picture = to_picture(&values, 2);
        assert_eq!(picture.get_pixel(1, 0).0, [255, 0, 0]);
        assert_eq!(picture.get_pixel(0, 1).0, [0, 0, 0]);
    }
}
