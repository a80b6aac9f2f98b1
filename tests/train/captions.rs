//! The forms of captions: each trains as the same captions in `metadata.jsonl` do, byte for byte.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Bench, LORA};

/// The lines of the dataset: file name and caption.
fn rows(bench: &Bench) -> Vec<(String, String)> {
    let line = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        (row["file_name"].as_str().unwrap().to_owned(), row["caption"].as_str().unwrap().to_owned())
    };
    fs::read_to_string(bench.bucket("data/metadata.jsonl")).unwrap().lines().map(line).collect()
}

fn write_rows(bench: &Bench, rows: impl Iterator<Item = Value>) {
    let lines: Vec<String> = rows.map(|row| row.to_string()).collect();
    fs::write(bench.bucket("data/metadata.jsonl"), lines.join("\n")).unwrap();
}

/// The LoRA of a few updates on a dataset that `change` has changed, and what the run reported.
fn lora(spec: &Value, change: impl FnOnce(&Bench)) -> (Vec<u8>, String) {
    let bench = Bench::new();
    change(&bench);
    let mut changes = json!({"training": {"maxSteps": 6}});
    crate::support::merge(&mut changes, spec);
    let output = bench.run(&changes);
    assert!(output.status.success(), "{}", crate::support::text(&output));
    (bench.read(LORA), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn text_files_and_tables_train_as_metadata_jsonl() {
    let (lines, log) = lora(&json!({}), |_| {});
    assert!(log.contains("captions: 6 from metadata.jsonl"), "{log}");
    let (texts, log) = lora(&json!({}), |bench| {
        for (name, caption) in rows(bench) {
            fs::write(bench.bucket(&format!("data/{}", name.replace(".png", ".txt"))), caption + "\n").unwrap();
        }
        fs::remove_file(bench.bucket("data/metadata.jsonl")).unwrap();
        fs::write(bench.bucket("data/notes.txt"), "not a caption").unwrap();
    });
    assert!(log.contains("captions: 6 from .txt") && log.contains("notes.txt"), "{log}");
    assert!(lines == texts);
    let (table, _) = lora(&json!({}), |bench| {
        let body: String = rows(bench).iter().fold(String::new(), |body, (name, caption)| body + &format!("\"{caption}\",{name}\n"));
        fs::remove_file(bench.bucket("data/metadata.jsonl")).unwrap();
        fs::write(bench.bucket("data/metadata.csv"), format!("caption,file_name\n{body}")).unwrap();
    });
    assert!(lines == table);
}

#[test]
fn one_caption_for_all_trains_as_that_caption_on_every_line() {
    let (lines, _) = lora(&json!({}), |bench| write_rows(bench, rows(bench).iter().map(|(name, _)| json!({"file_name": name, "caption": "a sks shape"}))));
    let (setting, log) = lora(&json!({"dataset": {"caption": "a sks shape"}}), |bench| fs::remove_file(bench.bucket("data/metadata.jsonl")).unwrap());
    assert!(log.contains("captions: 6 from dataset.caption"), "{log}");
    assert!(lines == setting);
}

/// Which caption is drawn follows from the place in the run: a killed run ends with the same LoRA.
#[test]
fn several_captions_are_drawn_anew_each_epoch_and_exactly_after_a_kill() {
    let several = |bench: &Bench| {
        write_rows(bench, rows(bench).iter().map(|(name, caption)| json!({"file_name": name, "caption": [caption, "a thing", format!("{caption}, flat")]})));
    };
    let changes = json!({"checkpoint": {"everySteps": 2}, "training": {"maxSteps": 14}});
    let whole = Bench::new();
    several(&whole);
    whole.complete(&changes);
    let killed = Bench::new();
    several(&killed);
    let mut running = killed.start(&changes, &[]);
    running.await_log("saved a checkpoint");
    running.signal("KILL");
    running.wait();
    killed.wipe_cache();
    killed.complete(&changes);
    assert!(whole.read(LORA) == killed.read(LORA));
    let first = Bench::new();
    first.complete(&changes);
    assert!(whole.read(LORA) != first.read(LORA), "the other captions are trained too");
}
