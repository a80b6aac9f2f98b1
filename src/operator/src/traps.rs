//! Mistakes that operators of this kind have made, each as a test. The numbers are those of docs/concepts/operator.md.

use serde_json::json;

use super::attempts::{Attempts, HISTORY};
use super::decide::{Intent, JobPatch, Stop, Wait};
use super::fixtures::{at, child, disrupted, ended, job, pod, running, step, step_with, terminated, told, waiting};
use super::status::{Outcome, lifecycle_differs};
use super::world::{Report, Warning, World};
use finetune_api::{AttemptCause, ConditionType as C, FineTuneJobStatus, JobCreatedReason, Phase, Progress, Reason, ResumePolicy, Stage};

fn world(job: Option<std::sync::Arc<k8s_openapi::api::batch::v1::Job>>, pods: Vec<std::sync::Arc<k8s_openapi::api::core::v1::Pod>>) -> World {
    World { job, pods, ..World::default() }
}

/// The status of a job that trains in pod p1 of Job j1.
fn training() -> FineTuneJobStatus {
    let seen = World { report: said(Stage::Training, 10), ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &running(5))]) };
    step(&job(|_| {}), &FineTuneJobStatus::default(), &seen, at(6)).1
}

fn said(stage: Stage, step: u64) -> Report {
    Report {
        progress: Some(Progress { stage, step, total_steps: 100, ..Progress::default() }),
        at: Some(at(6)),
        unchanged_since: Some(at(6)),
        failing_since: None,
    }
}

#[test]
fn trap_1_a_finished_job_is_never_started_again() {
    let done = world(
        Some(child("j1", |job| job["status"] = ended("Complete", "CompletionsReached", ""))),
        vec![pod("p1", "j1", &terminated(5, 90, 0, "Completed", ""))],
    );
    let (_, complete) = step(&job(|_| {}), &training(), &done, at(91));
    assert_eq!(complete.phase, Some(Phase::Succeeded));
    // The Job and its pods are gone, the spec is touched, a year has passed.
    let later = job(|job| {
        job["metadata"]["generation"] = json!(2);
        job["spec"]["suspend"] = json!(true);
    });
    let (intent, after) = step(&later, &complete, &World::default(), at(31_536_000));
    assert_eq!(intent, Intent::Rest);
    assert_eq!(after, FineTuneJobStatus { observed_generation: Some(2), ..complete });
}

#[test]
fn trap_2_only_the_jobs_final_conditions_end_it() {
    let counting =
        child("j1", |job| job["status"] = json!({"failed": 3, "conditions": [{"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy"}]}));
    let (intent, after) = step(&job(|_| {}), &training(), &world(Some(counting), vec![pod("p1", "j1", &running(5))]), at(50));
    assert_eq!(intent, Intent::Keep);
    assert_eq!((told(&after, C::Failed), told(&after, C::Complete)), (None, None));
    let met = child("j1", |job| job["status"] = ended("SuccessCriteriaMet", "CompletionsReached", ""));
    assert_eq!(told(&step(&job(|_| {}), &training(), &world(Some(met), vec![]), at(50)).1, C::Complete), None);
}

#[test]
fn trap_3_a_job_that_exceeded_a_limit_fails_when_its_pods_are_gone() {
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
fn trap_4_and_12_a_job_is_created_only_after_the_pods_of_the_one_before_have_ended() {
    let leaving = pod("p1", "j1", &running(5));
    let (intent, after) = step(&job(|_| {}), &training(), &world(None, vec![leaving]), at(50));
    assert!(matches!(intent, Intent::Wait(Wait::Ending(ref what)) if what.contains("corgi-train-0-p1")), "{intent:?}");
    assert_eq!(told(&after, C::Reconciling), Some(("True", "Progressing")));
    let deleting = child("j1", |job| job["metadata"]["deletionTimestamp"] = json!(at(40).to_string()));
    assert_eq!(step(&job(|_| {}), &training(), &world(Some(deleting), vec![]), at(50)).0, Intent::Wait(Wait::JobDeleting));
    assert_eq!(step(&job(|_| {}), &training(), &World::default(), at(50)).0, Intent::Create { failed_before: 0, active_before: 45 });
}

#[test]
fn trap_5_a_pod_that_vanishes_with_its_success_has_been_heard() {
    let words = json!({
        "stage": "Finished", "step": 100, "totalSteps": 100, "result": {},
        "artifacts": [{"format": "Diffusers", "uri": "s3://b/x.safetensors", "sha256": format!("sha256:{}", "a1".repeat(32)), "sizeBytes": 1}],
    });
    let succeeded = pod("p1", "j1", &terminated(5, 90, 0, "Completed", &words.to_string()));
    let (_, waiting) = step(&job(|_| {}), &training(), &world(Some(child("j1", |_| {})), vec![succeeded.clone()]), at(91));
    assert_eq!(waiting.attempt_history[0].cause, None, "its Job tells in a moment, in one write");

    // Its node was lost and is back: the pod goes as soon as it has ended.
    let leaving = {
        let mut pod = (*succeeded).clone();
        pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(60)));
        std::sync::Arc::new(pod)
    };
    let (_, heard) = step(&job(|_| {}), &training(), &world(Some(child("j1", |_| {})), vec![leaving]), at(91));
    assert!(lifecycle_differs(&training(), &heard), "it must be written at once");
    assert_eq!((heard.artifacts.len(), heard.attempt_history[0].cause), (1, Some(AttemptCause::Succeeded)));
    assert_eq!(told(&heard, C::Running), Some(("True", "Training")), "nothing restarts");
    let complete = child("j1", |job| job["status"] = ended("Complete", "CompletionsReached", ""));
    let (_, done) = step(&job(|_| {}), &heard, &world(Some(complete.clone()), vec![]), at(93));
    assert_eq!((told(&done, C::Complete), done.artifacts.len()), (Some(("True", "TrainingSucceeded")), 1));
    assert_eq!(done.attempts.map(|attempts| (attempts.started, attempts.disrupted, attempts.failed)), Some((1, 0, 0)));

    // No operator was there to hear it.
    let (_, unheard) = step(&job(|_| {}), &training(), &world(Some(complete), vec![]), at(93));
    assert_eq!((unheard.attempt_history[0].cause, unheard.attempts.map(|attempts| attempts.disrupted)), (Some(AttemptCause::Succeeded), Some(0)));
    let message = &super::conditions::find(&unheard.conditions, C::Complete).unwrap().message;
    assert!(message.contains("result.json"), "{message}");
}

#[test]
fn trap_7_a_first_reconciliation_that_fails_leaves_a_condition() {
    let refused = Outcome::NotCreated { reason: JobCreatedReason::QuotaExceeded, message: "exceeded quota: q".into() };
    let (_, after) = step_with(&job(|_| {}), &FineTuneJobStatus::default(), &World::default(), &refused, at(1));
    assert_eq!(told(&after, C::JobCreated), Some(("False", "QuotaExceeded")));
    assert_eq!(told(&after, C::Reconciling), Some(("True", "Progressing")));
    assert_eq!((after.observed_generation, after.phase), (Some(1), Some(Phase::Pending)));
}

#[test]
fn trap_8_and_18_replaying_a_reconciliation_changes_nothing() {
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
fn trap_19_a_single_answer_that_fails_to_come_does_not_flip_running() {
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
fn trap_18_progress_alone_is_no_step_of_the_jobs_life() {
    let before = training();
    let at_step = |stage, step| World { report: said(stage, step), ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &running(5))]) };
    let (_, after) = step(&job(|_| {}), &before, &at_step(Stage::Training, 60), at(60));
    assert_eq!(after.progress.as_ref().map(|progress| progress.summary.as_str()), Some("60/100 (60%)"));
    assert!(after != before && !lifecycle_differs(&before, &after));
    let (_, publishing) = step(&job(|_| {}), &before, &at_step(Stage::Publishing, 100), at(60));
    assert!(!lifecycle_differs(&before, &publishing), "its end is told in a moment");
    let (_, preparing) = step(&job(|_| {}), &FineTuneJobStatus::default(), &at_step(Stage::DownloadingModel, 0), at(60));
    let (_, restoring) = step(&job(|_| {}), &preparing, &at_step(Stage::RestoringCheckpoint, 0), at(61));
    assert!(!lifecycle_differs(&preparing, &restoring));
    assert!(lifecycle_differs(&restoring, &before), "training is one");
}

#[test]
fn trap_28_attempts_beyond_the_history_are_counted_once() {
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
fn trap_34_a_queued_job_is_not_created_without_kueue() {
    let spec = job(|job| job["spec"]["queueName"] = json!("team-a"));
    let (intent, after) = step(&spec, &FineTuneJobStatus::default(), &World::default(), at(1));
    assert_eq!(intent, Intent::Wait(Wait::Kueue));
    assert_eq!((told(&after, C::Admitted), after.phase), (Some(("False", "KueueNotInstalled")), Some(Phase::Queued)));
    let with = World { kueue_installed: true, ..World::default() };
    assert_eq!(step(&spec, &after, &with, at(2)).0, Intent::Create { failed_before: 0, active_before: 0 });
}

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
        super::decide::start_deadline(&spec, &resumed, &attempts)
    };
    assert_eq!(deadline(|_| {}), Some(at(600)), "counted from the resumption");
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
fn a_failed_job_names_the_cause_even_when_its_pods_are_gone() {
    let failed = |reason: &str, message: &str| child("j1", |job| job["status"] = ended("Failed", reason, message));
    let words = json!({"stage": "Finished", "result": {"failure": {"reason": "OutputInUse", "exitCode": 78, "message": "in use by job team-a/other"}}});
    let taken = terminated(5, 9, 78, "Error", &words.to_string());
    let policy = "Container trainer for pod team-a/corgi-train-0-x failed with exit code 65 matching FailJob rule at index 2";
    let cases = [
        (
            world(Some(failed("PodFailurePolicy", policy)), vec![pod("p1", "j1", &terminated(5, 9, 65, "Error", ""))]),
            Reason::InvalidDataset,
            Reason::InvalidDataset,
        ),
        (world(Some(failed("PodFailurePolicy", policy)), vec![]), Reason::InvalidDataset, Reason::InvalidDataset),
        (world(Some(failed("PodFailurePolicy", "exit code 78")), vec![pod("p1", "j1", &taken)]), Reason::OutputInUse, Reason::OutputInUse),
        (
            world(Some(failed("BackoffLimitExceeded", "")), vec![pod("p1", "j1", &terminated(5, 9, 137, "OOMKilled", ""))]),
            Reason::RetriesExhausted,
            Reason::HostOutOfMemory,
        ),
        (world(Some(failed("BackoffLimitExceeded", "")), vec![]), Reason::RetriesExhausted, Reason::RetriesExhausted),
        (world(Some(failed("DeadlineExceeded", "")), vec![]), Reason::DeadlineExceeded, Reason::DeadlineExceeded),
    ];
    for (seen, condition, cause) in cases {
        let (_, after) = step(&job(|_| {}), &training(), &seen, at(20));
        assert_eq!(told(&after, C::Failed), Some(("True", condition.as_str())), "{seen:?}");
        assert_eq!(after.failure.as_ref().map(|failure| failure.reason), Some(cause), "{seen:?}");
        assert_eq!((after.phase, told(&after, C::Running)), (Some(Phase::Failed), Some(("False", "Finished"))));
    }
}

#[test]
fn what_keeps_a_pod_from_running_is_told() {
    let lost = |deleted: i64| {
        let mut pod = (*pod("p1", "j1", &running(5))).clone();
        pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(deleted)));
        std::sync::Arc::new(pod)
    };
    let unschedulable =
        |message: &str| json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]});
    let cases = [
        (pod("p1", "j1", &waiting("ErrImagePull", "denied")), "ImagePullBackOff"),
        (pod("p1", "j1", &waiting("ImagePullBackOff", "Back-off")), "ImagePullBackOff"),
        (pod("p1", "j1", &waiting("CreateContainerConfigError", "secret \"s3\" not found")), "SecretNotFound"),
        (pod("p1", "j1", &waiting("CreateContainerConfigError", "container has runAsNonRoot and image will run as root")), "CreateContainerError"),
        (pod("p1", "j1", &waiting("ContainerCreating", "")), "PullingImage"),
        (pod("p1", "j1", &unschedulable("persistentvolumeclaim \"models\" not found")), "VolumeNotFound"),
        (pod("p1", "j1", &unschedulable("0/3 nodes are available")), "Starting"),
        (lost(10), "NodeLost"),
    ];
    for (pod, reason) in cases {
        let (_, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &world(Some(child("j1", |_| {})), vec![pod.clone()]), at(60));
        assert_eq!(told(&after, C::Running), Some(("False", reason)), "{pod:?}");
    }
    let ending = world(Some(child("j1", |_| {})), vec![lost(50)]);
    assert_eq!(told(&step(&job(|_| {}), &training(), &ending, at(60)).1, C::Running), Some(("True", "Training")), "it may still end by itself");
    let nowhere = World { node_matches: Some(false), ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &unschedulable("0/3"))]) };
    assert_eq!(told(&step(&job(|_| {}), &FineTuneJobStatus::default(), &nowhere, at(60)).1, C::PodsScheduled), Some(("False", "NoMatchingGPUNode")));
    let note = "MountVolume.SetUp failed for volume \"ca\" : configmap references non-existent config key: ca.crt";
    let certificates = World {
        warning: Some(Warning { reason: "FailedMount".into(), note: note.into() }),
        ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &waiting("ContainerCreating", ""))])
    };
    let (_, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &certificates, at(60));
    assert_eq!(told(&after, C::Running), Some(("False", "ConfigMapNotFound")));
    assert_eq!((told(&after, C::Reconciling), after.reason.as_deref()), (Some(("True", "Progressing")), Some("ConfigMapNotFound")), "kstatus and kubectl get");
    assert!(super::conditions::find(&after.conditions, C::Reconciling).unwrap().message.contains("non-existent config key"));
}

#[test]
fn a_pod_that_the_api_server_refuses_is_told_in_its_words() {
    let note = "pods \"corgi-train-0-\" is forbidden: exceeded quota: no-gpus, requested: requests.nvidia.com/gpu=1";
    let refused = World { warning: Some(Warning { reason: "FailedCreate".into(), note: note.into() }), ..world(Some(child("j1", |_| {})), vec![]) };
    let (intent, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &refused, at(20));
    assert_eq!((intent, after.phase, after.reason.as_deref()), (Intent::Keep, Some(Phase::Starting), Some("QuotaExceeded")));
    let condition = super::conditions::find(&after.conditions, C::PodsScheduled).unwrap();
    assert!((condition.status.as_str(), condition.reason.as_str()) == ("False", "QuotaExceeded") && condition.message.ends_with(note), "{condition:?}");
    assert_eq!((told(&after, C::Reconciling), told(&after, C::Stalled)), (Some(("True", "Progressing")), Some(("False", "NotStalled"))));
    let events = super::transitions::events(&FineTuneJobStatus::default(), &after, &[], ResumePolicy::Auto);
    assert!(events.iter().any(|event| event.reason == "QuotaExceeded" && event.note.as_ref().is_some_and(|text| text.contains(note))));
    // The quota is raised: the pod is there, and no scheduler has looked at it.
    let mut fresh = (*pod("p1", "j1", &json!({"phase": "Pending"}))).clone();
    fresh.spec.as_mut().unwrap().node_name = None;
    let (_, created) = step(&job(|_| {}), &after, &world(Some(child("j1", |_| {})), vec![std::sync::Arc::new(fresh)]), at(30));
    assert_eq!((created.reason.as_deref(), told(&created, C::PodsScheduled), told(&created, C::Reconciling)), (None, None, Some(("False", "Reconciled"))));
    assert!(lifecycle_differs(&after, &created), "it is written at once");
    let (_, mended) = step(&job(|_| {}), &after, &world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &running(30))]), at(31));
    assert_eq!((mended.reason.as_deref(), told(&mended, C::Reconciling)), (None, Some(("False", "Reconciled"))));
}

#[test]
fn a_pod_of_which_nothing_is_known_yet_changes_nothing() {
    let (_, created) = step(&job(|_| {}), &FineTuneJobStatus::default(), &world(Some(child("j1", |_| {})), vec![]), at(1));
    let mut pod = (*pod("p1", "j1", &json!({"phase": "Pending"}))).clone();
    pod.spec.as_mut().unwrap().node_name = None;
    let (_, after) = step(&job(|_| {}), &created, &world(Some(child("j1", |_| {})), vec![std::sync::Arc::new(pod)]), at(40));
    assert_eq!(after, created, "every difference is a write");
}

#[test]
fn a_job_that_fits_no_gpu_of_its_class_gets_no_pod_and_the_numbers() {
    let spec = |gpu: serde_json::Value| job(|job| job["spec"]["scheduling"] = json!({"gpu": gpu}));
    let (intent, after) = step(&spec(json!({"minMemoryMiB": 4000})), &FineTuneJobStatus::default(), &World::default(), at(1));
    assert_eq!((intent, told(&after, C::Validated), after.phase), (Intent::Rest, Some(("False", "GPUTooSmall")), Some(Phase::Failed)));
    assert_eq!(told(&after, C::Stalled), Some(("True", "GPUTooSmall")));
    let message = &super::conditions::find(&after.conditions, C::Validated).unwrap().message;
    assert!(message.contains("GiB and the budget is 3.91 GiB"), "{message}");
    let failure = after.failure.as_ref().unwrap();
    assert_eq!((failure.reason, &failure.message, failure.attempt), (Reason::GPUTooSmall, message, None), "'kubectl get' shows it");
    let (_, mended) = step(&spec(json!({"minMemoryMiB": 15000})), &after, &World::default(), at(2));
    assert_eq!((told(&mended, C::Validated), mended.failure.as_ref()), (Some(("True", "SpecAccepted")), None), "as with other settings of the operator");
    let (intent, after) = step(&spec(json!({"minMemoryMiB": 20_000})), &FineTuneJobStatus::default(), &World::default(), at(1));
    assert_eq!((intent, told(&after, C::Validated)), (Intent::Rest, Some(("False", "InvalidSpec"))), "more than the most");
    assert_eq!(after.failure.map(|failure| failure.reason), Some(Reason::InvalidConfig));
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

/// The pod, deleted at `asked` with 120 s to end.
fn deleted(pod: &std::sync::Arc<k8s_openapi::api::core::v1::Pod>, asked: i64) -> std::sync::Arc<k8s_openapi::api::core::v1::Pod> {
    let mut pod = (**pod).clone();
    pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(asked + 120)));
    pod.metadata.deletion_grace_period_seconds = Some(120);
    std::sync::Arc::new(pod)
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
fn after_a_free_end_the_next_pod_does_not_wait_and_nothing_flickers() {
    let seen = world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &disrupted(5, 100))]);
    let (intent, ended) = step(&job(|_| {}), &training(), &seen, at(101));
    assert_eq!(intent, Intent::Keep, "its end is written first");
    let (intent, stopping) = step(&job(|_| {}), &ended, &seen, at(101));
    assert_eq!(intent, Intent::Delete { uid: "j1".into(), resource_version: "7".into(), why: Stop::Renewal });
    assert_eq!(stopping, ended, "nothing more is to be told");
    let deleting = child("j1", |job| job["metadata"]["deletionTimestamp"] = json!(at(101).to_string()));
    let (intent, stopping) = step(&job(|_| {}), &ended, &world(Some(deleting), vec![]), at(102));
    assert_eq!((intent, &stopping), (Intent::Wait(Wait::JobDeleting), &ended));
    let (intent, stopping) = step(&job(|_| {}), &ended, &World::default(), at(103));
    assert_eq!(intent, Intent::Create { failed_before: 0, active_before: 98 }, "activeDeadlineSeconds goes on");
    assert_eq!(stopping, ended);
    assert_eq!((ended.reason.as_deref(), told(&ended, C::JobCreated)), (Some("Restarting"), Some(("True", "Created"))));
    let message = |status: &FineTuneJobStatus| super::conditions::find(&status.conditions, C::Running).unwrap().message.clone();
    assert!(message(&ended).ends_with("the next one follows at once"), "{}", message(&ended));

    // A queued Job would lose its quota, and a failure is waited for: when the next pod comes is told.
    let queued = job(|job| job["spec"]["queueName"] = json!("team-a"));
    let (_, ended) = step(&queued, &training(), &World { kueue_installed: true, ..seen }, at(101));
    assert!(message(&ended).ends_with("the Job controller starts the next one at 2026-08-24T10:01:50Z"), "{}", message(&ended));
    let twice = vec![pod("p1", "j1", &terminated(5, 50, 1, "Error", "")), pod("p2", "j1", &terminated(60, 100, 69, "Error", ""))];
    let (intent, failed) = step(&job(|_| {}), &training(), &world(Some(child("j1", |_| {})), twice), at(101));
    assert_eq!(intent, Intent::Keep);
    assert_eq!(message(&failed), "the last pod failed (StorageUnavailable); the Job controller starts the next one at 2026-08-24T10:02:00Z");
}

#[test]
fn an_attempt_whose_successor_had_taken_over_is_reported_as_superseded() {
    let words = json!({"stage": "Finished", "result": {"failure": {"reason": "Superseded", "exitCode": 75, "message": "superseded by attempt 2"}}}).to_string();
    let seen = world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &terminated(5, 100, 75, "Error", &words))]);
    let attempts = Attempts::update(&job(|_| {}), &training(), &seen, at(101));
    let (_, after) = step(&job(|_| {}), &training(), &seen, at(101));
    let events = super::transitions::events(&training(), &after, &attempts.ended_now, ResumePolicy::Auto);
    assert_eq!(
        events.iter().map(|event| event.reason.as_str()).filter(|reason| ["Superseded", "Interrupted"].contains(reason)).collect::<Vec<_>>(),
        ["Superseded"]
    );
    let measures = super::transitions::measures(&training(), &after, &attempts.ended_now, None, at(101));
    assert_eq!(measures, [super::transitions::Measure::Restarted("Superseded")]);
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
        let events = super::transitions::events(&before, &after, &attempts.ended_now, spec.spec.resume.policy);
        events.into_iter().find(|event| event.reason == "Disrupted").unwrap().note.unwrap()
    };
    assert!(ended("Auto", true).ends_with("continues from the newest checkpoint"));
    assert!(ended("Auto", false).ends_with("starts from the beginning"));
    assert!(ended("Never", true).ends_with("starts from the beginning, as resume.policy: Never says"));
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

#[test]
fn a_spec_that_kubernetes_refuses_is_invalid_and_stalled_until_it_no_longer_is() {
    let message = "Job.batch \"corgi-train\" is invalid: spec.template.labels: Invalid value: \"not valid!\"";
    let invalid = Outcome::Invalid { message: message.into() };
    let (intent, after) = step_with(&job(|_| {}), &FineTuneJobStatus::default(), &World::default(), &invalid, at(1));
    assert!(matches!(intent, Intent::Create { .. }));
    assert_eq!((told(&after, C::Validated), told(&after, C::Stalled)), (Some(("False", "InvalidSpec")), Some(("True", "InvalidSpec"))));
    assert_eq!((told(&after, C::Failed), after.phase, after.reason.as_deref()), (Some(("True", "InvalidConfig")), Some(Phase::Failed), Some("InvalidConfig")));
    assert_eq!((told(&after, C::Running), told(&after, C::Admitted), after.completion_time.clone()), (None, None, None), "nothing has been tried");
    assert!(after.failure.as_ref().is_some_and(|failure| failure.message.contains("not valid!")), "{:?}", after.failure);
    let events = super::transitions::events(&FineTuneJobStatus::default(), &after, &[], ResumePolicy::Auto);
    assert_eq!(events.iter().map(|event| event.reason.as_str()).collect::<Vec<_>>(), ["InvalidSpec"], "said once");
    assert_eq!(super::transitions::measures(&FineTuneJobStatus::default(), &after, &[], None, at(1)), [], "it has not ended");
    let (intent, created) = step(&job(|_| {}), &after, &world(Some(child("j1", |_| {})), vec![]), at(700));
    assert_eq!((intent, told(&created, C::Failed), told(&created, C::Validated)), (Intent::Keep, None, Some(("True", "SpecAccepted"))));
}

#[test]
fn a_job_with_the_output_of_another_is_warned_and_made_all_the_same() {
    let shared = World { shared_output: Some("FineTuneJob \"team-a/other\" (s3://team-a/loras/corgi/)".into()), ..World::default() };
    let (intent, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &shared, at(1));
    assert!(matches!(intent, Intent::Create { .. }), "{intent:?}");
    assert_eq!(told(&after, C::Validated), Some(("True", "OutputShared")));
    let events = super::transitions::events(&FineTuneJobStatus::default(), &after, &[], ResumePolicy::Auto);
    assert!(events.iter().any(|event| event.reason == "OutputShared" && event.note.as_ref().is_some_and(|note| note.contains("team-a/other"))));
    assert_eq!(told(&step(&job(|_| {}), &after, &World::default(), at(2)).1, C::Validated), Some(("True", "SpecAccepted")), "the other has ended");
}

#[test]
fn a_job_changed_by_hand_is_put_back_or_explained() {
    let parallel = child("j1", |job| job["spec"]["parallelism"] = json!(0));
    let (intent, _) = step(&job(|_| {}), &FineTuneJobStatus::default(), &world(Some(parallel), vec![]), at(50));
    assert!(matches!(intent, Intent::Adjust { patch: JobPatch { parallelism: Some(1), .. }, .. }), "{intent:?}");
    let held = child("j1", |job| job["spec"]["suspend"] = json!(true));
    let (intent, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &world(Some(held), vec![]), at(50));
    assert_eq!((intent, told(&after, C::Admitted)), (Intent::Keep, Some(("False", "JobSuspended"))));
    let message = &super::conditions::find(&after.conditions, C::Admitted).unwrap().message;
    assert!(message.contains("kubectl patch job corgi-train"), "{message}");
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

#[test]
fn a_config_map_that_somebody_has_deleted_is_made_again() {
    let validated = super::fixtures::validated(|_| {});
    let waits_for = |name: &str| {
        let note = format!("MountVolume.SetUp failed for volume \"config\" : configmap \"{name}\" not found");
        let seen = World {
            warning: Some(Warning { reason: "FailedMount".into(), note }),
            ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &waiting("ContainerCreating", ""))])
        };
        step(&job(|_| {}), &FineTuneJobStatus::default(), &seen, at(60)).0
    };
    assert_eq!(waits_for(&validated.config_map_name), Intent::RestoreConfig);
    assert!(matches!(waits_for("corgi-config-00000000"), Intent::Delete { why: Stop::Renewal, .. }), "of another version of the operator");
    assert_eq!(waits_for("somebody-elses"), Intent::Keep);
}
