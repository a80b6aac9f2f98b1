//! GitOps: Helm judges a FineTuneJob by kstatus, and re-applied manifests change nothing.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::jobs::micro;
use crate::support::stage::{LONG, RELEASE, SHORT, SYSTEM, Stage, stage};
use finetune_testing::kubernetes;
use finetune_testing::programs::{helm, kubectl, kubectl_with_input};

/// A chart with one FineTuneJob and nothing else.
fn chart(folder: &Path, job: &Value) {
    std::fs::create_dir_all(folder.join("templates")).expect("a folder");
    std::fs::write(folder.join("Chart.yaml"), "apiVersion: v2\nname: style\nversion: 1.0.0\n").expect("Chart.yaml");
    std::fs::write(folder.join("templates/job.yaml"), serde_yaml::to_string(job).expect("YAML")).expect("the template");
}

/// `helm upgrade --install --wait` of a chart with this job.
fn deploy(stage: &Stage, release: &str, job: &Value, timeout: &str) -> Result<String, String> {
    let folder = tempfile::tempdir().expect("a folder");
    chart(folder.path(), job);
    helm(&["upgrade", "--install", release, &folder.path().display().to_string(), "-n", stage.namespace, "--wait", "--timeout", timeout])
}

/// Stops or starts the operator and waits until that is so.
async fn scale(stage: &Stage, replicas: u32) {
    kubectl(&["-n", SYSTEM, "scale", &format!("deployment/{RELEASE}"), &format!("--replicas={replicas}")]).unwrap_or_else(|error| panic!("{error}"));
    stage
        .until("the operator's pods", SHORT, || async {
            let pods = kubernetes::list(&stage.client, "Pod", SYSTEM, &format!("app.kubernetes.io/instance={RELEASE}")).await;
            let ready = pods.iter().filter(|pod| kubernetes::is_true(pod, "Ready")).count();
            (pods.len() == replicas as usize && ready == pods.len()).then_some(())
        })
        .await;
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn helm_waits_for_the_operator_and_fails_with_the_job() {
    let stage = stage("e2e-gitops").await;
    for release in ["unseen", "training", "tight", "invalid"] {
        let _absent = helm(&["uninstall", release, "-n", stage.namespace]);
    }

    // Nobody looks at the job: an object that no controller has seen must not look current.
    scale(&stage, 0).await;
    let job = micro(stage.namespace, "unseen", 20, &json!({}));
    let said = deploy(&stage, "unseen", &job, "10s").expect_err("with the operator stopped, --wait times out");
    assert!(said.contains("InProgress") || said.contains("context deadline exceeded") || said.contains("not ready"), "{said}");
    scale(&stage, 2).await;
    stage.until_true("unseen", "Complete", LONG).await;

    // A training job is current once its Job exists.
    let job = micro(stage.namespace, "training", 3000, &json!({}));
    deploy(&stage, "training", &job, "90s").unwrap_or_else(|error| panic!("{error}\n{}", stage.dump()));
    let seen = stage.job("training").await;
    assert!(!kubernetes::is_true(&seen, "Complete"), "--wait must not wait for hours of training");
    assert!(seen["status"]["jobRef"]["name"].is_string(), "the Job exists: {seen}");
    applying_again_changes_nothing(&stage, &job).await;
    kubernetes::delete(&stage.client, "FineTuneJob", stage.namespace, "training").await;

    // A job that cannot be carried out is an error, and is reported as one before the time is over.
    let job = micro(stage.namespace, "tight", 20, &json!({"scheduling": {"gpu": {"minMemoryMiB": 1000}}}));
    let said = deploy(&stage, "tight", &job, "90s").expect_err("an invalid job fails --wait");
    assert!(
        kubernetes::condition(&stage.job("tight").await, "Stalled").is_some_and(|(status, reason, _)| status == "True" && reason == "GPUTooSmall"),
        "{said}"
    );
    assert!(said.contains("status: Failed, message: spec.training"), "{said}");

    // The job fails after the deployment: the next --wait reports it.
    let broken = json!({"dataset": {"uri": "s3://micro/no-such-dataset/"}});
    let job = micro(stage.namespace, "invalid", 20, &broken);
    let _first_may_return_before_the_failure = deploy(&stage, "invalid", &job, "90s");
    stage.until_true("invalid", "Failed", LONG).await;
    let said = deploy(&stage, "invalid", &job, "60s").expect_err("a failed job fails the next --wait");
    assert!(said.contains("Failed") || said.contains("failed"), "{said}");
}

/// A hundred times `kubectl apply`, then `kubectl diff`: not one write, and no field of spec has another manager.
async fn applying_again_changes_nothing(stage: &Stage, job: &Value) {
    let manifest = job.to_string();
    kubectl_with_input(&["apply", "-f", "-"], &manifest).unwrap_or_else(|error| panic!("{error}"));
    let before = stage.job("training").await;
    // One process, a hundred documents: the same requests at a hundredth of the cost.
    let hundred = vec![manifest.clone(); 100].join("\n---\n");
    let said = kubectl_with_input(&["apply", "-f", "-"], &hundred).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(said.lines().filter(|line| line.ends_with("unchanged")).count(), 100, "{said}");
    let after = stage.job("training").await;
    assert_eq!(before["metadata"]["generation"], after["metadata"]["generation"]);
    assert_eq!(before["spec"], after["spec"]);
    kubectl_with_input(&["diff", "-f", "-"], &manifest).unwrap_or_else(|error| panic!("kubectl diff finds a difference: {error}"));

    for entry in after["metadata"]["managedFields"].as_array().into_iter().flatten() {
        let manager = entry["manager"].as_str().unwrap_or_default();
        let writes_spec = entry["fieldsV1"]["f:spec"].is_object();
        assert!(!writes_spec || !manager.contains("finetune"), "{manager} wrote to spec");
    }
    assert!(after["metadata"]["finalizers"].is_null(), "no finalizer");
}
