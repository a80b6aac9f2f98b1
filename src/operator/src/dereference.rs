//! `dereference`: gathers what the cluster holds that concerns a job. Reads caches; asks the API server only where they cannot tell.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt as _;
use kube::api::Api;
use kube::runtime::reflector::ObjectRef;

use super::caches::Caches;
use super::context::Context;
use super::error::{Error, Operation};
use super::progress::Poller;
use super::status::{is_creating, is_unschedulable};
use super::world::{self, World};
use finetune_api::{FineTuneJob, JOB_UID_LABEL, StorageSpec};

/// Gathers the world of `job`.
pub async fn dereference(job: &FineTuneJob, ctx: &Context, caches: &Caches, poller: &Poller) -> Result<World, Error> {
    let (name, namespace, uid) = (job.name_any(), job.namespace().unwrap_or_default(), job.uid().unwrap_or_default());
    let cached = caches.children.get(&ObjectRef::<Job>::new(&finetune_api::job_name(&name)).within(&namespace));
    let child = ctx.newest_job(&uid, cached);
    let (mut pods, strangers): (Vec<_>, Vec<_>) = caches.pods_of(&namespace, &name).into_iter().partition(|pod| label(pod, JOB_UID_LABEL) == Some(&uid));
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
    let Some(pod) = world.current_pod() else { return Ok(world) };
    let report = poller.report(pod.metadata.uid.as_deref().unwrap_or_default());
    let node_matches = if is_unschedulable(pod) { caches.any_node_matches(pod) } else { None };
    let missing_config_map = if is_creating(pod) { missing_config_map(job, ctx, &namespace).await? } else { None };
    Ok(World { report, node_matches, missing_config_map, ..world })
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

/// A ConfigMap with certificates that the pod mounts and that does not exist: the kubelet tells that in events only.
async fn missing_config_map(job: &FineTuneJob, ctx: &Context, namespace: &str) -> Result<Option<String>, Error> {
    let storage = ctx.settings.storage(job.spec.storage.as_ref());
    let model = job.spec.model.source.object_store.as_ref().and_then(|store| store.storage.as_ref());
    let config_maps: Api<ConfigMap> = Api::namespaced(ctx.client.clone(), namespace);
    let referenced = |storage: &StorageSpec| storage.ca_bundle_config_map_ref.as_ref().map(|reference| reference.name.clone());
    let trusted = ctx.settings.trainer.ca_bundle_config_map_ref.as_ref().map(|reference| reference.name.clone());
    for name in referenced(&storage).into_iter().chain(model.and_then(referenced)).chain(trusted) {
        if ctx.call(Operation::GetConfigMap, config_maps.get_metadata_opt(&name)).await?.is_none() {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn controller(child: &Job) -> Option<&OwnerReference> {
    child.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}
