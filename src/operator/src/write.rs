//! The last step: writes the status, then tells of its change by metrics and events.

use std::time::Duration;

use jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use super::attempts::Attempts;
use super::error::{Error, Operation};
use super::reconcile::Scope;
use super::status;
use super::transitions::{self, Measure};
use finetune_api::{API_VERSION, FIELD_MANAGER, FineTuneJob, FineTuneJobStatus, KIND};

/// Writes the status where it differs: at once if it tells a step of the job's life, else when the interval is over. Returns how long to wait for that.
pub async fn write(
    job: &FineTuneJob,
    before: &FineTuneJobStatus,
    after: &FineTuneJobStatus,
    attempts: &Attempts,
    now: Timestamp,
    scope: &Scope,
) -> Result<Option<Duration>, Error> {
    let ctx = &scope.ctx;
    if before == after {
        return Ok(None);
    }
    let uid = job.uid().unwrap_or_default();
    let interval = ctx.settings.progress_interval;
    if !status::lifecycle_differs(before, after)
        && let Some(left) = ctx.since_write(&uid).and_then(|since| interval.checked_sub(since)).filter(|left| !left.is_zero())
    {
        return Ok(Some(left));
    }
    let jobs: Api<FineTuneJob> = Api::namespaced(ctx.client.clone(), job.metadata.namespace.as_deref().unwrap_or_default());
    let name = job.name_any();
    // The UID makes the API server refuse a successor of the same name. The whole of the status is sent each time: what is left out is removed.
    let patch = json!({ "apiVersion": API_VERSION, "kind": KIND, "metadata": { "name": name, "uid": uid }, "status": after });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let written = match ctx.call(Operation::WriteStatus, jobs.patch_status(&name, &params, &Patch::Apply(&patch))).await {
        Ok(written) => written,
        // Deleted meanwhile, or another of that name.
        Err(error) if error.is_not_found() || error.is_conflict() => return Ok(None),
        Err(error) => return Err(error),
    };
    // benches/operator reads it: from here on whoever asks the API server is told.
    tracing::debug!(started = after.attempts.map_or(0, |attempts| attempts.started), phase = ?after.phase, "status written");
    ctx.metrics.status_patched();
    ctx.remember_status(&written);
    for measure in transitions::measures(before, after, &attempts.ended_now, job.creation_timestamp().map(|time| time.0), now) {
        match measure {
            Measure::Ended { result, reason, duration } => ctx.metrics.job_ended(result, &reason, duration),
            Measure::Admitted(waited) => ctx.metrics.job_admitted(waited),
            Measure::Started(waited) => ctx.metrics.job_started(waited),
            Measure::Restarted(cause) => ctx.metrics.job_restarted(cause),
        }
    }
    let reference = job.object_ref(&());
    for event in transitions::events(before, after, &attempts.ended_now) {
        tracing::info!(reason = %event.reason, note = event.note.as_deref().unwrap_or_default(), "job changed");
        scope.events.publish(event, &reference);
    }
    Ok(None)
}
