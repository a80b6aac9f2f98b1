//! What a run accepts and does not train: it says so, in its summary and in `result.json`.

use serde_json::{Value, json};

use crate::support::{Bench, text};

fn short(changes: &Value) -> Value {
    let mut all = json!({"training": {"maxSteps": 1}});
    crate::support::merge(&mut all, changes);
    all
}

#[test]
fn captions_that_are_cut_are_counted_and_the_setting_that_keeps_them_is_named() {
    let bench = Bench::new();
    let output = bench.run(&short(&json!({"training": {"maxSequenceLength": 8}})));
    assert!(output.status.success(), "{}", text(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let captions = bench.result()["samples"].as_u64().unwrap();
    assert_eq!(bench.result()["truncatedCaptions"], captions);
    assert!(said.contains(&format!("{captions} of {captions} captions are longer than the 8 tokens that T5 reads")), "{said}");
    let fitting: u32 = said.split("training.maxSequenceLength: ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();

    // With that setting every caption is read to its end; with one token less the longest is not.
    for (length, cut) in [(fitting, false), (fitting - 1, true)] {
        let bench = Bench::new();
        let output = bench.run(&short(&json!({"training": {"maxSequenceLength": length}})));
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(bench.result()["truncatedCaptions"].as_u64().unwrap() > 0, cut, "{length}");
        assert_eq!(text(&output).contains("longer than"), cut, "{length}: {}", text(&output));
    }
}

#[test]
fn a_model_goes_without_t5_on_purpose_only() {
    let bench = Bench::new();
    let model = bench.bucket("models/micro");
    std::fs::remove_dir_all(model.join("text_encoder_3")).unwrap();
    let output = bench.run(&short(&json!({})));
    assert_eq!(output.status.code(), Some(66), "{}", text(&output));
    assert!(text(&output).contains("text_encoder_3/") && text(&output).contains("[null, null]"), "{}", text(&output));
    assert!(!bench.output("claims").exists(), "refused before anything is written");

    let index = model.join("model_index.json");
    let mut contents: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    for part in ["text_encoder_3", "tokenizer_3"] {
        contents[part] = json!([null, null]);
    }
    std::fs::write(&index, contents.to_string()).unwrap();
    let output = bench.run(&short(&json!({})));
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("leaves T5 out"), "{}", text(&output));
    assert_eq!(bench.result()["textEncoders"], json!(["CLIP-L", "CLIP-G"]));
}

#[test]
fn a_setting_that_trains_nothing_gets_a_warning() {
    let bench = Bench::new();
    let output = bench.run(&short(&json!({"training": {"optimizer": {"type": "Prodigy", "learningRate": "1e-4"}}})));
    assert!(output.status.success(), "{}", text(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("Prodigy's own estimate"), "{}", text(&output));
    assert!(bench.result()["warnings"][0].as_str().unwrap().starts_with("spec.training.optimizer.learningRate"), "{}", bench.result());
    let bench = Bench::new();
    bench.complete(&json!({"training": {"maxSequenceLength": 77}}));
    // Five steps of warm-up are less than forty, and every caption fits.
    assert_eq!(bench.result().get("warnings"), None);
}
