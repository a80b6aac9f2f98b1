//! A run deletes only what it wrote itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::{Bench, LORA, merge, text};

/// Names that somebody's files may have where a run writes and deletes; many are nearly those of a run.
const FOREIGN: [&str; 26] = [
    "base-model.safetensors",
    "sd3/model_index.json",
    "sd3/vae/diffusion_pytorch_model.safetensors",
    "loras/older/pytorch_lora_weights.safetensors",
    "result.json.bak",
    "old/identity.json",
    "old/result.json",
    "prepared/notes.txt",
    "prepared/0123.safetensors",
    "prepared/sub/x.safetensors",
    "logs/metrics.jsonl",
    "logs/e01/metrics.jsonl",
    "logs/e1/train.log",
    "logs/e1/events.out.tfevents.1700000000.host",
    "pictures/cat.png",
    "pictures/validation/step-5/0.png",
    "pictures/validation/step-000005/cat.png",
    "step-5/e1/lora.safetensors",
    "step-000005/lora.safetensors",
    "step-000005/e01/lora.safetensors",
    "step-000005/e1/notes.txt",
    "step-000005/e1/adapter.safetensors",
    "step-000005/e1/sub/state.json",
    "checkpoint-500/optimizer.bin",
    "runs/Nov30/events.out.tfevents.1700000000.host",
    "claims/notes.txt",
];

/// Every call that deletes a file or an object, or puts one in another's place, in code that is not a test: what it can take.
const DELETIONS: [(&str, &str, &str); 20] = [
    ("src/compute/build.rs", "remove_file", "an image that this build has made"),
    ("src/data/src/cache.rs", "remove_file", "a pack of the cache whose content is not what its name promises"),
    ("src/data/src/cache.rs", "remove_file", "as above, when the cache is opened"),
    ("src/data/src/pack.rs", ".persist(", "a pack: a pack of the same name has the same content"),
    ("src/data/src/pack.rs", "remove_file", "an abandoned .partial- file of the cache"),
    ("src/model/src/digest.rs", ".persist(", "a remembered digest"),
    ("src/model/src/sample/picture.rs", ".persist(", "the picture that `finetune sample --out` names"),
    ("src/operator/src/reconcile/apply.rs", ".delete(", "the job's own batch Job, by UID and resource version"),
    ("src/operator/src/reconcile/apply.rs", ".delete(", "a finished FineTuneJob, by UID, as its ttlScope says"),
    ("src/store/src/download.rs", "fs::rename", "a download's .part file becomes the file"),
    ("src/store/src/download.rs", "remove_file", "a download's .part file and its notes"),
    ("src/store/src/lib.rs", ".delete(", "Store::delete itself"),
    ("src/store/src/model_source/arranged.rs", ".persist(", "a small file in the folder of links that the cache keeps for a model"),
    ("src/store/src/model_source/arranged.rs", "fs::rename", "a link in that folder, in place of a link to another file"),
    ("src/store/src/model_source/digests.rs", ".persist(", "remembered digests"),
    ("src/store/src/model_source/mod.rs", ".persist(", "a remembered listing"),
    ("src/train/src/checkpoint/mod.rs", "store.delete(", "keys of this run alone: the tests below"),
    ("src/train/src/gc.rs", ".delete(", "what its own tests list, by exact form or by a list that a run has left, under a claim"),
    ("src/train/src/publish.rs", ".delete(", "a result.json of this program: the tests below"),
    ("src/train/src/publish.rs", ".delete(", "a README.md whose digest the replaced result.json has: the tests below"),
];

/// A new place that deletes must be entered above, with what keeps it from taking what is somebody else's.
#[test]
fn every_place_that_deletes_is_known() {
    let mut found = Vec::new();
    let mut pending = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") && !path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests")) {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
                let name = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().display().to_string();
                for word in ["remove_file", "remove_dir", "fs::rename", ".persist(", ".delete(", ".delete_stream(", ".rename("] {
                    // Checkpoints are deleted through one function.
                    let own = code.matches("this.delete(").count() + code.matches("self.delete(").count();
                    let count = code.matches(word).count() - if word == ".delete(" { own } else { 0 };
                    found.extend(std::iter::repeat_n((name.clone(), word), count));
                }
            }
        }
    }
    found.sort();
    let mut known: Vec<(String, &str)> = DELETIONS.iter().map(|(file, word, _)| ((*file).to_owned(), word.trim_start_matches("store"))).collect();
    known.sort();
    assert_eq!(found, known);
}

fn plant(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files: BTreeMap<PathBuf, Vec<u8>> = FOREIGN.iter().map(|name| (folder.join(name), format!("precious: {name}").into_bytes())).collect();
    for (path, content) in &files {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    files
}

fn assert_there(files: &BTreeMap<PathBuf, Vec<u8>>, when: &str) {
    for (path, content) in files {
        assert!(std::fs::read(path).is_ok_and(|found| found == *content), "{when}: {} is gone or changed", path.display());
    }
}

fn with(changes: &[Value]) -> Value {
    let mut all = json!({"checkpoint": {"uri": "s3://test/shared/", "everySteps": 2, "keepLast": 1}, "training": {"maxSteps": 9}});
    changes.iter().for_each(|change| merge(&mut all, change));
    all
}

/// Files below `folder`, without those of `files`.
fn others(folder: &Path, files: &BTreeMap<PathBuf, Vec<u8>>) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![folder.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if !files.contains_key(&path) {
                found.push(path);
            }
        }
    }
    found
}

/// Retention, `resume.policy: Never`, success, and what is found after it: all the ways in which checkpoints are deleted.
#[test]
fn what_others_keep_in_the_checkpoint_folder_stays_and_is_counted() {
    let bench = Bench::new();
    let folder = bench.bucket("shared");
    let files = plant(&folder);
    let mut running = bench.start(&with(&[json!({"training": {"maxSteps": 4000}})]), &[]);
    crate::support::until(|| running.has_ended() || running.log().matches("saved a checkpoint").count() >= 3);
    running.signal("TERM");
    assert_eq!(running.wait(), Some(75), "{}", running.log());
    assert_there(&files, "retention");
    let steps = |bench: &Bench| others(&bench.bucket("shared"), &files).iter().filter(|path| path.ends_with("manifest.json")).count();
    assert_eq!(steps(&bench), 1, "retention deletes its own");

    // Another spec at the same place is not begun over the first one's checkpoints, whatever the policy.
    for policy in ["Auto", "Never"] {
        let output = bench.run(&with(&[json!({"resume": {"policy": policy}, "output": {"uri": "s3://test/out2/"}})]));
        assert_eq!(output.status.code(), Some(78), "{}", text(&output));
        assert!(text(&output).contains("checkpoint.uri") && steps(&bench) == 1, "{}", text(&output));
    }

    let never = with(&[json!({"training": {"maxSteps": 4000}, "resume": {"policy": "Never"}})]);
    let mut running = bench.start(&never, &[]);
    running.await_log("\"message\":\"training\"");
    running.signal("TERM");
    assert_eq!(running.wait(), Some(75), "{}", running.log());
    assert!(!running.log().contains("resuming"), "{}", running.log());
    assert_there(&files, "Never");

    let bench = Bench::new();
    let files = plant(&bench.bucket("shared"));
    let output = bench.run(&with(&[]));
    assert!(output.status.success(), "{}", text(&output));
    assert_there(&files, "success");
    assert_eq!(others(&bench.bucket("shared"), &files), Vec::<PathBuf>::new(), "its own is deleted");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(&format!("{} files in s3://test/shared/ that this run did not write", FOREIGN.len())), "{said}");

    // A run that finds its result done cleans up what a killed one has left.
    std::fs::write(bench.bucket("shared/identity.json"), identity(&bench)).unwrap();
    bench.complete(&with(&[]));
    assert_there(&files, "left by a killed run");
    assert!(!bench.bucket("shared/identity.json").exists());
}

fn identity(bench: &Bench) -> String {
    let result = bench.result();
    json!({"specHash": result["specHash"], "datasetDigest": result["datasetDigest"], "output": "s3://test/out/"}).to_string()
}

/// Files of exactly a checkpoint's names, without an identity: nobody knows whose, so nothing is written over them.
#[test]
fn checkpoints_of_nobody_knows_whom_are_not_taken_over() {
    let bench = Bench::new();
    let file = bench.bucket("shared/step-000002/e1/lora.safetensors");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, b"precious").unwrap();
    for policy in ["Auto", "Never"] {
        let output = bench.run(&with(&[json!({"resume": {"policy": policy}})]));
        assert_eq!(output.status.code(), Some(78), "{}", text(&output));
        assert!(text(&output).contains("step-000002/e1/lora.safetensors"), "{}", text(&output));
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }
}

/// Checkpoints that somebody copies into the folder of a run that lasts are another run's by their manifest.
#[test]
fn checkpoints_of_another_run_are_known_by_their_manifest() {
    let donor = Bench::new();
    donor.complete(&json!({"training": {"seed": 7, "maxSteps": 2}, "checkpoint": {"uri": "s3://test/shared/", "keepAfterSuccess": true}}));
    let bench = Bench::new();
    let mut running = bench.start(&with(&[json!({"training": {"maxSteps": 4000}})]), &[]);
    running.await_log("saved a checkpoint");
    running.signal("TERM");
    assert_eq!(running.wait(), Some(75), "{}", running.log());
    crate::support::copy(&donor.bucket("shared/step-000002"), &bench.bucket("shared/step-999999"));
    let copied = bench.bucket("shared/step-999999/e1/manifest.json");
    let before = std::fs::read(&copied).unwrap();
    let mut running = bench.start(&with(&[json!({"training": {"maxSteps": 4000}})]), &[]);
    running.await_log("saved a checkpoint");
    running.signal("TERM");
    assert_eq!(running.wait(), Some(75), "{}", running.log());
    assert!(running.log().contains("resuming from a checkpoint"), "its own is the newest of its own: {}", running.log());
    assert_eq!(std::fs::read(&copied).unwrap(), before);
}

/// `existing: Overwrite` replaces a result, not somebody's file of the same name.
#[test]
fn a_result_json_of_another_program_is_never_replaced() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.output("")).unwrap();
    std::fs::write(bench.output("result.json"), b"{\"accuracy\": 0.5}").unwrap();
    for existing in ["ReuseIfComplete", "Fail", "Overwrite"] {
        let output = bench.run(&json!({"training": {"maxSteps": 1}, "output": {"existing": existing}}));
        assert_eq!(output.status.code(), Some(78), "{}", text(&output));
        assert!(text(&output).contains("result.json was not written by finetune"), "{}", text(&output));
        assert_eq!(bench.read("result.json"), b"{\"accuracy\": 0.5}");
    }
}

/// A card that a run has written is replaced with its result; one that somebody has changed, or written, never is.
#[test]
fn a_model_card_that_somebody_has_changed_stays() {
    let job = |steps: u64, existing: &str| json!({"training": {"maxSteps": steps}, "output": {"existing": existing}});
    let bench = Bench::new();
    bench.complete(&job(1, "Fail"));
    let first = bench.read("README.md");
    bench.complete(&job(2, "Overwrite"));
    assert!(bench.read("README.md") != first && bench.read("README.md") == bench.read("runs/e2/README.md"));

    std::fs::write(bench.output("README.md"), b"my own words").unwrap();
    for (steps, existing, kept) in [(2, "ReuseIfComplete", "runs/e2/README.md"), (3, "Overwrite", "runs/e3/README.md")] {
        let output = bench.run(&job(steps, existing));
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(bench.read("README.md"), b"my own words");
        assert!(text(&output).contains("README.md is not as this run has written it") && text(&output).contains(kept), "{}", text(&output));
    }
    // One that is gone comes back.
    std::fs::remove_file(bench.output("README.md")).unwrap();
    bench.complete(&job(3, "ReuseIfComplete"));
    assert_eq!(bench.read("README.md"), bench.read("runs/e3/README.md"));

    // Without a result it is a file of another origin, as any other; one that appears meanwhile stays, and the run's work with it.
    let other = Bench::new();
    std::fs::create_dir_all(other.output("")).unwrap();
    std::fs::write(other.output("README.md"), b"precious").unwrap();
    let output = other.run(&job(1, "ReuseIfComplete"));
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("files of another origin (README.md)"), "{}", text(&output));
    std::fs::remove_file(other.output("README.md")).unwrap();
    let mut running = other.start(&json!({}), &[]);
    running.await_log("saved a checkpoint");
    std::fs::write(other.output("README.md"), b"precious").unwrap();
    assert_eq!(running.wait(), Some(0), "{}", running.log());
    assert_eq!(other.read("README.md"), b"precious");
}

/// Somebody puts a file of the LoRA's name into the output while the run lasts.
#[test]
fn a_file_that_appears_while_training_is_not_overwritten() {
    let bench = Bench::new();
    let mut running = bench.start(&json!({}), &[]);
    running.await_log("saved a checkpoint");
    std::fs::write(bench.output(LORA), b"precious").unwrap();
    assert_eq!(running.wait(), Some(78), "{}", running.log());
    assert_eq!(bench.read(LORA), b"precious");
    assert!(!bench.output("result.json").exists());
    // Nothing of the run is lost either.
    std::fs::remove_file(bench.output(LORA)).unwrap();
    let mut running = bench.start(&json!({}), &[]);
    assert_eq!(running.wait(), Some(0), "{}", running.log());
    assert!(running.log().contains("resuming from a checkpoint"), "{}", running.log());
}

/// Two buckets that are one directory: the names do not show that the folders are the same.
#[test]
fn folders_that_are_the_same_under_other_names_are_refused() {
    let bench = Bench::new();
    let mut command = bench.command(&json!({"checkpoint": {"uri": "s3://again/out/"}}));
    let output = command.arg("--bucket").arg(format!("s3://again={}", bench.bucket("").display())).output().unwrap();
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("spec.checkpoint.uri: must not be output.uri"), "{}", text(&output));
    let mut command = bench.command(&json!({"output": {"uri": "s3://again/models/micro/lora/"}}));
    let output = command.arg("--bucket").arg(format!("s3://again={}", bench.bucket("").display())).output().unwrap();
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("spec.model.source.objectStore.uri: must not be output.uri"), "{}", text(&output));
}

/// Placeholders of consoles and file managers are no result, before and between attempts; files of people are.
#[test]
fn placeholders_do_not_stop_a_run() {
    let bench = Bench::new();
    for name in [".DS_Store", "Thumbs.db", "sub/.keep", "desktop.ini", ".emptyFolderPlaceholder"] {
        let path = bench.output(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, b"x").unwrap();
    }
    std::fs::write(bench.output("empty"), b"").unwrap();
    bench.complete(&json!({"training": {"maxSteps": 1}}));
    assert_eq!(bench.read(".DS_Store"), b"x");
    let other = Bench::new();
    std::fs::create_dir_all(other.output("")).unwrap();
    std::fs::write(other.output("notes.txt"), b"precious").unwrap();
    let output = other.run(&json!({"training": {"maxSteps": 1}}));
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(!other.output("claims").exists(), "refused before anything is trained");
}

/// Checkpoints in a folder of their own below the output: the next attempt finds them, and takes them for no result.
#[test]
fn checkpoints_below_the_output_are_resumed() {
    let bench = Bench::new();
    let changes = json!({"checkpoint": {"uri": "s3://test/out/checkpoints/"}});
    let mut running = bench.start(&changes, &[]);
    running.await_log("saved a checkpoint");
    running.signal("KILL");
    running.wait();
    let mut running = bench.start(&changes, &[]);
    assert_eq!(running.wait(), Some(0), "{}", running.log());
    assert!(running.log().contains("resuming from a checkpoint"), "{}", running.log());
    assert_eq!(bench.files("checkpoints"), []);
    bench.complete(&changes);
}
