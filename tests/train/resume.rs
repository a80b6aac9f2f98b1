//! A run that is killed and resumed gives the same files, byte for byte, as an undisturbed one.

use finetune_common::rng::{Purpose, Stream};
use serde_json::json;

use crate::support::{Bench, LORA, reference, until};

fn assert_same_lora(bench: &Bench, what: &str) {
    let (diffusers, kohya, _) = reference();
    assert!(bench.read(LORA) == *diffusers, "{what}: the LoRA differs");
    assert!(bench.read("micro.safetensors") == *kohya, "{what}: the kohya file differs");
}

/// Twenty kills at random instants of a job of a few seconds, each followed by a run from an empty disk.
#[test]
fn a_run_killed_at_twenty_random_instants_and_resumed_from_an_empty_disk_gives_the_same_files() {
    let duration = reference().2;
    let mut random = Stream::new(20, Purpose::Jitter, 0, 0);
    let mut resumed = 0;
    for round in 0..20 {
        let bench = Bench::new();
        let mut running = bench.start(&json!({}), &[]);
        // Every second one has a checkpoint, however slow the machine has become since the reference was made.
        if round % 2 == 0 {
            std::thread::sleep(duration.mul_f64(0.1 + 0.85 * random.uniform_f64()));
        } else {
            running.await_log("saved a checkpoint");
            std::thread::sleep(duration.mul_f64(0.2 * random.uniform_f64()));
        }
        running.signal("KILL");
        let code = running.wait();
        assert!(code.is_none() || code == Some(0), "{code:?}: {}", running.log());
        bench.wipe_cache();
        let mut second = bench.start(&json!({}), &[]);
        assert_eq!(second.wait(), Some(0), "round {round}: {}", second.log());
        resumed += u32::from(second.log().contains("resuming from a checkpoint"));
        assert_same_lora(&bench, &format!("round {round}"));
        let left: Vec<_> = bench.files(".checkpoints").into_iter().map(|(path, _)| path).collect();
        assert!(left.is_empty(), "round {round}: checkpoints are deleted after success, {left:?} are not:\n{}", second.log());
    }
    assert!(resumed >= 5, "only {resumed} of 20 runs had a checkpoint to resume from");
}

/// One run killed again and again, wherever it is, until it gets through.
#[test]
fn a_run_killed_again_and_again_goes_on_each_time() {
    let (bench, duration) = (Bench::new(), reference().2);
    let mut random = Stream::new(21, Purpose::Jitter, 0, 0);
    let mut attempts = 0;
    loop {
        attempts += 1;
        assert!(attempts < 60, "no progress in {attempts} attempts");
        let mut running = bench.start(&json!({"checkpoint": {"everySteps": 2}}), &[]);
        // Some updates of its own, however slow the machine has become since the reference was made.
        until(|| running.has_ended() || running.log().contains("saved a checkpoint"));
        std::thread::sleep(duration.mul_f64(0.2 * random.uniform_f64()));
        if running.has_ended() && running.wait() == Some(0) {
            break;
        }
        running.signal("KILL");
        running.wait();
    }
    assert!(attempts > 1);
    assert_same_lora(&bench, "killed again and again");
    assert_eq!(bench.result()["steps"], 40);
    let metrics = String::from_utf8(bench.read("metrics.jsonl")).unwrap();
    let steps: Vec<u64> = metrics
        .lines()
        .filter(|l| l.contains("gradientNorm"))
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=40).collect::<Vec<_>>(), "the history has no holes and no doubles");
}

#[test]
fn sigterm_saves_a_checkpoint_in_the_middle_of_a_window_and_ends_with_75() {
    let bench = Bench::new();
    // No periodic checkpoint: the one on SIGTERM is all there is.
    let quiet = json!({"checkpoint": {"everySteps": 1_000_000, "everySeconds": 0}});
    for signal in ["TERM", "INT"] {
        let mut running = bench.start(&quiet, &[]);
        running.await_log("\"message\":\"training\"");
        running.signal(signal);
        assert_eq!(running.wait(), Some(75), "{}", running.log());
        assert!(running.log().contains("after saving a checkpoint at step"), "{}", running.log());
        bench.wipe_cache();
    }
    let mut last = bench.start(&quiet, &[]);
    assert_eq!(last.wait(), Some(0), "{}", last.log());
    assert!(last.log().contains("resuming from a checkpoint"));
    assert_same_lora(&bench, "SIGTERM and SIGINT");
    assert_eq!(bench.result()["attempt"], 3);
}

#[test]
fn without_on_termination_nothing_is_saved_and_the_code_is_the_same() {
    let bench = Bench::new();
    let changes = json!({"checkpoint": {"everySteps": 1_000_000, "onTermination": false}});
    let mut running = bench.start(&changes, &[]);
    running.await_log("\"message\":\"training\"");
    running.signal("TERM");
    assert_eq!(running.wait(), Some(75));
    assert!(!bench.files(".checkpoints").iter().any(|(path, _)| path.ends_with("manifest.json")));
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_one_before_it() {
    let bench = Bench::new();
    let mut running = bench.start(&json!({}), &[]);
    until(|| running.has_ended() || bench.files(".checkpoints").iter().any(|(p, _)| p.to_string_lossy().contains("step-000018/e1/manifest.json")));
    running.signal("KILL");
    running.wait();
    // The newest whole one: a file of the next may be there already, without the manifest that comes last.
    let newest = bench.files(".checkpoints").into_iter().map(|(p, _)| p).filter(|p| p.ends_with("manifest.json")).max().unwrap();
    let newest = newest.with_file_name("optimizer.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    let mut second = bench.start(&json!({}), &[]);
    assert_eq!(second.wait(), Some(0), "{}", second.log());
    assert!(second.log().contains("does not verify") && second.log().contains("resuming from a checkpoint"), "{}", second.log());
    assert_same_lora(&bench, "damaged checkpoint");
}

#[test]
fn retention_keeps_the_last_checkpoints_only() {
    let bench = Bench::new();
    bench.complete(&json!({"checkpoint": {"everySteps": 5, "keepLast": 2, "keepAfterSuccess": true}}));
    let mut steps: Vec<String> = bench
        .files(".checkpoints")
        .iter()
        .filter(|(p, _)| p.ends_with("manifest.json"))
        .map(|(p, _)| p.iter().rev().nth(2).unwrap().to_string_lossy().into_owned())
        .collect();
    steps.sort();
    assert_eq!(steps, ["step-000035", "step-000040"]);
    // What is kept serves as a warm start: LoRA only, everything else begins anew.
    let warm = Bench::new();
    let prefix = std::fs::read_dir(bench.output(".checkpoints")).unwrap().next().unwrap().unwrap().path();
    crate::support::copy(&prefix, &warm.bucket("other/checkpoints"));
    let output = warm.run(&json!({"resume": {"fromCheckpoint": "s3://test/other/checkpoints/"}, "training": {"maxSteps": 2}}));
    assert!(output.status.success(), "{}", crate::support::text(&output));
    let (start, end) = (&warm.result()["evaluation"]["start"], &bench.result()["evaluation"]["end"]);
    assert_eq!(start, end, "the warm start begins with the other run's weights");
    assert_eq!(warm.result()["steps"], 2);
}

#[test]
fn resume_policies() {
    let bench = Bench::new();
    let required = json!({"resume": {"policy": "Required"}});
    let output = bench.run(&required);
    assert_eq!(output.status.code(), Some(66), "{}", crate::support::text(&output));
    let mut running = bench.start(&json!({}), &[]);
    running.await_log("saved a checkpoint");
    running.signal("KILL");
    running.wait();
    let mut fresh = bench.start(&json!({"resume": {"policy": "Never"}}), &[]);
    assert_eq!(fresh.wait(), Some(0), "{}", fresh.log());
    assert!(!fresh.log().contains("resuming"), "{}", fresh.log());
    assert_same_lora(&bench, "begun anew");
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for threads in ["1", "3"] {
        let bench = Bench::new();
        let output = bench.command(&json!({})).env("RAYON_NUM_THREADS", threads).output().unwrap();
        assert!(output.status.success(), "{}", crate::support::text(&output));
        assert_same_lora(&bench, &format!("{threads} threads"));
    }
}
