//! Against the choices of kohya's own code (`tests/golden/buckets.json`), and for pictures of every size.

use finetune_api::plan::{Facts, resolve};
use finetune_common::rng::{Purpose, Stream};

use super::*;

#[derive(serde::Deserialize)]
struct Case {
    resolution: u32,
    step: u32,
    upscale: Option<(u32, u32)>,
    pictures: Vec<(Size, Option<Size>)>,
    buckets: Option<Vec<Size>>,
}

fn config(step: u32, upscale: Option<(u32, u32)>) -> BucketsConfig {
    BucketsConfig { step, upscale: upscale.map(|(min, max)| SidesConfig { min, max }) }
}

fn training(training: &serde_json::Value) -> TrainingConfig {
    let spec = serde_json::json!({
        "model": {"source": {"objectStore": {"uri": "s3://m/"}}}, "dataset": {"uri": "s3://d/"}, "output": {"uri": "s3://o/"}, "training": training,
    });
    resolve(&serde_json::from_value(spec).unwrap(), "n", "j", &Facts::default()).unwrap().config.training
}

fn sample(name: &str, size: Size) -> Sample {
    Sample { file_name: name.into(), captions: vec![String::new()], image_digest: [0; 32], size }
}

#[test]
fn pictures_get_the_buckets_of_kohyas_scripts() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/buckets.json");
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases: Vec<Case> = serde_json::from_value(file["cases"].clone()).unwrap();
    assert_eq!(cases.len(), 8);
    for Case { resolution, step, upscale, pictures, buckets } in cases {
        let rule = Buckets::new(resolution, &config(step, upscale));
        assert_eq!(rule.shapes, buckets, "{resolution} {step} {upscale:?}");
        assert!(pictures.len() > 100);
        for (size, shape) in pictures {
            assert_eq!(rule.shape(size), shape, "{size:?} at {resolution}, step {step}, {upscale:?}");
        }
    }
}

#[test]
fn no_bucket_has_more_than_the_squares_area_and_no_picture_is_enlarged_unless_asked_for() {
    let mut random = Stream::new(5, Purpose::Noise, 0, 0);
    for _ in 0..20_000 {
        let step = 16 * (1 + random.below(8) as u32);
        let resolution = step + 16 * random.below(64) as u32;
        let size = (1 + random.below(6000) as u32, 1 + random.below(6000) as u32);
        for upscale in [None, Some(((256.min(resolution) / step * step).max(step), 1024.max(resolution).next_multiple_of(step)))] {
            let Some(shape) = Buckets::new(resolution, &config(step, upscale)).shape(size) else {
                assert!(upscale.is_none(), "only without enlarging can a picture be too narrow: {size:?}");
                continue;
            };
            let what = format!("{size:?} at {resolution}, step {step}, {upscale:?}: {shape:?}");
            assert!(shape.0 > 0 && shape.1 > 0 && shape.0.is_multiple_of(step) && shape.1.is_multiple_of(step), "{what}");
            assert!(u64::from(shape.0) * u64::from(shape.1) <= u64::from(resolution).pow(2), "{what}");
            let covered = cover(size, shape);
            assert!(covered.0 >= shape.0 && covered.1 >= shape.1 && (covered.0 == shape.0 || covered.1 == shape.1), "{what}");
            if upscale.is_none() {
                assert!(covered.0 <= size.0 && covered.1 <= size.1, "{what}");
            }
        }
    }
}

#[test]
fn samples_are_counted_by_shape_and_losses_are_reported() {
    let samples =
        [sample("a.png", (4032, 3024)), sample("b.png", (3024, 4032)), sample("c.png", (1024, 768)), sample("d.png", (500, 120)), sample("e.png", (576, 448))];
    let shapes = Shapes::new(&training(&serde_json::json!({"buckets": {}})), &samples).unwrap();
    assert_eq!((0..5).map(|i| shapes.of(i)).collect::<Vec<_>>(), [(512, 384), (384, 512), (512, 384), (448, 64), (576, 448)]);
    assert_eq!((shapes.of_each().unwrap().to_vec(), shapes.pictures()), (vec![2, 0, 2, 1, 3], vec![1, 1, 2, 1]));
    assert_eq!(shapes.to_string(), "4 buckets: 384 x 512 (1 picture), 448 x 64 (1), 512 x 384 (2), 576 x 448 (1)");
    // 448 x 107 is cropped to 448 x 64.
    let warning = shapes.warning().unwrap();
    assert!(warning.contains("1 of 5 pictures loses more than 10 %") && warning.contains("up to 40 %: \"d.png\""), "{warning}");
    let fine = Shapes::new(&training(&serde_json::json!({"buckets": {"step": 16}})), &samples).unwrap();
    assert_eq!(fine.warning(), None);

    assert_eq!(shapes.check(&samples, 576), Ok(()));
    let error = shapes.check(&samples, 500).unwrap_err().to_string();
    assert!(error.contains("4 pictures are") && error.contains("a.png (4032 x 3024)") && error.contains("beyond 500 pixels"), "{error}");
    let narrow = [sample("a.png", (500, 63)), sample("b.png", (512, 512)), sample("c.png", (60_000, 100))];
    let error = Shapes::new(&training(&serde_json::json!({"buckets": {}})), &narrow).unwrap_err().to_string();
    assert!(error.contains("2 pictures are") && error.contains("a.png (500 x 63)") && error.contains("training.buckets.step"), "{error}");
    assert!(Shapes::new(&training(&serde_json::json!({"buckets": {"upscale": true}})), &narrow).is_ok());
}

#[test]
fn without_buckets_every_picture_is_a_square() {
    let samples = [sample("a.png", (4032, 3024)), sample("b.png", (5, 3))];
    let shapes = Shapes::new(&training(&serde_json::json!({})), &samples).unwrap();
    assert_eq!((shapes.of(0), shapes.of(1), shapes.of_each(), shapes.buckets().len()), ((512, 512), (512, 512), None, 0));
    assert_eq!((shapes.pictures(), shapes.warning(), shapes.check(&samples, 32)), (vec![2], None, Ok(())));
}
