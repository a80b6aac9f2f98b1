//! What must not change the result: an evicted pod, a killed operator. And what must be told: a bad dataset.

use serde_json::json;

use crate::support::jobs::{micro, prefix};
use crate::support::stage::{BUCKET, LONG, RELEASE, SHORT, SYSTEM, Stage, stage};
use finetune_testing::kubernetes::{self, condition};
use finetune_testing::programs::{self, kubectl};

/// Long enough that a test can act in the middle of it.
const STEPS: u64 = 2000;

/// The LoRA of an undisturbed run of the same specification.
async fn undisturbed(stage: &Stage) -> Vec<u8> {
    stage.submit(&micro(stage.namespace, "undisturbed", STEPS, &json!({}))).await;
    stage.until_true("undisturbed", "Complete", LONG).await;
    stage.lora(BUCKET, &prefix(stage.namespace, "undisturbed")).await
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn an_evicted_trainer_goes_on_from_its_checkpoint() {
    let stage = stage("e2e-eviction").await;
    let expected = undisturbed(&stage).await;
    stage.submit(&micro(stage.namespace, "evicted", STEPS, &json!({}))).await;
    stage.until_step("evicted", 100).await;
    let victim = stage.pods("evicted").await.remove(0);
    let name = victim["metadata"]["name"].as_str().expect("a name").to_owned();
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": stage.namespace}});
    let path = format!("/api/v1/namespaces/{}/pods/{name}/eviction", stage.namespace);
    programs::kubectl_with_input(&["create", "--raw", &path, "-f", "-"], &eviction.to_string()).unwrap_or_else(|error| panic!("{error}"));

    let done = stage.until_true("evicted", "Complete", LONG).await;
    assert_eq!(done["status"]["attempts"], json!({"started": 2, "disrupted": 1, "failed": 0}), "a disruption is no failure");
    assert_eq!(done["status"]["progress"]["step"], STEPS);
    let resumed = stage.resumed_at("evicted").await;
    assert!(resumed >= 100, "the second attempt must not start afresh: it resumed at step {resumed}");
    assert!(stage.lora(BUCKET, &prefix(stage.namespace, "evicted")).await == expected, "the LoRA differs from an undisturbed run's");
}

/// The pod that leads.
async fn leader(stage: &Stage) -> Option<String> {
    let lease = kubernetes::get(&stage.client, "Lease", SYSTEM, RELEASE).await?;
    // "<pod>_<process id>"
    let holder = lease["spec"]["holderIdentity"].as_str()?.split('_').next().filter(|name| !name.is_empty())?.to_owned();
    kubernetes::get(&stage.client, "Pod", SYSTEM, &holder).await.map(|_| holder)
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_killed_leader_is_replaced_and_training_does_not_notice() {
    let stage = stage("e2e-operator-kill").await;
    stage.submit(&micro(stage.namespace, "steady", STEPS, &json!({}))).await;
    stage.until_step("steady", 1).await;
    let first = stage.until("a leader", SHORT, || leader(&stage)).await;
    kubectl(&["-n", SYSTEM, "delete", "pod", &first, "--grace-period=0", "--force"]).unwrap_or_else(|error| panic!("{error}"));
    let second = stage.until("another leader", SHORT, || async { leader(&stage).await.filter(|holder| *holder != first) }).await;
    assert_ne!(first, second);

    let done = stage.until_true("steady", "Complete", LONG).await;
    assert_eq!(done["status"]["attempts"], json!({"started": 1, "disrupted": 0, "failed": 0}));
    assert_eq!(stage.list("Job").await.len(), 1, "one Job, whoever led");
    kubectl(&["-n", SYSTEM, "rollout", "status", &format!("deployment/{RELEASE}"), "--timeout=60s"]).unwrap_or_else(|error| panic!("{error}"));
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_bad_dataset_fails_at_once_and_names_every_bad_line() {
    let stage = stage("e2e-bad-dataset").await;
    let metadata = "{\"file_name\": \"missing-1.png\", \"caption\": \"one\"}\nnot json\n{\"file_name\": \"missing-2.png\"}\n";
    stage.site.s3.lock().await.write(BUCKET, "bad-dataset/metadata.jsonl", metadata.into()).await;
    let bad = json!({"dataset": {"uri": format!("s3://{BUCKET}/bad-dataset/")}, "failurePolicy": {"maxRetries": 3}});
    stage.submit(&micro(stage.namespace, "bad", 10, &bad)).await;

    let failed = stage.until_true("bad", "Failed", LONG).await;
    let (_, reason, message) = condition(&failed, "Failed").expect("Failed");
    assert_eq!(reason, "InvalidDataset", "{message}");
    for line in ["1", "2", "3"] {
        assert!(message.contains(line), "line {line} is not named: {message}");
    }
    assert_eq!(failed["status"]["phase"], "Failed");
    assert_eq!(failed["status"]["failure"]["exitCode"], 65);
    assert_eq!(failed["status"]["attempts"]["started"], 1, "trying again would not help");
    assert!(kubernetes::is_true(&failed, "Stalled"), "kstatus sees the failure");
    let events = kubernetes::list(&stage.client, "Event", stage.namespace, "").await;
    assert!(events.iter().any(|event| event["reason"] == "InvalidDataset" && event["regarding"]["name"] == "bad"), "no event tells");

    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    assert_eq!(stage.pods("bad").await.len(), 1, "no second pod after the end");
}
