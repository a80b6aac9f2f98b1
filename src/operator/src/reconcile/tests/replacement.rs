//! One Job after another, and never two trainers at once.

use serde_json::json;

use super::{deleted, training, world};
use crate::fixtures::{at, child, disrupted, ended, job, pod, running, step, terminated, told, waiting};
use crate::reconcile::decide::{Intent, JobPatch, Stop, Wait};
use crate::reconcile::world::{Warning, World};
use finetune_api::{ConditionType as C, FineTuneJobStatus, Phase};

#[test]
fn a_job_is_created_only_after_the_pods_of_the_one_before_have_ended() {
    let leaving = pod("p1", "j1", &running(5));
    let (intent, after) = step(&job(|_| {}), &training(), &world(None, vec![leaving]), at(50));
    assert!(matches!(intent, Intent::Wait(Wait::Ending(ref what)) if what.contains("corgi-train-0-p1")), "{intent:?}");
    assert_eq!(told(&after, C::Reconciling), Some(("True", "Progressing")));
    let deleting = child("j1", |job| job["metadata"]["deletionTimestamp"] = json!(at(40).to_string()));
    assert_eq!(step(&job(|_| {}), &training(), &world(Some(deleting), vec![]), at(50)).0, Intent::Wait(Wait::JobDeleting));
    assert_eq!(step(&job(|_| {}), &training(), &World::default(), at(50)).0, Intent::Create { failed_before: 0, active_before: 45 });
}

#[test]
fn after_a_free_end_the_next_pod_does_not_wait_and_nothing_flickers() {
    let seen = world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &disrupted(5, 100))]);
    let (intent, ended) = step(&job(|_| {}), &training(), &seen, at(101));
    assert_eq!(intent, Intent::Keep, "its end is written first");
    let (intent, stopping) = step(&job(|_| {}), &ended, &seen, at(101));
    assert_eq!(intent, Intent::Delete { uid: "j1".into(), resource_version: "7".into(), why: Stop::Renewal });
    assert_eq!(stopping, ended, "nothing more to report");
    let deleting = child("j1", |job| job["metadata"]["deletionTimestamp"] = json!(at(101).to_string()));
    let (intent, stopping) = step(&job(|_| {}), &ended, &world(Some(deleting), vec![]), at(102));
    assert_eq!((intent, &stopping), (Intent::Wait(Wait::JobDeleting), &ended));
    let (intent, stopping) = step(&job(|_| {}), &ended, &World::default(), at(103));
    assert_eq!(intent, Intent::Create { failed_before: 0, active_before: 98 }, "activeDeadlineSeconds goes on");
    assert_eq!(stopping, ended);
    assert_eq!((ended.reason.as_deref(), told(&ended, C::JobCreated)), (Some("Restarting"), Some(("True", "Created"))));
    let message = |status: &FineTuneJobStatus| crate::reconcile::conditions::find(&status.conditions, C::Running).unwrap().message.clone();
    assert!(message(&ended).ends_with("the next one follows at once"), "{}", message(&ended));

    // A queued Job would lose its quota, and a failure has its delay: status shows when the next pod is due.
    let queued = job(|job| job["spec"]["queueName"] = json!("team-a"));
    let (_, ended) = step(&queued, &training(), &World { kueue_installed: true, ..seen }, at(101));
    assert!(message(&ended).ends_with("the Job controller starts the next one at 2026-08-24T10:01:50Z"), "{}", message(&ended));
    let twice = vec![pod("p1", "j1", &terminated(5, 50, 1, "Error", "")), pod("p2", "j1", &terminated(60, 100, 69, "Error", ""))];
    let (intent, failed) = step(&job(|_| {}), &training(), &world(Some(child("j1", |_| {})), twice), at(101));
    assert_eq!(intent, Intent::Keep);
    assert_eq!(message(&failed), "the last pod failed (StorageUnavailable); the Job controller starts the next one at 2026-08-24T10:02:00Z");
}

#[test]
fn a_job_that_ends_by_a_disruption_has_not_ended_and_is_replaced() {
    let spec = job(|job| job["spec"]["failurePolicy"] = json!({"maxRetries": 0}));
    let interrupted = deleted(&pod("p1", "j1", &terminated(5, 100, 137, "Error", "")), 50);
    let counted = child("j1", |job| job["status"] = ended("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit"));
    let seen = world(Some(counted), vec![interrupted.clone()]);
    let (intent, after) = step(&spec, &training(), &seen, at(101));
    assert_eq!((intent, told(&after, C::Failed), after.attempts.unwrap().failed), (Intent::Keep, None, 0), "its end is written first");
    let (intent, again) = step(&spec, &after, &seen, at(102));
    assert_eq!(intent, Intent::Delete { uid: "j1".into(), resource_version: "7".into(), why: Stop::Renewal });
    assert_eq!((again.phase, told(&again, C::Running)), (Some(Phase::Starting), Some(("False", "Restarting"))));
    let (intent, _) = step(&spec, &again, &World::default(), at(104));
    assert!(matches!(intent, Intent::Create { failed_before: 0, .. }), "{intent:?}");
    // A failure of its own is the end.
    let failed = pod("p1", "j1", &terminated(5, 100, 137, "Error", ""));
    let (intent, after) = step(&spec, &training(), &world(seen.job, vec![failed]), at(101));
    assert_eq!((intent, told(&after, C::Failed)), (Intent::Keep, Some(("True", "RetriesExhausted"))));
}

#[test]
fn a_job_changed_by_hand_is_put_back_or_explained() {
    let parallel = child("j1", |job| job["spec"]["parallelism"] = json!(0));
    let (intent, _) = step(&job(|_| {}), &FineTuneJobStatus::default(), &world(Some(parallel), vec![]), at(50));
    assert!(matches!(intent, Intent::Adjust { patch: JobPatch { parallelism: Some(1), .. }, .. }), "{intent:?}");
    let held = child("j1", |job| job["spec"]["suspend"] = json!(true));
    let (intent, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &world(Some(held), vec![]), at(50));
    assert_eq!((intent, told(&after, C::Admitted)), (Intent::Keep, Some(("False", "JobSuspended"))));
    let message = &crate::reconcile::conditions::find(&after.conditions, C::Admitted).unwrap().message;
    assert!(message.contains("kubectl patch job corgi-train"), "{message}");
}

#[test]
fn a_job_that_needs_a_config_map_of_an_earlier_operator_and_has_none_is_replaced() {
    let waits_for = |name: &str| {
        let note = format!("MountVolume.SetUp failed for volume \"config\" : configmap \"{name}\" not found");
        let seen = World {
            warning: Some(Warning { reason: "FailedMount".into(), note }),
            ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &waiting("ContainerCreating", ""))])
        };
        step(&job(|_| {}), &FineTuneJobStatus::default(), &seen, at(60)).0
    };
    assert!(matches!(waits_for("corgi-config-1a2b3c4d"), Intent::Delete { why: Stop::Renewal, .. }), "the new one carries its configuration");
    assert_eq!(waits_for("company-ca"), Intent::Keep, "a ConfigMap that the spec names is for somebody else to make");
}
