//! How jobs fail, and what is retried.

use std::time::Duration;

use serde_json::json;

use super::stage::{Stage, failure, success};
use finetune_testing::kubernetes;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_permanent_failure_ends_the_job_with_the_trainers_reason() {
    let stage = Stage::new("permanent").await;
    let operator = stage.operator().await;
    stage.create("bad", |_| {}).await;
    let pod = stage.pod("bad", None).await;
    stage.start(&pod).await;
    stage.finish(&pod, 65, "Error", &failure("InvalidDataset", 65, "metadata.jsonl line 3: no \"file_name\"")).await;
    let failed = stage.condition("bad", "Failed", "True", "InvalidDataset").await;
    assert_eq!(failed["status"]["phase"], "Failed");
    assert_eq!(failed["status"]["failure"]["exitCode"], 65);
    assert!(failed["status"]["failure"]["message"].as_str().is_some_and(|message| message.contains("line 3")));
    assert!(kubernetes::is_true(&failed, "Stalled"), "kstatus must see the failure");
    assert_eq!(failed["status"]["attempts"], json!({"started": 1, "disrupted": 0, "failed": 1}));

    // Of the reasons of one exit code the trainer's own word decides.
    stage.create("taken", |_| {}).await;
    let pod = stage.pod("taken", None).await;
    stage.start(&pod).await;
    stage.finish(&pod, 78, "Error", &failure("OutputInUse", 78, "the output is in use by job team-a/other")).await;
    let failed = stage.condition("taken", "Failed", "True", "OutputInUse").await;
    assert_eq!((&failed["status"]["reason"], &failed["status"]["failure"]["reason"]), (&json!("OutputInUse"), &json!("OutputInUse")));
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn disruptions_and_checkpoints_are_free_and_failures_are_counted_across_jobs() {
    let stage = Stage::new("counted").await;
    let operator = stage.operator().await;
    stage.create("tough", |job| job["spec"]["failurePolicy"] = json!({"maxRetries": 1})).await;
    let first = stage.pod("tough", None).await;
    stage.start(&first).await;
    stage.disrupt(&first).await;
    let second = stage.pod("tough", Some(&first)).await;
    stage.start(&second).await;
    stage.finish(&second, 75, "Error", &failure("Interrupted", 75, "saved a checkpoint")).await;
    let superseded = stage.pod("tough", Some(&second)).await;
    stage.start(&superseded).await;
    stage.finish(&superseded, 75, "Error", &failure("Superseded", 75, "superseded by attempt 4")).await;
    let third = stage.pod("tough", Some(&superseded)).await;
    stage.start(&third).await;
    stage.finish(&third, 137, "OOMKilled", "").await;
    let seen = stage.until("tough", "the failure", |job| job["status"]["attempts"]["failed"] == 1).await;
    assert_eq!(seen["status"]["failure"]["reason"], "HostOutOfMemory");
    assert_eq!(seen["status"]["attempts"], json!({"started": 4, "disrupted": 3, "failed": 1}));
    let causes: Vec<_> = seen["status"]["attemptHistory"].as_array().into_iter().flatten().map(|attempt| attempt["cause"].clone()).collect();
    assert_eq!(causes, ["Disrupted", "Checkpointed", "Superseded", "Failed"]);

    // A new Job may have so many fewer: after one of one, the next failure is the last.
    stage.patch("tough", &json!({"spec": {"suspend": true}})).await;
    stage.condition("tough", "Suspended", "True", "UserRequested").await;
    stage.patch("tough", &json!({"spec": {"suspend": false}})).await;
    let fourth = stage.pod("tough", Some(&third)).await;
    assert_eq!(stage.job("tough").await.expect("the Job")["spec"]["backoffLimit"], 0);
    stage.start(&fourth).await;
    stage.finish(&fourth, 1, "Error", "").await;
    let failed = stage.condition("tough", "Failed", "True", "RetriesExhausted").await;
    assert_eq!(failed["status"]["failure"]["reason"], "TrainerCrashed");
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_restart_storm_ends_the_job_after_its_pods() {
    let stage = Stage::new("storm").await;
    let operator = stage.operator().await;
    stage.create("stormy", |job| job["spec"]["failurePolicy"] = json!({"maxRestartsPerHour": 2})).await;
    let mut pod = stage.pod("stormy", None).await;
    for _ in 0..3 {
        stage.start(&pod).await;
        stage.disrupt(&pod).await;
        pod = stage.pod("stormy", Some(&pod)).await;
    }
    stage.start(&pod).await;
    let failed = stage.condition("stormy", "Failed", "True", "RestartStorm").await;
    assert!(stage.job("stormy").await.is_none() && stage.live_pods("stormy").await.is_empty(), "a job that has failed holds no GPU");
    assert_eq!(failed["status"]["attempts"]["started"], 4);
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn deadlines_and_limits_follow_the_spec() {
    let stage = Stage::new("deadlines").await;
    let operator = stage.operator().await;
    stage.create("late", |job| job["spec"]["startDeadlineSeconds"] = json!(3)).await;
    stage.create("long", |job| job["spec"]["activeDeadlineSeconds"] = json!(600)).await;
    let late = stage.condition("late", "Failed", "True", "StartDeadlineExceeded").await;
    assert_eq!(late["status"]["failure"]["reason"], "StartDeadlineExceeded");
    assert!(stage.job("late").await.is_none(), "a job that has failed waits for no GPU");

    let pod = stage.pod("long", None).await;
    stage.start(&pod).await;
    stage.patch("long", &json!({"spec": {"activeDeadlineSeconds": 5, "failurePolicy": {"maxRetries": 7}}})).await;
    kubernetes::eventually("the Job to follow", super::stage::SOON, || async {
        let job = kubernetes::get(&stage.client, "Job", &stage.namespace, "long-train").await?;
        (job["spec"]["activeDeadlineSeconds"] == 5 && job["spec"]["backoffLimit"] == 7).then_some(())
    })
    .await;
    let long = stage.condition("long", "Failed", "True", "DeadlineExceeded").await;
    assert_eq!(long["status"]["failure"]["reason"], "DeadlineExceeded");
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_gpu_that_is_too_small_is_told_before_any_pod_is_made() {
    let stage = Stage::new("too-small").await;
    let operator = stage.operator().await;
    stage.create("tight", |job| job["spec"]["scheduling"]["gpu"] = json!({"minMemoryMiB": 3000})).await;
    let refused = stage.condition("tight", "Validated", "False", "GPUTooSmall").await;
    let (_, _, message) = kubernetes::condition(&refused, "Validated").expect("Validated");
    assert!(message.contains("GiB and the budget is 2.93 GiB"), "{message}");
    assert_eq!(refused["status"]["phase"], "Failed");
    assert_eq!(refused["status"]["failure"]["reason"], "GPUTooSmall", "shown by kubectl get");
    assert!(kubernetes::is_true(&refused, "Stalled"), "kstatus must see it");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(stage.job("tight").await.is_none() && stage.live_pods("tight").await.is_empty());
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_job_that_no_node_can_take_says_so_and_a_queued_one_waits_for_kueue() {
    let stage = Stage::new("pending").await;
    // Nodes are watched by an operator of all namespaces only.
    let operator = stage
        .operator_with(|options| {
            options.namespaces = Vec::new();
            options.watch_nodes = true;
        })
        .await;
    stage.create("huge", |job| job["spec"]["scheduling"] = json!({"gpu": {"minMemoryMiB": 500_000, "maxMemoryMiB": 600_000}})).await;
    stage.create("queued", |job| job["spec"]["queueName"] = json!("team-a")).await;
    let huge = stage.condition("huge", "PodsScheduled", "False", "NoMatchingGPUNode").await;
    assert!(kubernetes::condition(&huge, "PodsScheduled").is_some_and(|(_, _, message)| message.contains("scheduling.gpu")), "{huge}");
    assert_eq!(huge["status"]["phase"], "Starting");
    let with_kueue = kubernetes::get(&stage.client, "CustomResourceDefinition", "", "workloads.kueue.x-k8s.io").await.is_some();
    if with_kueue {
        let queued = stage.until("queued", "the queue's word", |job| job["status"]["phase"] == "Queued").await;
        assert_eq!(stage.job("queued").await.expect("the Job")["spec"]["suspend"], true, "{queued:#}");
    } else {
        stage.condition("queued", "Admitted", "False", "KueueNotInstalled").await;
        assert!(stage.job("queued").await.is_none(), "without Kueue the Job would start at once");
    }
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn the_result_of_a_job_is_kept_when_everything_comes_at_once() {
    // The pod has ended and the Job is complete before any operator looks.
    let stage = Stage::new("at-once").await;
    let operator = stage.operator().await;
    stage.create("quick", |_| {}).await;
    let pod = stage.pod("quick", None).await;
    operator.kill().await;
    stage.start(&pod).await;
    stage.finish(&pod, 0, "Completed", &success()).await;
    kubernetes::eventually("the Job's end", super::stage::SOON, || async {
        stage.job("quick").await.filter(|job| job["status"]["succeeded"] == 1).map(|_| ())
    })
    .await;
    // The user suspends it: too late, it has ended well.
    stage.patch("quick", &json!({"spec": {"suspend": true}})).await;
    let operator = stage.operator().await;
    let done = stage.condition("quick", "Complete", "True", "TrainingSucceeded").await;
    assert_eq!(done["status"]["artifacts"].as_array().map(Vec::len), Some(1));
    assert_eq!(done["status"]["attempts"]["started"], 1);
    operator.stop().await;
}
