//! Limits of a job: restarts, deadlines, progress.

use serde_json::json;

use super::{deleted, said, training, world};
use crate::fixtures::{at, child, disrupted, job, pod, running, step, terminated, told};
use crate::reconcile::decide::{Intent, JobPatch, Stop, Wait};
use crate::reconcile::status::lifecycle_differs;
use crate::reconcile::world::{Report, World};
use finetune_api::{AttemptCause, ConditionType as C, FineTuneJobStatus, Reason, Stage};

#[test]
fn a_job_that_exceeded_a_limit_fails_when_its_pods_are_gone() {
    let spec = job(|job| job["spec"]["failurePolicy"] = json!({"maxRestartsPerHour": 1}));
    let pods: Vec<_> = (0..3).map(|n| pod(&format!("p{n}"), "j1", &disrupted(n * 10 + 1, n * 10 + 5))).chain([pod("p3", "j1", &running(40))]).collect();
    let (intent, stopping) = step(&spec, &FineTuneJobStatus::default(), &world(Some(child("j1", |_| {})), pods.clone()), at(41));
    assert_eq!(intent, Intent::Delete { uid: "j1".into(), resource_version: "7".into(), why: Stop::Limit(Reason::RestartStorm) });
    assert_eq!(told(&stopping, C::Failed), None);
    let (intent, stopping) = step(&spec, &stopping, &world(None, pods), at(42));
    assert!(matches!(intent, Intent::Wait(Wait::Ending(_))), "{intent:?}");
    assert_eq!(told(&stopping, C::Failed), None, "the GPU is still in use");
    // However late the pod goes.
    let (_, failed) = step(&spec, &stopping, &World::default(), at(100_000));
    assert_eq!(told(&failed, C::Failed), Some(("True", "RestartStorm")));
    assert_eq!(told(&failed, C::Stalled), Some(("True", "RestartStorm")));
}

#[test]
fn a_configuration_that_no_pod_can_carry_is_refused_before_there_is_one() {
    let with_prompts = |number: usize| {
        job(|job| {
            // The longest prompts that the API allows, of the longest characters.
            let prompts: Vec<String> = (0..number).map(|_| "\u{1F436}".repeat(2000)).collect();
            job["spec"]["validation"] = json!({"prompts": prompts});
        })
    };
    let (intent, _) = step(&with_prompts(15), &FineTuneJobStatus::default(), &World::default(), at(1));
    assert!(matches!(intent, Intent::Create { .. }), "{intent:?}");
    let mut spec = with_prompts(16);
    spec.spec.dataset.caption = Some("\u{1F436}".repeat(4000));
    let (intent, after) = step(&spec, &FineTuneJobStatus::default(), &World::default(), at(1));
    assert_eq!((intent, told(&after, C::Validated), told(&after, C::Stalled)), (Intent::Rest, Some(("False", "InvalidSpec")), Some(("True", "InvalidSpec"))));
    assert_eq!((after.phase, after.reason.as_deref()), (Some(finetune_api::Phase::Failed), Some("InvalidConfig")));
    let message = &crate::reconcile::conditions::find(&after.conditions, C::Validated).unwrap().message;
    assert!(message.contains("bytes, and a pod carries at most 131072") && message.contains("validation"), "{message}");
}

#[test]
fn limits_that_may_change_are_patched_and_nothing_else() {
    let spec = job(|job| {
        job["spec"]["activeDeadlineSeconds"] = json!(700);
        job["spec"]["failurePolicy"] = json!({"maxRetries": 5});
    });
    let existing = child("j1", |job| {
        job["spec"]["activeDeadlineSeconds"] = json!(600);
        job["metadata"]["annotations"]["finetune.dev/failed-before"] = json!("2");
    });
    let (intent, _) = step(&spec, &FineTuneJobStatus::default(), &world(Some(existing), vec![]), at(1));
    assert_eq!(intent, Intent::Adjust { uid: "j1".into(), patch: JobPatch { active_deadline_seconds: Some(700), ..JobPatch::default() } }, "3 of 5 are left");
}

#[test]
fn the_storm_guard_counts_restarts_of_the_last_hour_and_projects_what_the_history_cannot_hold() {
    let restarts = |starts: &[i64], most: u32| {
        let spec = job(|job| job["spec"]["failurePolicy"] = json!({"maxRestartsPerHour": most}));
        let pods: Vec<_> = starts.iter().enumerate().map(|(n, &start)| pod(&format!("p{n:02}"), "j1", &disrupted(start, start + 1))).collect();
        let (intent, _) = step(&spec, &FineTuneJobStatus::default(), &world(Some(child("j1", |_| {})), pods), at(1_000_000));
        matches!(intent, Intent::Delete { why: Stop::Limit(Reason::RestartStorm), .. })
    };
    let every = |seconds: i64, count: i64| (0..count).map(|n| n * seconds).collect::<Vec<_>>();
    assert!(!restarts(&[0], 1));
    assert!(!restarts(&[0, 100], 1), "one restart of one");
    assert!(restarts(&[0, 100, 200], 1));
    assert!(!restarts(&[0, 100, 3800], 1), "spread over more than an hour");
    assert!(!restarts(&every(400, 12), 12));
    assert!(restarts(&every(250, 16), 12));
    assert!(restarts(&every(10, 30), 100), "more than the history holds, at 360 an hour");
    assert!(!restarts(&every(60, 30), 100), "at 60 an hour");
}

#[test]
fn a_trainer_that_finishes_no_step_is_restarted_and_that_is_a_failure() {
    let spec = job(|job| job["spec"]["progressDeadlineSeconds"] = json!(600));
    let live = vec![pod("p1", "j1", &running(5))];
    let hung = World { report: said(Stage::Training, 10), ..world(Some(child("j1", |_| {})), live.clone()) };
    assert_eq!(step(&spec, &training(), &hung, at(605)).0, Intent::Keep, "unchanged since second 6");
    let (intent, noted) = step(&spec, &training(), &hung, at(606));
    assert_eq!((intent, told(&noted, C::Running), noted.reason.as_deref()), (Intent::Keep, Some(("False", "NoProgress")), Some("NoProgress")));
    assert!(lifecycle_differs(&training(), &noted), "it is written at once");
    let (intent, stopping) = step(&spec, &noted, &hung, at(607));
    assert_eq!(intent, Intent::Delete { uid: "j1".into(), resource_version: "7".into(), why: Stop::NoProgress });
    // It even manages to save a checkpoint.
    let ended = deleted(&pod("p1", "j1", &terminated(5, 610, 75, "Error", "")), 607);
    let (_, failed) = step(&spec, &stopping, &world(None, vec![ended]), at(611));
    let attempt = &failed.attempt_history[0];
    assert_eq!((attempt.cause, attempt.reason, failed.attempts.unwrap().failed), (Some(AttemptCause::Failed), Some(Reason::NoProgress), 1));
    assert!(failed.failure.is_some_and(|failure| failure.reason == Reason::NoProgress && failure.message.contains("progressDeadlineSeconds (600)")));
    // One that does not answer, draws no conclusion; nor does one that has no limit, or publishes.
    let silent = World { report: Report { failing_since: Some(at(300)), ..said(Stage::Training, 10) }, ..world(hung.job.clone(), live.clone()) };
    assert_eq!(step(&spec, &training(), &silent, at(9000)).1.attempt_history[0].reason, None);
    assert_eq!(step(&job(|_| {}), &training(), &hung, at(9000)).1.attempt_history[0].reason, None);
    let publishing = World { report: said(Stage::Publishing, 100), ..world(hung.job.clone(), live) };
    assert_eq!(step(&spec, &training(), &publishing, at(9000)).1.attempt_history[0].reason, None);
}
