//! The condition `Admitted`: what the queue says about the Job.

use jiff::{SignedDuration, Timestamp};

use super::Inputs;
use crate::reconcile::conditions::{self, Builder, Truth};
use crate::reconcile::decide::{Intent, Wait};
use crate::reconcile::world::World;
use finetune_api::{AdmittedReason, ConditionType};

/// How long Kueue may take to make a Workload before its absence needs an explanation.
const WORKLOAD_WAIT: SignedDuration = SignedDuration::from_secs(30);

/// From when on the status reports that Kueue has made no Workload; `None` where there is one, or where nothing is held.
pub(crate) fn workload_due(world: &World) -> Option<Timestamp> {
    if !is_held(world) || world.workload.is_some() {
        return None;
    }
    world.job.as_ref()?.metadata.creation_timestamp.as_ref()?.0.checked_add(WORKLOAD_WAIT).ok()
}

/// Whether the Job is suspended.
fn is_held(world: &World) -> bool {
    world.job.as_ref().is_some_and(|job| job.spec.as_ref().is_some_and(|spec| spec.suspend == Some(true)))
}

pub(super) fn admitted(list: &mut Builder<'_>, inputs: &Inputs<'_>) {
    let Inputs { job, world, intent, .. } = *inputs;
    if job.spec.queue_name.is_none() {
        without_queue(list, world);
    } else if matches!(intent, Intent::Wait(Wait::Kueue)) {
        set(list, false, AdmittedReason::KueueNotInstalled, "spec.queueName is set, but the cluster has no Kueue; install it, or leave queueName out");
    } else if world.job.is_some() {
        queued(list, inputs);
    }
}

fn set(list: &mut Builder<'_>, admitted: bool, reason: AdmittedReason, message: &str) {
    list.set(ConditionType::Admitted, Truth::from(admitted), reason.as_str(), message);
}

fn without_queue(list: &mut Builder<'_>, world: &World) {
    match &world.workload {
        _ if !is_held(world) => set(list, true, AdmittedReason::NoQueue, "no queue is asked for"),
        Some(workload) if !workload.admitted => set(list, false, workload.reason, &workload.message),
        None if !world.kueue_installed => {
            let name = world.job.as_ref().and_then(|job| job.metadata.name.as_deref()).unwrap_or_default();
            let text = format!(
                "somebody has suspended the Job: kubectl patch job {name} --type merge -p '{{\"spec\":{{\"suspend\":false}}}}' lets it go on. To pause a job, set spec.suspend of the FineTuneJob"
            );
            set(list, false, AdmittedReason::JobSuspended, &text);
        }
        _ => set(
            list,
            false,
            AdmittedReason::NoQueueName,
            "the Job is held, though no queue is asked for: this cluster's Kueue manages Jobs without a queue; set spec.queueName",
        ),
    }
}

/// A Job with a queue. Whether it is held is Kueue's own word, and newer than what is known of the Workload where the API server was away.
fn queued(list: &mut Builder<'_>, inputs: &Inputs<'_>) {
    const TAKEN_BACK: [AdmittedReason; 3] = [AdmittedReason::Evicted, AdmittedReason::Preempted, AdmittedReason::WorkloadDeactivated];
    let Inputs { job, before, world, now, .. } = *inputs;
    match &world.workload {
        Some(workload) if workload.admitted || is_held(world) || TAKEN_BACK.contains(&workload.reason) => {
            set(list, workload.admitted, workload.reason, &workload.message);
        }
        _ if !is_held(world) => {
            if conditions::is_true(&before.conditions, ConditionType::Admitted) {
                list.keep(ConditionType::Admitted);
            } else {
                set(list, true, AdmittedReason::QuotaReserved, "the queue does not hold the Job");
            }
        }
        _ if !world.kueue_installed => {
            set(list, false, AdmittedReason::KueueNotInstalled, "the Job is held for Kueue, which the cluster does not have any more; install it again");
        }
        _ if workload_due(world).is_some_and(|due| now >= due) => {
            let class = match &job.spec.workload_priority_class_name {
                Some(class) => format!("the WorkloadPriorityClass {class:?} exists (kubectl get workloadpriorityclasses)"),
                None => "its controller runs (kubectl get pods -n kueue-system)".to_owned(),
            };
            let message = format!("Kueue has made no Workload for the Job: see whether {class}, and whether Kueue manages batch/job in this namespace");
            set(list, false, AdmittedReason::NoWorkload, &message);
        }
        _ => set(list, false, AdmittedReason::WaitingForQuota, "waits for Kueue"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fixtures::{at, child, job, step};
    use crate::reconcile::kueue::Workload;
    use finetune_api::FineTuneJobStatus;

    /// A world with a Job, held or not, whose Workload says this.
    fn world(held: bool, workload: Option<(bool, AdmittedReason)>) -> World {
        let child = child("j1", |value| {
            value["spec"]["suspend"] = json!(held);
            value["metadata"]["creationTimestamp"] = json!(at(1).to_string());
        });
        let workload = workload.map(|(admitted, reason)| Workload {
            name: "w".into(),
            job_uid: "j1".into(),
            admitted,
            reason,
            message: format!("{reason:?} of w"),
            cluster: None,
        });
        World { job: Some(child), workload, kueue_installed: true, ..World::default() }
    }

    /// `seconds` after its creation: the status of a job with a queue, and of `Admitted` the status, reason and message.
    fn after(before: &FineTuneJobStatus, world: &World, seconds: i64) -> (FineTuneJobStatus, String) {
        let job = job(|value| {
            value["spec"]["queueName"] = json!("q");
            value["spec"]["workloadPriorityClassName"] = json!("hgih");
        });
        let (_, after) = step(&job, before, world, at(seconds));
        let condition = conditions::find(&after.conditions, ConditionType::Admitted).unwrap();
        let text = format!("{} {} {}", condition.status, condition.reason, condition.message);
        (after, text)
    }

    #[test]
    fn what_is_unknown_of_a_workload_takes_no_admission_back() {
        let (running, told) = after(&FineTuneJobStatus::default(), &world(false, Some((true, AdmittedReason::QuotaReserved))), 5);
        assert_eq!(told, "True QuotaReserved QuotaReserved of w");
        // The API server was away: nothing is known of the Workload, or something old.
        for lost in [None, Some((false, AdmittedReason::WaitingForQuota)), Some((false, AdmittedReason::AdmissionCheckPending))] {
            let mut lost = world(false, lost);
            for installed in [true, false] {
                lost.kueue_installed = installed;
                let (later, text) = after(&running, &lost, 60);
                assert_eq!((&later.conditions, &text), (&running.conditions, &told));
            }
        }
        // What Kueue takes back shows, also while it has not suspended the Job yet.
        for reason in [AdmittedReason::Preempted, AdmittedReason::Evicted, AdmittedReason::WorkloadDeactivated] {
            let (_, text) = after(&running, &world(false, Some((false, reason))), 60);
            assert_eq!(text, format!("False {reason:?} {reason:?} of w"));
        }
        // A Job that is free though its Workload was never seen.
        assert!(after(&FineTuneJobStatus::default(), &world(false, None), 5).1.starts_with("True QuotaReserved"));
    }

    #[test]
    fn a_job_without_a_workload_says_so_in_time() {
        let held = world(true, None);
        assert_eq!(after(&FineTuneJobStatus::default(), &held, 30).1, "False WaitingForQuota waits for Kueue");
        let told = after(&FineTuneJobStatus::default(), &held, 31).1;
        assert!(told.starts_with("False NoWorkload") && told.contains("WorkloadPriorityClass \"hgih\" exists"), "{told}");
        assert_eq!(workload_due(&held), Some(at(31)));
        assert_eq!(workload_due(&world(false, None)), None);
        assert_eq!(workload_due(&world(true, Some((false, AdmittedReason::WaitingForQuota)))), None);
        let gone = World { kueue_installed: false, ..held };
        assert!(after(&FineTuneJobStatus::default(), &gone, 5).1.starts_with("False KueueNotInstalled"));
    }
}
