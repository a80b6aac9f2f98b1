//! A node that is gone, for Kubernetes: its kubelet is killed, and its containers run on.

use std::process::Command;
use std::time::Duration;

use kube::Client;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::disturbed::{STEPS, undisturbed};
use crate::support::jobs::{micro, prefix};
use crate::support::stage::{BUCKET, LONG, SHORT, Stage, stage};
use finetune_testing::kubernetes;
use finetune_testing::programs::{self, cluster, kubectl, repository};

/// Enough for the old trainer to run while its successor starts.
const STEPS_ELSEWHERE: u64 = 6_000;

/// Puts the nodes back as they were, however the test ends.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        let testbed = |arguments: &[&str]| drop(programs::run(Command::new(repository().join("tests/testbed/cluster")).args(arguments)));
        testbed(&["stop", "node1-kubelet"]);
        testbed(&["start", "node1-kubelet"]);
        let _undone = kubectl(&["taint", "nodes", "node1", "node.kubernetes.io/out-of-service-"]);
        let _undone = kubectl(&["label", "node", "node2", "nvidia.com/gpu.memory=24576", "--overwrite"]);
        // Right after the restart its condition is still the old one.
        let _ready = kubectl(&["wait", "--for=condition=Ready", "node/node1", "--timeout=90s"]);
    }
}

/// A fraction of a processor, so that the trainer still runs when its node is given up; and that happens after seconds instead of minutes.
fn slowly() -> Value {
    let lost = |key: &str| json!({"key": format!("node.kubernetes.io/{key}"), "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5});
    json!({
        "resources": {"requests": {"cpu": "50m"}, "limits": {"cpu": "100m"}},
        "scheduling": {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, lost("unreachable"), lost("not-ready")]},
        "podTemplate": {"terminationGracePeriodSeconds": 5},
    })
}

/// Starts a job, kills the kubelet under it, and waits until the job shows that its node is lost: the trainer's pod, and what is shown.
async fn lose_the_node(stage: &Stage, name: &str, steps: u64) -> (Value, String) {
    stage.submit(&micro(stage.namespace, name, steps, &slowly())).await;
    stage.until_step(name, 60).await;
    let pod = stage.pods(name).await.remove(0);
    assert_eq!(pod["spec"]["nodeName"], "node1");
    cluster(&["stop", "node1-kubelet"]);
    let told = stage
        .until("the lost node to be told", LONG, || async {
            let (status, reason, message) = kubernetes::condition(&stage.job(name).await, "Running")?;
            (status == "False" && reason == "NodeLost").then_some(message)
        })
        .await;
    (pod, told)
}

/// Looks again and again that the API never shows two pods of the job that have not ended.
pub(crate) fn never_two(client: &Client, namespace: &'static str, job: &'static str) -> JoinHandle<()> {
    let client = client.clone();
    tokio::spawn(async move {
        loop {
            // The API server may be away: then it shows nothing.
            if let Ok(pods) =
                kubernetes::api(&client, "Pod", namespace).list(&kube::api::ListParams::default().labels(&format!("finetune.dev/job={job}"))).await
            {
                let live: Vec<_> =
                    pods.items.iter().filter(|pod| !["Succeeded", "Failed"].contains(&pod.data["status"]["phase"].as_str().unwrap_or_default())).collect();
                assert!(live.len() <= 1, "two pods of one job at once: {live:#?}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}

/// What the container of a pod has written, from its node: the API server may know the pod no more.
fn log_on_node(node: &str, namespace: &str, pod: &Value) -> String {
    let part = |field: &str| pod["metadata"][field].as_str().unwrap_or_default();
    cluster(&["node", node, "sh", "-c", &format!("cat /var/log/pods/{namespace}_{}_{}/trainer/*.log", part("name"), part("uid"))])
}

/// Whether the container runs, by its node's runtime.
fn runs_on_node(node: &str, pod: &Value) -> bool {
    let id = pod["status"]["containerStatuses"][0]["containerID"].as_str().and_then(|id| id.split_once("://")).expect("a container").1.to_owned();
    let tasks = cluster(&["node", node, "ctr", "-a", "/run/ft/containerd.sock", "-n", "k8s.io", "tasks", "ls"]);
    tasks.lines().any(|line| line.starts_with(&id) && line.contains("RUNNING"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_lost_node_is_told_and_the_job_goes_on_elsewhere_while_the_old_trainer_still_runs() {
    let stage = stage("e2e-faults").await;
    let _restored = Restored;
    stage.submit(&micro(stage.namespace, "undisturbed", STEPS_ELSEWHERE, &json!({}))).await;
    stage.until_true("undisturbed", "Complete", LONG).await;
    let expected = stage.lora(BUCKET, &prefix(stage.namespace, "undisturbed")).await;

    let watch = never_two(&stage.client, stage.namespace, "disturbed");
    let (old, lost) = lose_the_node(&stage, "disturbed", STEPS_ELSEWHERE).await;
    for way_out in ["node1", "kubectl delete node", "node.kubernetes.io/out-of-service"] {
        assert!(lost.contains(way_out), "{way_out} is not named: {lost}");
    }
    assert!(runs_on_node("1", &old), "the old trainer must still run for this test to mean anything");

    kubectl(&["label", "node", "node2", "nvidia.com/gpu.memory=15360", "--overwrite"]).unwrap_or_else(|error| panic!("{error}"));
    kubectl(&["taint", "nodes", "node1", "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"]).unwrap_or_else(|error| panic!("{error}"));
    stage
        .until("a pod on the other node", SHORT * 2, || async {
            stage.pods("disturbed").await.into_iter().find(|pod| pod["spec"]["nodeName"] == "node2" && pod["status"]["phase"] == "Running")
        })
        .await;
    // It still ran when its successor took its claim, for it says so; it may be gone a moment later. It notices before it writes the next
    // checkpoint, and publishes nothing.
    stage
        .until("the old trainer to give way", LONG, || async { log_on_node("1", stage.namespace, &old).contains("superseded by attempt 2").then_some(()) })
        .await;

    let done = stage.until_true("disturbed", "Complete", LONG).await;
    assert_eq!(done["status"]["attempts"], json!({"started": 2, "disrupted": 1, "failed": 0}), "{done}");
    assert!(stage.lora(BUCKET, &prefix(stage.namespace, "disturbed")).await == expected, "the LoRA differs from an undisturbed run's");
    let s3 = stage.site.s3.lock().await;
    let result = s3.read(BUCKET, &format!("{}result.json", prefix(stage.namespace, "disturbed"))).await.expect("result.json");
    let result: Value = serde_json::from_slice(&result).expect("JSON");
    assert_eq!(result["attempt"], 2, "the newest claim publishes");
    let runs = s3.list(BUCKET, &format!("{}runs/", prefix(stage.namespace, "disturbed"))).await;
    assert!(runs.iter().all(|file| file.contains("/runs/e2/")), "the old trainer has published: {runs:?}");
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_trainer_that_ends_on_a_lost_node_is_heard_when_the_node_is_back() {
    let stage = stage("e2e-faults").await;
    let _restored = Restored;
    let expected = undisturbed(&stage).await;
    let (pod, _) = lose_the_node(&stage, "alone", STEPS).await;
    // With a fraction of a processor, and nobody reports how far it is.
    stage.until("the trainer to end by itself", LONG * 3, || async { (!runs_on_node("1", &pod)).then_some(()) }).await;
    cluster(&["start", "node1-kubelet"]);
    let done = stage.until_true("alone", "Complete", LONG).await;
    assert_eq!(done["status"]["attempts"], json!({"started": 1, "disrupted": 0, "failed": 0}), "{done}");
    assert_eq!(done["status"]["progress"]["step"], STEPS, "its last words are told: {done}");
    assert_eq!(done["status"]["artifacts"].as_array().map(Vec::len), Some(2), "{done}");
    assert!(stage.lora(BUCKET, &prefix(stage.namespace, "alone")).await == expected, "the LoRA differs from an undisturbed run's");
}
