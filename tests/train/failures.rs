//! Each way to fail has its exit code and one message that says what is wrong.

use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};

use crate::support::{Bench, finetune, text};

fn fails(bench: &Bench, changes: &Value, code: i32, words: &[&str]) {
    check(&bench.run(changes), code, words);
}

fn check(output: &Output, code: i32, words: &[&str]) {
    assert_eq!(output.status.code(), Some(code), "{}", text(output));
    let stderr = String::from_utf8_lossy(&output.stderr);
    for word in words {
        assert!(stderr.contains(word), "{word:?} is missing: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[test]
fn every_bad_line_of_a_dataset_is_listed() {
    let bench = Bench::new();
    let lines = [
        r#"{"file_name": "00-red-circle.png", "caption": "fine"}"#,
        r#"{"file_name": "01-green-square.png"}"#,
        r#"{"file_name": "missing.png", "caption": "x"}"#,
        r#"{"file_name": "../escape.png", "caption": "x"}"#,
        r#"{"file_name": "02-blue-triangle.png", "caption": ""}"#,
        "not json",
        r#"{"file_name": "00-red-circle.png", "caption": "twice"}"#,
        r#"{"file_name": "broken.png", "caption": "x"}"#,
    ];
    std::fs::write(bench.bucket("data/metadata.jsonl"), lines.join("\n")).unwrap();
    std::fs::write(bench.bucket("data/broken.png"), b"\x89PNG no more").unwrap();
    let words = ["line 2", "line 3", "line 4", "line 5", "line 6", "line 7", "line 8", "04-orange-square.png", "InvalidDataset"];
    fails(&bench, &json!({}), 65, &words);
    assert!(!bench.output("claims").exists(), "nothing was claimed for it");
    // With Skip the rest is trained, and counted.
    bench.complete(&json!({"dataset": {"onBadSample": "Skip"}, "training": {"maxSteps": 1}}));
    assert_eq!(bench.result()["samples"], 1);
    assert!(bench.result()["skippedSamples"].as_u64().unwrap() >= 7);
    std::fs::remove_file(bench.bucket("data/metadata.jsonl")).unwrap();
    fails(&bench, &json!({"output": {"uri": "s3://test/none/"}}), 66, &["metadata.jsonl"]);
}

/// A weight that is not a number: loss and gradient are none either.
#[test]
fn divergence_ends_with_13_and_publishes_nothing() {
    let bench = Bench::new();
    bench.spoil_a_weight();
    fails(&bench, &json!({}), 13, &["diverged", "Diverged", "learningRate"]);
    assert!(!bench.output("result.json").exists());
}

#[test]
fn a_missing_or_damaged_model_ends_with_66() {
    let bench = Bench::new();
    fails(&bench, &json!({"model": {"source": {"objectStore": {"uri": "s3://test/models/none/"}}}}), 66, &["models/none"]);
    std::fs::write(bench.bucket("models/micro/transformer/diffusion_pytorch_model.safetensors"), b"short").unwrap();
    fails(&bench, &json!({}), 66, &["diffusion_pytorch_model.safetensors", "ModelLoadFailed"]);
}

#[test]
fn a_target_module_that_does_not_exist_is_named() {
    fails(&Bench::new(), &json!({"training": {"lora": {"targetModules": ["attn.to_q", "attn.to_w"]}}}), 78, &["attn.to_w", "InvalidConfig"]);
}

#[test]
fn storage_that_does_not_answer_ends_with_69() {
    let bench = Bench::new();
    let mut command = finetune();
    command.arg("run").arg(bench.manifest(&json!({"storage": {"endpoint": "http://127.0.0.1:9", "region": "here"}})));
    command.arg("--cache-dir").arg(bench.path("cache")).env("FINETUNE_STORAGE_RETRY_SECONDS", "1");
    command.env("AWS_ACCESS_KEY_ID", "nobody").env("AWS_SECRET_ACCESS_KEY", "nothing-worth-knowing");
    let output = command.output().unwrap();
    check(&output, 69, &["StorageUnavailable", "s3://test/out/"]);
    assert!(!text(&output).contains("nothing-worth-knowing"));
}

#[test]
fn command_lines_and_manifests_that_cannot_be_used_end_with_64() {
    let bench = Bench::new();
    check(&finetune().args(["run", "--no-such-flag"]).output().unwrap(), 64, &["--no-such-flag"]);
    check(&finetune().args(["run", "no-such-file.yaml"]).output().unwrap(), 64, &["no-such-file.yaml"]);
    // All violations at once, with their fields.
    fails(
        &bench,
        &json!({"training": {"batchSize": 0, "resolutoin": 64, "priorPreservation": {"classPrompt": " ", "images": 0, "weight": "101"}}, "output": {"uri": "ftp://x/"}}),
        64,
        &["batchSize", "resolutoin", "classPrompt", "images", "weight", "spec.output.uri"],
    );
    check(&bench.command(&json!({})).args(["--bucket", "nonsense"]).output().unwrap(), 64, &["nonsense"]);
    check(&bench.command(&json!({})).args(["--name", "other"]).output().unwrap(), 64, &["other", "micro"]);
    assert!(finetune().args(["run", "--help"]).output().unwrap().status.success());
}

/// The configuration that the operator would write.
fn config(bench: &Bench) -> Value {
    let text = std::fs::read_to_string(bench.manifest(&json!({}))).unwrap();
    let job = finetune_api::validate::manifest(&text).unwrap().remove(0);
    let plan = finetune_api::plan::resolve(&job.spec, "team-a", "micro", &finetune_api::plan::Facts::default()).unwrap();
    serde_json::to_value(plan.config).unwrap()
}

fn train(bench: &Bench, config: &Path) -> std::process::Command {
    let mut command = finetune();
    command.arg("train").arg("--config").arg(config).arg("--bucket").arg(format!("s3://test={}", bench.bucket("").display()));
    command.arg("--cache-dir").arg(bench.path("cache")).args(["--progress-address", "127.0.0.1:0"]);
    command.arg("--termination-log").arg(bench.path("termination"));
    command
}

#[test]
fn train_never_falls_back_to_the_cpu_and_leaves_its_last_words() {
    let bench = Bench::new();
    let path = bench.path("config.json");
    let mut config = config(&bench);
    std::fs::write(&path, config.to_string()).unwrap();
    let output = train(&bench, &path).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(output.stdout.is_empty(), "a pod's result is in the bucket");
    let words = finetune_api::Progress::parse(&std::fs::read(bench.path("termination")).unwrap()).unwrap();
    assert!(words.succeeded() && words.step == 40 && words.artifacts.len() == 2, "{words:?}");
    assert_eq!(words.last_checkpoint.unwrap().step, 40);

    config["device"] = json!("Gpu");
    config["output"]["uri"] = json!("s3://test/gpu/");
    config["checkpoint"]["uri"] = json!("s3://test/gpu/.checkpoints/x/");
    std::fs::write(&path, config.to_string()).unwrap();
    if !finetune_train::device::has_gpu_code() {
        check(&train(&bench, &path).output().unwrap(), 71, &["GPUUnavailable", "perReplica"]);
        let words = finetune_api::Progress::parse(&std::fs::read(bench.path("termination")).unwrap()).unwrap();
        assert_eq!(words.failure().unwrap().exit_code, 71);
    }

    // A field of a newer operator is reported and left out.
    config["surprise"] = json!(1);
    std::fs::write(&path, config.to_string()).unwrap();
    if !finetune_train::device::has_gpu_code() {
        check(&train(&bench, &path).output().unwrap(), 71, &["surprise", "GPUUnavailable"]);
    }
    config["training"]["batchSize"] = json!("many");
    std::fs::write(&path, config.to_string()).unwrap();
    check(&train(&bench, &path).output().unwrap(), 78, &["many"]);
}

/// `finetune run` with the same manifest takes the CPU where there is no GPU, and says so.
#[test]
fn run_takes_the_cpu_with_a_notice() {
    let bench = Bench::new();
    let output = bench.run(&json!({"scheduling": {"gpu": {"perReplica": 1}}, "training": {"maxSteps": 1}}));
    assert!(output.status.success(), "{}", text(&output));
    if !finetune_train::device::has_gpu_code() {
        assert!(text(&output).contains("training on the CPU"), "{}", text(&output));
        let output = bench.command(&json!({"output": {"uri": "s3://test/cuda/"}})).args(["--device", "cuda"]).output().unwrap();
        check(&output, 71, &["GPUUnavailable"]);
    }
}
