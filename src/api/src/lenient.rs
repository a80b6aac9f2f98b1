//! Reads a status that another version of the operator has written: what cannot be read is left out and written anew, for a job whose status is not
//! understood would be managed by nobody.

use serde::de::DeserializeOwned;
use serde::{Deserialize as _, Deserializer};
use serde_json::Value;

/// A value, or its default where it cannot be read.
pub(super) fn field<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(read(Value::deserialize(deserializer)?).unwrap_or_default())
}

/// A list, without the elements that cannot be read.
pub(super) fn list<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Vec<T>, D::Error> {
    let Value::Array(elements) = Value::deserialize(deserializer)? else { return Ok(Vec::new()) };
    Ok(elements.into_iter().filter_map(read).collect())
}

/// A name, or the one that stands for those that are not known.
pub(super) fn name<'de, D: Deserializer<'de>, T: DeserializeOwned + UnknownName>(deserializer: D) -> Result<T, D::Error> {
    Ok(read(Value::deserialize(deserializer)?).unwrap_or(T::UNKNOWN))
}

/// The same where it may be absent.
pub(super) fn optional_name<'de, D: Deserializer<'de>, T: DeserializeOwned + UnknownName>(deserializer: D) -> Result<Option<T>, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::Null => None,
        value => Some(read(value).unwrap_or(T::UNKNOWN)),
    })
}

/// What an unknown name is read as.
pub(super) trait UnknownName {
    /// The closest of the known ones.
    const UNKNOWN: Self;
}

fn read<T: DeserializeOwned>(value: Value) -> Option<T> {
    let result = serde_json::from_value(value);
    if let Err(error) = &result {
        tracing::warn!(%error, "a part of a status is not understood and is left out; another version has written it");
    }
    result.ok()
}
