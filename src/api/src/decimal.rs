//! Decimal numbers as strings.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A decimal number as text, such as `"1e-4"` or `"0.9"`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Decimal(String);

/// Text that is not a finite decimal number.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0:?} is not a decimal number such as \"0.5\" or \"1e-4\"")]
pub struct DecimalError(String);

impl Decimal {
    /// What a decimal looks like; also the schema's pattern.
    pub const PATTERN: &'static str = r"^-?[0-9]+([.][0-9]+)?([eE][-+]?[0-9]+)?$";
    /// Longest text that the schema lets through.
    pub const MAX_LENGTH: u32 = 24;

    /// A decimal of `text`, unchecked until [`Decimal::value`].
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The number.
    ///
    /// # Errors
    /// If the text is not a decimal number, or not a finite one.
    pub fn value(&self) -> Result<f64, DecimalError> {
        let error = || DecimalError(self.0.clone());
        let plain = !self.0.is_empty() && self.0.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'+' | b'e' | b'E'));
        if !plain {
            return Err(error());
        }
        self.0.parse().ok().filter(|value: &f64| value.is_finite()).ok_or_else(error)
    }

    /// The text as written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl JsonSchema for Decimal {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Decimal".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": Self::PATTERN, "maxLength": Self::MAX_LENGTH})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_read_and_everything_else_is_refused() {
        for (text, value) in [("1e-4", 1e-4), ("0.9", 0.9), ("-1.5", -1.5), ("2", 2.0), ("1E+2", 100.0)] {
            assert_eq!(Decimal::new(text).value(), Ok(value), "{text}");
        }
        for text in ["", "NaN", "inf", "1e999", "one", "0x10", " 1", "1,5"] {
            assert!(Decimal::new(text).value().is_err(), "{text}");
        }
    }
}
