//! The CEL rules of the schema.

use kube::core::cel::{ErrorKind, Validator};
use serde_json::Value;

use super::Finding;

/// What the rules say about `object`, or about changing `old` to it.
pub(super) fn check(schema: &Value, object: &Value, old: Option<&Value>) -> Vec<Finding> {
    let Err(errors) = Validator::new().validate(schema, object, old) else { return Vec::new() };
    errors
        .into_vec()
        .into_iter()
        .map(|error| {
            let message = match error.kind {
                ErrorKind::ValidationFailure => error.message,
                _ => format!("failed to evaluate the rule {:?}: {}", error.rule, error.message),
            };
            Finding { path: error.field_path.trim_start_matches('.').to_owned(), message, blocks_rules: false }
        })
        .collect()
}
