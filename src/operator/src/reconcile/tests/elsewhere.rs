//! Jobs that Kueue's MultiKueue runs in another cluster: their status is mirrored, and there are no pods to look at.

use std::sync::Arc;

use k8s_openapi::api::batch::v1::Job;
use serde_json::{Value, json};

use super::world;
use crate::fixtures::{at, child, ended, job, step, told};
use crate::reconcile::conditions::find;
use crate::reconcile::decide::{Intent, Stop};
use crate::reconcile::kueue::Workload;
use crate::reconcile::status::lifecycle_differs;
use crate::reconcile::warnings;
use crate::reconcile::world::World;
use finetune_api::{AdmittedReason, ConditionType as C, FineTuneJob, FineTuneJobStatus, Phase, Reason};

/// The Job as Kueue's webhook and its mirror leave it.
fn mirrored(held: bool, status: &Value) -> Arc<Job> {
    child("j1", |job| {
        job["metadata"]["creationTimestamp"] = json!(at(1).to_string());
        job["spec"]["managedBy"] = json!("kueue.x-k8s.io/multikueue");
        job["spec"]["suspend"] = json!(held);
        job["status"] = status.clone();
    })
}

fn running() -> Value {
    json!({"active": 1, "ready": 1, "startTime": at(20).to_string()})
}

fn given_to(cluster: Option<&str>, child: Arc<Job>) -> World {
    let (admitted, reason) = if cluster.is_some() { (true, AdmittedReason::QuotaReserved) } else { (false, AdmittedReason::AdmissionCheckPending) };
    let workload = Workload {
        name: "w".into(),
        job_uid: "j1".into(),
        admitted,
        reason,
        message: "admission check \"multikueue\" is Pending".into(),
        cluster: cluster.map(str::to_owned),
    };
    World { workload: Some(workload), kueue_installed: true, ..world(Some(child), vec![]) }
}

fn queued(change: impl FnOnce(&mut Value)) -> FineTuneJob {
    job(|job| {
        job["spec"]["queueName"] = json!("team-a");
        change(job);
    })
}

/// The status after, `seconds` after the job's creation, of which the intent was to leave the Job alone.
fn kept(job: &FineTuneJob, before: &FineTuneJobStatus, seen: &World, seconds: i64) -> FineTuneJobStatus {
    let (intent, after) = step(job, before, seen, at(seconds));
    assert_eq!(intent, Intent::Keep);
    after
}

fn message(status: &FineTuneJobStatus) -> &str {
    &find(&status.conditions, C::Running).unwrap().message
}

#[test]
fn each_state_names_what_it_waits_for_and_nothing_is_written_twice() {
    let spec = queued(|_| {});
    let waits = kept(&spec, &FineTuneJobStatus::default(), &given_to(None, mirrored(true, &json!({}))), 5);
    assert_eq!((waits.phase, waits.reason.as_deref()), (Some(Phase::Queued), Some("AdmissionCheckPending")));

    let given = kept(&spec, &waits, &given_to(Some("worker1"), mirrored(false, &json!({}))), 10);
    assert_eq!(told(&given, C::Running), Some(("False", "StartingOnWorkerCluster")));
    assert_eq!((given.phase, given.reason.as_deref()), (Some(Phase::Starting), Some("StartingOnWorkerCluster")));
    assert_eq!(message(&given), "MultiKueue has given the Job to worker cluster \"worker1\", which waits for a pod");
    let pending = json!({"active": 1, "ready": 0, "startTime": at(20).to_string()});
    let pending = kept(&spec, &given, &given_to(Some("worker1"), mirrored(false, &pending)), 21);
    assert!(message(&pending).ends_with("which waits for its pod to be ready"), "{}", message(&pending));

    let seen = given_to(Some("worker1"), mirrored(false, &running()));
    let runs = kept(&spec, &pending, &seen, 30);
    assert_eq!((told(&runs, C::Running), told(&runs, C::Admitted)), (Some(("Unknown", "RunningOnWorkerCluster")), Some(("True", "QuotaReserved"))));
    assert_eq!((runs.phase, runs.start_time.as_ref().map(|time| time.0)), (Some(Phase::Running), Some(at(20))));
    assert!(message(&runs).contains("worker cluster \"worker1\": its progress is shown there"), "{}", message(&runs));
    assert_eq!((told(&runs, C::Checkpointed), told(&runs, C::PodsScheduled)), (None, None), "nobody knows");
    assert!(lifecycle_differs(&given, &runs) && !lifecycle_differs(&given, &pending));
    assert_eq!(kept(&spec, &runs, &seen, 3600), runs);
    assert_eq!(warnings::subject(&seen), None, "events about it are in the other cluster");

    // An older Kueue does not name the cluster.
    let mut unnamed = seen;
    unnamed.workload.as_mut().unwrap().cluster = None;
    assert!(message(&kept(&spec, &runs, &unnamed, 31)).contains("runs in a worker cluster"));
}

#[test]
fn the_end_comes_from_the_mirrored_status() {
    let spec = queued(|_| {});
    let runs = kept(&spec, &FineTuneJobStatus::default(), &given_to(Some("w"), mirrored(false, &running())), 30);
    let end = |status: Value| kept(&spec, &runs, &given_to(Some("w"), mirrored(false, &status)), 500);
    let complete = end(ended("Complete", "CompletionsReached", ""));
    assert_eq!((told(&complete, C::Complete), complete.phase), (Some(("True", "TrainingSucceeded")), Some(Phase::Succeeded)));
    assert!(find(&complete.conditions, C::Complete).unwrap().message.contains("another cluster"));
    let failed =
        end(ended("Failed", "PodFailurePolicy", "Container trainer for pod team-a/corgi-train-0-x failed with exit code 65 matching FailJob rule at index 2"));
    let failure = failed.failure.unwrap();
    assert_eq!((failure.reason, failure.exit_code), (Reason::from_exit_code(65).unwrap(), Some(65)));
    let exhausted = end(ended("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit"));
    assert_eq!(told(&exhausted, C::Failed), Some(("True", "RetriesExhausted")));
}

#[test]
fn a_start_in_another_cluster_meets_the_start_deadline_and_limits_that_hold_here_only_are_named() {
    let spec = queued(|job| {
        job["spec"]["startDeadlineSeconds"] = json!(600);
        job["spec"]["maxGPUSeconds"] = json!(3600);
    });
    let seen = given_to(Some("w"), mirrored(false, &running()));
    let runs = kept(&spec, &FineTuneJobStatus::default(), &seen, 30);
    assert!(message(&runs).ends_with("; maxGPUSeconds cannot be enforced there"), "{}", message(&runs));
    kept(&spec, &runs, &seen, 4000);
    // Preempted over there, and queued again.
    kept(&spec, &runs, &given_to(None, mirrored(true, &json!({}))), 5000);
    let never = given_to(Some("w"), mirrored(false, &json!({})));
    let (intent, _) = step(&spec, &FineTuneJobStatus::default(), &never, at(700));
    assert!(matches!(intent, Intent::Delete { why: Stop::Limit(Reason::StartDeadlineExceeded), .. }), "{intent:?}");
}

#[test]
fn a_job_of_kubernetes_own_controller_is_here() {
    let here = child("j1", |job| {
        job["spec"]["managedBy"] = json!("kubernetes.io/job-controller");
        job["metadata"]["creationTimestamp"] = json!(at(1).to_string());
    });
    let seen = world(Some(here), vec![]);
    let (_, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &seen, at(5));
    assert_eq!(told(&after, C::Running), Some(("False", "Starting")));
    assert_eq!(warnings::subject(&seen).map(|subject| subject.uid), Some("j1".to_owned()));
    assert_eq!(after.start_time, None);
}
