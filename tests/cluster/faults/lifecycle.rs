//! The end of a job, and what comes after it.

use serde_json::json;

use super::disturbed::{STEPS, undisturbed};
use super::nodes::never_two;
use crate::support::jobs::{micro, prefix};
use crate::support::stage::{BUCKET, LONG, SHORT, stage};
use finetune_testing::kubernetes::condition;
use finetune_testing::programs::kubectl;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn after_its_ttl_the_job_is_gone_and_its_status_stays() {
    let stage = stage("e2e-faults").await;
    stage.submit(&micro(stage.namespace, "brief", 20, &json!({"ttlSecondsAfterFinished": 3}))).await;
    let done = stage.until_true("brief", "Complete", LONG).await;
    stage.until("the Job to be cleaned up", SHORT, || async { stage.list("Job").await.is_empty().then_some(()) }).await;
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    assert!(stage.list("Job").await.is_empty(), "no second Job after the end");
    assert_eq!(stage.job("brief").await["status"], done["status"], "the result is kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_re_created_job_finds_its_result() {
    let stage = stage("e2e-faults").await;
    let job = micro(stage.namespace, "again", 50, &json!({}));
    stage.empty(BUCKET, &prefix(stage.namespace, "again")).await;
    stage.submit(&job).await;
    let first = stage.until_true("again", "Complete", LONG).await;
    assert_eq!(condition(&first, "Complete").map(|(_, reason, _)| reason).as_deref(), Some("TrainingSucceeded"));
    let lora = stage.lora(BUCKET, &prefix(stage.namespace, "again")).await;

    kubectl(&["-n", stage.namespace, "delete", "finetunejob", "again"]).unwrap_or_else(|error| panic!("{error}"));
    stage.submit(&job).await;
    let second = stage.until_true("again", "Complete", LONG).await;
    assert_ne!(first["metadata"]["uid"], second["metadata"]["uid"]);
    assert_eq!(condition(&second, "Complete").map(|(_, reason, _)| reason).as_deref(), Some("AlreadyCompleted"));
    assert!(stage.lora(BUCKET, &prefix(stage.namespace, "again")).await == lora);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn deleted_and_re_created_in_the_middle_it_goes_on_from_its_checkpoint() {
    let stage = stage("e2e-faults").await;
    let expected = undisturbed(&stage).await;
    let job = micro(stage.namespace, "reborn", STEPS, &json!({}));
    stage.submit(&job).await;
    stage.until_step("reborn", 100).await;
    let watch = never_two(&stage.client, stage.namespace, "reborn");
    kubectl(&["-n", stage.namespace, "delete", "finetunejob", "reborn"]).unwrap_or_else(|error| panic!("{error}"));
    stage.submit(&job).await;
    let done = stage.until_true("reborn", "Complete", LONG).await;
    assert_eq!(done["status"]["attempts"]["started"], 1, "attempts are those of this FineTuneJob");
    let resumed = stage.resumed_at("reborn").await;
    assert!(resumed >= 100, "it resumed at step {resumed}");
    assert!(stage.lora(BUCKET, &prefix(stage.namespace, "reborn")).await == expected, "the LoRA differs from an undisturbed run's");
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
}
