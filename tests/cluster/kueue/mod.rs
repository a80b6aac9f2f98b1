//! Queueing with a real Kueue: one GPU of quota, priorities, preemption, suspension.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::support::jobs::{micro, prefix};
use crate::support::stage::{BUCKET, LONG, SHORT, Stage, stage};
use finetune_testing::kubernetes::{self, condition};
use finetune_testing::programs::{cluster, kubectl, kubectl_with_input};

/// Long enough that the test can act in the middle of it.
const STEPS: u64 = 2000;

/// A queue of the test's namespace with quota for one GPU, and two priorities.
fn queue(namespace: &str) -> Value {
    let quota = |name: &str, amount: &str| json!({"name": name, "nominalQuota": amount});
    let items = json!([
        {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor", "metadata": {"name": "gpu"}},
        {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ClusterQueue", "metadata": {"name": "one-gpu"}, "spec": {
            "namespaceSelector": {},
            "preemption": {"withinClusterQueue": "LowerPriority"},
            "resourceGroups": [{
                "coveredResources": ["cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"],
                "flavors": [{"name": "gpu", "resources": [quota("cpu", "8"), quota("memory", "64Gi"), quota("ephemeral-storage", "500Gi"), quota("nvidia.com/gpu", "1")]}],
            }],
        }},
        {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": "gpu", "namespace": namespace}, "spec": {"clusterQueue": "one-gpu"}},
        {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "WorkloadPriorityClass", "metadata": {"name": "low"}, "value": 100},
        {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "WorkloadPriorityClass", "metadata": {"name": "high"}, "value": 1000},
    ]);
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

fn queued(namespace: &str, name: &str, priority: &str, steps: u64) -> Value {
    micro(namespace, name, steps, &json!({"queueName": "gpu", "workloadPriorityClassName": priority}))
}

/// Waits until the job has no quota for one of these reasons.
async fn until_waiting(stage: &Stage, name: &str, reasons: &[&str]) -> Value {
    stage
        .until(&format!("{name} to wait: {reasons:?}"), SHORT, || async {
            let job = stage.job(name).await;
            let waits = condition(&job, "Admitted").is_some_and(|(status, reason, _)| status == "False" && reasons.contains(&reason.as_str()));
            // A preempted trainer runs on until its checkpoint is saved.
            (waits && job["status"]["phase"] == "Queued").then_some(job)
        })
        .await
}

/// Trainer pods that run or may run.
async fn alive(stage: &Stage) -> BTreeSet<String> {
    let pods = stage.list("Pod").await;
    let live = pods.iter().filter(|pod| !["Succeeded", "Failed"].contains(&pod["status"]["phase"].as_str().unwrap_or_default()));
    live.map(|pod| pod["metadata"]["name"].as_str().unwrap_or_default().to_owned()).collect()
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn kueue_admits_preempts_and_requeues_and_the_result_is_the_same() {
    let stage = stage("e2e-queue").await;
    cluster(&["kueue"]);
    kubectl_with_input(&["apply", "--server-side", "-f", "-"], &queue(stage.namespace).to_string()).unwrap_or_else(|error| panic!("{error}"));
    // The operator looks for Kueue's CRDs from time to time.
    one_after_the_other(&stage).await;
    let expected = stage.lora(BUCKET, &prefix(stage.namespace, "first")).await;
    preemption(&stage, &expected).await;
    suspension(&stage, &expected).await;
}

/// Two jobs, one GPU of quota.
async fn one_after_the_other(stage: &Stage) {
    stage.submit(&queued(stage.namespace, "first", "low", STEPS)).await;
    stage.until_true("first", "Running", LONG).await;
    assert_eq!(condition(&stage.job("first").await, "Admitted").map(|(_, reason, _)| reason).as_deref(), Some("QuotaReserved"));
    stage.submit(&queued(stage.namespace, "second", "low", 100)).await;
    let waiting = until_waiting(stage, "second", &["WaitingForQuota"]).await;
    assert_eq!(waiting["status"]["queue"]["name"], "gpu");
    assert!(stage.pods("second").await.is_empty(), "no pod without quota");
    // To kstatus it is current: a deployment does not wait for a GPU to be free.
    assert_eq!(waiting["status"]["observedGeneration"], waiting["metadata"]["generation"]);
    assert!(!kubernetes::is_true(&waiting, "Reconciling") && !kubernetes::is_true(&waiting, "Stalled"), "{waiting}");

    stage.until_true("first", "Complete", LONG).await;
    let second = stage.until_true("second", "Complete", LONG).await;
    assert_eq!(second["status"]["attempts"]["started"], 1);
}

/// A higher-priority job takes the GPU; the victim checkpoints, waits, resumes and ends with the same LoRA.
async fn preemption(stage: &Stage, expected: &[u8]) {
    stage.submit(&queued(stage.namespace, "victim", "low", STEPS)).await;
    stage.until_step("victim", 100).await;
    stage.submit(&queued(stage.namespace, "urgent", "high", STEPS)).await;
    let victim = until_waiting(stage, "victim", &["Preempted", "Evicted", "WaitingForQuota"]).await;
    stage.until_true("urgent", "Running", LONG).await;
    let alive = alive(stage).await;
    assert!(alive.iter().all(|pod| pod.starts_with("urgent")), "the victim has given the GPU back: {alive:?}");
    assert!(victim["status"]["lastCheckpoint"]["step"].as_u64().unwrap_or(0) >= 50, "{victim}");

    stage.until_true("urgent", "Complete", LONG).await;
    let victim = stage.until_true("victim", "Complete", LONG).await;
    assert_eq!(victim["status"]["attempts"]["failed"], 0, "{victim}");
    assert!(victim["status"]["attempts"]["started"].as_u64() >= Some(2), "{victim}");
    let resumed = stage.resumed_at("victim").await;
    assert!(resumed >= 50, "the victim must not start afresh: it resumed at step {resumed}");
    assert!(stage.lora(BUCKET, &prefix(stage.namespace, "victim")).await == expected, "the victim's LoRA differs from an undisturbed run's");
}

/// `suspend` of an admitted job releases its quota; resuming goes on.
async fn suspension(stage: &Stage, expected: &[u8]) {
    stage.submit(&queued(stage.namespace, "paused", "low", STEPS)).await;
    stage.until_step("paused", 100).await;
    let suspend =
        |value: bool| kubectl(&["-n", stage.namespace, "patch", "ftj", "paused", "--type=merge", "-p", &json!({"spec": {"suspend": value}}).to_string()]);
    suspend(true).unwrap_or_else(|error| panic!("{error}"));
    let paused = stage.until_true("paused", "Suspended", LONG).await;
    assert_eq!(paused["status"]["phase"], "Suspended");
    stage.submit(&queued(stage.namespace, "other", "low", 100)).await;
    stage.until_true("other", "Complete", LONG).await;
    assert!(stage.pods("paused").await.iter().all(|pod| pod["status"]["phase"] != "Running"));

    suspend(false).unwrap_or_else(|error| panic!("{error}"));
    let done = stage.until_true("paused", "Complete", LONG).await;
    assert_eq!(done["status"]["attempts"]["failed"], 0, "{done}");
    let resumed = stage.resumed_at("paused").await;
    assert!(resumed >= 50, "it must not start afresh: it resumed at step {resumed}");
    assert!(kubernetes::get(&stage.client, "Job", stage.namespace, "paused-train").await.is_some());
    assert!(stage.lora(BUCKET, &prefix(stage.namespace, "paused")).await == expected, "the resumed LoRA differs from an undisturbed run's");
}
