//! Two live trainers on one output prefix: exactly one publishes, and nothing of the other is ever read.

use std::path::Path;

use finetune_common::rng::{Purpose, Stream};
use serde_json::json;

use crate::support::{Bench, LORA, Running, reference, until};

/// Starts a trainer that stops at a fault point, and freezes it there.
fn frozen_at(bench: &Bench, point: &str, file: &Path) -> Running {
    let mut running = bench.start(&json!({}), &[("FINETUNE_FAULT", &format!("{point}:{}", file.display()))]);
    until(|| file.exists() || running.has_ended());
    assert!(file.exists(), "{}", running.log());
    running.signal("STOP");
    running
}

/// Lets a frozen trainer go on from its fault point.
fn thaw(running: &mut Running, file: &Path) -> Option<i32> {
    std::fs::remove_file(file).unwrap();
    running.signal("CONT");
    running.wait()
}

fn published(bench: &Bench) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    bench.files("").into_iter().filter(|(path, _)| !path.components().any(|c| c.as_os_str() == ".checkpoints" || c.as_os_str() == "claims")).collect()
}

#[test]
fn a_trainer_frozen_between_its_check_and_its_manifest_is_superseded() {
    let bench = Bench::new();
    let file = bench.path("frozen");
    let mut old = frozen_at(&bench, "before-manifest", &file);
    let mut new = bench.start(&json!({}), &[]);
    assert_eq!(new.wait(), Some(0), "{}", new.log());
    let before = published(&bench);
    assert_eq!(bench.result()["attempt"], 2);
    assert!(bench.read(LORA) == reference().0);

    assert_eq!(thaw(&mut old, &file), Some(75), "{}", old.log());
    assert!(old.log().contains("superseded"), "{}", old.log());
    assert!(published(&bench) == before, "the frozen trainer has changed what was published");
    let mut third = bench.start(&json!({}), &[]);
    assert_eq!(third.wait(), Some(0), "{}", third.log());
    assert!(published(&bench) == before);
}

#[test]
fn a_trainer_frozen_between_its_check_and_result_json_loses() {
    let bench = Bench::new();
    let file = bench.path("frozen");
    let mut old = frozen_at(&bench, "before-result", &file);
    let mut new = bench.start(&json!({}), &[]);
    assert_eq!(new.wait(), Some(0), "{}", new.log());
    assert!(new.log().contains("resuming from a checkpoint"), "the last checkpoint comes before publishing: {}", new.log());
    let before = published(&bench);
    let code = thaw(&mut old, &file);
    assert!(code == Some(0) || code == Some(75), "{code:?}: {}", old.log());
    assert!(published(&bench) == before);
    assert_eq!(bench.result()["run"], "runs/e2/");
    assert!(bench.read("runs/e2/pytorch_lora_weights.safetensors") == bench.read(LORA));
}

/// The newest attempt deletes nothing of what it may still need, and the frozen one deletes nothing at all.
#[test]
fn trainers_frozen_at_random_instants_never_spoil_the_result() {
    let mut random = Stream::new(5, Purpose::Jitter, 0, 0);
    for round in 0..6 {
        let bench = Bench::new();
        let mut old = bench.start(&json!({"checkpoint": {"everySteps": 1}}), &[]);
        std::thread::sleep(reference().2.mul_f64(0.1 + random.uniform_f64()));
        if old.has_ended() {
            continue;
        }
        old.signal("STOP");
        let mut new = bench.start(&json!({"checkpoint": {"everySteps": 1}}), &[]);
        assert_eq!(new.wait(), Some(0), "round {round}: {}", new.log());
        let before = published(&bench);
        old.signal("CONT");
        let code = old.wait();
        assert!(code == Some(0) || code == Some(75), "round {round}: {code:?}: {}", old.log());
        let after = published(&bench);
        let result = |files: &[(std::path::PathBuf, Vec<u8>)]| files.iter().find(|(p, _)| *p == bench.output("result.json")).map(|(_, b)| b.clone());
        assert!(result(&before) == result(&after), "round {round}: two results");
        assert!(bench.read(LORA) == reference().0, "round {round}");
    }
}

/// Nobody is frozen: both run, and the older one gives way.
#[test]
fn of_two_trainers_started_one_after_the_other_the_newer_one_publishes() {
    let bench = Bench::new();
    let changes = json!({"training": {"maxSteps": 120}, "checkpoint": {"everySteps": 1}});
    let mut old = bench.start(&changes, &[]);
    old.await_log("saved a checkpoint");
    let mut new = bench.start(&changes, &[]);
    assert_eq!(old.wait(), Some(75), "{}", old.log());
    assert_eq!(new.wait(), Some(0), "{}", new.log());
    assert_eq!(bench.result()["attempt"], 2);
    assert!(!bench.output("runs/e1").exists());
}
