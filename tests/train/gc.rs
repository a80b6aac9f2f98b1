//! `finetune gc`: deletes what runs have left behind, and nothing else.

use serde_json::json;

use crate::support::{Bench, LORA, finetune, text};

fn gc(bench: &Bench, uri: &str, delete: bool) -> (Option<i32>, String) {
    let mut command = finetune();
    command.args(["gc", uri, "--bucket", &format!("s3://test={}", bench.bucket("").display())]);
    if delete {
        command.arg("--delete");
    }
    let output = command.output().unwrap();
    (output.status.code(), text(&output))
}

/// Two attempts, of which the second publishes and keeps its checkpoints; and files that are nobody's.
fn finished(changes: &serde_json::Value) -> (Bench, Vec<std::path::PathBuf>) {
    let bench = Bench::new();
    let mut first = bench.start(changes, &[]);
    first.await_log("saved a checkpoint");
    first.signal("TERM");
    first.wait();
    bench.complete(changes);
    let folder = std::fs::read_dir(bench.output(".checkpoints")).map_or_else(|_| bench.bucket("ckpt"), |mut found| found.next().unwrap().unwrap().path());
    let foreign = [folder.join("notes.txt"), folder.join("step-000006/e1/notes.txt"), bench.output("claims/notes.txt"), bench.output("runs/e1/notes.txt")];
    for path in &foreign {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "precious").unwrap();
    }
    (bench, foreign.to_vec())
}

#[test]
fn of_a_finished_run_the_result_stays_and_still_counts() {
    let changes = json!({"checkpoint": {"keepAfterSuccess": true}, "training": {"maxSteps": 200}});
    let (bench, foreign) = finished(&changes);
    let before = bench.files("");
    let (code, said) = gc(&bench, "s3://test/out", false);
    assert!(code == Some(0) && said.contains("nothing was deleted") && said.contains("superseded claim"), "{said}");
    assert!(bench.files("") == before, "a dry run");
    let lora = bench.read(LORA);
    let (code, said) = gc(&bench, "s3://test/out", true);
    assert_eq!(code, Some(0), "{said}");
    assert!(foreign.iter().all(|path| path.exists()), "{said}");
    let left: Vec<_> = bench.files(".checkpoints").into_iter().map(|(path, _)| path).filter(|path| !foreign.contains(path)).collect();
    assert_eq!(left, Vec::<std::path::PathBuf>::new());
    assert_eq!(bench.claims() - 1, 1, "gc's own claim is the newest, beside notes.txt");
    let (_, said) = gc(&bench, "s3://test/out", false);
    assert!(said.contains("nothing to delete"), "{said}");
    let again = bench.run(&changes);
    assert!(text(&again).contains("trained already") && bench.read(LORA) == lora, "{}", text(&again));
}

#[test]
fn a_folder_of_checkpoints_is_known_by_its_identity() {
    let changes = json!({"checkpoint": {"uri": "s3://test/ckpt/", "keepAfterSuccess": true}, "training": {"maxSteps": 200}});
    let (bench, foreign) = finished(&changes);
    let (code, said) = gc(&bench, "s3://test/ckpt/", true);
    assert_eq!(code, Some(0), "{said}");
    let mut left = Vec::new();
    let mut pending = vec![bench.bucket("ckpt")];
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { pending.push(path) } else { left.push(path) }
        }
    }
    left.sort();
    assert_eq!(left, foreign[..2]);
    assert!(bench.output("result.json").exists());
}

#[test]
fn an_unfinished_run_goes_on_afterwards_and_a_run_at_work_is_not_disturbed() {
    let bench = Bench::new();
    let long = json!({"training": {"maxSteps": 4000}, "checkpoint": {"everySteps": 2}});
    let mut first = bench.start(&long, &[]);
    first.await_log("saved a checkpoint");
    first.signal("TERM");
    first.wait();
    let mut second = bench.start(&long, &[]);
    second.await_log("resuming from a checkpoint");
    second.await_log("saved a checkpoint");
    let (code, said) = gc(&bench, "s3://test/out/", true);
    assert!(code == Some(78) && said.contains("in use by job default/micro"), "{said}");
    assert!(bench.output("claims/000001.json").exists());
    second.signal("TERM");
    assert_eq!(second.wait(), Some(75), "{}", second.log());
    let (code, said) = gc(&bench, "s3://test/out/", true);
    assert!(code == Some(0) && said.contains("has not finished"), "{said}");
    assert!(!bench.output("claims/000001.json").exists());
    let mut third = bench.start(&long, &[]);
    third.await_log("resuming from a checkpoint");
    third.signal("TERM");
    assert_eq!(third.wait(), Some(75), "{}", third.log());
}

#[test]
fn where_the_result_cannot_be_read_nothing_of_an_attempt_goes() {
    let (bench, _) = finished(&json!({"training": {"maxSteps": 200}}));
    let runs = bench.files("runs");
    let whole = bench.read("result.json");
    std::fs::write(bench.output("result.json"), &whole[..whole.len() / 2]).unwrap();
    assert_eq!(gc(&bench, "s3://test/out/", true).0, Some(0));
    assert!(bench.files("runs") == runs, "cut off");
    std::fs::remove_file(bench.output("result.json")).unwrap();
    assert_eq!(gc(&bench, "s3://test/out/", true).0, Some(0));
    assert!(bench.files("runs") == runs, "moved away");
    let (_, said) = gc(&bench, "s3://test/ouy/", false);
    assert!(said.contains("there is nothing at s3://test/ouy/"), "{said}");
}
