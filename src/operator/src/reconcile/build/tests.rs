//! The objects built: the small one whole, the large ones by field.

use serde_json::{Value, json};

use super::{JobInputs, config_map, job};
use crate::fixtures::{settings, validated};
use crate::settings::Settings;

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

#[test]
fn the_config_map_is_immutable_owned_and_named_by_its_content() {
    let validated = validated(|_| {});
    let object = serde_json::to_value(config_map(&validated)).unwrap();
    let config = object["data"]["config.json"].as_str().unwrap();
    assert_eq!(
        object,
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {
                "name": validated.config_map_name, "namespace": "team-a",
                "labels": {
                    "app.kubernetes.io/name": "finetune-trainer", "app.kubernetes.io/instance": "corgi", "app.kubernetes.io/component": "trainer",
                    "app.kubernetes.io/managed-by": "finetune-operator", "finetune.dev/job": "corgi", "finetune.dev/job-uid": "f1",
                },
                "ownerReferences": [{"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "name": "corgi", "uid": "f1", "controller": true, "blockOwnerDeletion": true}],
            },
            "data": {"config.json": config},
            "immutable": true,
        })
    );
    let config: finetune_api::plan::TrainConfig = serde_json::from_str(config).unwrap();
    assert_eq!((config.job.as_str(), config.device), ("team-a/corgi", finetune_api::plan::DeviceRequest::Gpu));
    assert_eq!(config.storage.unwrap().endpoint.as_deref(), Some("http://s3:8333"), "the operator's default");
    let on_cpu = crate::fixtures::validated(|job| job["spec"]["scheduling"] = json!({"gpu": {"perReplica": 0}}));
    assert_ne!(on_cpu.config_map_name, validated.config_map_name, "other content has another name, for none is ever changed");
    assert!(validated.config_map_name.starts_with("corgi-config-"));
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
        let config: finetune_api::plan::TrainConfig = serde_json::from_str(&crate::reconcile::validate::validate(&job, settings).unwrap().config_json).unwrap();
        config.device
    };
    assert_eq!(device(&settings()), finetune_api::plan::DeviceRequest::Gpu, "a GPU job never falls back by itself");
    let imaginary = Settings { allow_cpu_fallback: true, ..settings() };
    assert_eq!(device(&imaginary), finetune_api::plan::DeviceRequest::Cpu);
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
