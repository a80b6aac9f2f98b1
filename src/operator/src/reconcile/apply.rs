//! `apply`: carries out what was decided. The only step that changes objects other than the status.
//!
//! # Guarantees
//! - A Job is created only after the FineTuneJob itself was read from the API server: never after its end, its suspension or its deletion, whatever
//!   the caches say.
//! - Names are deterministic, so that a creation whose answer was lost is found again; an object of that name with another owner is never touched.
//! - A Job is deleted only as it was seen: UID and resource version are preconditions.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::json;

use crate::controller::context::Context;
use crate::error::{Error, Operation};
use crate::reconcile::build::{self, JobInputs};
use crate::reconcile::conditions;
use crate::reconcile::decide::{self, Intent, JobPatch};
use crate::reconcile::dereference::{is_leftover, is_ours};
use crate::reconcile::status::Outcome;
use crate::reconcile::validate::ValidatedJob;
use crate::reconcile::world::{self, World};
use finetune_api::plan::CONFIG_VERSION;
use finetune_api::{FIELD_MANAGER, FineTuneJob, JOB_UID_LABEL, JobCreatedReason};

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub enum Applied {
    /// The world is as it was, or as given.
    World(Outcome),
    /// The caches were behind: what was decided does not hold. They will catch up.
    Stale,
}

/// Carries out `intent`; enters what it has created into `world`.
pub async fn apply(job: &FineTuneJob, validated: Option<&ValidatedJob>, intent: &Intent, world: &mut World, ctx: &Context) -> Result<Applied, Error> {
    let done = Ok(Applied::World(Outcome::Done));
    match (intent, validated) {
        (Intent::Create { failed_before, active_before }, Some(validated)) => create(job, validated, (*failed_before, *active_before), world, ctx).await,
        (Intent::Adjust { uid, patch }, _) => {
            adjust(job, uid, *patch, ctx).await?;
            done
        }
        (Intent::Delete { uid, resource_version, .. }, _) => {
            delete(job, uid, resource_version, ctx).await?;
            done
        }
        (Intent::Create { .. } | Intent::Rest | Intent::Keep | Intent::Wait(_) | Intent::Fail { .. }, _) => done,
    }
}

async fn create(
    job: &FineTuneJob,
    validated: &ValidatedJob,
    (failed_before, active_before): (u32, i64),
    world: &mut World,
    ctx: &Context,
) -> Result<Applied, Error> {
    let live_jobs: Api<FineTuneJob> = Api::namespaced(ctx.client.clone(), &validated.namespace);
    let Some(live) = ctx.call(Operation::GetLive, live_jobs.get_opt(&validated.name)).await? else { return Ok(Applied::Stale) };
    let status = live.status.clone().unwrap_or_default();
    let another = live.metadata.uid != job.metadata.uid || live.metadata.deletion_timestamp.is_some();
    if another || conditions::is_terminal(&status.conditions) || live.spec.suspend || live.metadata.generation != job.metadata.generation {
        return Ok(Applied::Stale);
    }
    // A job that had a Job before may have a pod that the cache does not show (yet, or any more).
    if status.job_ref.is_some() && has_live_pod(validated, ctx).await? {
        return Ok(Applied::Stale);
    }
    // What the job started with, unless it was given another image since, or that one may not be able to read what this operator writes.
    let kept = status.trainer_image_from.as_ref().is_none_or(|from| *from == validated.spec.image) && status.config_version == Some(CONFIG_VERSION);
    let image = [status.trainer_image.as_deref().filter(|_| kept).unwrap_or_default(), &validated.spec.image]
        .into_iter()
        .find(|image| !image.is_empty())
        .unwrap_or(&ctx.settings.trainer_image);
    let inputs = JobInputs {
        image: image.to_owned(),
        failed_before,
        backoff_limit: decide::backoff_limit(job, failed_before),
        active_before,
        active_deadline: decide::active_deadline(job, active_before),
    };
    create_job(validated, &inputs, world, ctx).await
}

async fn has_live_pod(validated: &ValidatedJob, ctx: &Context) -> Result<bool, Error> {
    let pods: Api<Pod> = Api::namespaced(ctx.client.clone(), &validated.namespace);
    let ours = ListParams::default().labels(&format!("{JOB_UID_LABEL}={}", validated.uid));
    Ok(ctx.call(Operation::ListPods, pods.list(&ours)).await?.items.iter().any(|pod| !world::has_ended(pod)))
}

async fn create_job(validated: &ValidatedJob, inputs: &JobInputs, world: &mut World, ctx: &Context) -> Result<Applied, Error> {
    let jobs: Api<Job> = Api::namespaced(ctx.client.clone(), &validated.namespace);
    let created = match ctx.call(Operation::CreateJob, jobs.create(&post(), &build::job(validated, &ctx.settings, inputs))).await {
        Ok(created) => created,
        // Ours, if the answer to an earlier creation was lost, or the cache is behind; the owner's UID decides.
        Err(error) if error.is_already_exists() => {
            let Some(existing) = ctx.call(Operation::GetJob, jobs.get_opt(&validated.job_name)).await? else { return Ok(Applied::Stale) };
            if is_leftover(&existing, &validated.uid) || (is_ours(&existing, &validated.uid) && world::is_deleting(&existing)) {
                return Ok(Applied::Stale);
            }
            if !is_ours(&existing, &validated.uid) {
                return Ok(Applied::World(conflict(&validated.job_name)));
            }
            existing
        }
        Err(error) => return refused(error).map(Applied::World),
    };
    world.job = Some(ctx.remember_job(&validated.uid, created));
    Ok(Applied::World(Outcome::Done))
}

fn conflict(name: &str) -> Outcome {
    Outcome::NotCreated {
        reason: JobCreatedReason::NameConflict,
        message: format!("Job {name:?} exists and belongs to someone else; it is not touched. Delete it, or create this job under another name"),
    }
}

/// What the API server refuses is shown in the status and tried again later; that it cannot be reached is an error.
fn refused(error: Error) -> Result<Outcome, Error> {
    match error {
        Error::Api { ref source, .. } if matches!(source.as_ref(), kube::Error::Api(status) if (400..500).contains(&status.code) && status.code != 429 && status.code != 404) =>
        {
            if error.is_invalid() {
                return Ok(Outcome::Invalid { message: error.message() });
            }
            let (reason, message) = error.not_created();
            Ok(Outcome::NotCreated { reason, message })
        }
        other => Err(other),
    }
}

async fn adjust(job: &FineTuneJob, uid: &str, patch: JobPatch, ctx: &Context) -> Result<(), Error> {
    let mut spec = serde_json::Map::new();
    if let Some(seconds) = patch.active_deadline_seconds {
        spec.insert("activeDeadlineSeconds".to_owned(), seconds.into());
    }
    if let Some(limit) = patch.backoff_limit {
        spec.insert("backoffLimit".to_owned(), limit.into());
    }
    if let Some(parallelism) = patch.parallelism {
        spec.insert("parallelism".to_owned(), parallelism.into());
    }
    patch_job(job, uid, &json!(spec), Operation::PatchJob, ctx).await
}

/// Sets the time to live of a finished Job: only once its result is in the status, or the Job could be gone before.
pub async fn set_ttl(job: &FineTuneJob, child: &Job, ctx: &Context) -> Result<(), Error> {
    let wanted = job.spec.ttl_seconds_after_finished;
    let uid = child.metadata.uid.clone().unwrap_or_default();
    if world::is_deleting(child) || child.spec.as_ref().and_then(|spec| spec.ttl_seconds_after_finished) == Some(wanted) {
        return Ok(());
    }
    patch_job(job, &uid, &json!({ "ttlSecondsAfterFinished": wanted }), Operation::PatchTtl, ctx).await
}

/// Patches fields of the Job's spec; a Job that is gone needs no patch. The UID in the patch makes the API server refuse a successor.
async fn patch_job(job: &FineTuneJob, uid: &str, spec: &serde_json::Value, operation: Operation, ctx: &Context) -> Result<(), Error> {
    let jobs: Api<Job> = Api::namespaced(ctx.client.clone(), job.metadata.namespace.as_deref().unwrap_or_default());
    let name = finetune_api::job_name(job.metadata.name.as_deref().unwrap_or_default());
    let patch = json!({ "metadata": { "uid": uid }, "spec": spec });
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    match ctx.call(operation, jobs.patch(&name, &params, &Patch::Merge(&patch))).await {
        Ok(patched) => {
            ctx.remember_job(job.metadata.uid.as_deref().unwrap_or_default(), patched);
            Ok(())
        }
        Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Deletes the Job, in the foreground: it stays until its pods have saved their checkpoint and ended.
async fn delete(job: &FineTuneJob, uid: &str, resource_version: &str, ctx: &Context) -> Result<(), Error> {
    let jobs: Api<Job> = Api::namespaced(ctx.client.clone(), job.metadata.namespace.as_deref().unwrap_or_default());
    let name = finetune_api::job_name(job.metadata.name.as_deref().unwrap_or_default());
    let seen = Preconditions { uid: Some(uid.to_owned()), resource_version: Some(resource_version.to_owned()) };
    match ctx.call(Operation::DeleteJob, jobs.delete(&name, &DeleteParams::foreground().preconditions(seen))).await {
        Ok(_) => {
            ctx.forget_job(job.metadata.uid.as_deref().unwrap_or_default());
            Ok(())
        }
        Err(error) if error.is_not_found() => Ok(()),
        // It has changed since it was seen, perhaps ended: the watch reports it, and the decision is made anew.
        Err(error) => Err(error),
    }
}

/// Deletes a finished FineTuneJob (`ttlScope: All`).
pub async fn delete_self(job: &FineTuneJob, ctx: &Context) -> Result<(), Error> {
    let jobs: Api<FineTuneJob> = Api::namespaced(ctx.client.clone(), job.metadata.namespace.as_deref().unwrap_or_default());
    let this = Preconditions { uid: job.metadata.uid.clone(), resource_version: None };
    let params = DeleteParams::background().preconditions(this);
    match ctx.call(Operation::DeleteSelf, jobs.delete(job.metadata.name.as_deref().unwrap_or_default(), &params)).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
        Err(error) => Err(error),
    }
}

fn post() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}
