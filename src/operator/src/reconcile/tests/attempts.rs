//! Attempts: counted once, each with its cause.

use serde_json::json;

use super::{deleted, training, world};
use crate::fixtures::{at, child, disrupted, ended, job, pod, step, terminated, told};
use crate::reconcile::attempts::{Attempts, HISTORY};
use crate::reconcile::world::World;
use finetune_api::{AttemptCause, ConditionType as C, FineTuneJobStatus, Reason, ResumePolicy};

#[test]
fn attempts_beyond_the_history_are_counted_once() {
    // All pods of a Job stay until it is deleted, so that each look finds more than the history holds.
    let spec = job(|job| job["spec"]["failurePolicy"] = json!({"maxRestartsPerHour": 1000}));
    let pods: Vec<_> = (0..35_i64).map(|n| pod(&format!("p{n:02}"), "j1", &disrupted(n * 4000 + 10, n * 4000 + 20))).collect();
    let seen = world(Some(child("j1", |_| {})), pods);
    let (_, mut status) = step(&spec, &FineTuneJobStatus::default(), &seen, at(200_000));
    for _ in 0..3 {
        let (_, again) = step(&spec, &status, &seen, at(200_001));
        assert_eq!(again, status);
        status = again;
    }
    assert_eq!(status.attempts.map(|attempts| (attempts.started, attempts.disrupted)), Some((35, 35)));
    assert_eq!(status.attempt_history.len(), HISTORY);
    assert_eq!(status.attempt_history.last().map(|attempt| attempt.pod_uid.as_str()), Some("p34"));
}

#[test]
fn attempts_of_one_second_keep_their_order() {
    // Times have seconds; UIDs have no order.
    let suspended = step(&job(|job| job["spec"]["suspend"] = json!(true)), &training(), &World::default(), at(5)).1;
    let words = json!({"stage": "Finished", "step": 100, "totalSteps": 100, "result": {}}).to_string();
    let done = world(
        Some(child("j2", |job| job["status"] = ended("Complete", "CompletionsReached", ""))),
        vec![pod("a0", "j2", &terminated(5, 6, 0, "Completed", &words))],
    );
    let (_, complete) = step(&job(|_| {}), &suspended, &done, at(7));
    let pods: Vec<&str> = complete.attempt_history.iter().map(|attempt| attempt.pod_uid.as_str()).collect();
    assert_eq!(pods, ["p1", "a0"]);
    assert_eq!(complete.progress.map(|progress| progress.step), Some(100), "the last words of the last one");
}

#[test]
fn each_way_to_end_has_its_cause_and_reason() {
    let words = |reason: &str, code: i32| {
        json!({"stage": "Finished", "result": {"failure": {"reason": reason, "exitCode": code, "message": "what happened"}}}).to_string()
    };
    let mut evicted_too = terminated(5, 9, 75, "Error", &words("Superseded", 75));
    evicted_too["conditions"] = json!([{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}]);
    let cases = [
        (terminated(5, 9, 75, "Error", ""), AttemptCause::Checkpointed, None),
        (disrupted(5, 9), AttemptCause::Disrupted, None),
        (terminated(5, 9, 75, "Error", &words("Superseded", 75)), AttemptCause::Superseded, None),
        (evicted_too, AttemptCause::Superseded, None),
        (terminated(5, 9, 78, "Error", &words("OutputInUse", 78)), AttemptCause::Failed, Some(Reason::OutputInUse)),
        (terminated(5, 9, 78, "Error", ""), AttemptCause::Failed, Some(Reason::InvalidConfig)),
        (terminated(5, 9, 137, "OOMKilled", ""), AttemptCause::Failed, Some(Reason::HostOutOfMemory)),
        (terminated(5, 9, 137, "Error", ""), AttemptCause::Failed, Some(Reason::TrainerCrashed)),
        (terminated(5, 9, 12, "Error", ""), AttemptCause::Failed, Some(Reason::GPUOutOfMemory)),
        (terminated(5, 9, 12, "Error", &words("GPUTooSmall", 12)), AttemptCause::Failed, Some(Reason::GPUTooSmall)),
        (terminated(5, 9, 66, "Error", &words("ModelLoadFailed", 66)), AttemptCause::Failed, Some(Reason::ModelLoadFailed)),
        (terminated(5, 9, 71, "Error", "not JSON"), AttemptCause::Failed, Some(Reason::GPUUnavailable)),
        (terminated(5, 9, 200, "Error", ""), AttemptCause::Failed, Some(Reason::TrainerCrashed)),
        (json!({"phase": "Failed", "reason": "Evicted", "conditions": [{"type": "DisruptionTarget", "status": "True"}]}), AttemptCause::Disrupted, None),
    ];
    for (status, cause, reason) in cases {
        let began = training();
        let (_, after) = step(&job(|_| {}), &began, &world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &status)]), at(10));
        let attempt = &after.attempt_history[0];
        assert_eq!((attempt.cause, attempt.reason), (Some(cause), reason), "{status}");
        let failed = u32::from(cause == AttemptCause::Failed);
        assert_eq!(after.attempts.map(|counts| (counts.started, counts.failed, counts.disrupted)), Some((1, failed, 1 - failed)), "{status}");
        assert_eq!(told(&after, C::Running), Some(("False", "Restarting")), "{status}");
    }
}

#[test]
fn a_pod_that_was_asked_to_end_has_not_failed_whatever_its_exit_code() {
    let paused = job(|job| job["spec"]["suspend"] = json!(true));
    for code in [1, 69, 75, 77, 137] {
        let pod = pod("p1", "j1", &terminated(5, 100, code, "Error", ""));
        let end = |spec: &_, pod| step(spec, &training(), &world(Some(child("j1", |_| {})), vec![pod]), at(101)).1;
        let suspended = end(&paused, deleted(&pod, 50));
        assert_eq!((suspended.attempt_history[0].cause, suspended.attempts.unwrap().failed), (Some(AttemptCause::Suspended), 0), "{code}");
        // Its Job was suspended by Kueue, or somebody has deleted the pod.
        let disrupted = end(&job(|_| {}), deleted(&pod, 50));
        let want = if code == 75 { AttemptCause::Checkpointed } else { AttemptCause::Disrupted };
        assert_eq!((disrupted.attempt_history[0].cause, disrupted.attempts.unwrap().failed, disrupted.failure), (Some(want), 0, None), "{code}");
        // It had failed by itself when it was cleaned up.
        let failed = end(&job(|_| {}), deleted(&pod, 101));
        assert_eq!(failed.attempts.unwrap().failed, u32::from(code != 75), "{code}");
    }
}

#[test]
fn an_attempt_whose_successor_had_taken_over_is_reported_as_superseded() {
    let words = json!({"stage": "Finished", "result": {"failure": {"reason": "Superseded", "exitCode": 75, "message": "superseded by attempt 2"}}}).to_string();
    let seen = world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &terminated(5, 100, 75, "Error", &words))]);
    let attempts = Attempts::update(&job(|_| {}), &training(), &seen, at(101));
    let (_, after) = step(&job(|_| {}), &training(), &seen, at(101));
    let events = crate::reconcile::transitions::events(&training(), &after, &attempts.ended_now, ResumePolicy::Auto);
    assert_eq!(
        events.iter().map(|event| event.reason.as_str()).filter(|reason| ["Superseded", "Interrupted"].contains(reason)).collect::<Vec<_>>(),
        ["Superseded"]
    );
    let measures = crate::reconcile::transitions::measures(&training(), &after, &attempts.ended_now, None, at(101));
    assert_eq!(measures[1..], [crate::reconcile::transitions::Measure::Restarted("Superseded")]);
    assert_eq!((after.attempts.unwrap().failed, after.failure), (0, None), "no failure");
}

#[test]
fn an_event_promises_only_what_the_next_attempt_will_do() {
    let ended = |resume: &str, saved: bool| {
        let spec = job(|job| job["spec"]["resume"] = json!({"policy": resume}));
        let mut before = training();
        before.last_checkpoint = saved.then(|| finetune_api::CheckpointStatus { step: 5, uri: "s3://b/5/".into(), sha256: None, time: None });
        let seen = world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &disrupted(5, 100))]);
        let attempts = Attempts::update(&spec, &before, &seen, at(101));
        let after = step(&spec, &before, &seen, at(101)).1;
        let events = crate::reconcile::transitions::events(&before, &after, &attempts.ended_now, spec.spec.resume.policy);
        events.into_iter().find(|event| event.reason == "Disrupted").unwrap().note.unwrap()
    };
    assert!(ended("Auto", true).ends_with("continues from the newest checkpoint"));
    assert!(ended("Auto", false).ends_with("starts from the beginning"));
    assert!(ended("Never", true).ends_with("starts from the beginning, as resume.policy: Never says"));
}
