//! How a job ends, and that it stays ended.

use serde_json::json;

use super::{training, world};
use crate::fixtures::{at, child, ended, job, pod, running, step, terminated, told};
use crate::reconcile::decide::Intent;
use crate::reconcile::status::lifecycle_differs;
use crate::reconcile::world::World;
use finetune_api::{AttemptCause, ConditionType as C, FineTuneJobStatus, Phase, Reason};

#[test]
fn a_finished_job_is_never_started_again() {
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
fn only_the_jobs_final_conditions_end_it() {
    let counting =
        child("j1", |job| job["status"] = json!({"failed": 3, "conditions": [{"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy"}]}));
    let (intent, after) = step(&job(|_| {}), &training(), &world(Some(counting), vec![pod("p1", "j1", &running(5))]), at(50));
    assert_eq!(intent, Intent::Keep);
    assert_eq!((told(&after, C::Failed), told(&after, C::Complete)), (None, None));
    let met = child("j1", |job| job["status"] = ended("SuccessCriteriaMet", "CompletionsReached", ""));
    assert_eq!(told(&step(&job(|_| {}), &training(), &world(Some(met), vec![]), at(50)).1, C::Complete), None);
}

#[test]
fn a_pod_that_vanishes_with_its_success_has_been_heard() {
    let words = json!({
        "stage": "Finished", "step": 100, "totalSteps": 100, "result": {},
        "artifacts": [{"format": "Diffusers", "uri": "s3://b/x.safetensors", "sha256": format!("sha256:{}", "a1".repeat(32)), "sizeBytes": 1}],
    });
    let succeeded = pod("p1", "j1", &terminated(5, 90, 0, "Completed", &words.to_string()));
    let (_, waiting) = step(&job(|_| {}), &training(), &world(Some(child("j1", |_| {})), vec![succeeded.clone()]), at(91));
    assert_eq!(waiting.attempt_history[0].cause, None, "its Job shows it in a moment, in one write");

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
    let message = &crate::reconcile::conditions::find(&unheard.conditions, C::Complete).unwrap().message;
    assert!(message.contains("result.json"), "{message}");
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
