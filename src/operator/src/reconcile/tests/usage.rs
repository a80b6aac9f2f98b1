//! GPU seconds: counted once, and limited.

use serde_json::json;

use super::{deleted, said, training, world};
use crate::fixtures::{at, child, disrupted, ended, job, pod, running, step, terminated, told};
use crate::reconcile::attempts::Attempts;
use crate::reconcile::decide::{Intent, Stop};
use crate::reconcile::status::lifecycle_differs;
use crate::reconcile::transitions::{Measure, events, measures};
use crate::reconcile::world::{Report, World};
use finetune_api::{AttemptCause, ConditionType as C, FineTuneJobStatus, Reason, ResumePolicy, Stage};

/// (all, of those that have ended)
fn used(status: &FineTuneJobStatus) -> Option<(u64, u64)> {
    status.usage.map(|usage| (usage.gpu_seconds, usage.ended_gpu_seconds))
}

/// The trainer of the only pod was heard at `seconds`, and had done as many steps as a tenth of that.
fn heard(seconds: i64) -> Report {
    Report { at: Some(at(seconds)), ..said(Stage::Training, seconds.unsigned_abs() / 10) }
}

#[test]
fn gpu_seconds_are_counted_once_by_the_times_of_the_pods_whoever_looks_and_when() {
    let plain = job(|_| {});
    let seen = World { report: heard(65), ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &running(5))]) };
    let (_, trains) = step(&plain, &FineTuneJobStatus::default(), &seen, at(70));
    assert_eq!(used(&trains), Some((60, 0)), "until it was last heard");
    let unheard = world(seen.job.clone(), seen.pods.clone());
    assert_eq!(used(&step(&plain, &trains, &unheard, at(80)).1), Some((60, 0)), "another operator, which has not asked yet");
    let (_, later) = step(&plain, &trains, &World { report: heard(75), ..unheard }, at(80));
    assert!(used(&later) == Some((70, 0)) && !lifecycle_differs(&trains, &later), "no write of its own");

    // Evicted; seen minutes later, and seen again.
    let evicted = world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &disrupted(5, 105))]);
    let (_, ended) = step(&plain, &trains, &evicted, at(400));
    assert_eq!(used(&ended), Some((100, 100)));
    assert_eq!(used(&step(&plain, &ended, &evicted, at(900)).1), Some((100, 100)));
    let counted =
        |before, after| measures(before, after, &[], None, at(400)).into_iter().filter(|measure| matches!(measure, Measure::GpuSeconds(_))).collect::<Vec<_>>();
    assert_eq!((counted(&trains, &ended), counted(&ended, &ended)), (vec![Measure::GpuSeconds(100)], vec![]));

    // The next Job's pod vanishes with its node while no operator looks.
    let second = World { report: heard(160), ..world(Some(child("j2", |_| {})), vec![pod("p2", "j2", &running(150))]) };
    let (_, again) = step(&plain, &ended, &second, at(165));
    assert_eq!(used(&again), Some((110, 100)));
    let (_, lost) = step(&plain, &again, &World::default(), at(500_000));
    assert_eq!((used(&lost), lost.attempt_history[1].cause), (Some((110, 110)), Some(AttemptCause::Lost)), "until it was last heard");

    let cpu = job(|job| job["spec"]["scheduling"] = json!({"gpu": {"perReplica": 0}}));
    assert_eq!(used(&step(&cpu, &FineTuneJobStatus::default(), &evicted, at(400)).1), Some((0, 0)));
}

#[test]
fn a_version_that_did_not_count_has_left_the_last_attempts() {
    let evicted = world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &disrupted(5, 105))]);
    let (_, ended) = step(&job(|_| {}), &training(), &evicted, at(400));
    let mut older = FineTuneJobStatus { usage: None, ..ended };
    older.attempt_history[0].gpus = None;
    let second = world(Some(child("j2", |_| {})), vec![pod("p2", "j2", &disrupted(500, 530))]);
    assert_eq!(used(&step(&job(|_| {}), &older, &second, at(600)).1), Some((130, 130)));
}

#[test]
fn a_job_that_has_used_its_gpu_seconds_saves_a_checkpoint_and_ends_for_good() {
    let spec = job(|job| job["spec"]["maxGPUSeconds"] = json!(100));
    let first = world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &disrupted(5, 65))]);
    let (_, before) = step(&spec, &training(), &first, at(70));
    let second = world(Some(child("j2", |_| {})), vec![pod("p2", "j2", &running(100))]);
    assert_eq!(step(&spec, &before, &second, at(139)).1.attempt_history[1].reason, None, "60 and 39 of 100");
    assert_eq!(Attempts::update(&spec, &before, &second, at(139)).spent_at(&spec), Some(at(140)));
    let (intent, noted) = step(&spec, &before, &second, at(140));
    assert_eq!((intent, noted.attempt_history[1].reason), (Intent::Keep, Some(Reason::GPUSecondsExceeded)), "written first");
    assert!(lifecycle_differs(&before, &noted));
    let (intent, stopping) = step(&spec, &noted, &second, at(141));
    assert_eq!(intent, Intent::Delete { uid: "j2".into(), resource_version: "7".into(), why: Stop::Limit(Reason::GPUSecondsExceeded) });
    assert_eq!((told(&stopping, C::Failed), told(&stopping, C::Reconciling)), (None, Some(("True", "Progressing"))));

    // However long it took by the kubelet's clock.
    for end in [120, 145] {
        let saved = deleted(&pod("p2", "j2", &terminated(100, end, 75, "Error", "")), 141);
        let deleting = child("j2", |job| job["metadata"]["deletionTimestamp"] = json!(at(141).to_string()));
        let ending = world(Some(deleting), vec![saved.clone()]);
        let attempts = Attempts::update(&spec, &stopping, &ending, at(146));
        let (_, waits) = step(&spec, &stopping, &ending, at(146));
        assert_eq!((told(&waits, C::Running), told(&waits, C::Failed)), (Some(("False", "Finished")), None), "its Job is not gone");
        let restarts = measures(&stopping, &waits, &attempts.ended_now, None, at(146)).into_iter().any(|measure| matches!(measure, Measure::Restarted(_)));
        assert!(!restarts && !events(&stopping, &waits, &attempts.ended_now, ResumePolicy::Auto).iter().any(|event| event.reason == "Interrupted"));
        let (intent, failed) = step(&spec, &waits, &world(None, vec![saved]), at(147));
        assert!(matches!(intent, Intent::Fail { reason: Reason::GPUSecondsExceeded, .. }), "{intent:?}");
        assert_eq!((told(&failed, C::Failed), failed.reason.as_deref()), (Some(("True", "GPUSecondsExceeded")), Some("GPUSecondsExceeded")));
        assert_eq!((failed.attempt_history[1].cause, failed.attempts.unwrap().failed), (Some(AttemptCause::Checkpointed), 0));
        assert_eq!(used(&failed).unwrap().1, 60 + (end - 100).unsigned_abs());
    }

    // It was through already.
    let done = world(
        Some(child("j2", |job| job["status"] = ended("Complete", "CompletionsReached", ""))),
        vec![pod("p2", "j2", &terminated(100, 150, 0, "Completed", ""))],
    );
    assert_eq!(told(&step(&spec, &stopping, &done, at(151)).1, C::Complete), Some(("True", "TrainingSucceeded")));
    let succeeds = world(Some(child("j2", |_| {})), vec![pod("p2", "j2", &terminated(100, 900, 0, "Completed", ""))]);
    assert_eq!(step(&spec, &before, &succeeds, at(901)).0, Intent::Keep, "its Job completes in a moment");
}

#[test]
fn what_was_used_before_an_eviction_counts_and_a_higher_limit_lets_the_job_go_on() {
    let limited = |most: u64| job(|job| job["spec"]["maxGPUSeconds"] = json!(most));
    let evicted = world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &disrupted(5, 205))]);
    let (_, ended) = step(&limited(100), &training(), &evicted, at(210));
    assert_eq!(
        step(&limited(100), &ended, &evicted, at(211)).0,
        Intent::Delete { uid: "j1".into(), resource_version: "7".into(), why: Stop::Limit(Reason::GPUSecondsExceeded) }
    );
    assert!(matches!(step(&limited(100), &ended, &World::default(), at(212)).0, Intent::Fail { reason: Reason::GPUSecondsExceeded, .. }));
    assert!(matches!(step(&limited(300), &ended, &World::default(), at(212)).0, Intent::Create { .. }));
}
