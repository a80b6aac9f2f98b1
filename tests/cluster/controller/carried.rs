//! The configuration that a pod carries: how long it may be, and Jobs of operators that put it into a ConfigMap.

use serde_json::{Value, json};

use super::stage::{SOON, Stage, success};
use finetune_testing::kubernetes;

/// The longest prompts that the API allows, of the longest characters: 8,000 bytes each.
fn prompts(number: usize) -> Value {
    json!({"prompts": vec!["\u{1F436}".repeat(2000); number]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_long_configuration_reaches_the_pod_and_one_that_is_too_long_none() {
    let stage = Stage::new("carried").await;
    let operator = stage.operator().await;
    stage.create("long", |job| job["spec"]["validation"] = prompts(15)).await;
    let pod = stage.pod("long", None).await;
    let pod = kubernetes::get(&stage.client, "Pod", &stage.namespace, &pod).await.expect("the pod");
    let carried = pod["metadata"]["annotations"]["finetune.dev/config"].as_str().expect("a configuration");
    assert!(carried.len() > 120_000, "{} bytes", carried.len());
    let config: Value = serde_json::from_str(carried).expect("JSON");
    assert_eq!((config["job"].as_str(), config["validation"]["prompts"].as_array().map(Vec::len)), (Some("controller-carried/long"), Some(15)));
    assert!(kubernetes::list(&stage.client, "ConfigMap", &stage.namespace, "finetune.dev/job").await.is_empty());

    let refused = async |name: &str, part: &str| {
        let refused = stage.condition(name, "Failed", "True", "InvalidConfig").await;
        let (status, reason, message) = kubernetes::condition(&refused, "Validated").expect("Validated");
        assert!(status == "False" && reason == "InvalidSpec" && message.contains(part), "{status} {reason} {message}");
        assert!(kubernetes::is_true(&refused, "Stalled") && stage.job(name).await.is_none(), "{refused:#}");
    };
    let too_long = |job: &mut Value| {
        job["spec"]["validation"] = prompts(16);
        job["spec"]["dataset"]["caption"] = json!("\u{1F436}".repeat(4000));
    };
    stage.create("too-long", too_long).await;
    refused("too-long", "a pod carries at most 131072").await;
    // All annotations of a pod together have their limit, 256 KiB, with the API server.
    let annotated = |texts: Value, character: &str| {
        let notes = (0..32).map(|number| (format!("{}example.com/note-{number}", "domain.".repeat(30)), json!(character.repeat(1024))));
        let notes: serde_json::Map<String, Value> = notes.collect();
        move |job: &mut Value| {
            job["spec"]["validation"] = texts;
            job["spec"]["podTemplate"] = json!({"annotations": notes});
        }
    };
    stage.create("annotated", annotated(prompts(16), "x")).await;
    stage.condition("annotated", "JobCreated", "True", "Created").await;
    stage.create("over-annotated", annotated(prompts(16), "\u{1F436}")).await;
    refused("over-annotated", "annotations").await;
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_job_of_an_operator_that_made_config_maps_goes_on_and_nothing_of_it_is_left() {
    let stage = Stage::new("config-maps").await;
    let operator = stage.operator().await;
    stage.create("older", |job| job["spec"]["ttlSecondsAfterFinished"] = json!(600)).await;
    stage.condition("older", "JobCreated", "True", "Created").await;
    operator.stop().await;

    // The Job as that operator made it: its pod mounts a ConfigMap, which the FineTuneJob owns.
    let made = stage.job("older").await.expect("the Job");
    kubernetes::delete(&stage.client, "Job", &stage.namespace, "older-train").await;
    kubernetes::eventually("the Job's end", SOON, || async { stage.live_pods("older").await.is_empty().then_some(()) }).await;
    let mut template = made["spec"]["template"].clone();
    let config =
        template["metadata"]["annotations"].as_object_mut().and_then(|annotations| annotations.remove("finetune.dev/config")).expect("a configuration");
    let labels = template["metadata"]["labels"].as_object_mut().expect("labels");
    labels.retain(|key, _| !key.contains("controller-uid") && !key.contains("job-name"));
    template["spec"]["volumes"][0] = json!({"name": "config", "configMap": {"name": "older-config-1a2b3c4d", "optional": false}});
    let metadata = |name: &str| {
        json!({
            "name": name, "namespace": stage.namespace, "labels": made["metadata"]["labels"],
            "annotations": made["metadata"]["annotations"], "ownerReferences": made["metadata"]["ownerReferences"],
        })
    };
    let config_map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata("older-config-1a2b3c4d"), "data": {"config.json": config}, "immutable": true,
    });
    let spec = json!({
        "suspend": false, "completionMode": "Indexed", "completions": 1, "parallelism": 1, "backoffLimit": made["spec"]["backoffLimit"],
        "podReplacementPolicy": "Failed", "podFailurePolicy": made["spec"]["podFailurePolicy"], "template": template,
    });
    let job = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata("older-train"), "spec": spec});
    for object in [config_map, job] {
        kubernetes::create(&stage.client, &object, false).await.expect("an object as an earlier operator made it");
    }
    let uid = stage.job_uid("older").await;
    let pod = stage.pod("older", None).await;
    stage.start(&pod).await;

    let operator = stage.operator().await;
    stage.until("older", "an attempt", |job| job["status"]["attempts"]["started"] == 1).await;
    stage.disrupt(&pod).await;
    // Its successor carries the configuration.
    let next = stage.pod("older", Some(&pod)).await;
    assert_ne!(stage.job_uid("older").await, uid);
    let carries = kubernetes::get(&stage.client, "Pod", &stage.namespace, &next).await.expect("the pod");
    assert_eq!(carries["metadata"]["annotations"]["finetune.dev/config"], config, "the same trainer is given the same");
    stage.start(&next).await;
    stage.finish(&next, 0, "Completed", &success()).await;
    let done = stage.condition("older", "Complete", "True", "TrainingSucceeded").await;
    assert_eq!(done["status"]["attempts"], json!({"started": 2, "disrupted": 1, "failed": 0}));
    let config_maps = || kubernetes::list(&stage.client, "ConfigMap", &stage.namespace, "finetune.dev/job=older");
    assert_eq!(config_maps().await.len(), 1, "the operator has no right to touch it");

    kubernetes::delete(&stage.client, "FineTuneJob", &stage.namespace, "older").await;
    kubernetes::eventually("everything to be collected", SOON, || async {
        (config_maps().await.is_empty() && stage.job("older").await.is_none()).then_some(())
    })
    .await;
    operator.stop().await;
}
