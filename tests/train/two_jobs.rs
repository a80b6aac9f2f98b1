//! Two jobs with one output, and what is a job's own: by the UID of its FineTuneJob, or without a cluster by name and spec.

use serde_json::{Value, json};

use crate::support::{Bench, LORA, Running, merge};

fn long(changes: &Value) -> Value {
    let mut all = json!({"training": {"maxSteps": 4000}, "checkpoint": {"everySteps": 2}});
    merge(&mut all, changes);
    all
}

fn interrupt(running: &mut Running) {
    running.signal("TERM");
    assert_eq!(running.wait(), Some(75), "{}", running.log());
}

/// Copied manifests with the output forgotten, one manifest in two clusters, and two runs on one machine.
#[test]
fn the_second_job_ends_for_good_and_names_the_first_which_goes_on() {
    let other_seed = json!({"training": {"seed": 7}});
    for (first, second, changes) in [("uid-1", "uid-2", other_seed.clone()), ("uid-1", "uid-2", json!({})), ("", "", other_seed)] {
        let bench = Bench::new();
        let mut old = bench.start(&long(&json!({})), &[("FINETUNE_JOB_UID", first)]);
        old.await_log("saved a checkpoint");
        let mut new = bench.start(&long(&changes), &[("FINETUNE_JOB_UID", second)]);
        assert_eq!(new.wait(), Some(78), "{}", new.log());
        assert!(new.log().contains("OutputInUse") && new.log().contains("in use by job default/micro"), "{}", new.log());
        assert!(!old.has_ended(), "{}", old.log());
        interrupt(&mut old);
        let mut again = bench.start(&long(&json!({})), &[("FINETUNE_JOB_UID", first)]);
        again.await_log("resuming from a checkpoint");
        interrupt(&mut again);
    }
}

/// A killed holder says nothing any more. What it had saved stays for its own next attempt.
#[test]
fn a_dead_holder_does_not_keep_the_output() {
    let bench = Bench::new();
    let mut old = bench.start(&long(&json!({})), &[("FINETUNE_JOB_UID", "uid-1")]);
    old.await_log("saved a checkpoint");
    old.signal("KILL");
    old.wait();
    let saved = bench.files(".checkpoints");
    let mut new = bench.start(&json!({"training": {"seed": 7, "maxSteps": 2}}), &[("FINETUNE_JOB_UID", "uid-2"), ("FINETUNE_CLAIM_LEASE_SECONDS", "3")]);
    assert_eq!(new.wait(), Some(0), "{}", new.log());
    assert!(new.log().contains("waiting to see whether it lives"), "{}", new.log());
    assert!(saved.iter().all(|file| bench.files(".checkpoints").contains(file)));
    let result = bench.read("result.json");
    let mut again = bench.start(&long(&json!({})), &[("FINETUNE_JOB_UID", "uid-1")]);
    assert_eq!(again.wait(), Some(78), "{}", again.log());
    assert!(again.log().contains("OutputExists"), "{}", again.log());
    assert!(bench.read("result.json") == result);
}

/// A frozen attempt that another job has taken for dead learns who has the output now.
#[test]
fn a_frozen_attempt_that_wakes_up_names_the_job_that_took_over() {
    let bench = Bench::new();
    let mut old = bench.start(&long(&json!({})), &[("FINETUNE_JOB_UID", "uid-1")]);
    old.await_log("saved a checkpoint");
    old.signal("STOP");
    let mut new = bench.start(&long(&json!({"training": {"seed": 7}})), &[("FINETUNE_JOB_UID", "uid-2"), ("FINETUNE_CLAIM_LEASE_SECONDS", "3")]);
    new.await_log("saved a checkpoint");
    old.signal("CONT");
    assert_eq!(old.wait(), Some(78), "{}", old.log());
    assert!(old.log().contains("OutputInUse"), "{}", old.log());
    assert!(!new.has_ended());
    interrupt(&mut new);
}

#[test]
fn never_means_another_job_not_another_attempt() {
    let bench = Bench::new();
    let never = long(&json!({"resume": {"policy": "Never"}}));
    let attempt = |uid| {
        let mut running = bench.start(&never, &[("FINETUNE_JOB_UID", uid)]);
        running.await_log("saved a checkpoint");
        interrupt(&mut running);
        running.log().contains("resuming from a checkpoint")
    };
    assert!(!attempt("uid-1"));
    assert!(attempt("uid-1"), "a drained pod loses nothing");
    assert!(!attempt("uid-2"), "the job was created anew");
    assert!(attempt("uid-2"));
}

/// A pod that is lost between `result.json` and the end of its Job.
#[test]
fn a_jobs_own_result_is_its_own_whatever_exists_says() {
    for existing in ["Overwrite", "Fail"] {
        let bench = Bench::new();
        let changes = json!({"training": {"maxSteps": 2}, "output": {"existing": existing}});
        let attempt = |uid| {
            let output = bench.command(&changes).env("FINETUNE_JOB_UID", uid).output().unwrap();
            (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
        };
        assert_eq!(attempt("uid-1").0, Some(0));
        let lora = bench.read(LORA);
        let (code, said) = attempt("uid-1");
        assert_eq!((code, said.contains("trained already")), (Some(0), true), "{existing}: {said}");
        assert_eq!((bench.result()["attempt"].as_u64(), &bench.result()["jobUid"]), (Some(1), &json!("uid-1")));
        let (code, said) = attempt("uid-2");
        if existing == "Overwrite" {
            assert_eq!((code, bench.result()["attempt"].as_u64()), (Some(0), Some(2)), "{said}");
        } else {
            assert_eq!(code, Some(78), "{said}");
        }
        assert!(bench.read(LORA) == lora);
    }
}
