//! Prior preservation: class pictures drawn by the base model, once, and trained along.

use std::path::Path;

use finetune_common::rng::{Purpose, Stream};
use finetune_model::ModelDir;
use finetune_model::lora::LoraState;
use finetune_model::sample::{Denoise, Pipeline, PipelineSettings};
use image::RgbImage;
use serde_json::{Value, json};

use crate::support::{Bench, LORA, copy, finetune, merge, reference, text};

const DRAWING: &str = "drawing class pictures";

fn prior(changes: &Value) -> Value {
    let mut prior = json!({"classPrompt": "a shape", "images": 10});
    merge(&mut prior, changes);
    json!({"training": {"priorPreservation": prior}})
}

/// How many class pictures the run has drawn.
fn drawn(log: &str) -> Option<u64> {
    let line = log.lines().find(|line| line.contains(DRAWING))?;
    serde_json::from_str::<Value>(line).unwrap()["total"].as_u64()
}

fn records(bench: &Bench) -> Vec<Value> {
    let lines = String::from_utf8(bench.read("metrics.jsonl")).unwrap();
    lines.lines().map(|l| serde_json::from_str(l).unwrap()).filter(|r: &Value| r["loss"].is_number()).collect()
}

#[test]
fn class_pictures_are_trained_with_their_weight() {
    let run = |changes: &Value| {
        let bench = Bench::new();
        bench.complete(&prior(changes));
        (bench.read(LORA), records(&bench))
    };
    let (whole, records) = run(&json!({}));
    let (half, half_records) = run(&json!({"weight": "0.5"}));
    assert!(whole != reference().0, "class pictures must matter");
    assert!(whole != half, "their weight must matter");
    // The first update has the same weights in both, so its losses differ by the weight alone.
    let (first, half_first) = (&records[0], &half_records[0]);
    let number = |value: &Value| value.as_f64().unwrap();
    assert_eq!(first["priorLoss"], half_first["priorLoss"]);
    let expected = number(&first["loss"]) - 0.5 * number(&first["priorLoss"]);
    assert!((number(&half_first["loss"]) - expected).abs() < 1e-12 * expected, "{first} {half_first}");
    // An epoch has 6 x 2 copies, or as many items as class pictures where those are more.
    assert!((number(&records[39]["epoch"]) - 20.0).abs() < 1e-9, "{}", records[39]);
    let (_, many) = run(&json!({"images": 24}));
    assert!((number(&many[38]["epoch"]) - 13.0).abs() < 1e-9, "three updates of four batches of two in each epoch: {}", many[38]);
    // How many are drawn at once does not change a bit of a picture.
    for size in [1, 3, 64] {
        assert!(run(&json!({"sampleBatchSize": size})).0 == whole, "{size} at once");
    }
}

#[test]
fn class_pictures_are_drawn_once_and_only_those_that_are_missing() {
    let bench = Bench::new();
    let mut count = 0;
    let mut run = |changes: &Value, training: &Value| {
        count += 1;
        let mut spec = prior(changes);
        merge(&mut spec, &json!({"training": {"maxSteps": 2}, "output": {"uri": format!("s3://test/out/{count}/")}}));
        merge(&mut spec, &json!({"training": training}));
        let output = bench.run(&spec);
        assert!(output.status.success(), "{}", text(&output));
        drawn(&text(&output))
    };
    assert_eq!(run(&json!({}), &json!({})), Some(10));
    // Neither weight, batch nor learning rate decides a picture.
    assert_eq!(run(&json!({"weight": "0.1", "sampleBatchSize": 2}), &json!({"optimizer": {"learningRate": "1e-3"}, "batchSize": 1})), None);
    assert_eq!(run(&json!({"images": 13}), &json!({})), Some(3));
    assert_eq!(run(&json!({"images": 4}), &json!({})), None);
    assert_eq!(run(&json!({"classPrompt": "a circle"}), &json!({})), Some(10));
    assert_eq!(run(&json!({}), &json!({"seed": 7})), Some(10));
    // Another base model draws other pictures.
    let path = bench.bucket("models/micro/transformer/diffusion_pytorch_model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 2] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(run(&json!({}), &json!({})), Some(10));
}

/// Stopped while drawing, then on an empty disk: the pictures beside the checkpoints are not drawn again, and the LoRA is the same.
#[test]
fn a_run_stopped_while_drawing_goes_on_with_the_pictures_that_it_has() {
    let changes = prior(&json!({"images": 300, "sampleBatchSize": 2}));
    let undisturbed = Bench::new();
    undisturbed.complete(&changes);
    let bench = Bench::new();
    let mut missing = 300;
    for _ in 0..2 {
        let mut running = bench.start(&changes, &[]);
        // The first pictures are there.
        running.await_log("\"message\":\"preparing\"");
        running.signal("TERM");
        assert_eq!(running.wait(), Some(75), "{}", running.log());
        assert_eq!(drawn(&running.log()), Some(missing), "{}", running.log());
        bench.wipe_cache();
        let left = drawn_by_dry_run(&bench, &changes);
        assert!(left < missing, "{left} of {missing} are left");
        missing = left;
    }
    let mut last = bench.start(&changes, &[]);
    assert_eq!(last.wait(), Some(0), "{}", last.log());
    assert_eq!(drawn(&last.log()), Some(missing), "{}", last.log());
    assert!(bench.read(LORA) == undisturbed.read(LORA), "the LoRA differs");
}

/// How many pictures the next run would draw: it is stopped as soon as it says so, before it has drawn any.
fn drawn_by_dry_run(bench: &Bench, changes: &Value) -> u64 {
    let mut running = bench.start(changes, &[]);
    running.await_log(DRAWING);
    running.signal("KILL");
    running.wait();
    bench.wipe_cache();
    drawn(&running.log()).unwrap()
}

/// Killed at random instants, in preparation and in training, each time followed by an empty disk.
#[test]
fn a_killed_run_gives_the_same_files() {
    let changes = prior(&json!({"images": 60}));
    let undisturbed = Bench::new();
    let begin = std::time::Instant::now();
    undisturbed.complete(&changes);
    let duration = begin.elapsed();
    let mut random = Stream::new(22, Purpose::Jitter, 0, 0);
    for round in 0..6 {
        let bench = Bench::new();
        let mut running = bench.start(&changes, &[]);
        std::thread::sleep(duration.mul_f64(0.1 + 0.8 * random.uniform_f64()));
        running.signal("KILL");
        running.wait();
        bench.wipe_cache();
        bench.complete(&changes);
        assert!(bench.read(LORA) == undisturbed.read(LORA), "round {round}: the LoRA differs");
    }
}

/// The quickstart's model taught with and without prior preservation: what the base model draws for the class prompt changes far less with it,
/// and what it draws for its other captions does not change more.
#[test]
fn the_base_models_own_pictures_change_less() {
    const CLASS: &str = "robot, noto style";
    const OTHERS: [&str; 3] = ["red apple, noto style", "rocket, flat style", "pizza, noto style"];
    let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/quickstart");
    let dir = tempfile::tempdir().unwrap();
    let bucket = dir.path().join("bucket");
    copy(&quickstart.join("bucket/models"), &bucket.join("models"));
    copy(&quickstart.join("bucket/datasets"), &bucket.join("datasets"));
    let manifest = std::fs::read_to_string(quickstart.join("job.yaml")).unwrap();
    let mut job: Value = serde_json::to_value(finetune_api::validate::manifest(&manifest).unwrap().remove(0)).unwrap();
    merge(&mut job["spec"], &json!({"training": {"maxSteps": 150, "batchSize": 4}, "scheduling": {"gpu": {"perReplica": 0}}}));
    job["spec"].as_object_mut().unwrap().remove("validation");
    let side = job["spec"]["training"]["resolution"].as_u64().unwrap() as u32;
    let length = job["spec"]["training"]["maxSequenceLength"].as_u64().unwrap() as usize;
    let settings = PipelineSettings {
        denoise: Denoise { steps: 20, guidance_scale: 4.0, ..Denoise::default() },
        negative_prompt: String::new(),
        max_sequence_length: length,
        // Noise that no class picture has.
        seed: 1,
        width: side,
        height: side,
    };
    let prompts: Vec<String> = [CLASS, CLASS].into_iter().chain(OTHERS).map(str::to_owned).collect();
    let change = |name: &str, prior: Value| {
        let mut job = job.clone();
        merge(&mut job["spec"], &json!({"output": {"uri": format!("s3://quickstart/loras/{name}/")}, "training": {"priorPreservation": prior}}));
        let path = dir.path().join("job.yaml");
        std::fs::write(&path, job.to_string()).unwrap();
        let mut command = finetune();
        command.arg("run").arg(&path).arg("--bucket").arg(format!("s3://quickstart={}", bucket.display())).arg("--cache-dir").arg(dir.path().join("cache"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let model = ModelDir::open(&bucket.join("models/tiny-sd3")).unwrap();
        let lora = LoraState::open(&bucket.join("loras").join(name).join(LORA)).unwrap();
        let pipeline = Pipeline::open(&model, &finetune_compute::kernels::Engine::cpu()).unwrap().with_lora(lora, 1.0);
        let pictures = pipeline.run(&prompts, &[0.0, 1.0], &settings, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
        let distances: Vec<f64> = pictures[0].iter().zip(&pictures[1]).map(|(base, lora)| distance(base, lora)).collect();
        let mean = |d: &[f64]| d.iter().sum::<f64>() / d.len() as f64;
        (mean(&distances[..2]), mean(&distances[2..]))
    };
    let (class, others) = change("plain", Value::Null);
    let (class_with, others_with) = change("prior", json!({"classPrompt": CLASS, "images": 16}));
    assert!(class > 0.05, "without it the LoRA changes the class: {class}");
    assert!(class_with < 0.6 * class, "class prompt: {class_with} with, {class} without");
    assert!(others_with < others, "other captions: {others_with} with, {others} without");
}

/// Root mean square difference of values in [0, 1].
fn distance(a: &RgbImage, b: &RgbImage) -> f64 {
    let sum: f64 = a.as_raw().iter().zip(b.as_raw()).map(|(x, y)| ((f64::from(*x) - f64::from(*y)) / 255.0).powi(2)).sum();
    (sum / a.as_raw().len() as f64).sqrt()
}
