//! Pods that are asked to end: never a failure, and never a long pause.

use std::time::{Duration, Instant};

use finetune_testing::kubernetes;
use serde_json::json;

use super::stage::{SOON, Stage, failure, success};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn five_evictions_in_a_row_cost_seconds_each_and_no_attempt() {
    let stage = Stage::new("evictions").await;
    let operator = stage.operator().await;
    stage
        .create("evicted", |job| {
            job["spec"]["failurePolicy"] = json!({"maxRetries": 0});
            job["spec"]["activeDeadlineSeconds"] = json!(600);
        })
        .await;
    let mut pod = stage.pod("evicted", None).await;
    for _ in 0..5 {
        stage.start(&pod).await;
        stage.disrupt(&pod).await;
        let began = Instant::now();
        pod = stage.pod("evicted", Some(&pod)).await;
        assert!(began.elapsed() < Duration::from_secs(15), "the next pod came after {:?}", began.elapsed());
    }
    let left = stage.job("evicted").await.expect("the Job")["spec"]["activeDeadlineSeconds"].as_i64().expect("a deadline");
    assert!((500..600).contains(&left), "the deadline goes on through all Jobs: {left}");
    stage.start(&pod).await;
    stage.finish(&pod, 0, "Completed", &success()).await;
    let done = stage.condition("evicted", "Complete", "True", "TrainingSucceeded").await;
    assert_eq!(done["status"]["attempts"], json!({"started": 6, "disrupted": 5, "failed": 0}));
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_pause_that_the_trainer_cannot_end_well_is_no_failure_even_without_retries() {
    let stage = Stage::new("bad-pause").await;
    let operator = stage.operator().await;
    stage.create("paused", |job| job["spec"]["failurePolicy"] = json!({"maxRetries": 0})).await;
    let first = stage.pod("paused", None).await;
    stage.bind(&first).await;
    stage.start(&first).await;
    stage.until("paused", "an attempt", |job| job["status"]["attempts"]["started"] == 1).await;
    stage.patch("paused", &json!({"spec": {"suspend": true}})).await;
    kubernetes::eventually("SIGTERM", SOON, || async {
        let pod = kubernetes::get(&stage.client, "Pod", &stage.namespace, &first).await?;
        (!pod["metadata"]["deletionTimestamp"].is_null()).then_some(())
    })
    .await;
    // The bucket is away, and the last checkpoint with it.
    tokio::time::sleep(Duration::from_secs(2)).await;
    stage.finish(&first, 69, "Error", &failure("StorageUnavailable", 69, "failed to write to s3://bucket")).await;
    stage.until("paused", "its end", |job| job["status"]["attemptHistory"][0]["cause"] == "Suspended").await;
    stage.remove(&first).await;
    let paused = stage.condition("paused", "Suspended", "True", "UserRequested").await;
    assert_eq!(paused["status"]["attempts"], json!({"started": 1, "disrupted": 1, "failed": 0}));
    assert!(kubernetes::condition(&paused, "Failed").is_none(), "{paused:#}");

    // The same for a pod that somebody deletes: its Job takes that for the one failure too many.
    stage.patch("paused", &json!({"spec": {"suspend": false}})).await;
    let second = stage.pod("paused", Some(&first)).await;
    stage.bind(&second).await;
    stage.start(&second).await;
    stage.until("paused", "an attempt", |job| job["status"]["attempts"]["started"] == 2).await;
    kubernetes::delete(&stage.client, "Pod", &stage.namespace, &second).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    stage.finish(&second, 137, "Error", "").await;
    stage.remove(&second).await;
    let third = stage.pod("paused", Some(&second)).await;
    stage.start(&third).await;
    stage.finish(&third, 0, "Completed", &success()).await;
    let done = stage.condition("paused", "Complete", "True", "TrainingSucceeded").await;
    assert_eq!(done["status"]["attempts"], json!({"started": 3, "disrupted": 2, "failed": 0}));
    operator.stop().await;
}
