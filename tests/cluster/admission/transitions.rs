//! What may change after creation and what may not, removal and addition of optional parts included.

use serde_json::{Value, json};

use super::fixture::{NAMESPACE, at, cluster, complaints, job, merge};
use super::rules::all_rules;
use finetune_testing::kubernetes;

/// A change that a rule forbids.
struct Forbidden {
    /// Name that the rule's message begins with.
    rule: &'static str,
    /// What the existing job has beside the valid minimum.
    before: Value,
    /// The change of its spec.
    change: Value,
}

fn forbidden() -> Vec<Forbidden> {
    let mut all = Vec::new();
    let mut add = |rule: &'static str, before: Value, change: Value| all.push(Forbidden { rule, before, change });
    add("model ", json!({}), json!({"model": {"source": {"objectStore": {"uri": "s3://models/other/"}}}}));
    add("model ", json!({}), json!({"model": {"cache": {"persistentVolumeClaim": {"claimName": "cache"}}}}));
    add("dataset ", json!({}), json!({"dataset": {"repeats": 2}}));
    add("training ", json!({}), json!({"training": {"seed": 43}}));
    add("training ", json!({}), json!({"training": {"maxSteps": 5}}));
    add("training ", json!({"training": {"maxSteps": 5}}), json!({"training": {"maxSteps": null}}));
    add("checkpoint ", json!({}), json!({"checkpoint": {"everySteps": 7}}));
    add("resume ", json!({}), json!({"resume": {"policy": "Never"}}));
    add("output ", json!({}), json!({"output": {"uri": "s3://bucket/loras/other/"}}));
    add("serviceAccountName ", json!({}), json!({"serviceAccountName": "other"}));
    add("resources can only", json!({}), json!({"resources": {"requests": {"cpu": "1"}}}));
    add("podTemplate ", json!({}), json!({"podTemplate": {"labels": {"team": "b"}}}));
    add("image can only", json!({}), json!({"image": "registry/other:1"}));
    add("failurePolicy.maxRestartsPerHour ", json!({}), json!({"failurePolicy": {"maxRestartsPerHour": 1}}));
    add("startDeadlineSeconds ", json!({}), json!({"startDeadlineSeconds": 60}));
    add("ttlScope ", json!({}), json!({"ttlScope": "All"}));
    add("scheduling can only", json!({}), json!({"scheduling": {"nodeSelector": {"pool": "gpu"}}}));
    let optional = [
        ("validation ", "validation", json!({"prompts": ["a dog"]}), json!({"prompts": ["a cat"]})),
        ("storage ", "storage", json!({"region": "here"}), json!({"region": "there"})),
        ("queueName can only", "queueName", json!("gpu"), json!("other")),
        ("activeDeadlineSeconds can be changed", "activeDeadlineSeconds", json!(60), Value::Null),
    ];
    for (rule, field, value, other) in optional {
        add(rule, json!({}), json!({field: value}));
        add(rule, json!({field: value}), json!({field: null}));
        if !other.is_null() {
            add(rule, json!({field: value}), json!({field: other}));
        }
    }
    let queued = json!({"queueName": "gpu", "workloadPriorityClassName": "low"});
    add("workloadPriorityClassName can only", json!({"queueName": "gpu"}), json!({"workloadPriorityClassName": "low"}));
    add("workloadPriorityClassName can only", queued.clone(), json!({"workloadPriorityClassName": null}));
    add("workloadPriorityClassName can only", queued, json!({"workloadPriorityClassName": "high"}));
    all
}

#[test]
fn every_transition_rule_has_a_case() {
    let cases = forbidden();
    let missing: Vec<String> = all_rules()
        .into_iter()
        .filter(|(_, rule, message)| rule.contains("oldSelf") && !cases.iter().any(|case| message.starts_with(case.rule)))
        .map(|(_, _, message)| message)
        .collect();
    assert!(missing.is_empty(), "no case for {missing:#?}");
}

/// Creates a job, tries the change (as a dry run), deletes the job.
async fn try_change(client: &kube::Client, before: &Value, change: &Value) -> Vec<(String, String)> {
    let mut existing = job("transition");
    merge(&mut existing, &at("spec", before.clone()));
    kubernetes::delete(client, "FineTuneJob", NAMESPACE, "transition").await;
    kubernetes::create(client, &existing, false).await.unwrap_or_else(|error| panic!("{before} is not valid: {error}"));
    let answer = kubernetes::patch(client, "FineTuneJob", NAMESPACE, "transition", &at("spec", change.clone()), true).await;
    kubernetes::delete(client, "FineTuneJob", NAMESPACE, "transition").await;
    complaints(answer)
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn what_is_immutable_stays() {
    let client = cluster().await;
    for Forbidden { rule, before, change } in forbidden() {
        let complaints = try_change(&client, &before, &change).await;
        assert!(
            complaints.iter().any(|(_, message)| message.contains(rule)),
            "{before} + {change} should be refused by \"{rule}...\"; the API server says {complaints:?}"
        );
    }
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn what_is_mutable_changes() {
    let client = cluster().await;
    let suspended = json!({"suspend": true});
    let suspended_in_queue = json!({"suspend": true, "queueName": "gpu", "workloadPriorityClassName": "low"});
    for (before, change) in [
        (json!({}), json!({"suspend": true})),
        (suspended.clone(), json!({"suspend": false})),
        (json!({}), json!({"ttlSecondsAfterFinished": 5})),
        (json!({"activeDeadlineSeconds": 60}), json!({"activeDeadlineSeconds": 120})),
        (json!({}), json!({"progressDeadlineSeconds": 600})),
        (json!({"progressDeadlineSeconds": 600}), json!({"progressDeadlineSeconds": 900})),
        (json!({}), json!({"maxGPUSeconds": 3600})),
        (json!({"maxGPUSeconds": 3600}), json!({"maxGPUSeconds": 7200})),
        (json!({"maxGPUSeconds": 3600}), json!({"maxGPUSeconds": null})),
        (json!({}), json!({"failurePolicy": {"maxRetries": 9}})),
        (suspended.clone(), json!({"scheduling": {"nodeSelector": {"pool": "gpu"}}})),
        (suspended.clone(), json!({"scheduling": {"gpu": {"products": ["Tesla-T4"]}}})),
        (suspended.clone(), json!({"resources": {"requests": {"memory": "20Gi"}, "limits": {"memory": "24Gi"}}})),
        (suspended.clone(), json!({"image": "registry/other:1"})),
        (suspended.clone(), json!({"queueName": "gpu"})),
        (suspended_in_queue.clone(), json!({"queueName": "other"})),
        (suspended_in_queue.clone(), json!({"workloadPriorityClassName": "high"})),
        (suspended_in_queue, json!({"queueName": null, "workloadPriorityClassName": null})),
        // Resumed by the same change that moves the job.
        (suspended, json!({"suspend": false, "scheduling": {"nodeSelector": {"pool": "gpu"}}})),
    ] {
        let complaints = try_change(&client, &before, &change).await;
        assert!(complaints.is_empty(), "{before} + {change} should be accepted; the API server says {complaints:?}");
    }
}
