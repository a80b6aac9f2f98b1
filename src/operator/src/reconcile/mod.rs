//! One reconciliation: a row of steps, one file each; only `dereference`, `apply` and `write` know a client.
//!
//! | step | file | |
//! |---|---|---|
//! | dereference | [`dereference`], [`warnings`] | what the cluster holds, mostly from caches: [`world::World`] |
//! | validate | [`validate`] | the spec becomes a [`validate::ValidatedJob`] with its resolved configuration |
//! | decide | [`attempts`], [`decide`] | what to do: [`decide::Intent`] |
//! | build | [`build`] | the Job |
//! | apply | [`apply`] | carries out the intent |
//! | status | [`status`], [`conditions`], [`transitions`] | the new status; events and metrics of its change |
//! | write | [`write`](mod@write) | writes it where it differs |

pub mod apply;
pub mod attempts;
pub mod build;
pub mod conditions;
pub mod decide;
pub mod dereference;
pub mod kueue;
pub mod nodes;
pub mod status;
#[cfg(test)]
mod tests;
pub mod transitions;
pub mod unreadable;
mod usage;
pub mod validate;
pub mod warnings;
pub mod world;
pub mod write;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt as _;
use tokio::time::Instant;

use self::apply::Applied;
use self::attempts::Attempts;
use self::decide::{Intent, Wait};
use self::status::{Inputs, Outcome};
use self::world::World;
use self::write::{Change, Written};
use crate::controller::caches::{Caches, Guarded};
use crate::controller::context::{BELIEF_ENDS, Context};
use crate::controller::progress::Poller;
use crate::controller::queue::Next;
use crate::error::{Error, Retry};
use crate::telemetry::events::Events;
use finetune_api::{FineTuneJob, FineTuneJobStatus, JobCreatedReason, TtlScope};

/// Pause before another look at caches that were behind, and at a Job that is in the way.
const SOON: Duration = Duration::from_secs(2);
/// Pause before another look at something that a person has to change.
const LATER: Duration = Duration::from_mins(1);

/// Pause before a Job that the API server finds invalid is tried again: another version of Kubernetes may not.
const MUCH_LATER: Duration = Duration::from_mins(10);

/// What one controller (of one namespace, or of all) needs.
#[derive(Debug)]
pub struct Scope {
    /// Shared by the process.
    pub ctx: Arc<Context>,
    /// What is watched.
    pub caches: Caches,
    /// What trainers say.
    pub poller: Arc<Poller>,
    /// Where events go.
    pub events: Events,
    /// Bounds the reconciliations of the process.
    pub permits: Arc<tokio::sync::Semaphore>,
}

/// Reconciles one object. Never runs twice at once for the same one.
pub async fn reconcile(object: &Guarded, scope: &Scope) -> Result<Next, Error> {
    let _permit = scope.permits.acquire().await;
    let started = Instant::now();
    let result = match &object.0 {
        // On the heap: the state of all steps is large.
        Ok(job) => Box::pin(reconcile_job(job, scope)).await,
        Err(invalid) => match unreadable::tell(invalid, scope).await {
            Ok(()) => Err(Error::Unreadable { message: invalid.error.clone() }),
            Err(error) => Err(error),
        },
    };
    scope.ctx.metrics.reconciled(started.elapsed(), result.as_ref().err().map(Error::class));
    if result.is_ok() {
        scope.ctx.backoff.succeeded(&object.uid().unwrap_or_default());
    }
    result
}

/// What follows an error: growing pauses for each object on its own.
pub fn after_error(uid: &str, error: &Error, scope: &Scope) -> Next {
    match error.retry() {
        Retry::AwaitChange => Next::AwaitChange,
        Retry::Backoff => Next::After(scope.ctx.backoff.failed(uid)),
    }
}

// Not "name": in JSON that is the span's own.
#[tracing::instrument(skip_all, fields(namespace = job.namespace(), job = job.name_any(), generation = job.metadata.generation))]
async fn reconcile_job(job: &FineTuneJob, scope: &Scope) -> Result<Next, Error> {
    if job.metadata.deletion_timestamp.is_some() {
        // Owner references do the rest.
        return Ok(Next::AwaitChange);
    }
    let ctx = &scope.ctx;
    let (before, version) = ctx.newest_status(job);
    let mut world = dereference::dereference(job, &before, ctx, &scope.caches, &scope.poller).await;
    let validated = validate::validate(job, &ctx.settings);
    let now = now();
    let attempts = Attempts::update(job, &before, &world, now);
    let intent = decide::decide(job, &before, validated.as_ref().ok(), &world, &attempts, now);
    tracing::debug!(?intent, "decided");
    let applied = Box::pin(apply::apply(job, validated.as_ref().ok(), &intent, &mut world, ctx)).await;
    let (outcome, failed) = match applied {
        Ok(Applied::World(outcome)) => (outcome, None),
        Ok(Applied::Stale) => return Ok(Next::After(SOON)),
        // A first reconciliation that fails must leave a trace, too.
        Err(error) if matches!(intent, Intent::Create { .. }) => {
            let (reason, message) = error.not_created();
            (Outcome::NotCreated { reason, message }, Some(error))
        }
        Err(error) if error.is_conflict() => return Ok(Next::After(SOON)),
        Err(error) => return Err(error),
    };
    let inputs = Inputs { job, before: &before, validated: validated.as_ref(), world: &world, attempts: &attempts, intent: &intent, outcome: &outcome, now };
    let after = status::status(&inputs);
    let change = Change { before: &before, version: version.as_deref(), after: &after, attempts: &attempts };
    let wait = match write::write(job, &change, now, scope).await? {
        Written::Known => None,
        Written::Later(left) => Some(left),
        // Decided by a status that is no longer the newest.
        Written::Stale => return Ok(Next::After(SOON)),
    };
    if let Some(error) = failed {
        return Err(error);
    }
    finish(job, &after, &world, ctx).await?;
    Ok(next(job, &after, &world, &attempts, &intent, &outcome, wait, ctx))
}

/// To the second, as the API server keeps times: else every comparison with what was written would fail.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// What is to be done for a job that has ended, once that is saved.
async fn finish(job: &FineTuneJob, after: &FineTuneJobStatus, world: &World, ctx: &Context) -> Result<(), Error> {
    if !conditions::is_terminal(&after.conditions) {
        return Ok(());
    }
    if let Some(child) = world.job.as_ref().filter(|child| world::job_end(child).is_some()) {
        apply::set_ttl(job, child, ctx).await?;
    }
    if self_deletion(job, after, ctx).is_some_and(|left| left.is_zero()) {
        apply::delete_self(job, ctx).await?;
    }
    Ok(())
}

/// In how long the FineTuneJob itself is to be deleted, if ever.
fn self_deletion(job: &FineTuneJob, after: &FineTuneJobStatus, ctx: &Context) -> Option<Duration> {
    if job.spec.ttl_scope != TtlScope::All || !ctx.settings.allow_ttl_scope_all {
        return None;
    }
    let due = after.completion_time.as_ref()?.0.checked_add(jiff::SignedDuration::from_secs(job.spec.ttl_seconds_after_finished.into())).ok()?;
    Some(Duration::try_from(due.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO))
}

/// When to come back without being asked to by a watch: the earliest of what time alone changes.
#[expect(clippy::too_many_arguments, reason = "every step has a say in when to come back")]
fn next(
    job: &FineTuneJob,
    after: &FineTuneJobStatus,
    world: &World,
    attempts: &Attempts,
    intent: &Intent,
    outcome: &Outcome,
    wait: Option<Duration>,
    ctx: &Context,
) -> Next {
    let until = |time: Timestamp| Duration::try_from(time.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO).max(Duration::from_secs(1));
    let mut pauses: Vec<Duration> = wait.into_iter().collect();
    if conditions::is_terminal(&after.conditions) {
        pauses.extend(self_deletion(job, after, ctx).map(|left| left.max(SOON)));
        return pauses.into_iter().min().map_or(Next::AwaitChange, Next::After);
    }
    match outcome {
        Outcome::NotCreated { reason: JobCreatedReason::NameConflict, .. } => pauses.push(LATER),
        Outcome::NotCreated { .. } => pauses.push(LATER / 2),
        Outcome::Invalid { .. } => pauses.push(MUCH_LATER),
        Outcome::Done => {}
    }
    match intent {
        Intent::Wait(Wait::Ending(_) | Wait::JobDeleting) => pauses.push(LATER),
        // What the API server finds invalid stays so.
        Intent::Create { .. } if matches!(outcome, Outcome::Invalid { .. }) => {}
        Intent::Create { .. } | Intent::Delete { .. } => pauses.push(BELIEF_ENDS),
        _ => {}
    }
    pauses.extend(decide::start_deadline(job, after, attempts).map(until));
    pauses.extend(attempts.spent_at(job).map(until));
    pauses.extend(status::workload_due(world).filter(|due| *due > Timestamp::now()).map(until));
    if let Some(pod) = world.live_pod() {
        if let Some(lost) = status::lost_at(pod) {
            // Once it is known to be lost there is nothing to look at again until something changes.
            if lost > Timestamp::now() {
                pauses.push(until(lost));
            }
        } else if attempts::started_at(pod).is_some() {
            pauses.push(ctx.settings.progress_interval);
        }
    }
    if let Some(subject) = warnings::subject(world) {
        pauses.push(until(warnings::due(&subject, ctx.looked(&job.uid().unwrap_or_default()).as_ref())));
    }
    pauses.into_iter().min().map_or(Next::AwaitChange, |pause| Next::After(pause.mul_f64(1.0 + rand::random::<f64>() * 0.1)))
}
