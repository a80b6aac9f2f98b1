//! Every rule both ways, and what the schema refuses.

use serde_json::{Value, json};

use super::*;

const EVERY_FIELD: &str = include_str!("../../../../tests/fixtures/every-field.yaml");

fn minimal() -> Value {
    json!({
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "corgi"},
        "spec": {
            "model": {"source": {"objectStore": {"uri": "s3://models/sd3/"}}},
            "dataset": {"uri": "s3://data/corgi/"},
            "output": {"uri": "s3://loras/corgi/"},
        }
    })
}

/// Sets the value at a path such as `spec.training.maxSteps`, making objects on the way; `Null` removes it.
fn set(object: &mut Value, path: &str, value: Value) {
    let (parents, last) = path.rsplit_once('.').unwrap_or(("", path));
    let mut at = object;
    for key in parents.split('.').filter(|key| !key.is_empty()) {
        at = at.as_object_mut().unwrap().entry(key).or_insert_with(|| json!({}));
    }
    let at = at.as_object_mut().unwrap();
    if value.is_null() {
        at.remove(last);
    } else {
        at.insert(last.to_owned(), value);
    }
}

fn with(changes: &[(&str, Value)]) -> Value {
    let mut object = minimal();
    for (path, value) in changes {
        set(&mut object, path, value.clone());
    }
    object
}

fn verdict(object: &Value) -> Result<FineTuneJob, Vec<(String, String)>> {
    match manifest(&object.to_string()) {
        Ok(mut jobs) => Ok(jobs.remove(0)),
        Err(violations) => Err(violations.0.into_iter().map(|v| (v.path, v.message)).collect()),
    }
}

#[test]
fn the_minimal_manifest_is_accepted_and_gets_the_defaults() {
    let job = verdict(&minimal()).unwrap();
    assert_eq!(job.spec.training, super::super::TrainingSpec::default());
    assert_eq!(job.status, None);
    assert_eq!(serde_json::to_value(&job).unwrap()["spec"]["scheduling"]["tolerations"][0]["key"], "nvidia.com/gpu");
}

#[test]
fn an_example_with_every_field_comes_through_unchanged() {
    let written: Value = yaml::from_str(EVERY_FIELD).unwrap();
    let job = manifest(EVERY_FIELD).unwrap().remove(0);
    assert_eq!(serde_json::to_value(&job).unwrap(), written);

    // It really has every field: each property of the schema occurs, except what only another choice of source has.
    fn missing(schema: &Value, value: &Value, path: &str, out: &mut Vec<String>) {
        for (name, inner) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            match value.get(name) {
                Some(value) => missing(inner, value, &format!("{path}.{name}"), out),
                None => out.push(format!("{path}.{name}")),
            }
        }
    }
    let mut absent = Vec::new();
    missing(&schema().unwrap()["properties"]["spec"], &written["spec"], "spec", &mut absent);
    absent.retain(|path| !path.starts_with("spec.scheduling.affinity."));
    assert_eq!(absent, ["spec.model.source.huggingFace", "spec.model.source.persistentVolumeClaim", "spec.training.buckets", "spec.training.epochs"]);
}

#[test]
fn unknown_fields_are_errors_each_with_its_path() {
    let object = with(&[
        ("spec.traning", json!({})),
        ("spec.training.batchsize", json!(4)),
        ("spec.scheduling.tolerations", json!([{"key": "a", "opertor": "Exists"}])),
        ("metadata.lables", json!({})),
        ("extra", json!(1)),
    ]);
    let paths: Vec<_> = verdict(&object).unwrap_err().into_iter().filter(|(_, message)| message == "unknown field").map(|(path, _)| path).collect();
    for path in ["spec.traning", "spec.training.batchsize", "spec.scheduling.tolerations[0].opertor", "metadata.lables", "extra"] {
        assert!(paths.contains(&path.to_owned()), "{path} is not among {paths:?}");
    }
}

/// (path, value that is refused, value that is accepted).
#[test]
fn each_bound_and_each_rule_of_one_field_holds_both_ways() {
    let decimal_0_1 = |path: &'static str| [(path, json!("1.0"), json!("0.99")), (path, json!("-0.1"), json!("0"))];
    let uri = |path: &'static str| {
        [
            (path, json!("s3://bucket/no-slash"), json!("s3://bucket/folder/")),
            (path, json!("https://bucket/x/"), json!("gs://bucket/x/")),
            (path, json!("s3://user:pass@bucket/x/"), json!("az://container/x/")),
            (path, json!("s3://bucket/x?X-Amz-Signature=abc/"), json!("s3://bucket/")),
            (path, json!("s3://bucket/x#y/"), json!("s3://bucket/a b/")),
            (path, json!("s3://bucket/../y/"), json!("s3://bucket/.y/")),
            (path, json!("s3://bucket/a\nb/"), json!("s3://bucket/ü/")),
            (path, json!("s3://bucket/a\\b/"), json!("s3://bucket/a..b/")),
            (path, json!("s3://Bucket/x/"), json!("s3://my.bucket-1/x/")),
            (path, json!(format!("s3://bucket/{}/", "x".repeat(1024))), json!(format!("s3://bucket/{}/", "x".repeat(1000)))),
        ]
    };
    let mut cases = vec![
        ("metadata.name", json!("1corgi"), json!("corgi-1")),
        ("metadata.name", json!("Corgi"), json!("c")),
        ("metadata.name", json!("a".repeat(51)), json!("a".repeat(50))),
        ("metadata.name", json!("corgi."), json!("corgi")),
        ("spec.dataset.captionColumn", json!("file_name"), json!("text")),
        ("spec.dataset.caption", json!(" \t"), json!("a photo of sks dog")),
        ("spec.dataset.caption", json!(""), json!("x".repeat(4096))),
        ("spec.dataset.captions.triggerWord", json!(" ohwx"), json!("ohwx corgi")),
        ("spec.dataset.captions.triggerWord", json!("ohwx\n"), json!("x")),
        ("spec.dataset.captions.triggerWord", json!(""), json!("x".repeat(256))),
        ("spec.dataset.captions.triggerPosition", json!("Front "), json!("Front")),
        ("spec.dataset.captions.tagOrders", json!(0), json!(16)),
        ("spec.dataset.captions.tagOrders", json!(17), json!(1)),
        ("spec.dataset.captions.dropout", json!("1.01"), json!("1")),
        ("spec.dataset.captions.dropout", json!("-0.1"), json!("0")),
        ("spec.dataset.captions", json!({"keepTags": 65, "tagOrders": 2}), json!({"keepTags": 64, "tagOrders": 2})),
        ("spec.dataset.captions", json!({"keepTags": 1}), json!({"keepTags": 1, "tagOrders": 2})),
        ("spec.dataset.captions", json!({"triggerPosition": "Behind"}), json!({"triggerPosition": "Behind", "triggerWord": "x"})),
        ("spec.dataset.metadataFile", json!("../metadata.jsonl"), json!("captions.jsonl")),
        ("spec.dataset.imageColumn", json!(""), json!("image")),
        ("spec.dataset.expectedDigest", json!("sha256:12"), json!(format!("sha256:{}", "ab".repeat(32)))),
        ("spec.dataset.repeats", json!(0), json!(1)),
        ("spec.dataset.onBadSample", json!("Ignore"), json!("Skip")),
        ("spec.training.maxSteps", json!(0), json!(1)),
        ("spec.training.maxSteps", json!(1.5), json!(2.0)),
        ("spec.training.maxSteps", json!("10"), json!(10)),
        ("spec.training.epochs", json!(0), json!(3)),
        ("spec.training.resolution", json!(500), json!(512)),
        ("spec.training.resolution", json!(4096), json!(2048)),
        ("spec.training.buckets.step", json!(72), json!(80)),
        ("spec.training.buckets.step", json!(8), json!(16)),
        ("spec.training.buckets", json!({"upscale": true, "maxSize": 16384}), json!({"upscale": true, "maxSize": 4096})),
        ("spec.training.buckets", json!({"minSize": 256}), json!({"upscale": true, "minSize": 256})),
        ("spec.training.buckets", json!({"upscale": true, "maxSize": 1040}), json!({"upscale": true, "step": 16, "maxSize": 1040})),
        ("spec.training.batchSize", json!(0), json!(256)),
        ("spec.training.gradientAccumulationSteps", json!(0), json!(1)),
        ("spec.training.gradientCheckpointing", json!("Sometimes"), json!("Never")),
        ("spec.training.precision", json!("bf16"), json!("BF16")),
        ("spec.training.seed", json!(-1), json!(9_007_199_254_740_991_u64)),
        ("spec.training.seed", json!(9_007_199_254_740_992_u64), json!(0)),
        ("spec.training.maxSequenceLength", json!(513), json!(512)),
        ("spec.training.centerCrop", json!("yes"), json!(true)),
        ("spec.training.maxGradNorm", json!("-1"), json!("0")),
        ("spec.training.maxGradNorm", json!(1.0), json!("1.0")),
        ("spec.training.flowMatching.weightingScheme", json!("logit_normal"), json!("CosMap")),
        ("spec.training.flowMatching.logitMean", json!("11"), json!("-10")),
        ("spec.training.flowMatching.logitStd", json!("0"), json!("0.1")),
        ("spec.training.flowMatching.modeScale", json!("1.8"), json!("-1")),
        ("spec.training.flowMatching.shift", json!("0"), json!("3")),
        ("spec.training.flowMatching.shift", json!("100.1"), json!("1e0")),
        ("spec.training.flowMatching.shift", json!("byResolution"), json!("ByResolution")),
        ("spec.training.optimizer.type", json!("Adam"), json!("AdamW")),
        ("spec.training.optimizer.learningRate", json!("0"), json!("1e-4")),
        ("spec.training.optimizer.learningRate", json!("1.1"), json!("1.0")),
        ("spec.training.optimizer.learningRate", json!("fast"), json!("3E-5")),
        ("spec.training.optimizer.weightDecay", json!("-0.1"), json!("0")),
        ("spec.training.optimizer.weightDecay", json!("1.1"), json!("1")),
        ("spec.training.optimizer.epsilon", json!("0.0"), json!("1e-15")),
        ("spec.training.learningRateSchedule.type", json!("cosine"), json!("Cosine")),
        ("spec.training.learningRateSchedule.power", json!("0"), json!("0.5")),
        ("spec.training.lora.rank", json!(0), json!(1024)),
        ("spec.training.lora.alpha", json!(0), json!(16)),
        ("spec.training.lora.dropout", json!("1.0"), json!("0.5")),
        ("spec.training.lora.targetModules", json!([]), json!(["attn.to_q"])),
        ("spec.training.lora.targetModules", json!(["attn.to_q", "attn.to_q"]), json!(["attn.to_q", "attn.to_k"])),
        ("spec.training.lora.targetModules", json!(["attn..to_q"]), json!(["transformer_blocks.0.attn.to_out.0"])),
        ("spec.training.lora.targetModules", json!(["transformer_blocks.0-.attn.to_q"]), json!(["transformer_blocks.0-11.attn.to_q"])),
        ("spec.validation", json!({"prompts": []}), json!({"prompts": ["x"]})),
        ("spec.validation", json!({}), json!({"prompts": ["x"], "guidanceScale": "1"})),
        ("spec.validation", json!({"prompts": ["x"], "guidanceScale": "0.5"}), json!({"prompts": ["x"], "guidanceScale": "50"})),
        ("spec.checkpoint.keepLast", json!(0), json!(1)),
        ("spec.resume.policy", json!("Maybe"), json!("Required")),
        ("spec.output.formats", json!([]), json!(["Kohya"])),
        ("spec.output.formats", json!(["Kohya", "Kohya"]), json!(["Kohya", "Diffusers"])),
        ("spec.output.dtype", json!("FP16"), json!("F16")),
        ("spec.output.existing", json!("Keep"), json!("Overwrite")),
        ("spec.storage.endpoint", json!("minio:9000"), json!("http://minio:9000")),
        ("spec.storage.endpoint", json!("https://user:pw@minio"), json!("https://[fd00::1]:9000")),
        ("spec.storage.region", json!("eu west"), json!("eu-west-1")),
        ("spec.storage.credentials", json!({"secretRef": {}}), json!({"secretRef": {"name": "s3"}})),
        ("spec.serviceAccountName", json!(""), json!("trainer")),
        ("spec.image", json!("x y"), json!("ghcr.io/a/b:1@sha256:ab")),
        ("spec.scheduling.gpu.perReplica", json!(2), json!(0)),
        ("spec.scheduling.gpu.resourceName", json!("gpu"), json!("nvidia.com/gpu")),
        ("spec.scheduling.gpu.minComputeCapability", json!("8"), json!("8.0")),
        ("spec.podTemplate.labels", json!({"finetune.dev/job": "x"}), json!({"team": "x"})),
        ("spec.podTemplate.labels", json!({"kueue.x-k8s.io/queue-name": "x"}), json!({"example.com/x": "x"})),
        ("spec.podTemplate.annotations", json!({"batch.kubernetes.io/x": "x"}), json!({"prometheus.io/scrape": "true"})),
        ("spec.podTemplate.terminationGracePeriodSeconds", json!(0), json!(1)),
        ("spec.failurePolicy.maxRetries", json!(101), json!(0)),
        ("spec.failurePolicy.maxRestartsPerHour", json!(0), json!(1)),
        ("spec.activeDeadlineSeconds", json!(0), json!(1)),
        ("spec.startDeadlineSeconds", json!(-1), json!(1)),
        ("spec.ttlSecondsAfterFinished", json!(-1), json!(0)),
        ("spec.ttlScope", json!("Pod"), json!("All")),
        ("spec.resources.requests", json!({"memory": "lots"}), json!({"memory": "1Gi", "cpu": 2})),
    ];
    cases.extend(decimal_0_1("spec.training.optimizer.beta1"));
    cases.extend(decimal_0_1("spec.training.optimizer.beta2"));
    for path in ["spec.dataset.uri", "spec.output.uri", "spec.checkpoint.uri", "spec.resume.fromCheckpoint", "spec.model.source.objectStore.uri"] {
        cases.extend(uri(path));
    }
    for (path, bad, good) in cases {
        let others: Vec<(&str, Value)> = match path {
            // Keep the other URIs apart from the one under test.
            "spec.dataset.uri" => vec![("spec.output.uri", json!("az://elsewhere/o/"))],
            "spec.output.uri" | "spec.checkpoint.uri" => vec![("spec.dataset.uri", json!("az://elsewhere/d/"))],
            _ => Vec::new(),
        };
        let refused = verdict(&with(&[&others[..], &[(path, bad.clone())]].concat())).expect_err(&format!("{path}: {bad} should be refused"));
        assert!(refused.iter().any(|(found, _)| found.starts_with(path) || path == "metadata.name"), "{path}: {bad}: {refused:?}");
        let accepted = verdict(&with(&[&others[..], &[(path, good.clone())]].concat()));
        assert!(accepted.is_ok(), "{path}: {good} should be accepted: {accepted:?}");
    }
}

/// (changes that are refused, part of the message, changes that are accepted).
#[test]
fn each_rule_over_several_fields_holds_both_ways() {
    type Changes = Vec<(&'static str, Value)>;
    let source = "spec.model.source";
    let hub = json!({"repo": "a/b", "revision": "0".repeat(40)});
    let cases: Vec<(Changes, &str, Changes)> = vec![
        (vec![(source, json!({}))], "exactly one", vec![(source, json!({"huggingFace": hub}))]),
        (
            vec![(source, json!({"huggingFace": hub, "objectStore": {"uri": "s3://models/x/"}}))],
            "exactly one",
            vec![(source, json!({"persistentVolumeClaim": {"claimName": "w", "subPath": "sd3/medium"}}))],
        ),
        (
            vec![(source, json!({"huggingFace": {"repo": "a/b", "revision": "main"}}))],
            "40 hexadecimal",
            vec![(source, json!({"huggingFace": {"repo": "a/b", "revision": "0123456789abcdef0123456789abcdef01234567"}}))],
        ),
        (vec![(source, json!({"huggingFace": {"repo": "b", "revision": "0".repeat(40)}}))], "organisation/name", vec![]),
        (vec![(source, json!({"persistentVolumeClaim": {"claimName": "w", "subPath": "../x"}}))], "relative path", vec![]),
        (
            vec![(source, json!({"huggingFace": hub, "files": {"withoutT5": true, "t5": "t5.safetensors"}}))],
            "no use with withoutT5",
            vec![(source, json!({"huggingFace": hub, "files": {"withoutT5": true, "transformer": "sd3.safetensors"}}))],
        ),
        (
            vec![(source, json!({"huggingFace": hub, "files": {"t5": "t5.gguf"}}))],
            "a .safetensors file",
            vec![(source, json!({"huggingFace": hub, "files": {"t5": "models/clip/t5.safetensors"}}))],
        ),
        (
            vec![(source, json!({"huggingFace": hub, "files": {"vae": "../vae.safetensors"}}))],
            "a path within the source",
            vec![(source, json!({"huggingFace": hub, "files": {"t5Tokenizer": "t5/spiece.model"}}))],
        ),
        (vec![(source, json!({"huggingFace": hub, "files": {"t5Tokenizer": "/spiece.model"}}))], "a path within the source", vec![]),
        (
            vec![(source, json!({"objectStore": {"uri": "s3://models/sd3.ckpt"}}))],
            "as a single file",
            vec![(source, json!({"objectStore": {"uri": "s3://models/sd3_medium.safetensors"}}))],
        ),
        (vec![("spec.training.maxSteps", json!(1)), ("spec.training.epochs", json!(1))], "not both", vec![("spec.training.epochs", json!(1))]),
        (
            vec![("spec.training.buckets", json!({})), ("spec.training.priorPreservation", json!({"classPrompt": "a dog"}))],
            "exclude each other",
            vec![("spec.training.buckets", json!({})), ("spec.training.resolution", json!(64))],
        ),
        (
            vec![("spec.training.buckets", json!({})), ("spec.training.resolution", json!(48))],
            "buckets.step must not exceed",
            vec![("spec.training.buckets", json!({"step": 48})), ("spec.training.resolution", json!(48))],
        ),
        (
            vec![("spec.training.buckets", json!({"upscale": true, "minSize": 576}))],
            "buckets.minSize must not exceed",
            vec![("spec.training.buckets", json!({"upscale": true, "minSize": 512}))],
        ),
        (
            vec![("spec.training.buckets", json!({"upscale": true, "maxSize": 448}))],
            "buckets.maxSize must be at least",
            vec![("spec.training.buckets", json!({"upscale": true, "maxSize": 512}))],
        ),
        (
            vec![("spec.training.optimizer", json!({"prodigy": {}}))],
            "needs type Prodigy",
            vec![("spec.training.optimizer", json!({"type": "Prodigy", "prodigy": {}}))],
        ),
        (
            vec![("spec.training.learningRateSchedule", json!({"warmupSteps": 5}))],
            "ConstantWithWarmup",
            vec![("spec.training.learningRateSchedule", json!({"type": "ConstantWithWarmup", "warmupSteps": 5}))],
        ),
        (
            vec![("spec.training.learningRateSchedule", json!({"type": "Linear", "cycles": "2"}))],
            "cycles needs",
            vec![("spec.training.learningRateSchedule", json!({"type": "Cosine", "cycles": "2"}))],
        ),
        (
            vec![("spec.checkpoint", json!({"everySteps": 0, "everySeconds": 0}))],
            "cannot both be 0",
            vec![("spec.checkpoint", json!({"everySteps": 0, "everySeconds": 60}))],
        ),
        (vec![("spec.output.uri", json!("s3://data/corgi/out/"))], "training data", vec![("spec.output.uri", json!("s3://data/corgi-out/"))]),
        (vec![("spec.output.uri", json!("s3://data/"))], "training data", vec![("spec.output.uri", json!("s3://data2/"))]),
        (vec![("spec.checkpoint.uri", json!("s3://data/corgi/c/"))], "checkpoint.uri and dataset.uri", vec![("spec.checkpoint.uri", json!("s3://data/c/"))]),
        (
            vec![("spec.checkpoint.uri", json!("s3://loras/corgi/"))],
            "checkpoint.uri must not be output.uri",
            vec![("spec.checkpoint.uri", json!("s3://loras/corgi/c/"))],
        ),
        (
            vec![("spec.checkpoint.uri", json!("s3://loras/"))],
            "checkpoint.uri must not be output.uri",
            vec![("spec.checkpoint.uri", json!("s3://loras/cats/"))],
        ),
        (
            vec![("spec.checkpoint.uri", json!("s3://models/sd3/c/"))],
            "model.source.objectStore.uri must not",
            vec![("spec.checkpoint.uri", json!("s3://models/c/"))],
        ),
        (
            vec![(source, json!({"objectStore": {"uri": "s3://loras/corgi/sd3/"}}))],
            "model.source.objectStore.uri must not",
            // A bucket of that name on another server is another bucket.
            vec![(source, json!({"objectStore": {"uri": "s3://loras/corgi/sd3/", "storage": {"endpoint": "http://minio:9000"}}}))],
        ),
        (
            vec![("spec.validation", json!({"datasetUri": "s3://loras/corgi/held-out/"}))],
            "validation.datasetUri must not",
            vec![("spec.validation", json!({"datasetUri": "s3://loras/held-out/"}))],
        ),
        (
            vec![("spec.workloadPriorityClassName", json!("low"))],
            "needs queueName",
            vec![("spec.workloadPriorityClassName", json!("low")), ("spec.queueName", json!("q"))],
        ),
        (
            vec![("spec.resources", json!({"requests": {"memory": "16Gi"}}))],
            "must not exceed limits.memory",
            vec![("spec.resources", json!({"requests": {"memory": "16Gi"}, "limits": {"memory": "16384Mi"}}))],
        ),
    ];
    for (bad, message, good) in cases {
        let refused = verdict(&with(&bad)).expect_err(&format!("{bad:?} should be refused"));
        assert!(refused.iter().any(|(_, found)| found.contains(message)), "{bad:?}: {refused:?}");
        let accepted = verdict(&with(&good));
        assert!(accepted.is_ok(), "{good:?} should be accepted: {accepted:?}");
    }
}

#[test]
fn what_determines_the_run_is_fixed_at_creation() {
    let old = manifest(EVERY_FIELD).unwrap().remove(0);
    let running = {
        let mut job = old.clone();
        job.spec.suspend = false;
        job
    };
    let change = |from: &FineTuneJob, path: &str, value: Value| {
        let mut object = serde_json::to_value(from).unwrap();
        set(&mut object, path, value);
        let new: FineTuneJob = serde_json::from_value(object).unwrap();
        update(from, &new)
    };
    // Changed, and, where the block is optional, removed and added.
    for (path, value) in [
        ("spec.model.source.objectStore.uri", json!("s3://other/")),
        ("spec.model.cache", Value::Null),
        ("spec.dataset.repeats", json!(9)),
        ("spec.training.seed", json!(1)),
        ("spec.training.lora.rank", json!(1)),
        ("spec.validation", Value::Null),
        ("spec.validation.steps", json!(3)),
        ("spec.checkpoint.keepLast", json!(9)),
        ("spec.checkpoint.uri", Value::Null),
        ("spec.resume.policy", json!("Auto")),
        ("spec.output.uri", json!("s3://other/")),
        ("spec.storage", Value::Null),
        ("spec.storage.region", json!("x")),
        ("spec.serviceAccountName", json!("x")),
        ("spec.podTemplate.labels", json!({})),
        ("spec.failurePolicy.maxRestartsPerHour", json!(1)),
        ("spec.activeDeadlineSeconds", Value::Null),
        ("spec.startDeadlineSeconds", json!(1)),
        ("spec.ttlScope", json!("Job")),
    ] {
        for from in [&old, &running] {
            let refused = change(from, path, value.clone()).expect_err(&format!("{path} should be fixed"));
            assert_eq!(refused.0.len(), 1, "{path}: {refused}");
        }
    }
    let without = |path: &str| {
        let mut object = serde_json::to_value(&running).unwrap();
        set(&mut object, path, Value::Null);
        serde_json::from_value::<FineTuneJob>(object).unwrap()
    };
    for path in ["spec.validation", "spec.storage", "spec.activeDeadlineSeconds", "spec.queueName", "spec.workloadPriorityClassName"] {
        assert!(update(&without(path), &running).is_err(), "{path} should not be added later");
    }
    // Free at any time.
    for (path, value) in [
        ("spec.suspend", json!(false)),
        ("spec.suspend", json!(true)),
        ("spec.ttlSecondsAfterFinished", json!(1)),
        ("spec.activeDeadlineSeconds", json!(1)),
        ("spec.failurePolicy.maxRetries", json!(1)),
        ("metadata.labels", json!({"x": "y"})),
    ] {
        for from in [&old, &running] {
            assert_eq!(change(from, path, value.clone()), Ok(()), "{path}");
        }
    }
    // Free while suspended.
    for (path, value) in [
        ("spec.scheduling.schedulerName", json!("x")),
        ("spec.resources.limits.memory", json!("15Gi")),
        ("spec.image", json!("")),
        ("spec.queueName", json!("x")),
        ("spec.workloadPriorityClassName", Value::Null),
    ] {
        assert_eq!(change(&old, path, value.clone()), Ok(()), "{path}");
        assert!(change(&running, path, value).is_err(), "{path} should be fixed while not suspended");
    }
}

#[test]
fn several_documents_are_read_and_all_problems_reported() {
    let good = minimal().to_string();
    let bad =
        with(&[("metadata.name", json!("bad")), ("spec.training.batchSize", json!(0)), ("spec.dataset.uri", Value::Null), ("spec.x", json!(1))]).to_string();
    let other = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n";
    assert_eq!(manifest(&format!("{good}\n---\n{other}\n---\n{good}\n")).unwrap().len(), 2);
    let violations = manifest(&format!("{good}\n---\n{other}\n---\n{bad}\n")).unwrap_err().0;
    let found: Vec<_> = violations.iter().map(|v| (v.document, v.path.as_str())).collect();
    assert_eq!(found, [(3, "spec.x"), (3, "spec.dataset.uri"), (3, "spec.training.batchSize")]);
    assert!(violations.iter().all(|v| v.object.as_deref() == Some("bad")));
    assert!(manifest(other).unwrap_err().to_string().contains("there is no FineTuneJob"));
    assert!(manifest("a: [").is_err());
    assert!(manifest("- 1").is_err());
    let misspelt = minimal().to_string().replace("FineTuneJob", "FinetuneJob");
    assert!(manifest(&misspelt).unwrap_err().to_string().contains("kind: must be FineTuneJob"));
    assert!(manifest("apiVersion: finetune.dev/v1\nkind: FineTuneJob\n").unwrap_err().to_string().contains("apiVersion"));
}

#[test]
fn null_is_as_if_absent() {
    let text =
        minimal().to_string().replace(r#""spec":{"#, r#""spec":{"suspend":null,"queueName":null,"training":null,"scheduling":{"gpu":{"maxMemoryMiB":null}},"#);
    let job = manifest(&text).unwrap().remove(0);
    assert_eq!(job.spec.training, super::super::TrainingSpec::default());
    assert_eq!(job.spec.scheduling.gpu.max_memory_mib, 17_000, "0 lifts the bound, null does not");
    assert!(!job.spec.suspend);
}
