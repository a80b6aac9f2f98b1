//! The Job built, by field.

use serde_json::{Value, json};

use super::{JobInputs, job};
use crate::fixtures::{settings, validated};
use crate::settings::Settings;
use finetune_api::CONFIG_ANNOTATION;
use finetune_api::plan::{DeviceRequest, TrainConfig};

fn built(change: impl FnOnce(&mut Value)) -> Value {
    built_with(&settings(), change)
}

fn built_with(settings: &Settings, change: impl FnOnce(&mut Value)) -> Value {
    let validated = validated(change);
    let inputs = JobInputs { image: "trainer@sha256:1".into(), failed_before: 1, backoff_limit: 2, active_before: 0, active_deadline: Some(600) };
    serde_json::to_value(job(&validated, settings, &inputs)).unwrap()
}

fn container(job: &Value) -> &Value {
    &job["spec"]["template"]["spec"]["containers"][0]
}

fn env<'a>(job: &'a Value, name: &str) -> Option<&'a Value> {
    container(job)["env"].as_array()?.iter().find(|variable| variable["name"] == name)
}

/// What the kubelet writes into the file that the trainer is given.
fn carried(job: &Value) -> &str {
    job["spec"]["template"]["metadata"]["annotations"][CONFIG_ANNOTATION].as_str().unwrap()
}

#[test]
fn the_pod_carries_its_configuration_and_the_trainer_reads_it_as_a_file() {
    let job = built(|job| job["spec"]["podTemplate"] = json!({"annotations": {"note": "b"}}));
    let config: TrainConfig = serde_json::from_str(carried(&job)).unwrap();
    assert_eq!((config.job.as_str(), config.device), ("team-a/corgi", DeviceRequest::Gpu));
    assert_eq!(config.storage.unwrap().endpoint.as_deref(), Some("http://s3:8333"), "the operator's default");
    assert_eq!(config.spec_hash, validated(|_| {}).spec_hash);
    assert_eq!(job["spec"]["template"]["metadata"]["annotations"]["note"], "b");
    let pod = &job["spec"]["template"]["spec"];
    let file = json!({"path": "config.json", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.annotations['finetune.dev/config']"}});
    assert_eq!(pod["volumes"][0], json!({"name": "config", "downwardAPI": {"items": [file]}}));
    assert_eq!(container(&job)["volumeMounts"][0], json!({"name": "config", "mountPath": "/etc/finetune", "readOnly": true}));
    assert!(pod["volumes"].as_array().unwrap().iter().all(|volume| volume.get("configMap").is_none()), "nothing else that another cluster would have to hold");
}

#[test]
fn the_configuration_of_every_field_holds_no_credentials() {
    let every_field: Value = finetune_common::yaml::from_str(include_str!("../../../../../tests/fixtures/every-field.yaml")).unwrap();
    let secret = "hunter2-of-the-proxy";
    let file = json!({
        "trainer": {"image": "trainer:1", "env": [{"name": "HTTPS_PROXY", "value": format!("http://user:{secret}@proxy:3128")}]},
        "defaultStorage": {"endpoint": "http://s3:8333", "credentials": {"secretRef": {"name": "s3"}}},
    });
    let settings = Settings::new(serde_json::from_value(file).unwrap()).unwrap();
    let sources = [
        every_field["spec"]["model"]["source"].clone(),
        json!({"huggingFace": {"repo": "a/b", "revision": "0".repeat(40), "tokenSecretRef": {"name": "hub-token", "key": "token"}}}),
    ];
    for source in sources {
        let job = crate::fixtures::job(|job| {
            job["spec"] = every_field["spec"].clone();
            job["spec"]["model"]["source"] = source.clone();
        });
        let validated = crate::reconcile::validate::validate(&job, &settings).unwrap();
        let inputs = JobInputs { image: "trainer:1".into(), failed_before: 0, backoff_limit: 3, active_before: 0, active_deadline: None };
        let built = serde_json::to_value(super::job(&validated, &settings, &inputs)).unwrap();
        // The pod has all of it as variables; the configuration names neither values nor Secrets.
        assert!(built.to_string().contains(secret));
        let config: Value = serde_json::from_str(carried(&built)).unwrap();
        let mut names = Vec::new();
        keys(&config, &mut names);
        let suspicious = ["secret", "token", "password", "credential", "accesskey"];
        let found: Vec<&String> =
            names.iter().filter(|name| suspicious.iter().any(|word| name.to_lowercase().contains(word)) && !HARMLESS.contains(&name.as_str())).collect();
        assert!(found.is_empty(), "{found:?} in {config}");
        for value in [secret, "hub-token", "models-s3", "team-a-s3"] {
            assert!(!carried(&built).contains(value), "{value} in {config}");
        }
    }
}

/// Fields whose names sound like secrets: what the names of variables begin with, and a file of the model.
const HARMLESS: [&str; 2] = ["credentialsPrefix", "t5Tokenizer"];

fn keys(value: &Value, into: &mut Vec<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            into.push(key.clone());
            keys(value, into);
        }),
        Value::Array(list) => list.iter().for_each(|value| keys(value, into)),
        _ => {}
    }
}

#[test]
fn the_job_follows_the_failure_semantics() {
    let job = built(|job| job["spec"]["activeDeadlineSeconds"] = json!(600));
    let spec = &job["spec"];
    let fields =
        ["suspend", "completionMode", "completions", "parallelism", "backoffLimit", "podReplacementPolicy", "activeDeadlineSeconds", "ttlSecondsAfterFinished"];
    let got: Vec<&Value> = fields.iter().map(|field| &spec[*field]).collect();
    assert_eq!(got, [&json!(false), &json!("Indexed"), &json!(1), &json!(1), &json!(2), &json!("Failed"), &json!(600), &Value::Null]);
    assert_eq!(
        spec["podFailurePolicy"],
        json!({"rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [75]}},
            {"action": "FailJob", "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [12, 13, 64, 65, 66, 77, 78]}},
        ]})
    );
    assert_eq!(job["metadata"]["annotations"]["finetune.dev/failed-before"], "1");
    assert_eq!(job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name"), None);
}

#[test]
fn a_queued_job_starts_suspended_with_kueues_labels_on_the_job_and_not_on_the_pod() {
    let job = built(|job| {
        job["spec"]["queueName"] = json!("team-a");
        job["spec"]["workloadPriorityClassName"] = json!("low");
    });
    assert_eq!(job["spec"]["suspend"], true);
    assert_eq!(job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "team-a");
    assert_eq!(job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"], "low");
    assert!(job["spec"]["template"]["metadata"]["labels"].as_object().unwrap().keys().all(|key| !key.contains("kueue")));
}

#[test]
fn the_pod_passes_the_restricted_level_without_token_and_with_a_read_only_root() {
    let job = built(|_| {});
    let pod = &job["spec"]["template"]["spec"];
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(pod["enableServiceLinks"], false);
    assert_eq!(pod["restartPolicy"], "Never");
    assert_eq!(
        pod["securityContext"],
        json!({"runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532, "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"}})
    );
    let container = container(&job);
    assert_eq!(
        container["securityContext"],
        json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsNonRoot": true, "capabilities": {"drop": ["ALL"]}})
    );
    assert_eq!(container["image"], "trainer@sha256:1");
    assert_eq!(container["args"], json!(["train", "--config=/etc/finetune/config.json"]));
    assert_eq!((&container["terminationMessagePath"], &container["terminationMessagePolicy"]), (&json!("/dev/termination-log"), &json!("File")));
    assert!(["livenessProbe", "readinessProbe", "startupProbe", "command", "lifecycle"].iter().all(|field| container.get(*field).is_none()));
    assert_eq!(pod["terminationGracePeriodSeconds"], 120);
    assert!(pod.get("hostNetwork").is_none() && pod.get("initContainers").is_none());
    let writable: Vec<&str> =
        pod["volumes"].as_array().unwrap().iter().filter(|volume| volume.get("emptyDir").is_some()).map(|volume| volume["name"].as_str().unwrap()).collect();
    assert_eq!(writable, ["work", "tmp"]);
    assert_eq!(pod["volumes"][1]["emptyDir"]["sizeLimit"], "40Gi", "the job's own amount of disk");
    for (name, path) in [("POD_UID", "metadata.uid"), ("POD_NAME", "metadata.name"), ("NODE_NAME", "spec.nodeName"), ("POD_NAMESPACE", "metadata.namespace")] {
        assert_eq!(env(&job, name).unwrap()["valueFrom"]["fieldRef"]["fieldPath"], path);
    }
    let uid = job["metadata"]["ownerReferences"][0]["uid"].as_str().unwrap();
    assert_eq!(env(&job, finetune_api::JOB_UID_VARIABLE).unwrap()["value"], uid, "the claims name the job by it");
}

#[test]
fn a_gpu_is_asked_for_once_and_a_cpu_job_asks_for_none() {
    let job = built(|_| {});
    assert_eq!(
        container(&job)["resources"],
        json!({
            "requests": {"cpu": "2", "memory": "8Gi", "ephemeral-storage": "40Gi", "nvidia.com/gpu": "1"},
            "limits": {"memory": "12Gi", "nvidia.com/gpu": "1"},
        })
    );
    assert!(job["spec"]["template"]["spec"]["affinity"]["nodeAffinity"].is_object());
    let cpu = built(|job| job["spec"]["scheduling"] = json!({"gpu": {"perReplica": 0}}));
    assert_eq!(container(&cpu)["resources"]["limits"], json!({"memory": "12Gi"}));
    assert!(cpu["spec"]["template"]["spec"].get("affinity").is_none());
    // On clusters whose GPUs are imaginary the administrator may say so: the pod still asks for a GPU.
    let device = |settings: &Settings| {
        let job = crate::fixtures::job(|_| {});
        let config: TrainConfig = serde_json::from_str(&crate::reconcile::validate::validate(&job, settings).unwrap().config_json).unwrap();
        config.device
    };
    assert_eq!(device(&settings()), DeviceRequest::Gpu, "a GPU job never falls back by itself");
    let imaginary = Settings { allow_cpu_fallback: true, ..settings() };
    assert_eq!(device(&imaginary), DeviceRequest::Cpu);
    assert_eq!(container(&built_with(&imaginary, |_| {}))["resources"]["limits"]["nvidia.com/gpu"], "1");
}

#[test]
fn every_model_source_and_the_cache_are_mounted() {
    let mounts = |job: &Value| -> Vec<(String, String, bool)> {
        container(job)["volumeMounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|mount| (mount["name"].as_str().unwrap().into(), mount["mountPath"].as_str().unwrap().into(), mount["readOnly"].as_bool().unwrap()))
            .collect()
    };
    let claim = built(|job| {
        job["spec"]["model"] =
            json!({"source": {"persistentVolumeClaim": {"claimName": "sd3", "subPath": "sd3m"}}, "cache": {"persistentVolumeClaim": {"claimName": "cache"}}});
    });
    assert!(mounts(&claim).contains(&("model".into(), "/model".into(), true)));
    assert!(mounts(&claim).contains(&("cache".into(), "/cache".into(), false)));
    assert_eq!(env(&claim, "FINETUNE_CACHE_DIR").unwrap()["value"], "/cache");
    assert_eq!(env(&built(|_| {}), "FINETUNE_CACHE_DIR").unwrap()["value"], "/work");
    let volumes = claim["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
    assert!(volumes.contains(&json!({"name": "model", "persistentVolumeClaim": {"claimName": "sd3", "readOnly": true}})));
    let config = validated(|job| {
        job["spec"]["model"] = json!({"source": {"persistentVolumeClaim": {"claimName": "sd3"}}, "cache": {"persistentVolumeClaim": {"claimName": "cache"}}});
    })
    .config_json;
    assert!(config.contains("\"/model\"") && config.contains("\"/cache\""), "{config}");

    let hub = built(|job| {
        job["spec"]["model"] =
            json!({"source": {"huggingFace": {"repo": "a/b", "revision": "0".repeat(40), "tokenSecretRef": {"name": "hf", "key": "token"}}}});
    });
    assert_eq!(env(&hub, "HF_TOKEN").unwrap()["valueFrom"]["secretKeyRef"], json!({"name": "hf", "key": "token", "optional": false}));

    let store = built(|job| {
        job["spec"]["model"]["source"]["objectStore"]["storage"] = json!({"endpoint": "https://models", "credentials": {"secretRef": {"name": "models"}}, "caBundleConfigMapRef": {"name": "models-ca", "key": "ca.pem"}});
        job["spec"]["storage"] =
            json!({"endpoint": "https://own", "credentials": {"secretRef": {"name": "own"}}, "caBundleConfigMapRef": {"name": "own-ca", "key": "ca.crt"}});
    });
    assert_eq!(
        container(&store)["envFrom"],
        json!([
            {"secretRef": {"name": "own", "optional": false}},
            {"prefix": "MODEL_", "secretRef": {"name": "models", "optional": false}},
        ])
    );
    assert!(mounts(&store).contains(&("storage-ca".into(), "/etc/finetune-ca/storage".into(), true)));
    assert!(mounts(&store).contains(&("model-ca".into(), "/etc/finetune-ca/model".into(), true)));
}

#[test]
fn no_secret_value_and_no_shell_is_in_what_is_built() {
    let job = built(|_| {}).to_string();
    assert!(!job.contains("/bin/sh") && !job.contains("secretKey\""));
    // Credentials are names of Secrets; the kubelet reads them.
    assert!(job.contains("\"secretRef\":{\"name\":\"s3\""));
}

#[test]
fn scheduling_and_the_pod_template_are_passed_on() {
    let job = built(|job| {
        job["spec"]["scheduling"] = json!({"nodeSelector": {"pool": "gpu"}, "priorityClassName": "low", "runtimeClassName": "nvidia", "schedulerName": "mine", "tolerations": [{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}]});
        job["spec"]["podTemplate"] =
            json!({"labels": {"team": "a"}, "annotations": {"note": "b"}, "imagePullSecrets": [{"name": "pull"}], "terminationGracePeriodSeconds": 30});
        job["spec"]["serviceAccountName"] = json!("trainer");
    });
    let (template, pod) = (&job["spec"]["template"], &job["spec"]["template"]["spec"]);
    let got =
        ["nodeSelector", "priorityClassName", "runtimeClassName", "schedulerName", "imagePullSecrets", "terminationGracePeriodSeconds", "serviceAccountName"]
            .map(|field| &pod[field]);
    assert_eq!(got, [&json!({"pool": "gpu"}), &json!("low"), &json!("nvidia"), &json!("mine"), &json!([{"name": "pull"}]), &json!(30), &json!("trainer")]);
    assert_eq!((&template["metadata"]["labels"]["team"], &template["metadata"]["annotations"]["note"]), (&json!("a"), &json!("b")));
    assert_eq!(
        pod["tolerations"].as_array().unwrap().iter().filter(|toleration| toleration["key"] == "node.kubernetes.io/unreachable").count(),
        1,
        "the job's own wins"
    );
    assert_eq!(pod["tolerations"][1]["tolerationSeconds"], 60);
}
