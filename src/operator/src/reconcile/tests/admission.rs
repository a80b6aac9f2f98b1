//! Specs that are refused or have to wait, before anything runs.

use serde_json::json;

use super::world;
use crate::fixtures::{at, child, job, step, step_with, told};
use crate::reconcile::decide::{Intent, Wait};
use crate::reconcile::status::Outcome;
use crate::reconcile::world::World;
use finetune_api::{ConditionType as C, FineTuneJobStatus, JobCreatedReason, Phase, Reason, ResumePolicy};

#[test]
fn a_first_reconciliation_that_fails_leaves_a_condition() {
    let refused = Outcome::NotCreated { reason: JobCreatedReason::QuotaExceeded, message: "exceeded quota: q".into() };
    let (_, after) = step_with(&job(|_| {}), &FineTuneJobStatus::default(), &World::default(), &refused, at(1));
    assert_eq!(told(&after, C::JobCreated), Some(("False", "QuotaExceeded")));
    assert_eq!(told(&after, C::Reconciling), Some(("True", "Progressing")));
    assert_eq!((after.observed_generation, after.phase), (Some(1), Some(Phase::Pending)));
}

#[test]
fn a_queued_job_is_not_created_without_kueue() {
    let spec = job(|job| job["spec"]["queueName"] = json!("team-a"));
    let (intent, after) = step(&spec, &FineTuneJobStatus::default(), &World::default(), at(1));
    assert_eq!(intent, Intent::Wait(Wait::Kueue));
    assert_eq!((told(&after, C::Admitted), after.phase), (Some(("False", "KueueNotInstalled")), Some(Phase::Queued)));
    let with = World { kueue_installed: true, ..World::default() };
    assert_eq!(step(&spec, &after, &with, at(2)).0, Intent::Create { failed_before: 0, active_before: 0 });
}

#[test]
fn a_job_that_fits_no_gpu_of_its_class_gets_no_pod_and_the_numbers() {
    let spec = |gpu: serde_json::Value| job(|job| job["spec"]["scheduling"] = json!({"gpu": gpu}));
    let (intent, after) = step(&spec(json!({"minMemoryMiB": 4000})), &FineTuneJobStatus::default(), &World::default(), at(1));
    assert_eq!((intent, told(&after, C::Validated), after.phase), (Intent::Rest, Some(("False", "GPUTooSmall")), Some(Phase::Failed)));
    assert_eq!(told(&after, C::Stalled), Some(("True", "GPUTooSmall")));
    let message = &crate::reconcile::conditions::find(&after.conditions, C::Validated).unwrap().message;
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
fn a_spec_that_kubernetes_refuses_is_invalid_and_stalled_until_it_no_longer_is() {
    let message = "Job.batch \"corgi-train\" is invalid: spec.template.labels: Invalid value: \"not valid!\"";
    let invalid = Outcome::Invalid { message: message.into() };
    let (intent, after) = step_with(&job(|_| {}), &FineTuneJobStatus::default(), &World::default(), &invalid, at(1));
    assert!(matches!(intent, Intent::Create { .. }));
    assert_eq!((told(&after, C::Validated), told(&after, C::Stalled)), (Some(("False", "InvalidSpec")), Some(("True", "InvalidSpec"))));
    assert_eq!((told(&after, C::Failed), after.phase, after.reason.as_deref()), (Some(("True", "InvalidConfig")), Some(Phase::Failed), Some("InvalidConfig")));
    assert_eq!((told(&after, C::Running), told(&after, C::Admitted), after.completion_time.clone()), (None, None, None), "nothing has been tried");
    assert!(after.failure.as_ref().is_some_and(|failure| failure.message.contains("not valid!")), "{:?}", after.failure);
    let events = crate::reconcile::transitions::events(&FineTuneJobStatus::default(), &after, &[], ResumePolicy::Auto);
    assert_eq!(events.iter().map(|event| event.reason.as_str()).collect::<Vec<_>>(), ["InvalidSpec"], "said once");
    assert_eq!(crate::reconcile::transitions::measures(&FineTuneJobStatus::default(), &after, &[], None, at(1)), [], "it has not ended");
    let (intent, created) = step(&job(|_| {}), &after, &world(Some(child("j1", |_| {})), vec![]), at(700));
    assert_eq!((intent, told(&created, C::Failed), told(&created, C::Validated)), (Intent::Keep, None, Some(("True", "SpecAccepted"))));
}

#[test]
fn a_job_with_the_output_of_another_is_warned_and_made_all_the_same() {
    let shared = World { shared_output: Some("FineTuneJob \"team-a/other\" (s3://team-a/loras/corgi/)".into()), ..World::default() };
    let (intent, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &shared, at(1));
    assert!(matches!(intent, Intent::Create { .. }), "{intent:?}");
    assert_eq!(told(&after, C::Validated), Some(("True", "OutputShared")));
    let events = crate::reconcile::transitions::events(&FineTuneJobStatus::default(), &after, &[], ResumePolicy::Auto);
    assert!(events.iter().any(|event| event.reason == "OutputShared" && event.note.as_ref().is_some_and(|note| note.contains("team-a/other"))));
    assert_eq!(told(&step(&job(|_| {}), &after, &World::default(), at(2)).1, C::Validated), Some(("True", "SpecAccepted")), "the other has ended");
}
