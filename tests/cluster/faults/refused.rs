//! Faults that end or hold a job, each with the condition and the reason that tell what to do.

use serde_json::json;

use crate::support::jobs::micro;
use crate::support::stage::{BUCKET, LONG, SHORT, stage};
use finetune_testing::kubernetes::{self, condition};

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_missing_secret_is_named_and_its_arrival_starts_the_job() {
    let stage = stage("e2e-faults").await;
    kubernetes::delete(&stage.client, "Secret", stage.namespace, "late").await;
    let storage = json!({"storage": {"endpoint": stage.site.endpoint, "region": "us-east-1", "credentials": {"secretRef": {"name": "late"}}}});
    stage.submit(&micro(stage.namespace, "secretless", 20, &storage)).await;
    stage
        .until("the missing secret to be named", SHORT, || async {
            let (_, reason, message) = condition(&stage.job("secretless").await, "Running")?;
            (reason == "SecretNotFound" && message.contains("late")).then_some(())
        })
        .await;
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "late", "namespace": stage.namespace},
        "stringData": {"AWS_ACCESS_KEY_ID": finetune_testing::s3::ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": finetune_testing::s3::SECRET_KEY},
    });
    kubernetes::create(&stage.client, &secret, false).await.expect("a secret");
    stage.until_true("secretless", "Complete", LONG).await;
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn wrong_credentials_fail_at_once() {
    let stage = stage("e2e-faults").await;
    kubernetes::delete(&stage.client, "Secret", stage.namespace, "wrong").await;
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "wrong", "namespace": stage.namespace},
        "stringData": {"AWS_ACCESS_KEY_ID": finetune_testing::s3::ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": "not-the-secret"},
    });
    kubernetes::create(&stage.client, &secret, false).await.expect("a secret");
    let storage = json!({"storage": {"endpoint": stage.site.endpoint, "region": "us-east-1", "credentials": {"secretRef": {"name": "wrong"}}}});
    stage.submit(&micro(stage.namespace, "forbidden", 20, &storage)).await;
    let failed = stage.until_true("forbidden", "Failed", LONG).await;
    let (_, reason, message) = condition(&failed, "Failed").expect("Failed");
    assert_eq!(reason, "PermissionDenied", "{message}");
    assert_eq!(failed["status"]["attempts"]["started"], 1, "trying again would not help");
    assert!(!failed.to_string().contains("not-the-secret"), "the secret is not told");
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_job_that_no_node_fits_says_so_and_ends_at_its_deadline() {
    let stage = stage("e2e-faults").await;
    let huge = json!({"scheduling": {"gpu": {"minMemoryMiB": 30000, "maxMemoryMiB": 40000}}, "startDeadlineSeconds": 20});
    stage.submit(&micro(stage.namespace, "homeless", 20, &huge)).await;
    stage
        .until("the job to say that it cannot be scheduled", SHORT, || async {
            let (status, reason, _) = condition(&stage.job("homeless").await, "PodsScheduled")?;
            (status == "False" && ["Unschedulable", "NoMatchingGPUNode"].contains(&reason.as_str())).then_some(())
        })
        .await;
    let failed = stage.until_true("homeless", "Failed", SHORT * 2).await;
    assert_eq!(condition(&failed, "Failed").map(|(_, reason, _)| reason).as_deref(), Some("StartDeadlineExceeded"));
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn an_oom_killed_trainer_is_told_apart_from_a_crash() {
    let stage = stage("e2e-faults").await;
    // A file of a few hundred kilobytes, 75 MB in memory.
    let dataset = tempfile::tempdir().expect("a folder");
    image::RgbImage::from_pixel(5000, 5000, image::Rgb([200, 30, 30])).save(dataset.path().join("large.png")).expect("a picture");
    std::fs::write(dataset.path().join("metadata.jsonl"), "{\"file_name\": \"large.png\", \"caption\": \"a red wall\"}\n").expect("its caption");
    stage.site.s3.lock().await.upload(BUCKET, dataset.path(), "large/").await;
    let small = json!({
        "dataset": {"uri": format!("s3://{BUCKET}/large/")},
        "resources": {"requests": {"memory": "16Mi"}, "limits": {"memory": "32Mi"}},
        "failurePolicy": {"maxRetries": 0},
    });
    stage.submit(&micro(stage.namespace, "small", 20, &small)).await;
    let failed = stage.until_true("small", "Failed", LONG).await;
    let (_, reason, message) = condition(&failed, "Failed").expect("Failed");
    assert!(reason == "HostOutOfMemory" || failed["status"]["failure"]["reason"] == "HostOutOfMemory", "{reason}: {message}");
}
