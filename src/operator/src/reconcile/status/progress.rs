//! Progress, checkpoint, digests and artifacts: from what the trainer reports, over HTTP or in its termination message.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::end::last_words;
use crate::reconcile::attempts::Attempts;
use crate::reconcile::conditions::{self, Builder, Truth};
use crate::reconcile::world::{self, World};
use finetune_api::{
    ArtifactStatus, AttemptCause, CheckpointStatus, CheckpointedReason, ConditionType, FineTuneJobStatus, Progress, ProgressStatus, RunningReason, Stage,
};

/// Enters the newest report into the status.
pub(super) fn report(after: &mut FineTuneJobStatus, world: &World, attempts: &Attempts, now: Timestamp) {
    let (report, at) = match (world.current_pod(), &world.report.progress) {
        (Some(_), Some(progress)) => (progress.clone(), world.report.at.unwrap_or(now)),
        (Some(_), None) => return,
        // Its last words, also while the Job has not drawn the consequence yet.
        (None, _) => {
            let Some(progress) = last_words(world, attempts) else {
                if let Some(progress) = &mut after.progress {
                    at_rest(progress, attempts.history.last().is_some_and(|last| last.cause == Some(AttemptCause::Succeeded)));
                }
                return;
            };
            (progress, now)
        }
    };
    if let Some(digest) = &report.dataset_digest {
        after.dataset_digest = Some(digest.clone());
    }
    if let Some(checkpoint) = &report.last_checkpoint {
        after.last_checkpoint = Some(CheckpointStatus {
            step: checkpoint.step,
            uri: checkpoint.uri.clone(),
            sha256: Some(checkpoint.sha256.clone()),
            time: Some(Time(checkpoint.time)),
        });
    }
    if !report.artifacts.is_empty() {
        let artifacts = report.artifacts.iter().map(|artifact| ArtifactStatus {
            format: artifact.format,
            uri: artifact.uri.clone(),
            sha256: artifact.sha256.clone(),
            size_bytes: artifact.size_bytes,
        });
        after.artifacts = artifacts.collect();
        after.artifacts.sort_by(|a, b| (a.format, &a.uri).cmp(&(b.format, &b.uri)));
    }
    // A trainer that has only started knows no steps; what an earlier attempt had reached stays until then.
    if report.total_steps > 0 {
        let mut new = progress(&report);
        if !matches!(report.stage, Stage::Training | Stage::Publishing) {
            at_rest(&mut new, report.succeeded());
        }
        after.progress = Some(merged(after.progress.as_ref(), new, at));
    }
}

/// Takes out what is true of a running training only; its last loss is that of the LoRA where it has ended well.
fn at_rest(progress: &mut ProgressStatus, succeeded: bool) {
    progress.estimated_completion_time = None;
    progress.steps_per_second = None;
    progress.loss = progress.loss.take().filter(|_| succeeded);
}

/// The new progress; the time of the report is that of the last change.
fn merged(before: Option<&ProgressStatus>, new: ProgressStatus, at: Timestamp) -> ProgressStatus {
    let before_time = before.and_then(|before| before.last_report_time.clone());
    if before.is_some_and(|before| ProgressStatus { last_report_time: None, ..before.clone() } == new) {
        return ProgressStatus { last_report_time: before_time, ..new };
    }
    // To the second, as the API server keeps it.
    let at = Timestamp::from_second(at.as_second()).unwrap_or(at);
    ProgressStatus { last_report_time: Some(Time(at)), ..new }
}

/// Numbers as text, rounded so that they say no more than they know.
fn progress(report: &Progress) -> ProgressStatus {
    let percent = u32::try_from(report.step.saturating_mul(100) / report.total_steps.max(1)).unwrap_or(100).min(100);
    ProgressStatus {
        step: report.step,
        total_steps: report.total_steps,
        epoch: report.epoch.map(|epoch| format!("{epoch:.1}")),
        percent,
        // To the minute: an estimate moves with each step.
        estimated_completion_time: report
            .estimated_completion_time
            .filter(|_| report.result.is_none())
            .and_then(|time| Timestamp::from_second(time.as_second() / 60 * 60).ok())
            .map(Time),
        steps_per_second: report.steps_per_second.map(significant),
        loss: report.loss.map(significant),
        peak_memory_mib: report.memory.and_then(|memory| memory.device_peak_bytes.or(memory.host_peak_bytes)).map(|bytes| bytes / (1 << 20)),
        micro_batch: report.micro_batch,
        recomputed_blocks: report.recomputed_blocks,
        truncated_captions: report.truncated_captions.filter(|captions| *captions > 0),
        summary: format!("{}/{} ({percent}%)", report.step, report.total_steps),
        last_report_time: None,
    }
}

/// Three significant digits, without an exponent where that is short.
fn significant(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs().log10().floor();
    if !(-5.0..6.0).contains(&magnitude) {
        return format!("{value:.2e}");
    }
    let decimals = (2.0 - magnitude).max(0.0) as usize;
    format!("{value:.decimals$}")
}

/// `Checkpointed`.
pub(super) fn checkpointed(list: &mut Builder<'_>, after: &FineTuneJobStatus, world: &World) {
    let error = world.report.progress.as_ref().and_then(|progress| progress.checkpoint_error.as_deref());
    match (error, &after.last_checkpoint) {
        (Some(error), _) => list.set(ConditionType::Checkpointed, Truth::False, CheckpointedReason::UploadFailed.as_str(), error),
        (None, Some(checkpoint)) => {
            list.set(ConditionType::Checkpointed, Truth::True, CheckpointedReason::Saved.as_str(), &format!("step {}", checkpoint.step));
        }
        (None, None) if world.job.as_deref().is_some_and(|child| !world::runs_elsewhere(child)) => {
            list.set(ConditionType::Checkpointed, Truth::False, CheckpointedReason::NoneYet.as_str(), "");
        }
        (None, None) => list.keep(ConditionType::Checkpointed),
    }
}

/// What the trainer's stage means for `Running`.
pub(super) fn running_reason(stage: Stage) -> (Truth, RunningReason) {
    match stage {
        Stage::Starting => (Truth::False, RunningReason::Starting),
        Stage::DownloadingModel => (Truth::False, RunningReason::DownloadingModel),
        Stage::DownloadingDataset => (Truth::False, RunningReason::DownloadingDataset),
        Stage::PreparingData => (Truth::False, RunningReason::PreparingData),
        Stage::RestoringCheckpoint => (Truth::False, RunningReason::RestoringCheckpoint),
        Stage::Training => (Truth::True, RunningReason::Training),
        Stage::Publishing | Stage::Finished => (Truth::False, RunningReason::Publishing),
    }
}

/// Whether the trainer was seen training before.
pub(super) fn was_training(before: &FineTuneJobStatus) -> bool {
    conditions::is_true(&before.conditions, ConditionType::Running)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_significant_digits() {
        for (value, text) in [
            (0.083_123, "0.0831"),
            (0.84, "0.840"),
            (1.0 / 3.0, "0.333"),
            (12.345, "12.3"),
            (123_456.7, "123457"),
            (1.5e-7, "1.50e-7"),
            (0.0, "0"),
            (-2.5, "-2.50"),
        ] {
            assert_eq!(significant(value), text);
        }
    }

    #[test]
    fn a_report_that_says_nothing_new_leaves_its_time() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let report = |step| Progress { step, total_steps: 2000, loss: Some(0.5), ..Progress::default() };
        let first = merged(None, progress(&report(900)), at(100));
        assert_eq!((first.percent, first.summary.as_str()), (45, "900/2000 (45%)"));
        let same = merged(Some(&first), progress(&report(900)), at(200));
        assert_eq!(same, first, "timestamps alone must not cause a write");
        let next = merged(Some(&first), progress(&report(901)), at(300));
        assert_eq!(next.last_report_time, Some(Time(at(300))));
    }

    #[test]
    fn a_step_that_was_divided_further_shows() {
        let report = |recomputed| Progress { step: 1, total_steps: 2, micro_batch: Some(4), recomputed_blocks: Some(recomputed), ..Progress::default() };
        let at = |second| Timestamp::from_second(second).unwrap();
        let first = merged(None, progress(&report(10)), at(100));
        assert_eq!((first.micro_batch, first.recomputed_blocks), (Some(4), Some(10)));
        let divided = merged(Some(&first), progress(&report(16)), at(200));
        assert_eq!((divided.recomputed_blocks, divided.last_report_time), (Some(16), Some(Time(at(200)))));
    }

    #[test]
    fn an_estimate_is_absolute_and_to_the_minute() {
        let report = Progress { step: 1, total_steps: 2, estimated_completion_time: Some("2026-08-24T10:12:43.5Z".parse().unwrap()), ..Progress::default() };
        assert_eq!(progress(&report).estimated_completion_time.unwrap().0.to_string(), "2026-08-24T10:12:00Z");
    }
}
