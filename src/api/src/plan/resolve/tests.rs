use serde_json::{Value, json};

use super::*;

fn spec(change: Value) -> FineTuneJobSpec {
    let mut spec = json!({
        "model": {"source": {"objectStore": {"uri": "s3://models/sd3/"}}},
        "dataset": {"uri": "s3://data/corgi/"},
        "output": {"uri": "s3://loras/corgi/"},
    });
    merge(&mut spec, change);
    serde_json::from_value(spec).unwrap()
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                if value.is_null() {
                    into.remove(&key);
                } else {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (into, from) => *into = from,
    }
}

fn plan(change: Value) -> Plan {
    resolve(&spec(change), "team-a", "corgi", &Facts::default()).unwrap()
}

#[test]
fn the_defaults_are_the_articles_command() {
    let plan = plan(json!({}));
    let training = &plan.config.training;
    assert_eq!((training.max_steps, training.epochs, training.resolution, training.batch_size), (Some(2000), None, 512, 4));
    assert_eq!((training.gradient_accumulation_steps, training.seed, training.max_sequence_length), (3, 42, 77));
    assert_eq!((training.optimizer.kind, training.optimizer.learning_rate, training.optimizer.weight_decay), (OptimizerKind::AdamW8bit, 1e-4, 1e-4));
    assert_eq!((training.lora.rank, training.lora.alpha, training.max_grad_norm), (4, 4.0, 1.0));
    assert_eq!(training.learning_rate_schedule.kind, ScheduleKind::Constant);
    assert_eq!(plan.config.device, DeviceRequest::Gpu);
    assert_eq!(plan.config.job, "team-a/corgi");
    let hash = plan.config.spec_hash.strip_prefix("sha256:").unwrap();
    assert_eq!(plan.config.checkpoint.uri, format!("s3://loras/corgi/.checkpoints/{}/", &hash[..16]));
}

/// peft: alpha / sqrt(rank). Every reader divides by the rank.
#[test]
fn rank_stabilised_scales_are_written_as_an_alpha() {
    let alpha = |lora: Value| plan(json!({"training": {"lora": lora}})).config.training.lora.alpha;
    assert_eq!(alpha(json!({"rank": 16, "alpha": 8, "useRslora": true})), 32.0);
    assert_eq!(alpha(json!({"rank": 16, "alpha": 8, "useRslora": false})), 8.0);
    assert!((alpha(json!({"rank": 8, "useRslora": true})) / 8.0 - 8.0 / 8.0_f64.sqrt()).abs() < 1e-12);
}

#[test]
fn a_range_of_blocks_is_the_same_as_its_blocks() {
    let of = |targets: Value| resolve(&spec(json!({"training": {"lora": {"targetModules": targets}}})), "n", "j", &Facts::default());
    let hash = |targets: Value| of(targets).unwrap().config.spec_hash;
    let blocks = json!(["transformer_blocks.3.attn.to_q", "transformer_blocks.4.attn.to_q"]);
    assert_eq!(hash(json!(["transformer_blocks.3-4.attn.to_q"])), hash(blocks));
    let PlanError::Invalid(problems) = of(json!(["transformer_blocks.4-3.attn.to_q"])).unwrap_err() else { panic!("invalid") };
    assert_eq!(problems[0].path, "spec.training.lora.targetModules");
}

#[test]
fn the_configuration_survives_its_way_as_json() {
    let config =
        plan(json!({"training": {"optimizer": {"type": "Prodigy"}, "epochs": 3}, "validation": {"prompts": ["x"]}, "storage": {"region": "r"}})).config;
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<TrainConfig>(&text).unwrap(), config);
}

#[test]
fn the_hash_is_of_what_determines_the_weights_and_of_nothing_else() {
    let base = plan(json!({})).config.spec_hash;
    for same in [
        json!({"training": {"maxSteps": 2000, "lora": {"alpha": 4}, "optimizer": {"learningRate": "0.0001", "type": "AdamW8bit"}}}),
        json!({"training": {"learningRateSchedule": {"power": "1"}, "gradientCheckpointing": "Always"}}),
        json!({"training": {"weights": "Auto"}}),
        json!({"dataset": {"captions": {}}}),
        json!({"dataset": {"captions": {"tagOrders": 1, "triggerPosition": "Front", "keepTags": 0, "dropout": "0.0"}}}),
        json!({"suspend": true, "queueName": "q", "image": "x", "ttlSecondsAfterFinished": 1, "activeDeadlineSeconds": 5}),
        json!({"scheduling": {"gpu": {"perReplica": 0}}, "resources": {"limits": {"memory": "30Gi"}}, "storage": {"endpoint": "http://x"}}),
        json!({"checkpoint": {"everySteps": 7, "uri": "s3://elsewhere/"}, "resume": {"policy": "Never"}}),
        json!({"output": {"existing": "Overwrite", "uri": "s3://other/", "formats": ["Kohya", "Diffusers"]}}),
        json!({"model": {"cache": {"persistentVolumeClaim": {"claimName": "c"}}, "source": {"objectStore": {"storage": {"region": "r"}}}}}),
    ] {
        assert_eq!(plan(same.clone()).config.spec_hash, base, "{same}");
    }
    for other in [
        json!({"training": {"maxSteps": 2001}}),
        json!({"training": {"epochs": 2}}),
        json!({"training": {"seed": 43}}),
        json!({"training": {"lora": {"alpha": 8}}}),
        json!({"training": {"lora": {"useRslora": true}}}),
        json!({"training": {"precision": "FP32"}}),
        json!({"training": {"weights": "Float"}}),
        json!({"training": {"weights": "Int8"}}),
        json!({"training": {"flowMatching": {"shift": "3"}}}),
        json!({"training": {"flowMatching": {"shift": "ByResolution"}}}),
        json!({"training": {"buckets": {}}}),
        json!({"training": {"optimizer": {"type": "Prodigy"}}}),
        json!({"dataset": {"repeats": 2}}),
        json!({"dataset": {"captions": {"triggerWord": "ohwx"}}}),
        json!({"dataset": {"captions": {"tagOrders": 2}}}),
        json!({"dataset": {"captions": {"tagOrders": 2, "keepTags": 1}}}),
        json!({"dataset": {"captions": {"dropout": "0.1"}}}),
        json!({"dataset": {"uri": "s3://data/cats/"}}),
        json!({"validation": {"prompts": ["x"]}}),
        json!({"resume": {"fromCheckpoint": "s3://x/"}}),
        json!({"output": {"formats": ["Kohya"]}}),
        json!({"model": {"source": {"objectStore": {"uri": "s3://models/other/"}}}}),
    ] {
        assert_ne!(plan(other.clone()).config.spec_hash, base, "{other}");
    }
    assert_eq!(resolve(&spec(json!({})), "other", "name", &Facts { dataset_size: Some(7), ..Facts::default() }).unwrap().config.spec_hash, base);
}

/// A hash that changes makes every finished job train again: on purpose only, and with a new IDENTITY_VERSION.
#[test]
fn the_hash_of_the_defaults_stays() {
    assert_eq!(plan(json!({})).config.spec_hash, "sha256:d27f399af55ac3566e1f35a36401ad57206205c6dc33ecba0f510472037576e2");
}

#[test]
fn steps_follow_from_the_dataset() {
    let facts = Facts { dataset_size: Some(25), ..Facts::default() };
    let steps = |change| resolve(&spec(change), "n", "j", &facts).unwrap().steps;
    assert_eq!(steps(json!({})), StepPlan { total_steps: Some(2000), updates_per_epoch: Some(3), epochs: Some(667) });
    assert_eq!(steps(json!({"training": {"epochs": 10}})), StepPlan { total_steps: Some(30), updates_per_epoch: Some(3), epochs: Some(10) });
    let prior = json!({"training": {"epochs": 1, "priorPreservation": {"classPrompt": "a dog", "images": 100}}});
    assert_eq!(steps(prior).updates_per_epoch, Some(9));
    assert_eq!(plan(json!({"training": {"epochs": 10}})).steps, StepPlan { total_steps: None, updates_per_epoch: None, epochs: None });
}

/// How many pictures each bucket has is known once they have been looked at.
#[test]
fn the_length_of_an_epoch_with_buckets_is_not_guessed() {
    let facts = Facts { dataset_size: Some(25), ..Facts::default() };
    let steps = resolve(&spec(json!({"training": {"buckets": {}, "epochs": 2}})), "n", "j", &facts).unwrap().steps;
    assert_eq!(steps, StepPlan { total_steps: None, updates_per_epoch: None, epochs: None });
}

#[test]
fn buckets_get_kohyas_sides_and_what_cannot_be_is_refused() {
    let of = |training: Value| resolve(&spec(json!({ "training": training })), "n", "j", &Facts::default()).map(|plan| plan.config.training.buckets);
    assert_eq!(of(json!({"buckets": {}})).unwrap(), Some(BucketsConfig { step: 64, upscale: None }));
    for (resolution, step, min, max) in [(512, 64, 256, 1024), (1536, 64, 256, 1536), (96, 32, 96, 1024), (512, 48, 240, 1056)] {
        let found = of(json!({"resolution": resolution, "buckets": {"step": step, "upscale": true}})).unwrap();
        assert_eq!(found, Some(BucketsConfig { step, upscale: Some(SidesConfig { min, max }) }), "{resolution} {step}");
    }
    let sides = of(json!({"buckets": {"upscale": true, "minSize": 128, "maxSize": 768}})).unwrap();
    assert_eq!(sides, Some(BucketsConfig { step: 64, upscale: Some(SidesConfig { min: 128, max: 768 }) }));
    for (bad, path) in [
        (json!({"buckets": {}, "priorPreservation": {"classPrompt": "a dog"}}), "spec.training.buckets"),
        (json!({"resolution": 48, "buckets": {}}), "spec.training.buckets.step"),
        (json!({"buckets": {"minSize": 128}}), "spec.training.buckets.upscale"),
        (json!({"buckets": {"upscale": true, "minSize": 144}}), "spec.training.buckets"),
        (json!({"buckets": {"upscale": true, "minSize": 576}}), "spec.training.buckets.minSize"),
        (json!({"buckets": {"upscale": true, "maxSize": 448}}), "spec.training.buckets.maxSize"),
    ] {
        let PlanError::Invalid(problems) = of(bad.clone()).unwrap_err() else { panic!("{bad}") };
        assert_eq!(problems.iter().map(|problem| problem.path.as_str()).collect::<Vec<_>>(), [path], "{bad}");
    }
}

#[test]
fn schedules_get_the_cycles_of_diffusers() {
    let cycles = |schedule| plan(json!({"training": {"learningRateSchedule": schedule}})).config.training.learning_rate_schedule.cycles;
    assert_eq!(cycles(json!({"type": "Cosine"})), 0.5);
    assert_eq!(cycles(json!({"type": "CosineWithRestarts"})), 1.0);
    assert_eq!(cycles(json!({"type": "CosineWithRestarts", "cycles": "3"})), 3.0);
}

#[test]
fn storage_comes_from_the_spec_then_from_the_operator() {
    let defaults =
        StorageConfig { endpoint: Some("http://default".into()), region: Some("here".into()), ca_bundle: Some("/ca".into()), ..StorageConfig::default() };
    let facts = Facts { storage: Some(defaults.clone()), ca_bundle: Some("/own".into()), ..Facts::default() };
    let storage = |change| resolve(&spec(change), "n", "j", &facts).unwrap().config.storage.unwrap();
    assert_eq!(storage(json!({})), defaults);
    assert_eq!(storage(json!({"storage": {"region": "there"}})), StorageConfig { region: Some("there".into()), ..defaults });
    let own = storage(json!({"storage": {"endpoint": "http://own", "caBundleConfigMapRef": {"name": "c"}}}));
    assert_eq!(own, StorageConfig { endpoint: Some("http://own".into()), ca_bundle: Some("/own".into()), ..StorageConfig::default() });
}

#[test]
fn each_kind_of_source_is_resolved() {
    let source = |source: Value, facts: &Facts| resolve(&spec(json!({"model": {"source": source}})), "n", "j", facts).map(|plan| plan.config.model.source);
    let hub = json!({"objectStore": null, "huggingFace": {"repo": "a/b", "revision": "0".repeat(40)}});
    assert_eq!(source(hub, &Facts::default()).unwrap(), ModelSource::HuggingFace { repo: "a/b".into(), revision: "0".repeat(40) });
    let store = source(json!({"objectStore": {"storage": {"credentials": {"secretRef": {"name": "s"}}}}}), &Facts::default()).unwrap();
    let ModelSource::ObjectStore { storage: Some(storage), .. } = store else { panic!("{store:?}") };
    assert_eq!(storage.credentials_prefix.as_deref(), Some("MODEL_"));
    let claim = json!({"objectStore": null, "persistentVolumeClaim": {"claimName": "w"}});
    let mounted = Facts { model_directory: Some("/model".into()), ..Facts::default() };
    assert_eq!(source(claim.clone(), &mounted).unwrap(), ModelSource::Directory { path: "/model".into() });
    assert!(source(claim, &Facts::default()).unwrap_err().to_string().contains("can only be mounted in a cluster"));
    assert!(source(json!({"objectStore": null}), &Facts::default()).is_err());
}

#[test]
fn files_are_part_of_what_a_run_is() {
    let plan = |source: Value| resolve(&spec(json!({"model": {"source": source}})), "n", "j", &Facts::default());
    let hash = |source: Value| plan(source).unwrap().config.spec_hash;
    let files = json!({"files": {"transformer": "sd3.safetensors"}});
    assert_eq!(plan(files.clone()).unwrap().config.model.files.unwrap().transformer.as_deref(), Some("sd3.safetensors"));
    let hashes = [json!({}), files.clone(), json!({"files": {"withoutT5": true}})].map(hash);
    assert!(hashes[0] != hashes[1] && hashes[1] != hashes[2] && hashes[0] != hashes[2]);
    let twice = json!({"objectStore": {"uri": "s3://models/sd3.safetensors"}, "files": files["files"]});
    assert!(plan(twice).unwrap_err().to_string().contains("a single file already"));
}

#[test]
fn every_problem_is_named_at_once() {
    let bad = json!({"training": {"optimizer": {"learningRate": "fast", "beta1": "2"}}, "scheduling": {"gpu": {"minMemoryMiB": 20000}}});
    let error = resolve(&spec(bad), "n", "j", &Facts::default()).unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidConfig);
    let PlanError::Invalid(problems) = error else { panic!("{error}") };
    let mut paths: Vec<_> = problems.iter().map(|problem| problem.path.as_str()).collect();
    paths.sort_unstable();
    assert_eq!(paths, ["spec.scheduling.gpu", "spec.training.optimizer.beta1", "spec.training.optimizer.learningRate"]);
}

#[test]
fn a_gpu_that_is_too_small_is_refused_before_it_is_asked_for() {
    let small = json!({"scheduling": {"gpu": {"minMemoryMiB": 3000}}});
    assert_eq!(resolve(&spec(small), "n", "j", &Facts::default()).unwrap_err().reason(), Reason::GPUTooSmall);
    let large = Facts { device: Some(DeviceFacts::Gpu { memory_bytes: 80 << 30, compute_capability: (9, 0) }), ..Facts::default() };
    assert_eq!(resolve(&spec(json!({})), "n", "j", &large).unwrap().memory.budget_bytes, Some(BUDGET_BYTES));
    assert_eq!(plan(json!({"scheduling": {"gpu": {"perReplica": 0}}})).memory.budget_bytes, None);
}
