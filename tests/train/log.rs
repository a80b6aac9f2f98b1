//! The log in the bucket: readable when the pod is gone, whichever way the run ended, and without secrets.

use serde_json::json;

use crate::support::Bench;

/// What lies at `logs/eN/trainer.log` below the only checkpoint prefix.
fn log_of(bench: &Bench, attempt: u64) -> Option<String> {
    let ending = format!("/logs/e{attempt}/trainer.log");
    let files = bench.files(".checkpoints");
    let (_, bytes) = files.iter().find(|(path, _)| path.to_string_lossy().ends_with(&ending))?;
    Some(String::from_utf8(bytes.clone()).unwrap())
}

#[test]
fn an_attempt_that_is_stopped_leaves_its_log_and_the_one_that_publishes_its_own() {
    let bench = Bench::new();
    // Nothing of the log is shown; what is kept does not depend on that.
    let mut stopped = bench.start(&json!({"training": {"maxSteps": 4000}, "checkpoint": {"everySteps": 2}}), &[("RUST_LOG", "off")]);
    crate::support::until(|| log_of(&bench, 1).is_some() || stopped.has_ended());
    let before = log_of(&bench, 1).unwrap();
    assert!(before.contains("claimed") && before.contains("memory plan") && !before.contains("the attempt ends"), "{before}");
    stopped.signal("TERM");
    assert_eq!(stopped.wait(), Some(75));
    let after = log_of(&bench, 1).unwrap();
    assert!(after.starts_with(&before), "{after}");
    let last = after.lines().next_back().unwrap();
    // Whether there was anything to save depends on where the signal met it.
    let messages = ["stopped on request after saving a checkpoint at step ", "stopped on request; the same command goes on from the newest checkpoint "];
    assert!(messages.iter().any(|message| last.contains(&format!("the attempt ends: {message}"))), "{last}");
    assert!(last.ends_with("(Interrupted, exit code 75)") && bench.files(".checkpoints").iter().any(|(path, _)| path.ends_with("manifest.json")), "{last}");

    let other = Bench::new();
    other.complete(&json!({"checkpoint": {"keepAfterSuccess": true}}));
    let published = String::from_utf8(other.read("logs/trainer.log")).unwrap();
    assert!(published.starts_with(&log_of(&other, 1).unwrap()), "{published}");
    assert!(other.read("runs/e1/logs/trainer.log") == published.as_bytes());
    assert!(other.result()["files"]["logs/trainer.log"]["sha256"].is_string());
}

#[test]
fn a_run_that_fails_before_its_first_checkpoint_says_why_in_its_log() {
    let bench = Bench::new();
    bench.spoil_a_weight();
    let output = bench.command(&json!({})).env("AWS_SESSION_TOKEN", "s3://test").output().unwrap();
    assert_eq!(output.status.code(), Some(13), "{}", crate::support::text(&output));
    let log = log_of(&bench, 1).unwrap();
    assert!(log.lines().next_back().unwrap().ends_with("(Diverged, exit code 13)"), "{log}");
    assert!(log.contains("***/out/") && !log.contains("s3://test"), "the value of a variable with a secret's name: {log}");
}
