//! Faults that must not change the result.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::nodes::never_two;
use crate::support::jobs::{micro, prefix};
use crate::support::stage::{BUCKET, LONG, SHORT, Stage, stage};
use finetune_testing::kubernetes;
use finetune_testing::programs::{cluster, kubectl};

/// Long enough that a test can act in the middle of it.
pub(crate) const STEPS: u64 = 5000;

static UNDISTURBED: OnceCell<Vec<u8>> = OnceCell::const_new();

/// The LoRA of an undisturbed run, which is the same for every job of [`STEPS`] steps.
pub(crate) async fn undisturbed(stage: &Stage) -> &'static [u8] {
    let train = async || {
        stage.submit(&micro(stage.namespace, "undisturbed", STEPS, &json!({}))).await;
        stage.until_true("undisturbed", "Complete", LONG).await;
        stage.lora(BUCKET, &prefix(stage.namespace, "undisturbed")).await
    };
    UNDISTURBED.get_or_init(train).await
}

/// Runs a job, disturbs it in its middle, and compares its LoRA with that of an undisturbed one. Answers with the finished job, and with the step from
/// which its last pod went on.
async fn disturb<F: AsyncFnOnce(&Stage)>(fault: F) -> (Value, u64) {
    let stage = stage("e2e-faults").await;
    let expected = undisturbed(&stage).await;
    stage.submit(&micro(stage.namespace, "disturbed", STEPS, &json!({}))).await;
    stage.until_step("disturbed", 100).await;
    let watch = never_two(&stage.client, stage.namespace, "disturbed");
    fault(&stage).await;
    let done = stage.until_true("disturbed", "Complete", LONG).await;
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
    assert!(stage.lora(BUCKET, &prefix(stage.namespace, "disturbed")).await == expected, "the LoRA differs from an undisturbed run's");
    assert_eq!(done["status"]["attempts"]["failed"], 0, "{done}");
    let resumed = stage.resumed_at("disturbed").await;
    (done, resumed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_restarted_kubelet_is_not_noticed() {
    let (done, resumed) = disturb(async |_| {
        cluster(&["stop", "node1-kubelet"]);
        tokio::time::sleep(Duration::from_secs(10)).await;
        cluster(&["start", "node1-kubelet"]);
    })
    .await;
    assert_eq!((&done["status"]["attempts"]["started"], resumed), (&json!(1), 0), "training goes on in the same container");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_drained_node_gives_the_job_back_and_it_goes_on() {
    let (done, resumed) = disturb(async |stage| {
        kubectl(&["drain", "node1", "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s"]).unwrap_or_else(|error| panic!("{error}"));
        stage
            .until("the job to say that no node fits", SHORT, || async {
                let waits = kubernetes::condition(&stage.job("disturbed").await, "PodsScheduled").is_some_and(|(status, _, _)| status == "False");
                waits.then_some(())
            })
            .await;
        kubectl(&["uncordon", "node1"]).unwrap_or_else(|error| panic!("{error}"));
    })
    .await;
    assert_eq!(done["status"]["attempts"], json!({"started": 2, "disrupted": 1, "failed": 0}));
    assert!(resumed >= 100, "it resumed at step {resumed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_restarted_api_server_is_survived() {
    let (done, _) = disturb(async |stage| {
        cluster(&["stop", "kube-apiserver"]);
        tokio::time::sleep(Duration::from_secs(8)).await;
        cluster(&["start", "kube-apiserver"]);
        stage.until("the API server", SHORT, || async { kubectl(&["get", "--raw", "/readyz"]).ok().map(|_| ()) }).await;
    })
    .await;
    assert_eq!(done["status"]["attempts"]["started"], 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn an_absent_bucket_is_waited_for() {
    disturb(async |stage| {
        let mut s3 = stage.site.s3.lock().await;
        s3.down();
        tokio::time::sleep(Duration::from_mins(1)).await;
        s3.up().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_job_deleted_by_hand_comes_back_and_goes_on() {
    let (done, resumed) = disturb(async |stage| {
        kubectl(&["-n", stage.namespace, "delete", "job", "disturbed-train", "--wait=true"]).unwrap_or_else(|error| panic!("{error}"));
    })
    .await;
    assert_eq!(done["status"]["attempts"]["started"], 2, "{done}");
    assert!(resumed >= 100, "it resumed at step {resumed}");
}
