//! Runs in aspect-ratio buckets: whole, killed and resumed, and refused.

use std::fmt::Write as _;

use finetune_common::rng::{Purpose, Stream};
use image::{Rgb, RgbImage};
use serde_json::{Value, json};

use crate::support::{Bench, LORA, copy, text};

/// Sizes of the dataset's pictures and, at 64 pixels with a step of 16, their buckets.
const PICTURES: [((u32, u32), &str); 9] = [
    ((400, 300), "64 x 48"),
    ((300, 400), "48 x 64"),
    ((800, 600), "64 x 48"),
    ((960, 540), "80 x 48"),
    ((1000, 1000), "64 x 64"),
    ((540, 960), "48 x 80"),
    ((640, 480), "64 x 48"),
    ((40, 60), "32 x 48"),
    ((1200, 900), "64 x 48"),
];

/// A bench whose dataset is these pictures, none a square.
fn bench() -> Bench {
    let bench = Bench::new();
    std::fs::remove_dir_all(bench.bucket("data")).unwrap();
    std::fs::create_dir_all(bench.bucket("data")).unwrap();
    let mut lines = String::new();
    for (i, ((width, height), _)) in PICTURES.iter().enumerate() {
        let mut random = Stream::new(77, Purpose::Noise, i as u64, 0);
        let [red, green, blue] = [0; 3].map(|_: u8| random.next_u32());
        let colour = |x: u32, y: u32| Rgb([(red + 255 * x / width) as u8, (green + 255 * y / height) as u8, (blue + x + y) as u8]);
        RgbImage::from_fn(*width, *height, colour).save(bench.bucket(&format!("data/{i}.png"))).unwrap();
        let _infallible = writeln!(lines, "{}", json!({"file_name": format!("{i}.png"), "caption": format!("picture {i}")}));
    }
    std::fs::write(bench.bucket("data/metadata.jsonl"), lines).unwrap();
    bench
}

fn buckets(changes: &Value) -> Value {
    let mut all = json!({"training": {"maxSteps": 24, "resolution": 64, "buckets": {"step": 16}}, "checkpoint": {"everySteps": 3}});
    crate::support::merge(&mut all, changes);
    all
}

#[test]
fn a_run_in_buckets_that_is_killed_and_resumed_gives_the_same_files() {
    let whole = bench();
    let output = whole.run(&buckets(&json!({})));
    assert!(output.status.success(), "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("6 buckets: 32 x 48 (1 picture), 48 x 64 (1), 48 x 80 (1), 64 x 48 (4), 64 x 64 (1), 80 x 48 (1)"), "{said}");
    let metrics = String::from_utf8(whole.read("metrics.jsonl")).unwrap();
    assert!(metrics.lines().count() > 24);

    let mut random = Stream::new(4, Purpose::Jitter, 0, 0);
    let mut resumed = 0;
    for round in 0..4 {
        let killed = bench();
        let mut running = killed.start(&buckets(&json!({})), &[]);
        running.await_log("saved a checkpoint");
        std::thread::sleep(std::time::Duration::from_secs_f64(0.4 * random.uniform_f64()));
        running.signal("KILL");
        running.wait();
        killed.wipe_cache();
        let mut second = killed.start(&buckets(&json!({})), &[]);
        assert_eq!(second.wait(), Some(0), "round {round}: {}", second.log());
        resumed += u32::from(second.log().contains("resuming from a checkpoint"));
        assert!(killed.read(LORA) == whole.read(LORA), "round {round}: the LoRA differs");
        assert!(killed.read("micro.safetensors") == whole.read("micro.safetensors"), "round {round}: the kohya file differs");
    }
    assert!(resumed >= 2, "only {resumed} of 4 runs had a checkpoint to resume from");
}

#[test]
fn buckets_train_something_else_than_squares_and_their_files_say_so() {
    let (square, bucketed) = (bench(), bench());
    copy(&square.bucket("data"), &bucketed.bucket("held-out"));
    let validation = json!({"prompts": ["a picture"], "datasetUri": "s3://test/held-out/", "everySteps": 1000, "steps": 2});
    square.complete(&json!({"training": {"maxSteps": 3, "resolution": 64}}));
    bucketed.complete(&buckets(&json!({"training": {"maxSteps": 3, "flowMatching": {"shift": "ByResolution"}}, "validation": validation})));
    assert_ne!(square.read(LORA), bucketed.read(LORA));

    let header = |bench: &Bench| {
        let bytes = bench.read("micro.safetensors");
        safetensors::SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone().unwrap()
    };
    assert!(!header(&square).contains_key("ss_enable_bucket"));
    let header = header(&bucketed);
    let words = ["ss_enable_bucket", "ss_bucket_no_upscale", "ss_min_bucket_reso", "ss_max_bucket_reso"].map(|key| &*header[key]);
    assert_eq!(words, ["True", "True", "None", "None"]);
    let info: Value = serde_json::from_str(&header["ss_bucket_info"]).unwrap();
    // Counted with repeats, as kohya's scripts do.
    assert_eq!((&info["buckets"]["3"], info["buckets"].as_object().unwrap().len()), (&json!({"resolution": [64, 48], "count": 8}), 6));
    let page = String::from_utf8(bucketed.read("report.html")).unwrap();
    assert!(page.contains("<th scope=\"row\">80 × 48</th>") && !String::from_utf8(square.read("report.html")).unwrap().contains("<h2>Buckets</h2>"));
    assert!(String::from_utf8(bucketed.read("README.md")).unwrap().contains("| buckets | 32 x 48 (1), 48 x 64 (1),"));
    // Held-out pictures are compared in their own shapes.
    assert_eq!(bucketed.result()["comparison"]["pictures"], 9);
}

#[test]
fn what_fits_no_bucket_or_no_model_is_refused_before_anything_is_prepared() {
    for (training, code, part) in [
        (json!({"buckets": {"step": 64}}), 78, "training.buckets: 8 pictures are"),
        (json!({"resolution": 128, "buckets": {"upscale": true, "step": 16, "minSize": 16, "maxSize": 144}}), 78, "buckets have sides up to 144 pixels"),
        (json!({"buckets": {"step": 16}, "priorPreservation": {"classPrompt": "a dog"}}), 64, "exclude each other"),
    ] {
        let bench = bench();
        let output = bench.run(&buckets(&json!({ "training": training })));
        let said = text(&output);
        assert!(said.contains(part) && !said.contains("encoding"), "{said}");
        assert_eq!(output.status.code(), Some(code), "{said}");
    }
    // A picture whose bucket is longer than the model's table.
    let bench = bench();
    RgbImage::from_pixel(1600, 100, Rgb([9; 3])).save(bench.bucket("data/0.png")).unwrap();
    let output = bench.run(&buckets(&json!({})));
    let said = text(&output);
    assert!(said.contains("1 picture is (\"0.png (1600 x 100)\") in buckets with a side beyond 128 pixels"), "{said}");
    assert_eq!(output.status.code(), Some(78), "{said}");
}
