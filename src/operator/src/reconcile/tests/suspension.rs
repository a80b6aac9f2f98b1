//! Suspension by `spec.suspend`.

use serde_json::json;

use super::{training, world};
use crate::fixtures::{at, child, ended, job, pod, running, step, told};
use crate::reconcile::attempts::Attempts;
use crate::reconcile::decide::{Intent, Stop};
use crate::reconcile::world::World;
use finetune_api::{AttemptCause, ConditionType as C, FineTuneJobStatus, Phase};

#[test]
fn a_user_suspension_deletes_the_job_as_it_was_seen_and_never_touches_its_suspend_field() {
    let spec = job(|job| job["spec"]["suspend"] = json!(true));
    let trains = world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &running(5))]);
    let (intent, stopping) = step(&spec, &training(), &trains, at(50));
    assert_eq!(intent, Intent::Delete { uid: "j1".into(), resource_version: "7".into(), why: Stop::Suspended });
    assert_eq!(told(&stopping, C::Suspended), None, "the GPU is not free yet");
    let (intent, suspended) = step(&spec, &stopping, &world(None, vec![]), at(60));
    assert_eq!(intent, Intent::Rest);
    assert_eq!((told(&suspended, C::Suspended), suspended.phase), (Some(("True", "UserRequested")), Some(Phase::Suspended)));
    assert_eq!(suspended.attempt_history[0].cause, Some(AttemptCause::Suspended));
    assert_eq!(told(&suspended, C::Reconciling), Some(("False", "Reconciled")));
    // It has ended well before the suspension was seen.
    let ended = world(Some(child("j1", |job| job["status"] = ended("Complete", "CompletionsReached", ""))), vec![]);
    let (intent, complete) = step(&spec, &training(), &ended, at(50));
    assert_eq!((intent, complete.phase), (Intent::Keep, Some(Phase::Succeeded)));
}

#[test]
fn a_suspension_is_no_restart_and_its_clocks_start_anew() {
    let spec = job(|job| job["spec"]["failurePolicy"] = json!({"maxRestartsPerHour": 1}));
    let mut status = FineTuneJobStatus::default();
    for round in 0..6_i64 {
        let name = format!("p{round}");
        let seen = world(Some(child("j1", |_| {})), vec![pod(&name, "j1", &running(round * 10 + 1))]);
        let (intent, trains) = step(&spec, &status, &seen, at(round * 10 + 2));
        assert_eq!(intent, Intent::Keep, "round {round}");
        let suspended = job(|job| job["spec"]["suspend"] = json!(true));
        status = step(&suspended, &trains, &World::default(), at(round * 10 + 5)).1;
    }
    assert_eq!(status.attempts.map(|attempts| attempts.started), Some(6));
    let deadline = |change: fn(&mut serde_json::Value)| {
        let spec = job(|job| {
            job["spec"]["startDeadlineSeconds"] = json!(100);
            change(job);
        });
        let attempts = Attempts::default();
        let resumed = step(&job(|job| job["spec"]["suspend"] = json!(true)), &FineTuneJobStatus::default(), &World::default(), at(10)).1;
        let resumed = step(&spec, &resumed, &World::default(), at(500)).1;
        crate::reconcile::decide::start_deadline(&spec, &resumed, &attempts)
    };
    assert_eq!(deadline(|_| {}), Some(at(600)), "counted from the resumption");
}
