//! Whole reconciliations without their calls: mistakes that operators of this kind have made, each as a test of the pure steps together.

mod admission;
mod attempts;
mod elsewhere;
mod end;
mod limits;
mod pods;
mod replacement;
mod suspension;
mod usage;
mod writes;

use crate::fixtures::{at, child, job, pod, running, step};
use crate::reconcile::world::{Report, World};
use finetune_api::{FineTuneJobStatus, Progress, Stage};

pub(super) fn world(job: Option<std::sync::Arc<k8s_openapi::api::batch::v1::Job>>, pods: Vec<std::sync::Arc<k8s_openapi::api::core::v1::Pod>>) -> World {
    World { job, pods, ..World::default() }
}

/// The status of a job that trains in pod p1 of Job j1.
pub(super) fn training() -> FineTuneJobStatus {
    let seen = World { report: said(Stage::Training, 10), ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &running(5))]) };
    step(&job(|_| {}), &FineTuneJobStatus::default(), &seen, at(6)).1
}

pub(super) fn said(stage: Stage, step: u64) -> Report {
    Report {
        progress: Some(Progress { stage, step, total_steps: 100, ..Progress::default() }),
        at: Some(at(6)),
        unchanged_since: Some(at(6)),
        failing_since: None,
    }
}

/// The pod, deleted at `asked` with 120 s to end.
pub(super) fn deleted(pod: &std::sync::Arc<k8s_openapi::api::core::v1::Pod>, asked: i64) -> std::sync::Arc<k8s_openapi::api::core::v1::Pod> {
    let mut pod = (**pod).clone();
    pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(asked + 120)));
    pod.metadata.deletion_grace_period_seconds = Some(120);
    std::sync::Arc::new(pod)
}
