//! Settings that are allowed and hardly ever meant.

use std::fmt;

use super::{OptimizerKind, ScheduleKind, TrainingConfig};

/// Prodigy estimates the learning rate itself; the setting is a factor on its estimate. Below this it trains next to nothing.
const PRODIGY_LEAST: f64 = 0.1;
/// AdamW moves each number by about the learning rate in every update; above this a LoRA is ruined.
const ADAM_MOST: f64 = 0.05;

/// A setting with which a run trains nothing, or ruins its LoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Warning {
    /// Path of the field, as in `spec.training.optimizer.learningRate`.
    pub path: &'static str,
    /// What will happen, and what to do.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// What deserves a word about these settings; `total_steps` where they are known, else those of the settings.
pub fn warnings(training: &TrainingConfig, total_steps: Option<u64>) -> Vec<Warning> {
    let mut found = Vec::new();
    let rate = training.optimizer.learning_rate;
    let mut warn = |path, message| found.push(Warning { path, message });
    match training.optimizer.kind {
        OptimizerKind::Prodigy if rate < PRODIGY_LEAST => warn(
            "spec.training.optimizer.learningRate",
            format!("{rate} is a factor on Prodigy's own estimate, with which it trains next to nothing: set \"1\""),
        ),
        OptimizerKind::AdamW | OptimizerKind::AdamW8bit if rate > ADAM_MOST => warn(
            "spec.training.optimizer.learningRate",
            format!("{rate} is far above what a LoRA bears with AdamW (1e-4 to 1e-3 are usual): the loss will probably rise"),
        ),
        _ => {}
    }
    let schedule = &training.learning_rate_schedule;
    if let Some(total) = total_steps.or(training.max_steps).filter(|total| schedule.kind != ScheduleKind::Constant && schedule.warmup_steps >= *total) {
        warn(
            "spec.training.learningRateSchedule.warmupSteps",
            format!("{} steps of warm-up in a run of {total}: the learning rate never reaches {rate}", schedule.warmup_steps),
        );
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::plan::{Facts, resolve};

    fn found(training: &Value, total: Option<u64>) -> Vec<&'static str> {
        let spec = json!({
            "model": {"source": {"objectStore": {"uri": "s3://models/sd3/"}}}, "dataset": {"uri": "s3://data/"}, "output": {"uri": "s3://loras/"}, "training": training,
        });
        let plan = resolve(&serde_json::from_value(spec).unwrap(), "n", "j", &Facts::default()).unwrap();
        warnings(&plan.config.training, total).into_iter().map(|warning| warning.path).collect()
    }

    #[test]
    fn settings_that_train_nothing_or_ruin_the_lora_get_a_word() {
        let (rate, warmup) = ("spec.training.optimizer.learningRate", "spec.training.learningRateSchedule.warmupSteps");
        let none: [&str; 0] = [];
        for fine in [
            json!({}),
            json!({"optimizer": {"type": "Prodigy", "learningRate": "1"}}),
            json!({"optimizer": {"learningRate": "1e-2"}}),
            json!({"learningRateSchedule": {"type": "Cosine", "warmupSteps": 500}}),
        ] {
            assert_eq!(found(&fine, None), none, "{fine}");
        }
        assert_eq!(found(&json!({"optimizer": {"type": "Prodigy"}}), None), [rate]);
        assert_eq!(found(&json!({"optimizer": {"learningRate": "1"}}), None), [rate]);
        let long = json!({"maxSteps": 400, "learningRateSchedule": {"type": "ConstantWithWarmup", "warmupSteps": 500}});
        assert_eq!(found(&long, None), [warmup]);
        // An epoch's length is known with the dataset.
        let epochs = json!({"epochs": 1, "learningRateSchedule": {"type": "Linear", "warmupSteps": 500}});
        assert_eq!((found(&epochs, None), found(&epochs, Some(90))), (none.to_vec(), vec![warmup]));
    }
}
