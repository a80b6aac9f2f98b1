//! The last step: writes the status, then reports its change by metrics and events.

use std::time::Duration;

use jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::events::{Event, EventType};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use crate::controller::context::Context;
use crate::error::{Error, Operation};
use crate::reconcile::Scope;
use crate::reconcile::attempts::Attempts;
use crate::reconcile::status;
use crate::reconcile::transitions::{self, Measure};
use finetune_api::{API_VERSION, FIELD_MANAGER, FineTuneJob, FineTuneJobStatus, KIND, clean};

/// A change of the status.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// The newest status known.
    pub before: &'a FineTuneJobStatus,
    /// Resource version of the object that has it.
    pub version: Option<&'a str>,
    /// The status after.
    pub after: &'a FineTuneJobStatus,
    /// The attempts behind it.
    pub attempts: &'a Attempts,
}

/// What has come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// The API server has it.
    Known,
    /// Not urgent: to be written in so long.
    Later(Duration),
    /// The object has changed since, or is gone.
    Stale,
}

/// Writes the status where it differs: at once if it shows a step of the job's life, else when the interval is over.
pub async fn write(job: &FineTuneJob, change: &Change<'_>, now: Timestamp, scope: &Scope) -> Result<Written, Error> {
    let Change { before, after, attempts, .. } = *change;
    let ctx = &scope.ctx;
    if before == after {
        return Ok(Written::Known);
    }
    let uid = job.uid().unwrap_or_default();
    let interval = ctx.settings.progress_interval;
    if !status::lifecycle_differs(before, after)
        && let Some(left) = ctx.since_write(&uid).and_then(|since| interval.checked_sub(since)).filter(|left| !left.is_zero())
    {
        return Ok(Written::Later(left));
    }
    let reference = job.object_ref(&());
    let written = match patch(job, change.version, after, ctx).await {
        Err(error) if error.is_invalid() => {
            // What a trainer reports is not ours to guarantee; the rest must be told all the same.
            let told = without_report(before, after);
            if told == *after {
                return Err(error);
            }
            tracing::warn!(error = &error as &dyn std::error::Error, "the API server refuses what the trainer reports");
            let note = clean(&format!("the API server refuses what the trainer reports, which is left out of the status: {}", error.message()), 1000);
            let event = Event { type_: EventType::Warning, reason: "ReportRefused".to_owned(), note: Some(note), action: "Report".to_owned(), secondary: None };
            scope.events.publish(event, &reference);
            patch(job, change.version, &told, ctx).await
        }
        answer => answer,
    };
    let written = match written {
        Ok(written) => written,
        Err(error) if error.is_not_found() || error.is_conflict() => return Ok(Written::Stale),
        Err(error) => return Err(error),
    };
    // benches/operator reads it: readers of the API server see the new status from here on.
    tracing::debug!(started = after.attempts.map_or(0, |attempts| attempts.started), phase = ?after.phase, "status written");
    ctx.metrics.status_patched();
    ctx.remember_status(&written);
    for measure in transitions::measures(before, after, &attempts.ended_now, job.creation_timestamp().map(|time| time.0), now) {
        match measure {
            Measure::Ended { result, reason, duration } => ctx.metrics.job_ended(result, &reason, duration),
            Measure::Admitted(waited) => ctx.metrics.job_admitted(waited),
            Measure::Started(waited) => ctx.metrics.job_started(waited),
            Measure::Restarted(cause) => ctx.metrics.job_restarted(cause),
            Measure::GpuSeconds(seconds) => ctx.metrics.gpu_seconds(&job.namespace().unwrap_or_default(), seconds),
        }
    }
    for event in transitions::events(before, after, &attempts.ended_now, job.spec.resume.policy) {
        tracing::info!(reason = %event.reason, note = event.note.as_deref().unwrap_or_default(), "job changed");
        scope.events.publish(event, &reference);
    }
    Ok(Written::Known)
}

/// The UID makes the API server refuse a successor of the same name, the resource version a write that comes late: one that was decided before another was
/// written. The whole of the status is sent each time: what is left out is removed.
async fn patch(job: &FineTuneJob, version: Option<&str>, status: &FineTuneJobStatus, ctx: &Context) -> Result<FineTuneJob, Error> {
    let jobs: Api<FineTuneJob> = Api::namespaced(ctx.client.clone(), job.metadata.namespace.as_deref().unwrap_or_default());
    let name = job.name_any();
    let metadata = json!({ "name": name, "uid": job.metadata.uid, "resourceVersion": version });
    let patch = json!({ "apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": status });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    ctx.call(Operation::WriteStatus, jobs.patch_status(&name, &params, &Patch::Apply(&patch))).await
}

/// The status with what the trainer reports as it was before.
fn without_report(before: &FineTuneJobStatus, after: &FineTuneJobStatus) -> FineTuneJobStatus {
    FineTuneJobStatus {
        progress: before.progress.clone(),
        last_checkpoint: before.last_checkpoint.clone(),
        artifacts: before.artifacts.clone(),
        dataset_digest: before.dataset_digest.clone(),
        ..after.clone()
    }
}
