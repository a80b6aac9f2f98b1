//! Manifests of small jobs.

use serde_json::{Value, json};

use super::stage::{BUCKET, merge};

/// A job of the random model of a few hundred kilobytes: a step takes milliseconds, so `steps` decides how long it runs.
/// It reserves little, since the test cluster's nodes share one machine.
pub(crate) fn micro(namespace: &str, name: &str, steps: u64, more: &Value) -> Value {
    let mut job = json!({
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"source": {"objectStore": {"uri": format!("s3://{BUCKET}/model/")}}},
            "dataset": {"uri": format!("s3://{BUCKET}/dataset/")},
            "training": {
                "maxSteps": steps,
                "resolution": 32,
                "batchSize": 2,
                "gradientAccumulationSteps": 1,
                "maxSequenceLength": 16,
                "precision": "FP32",
                "optimizer": {"type": "AdamW", "learningRate": "1e-3"},
            },
            "checkpoint": {"everySteps": 50},
            "output": {"uri": format!("s3://{BUCKET}/{}", prefix(namespace, name))},
            "resources": {"requests": {"cpu": "100m", "memory": "256Mi", "ephemeral-storage": "256Mi"}, "limits": {"memory": "2Gi"}},
            "podTemplate": {"terminationGracePeriodSeconds": 30},
        },
    });
    merge(&mut job["spec"], more);
    job
}

/// Where the outputs of [`micro`] go, within the bucket.
pub(crate) fn prefix(namespace: &str, name: &str) -> String {
    format!("loras/{namespace}/{name}/")
}
