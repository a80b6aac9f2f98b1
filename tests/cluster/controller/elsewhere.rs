//! A Job that another controller runs in another cluster, as Kueue's MultiKueue does: a policy in place of Kueue's webhook sets `spec.managedBy`, and the test
//! mirrors the status.

use std::time::Duration;

use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::stage::{SOON, Stage};
use finetune_testing::kubernetes;
use finetune_testing::programs::kubectl_with_input;

/// What Kueue's webhook does to each Job of a queue with a MultiKueue check.
fn webhook(namespace: &str) -> String {
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicy", "metadata": {"name": namespace},
        "spec": {
            "failurePolicy": "Fail", "reinvocationPolicy": "Never",
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "resourceRules": [{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}],
            },
            "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": "Object{spec: Object.spec{managedBy: 'kueue.x-k8s.io/multikueue'}}"}}],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicyBinding", "metadata": {"name": namespace},
        "spec": {"policyName": namespace},
    });
    json!({"apiVersion": "v1", "kind": "List", "items": [policy, binding]}).to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_job_in_another_cluster_is_followed_by_its_mirrored_status() {
    let stage = Stage::new("elsewhere").await;
    let webhook = webhook(&stage.namespace);
    kubectl_with_input(&["apply", "--server-side", "--validate=strict", "-f", "-"], &webhook).unwrap_or_else(|error| panic!("{error}"));
    let probe = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe", "namespace": stage.namespace},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}},
    });
    kubernetes::eventually("the policy to be in force", SOON, || async {
        let created = kubernetes::create(&stage.client, &probe, true).await.ok()?;
        created["spec"]["managedBy"].is_string().then_some(())
    })
    .await;

    let operator = stage.operator().await;
    stage.create("abroad", |job| job["spec"]["ttlSecondsAfterFinished"] = json!(3)).await;
    let waits = stage.condition("abroad", "Running", "False", "StartingOnWorkerCluster").await;
    assert_eq!((&waits["status"]["phase"], &waits["status"]["reason"]), (&json!("Starting"), &json!("StartingOnWorkerCluster")));
    let job = stage.job("abroad").await.expect("the Job");
    assert_eq!(job["spec"]["managedBy"], "kueue.x-k8s.io/multikueue");

    let start = "2026-08-24T10:00:00Z";
    mirror(&stage, &json!({"active": 1, "ready": 1, "startTime": start})).await;
    let runs = stage.condition("abroad", "Running", "Unknown", "RunningOnWorkerCluster").await;
    assert_eq!((&runs["status"]["phase"], &runs["status"]["startTime"]), (&json!("Running"), &json!(start)));
    // For longer than it takes until a missing pod is looked for.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let quiet = [
        operator.count(&["finetune_apiserver_requests_total{", "resource=\"events\"", "verb=\"list\""]),
        operator.count(&["finetune_reconcile_errors_total{"]),
        operator.count(&["finetune_apiserver_requests_total{", "resource=\"jobs\"", "verb=\"patch\""]),
    ];
    assert_eq!(quiet, [0, 0, 0], "looks for events, errors, changes of the Job");
    assert_eq!(stage.get("abroad").await["status"], runs["status"]);
    assert!(stage.live_pods("abroad").await.is_empty());

    let end = "2026-08-24T10:10:00Z";
    let condition = |type_: &str| json!({"type": type_, "status": "True", "reason": "CompletionsReached", "lastProbeTime": end, "lastTransitionTime": end});
    mirror(
        &stage,
        &json!({
            "active": 0, "ready": 0, "terminating": 0, "succeeded": 1, "completedIndexes": "0", "startTime": start, "completionTime": end,
            "conditions": [condition("SuccessCriteriaMet"), condition("Complete")],
        }),
    )
    .await;
    let done = stage.condition("abroad", "Complete", "True", "TrainingSucceeded").await;
    let (_, _, message) = kubernetes::condition(&done, "Complete").expect("Complete");
    assert!(message.contains("another cluster"), "{message}");
    kubernetes::eventually("the Job's end", SOON, || async { stage.job("abroad").await.is_none().then_some(()) }).await;
    operator.stop().await;
    kubectl_with_input(&["delete", "-f", "-"], &webhook).unwrap_or_else(|error| panic!("{error}"));
}

/// As MultiKueue: the Job's status is the other cluster's.
async fn mirror(stage: &Stage, status: &Value) {
    let jobs = kubernetes::api(&stage.client, "Job", &stage.namespace);
    let status = json!({"status": status});
    jobs.patch_status("abroad-train", &PatchParams::default(), &Patch::Merge(&status)).await.expect("the API server takes the status");
}
