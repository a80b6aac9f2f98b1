//! `output.existing`, and datasets that change.

use serde_json::json;

use crate::support::{Bench, LORA, copy, text};

/// Few steps: what is trained does not matter here.
fn short() -> serde_json::Value {
    json!({"training": {"maxSteps": 3}})
}

fn with(mut changes: serde_json::Value, more: &serde_json::Value) -> serde_json::Value {
    crate::support::merge(&mut changes, more);
    changes
}

#[test]
fn a_complete_output_is_reused_and_repaired() {
    let bench = Bench::new();
    bench.complete(&short());
    let (lora, result) = (bench.read(LORA), bench.read("result.json"));
    std::fs::remove_file(bench.output("micro.safetensors")).unwrap();
    std::fs::write(bench.output(LORA), b"damaged").unwrap();
    let output = bench.run(&short());
    assert!(output.status.success(), "{}", text(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("trained already"), "{}", text(&output));
    assert!(bench.read(LORA) == lora && bench.read("result.json") == result);
    assert!(bench.output("micro.safetensors").exists());
    assert_eq!(bench.claims(), 1, "nothing was claimed");

    // What cannot be repaired is reported, not guessed.
    std::fs::write(bench.output(LORA), b"damaged").unwrap();
    std::fs::write(bench.output(&format!("runs/e1/{LORA}")), b"damaged too").unwrap();
    let output = bench.run(&short());
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("damaged"), "{}", text(&output));
}

#[test]
fn fail_refuses_any_result_and_overwrite_replaces_it() {
    let bench = Bench::new();
    bench.complete(&short());
    let first = bench.read(LORA);
    let output = bench.run(&with(short(), &json!({"output": {"existing": "Fail"}})));
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("OutputExists") && text(&output).contains("Overwrite"), "{}", text(&output));

    let other_seed = with(short(), &json!({"training": {"seed": 7}}));
    let output = bench.run(&other_seed);
    assert_eq!(output.status.code(), Some(78), "another spec: {}", text(&output));
    assert!(bench.read(LORA) == first, "nothing was touched");
    bench.complete(&with(other_seed, &json!({"output": {"existing": "Overwrite"}})));
    assert!(bench.read(LORA) != first);
    assert_eq!(bench.result()["attempt"], 2);
    // The same again is trained again.
    bench.complete(&with(short(), &json!({"output": {"existing": "Overwrite"}})));
    assert!(bench.read(LORA) == first);
    assert_eq!(bench.result()["attempt"], 3);
}

#[test]
fn files_of_another_origin_are_not_overwritten() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.output("")).unwrap();
    std::fs::write(bench.output(LORA), b"somebody's work").unwrap();
    let output = bench.run(&short());
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains(LORA), "{}", text(&output));
    assert_eq!(bench.read(LORA), b"somebody's work");
}

#[test]
fn a_changed_dataset_is_noticed_before_and_after_completion() {
    // While the run is not complete: the checkpoints belong to the old dataset.
    let bench = Bench::new();
    let mut running = bench.start(&json!({}), &[]);
    running.await_log("saved a checkpoint");
    running.signal("TERM");
    assert_eq!(running.wait(), Some(75));
    let metadata = std::fs::read_to_string(bench.bucket("data/metadata.jsonl")).unwrap();
    std::fs::write(bench.bucket("data/metadata.jsonl"), metadata.replace("a red circle", "a red square")).unwrap();
    let output = bench.run(&json!({}));
    assert_eq!(output.status.code(), Some(65), "{}", text(&output));
    assert!(text(&output).contains("DatasetChanged"), "{}", text(&output));
    // A picture counts as well as a caption.
    std::fs::write(bench.bucket("data/metadata.jsonl"), &metadata).unwrap();
    std::fs::copy(bench.bucket("data/01-green-square.png"), bench.bucket("data/00-red-circle.png")).unwrap();
    let output = bench.run(&json!({}));
    assert_eq!(output.status.code(), Some(65), "{}", text(&output));
    // With the old dataset back, the run goes on.
    copy(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dataset"), &bench.bucket("data"));
    bench.complete(&json!({}));

    // After completion: the result is of another dataset.
    std::fs::copy(bench.bucket("data/01-green-square.png"), bench.bucket("data/00-red-circle.png")).unwrap();
    let output = bench.run(&json!({}));
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("another dataset"), "{}", text(&output));
}

#[test]
fn a_pinned_digest_is_held() {
    let bench = Bench::new();
    bench.complete(&short());
    let digest = bench.result()["datasetDigest"].as_str().unwrap().to_owned();
    let pinned = |digest: &str| json!({"training": {"maxSteps": 3}, "dataset": {"expectedDigest": digest}, "output": {"uri": "s3://test/pinned/"}});
    bench.complete(&pinned(&digest));
    let other = bench.run(&with(pinned(&format!("sha256:{}", "0".repeat(64))), &json!({"output": {"uri": "s3://test/other/"}})));
    assert_eq!(other.status.code(), Some(65), "{}", text(&other));
    assert!(text(&other).contains(&digest), "{}", text(&other));
}

/// Other weights under the same name: the numbers of the last tensor.
fn change_the_model(bench: &Bench) -> Vec<u8> {
    let path = bench.bucket("models/micro/transformer/diffusion_pytorch_model.safetensors");
    let before = std::fs::read(&path).unwrap();
    let mut changed = before.clone();
    let end = changed.len();
    changed[end - 2] ^= 1;
    std::fs::write(&path, changed).unwrap();
    before
}

#[test]
fn a_changed_base_model_is_noticed_before_and_after_completion() {
    let bench = Bench::new();
    let mut running = bench.start(&json!({}), &[]);
    running.await_log("saved a checkpoint");
    running.signal("TERM");
    assert_eq!(running.wait(), Some(75));
    let model = change_the_model(&bench);
    let output = bench.run(&json!({}));
    assert_eq!(output.status.code(), Some(65), "{}", text(&output));
    assert!(text(&output).contains("ModelChanged"), "{}", text(&output));
    // With the old model back, the run goes on.
    std::fs::write(bench.bucket("models/micro/transformer/diffusion_pytorch_model.safetensors"), model).unwrap();
    bench.complete(&json!({}));
    assert!(bench.result()["modelDigest"].as_str().unwrap().starts_with("sha256:"));

    // After completion: the result is of another model.
    change_the_model(&bench);
    let output = bench.run(&json!({}));
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("another base model"), "{}", text(&output));
    // What is beside the model does not matter.
    let other = Bench::new();
    other.complete(&short());
    std::fs::write(other.bucket("models/micro/README.md"), b"words").unwrap();
    other.complete(&short());
    assert_eq!(other.claims(), 1, "nothing was trained again");
}

/// A run that an earlier version began did not record its model: it goes on, and records it.
#[test]
fn an_identity_without_a_model_is_completed() {
    let bench = Bench::new();
    let long = json!({"training": {"maxSteps": 4000}});
    let mut running = bench.start(&long, &[]);
    running.await_log("saved a checkpoint");
    running.signal("TERM");
    assert_eq!(running.wait(), Some(75));
    let path = bench.files(".checkpoints").into_iter().map(|(path, _)| path).find(|path| path.ends_with("identity.json")).unwrap();
    let read = || serde_json::from_slice::<serde_json::Value>(&std::fs::read(&path).unwrap()).unwrap();
    let (written, mut old) = (read(), read());
    for field in ["version", "modelDigest", "run"] {
        assert!(old.as_object_mut().unwrap().remove(field).is_some());
    }
    std::fs::write(&path, old.to_string()).unwrap();
    let mut running = bench.start(&long, &[]);
    running.await_log("an earlier version began this run");
    running.await_log("resuming from a checkpoint");
    running.signal("TERM");
    assert_eq!(running.wait(), Some(75), "{}", running.log());
    assert_eq!((&read()["version"], &read()["modelDigest"]), (&written["version"], &written["modelDigest"]));
    change_the_model(&bench);
    let output = bench.run(&long);
    assert_eq!(output.status.code(), Some(65), "{}", text(&output));
}

/// The result is found before a GPU is asked for: a job that is restored from a backup takes none.
#[test]
fn what_is_done_needs_no_gpu() {
    let bench = Bench::new();
    bench.complete(&short());
    let output = bench.command(&with(short(), &json!({"scheduling": {"gpu": {"perReplica": 1}}}))).args(["--device", "cuda"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("trained already"), "{}", text(&output));
}
