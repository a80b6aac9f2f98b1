//! `dereference`: gathers what the cluster holds that concerns a job. Reads caches; asks the API server only where they cannot tell.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;

use crate::controller::caches::Caches;
use crate::controller::context::Context;
use crate::controller::progress::Poller;
use crate::reconcile::conditions;
use crate::reconcile::status::is_unschedulable;
use crate::reconcile::warnings;
use crate::reconcile::world::{self, World};
use crate::settings::Settings;
use finetune_api::{ConditionType, FineTuneJob, FineTuneJobStatus, JOB_UID_LABEL, ValidatedReason};

/// Gathers the world of `job`.
pub async fn dereference(job: &FineTuneJob, before: &FineTuneJobStatus, ctx: &Context, caches: &Caches, poller: &Poller) -> World {
    let (name, namespace, uid) = (job.name_any(), job.namespace().unwrap_or_default(), job.uid().unwrap_or_default());
    let cached = caches.children.get(&ObjectRef::<Job>::new(&finetune_api::job_name(&name)).within(&namespace));
    let child = ctx.newest_job(&uid, cached);
    let (mut pods, strangers): (Vec<_>, Vec<_>) =
        caches.pods_of(&namespace, &name, before).into_iter().partition(|pod| label(pod, JOB_UID_LABEL) == Some(&uid));
    pods.sort_by_key(|pod| (pod.metadata.creation_timestamp.as_ref().map(|time| time.0), pod.metadata.uid.clone()));
    let stranger_pod = strangers.iter().find(|pod| !world::has_ended(pod)).map(|pod| format!("pod {:?}", pod.name_any()));
    let stranger_job =
        child.as_ref().filter(|child| is_leftover(child, &uid)).map(|child| format!("Job {:?} of an earlier FineTuneJob of this name", child.name_any()));
    let mut world = World {
        job: child.filter(|child| is_ours(child, &uid)),
        stranger: stranger_pod.or(stranger_job),
        pods,
        kueue_installed: caches.kueue_installed(),
        ..World::default()
    };
    world.workload = world.job_uid().and_then(|uid| caches.workload(uid));
    let told = conditions::find(&before.conditions, ConditionType::Validated).is_some_and(|told| told.reason == ValidatedReason::OutputShared.as_str());
    if (world.job.is_none() || told) && !conditions::is_terminal(&before.conditions) {
        world.shared_output = shared_output(job, caches, &ctx.settings);
    }
    world.warning = warnings::warning(&uid, &namespace, &world, ctx).await;
    let Some(pod) = world.current_pod() else { return world };
    let report = poller.report(pod.metadata.uid.as_deref().unwrap_or_default());
    let node_matches = if is_unschedulable(pod) { caches.any_node_matches(pod) } else { None };
    World { report, node_matches, ..world }
}

fn label<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.labels.as_ref()?.get(key).map(String::as_str)
}

/// Whether the FineTuneJob with that UID controls the Job.
pub fn is_ours(child: &Job, uid: &str) -> bool {
    controller(child).is_some_and(|owner| owner.uid == uid)
}

/// Whether the Job belongs to an earlier FineTuneJob of this name: the garbage collector will delete it.
pub fn is_leftover(child: &Job, uid: &str) -> bool {
    controller(child).is_some_and(|owner| owner.kind == finetune_api::KIND && owner.uid != uid)
}

/// Another job of the cache that has not ended and writes into the same folder.
fn shared_output(job: &FineTuneJob, caches: &Caches, settings: &Settings) -> Option<String> {
    let shares = |other: &FineTuneJob| {
        let ended = other.status.as_ref().is_some_and(|status| {
            conditions::is_true(&status.conditions, ConditionType::Complete) || conditions::is_true(&status.conditions, ConditionType::Failed)
        });
        other.metadata.uid != job.metadata.uid && !ended && other.metadata.deletion_timestamp.is_none() && overlap(job, other, settings)
    };
    // The first by name: whoever looks again finds the same one.
    let others = caches.jobs.state();
    let others = others.iter().filter_map(|other| other.0.as_ref().ok()).filter(|other| shares(other));
    let found = others.min_by_key(|other| (other.namespace(), other.name_any()))?;
    Some(format!("FineTuneJob {:?} ({})", format!("{}/{}", found.namespace().unwrap_or_default(), found.name_any()), found.spec.output.uri))
}

/// Whether one of the two output folders is the other, or inside it. The same URI at another endpoint is another folder.
fn overlap(one: &FineTuneJob, other: &FineTuneJob, settings: &Settings) -> bool {
    let folder = |job: &FineTuneJob| format!("{}/", job.spec.output.uri.trim_end_matches('/'));
    let (one_folder, other_folder) = (folder(one), folder(other));
    (one_folder.starts_with(&other_folder) || other_folder.starts_with(&one_folder))
        && settings.storage(one.spec.storage.as_ref()).endpoint == settings.storage(other.spec.storage.as_ref()).endpoint
}

fn controller(child: &Job) -> Option<&OwnerReference> {
    child.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fixtures::{job, settings};

    #[test]
    fn output_folders_overlap_where_one_is_or_holds_the_other() {
        let at = |uri: &str, endpoint: Option<&str>| {
            job(|job| {
                job["spec"]["output"]["uri"] = json!(uri);
                if let Some(endpoint) = endpoint {
                    job["spec"]["storage"] = json!({"endpoint": endpoint});
                }
            })
        };
        let cases = [
            ("s3://b/loras/x/", None, "s3://b/loras/x/", None, true),
            ("s3://b/loras/x/", None, "s3://b/loras/", None, true),
            ("s3://b/loras/", None, "s3://b/loras/x/", None, true),
            ("s3://b/loras/x/", None, "s3://b/loras/xy/", None, false),
            ("s3://b/loras/x/", None, "s3://c/loras/x/", None, false),
            ("s3://b/loras/x/", Some("https://other:9000"), "s3://b/loras/x/", None, false),
        ];
        for (one, one_endpoint, other, other_endpoint, want) in cases {
            assert_eq!(overlap(&at(one, one_endpoint), &at(other, other_endpoint), &settings()), want, "{one} {other}");
        }
    }
}
