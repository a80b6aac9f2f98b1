//! Against Pillow (`reference/make_images.py`), and files that are damaged or hostile.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;
use crate::transform::{Augmentation, Transform, cover};
use finetune_common::digest::sha256;

fn golden(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "..", "tests", "golden", "images", name].iter().collect()
}

#[derive(serde::Deserialize)]
struct Expected {
    size: (u32, u32),
    sha256: String,
    transforms: Vec<ExpectedTransform>,
    #[serde(default)]
    center: Vec<(u32, u32, u32)>,
}

#[derive(serde::Deserialize)]
struct ExpectedTransform {
    resolution: u32,
    flip: bool,
    top: u32,
    left: u32,
    tensor: String,
}

fn expected() -> BTreeMap<String, Expected> {
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(golden("expected.json")).unwrap()).unwrap();
    serde_json::from_value(file["pictures"].clone()).unwrap()
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(golden(name)).unwrap()
}

/// Every byte: decoding, chroma upsampling, colour conversion, orientation, alpha, palettes, 16 bits.
#[test]
fn pictures_decode_to_pillows_bytes() {
    let mut wrong = Vec::new();
    for (name, want) in expected() {
        let bytes = read(&name);
        let picture = decode(&bytes, &ImageLimits::default()).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let stored = probe(&bytes, &ImageLimits::default()).unwrap();
        assert!(stored == want.size || (stored.1, stored.0) == want.size, "{name}");
        assert_eq!((picture.width, picture.height), want.size, "{name}");
        if hex::encode(sha256(&picture.data)) != want.sha256 {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "other bytes than Pillow's: {wrong:?}");
}

#[test]
fn resize_flip_and_crop_are_those_of_the_reference() {
    let file = std::fs::read(golden("expected.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    for (name, want) in expected() {
        let picture = decode(&read(&name), &ImageLimits::default()).unwrap();
        for case in want.transforms {
            let pixels = Transform { size: (case.resolution, case.resolution), flip: case.flip, top: case.top, left: case.left }.apply(&picture);
            let side = case.resolution as usize;
            let rows = tensors.tensor(&case.tensor).unwrap().data();
            for (i, value) in rows.iter().enumerate() {
                let (y, x, c) = (i / 3 / side, i / 3 % side, i % 3);
                let got = pixels.data[(c * side + y) * side + x];
                let want = (f32::from(*value) / 255.0 - 0.5) / 0.5;
                assert!((got - want).abs() < 1e-6, "{}: row {y}, column {x}, channel {c}: {got} for {want}", case.tensor);
            }
        }
        for (resolution, top, left) in want.center {
            let center = Transform::center((picture.width, picture.height), (resolution, resolution));
            assert_eq!((center.top, center.left, center.flip), (top, left, false), "{name}");
        }
    }
}

#[test]
fn random_crops_and_flips_are_drawn_once_per_copy_and_cover_all_places() {
    let (size, target) = ((131, 80), (64, 64));
    let (width, height) = cover(size, target);
    assert_eq!((width, height), (104, 64));
    let augmentation = Augmentation { center_crop: false, random_flip: true, seed: 42 };
    let digests: Vec<_> = (0..4000_u32).map(|n| sha256(&n.to_le_bytes())).collect();
    let drawn: Vec<Transform> = digests.iter().map(|d| augmentation.transform(d, size, target, 0)).collect();
    assert!(drawn.iter().all(|t| t.top == 0 && t.left <= width - 64));
    let mut columns = [0_u32; 41];
    for t in &drawn {
        columns[t.left as usize] += 1;
    }
    assert!(columns.iter().all(|n| (50..160).contains(n)), "{columns:?}");
    let flips = drawn.iter().filter(|t| t.flip).count();
    assert!((1850..2150).contains(&flips), "{flips}");
    // Named by content, copy and seed, and by nothing else.
    assert_eq!(drawn[7], augmentation.transform(&digests[7], size, target, 0));
    let different = |other: &dyn Fn(usize) -> Transform| (0..100).filter(|n| other(*n) != drawn[*n]).count();
    assert!(different(&|n| augmentation.transform(&digests[n], size, target, 1)) > 80);
    assert!(different(&|n| Augmentation { seed: 43, ..augmentation }.transform(&digests[n], size, target, 0)) > 80);
    let plain = Augmentation { center_crop: true, random_flip: false, ..augmentation };
    assert!((0..50).all(|copy| plain.transform(&digests[0], size, target, copy) == Transform::center(size, target)));
}

/// Each pixel of a picture that is as large as its target but for a border says where it comes from.
#[test]
fn rows_and_columns_of_a_picture_that_is_no_square_stay_where_they_are() {
    let (width, height) = (40, 24);
    let data: Vec<u8> = (0..height).flat_map(|y| (0..width).flat_map(move |x| [x as u8, y as u8, 9])).collect();
    let picture = RgbImage { width, height, data };
    for (size, top, left, flip) in [((40, 16), 5, 0, false), ((40, 16), 5, 0, true), ((32, 24), 0, 3, false), ((32, 24), 0, 3, true), ((40, 24), 0, 0, false)] {
        let pixels = Transform { size, flip, top, left }.apply(&picture);
        let (columns, rows) = (size.0 as usize, size.1 as usize);
        for (i, red) in pixels.data[..rows * columns].iter().enumerate() {
            let (x, y) = (i % columns, i / columns);
            let from = if flip { width as usize - 1 - left as usize - x } else { left as usize + x };
            let level = |v: f32| (v + 1.0) * 127.5;
            let green = pixels.data[rows * columns + i];
            assert!((level(*red) - from as f32).abs() < 1e-3 && (level(green) - (top as usize + y) as f32).abs() < 1e-3, "{size:?} {flip}: {x} {y}");
        }
    }
}

#[test]
fn every_size_can_be_cropped() {
    let augmentation = Augmentation { center_crop: false, random_flip: true, seed: 1 };
    for size in [(1, 1), (1, 30), (47, 48), (48, 48), (49, 1000), (333, 17)] {
        let picture = RgbImage { width: size.0, height: size.1, data: vec![7; (size.0 * size.1 * 3) as usize] };
        for target in [(48, 48), (32, 80), (96, 16)] {
            let pixels = augmentation.transform(&sha256(b"x"), size, target, 0).apply(&picture);
            assert_eq!((pixels.data.len() as u32, pixels.size), (3 * target.0 * target.1, target));
            assert!(pixels.data.iter().all(|v| (v - (7.0 / 127.5 - 1.0)).abs() < 1e-6), "{size:?} {target:?}");
        }
    }
}

/// 1 x 30,000 pixels at 512 would be 512 x 15 million pixels: only the crop is made.
#[test]
fn a_very_long_picture_costs_no_more_than_its_crop() {
    for (width, height) in [(1, 30_000), (30_000, 1)] {
        let data: Vec<u8> = (0..30_000_u32).flat_map(|i| [(i >> 8) as u8; 3]).collect();
        let picture = RgbImage { width, height, data };
        let pixels = Transform::center((width, height), (512, 512)).apply(&picture);
        assert!(pixels.data.iter().all(|v| (v - (58.0 / 127.5 - 1.0)).abs() < 0.01), "{:?}", &pixels.data[..4]);
    }
}

#[test]
fn cut_files_are_errors_wherever_they_are_cut() {
    for name in ["progressive-420.jpg", "restart-420.jpg", "lossy.webp", "lossless.webp", "palette.png"] {
        let bytes = read(name);
        for end in (0..bytes.len() - 12).step_by(37) {
            assert!(decode(&bytes[..end], &ImageLimits::default()).is_err(), "{name} cut at {end}");
        }
    }
}

/// No damage may panic, hang or allocate without bound; wrong pixels cannot always be noticed.
#[test]
fn damaged_files_never_panic() {
    let mut stream = finetune_common::rng::Stream::new(3, finetune_common::rng::Purpose::Noise, 0, 0);
    let limits = ImageLimits { max_pixels: 200_000, max_side: 2000 };
    for name in [
        "progressive-420.jpg",
        "progressive-444.jpg",
        "restart-420.jpg",
        "baseline-422.jpg",
        "cmyk.jpg",
        "grey-progressive.jpg",
        "alpha.png",
        "lossy.webp",
        "rle8.bmp",
        "animation.gif",
        "lzw.tif",
    ] {
        let bytes = read(name);
        for _ in 0..150 {
            let mut damaged = bytes.clone();
            for _ in 0..=stream.below(6) {
                let at = stream.below(damaged.len() as u64) as usize;
                damaged[at] = stream.next_u32() as u8;
            }
            drop(decode(&damaged, &limits));
        }
    }
}

#[test]
fn limits_hold_before_pixels_are_decoded() {
    for name in ["progressive-420.jpg", "lossless.webp", "palette.png", "rgb.bmp", "palette.gif", "lzw.tif"] {
        let bytes = read(name);
        for limits in [ImageLimits { max_pixels: 500, max_side: 1000 }, ImageLimits { max_pixels: 1 << 20, max_side: 20 }] {
            assert!(matches!(decode(&bytes, &limits), Err(ImageError::TooLarge { .. })), "{name}");
            assert!(matches!(probe(&bytes, &limits), Err(ImageError::TooLarge { .. })), "{name}");
        }
    }
    for bytes in [&b""[..], b"GIF89a", b"<svg/>", b"\x89PNG", b"BM", b"II*\0\x08\0\0\0"] {
        assert!(decode(bytes, &ImageLimits::default()).is_err());
    }
}

/// Files whose bytes would not be Pillow's.
#[test]
fn what_would_get_other_bytes_is_refused() {
    for (name, part) in [
        ("555.bmp", "16 bits per pixel"),
        ("565.bmp", "16 bits per pixel"),
        ("jpeg.tif", "JPEG inside"),
        ("cmyk.tif", "CMYK"),
        ("palette.tif", "failed to decode TIFF"),
    ] {
        let error = decode(&read(&format!("refused/{name}")), &ImageLimits::default()).unwrap_err().to_string();
        assert!(error.contains(part), "{name}: {error}");
    }
}

#[test]
fn sixteen_bit_grey_clips_as_pillow_does_unless_it_would_come_out_white() {
    let encode = |values: &[u16]| {
        let picture = image::ImageBuffer::<image::Luma<u16>, _>::from_raw(values.len() as u32, 1, values.to_vec()).unwrap();
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
        decode(&bytes.into_inner(), &ImageLimits::default()).unwrap().data
    };
    assert_eq!(encode(&[0, 9, 255]), [0, 0, 0, 9, 9, 9, 255, 255, 255]);
    assert_eq!(encode(&[0, 256, 65_535]), [0, 0, 0, 1, 1, 1, 255, 255, 255]);
}
