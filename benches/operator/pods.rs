//! The stand-in for kubelets: writes the status of pods.

use std::sync::Arc;
use std::time::Duration;

use finetune_api::{PROGRESS_PORT, Progress, Stage};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::board::{Board, Moment};

/// Address of every pod.
const ADDRESS: &str = "127.0.0.1";

/// How often a write is tried, and the pause between.
const RETRIES: usize = 5;
const RETRY: Duration = Duration::from_millis(50);

/// Writes to each job's pod that it runs (`StartSent`) or has succeeded (`EndSent`), `rate` of them a second.
pub(crate) async fn at_rate(client: &Client, board: &Arc<Board>, keys: &[String], rate: f64, moment: Moment) {
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
    let mut writes = JoinSet::new();
    for key in keys {
        ticks.tick().await;
        let (client, board, key) = (client.clone(), Arc::clone(board), key.clone());
        writes.spawn(async move {
            let (namespace, _) = key.split_once('/').expect("namespace/name");
            let pods: Api<Pod> = Api::namespaced(client, namespace);
            let status = if moment == Moment::StartSent { running() } else { succeeded() };
            board.note(&key, moment);
            let pod = board.pod(&key);
            // Only answers count: a connection may be closed while a request is on its way.
            for left in (0..RETRIES).rev() {
                match pods.patch_status(&pod, &PatchParams::default(), &Patch::Merge(&status)).await {
                    Err(kube::Error::HyperError(_) | kube::Error::Service(_)) if left > 0 => tokio::time::sleep(RETRY).await,
                    written => return drop(written.expect("the API server takes the status")),
                }
            }
        });
    }
    while let Some(written) = writes.join_next().await {
        written.expect("no panic");
    }
}

/// Answers for all trainers, on the port that the operator asks: every one trains, and stays where it is.
pub(crate) async fn serve_progress() {
    let progress = Progress { stage: Stage::Training, step: 100, total_steps: 2000, ..Progress::default() };
    let body = serde_json::to_string(&progress).expect("JSON");
    let listener = tokio::net::TcpListener::bind((ADDRESS, PROGRESS_PORT)).await.expect("the port of trainers is free");
    let router = axum::Router::new().route("/progress", axum::routing::get(move || std::future::ready(body.clone())));
    tokio::spawn(async move { axum::serve(listener, router).await.expect("it serves") });
}

fn status(phase: &str, state: &Value) -> Value {
    let container =
        json!({"name": "trainer", "image": "localhost/trainer:perf", "imageID": "", "ready": phase == "Running", "restartCount": 0, "state": state});
    json!({"status": {"phase": phase, "podIP": ADDRESS, "podIPs": [{"ip": ADDRESS}], "containerStatuses": [container]}})
}

fn running() -> Value {
    status("Running", &json!({"running": {"startedAt": now()}}))
}

fn succeeded() -> Value {
    let digest = format!("sha256:{}", "a1".repeat(32));
    let message = json!({
        "stage": "Finished", "step": 2000, "totalSteps": 2000, "loss": 0.125, "datasetDigest": digest, "specHash": digest,
        "lastCheckpoint": {"step": 2000, "uri": "s3://team-a/loras/x/.checkpoints/0123456789abcdef/step-002000/", "sha256": digest, "time": now()},
        "artifacts": [
            {"format": "Diffusers", "uri": "s3://team-a/loras/x/pytorch_lora_weights.safetensors", "sha256": digest, "sizeBytes": 4_723_456},
            {"format": "Kohya", "uri": "s3://team-a/loras/x/x.safetensors", "sha256": digest, "sizeBytes": 4_723_456},
        ],
        "result": {},
    });
    status("Succeeded", &json!({"terminated": {"exitCode": 0, "reason": "Completed", "message": message.to_string(), "startedAt": now(), "finishedAt": now()}}))
}

fn now() -> String {
    let now = jiff::Timestamp::now();
    jiff::Timestamp::from_second(now.as_second()).expect("a time").to_string()
}
