//! The CRD as generated, a valid job, and small helpers on JSON.

use std::time::Duration;

use kube::Client;
use serde_json::{Value, json};

use finetune_testing::kubernetes;
use finetune_testing::programs::repository;

/// Where these tests create jobs. No operator watches it.
pub(crate) const NAMESPACE: &str = "admission";

/// Applies the generated CRD and waits until it is served.
pub(crate) async fn cluster() -> Client {
    let client = kubernetes::client().await;
    kubernetes::install_crds(&repository().join("crds/finetune.dev_finetunejobs.yaml"), &["finetunejobs.finetune.dev"]).await;
    kubernetes::namespace(&client, NAMESPACE).await;
    kubernetes::eventually("the new resource to be served", Duration::from_secs(30), || async {
        kubernetes::create(&client, &job("probe"), true).await.ok().map(|_| ())
    })
    .await;
    client
}

/// The CRD's schema of the only version.
pub(crate) fn schema() -> Value {
    let text = std::fs::read_to_string(repository().join("crds/finetune.dev_finetunejobs.yaml")).expect("the generated CRD");
    let crd: Value = serde_yaml::from_str(&text).expect("the generated CRD parses");
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

/// The smallest valid job.
pub(crate) fn job(name: &str) -> Value {
    json!({
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": {"source": {"objectStore": {"uri": "s3://models/sd3/"}}},
            "dataset": {"uri": "s3://bucket/data/"},
            "output": {"uri": "s3://bucket/loras/corgi/"},
        },
    })
}

/// `value` wrapped into objects so that it stands at `path` ("spec.model.source").
pub(crate) fn at(path: &str, value: Value) -> Value {
    path.rsplit('.').fold(value, |inner, name| json!({ name: inner }))
}

/// RFC 7386: null removes.
pub(crate) fn merge(target: &mut Value, change: &Value) {
    let Some(change) = change.as_object() else {
        *target = change.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let target = target.as_object_mut().expect("just made an object");
    for (name, value) in change {
        if value.is_null() {
            target.remove(name);
        } else {
            merge(target.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

/// The API server's complaint about a job, as (field, message) pairs; empty where it was accepted.
pub(crate) fn complaints(answer: Result<Value, kube::Error>) -> Vec<(String, String)> {
    match answer {
        Ok(_) => Vec::new(),
        Err(kube::Error::Api(status)) => {
            let causes = status.details.as_ref().map(|details| details.causes.clone()).unwrap_or_default();
            assert!(!causes.is_empty(), "refused without a cause: {}", status.message);
            causes.into_iter().map(|cause| (cause.field, cause.message)).collect()
        }
        Err(error) => panic!("the API server does not answer: {error}"),
    }
}
