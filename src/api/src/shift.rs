//! The shift of the noise levels: a number or a rule, as text.

use std::borrow::Cow;

use kube::core::Rule;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::{Decimal, bounds};

/// `"3"` or `ByResolution`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct TimestepShift(Decimal);

/// The name of the rule.
const BY_RESOLUTION: &str = "ByResolution";

impl TimestepShift {
    /// The number; none where the pictures' size decides.
    pub fn number(&self) -> Option<&Decimal> {
        (self.0.as_str() != BY_RESOLUTION).then_some(&self.0)
    }
}

/// The rule for the schema: the bounds hold for numbers.
pub(crate) fn rule() -> Rule {
    let number = bounds::SHIFT;
    Rule::new(format!("self == '{BY_RESOLUTION}' || ({})", number.condition())).message(format!("{}, or {BY_RESOLUTION}", number.message()).as_str())
}

impl JsonSchema for TimestepShift {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "TimestepShift".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let number = Decimal::PATTERN.trim_start_matches('^').trim_end_matches('$');
        json_schema!({"type": "string", "pattern": format!("^({BY_RESOLUTION}|{number})$"), "maxLength": Decimal::MAX_LENGTH})
    }
}
