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

impl StepPlan {
    /// The length of a run of `training` over a dataset with so many pictures in each bucket (all of them in one, where there are none), each occurring
    /// `repeats` times. Every bucket may have a short batch.
    ///
    /// With prior preservation an epoch is as long as the larger of the two sets.
    pub fn new(training: &TrainingConfig, repeats: u32, buckets: Option<&[u64]>) -> Self {
        let updates_per_epoch = buckets.map(|buckets| {
            let class_images = training.prior_preservation.as_ref().map_or(0, |prior| u64::from(prior.images));
            let batches = |pictures: &u64| pictures.saturating_mul(u64::from(repeats)).max(class_images).div_ceil(u64::from(training.batch_size).max(1));
            buckets.iter().map(batches).sum::<u64>().div_ceil(u64::from(training.gradient_accumulation_steps).max(1))
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
    use super::*;
    use crate::plan::{Facts, resolve};

    #[test]
    fn short_batches_and_short_accumulations_count() {
        let updates = |buckets: &[u64], repeats, batch: u32, accumulation: u32| {
            let spec = serde_json::json!({
                "model": {"source": {"objectStore": {"uri": "s3://m/"}}}, "dataset": {"uri": "s3://d/"}, "output": {"uri": "s3://o/"},
                "training": {"batchSize": batch, "gradientAccumulationSteps": accumulation},
            });
            let config = resolve(&serde_json::from_value(spec).unwrap(), "n", "j", &Facts::default()).unwrap().config;
            StepPlan::new(&config.training, repeats, Some(buckets)).updates_per_epoch.unwrap()
        };
        for (samples, repeats, batch, accumulation, expected) in
            [(25, 1, 4, 3, 3), (24, 1, 4, 3, 2), (1, 1, 4, 3, 1), (13, 2, 4, 3, 3), (38, 1, 8, 1, 5), (0, 1, 4, 3, 0), (10_000, 1, 4, 3, 834)]
        {
            assert_eq!(updates(&[samples], repeats, batch, accumulation), expected, "{samples} x {repeats} / {batch} / {accumulation}");
        }
        // 5 batches, 1 and 2 of buckets with 17, 1 and 6 pictures: an accumulation goes on from one bucket to the next.
        assert_eq!((updates(&[17, 1, 6], 1, 4, 1), updates(&[17, 1, 6], 1, 4, 3)), (8, 3));
        assert_eq!(updates(&[17, 1, 6], 2, 4, 1), 9 + 1 + 3);
    }
}
