//! Every rule that judges one object alone, once violated and once obeyed.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::fixture::{at, cluster, complaints, job, merge, schema};
use finetune_testing::{kubernetes, programs};

/// One rule of the schema, and a change of the valid job on either side of it.
struct Case {
    /// Where the rule stands in the schema.
    rule: &'static str,
    /// Beginning of its message.
    message: &'static str,
    /// Where the two values are put.
    at: &'static str,
    /// Violates the rule.
    refused: Value,
    /// Obeys it.
    accepted: Value,
}

fn case(rule: &'static str, message: &'static str, refused: Value, accepted: Value) -> Case {
    Case { rule, message, at: rule, refused, accepted }
}

const URI: &str = "must be s3://BUCKET/PATH";
const FOLDER: &str = "must end with \"/\"";
const POSITIVE_TO_ONE: &str = "must be greater than 0 and at most 1";
const LESS_THAN_ONE: &str = "must be at least 0 and less than 1";
const OWN_LABELS: &str = "finetune.dev/*, batch.kubernetes.io/*, kueue.x-k8s.io/*, job-name";
const OWN_ANNOTATIONS: &str = "finetune.dev/* and batch.kubernetes.io/* are set";

fn cases() -> Vec<Case> {
    let mut cases = vec![
        case(
            "spec",
            "output.uri and dataset.uri must not contain each other",
            json!({"output": {"uri": "s3://bucket/data/out/"}}),
            json!({"output": {"uri": "s3://bucket/data-out/"}}),
        ),
        case(
            "spec",
            "checkpoint.uri and dataset.uri must not contain each other",
            json!({"checkpoint": {"uri": "s3://bucket/data/c/"}}),
            json!({"checkpoint": {"uri": "s3://bucket/c/"}}),
        ),
        case(
            "spec",
            "checkpoint.uri must not be output.uri or contain it",
            json!({"output": {"uri": "s3://bucket/out/"}, "checkpoint": {"uri": "s3://bucket/out/"}}),
            json!({"output": {"uri": "s3://bucket/out/"}, "checkpoint": {"uri": "s3://bucket/out/checkpoints/"}}),
        ),
        case(
            "spec",
            "validation.datasetUri must not contain output.uri",
            json!({"output": {"uri": "s3://bucket/out/"}, "validation": {"datasetUri": "s3://bucket/out/held-out/"}}),
            json!({"output": {"uri": "s3://bucket/out/"}, "validation": {"datasetUri": "s3://bucket/held-out/"}}),
        ),
        case(
            "spec",
            "model.source.objectStore.uri must not contain output.uri",
            json!({"output": {"uri": "s3://bucket/sd3/loras/"}, "model": {"source": {"objectStore": {"uri": "s3://bucket/sd3/"}}}}),
            json!({"output": {"uri": "s3://bucket/loras/"}, "model": {"source": {"objectStore": {"uri": "s3://bucket/sd3/"}}}}),
        ),
        case(
            "spec",
            "workloadPriorityClassName needs queueName",
            json!({"workloadPriorityClassName": "low"}),
            json!({"workloadPriorityClassName": "low", "queueName": "gpu"}),
        ),
        case(
            "spec.model.source",
            "set exactly one of",
            json!({"persistentVolumeClaim": {"claimName": "weights"}}),
            json!({"objectStore": null, "persistentVolumeClaim": {"claimName": "weights"}}),
        ),
        case("spec.dataset.captionColumn", "is the picture's name", json!("file_name"), json!("text")),
        case(
            "spec.dataset",
            "imageColumn and captionColumn must differ",
            json!({"imageColumn": "text", "captionColumn": "text"}),
            json!({"imageColumn": "image", "captionColumn": "text"}),
        ),
        case(
            "spec.dataset.captions",
            "triggerPosition Behind needs triggerWord",
            json!({"triggerPosition": "Behind"}),
            json!({"triggerWord": "ohwx", "triggerPosition": "Behind"}),
        ),
        case("spec.dataset.captions", "keepTags needs tagOrders", json!({"keepTags": 1}), json!({"keepTags": 1, "tagOrders": 2})),
        case("spec.dataset.captions.dropout", "must be between 0 and 1", json!("1.1"), json!("1")),
        case("spec.training", "set maxSteps or epochs, not both", json!({"maxSteps": 10, "epochs": 1}), json!({"epochs": 1})),
        case(
            "spec.training",
            "buckets and priorPreservation exclude each other",
            json!({"buckets": {}, "priorPreservation": {"classPrompt": "a dog"}}),
            json!({"buckets": {}}),
        ),
        case(
            "spec.training",
            "buckets.step must not exceed resolution",
            json!({"resolution": 48, "buckets": {}}),
            json!({"resolution": 48, "buckets": {"step": 48}}),
        ),
        case(
            "spec.training",
            "buckets.minSize must not exceed resolution",
            json!({"buckets": {"upscale": true, "minSize": 576}}),
            json!({"buckets": {"upscale": true, "minSize": 512}}),
        ),
        case(
            "spec.training",
            "buckets.maxSize must be at least resolution",
            json!({"buckets": {"upscale": true, "maxSize": 448}}),
            json!({"buckets": {"upscale": true, "maxSize": 512}}),
        ),
        Case {
            rule: "spec.training.buckets",
            message: "minSize and maxSize need upscale: true",
            at: "spec.training.buckets",
            refused: json!({"minSize": 256}),
            accepted: json!({"upscale": true, "minSize": 256}),
        },
        Case {
            rule: "spec.training.buckets",
            message: "minSize and maxSize must be multiples of step",
            at: "spec.training.buckets",
            refused: json!({"upscale": true, "maxSize": 1040}),
            accepted: json!({"upscale": true, "step": 16, "maxSize": 1040}),
        },
        case("spec.training.maxGradNorm", "must be at least 0", json!("-0.5"), json!("0")),
        case("spec.training.flowMatching.logitMean", "must be between -10 and 10", json!("10.5"), json!("-10")),
        case("spec.training.flowMatching.logitStd", "must be greater than 0 and at most 10", json!("0.0"), json!("10")),
        case("spec.training.flowMatching.modeScale", "must be between -1 and 1.7519", json!("1.76"), json!("-1")),
        case("spec.training.flowMatching.shift", "must be greater than 0 and at most 100, or ByResolution", json!("0.0"), json!("ByResolution")),
        case("spec.training.optimizer", "prodigy needs type Prodigy", json!({"prodigy": {}}), json!({"prodigy": {}, "type": "Prodigy"})),
        case("spec.training.optimizer.learningRate", POSITIVE_TO_ONE, json!("0.0"), json!("1")),
        case("spec.training.lora.dropout", LESS_THAN_ONE, json!("1"), json!("5e-4")),
        case("spec.training.optimizer.beta1", LESS_THAN_ONE, json!("1.0"), json!("0")),
        case("spec.training.optimizer.beta2", LESS_THAN_ONE, json!("1.0"), json!("0.5")),
        case("spec.training.optimizer.weightDecay", "must be between 0 and 1", json!("-0.1"), json!("1")),
        case("spec.training.optimizer.epsilon", POSITIVE_TO_ONE, json!("0"), json!("1e-9")),
        case(
            "spec.training.learningRateSchedule",
            "Constant has no warm-up",
            json!({"warmupSteps": 5}),
            json!({"warmupSteps": 5, "type": "ConstantWithWarmup"}),
        ),
        case("spec.training.learningRateSchedule", "cycles needs type", json!({"cycles": "2"}), json!({"cycles": "2", "type": "Cosine"})),
        case("spec.training.learningRateSchedule.power", "must be greater than 0 and at most 100", json!("0"), json!("2.5")),
        case("spec.checkpoint", "everySteps and everySeconds cannot both be 0", json!({"everySteps": 0, "everySeconds": 0}), json!({"everySteps": 0})),
        case(
            "spec.resources",
            "requests.memory must not exceed limits.memory",
            json!({"requests": {"memory": "13Gi"}}),
            json!({"requests": {"memory": "13Gi"}, "limits": {"memory": "13Gi"}}),
        ),
        case(
            "spec.scheduling.gpu",
            "minMemoryMiB must not exceed maxMemoryMiB",
            json!({"minMemoryMiB": 20000}),
            json!({"minMemoryMiB": 20000, "maxMemoryMiB": 0}),
        ),
        case("spec.podTemplate.labels", OWN_LABELS, json!({"finetune.dev/job": "other"}), json!({"team": "a", "app.kubernetes.io/part-of": "pictures"})),
        case("spec.podTemplate.labels", OWN_LABELS, json!({"app.kubernetes.io/name": "other"}), json!({"topology.kubernetes.io/zone": "a"})),
        case("spec.podTemplate.labels", OWN_LABELS, json!({"kueue.x-k8s.io/queue-name": "other"}), json!({"example.com/job-name": "a"})),
        case("spec.podTemplate.labels", OWN_LABELS, json!({"job-name": "other"}), json!({"x-job-name": "a"})),
        case("spec.podTemplate.labels", "a label's key is NAME or DOMAIN/NAME", json!({"not valid": "a"}), json!({"example.com/Valid_key.1": "a"})),
        case("spec.podTemplate.labels", "a label's value has at most 63", json!({"a": "not valid!"}), json!({"a": "", "b": "x_Y.z-1"})),
        case(
            "spec.podTemplate.annotations",
            OWN_ANNOTATIONS,
            json!({"batch.kubernetes.io/x": "y"}),
            json!({"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "kueue.x-k8s.io/podset-preferred-topology": "rack", "karpenter.sh/do-not-disrupt": "true"}),
        ),
        case("spec.podTemplate.annotations", "an annotation's key is NAME or DOMAIN/NAME", json!({"a/b/c": "y"}), json!({"example.com/x": "any text: {}"})),
        case(
            "spec.storage",
            "addressingStyle VirtualHost needs an endpoint with a host name",
            json!({"endpoint": "https://10.0.0.1:9000", "addressingStyle": "VirtualHost"}),
            json!({"endpoint": "https://10.example.com", "addressingStyle": "VirtualHost"}),
        ),
        case(
            "spec.model.source.objectStore.storage",
            "addressingStyle VirtualHost needs an endpoint with a host name",
            json!({"endpoint": "http://[fd00::1]:9000", "addressingStyle": "VirtualHost"}),
            json!({"endpoint": "http://[fd00::1]:9000", "addressingStyle": "Path"}),
        ),
        case("spec.storage.endpoint", "must be an http:// or https:// URL", json!("https://user:secret@s3.example.com"), json!("http://[fd00::1]:9000")),
        Case {
            rule: "spec.model.source.objectStore.storage.endpoint",
            message: "must be an http:// or https:// URL",
            at: "spec.model.source.objectStore.storage.endpoint",
            refused: json!("ftp://example.com"),
            accepted: json!("https://s3.example.com:9000/path"),
        },
        Case {
            rule: "spec.training.learningRateSchedule.cycles",
            message: "must be greater than 0 and at most 1000",
            at: "spec.training.learningRateSchedule",
            refused: json!({"type": "Cosine", "cycles": "0"}),
            accepted: json!({"type": "Cosine", "cycles": "0.5"}),
        },
        Case {
            rule: "spec.training.priorPreservation.classPrompt",
            message: "must not be blank",
            at: "spec.training.priorPreservation",
            refused: json!({"classPrompt": " "}),
            accepted: json!({"classPrompt": "a dog"}),
        },
        Case {
            rule: "spec.training.priorPreservation.weight",
            message: "must be greater than 0 and at most 100",
            at: "spec.training.priorPreservation",
            refused: json!({"classPrompt": "a dog", "weight": "0"}),
            accepted: json!({"classPrompt": "a dog", "weight": "0.5"}),
        },
        Case {
            rule: "spec.validation.guidanceScale",
            message: "must be between 1 and 50",
            at: "spec.validation",
            refused: json!({"prompts": ["a dog"], "guidanceScale": "0.5"}),
            accepted: json!({"prompts": ["a dog"], "guidanceScale": "1"}),
        },
        Case {
            rule: "spec.validation",
            message: "give prompts, datasetUri or both",
            at: "spec.validation",
            refused: json!({"seed": 1}),
            accepted: json!({"datasetUri": "s3://bucket/held-out/"}),
        },
        Case {
            rule: "spec.validation.datasetUri",
            message: URI,
            at: "spec.validation",
            refused: json!({"datasetUri": "s3://user:secret@bucket/held-out/"}),
            accepted: json!({"datasetUri": "gs://bucket/held-out/"}),
        },
        Case {
            rule: "spec.validation.datasetUri",
            message: FOLDER,
            at: "spec.validation",
            refused: json!({"datasetUri": "s3://bucket/held-out"}),
            accepted: json!({"datasetUri": "az://container/held-out/"}),
        },
        Case {
            rule: "spec.model.source.persistentVolumeClaim.subPath",
            message: "must be a relative path",
            at: "spec.model.source",
            refused: json!({"objectStore": null, "persistentVolumeClaim": {"claimName": "w", "subPath": "a/../../b"}}),
            accepted: json!({"objectStore": null, "persistentVolumeClaim": {"claimName": "w", "subPath": "a/b"}}),
        },
        Case {
            rule: "spec.model.cache.persistentVolumeClaim.subPath",
            message: "must be a relative path",
            at: "spec.model.cache",
            refused: json!({"persistentVolumeClaim": {"claimName": "w", "subPath": "/etc"}}),
            accepted: json!({"persistentVolumeClaim": {"claimName": "w", "subPath": "a"}}),
        },
    ];
    for (rule, message, refused) in [
        ("spec.model.source.huggingFace.repo", "must be organisation/name", json!({"repo": "no-organisation", "revision": "0".repeat(40)})),
        ("spec.model.source.huggingFace.revision", "must be a commit of 40 hexadecimal digits", json!({"repo": "a/b", "revision": "main"})),
    ] {
        cases.push(Case {
            rule,
            message,
            at: "spec.model.source",
            refused: json!({"objectStore": null, "huggingFace": refused}),
            accepted: json!({"objectStore": null, "huggingFace": {"repo": "a/b", "revision": "0123456789abcdef".repeat(3)[..40]}}),
        });
    }
    let prodigy = [
        ("d0", POSITIVE_TO_ONE, "0", "1e-6"),
        ("dCoef", "must be greater than 0 and at most 1000", "0", "2"),
        ("growthRate", "must be at least 1", "0.9", "1.02"),
        ("beta3", LESS_THAN_ONE, "1", "0.9"),
    ];
    for (field, message, refused, accepted) in prodigy {
        cases.push(Case {
            rule: ["spec.training.optimizer.prodigy.", field].concat().leak(),
            message,
            at: "spec.training.optimizer",
            refused: json!({"type": "Prodigy", "prodigy": {field: refused}}),
            accepted: json!({"type": "Prodigy", "prodigy": {field: accepted}}),
        });
    }
    for path in ["spec.dataset.uri", "spec.output.uri", "spec.checkpoint.uri", "spec.resume.fromCheckpoint", "spec.model.source.objectStore.uri"] {
        cases.push(case(path, URI, json!("s3://user:secret@bucket/x/"), json!("gs://bucket-2/x/")));
        cases.push(case(path, URI, json!("s3://bucket/x/?X-Amz-Signature=abc/"), json!("az://container/x y/")));
        cases.push(case(path, URI, json!("s3://bucket/../x/"), json!("s3://bucket/a..b/")));
        if path != "spec.resume.fromCheckpoint" {
            cases.push(case(path, FOLDER, json!("s3://bucket/folder"), json!("s3://bucket/folder/")));
        }
    }
    let or_file = "must end with \"/\", if it is a folder, or with \".safetensors\"";
    cases.push(case("spec.resume.fromCheckpoint", or_file, json!("s3://bucket/folder"), json!("s3://bucket/folder/robi.safetensors")));
    cases
}

/// (path, rule, message) of every `x-kubernetes-validations` below a schema.
fn rules(schema: &Value, path: &str, found: &mut Vec<(String, String, String)>) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        found.push((path.to_owned(), text(&rule["rule"]), text(&rule["message"])));
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        rules(property, &if path.is_empty() { name.clone() } else { format!("{path}.{name}") }, found);
    }
    for inner in ["items", "additionalProperties"] {
        if schema[inner].is_object() {
            rules(&schema[inner], &format!("{path}[]"), found);
        }
    }
}

/// Every rule of the CRD.
pub(crate) fn all_rules() -> Vec<(String, String, String)> {
    let mut found = Vec::new();
    rules(&schema(), "", &mut found);
    assert!(found.len() > 40, "the schema has lost its rules: {}", found.len());
    found
}

#[test]
fn every_rule_has_a_case() {
    let cases = cases();
    let covered = |path: &str, message: &str| cases.iter().any(|case| case.rule == path && message.starts_with(case.message));
    let missing: Vec<String> = all_rules()
        .into_iter()
        .filter(|(path, rule, message)| !rule.contains("oldSelf") && !path.is_empty() && !covered(path, message))
        .map(|(path, _, message)| format!("{path}: {message}"))
        .collect();
    assert!(missing.is_empty(), "no case for {missing:#?}");

    let known: BTreeSet<String> = all_rules().into_iter().map(|(path, _, _)| path).collect();
    let stale: Vec<&str> = cases.iter().map(|case| case.rule).filter(|rule| !known.contains(*rule)).collect();
    assert!(stale.is_empty(), "no rule at {stale:?}");
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn every_rule_refuses_and_accepts() {
    let client = cluster().await;
    for case in cases() {
        let submit = |value: &Value| {
            let mut job = job("rules");
            merge(&mut job, &at(case.at, value.clone()));
            job
        };
        let complaints_about = complaints(kubernetes::create(&client, &submit(&case.refused), true).await);
        assert!(
            complaints_about.iter().any(|(field, message)| field == case.rule && message.contains(case.message)),
            "{} = {} should be refused by {:?}; the API server says {complaints_about:?}",
            case.at,
            case.refused,
            case.message
        );
        let accepted = complaints(kubernetes::create(&client, &submit(&case.accepted), true).await);
        assert!(accepted.is_empty(), "{} = {} should be accepted; the API server says {accepted:?}", case.at, case.accepted);
    }
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn names_leave_room_for_those_of_pods() {
    let client = cluster().await;
    for (name, good) in [("a", true), ("a-1", true), (&*"a".repeat(50), true), (&*"a".repeat(51), false), ("1a", false), ("a.b", false)] {
        let complaints = complaints(kubernetes::create(&client, &job(name), true).await);
        assert_eq!(complaints.is_empty(), good, "{name}: {complaints:?}");
        assert!(good || complaints.iter().any(|(_, message)| message.contains("metadata.name must begin with a letter")), "{name}: {complaints:?}");
    }
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn bounds_formats_and_unknown_fields_are_judged() {
    let client = cluster().await;
    for (path, value) in [
        ("spec.training.maxSteps", json!(0)),
        ("spec.training.resolution", json!(500)),
        ("spec.training.buckets", json!({"step": 72})),
        ("spec.training.lora.rank", json!(0)),
        ("spec.training.precision", json!("FP8")),
        ("spec.training.weights", json!("Int4")),
        ("spec.training.priorPreservation", json!({"classPrompt": "a dog", "sampleBatchSize": 65})),
        ("spec.training.optimizer.learningRate", json!(0.0001)),
        ("spec.training.optimizer.learningRate", json!("fast")),
        ("spec.training.lora.targetModules", json!(["attn.to_q", "attn.to_q"])),
        ("spec.dataset.expectedDigest", json!("sha256:short")),
        ("spec.output.formats", json!([])),
        ("spec.output.dtype", json!("FP16")),
        ("spec.scheduling.gpu.perReplica", json!(2)),
        ("spec.failurePolicy.maxRetries", json!(-1)),
        ("spec.activeDeadlineSeconds", json!(0)),
        ("spec.progressDeadlineSeconds", json!(59)),
        ("spec.maxGPUSeconds", json!(59)),
        ("spec.maxGPUSeconds", json!("3600")),
        ("spec.image", json!("no spaces allowed")),
    ] {
        let mut job = job("bounds");
        merge(&mut job, &at(path, value.clone()));
        let complaints = complaints(kubernetes::create(&client, &job, true).await);
        assert!(complaints.iter().any(|(field, _)| field.starts_with(path)), "{path} = {value}: {complaints:?}");
    }
    for missing in ["model", "dataset", "output"] {
        let mut job = job("bounds");
        merge(&mut job, &at("spec", json!({missing: null})));
        let complaints = complaints(kubernetes::create(&client, &job, true).await);
        assert!(complaints.iter().any(|(field, _)| field == &format!("spec.{missing}")), "{missing}: {complaints:?}");
    }
    let misspelt = serde_json::to_string(&{
        let mut job = job("bounds");
        merge(&mut job, &at("spec.training.maxStep", json!(5)));
        job
    })
    .expect("JSON");
    let said = programs::kubectl_with_input(&["apply", "--dry-run=server", "-f", "-"], &misspelt).expect_err("an unknown field");
    assert!(said.contains("unknown field \"spec.training.maxStep\""), "{said}");
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn the_api_server_fills_in_the_defaults() {
    let client = cluster().await;
    let created = kubernetes::create(&client, &job("defaults"), true).await.expect("a valid job");
    let spec = &created["spec"];
    assert_eq!(spec["training"]["optimizer"]["type"], "AdamW8bit");
    assert_eq!(spec["training"]["optimizer"]["learningRate"], "1e-4");
    assert_eq!(spec["training"]["gradientAccumulationSteps"], 3);
    assert_eq!(spec["training"]["lora"]["rank"], 4);
    assert_eq!(spec["scheduling"]["gpu"]["minMemoryMiB"], 15000);
    assert_eq!(spec["scheduling"]["gpu"]["maxMemoryMiB"], 17000);
    assert_eq!(spec["output"]["existing"], "ReuseIfComplete");
    assert!(spec["training"]["maxSteps"].is_null() && spec["training"]["epochs"].is_null(), "either would forbid the other");

    kubernetes::delete(&client, "FineTuneJob", super::fixture::NAMESPACE, "unseen").await;
    let unseen = kubernetes::create(&client, &job("unseen"), false).await.expect("a valid job");
    assert_eq!(unseen["status"]["observedGeneration"], -1, "an object that no controller has seen must not look current");
    kubernetes::delete(&client, "FineTuneJob", super::fixture::NAMESPACE, "unseen").await;
}
