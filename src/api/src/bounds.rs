//! The bounds of the API's decimal numbers, each in one place: the CEL rule of the schema and the check in [`crate::plan::resolve`] both come from it.

use kube::core::Rule;

use super::Decimal;

/// One end of an interval.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Included(f64),
    Excluded(f64),
    Unlimited,
}

/// The interval that a decimal may lie in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bounds {
    low: End,
    high: End,
    /// Why the bounds are what they are, where that is not obvious.
    note: Option<&'static str>,
}

impl Bounds {
    const fn between(low: f64, high: f64) -> Self {
        Self { low: End::Included(low), high: End::Included(high), note: None }
    }

    const fn at_least(low: f64) -> Self {
        Self { low: End::Included(low), high: End::Unlimited, note: None }
    }

    /// From 0, which is excluded, to `high`.
    const fn positive_to(high: f64) -> Self {
        Self { low: End::Excluded(0.0), high: End::Included(high), note: None }
    }

    const fn because(self, note: &'static str) -> Self {
        Self { note: Some(note), ..self }
    }

    /// Whether `value` lies in the interval.
    pub(crate) fn contains(&self, value: f64) -> bool {
        let above = match self.low {
            End::Included(low) => value >= low,
            End::Excluded(low) => value > low,
            End::Unlimited => true,
        };
        let below = match self.high {
            End::Included(high) => value <= high,
            End::Excluded(high) => value < high,
            End::Unlimited => true,
        };
        above && below
    }

    /// The rule for the field's schema. The pattern of a [`Decimal`] makes sure that CEL can read it.
    pub(crate) fn rule(&self) -> Rule {
        Rule::new(self.condition()).message(self.message().as_str())
    }

    /// The interval as a condition of CEL on `self`.
    pub(crate) fn condition(&self) -> String {
        let low = match self.low {
            End::Included(low) => Some(format!("double(self) >= {low:?}")),
            End::Excluded(low) => Some(format!("double(self) > {low:?}")),
            End::Unlimited => None,
        };
        let high = match self.high {
            End::Included(high) => Some(format!("double(self) <= {high:?}")),
            End::Excluded(high) => Some(format!("double(self) < {high:?}")),
            End::Unlimited => None,
        };
        low.into_iter().chain(high).collect::<Vec<_>>().join(" && ")
    }

    /// What is wrong with a number outside the interval, as in "must be at least 0 and less than 1".
    pub(crate) fn message(&self) -> String {
        let mut message = match (self.low, self.high) {
            (End::Included(low), End::Included(high)) => format!("must be between {low} and {high}"),
            (low, high) => {
                let low = match low {
                    End::Included(low) => Some(format!("at least {low}")),
                    End::Excluded(low) => Some(format!("greater than {low}")),
                    End::Unlimited => None,
                };
                let high = match high {
                    End::Included(high) => Some(format!("at most {high}")),
                    End::Excluded(high) => Some(format!("less than {high}")),
                    End::Unlimited => None,
                };
                format!("must be {}", low.into_iter().chain(high).collect::<Vec<_>>().join(" and "))
            }
        };
        if let Some(note) = self.note {
            message = format!("{message} ({note})");
        }
        message
    }

    /// The number that `decimal` writes, where it is one within the bounds.
    ///
    /// # Errors
    /// What is wrong, in the words of the schema's rule.
    pub(crate) fn read(&self, decimal: &Decimal) -> Result<f64, String> {
        match decimal.value() {
            Ok(value) if self.contains(value) => Ok(value),
            Ok(value) => Err(format!("is {value}, but {}", self.message())),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// `training.maxGradNorm`.
pub(crate) const MAX_GRAD_NORM: Bounds = Bounds::at_least(0.0);
/// `training.flowMatching.logitMean`.
pub(crate) const LOGIT_MEAN: Bounds = Bounds::between(-10.0, 10.0);
/// `training.flowMatching.logitStd`.
pub(crate) const LOGIT_STD: Bounds = Bounds::positive_to(10.0);
/// `training.flowMatching.modeScale`.
pub(crate) const MODE_SCALE: Bounds = Bounds::between(-1.0, 1.7519).because("2 / (pi - 2), where the density is monotone");
/// `training.flowMatching.shift`, where it is a number.
pub(crate) const SHIFT: Bounds = Bounds::positive_to(100.0);
/// `training.optimizer.learningRate`.
pub(crate) const LEARNING_RATE: Bounds = Bounds::positive_to(1.0);
/// Decays of running means: `beta1`, `beta2`, `beta3`; the share of a dropout.
pub(crate) const FRACTION: Bounds = Bounds { low: End::Included(0.0), high: End::Excluded(1.0), note: None };
/// `dataset.captions.dropout`.
pub(crate) const CAPTION_DROPOUT: Bounds = Bounds::between(0.0, 1.0);
/// `training.optimizer.weightDecay`.
pub(crate) const WEIGHT_DECAY: Bounds = Bounds::between(0.0, 1.0);
/// `training.optimizer.epsilon`.
pub(crate) const EPSILON: Bounds = Bounds::positive_to(1.0);
/// `training.optimizer.prodigy.d0`.
pub(crate) const D0: Bounds = Bounds::positive_to(1.0);
/// `training.optimizer.prodigy.dCoef`.
pub(crate) const D_COEF: Bounds = Bounds::positive_to(1000.0);
/// `training.optimizer.prodigy.growthRate`.
pub(crate) const GROWTH_RATE: Bounds = Bounds::at_least(1.0);
/// `training.learningRateSchedule.cycles`.
pub(crate) const CYCLES: Bounds = Bounds::positive_to(1000.0);
/// `training.learningRateSchedule.power`.
pub(crate) const POWER: Bounds = Bounds::positive_to(100.0);
/// `training.priorPreservation.weight`.
pub(crate) const PRIOR_WEIGHT: Bounds = Bounds::positive_to(100.0);
/// `validation.guidanceScale`.
pub(crate) const GUIDANCE_SCALE: Bounds = Bounds::between(1.0, 50.0);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Map, Value, json};

    use super::*;
    use crate::plan::{Facts, resolve};
    use crate::{FineTuneJobSpec, schema, validate};

    /// Each decimal of the spec, its bounds, and what else the spec needs for it to be read.
    fn decimals() -> Vec<(&'static str, Bounds, Value)> {
        let prodigy = json!({"training": {"optimizer": {"type": "Prodigy"}}});
        let prior = json!({"training": {"priorPreservation": {"classPrompt": "a photo of a dog"}}});
        vec![
            ("training.maxGradNorm", MAX_GRAD_NORM, json!({})),
            ("training.flowMatching.logitMean", LOGIT_MEAN, json!({})),
            ("training.flowMatching.logitStd", LOGIT_STD, json!({})),
            ("training.flowMatching.modeScale", MODE_SCALE, json!({})),
            ("dataset.captions.dropout", CAPTION_DROPOUT, json!({})),
            ("training.optimizer.learningRate", LEARNING_RATE, json!({})),
            ("training.optimizer.beta1", FRACTION, json!({})),
            ("training.optimizer.beta2", FRACTION, json!({})),
            ("training.optimizer.weightDecay", WEIGHT_DECAY, json!({})),
            ("training.optimizer.epsilon", EPSILON, json!({})),
            ("training.optimizer.prodigy.d0", D0, prodigy.clone()),
            ("training.optimizer.prodigy.dCoef", D_COEF, prodigy.clone()),
            ("training.optimizer.prodigy.growthRate", GROWTH_RATE, prodigy.clone()),
            ("training.optimizer.prodigy.beta3", FRACTION, prodigy),
            ("training.learningRateSchedule.cycles", CYCLES, json!({"training": {"learningRateSchedule": {"type": "Cosine"}}})),
            ("training.learningRateSchedule.power", POWER, json!({})),
            ("training.lora.dropout", FRACTION, json!({})),
            ("training.priorPreservation.weight", PRIOR_WEIGHT, prior),
            ("validation.guidanceScale", GUIDANCE_SCALE, json!({"validation": {"prompts": ["a dog"]}})),
        ]
    }

    /// Paths below `spec` whose schema is that of a decimal.
    fn in_schema(schema: &Value, path: &str, found: &mut BTreeSet<String>) {
        if schema["pattern"] == Decimal::PATTERN {
            found.insert(path.to_owned());
        }
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            in_schema(field, &if path.is_empty() { name.clone() } else { format!("{path}.{name}") }, found);
        }
    }

    fn set(object: &mut Value, path: &str, value: Value) {
        let target = path.split('.').fold(object, |object, name| {
            if object.is_null() {
                *object = Value::Object(Map::new());
            }
            &mut object[name]
        });
        *target = value;
    }

    #[test]
    fn every_decimal_of_the_schema_has_bounds() {
        let mut found = BTreeSet::new();
        in_schema(&schema().unwrap()["properties"]["spec"], "", &mut found);
        assert_eq!(found, decimals().into_iter().map(|(path, ..)| path.to_owned()).collect());
    }

    #[test]
    fn the_schema_and_the_plan_refuse_the_same_numbers() {
        for (path, bounds, context) in decimals() {
            let ends = [bounds.low, bounds.high].into_iter().filter_map(|end| match end {
                End::Included(end) | End::Excluded(end) => Some(end),
                End::Unlimited => None,
            });
            let near = ends.flat_map(|end| [end, end - 1e-3, end + 1e-3]);
            let mut refused = 0;
            for value in near.chain([-1e9, 0.0, 0.5, 7.5, 1e30]) {
                let mut spec = json!({
                    "model": {"source": {"objectStore": {"uri": "s3://models/sd3/"}}},
                    "dataset": {"uri": "s3://data/corgi/"},
                    "output": {"uri": "s3://loras/corgi/"},
                });
                for (name, block) in context.as_object().unwrap() {
                    spec[name] = block.clone();
                }
                set(&mut spec, path, json!(format!("{value:e}")));
                let manifest = json!({"apiVersion": crate::API_VERSION, "kind": crate::KIND, "metadata": {"name": "a", "namespace": "b"}, "spec": spec});
                let by_schema = validate::manifest(&manifest.to_string()).err();
                let spec: FineTuneJobSpec = serde_json::from_value(spec).unwrap();
                let by_plan = resolve(&spec, "b", "a", &Facts::default()).err();
                assert_eq!(by_schema.is_none(), bounds.contains(value), "{path} = {value}: {by_schema:?}");
                assert_eq!(by_plan.is_none(), bounds.contains(value), "{path} = {value}: {by_plan:?}");
                if let (Some(by_schema), Some(by_plan)) = (by_schema, by_plan) {
                    assert!(by_schema.to_string().contains(&bounds.message()), "{by_schema}");
                    assert!(by_plan.to_string().contains(&bounds.message()), "{by_plan}");
                    refused += 1;
                }
            }
            assert!(refused > 0, "{path}: nothing was refused");
        }
    }
}
