//! YAML in and out: the only module that knows the YAML library.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Text that is not the YAML that was asked for.
#[derive(Debug, thiserror::Error)]
#[error("failed to read YAML: {source}")]
pub struct YamlError {
    #[from]
    source: serde_yaml::Error,
}

impl YamlError {
    /// Line and column (from 1) of the problem, where known.
    pub fn location(&self) -> Option<(usize, usize)> {
        self.source.location().map(|l| (l.line(), l.column()))
    }
}

/// Reads one document.
///
/// # Errors
/// If the text is not YAML or not a `T`.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    Ok(serde_yaml::from_str(text)?)
}

/// Reads every document of a multi-document text as JSON values; empty documents are left out.
///
/// # Errors
/// If the text is not YAML, or has keys that JSON cannot have.
pub fn documents(text: &str) -> Result<Vec<serde_json::Value>, YamlError> {
    let mut values = Vec::new();
    for document in serde_yaml::Deserializer::from_str(text) {
        let value: serde_json::Value = serde::Deserialize::deserialize(document)?;
        if !value.is_null() {
            values.push(value);
        }
    }
    Ok(values)
}

/// Writes `value` as one document.
///
/// # Errors
/// If `value` cannot be expressed in YAML.
pub fn to_string<T: Serialize>(value: &T) -> Result<String, YamlError> {
    Ok(serde_yaml::to_string(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_documents_are_read_and_empty_ones_left_out() {
        let docs = documents("a: 1\n---\n---\nb: [x, y]\n").unwrap();
        assert_eq!(docs, vec![serde_json::json!({"a": 1}), serde_json::json!({"b": ["x", "y"]})]);
    }

    #[test]
    fn an_error_knows_its_place() {
        let error = from_str::<serde_json::Value>("a: 1\nb: [").unwrap_err();
        assert!(error.location().is_some());
    }
}
