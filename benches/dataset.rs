//! Time and memory of checking a dataset: `cargo bench --bench dataset -- [PICTURES] [SIDE]`.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark reports on stdout and stops at the first failure")]

use std::fmt::Write as _;
use std::time::Instant;

use finetune_api::plan::{DatasetConfig, OnBadSample};
use finetune_data::dataset::Dataset;
use finetune_store::{Store, StoreOptions};

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|a| a.parse::<u32>().ok());
    let (pictures, side) = (numbers.next().unwrap_or(10_000), numbers.next().unwrap_or(512));
    let dir = tempfile::tempdir().unwrap();
    let mut metadata = String::new();
    for n in 0..pictures {
        let picture = image::RgbImage::from_fn(side, side, |x, y| image::Rgb([(x / 2 + n) as u8, (y / 3) as u8, ((x * y) >> 9) as u8 ^ n as u8]));
        let mut bytes = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 90).encode_image(&picture).unwrap();
        std::fs::write(dir.path().join(format!("{n:06}.jpg")), bytes).unwrap();
        writeln!(metadata, "{{\"file_name\": \"{n:06}.jpg\", \"caption\": \"picture {n}\"}}").unwrap();
    }
    std::fs::write(dir.path().join("metadata.jsonl"), metadata).unwrap();
    let before = peak_memory_kib();
    let store = Store::open(dir.path().to_str().unwrap(), &StoreOptions::default()).unwrap();
    let config = DatasetConfig {
        uri: String::new(),
        caption: None,
        captions: None,
        metadata_file: None,
        image_column: None,
        caption_column: "caption".into(),
        repeats: 1,
        expected_digest: None,
        on_bad_sample: OnBadSample::Fail,
    };
    let start = Instant::now();
    let dataset = tokio::runtime::Runtime::new().unwrap().block_on(Dataset::scan(&store, &config)).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} pictures of {side}x{side} (JPEG): {seconds:.2} s, {:.0} a second, peak memory {} MiB (before the scan {} MiB)",
        dataset.samples.len(),
        f64::from(pictures) / seconds,
        peak_memory_kib() >> 10,
        before >> 10
    );
}

/// `VmHWM` of this process; 0 where the system does not report it.
fn peak_memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
