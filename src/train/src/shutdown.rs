//! A run within the time that it is given to end: asked to stop, it ends well before it would be killed, and that it could not save is no failure.

use std::time::Duration;

use super::environment::JobEnvironment;
use super::error::TrainError;
use super::job::{self, Outcome};
use finetune_api::plan::TrainConfig;
use finetune_api::{Reason, Stage};

/// Of the time that is left after a request to stop, this much is kept for ending and for the last words.
const RESERVE: Duration = Duration::from_secs(10);

/// [`job::run`], which is given up where a request to stop leaves it no more time: whatever it waits for then, a store that does not answer most likely, and
/// however many writes it still had to do. A run that is stopped so goes on from its newest checkpoint.
///
/// # Errors
/// [`TrainError`]; its reason gives the exit code.
pub async fn run(config: &TrainConfig, environment: &JobEnvironment) -> Result<Outcome, TrainError> {
    let result = tokio::select! {
        result = job::run(config, environment) => result,
        () = environment.interrupt.out_of_time() => {
            tracing::warn!("no time is left to save a checkpoint; the next attempt goes on from the newest one");
            Err(TrainError::Interrupted { checkpoint: None })
        }
    };
    result.map_err(|error| judge(error, environment))
}

/// How long a run that is asked to stop may take, of `grace` until it is killed.
pub fn time_to_end(grace: Duration) -> Duration {
    grace.saturating_sub(RESERVE.min(grace / 4))
}

/// What an error means in the light of when it came.
fn judge(error: TrainError, environment: &JobEnvironment) -> TrainError {
    match error.reason() {
        Reason::StorageUnavailable | Reason::PermissionDenied if environment.interrupt.requested() => {
            tracing::warn!(error = &error as &dyn std::error::Error, "the last checkpoint could not be saved; the next attempt goes on from the one before");
            TrainError::Interrupted { checkpoint: None }
        }
        Reason::PermissionDenied if matches!(environment.reporter.progress().stage, Stage::Training | Stage::Publishing) => {
            TrainError::PermissionLost { source: Box::new(error) }
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_is_kept_of_long_and_short_times() {
        for (grace, want) in [(120, 110), (40, 30), (20, 15), (0, 0)] {
            assert_eq!(time_to_end(Duration::from_secs(grace)), Duration::from_secs(want), "{grace}");
        }
    }
}
