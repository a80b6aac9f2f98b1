//! What is worth a write of the status, and what is shown while training.

use serde_json::json;

use super::{said, training, world};
use crate::fixtures::{at, child, disrupted, job, pod, running, step, told};
use crate::reconcile::decide::Intent;
use crate::reconcile::status::lifecycle_differs;
use crate::reconcile::world::{Report, World};
use finetune_api::{ConditionType as C, FineTuneJobStatus, Phase, Progress, Stage};

#[test]
fn replaying_a_reconciliation_changes_nothing() {
    let seen =
        World { report: said(Stage::Training, 10), ..world(Some(child("j1", |_| {})), vec![pod("p0", "j1", &disrupted(2, 4)), pod("p1", "j1", &running(5))]) };
    let (_, first) = step(&job(|_| {}), &FineTuneJobStatus::default(), &seen, at(6));
    // The write was lost, and comes again from the same old status, later.
    let (_, again) = step(&job(|_| {}), &FineTuneJobStatus::default(), &seen, at(6));
    assert_eq!(first, again);
    // The write arrived; another look at the same world an hour later has nothing to say.
    let (intent, later) = step(&job(|_| {}), &first, &seen, at(3600));
    assert_eq!(intent, Intent::Keep);
    assert_eq!(later, first);
    assert_eq!(first.attempts.map(|attempts| (attempts.started, attempts.disrupted)), Some((2, 1)));
}

#[test]
fn a_single_answer_that_fails_to_come_does_not_flip_running() {
    let silent = |since: i64| World {
        report: Report { progress: None, failing_since: Some(at(since)), ..Report::default() },
        ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &running(5))])
    };
    let before = training();
    assert_eq!(told(&before, C::Running), Some(("True", "Training")));
    let (_, short) = step(&job(|_| {}), &before, &silent(20), at(50));
    assert_eq!(short, before);
    let (_, long) = step(&job(|_| {}), &before, &silent(20), at(90));
    assert_eq!(told(&long, C::Running), Some(("Unknown", "ProgressUnknown")));
    assert_eq!(long.phase, Some(Phase::Running), "its pod runs all the same");
}

#[test]
fn progress_alone_is_no_step_of_the_jobs_life() {
    let before = training();
    let at_step = |stage, step| World { report: said(stage, step), ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &running(5))]) };
    let (_, after) = step(&job(|_| {}), &before, &at_step(Stage::Training, 60), at(60));
    assert_eq!(after.progress.as_ref().map(|progress| progress.summary.as_str()), Some("60/100 (60%)"));
    assert!(after != before && !lifecycle_differs(&before, &after));
    let (_, publishing) = step(&job(|_| {}), &before, &at_step(Stage::Publishing, 100), at(60));
    assert!(!lifecycle_differs(&before, &publishing), "its end is reported in a moment");
    let (_, preparing) = step(&job(|_| {}), &FineTuneJobStatus::default(), &at_step(Stage::DownloadingModel, 0), at(60));
    let (_, restoring) = step(&job(|_| {}), &preparing, &at_step(Stage::RestoringCheckpoint, 0), at(61));
    assert!(!lifecycle_differs(&preparing, &restoring));
    assert!(lifecycle_differs(&restoring, &before), "training is one");
}

#[test]
fn a_life_that_nothing_disturbs_has_three_steps() {
    let seen = |pods: Vec<_>, report| World { report, ..world(Some(child("j1", |_| {})), pods) };
    let at_work = |stage, number| seen(vec![pod("p1", "j1", &running(5))], said(stage, number));
    let mut checkpointed = at_work(Stage::Training, 20);
    checkpointed.report.progress.as_mut().unwrap().last_checkpoint = Some(finetune_api::ReportedCheckpoint {
        step: 20,
        uri: "s3://team-a/loras/corgi/.checkpoints/x/step-000020/".into(),
        sha256: format!("sha256:{}", "a1".repeat(32)),
        time: at(20),
    });
    let mut pulled = running(5);
    pulled["containerStatuses"][0]["imageID"] = json!(format!("trainer@sha256:{}", "a".repeat(64)));
    let done = child("j1", |job| job["status"] = crate::fixtures::ended("Complete", "CompletionsReached", ""));
    let life = [
        ("created", seen(vec![], Report::default())),
        ("pulling", seen(vec![pod("p1", "j1", &crate::fixtures::waiting("ContainerCreating", ""))], Report::default())),
        ("started", seen(vec![pod("p1", "j1", &pulled)], Report::default())),
        ("preparing", at_work(Stage::PreparingData, 0)),
        ("training", at_work(Stage::Training, 1)),
        ("checkpoint", checkpointed),
        ("publishing", at_work(Stage::Publishing, 100)),
        ("ended", world(Some(done), vec![pod("p1", "j1", &crate::fixtures::terminated(5, 90, 0, "Completed", ""))])),
    ];
    let (mut written, mut steps) = (FineTuneJobStatus::default(), Vec::new());
    for (second, (name, seen)) in (1..).zip(&life) {
        let (_, after) = step(&job(|_| {}), &written, seen, at(second * 10));
        if lifecycle_differs(&written, &after) {
            steps.push(*name);
            written = after;
        }
    }
    // With the Job and its time to live these are the five writes of a job's life.
    assert_eq!(steps, ["created", "training", "ended"]);
    assert_eq!(written.attempts.map(|attempts| attempts.started), Some(1));
    let failing = |error: Option<&str>| {
        let mut seen = at_work(Stage::Training, 30);
        seen.report.progress.as_mut().unwrap().checkpoint_error = error.map(str::to_owned);
        step(&job(|_| {}), &training(), &seen, at(60)).1
    };
    assert!(lifecycle_differs(&training(), &failing(Some("403"))) && !lifecycle_differs(&training(), &failing(None)), "a checkpoint that fails is one");
}

#[test]
fn what_is_true_of_a_running_training_only_goes_with_it() {
    let speaking = |stage| Report {
        progress: Some(Progress {
            stage,
            step: 10,
            total_steps: 100,
            loss: Some(0.5),
            steps_per_second: Some(1.0),
            estimated_completion_time: Some(at(600)),
            ..Progress::default()
        }),
        ..said(stage, 10)
    };
    let seen = World { report: speaking(Stage::Training), ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &running(5))]) };
    let (_, trains) = step(&job(|_| {}), &FineTuneJobStatus::default(), &seen, at(6));
    let shown = |status: &FineTuneJobStatus| status.progress.as_ref().map(|progress| (progress.loss.is_some(), progress.estimated_completion_time.is_some()));
    assert_eq!(shown(&trains), Some((true, true)));
    let paused = job(|job| job["spec"]["suspend"] = json!(true));
    let (_, suspended) = step(&paused, &trains, &World::default(), at(60));
    assert_eq!((shown(&suspended), suspended.progress.as_ref().map(|progress| progress.step)), (Some((false, false)), Some(10)));
    assert_eq!(step(&paused, &suspended, &World::default(), at(90)).1, suspended);
    let restoring = World { report: speaking(Stage::RestoringCheckpoint), ..seen };
    assert_eq!(shown(&step(&job(|_| {}), &trains, &restoring, at(60)).1), Some((false, false)));
}
