//! What the API server refuses, the pod or the whole Job, and what the job says about it.

use std::time::Duration;

use finetune_testing::kubernetes;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::stage::{Stage, success};

/// Waits for `PodsScheduled=False/reason` and for the words of the API server in it.
async fn refused(stage: &Stage, name: &str, reason: &str, words: &str) {
    let began = std::time::Instant::now();
    let job = stage.condition(name, "PodsScheduled", "False", reason).await;
    assert!(began.elapsed() < Duration::from_mins(1), "{name} took {:?}", began.elapsed());
    let (_, _, message) = kubernetes::condition(&job, "PodsScheduled").expect("PodsScheduled");
    assert!(message.contains(words), "{message}");
    assert_eq!(job["status"]["reason"], reason, "the column of kubectl get");
    let (status, _, message) = kubernetes::condition(&job, "Reconciling").expect("Reconciling");
    assert!(status == "True" && message.contains(words), "kstatus: {status} {message}");
    assert!(!kubernetes::is_true(&job, "Stalled"), "it may get better");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_pod_that_is_refused_is_explained_in_the_api_servers_words_and_comes_when_it_may() {
    let stage = Stage::new("refused-pods").await;
    let operator = stage.operator().await;
    stage.create("no-account", |job| job["spec"]["serviceAccountName"] = json!("tpyo")).await;
    stage.create("no-priority", |job| job["spec"]["scheduling"]["priorityClassName"] = json!("tpyo")).await;
    stage.create("no-runtime", |job| job["spec"]["scheduling"]["runtimeClassName"] = json!("tpyo")).await;
    refused(&stage, "no-account", "ServiceAccountNotFound", "serviceaccount \"tpyo\" not found").await;
    refused(&stage, "no-priority", "PriorityClassNotFound", "no PriorityClass with name tpyo was found").await;
    refused(&stage, "no-runtime", "RuntimeClassNotFound", "RuntimeClass \"tpyo\" not found").await;

    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "no-gpus", "namespace": stage.namespace}, "spec": {"hard": {"requests.nvidia.com/gpu": "0"}}});
    kubernetes::create(&stage.client, &quota, false).await.expect("a quota");
    stage.create("over-quota", |_| {}).await;
    refused(&stage, "over-quota", "QuotaExceeded", "exceeded quota: no-gpus").await;
    assert!(operator.count(&["finetune_apiserver_requests_total{", "resource=\"events\"", "verb=\"list\""]) < 60, "events are not listed all the time");
    kubernetes::delete(&stage.client, "ResourceQuota", &stage.namespace, "no-gpus").await;
    let pod = stage.pod("over-quota", None).await;
    stage.start(&pod).await;
    stage.until("over-quota", "the pod", |job| job["status"]["attempts"]["started"] == 1 && job["status"]["reason"].is_null()).await;

    let limits = json!({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small", "namespace": stage.namespace}, "spec": {"limits": [{"type": "Container", "max": {"memory": "64Mi"}}]}});
    kubernetes::create(&stage.client, &limits, false).await.expect("a LimitRange");
    stage.create("too-large", |_| {}).await;
    refused(&stage, "too-large", "LimitRangeViolated", "maximum memory usage per Container is 64Mi").await;
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_spec_that_kubernetes_refuses_is_invalid_at_once_and_is_not_tried_all_the_time() {
    let stage = Stage::new("refused-jobs").await;
    let operator = stage.operator().await;
    stage
        .create("impossible", |job| {
            job["spec"]["scheduling"]["tolerations"] =
                json!([{"key": "gpu", "operator": "Exists", "value": "no value goes with Exists", "effect": "NoSchedule"}]);
        })
        .await;
    let invalid = stage.condition("impossible", "Failed", "True", "InvalidConfig").await;
    let (status, reason, message) = kubernetes::condition(&invalid, "Validated").expect("Validated");
    assert!(status == "False" && reason == "InvalidSpec" && message.contains("tolerations"), "{status} {reason} {message}");
    assert!(kubernetes::is_true(&invalid, "Stalled"), "kstatus must see it");
    assert_eq!((&invalid["status"]["phase"], &invalid["status"]["reason"]), (&json!("Failed"), &json!("InvalidConfig")));
    assert!(kubernetes::condition(&invalid, "Running").is_none() && kubernetes::condition(&invalid, "Admitted").is_none(), "{invalid:#}");
    tokio::time::sleep(Duration::from_secs(40)).await;
    let creations = operator.count(&["finetune_apiserver_requests_total{", "resource=\"jobs\"", "verb=\"create\""]);
    assert!(creations <= 3, "{creations} creations");
    // What is mended is tried at once.
    stage.patch("impossible", &json!({"spec": {"suspend": true}})).await;
    stage.condition("impossible", "Suspended", "True", "UserRequested").await;
    stage.patch("impossible", &json!({"spec": {"suspend": false, "scheduling": {"tolerations": []}}})).await;
    let mended = stage.condition("impossible", "JobCreated", "True", "Created").await;
    assert!(kubernetes::condition(&mended, "Failed").is_none() && !kubernetes::is_true(&mended, "Stalled"), "{mended:#}");
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_result_that_the_status_cannot_hold_does_not_keep_the_job_from_its_end() {
    let stage = Stage::new("refused-reports").await;
    let operator = stage.operator().await;
    for (name, length, kept) in [("long", 1500, 1), ("too-long", 2500, 0)] {
        stage.create(name, |_| {}).await;
        let pod = stage.pod(name, None).await;
        stage.start(&pod).await;
        let report = success().replace("s3://bucket/loras/corgi/pytorch", &format!("s3://bucket/{}/pytorch", "x".repeat(length)));
        stage.finish(&pod, 0, "Completed", &report).await;
        let done = stage.condition(name, "Complete", "True", "TrainingSucceeded").await;
        assert_eq!(done["status"]["artifacts"].as_array().map_or(0, Vec::len), kept, "{done:#}");
    }
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_status_write_that_comes_late_is_refused() {
    let stage = Stage::new("late-writes").await;
    let operator = stage.operator().await;
    stage.create("done", |_| {}).await;
    let early = stage.condition("done", "JobCreated", "True", "Created").await;
    let pod = stage.pod("done", None).await;
    stage.start(&pod).await;
    stage.finish(&pod, 0, "Completed", &success()).await;
    let done = stage.condition("done", "Complete", "True", "TrainingSucceeded").await;
    operator.stop().await;
    // What a leader that was replaced had decided before, and the API server carries out only now.
    let metadata = json!({"name": "done", "uid": early["metadata"]["uid"], "resourceVersion": early["metadata"]["resourceVersion"]});
    let late = json!({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "status": early["status"]});
    let jobs = kubernetes::api(&stage.client, "FineTuneJob", &stage.namespace);
    let refused = jobs.patch_status("done", &PatchParams::apply("finetune-operator").force(), &Patch::Apply(&late)).await.expect_err("a conflict");
    assert!(matches!(&refused, kube::Error::Api(status) if status.is_conflict()), "{refused}");
    assert_eq!(stage.get("done").await["status"], done["status"]);
}
