//! Whose Job it is: names that are taken, Jobs that vanish, jobs that come again under the same name.

use serde_json::json;

use super::stage::{SOON, Stage, success};
use finetune_testing::kubernetes;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_job_of_someone_else_is_never_touched() {
    let stage = Stage::new("conflict").await;
    let container = json!({"name": "c", "image": "x", "securityContext": {"allowPrivilegeEscalation": false, "runAsNonRoot": true, "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}}});
    let foreign = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "taken-train", "namespace": stage.namespace},
        "spec": {"suspend": true, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    });
    let before = kubernetes::create(&stage.client, &foreign, false).await.expect("a Job");
    let operator = stage.operator().await;
    stage.create("taken", |_| {}).await;
    let refused = stage.condition("taken", "JobCreated", "False", "NameConflict").await;
    assert_eq!(refused["status"]["phase"], "Pending");
    assert!(kubernetes::is_true(&refused, "Reconciling"), "kstatus must not take it for current");
    let after = stage.job("taken").await.expect("the foreign Job");
    // The Job controller writes its status; nobody else writes anything.
    for field in ["uid", "generation", "labels", "annotations", "ownerReferences", "deletionTimestamp"] {
        assert_eq!(after["metadata"][field], before["metadata"][field], "{field} of a foreign Job");
    }
    assert_eq!(after["spec"], before["spec"]);
    assert!(!after["metadata"]["managedFields"].to_string().contains("finetune-operator"), "the operator has written to a foreign Job");
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_job_deleted_by_hand_is_created_again_and_its_attempt_is_not_forgotten() {
    let stage = Stage::new("by-hand").await;
    let operator = stage.operator().await;
    stage.create("mine", |_| {}).await;
    let pod = stage.pod("mine", None).await;
    stage.start(&pod).await;
    stage.until("mine", "an attempt", |job| job["status"]["attempts"]["started"] == 1).await;
    let first = stage.job_uid("mine").await.expect("the Job");
    kubernetes::delete(&stage.client, "Job", &stage.namespace, "mine-train").await;
    let next = stage.pod("mine", Some(&pod)).await;
    assert_ne!(stage.job_uid("mine").await, Some(first));
    stage.start(&next).await;
    stage.finish(&next, 0, "Completed", &success()).await;
    let done = stage.condition("mine", "Complete", "True", "TrainingSucceeded").await;
    assert_eq!(done["status"]["attempts"], json!({"started": 2, "disrupted": 1, "failed": 0}));
    assert_eq!(done["status"]["attemptHistory"][0]["cause"], "Disrupted");
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_job_created_again_under_the_same_name_is_another_one() {
    let stage = Stage::new("again").await;
    let operator = stage.operator().await;
    stage.create("phoenix", |_| {}).await;
    let pod = stage.pod("phoenix", None).await;
    stage.start(&pod).await;
    stage.until("phoenix", "an attempt", |job| job["status"]["attempts"]["started"] == 1).await;
    let first = stage.job_uid("phoenix").await.expect("the Job");
    kubernetes::delete(&stage.client, "FineTuneJob", &stage.namespace, "phoenix").await;
    stage.create("phoenix", |_| {}).await;
    let next = stage.pod("phoenix", Some(&pod)).await;
    assert_ne!(stage.job_uid("phoenix").await, Some(first), "the Job of the first one is not adopted");
    stage.start(&next).await;
    let second = stage.until("phoenix", "an attempt", |job| job["status"]["attempts"]["started"] == 1).await;
    assert_eq!(second["status"]["attemptHistory"].as_array().map(Vec::len), Some(1), "attempts of the first one are not its own");
    kubernetes::delete(&stage.client, "FineTuneJob", &stage.namespace, "phoenix").await;
    kubernetes::eventually("everything to be collected", SOON, || async {
        let job = kubernetes::get(&stage.client, "Job", &stage.namespace, "phoenix-train").await;
        (job.is_none() && stage.live_pods("phoenix").await.is_empty()).then_some(())
    })
    .await;
    operator.stop().await;
}
