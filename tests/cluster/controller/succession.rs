//! An operator that is killed between any two calls of the API server, and its successor.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use finetune_operator::controller::context::FaultHook;
use futures::StreamExt as _;
use serde_json::json;

use super::stage::{SOON, Stage, success};
use finetune_testing::kubernetes;

/// A whole life: created, started, suspended, resumed, changed, complete, cleaned up. What it waits for it would reach with any operator.
async fn live(stage: &Stage, name: &str) {
    stage
        .create(name, |job| {
            job["spec"]["activeDeadlineSeconds"] = json!(600);
            job["spec"]["ttlSecondsAfterFinished"] = json!(0);
        })
        .await;
    let first = stage.pod(name, None).await;
    stage.start(&first).await;
    stage.until(name, "an attempt", |job| job["status"]["attempts"]["started"] == 1).await;
    stage.patch(name, &json!({"spec": {"suspend": true}})).await;
    stage.condition(name, "Suspended", "True", "UserRequested").await;
    stage.patch(name, &json!({"spec": {"suspend": false}})).await;
    let second = stage.pod(name, Some(&first)).await;
    stage.start(&second).await;
    stage.patch(name, &json!({"spec": {"activeDeadlineSeconds": 700}})).await;
    kubernetes::eventually("the patch", SOON, || async { stage.job(name).await.filter(|job| job["spec"]["activeDeadlineSeconds"] == 700).map(|_| ()) }).await;
    stage.finish(&second, 0, "Completed", &success()).await;
    let done = stage.condition(name, "Complete", "True", "TrainingSucceeded").await;
    assert_eq!(done["status"]["attempts"], json!({"started": 2, "disrupted": 1, "failed": 0}), "attempts are counted once, whoever counts them");
    let jobs: BTreeSet<_> = done["status"]["attemptHistory"].as_array().into_iter().flatten().map(|attempt| attempt["jobUID"].to_string()).collect();
    assert_eq!(jobs.len(), 2, "one Job before the suspension and one after");
    assert_eq!(done["status"]["artifacts"].as_array().map(Vec::len), Some(1));
    kubernetes::eventually("the Job to be cleaned up", SOON, || async { stage.job(name).await.is_none().then_some(()) }).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(stage.job(name).await.is_none(), "a finished job must never be started again");
    assert_eq!(stage.get(name).await["status"], done["status"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_successor_carries_on_wherever_the_operator_was_killed() {
    let stage = Stage::new("faults").await;
    // Which points there are is learned from an undisturbed life, so that a new call cannot be forgotten.
    let points = Arc::new(Mutex::new(BTreeSet::new()));
    let seen = Arc::clone(&points);
    let hook = FaultHook::new(move |point| {
        seen.lock().expect("no panic").insert(point.to_owned());
        false
    });
    let operator = stage.operator_with(|options| options.faults = hook).await;
    live(&stage, "undisturbed").await;
    operator.stop().await;
    let points: Vec<String> = points.lock().expect("no panic").iter().cloned().collect();
    for call in ["get_live", "create_job", "write_status", "publish_event", "patch_job", "delete_job", "patch_ttl"] {
        for when in ["before", "after"] {
            assert!(points.contains(&format!("{when}:{call}")), "{when}:{call} is not reached; reached are {points:?}");
        }
    }
    // Lives are mostly waits; each point has a namespace and operators of its own.
    let lives = points.iter().enumerate().map(|(number, point)| async move {
        let stage = Stage::new(&format!("faults-{number}")).await;
        for occurrence in [1, 2] {
            killed_at(&stage, &format!("p{number}-{occurrence}"), point, occurrence).await;
        }
    });
    futures::stream::iter(lives).for_each_concurrent(4, |life| life).await;
}

/// A life in which the operator is killed when it reaches `point` for the `occurrence`-th time, and a successor starts.
async fn killed_at(stage: &Stage, name: &str, point: &str, occurrence: u32) {
    let (hit, mut reached) = tokio::sync::mpsc::unbounded_channel();
    let (wanted, count) = (point.to_owned(), Mutex::new(0));
    let hook = FaultHook::new(move |at| {
        if at != wanted {
            return false;
        }
        let mut count = count.lock().expect("no panic");
        *count += 1;
        let now = *count >= occurrence;
        if now {
            let _closed = hit.send(());
        }
        now
    });
    let first = stage.operator_with(|options| options.faults = hook).await;
    let life = live(stage, name);
    tokio::pin!(life);
    // A second time may never come; then this was a life without a fault.
    let killed = tokio::select! {
        () = &mut life => false,
        hit = reached.recv() => hit.is_some(),
    };
    first.kill().await;
    if killed {
        let successor = stage.operator().await;
        life.await;
        successor.stop().await;
    }
    assert!(killed || occurrence > 1, "{point} was not reached");
}
