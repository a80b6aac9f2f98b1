//! Every committed case of the reference implementation passes, through the command line.
#![cfg(feature = "train")]

use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::*;

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/cases");

fn verify(dir: &Path) -> assert_cmd::assert::Assert {
    Command::new(env!("CARGO_BIN_EXE_finetune")).arg("verify").arg(dir).args(["--device", "cpu"]).assert()
}

#[test]
fn every_committed_case_passes_and_every_kind_is_there() {
    let output = verify(Path::new(CASES)).success();
    let text = String::from_utf8_lossy(&output.get_output().stdout).into_owned();
    for kind in ["train", "encode_prompt", "encode_image", "preprocess", "sample"] {
        assert!(text.contains(&format!("({kind}): passed")), "no case of kind {kind}:\n{text}");
    }
}

/// A copy of `name` in which the first element of every expected tensor is changed.
fn spoiled_copy(name: &str, dir: &Path) {
    let case = Path::new(CASES).join(name);
    for entry in std::fs::read_dir(&case).unwrap() {
        let path = entry.unwrap().path();
        let target = dir.join(path.file_name().unwrap());
        if path.is_dir() { std::os::unix::fs::symlink(&path, target).unwrap() } else { std::fs::copy(&path, target).map(|_| ()).unwrap() }
    }
    let file = dir.join("expected.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for value in bytes[8 + header..].chunks_exact_mut(4) {
        let x = f32::from_le_bytes(value.try_into().unwrap());
        value.copy_from_slice(&(x * 1.01 + 0.01).to_le_bytes());
    }
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, bytes).unwrap();
}

#[test]
fn a_wrong_number_fails_with_exit_code_1() {
    let dir = tempfile::tempdir().unwrap();
    spoiled_copy("train-sd3", dir.path());
    verify(dir.path()).code(1).stdout(predicate::str::contains("FAILED"));
}

#[test]
fn a_folder_without_cases_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    verify(dir.path()).code(1).stderr(predicate::str::contains("no case found"));
}

/// T5 by an independent second implementation, on weights that no reference case was made from.
#[test]
fn a_models_t5_agrees_with_candle_transformers() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/quickstart/bucket/models/tiny-sd3");
    let verify = |model: &Path| Command::new(env!("CARGO_BIN_EXE_finetune")).arg("verify").arg("--model").arg(model).args(["--device", "cpu"]).assert();
    verify(&model).success().stdout(predicate::str::contains("text_encoder_3").and(predicate::str::contains("ok")));
    verify(Path::new("/nonexistent")).failure().stderr(predicate::str::contains("/nonexistent"));
}
