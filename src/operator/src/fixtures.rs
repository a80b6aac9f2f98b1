//! What the tests of the pure steps share: jobs, Jobs and pods as the API server holds them.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::reconcile::attempts::Attempts;
use crate::reconcile::decide::{Intent, decide};
use crate::reconcile::status::{Inputs, Outcome, status};
use crate::reconcile::validate::{ValidatedJob, validate};
use crate::reconcile::world::World;
use crate::settings::{ConfigFile, Settings};
use finetune_api::{FineTuneJob, FineTuneJobStatus};

/// 2026-08-24T10:00:00Z, when the job is created.
pub(super) const CREATED: i64 = 1_787_565_600;

/// `seconds` after the job's creation.
pub(super) fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(CREATED + seconds).unwrap()
}

/// The settings of a cluster with defaults for storage.
pub(super) fn settings() -> Settings {
    let file: ConfigFile = serde_json::from_value(
        json!({"trainer": {"image": "trainer:1"}, "defaultStorage": {"endpoint": "http://s3:8333", "credentials": {"secretRef": {"name": "s3"}}}}),
    )
    .unwrap();
    Settings::new(file).unwrap()
}

/// A job, changed.
pub(super) fn job(change: impl FnOnce(&mut Value)) -> FineTuneJob {
    let mut value = json!({
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "corgi", "namespace": "team-a", "uid": "f1", "generation": 1, "creationTimestamp": at(0).to_string()},
        "spec": {
            "model": {"source": {"objectStore": {"uri": "s3://models/sd3/"}}},
            "dataset": {"uri": "s3://team-a/data/"},
            "output": {"uri": "s3://team-a/loras/corgi/"},
        },
    });
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

/// The plain job, validated.
pub(super) fn validated(change: impl FnOnce(&mut Value)) -> ValidatedJob {
    validate(&job(change), &settings()).unwrap()
}

/// The batch Job with UID `uid`, with a status.
pub(super) fn child(uid: &str, change: impl FnOnce(&mut Value)) -> Arc<Job> {
    let mut value = json!({
        "metadata": {
            "name": "corgi-train", "namespace": "team-a", "uid": uid, "resourceVersion": "7",
            "annotations": {"finetune.dev/failed-before": "0"},
            "ownerReferences": [{"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "name": "corgi", "uid": "f1", "controller": true}],
        },
        "spec": {"backoffLimit": 3, "suspend": false, "template": {"spec": {"containers": [{"name": "trainer", "image": "trainer:1"}]}}},
    });
    change(&mut value);
    Arc::new(serde_json::from_value(value).unwrap())
}

/// A condition of a Job, as its status.
pub(super) fn ended(type_: &str, reason: &str, message: &str) -> Value {
    json!({"conditions": [{"type": type_, "status": "True", "reason": reason, "message": message}]})
}

/// A pod of the Job `job_uid`, with a status.
pub(super) fn pod(uid: &str, job_uid: &str, status: &Value) -> Arc<Pod> {
    let value = json!({
        "metadata": {
            "name": format!("corgi-train-0-{uid}"), "namespace": "team-a", "uid": uid, "creationTimestamp": at(1).to_string(),
            "labels": {"finetune.dev/job": "corgi", "finetune.dev/job-uid": "f1"},
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "corgi-train", "uid": job_uid, "controller": true}],
        },
        "spec": {"nodeName": "t4-1", "containers": []},
        "status": status,
    });
    Arc::new(serde_json::from_value(value).unwrap())
}

/// A status with the trainer's container in a state.
fn trainer(phase: &str, state: &Value) -> Value {
    json!({"phase": phase, "conditions": [{"type": "PodScheduled", "status": "True"}], "containerStatuses": [{"name": "trainer", "image": "trainer:1", "imageID": "", "ready": true, "restartCount": 0, "state": state}]})
}

/// The status of a pod whose trainer started at `start`.
pub(super) fn running(start: i64) -> Value {
    trainer("Running", &json!({"running": {"startedAt": at(start).to_string()}}))
}

/// The status of a pod whose container waits.
pub(super) fn waiting(reason: &str, message: &str) -> Value {
    trainer("Pending", &json!({"waiting": {"reason": reason, "message": message}}))
}

/// The status of a pod whose trainer ran from `start` to `end` and left `message`.
pub(super) fn terminated(start: i64, end: i64, code: i32, reason: &str, message: &str) -> Value {
    let state =
        json!({"terminated": {"exitCode": code, "reason": reason, "message": message, "startedAt": at(start).to_string(), "finishedAt": at(end).to_string()}});
    trainer(if code == 0 { "Succeeded" } else { "Failed" }, &state)
}

/// The same, disrupted.
pub(super) fn disrupted(start: i64, end: i64) -> Value {
    let mut status = terminated(start, end, 143, "Error", "");
    status["conditions"] = json!([{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]);
    status
}

/// One reconciliation without its calls: what is decided and the status after.
pub(super) fn step(job: &FineTuneJob, before: &FineTuneJobStatus, world: &World, now: Timestamp) -> (Intent, FineTuneJobStatus) {
    step_with(job, before, world, &Outcome::Done, now)
}

/// The same with another outcome of `apply`.
pub(super) fn step_with(job: &FineTuneJob, before: &FineTuneJobStatus, world: &World, outcome: &Outcome, now: Timestamp) -> (Intent, FineTuneJobStatus) {
    let validated = validate(job, &settings());
    let attempts = Attempts::update(job, before, world, now);
    let intent = decide(job, before, validated.as_ref().ok(), world, &attempts, now);
    let after = status(&Inputs { job, before, validated: validated.as_ref(), world, attempts: &attempts, intent: &intent, outcome, now });
    (intent, after)
}

/// `Running=False/Starting` and the like: (status, reason) of a condition.
pub(super) fn told(status: &FineTuneJobStatus, type_: finetune_api::ConditionType) -> Option<(&str, &str)> {
    crate::reconcile::conditions::find(&status.conditions, type_).map(|condition| (condition.status.as_str(), condition.reason.as_str()))
}
