//! How many updates a run has.

use serde::{Deserialize, Serialize};

use super::TrainingConfig;

/// Length of a run.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StepPlan {
    /// Optimizer updates in all; unknown for a run of `epochs` over a dataset of unknown size.
    pub total_steps: Option<u64>,
    /// Optimizer updates per epoch; unknown without the dataset's size.
    pub updates_per_epoch: Option<u64>,
    /// Epochs that are begun; unknown without the dataset's size.
    pub epochs: Option<u64>,
}

/// Updates per epoch of `samples` pictures: the last batch may be short, and so may the last accumulation; both count.
///
/// `ceil(ceil(samples * repeats / batch_size) / gradient_accumulation_steps)`, at least 1 where there is a sample.
pub fn updates_per_epoch(samples: u64, repeats: u32, batch_size: u32, gradient_accumulation_steps: u32) -> u64 {
    let batches = samples.saturating_mul(u64::from(repeats)).div_ceil(u64::from(batch_size).max(1));
    batches.div_ceil(u64::from(gradient_accumulation_steps).max(1))
}

impl StepPlan {
    /// The length of a run of `training` over a dataset of `samples` pictures, each occurring `repeats` times.
    ///
    /// With prior preservation an epoch is as long as the larger of the two sets.
    pub fn new(training: &TrainingConfig, repeats: u32, samples: Option<u64>) -> Self {
        let updates_per_epoch = samples.map(|samples| {
            let class_images = training.prior_preservation.as_ref().map_or(0, |prior| u64::from(prior.images));
            let occurrences = samples.saturating_mul(u64::from(repeats)).max(class_images);
            updates_per_epoch(occurrences, 1, training.batch_size, training.gradient_accumulation_steps)
        });
        let total_steps = match (training.max_steps, training.epochs) {
            (Some(steps), _) => Some(steps),
            (None, Some(epochs)) => updates_per_epoch.map(|updates| updates.saturating_mul(epochs)),
            (None, None) => None,
        };
        let epochs = match (total_steps, updates_per_epoch) {
            (Some(total), Some(updates)) if updates > 0 => Some(total.div_ceil(updates)),
            _ => None,
        };
        Self { total_steps, updates_per_epoch, epochs }
    }
}

#[cfg(test)]
mod tests {
    use super::updates_per_epoch;

    #[test]
    fn short_batches_and_short_accumulations_count() {
        for (samples, repeats, batch, accumulation, updates) in
            [(25, 1, 4, 3, 3), (24, 1, 4, 3, 2), (1, 1, 4, 3, 1), (13, 2, 4, 3, 3), (38, 1, 8, 1, 5), (0, 1, 4, 3, 0), (10_000, 1, 4, 3, 834)]
        {
            assert_eq!(updates_per_epoch(samples, repeats, batch, accumulation), updates, "{samples} x {repeats} / {batch} / {accumulation}");
        }
    }
}
