//! Reads a configuration that another version may have written: what it does not know is left out and named, and what it must not run is refused.

use serde_json::Value;

use super::config::{CONFIG_VERSION, TrainConfig};

/// Why a configuration is not used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Written by a newer version, for newer trainers.
    #[error(
        "the configuration has version {found}, and this trainer knows {CONFIG_VERSION}: a newer operator has made it. Use a trainer image of the operator's version (spec.image, or the operator's default)"
    )]
    Newer {
        /// Its version.
        found: u64,
    },
    /// Not a configuration.
    #[error("{0}")]
    Malformed(#[source] serde_json::Error),
}

impl TrainConfig {
    /// The configuration, and the names of what is in `value` and not known here.
    ///
    /// # Errors
    /// If it was written for newer trainers, misses something, or has values that cannot be.
    pub fn read(value: &Value) -> Result<(Self, Vec<String>), ConfigError> {
        let found = value.get("configVersion").and_then(Value::as_u64).unwrap_or(0);
        if found > u64::from(CONFIG_VERSION) {
            return Err(ConfigError::Newer { found });
        }
        let config: Self = serde_json::from_value(value.clone()).map_err(ConfigError::Malformed)?;
        let known = serde_json::to_value(&config).map_err(ConfigError::Malformed)?;
        let mut unknown = Vec::new();
        left_out(value, &known, "", &mut unknown);
        Ok((config, unknown))
    }
}

/// The paths in `given` that are not in `known`. What is null is as good as absent.
fn left_out(given: &Value, known: &Value, path: &str, unknown: &mut Vec<String>) {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (key, value) in given.iter().filter(|(_, value)| !value.is_null()) {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match known.get(key) {
                    Some(known) => left_out(value, known, &path, unknown),
                    None => unknown.push(path),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (index, (given, known)) in given.iter().zip(known).enumerate() {
                left_out(given, known, &format!("{path}[{index}]"), unknown);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A configuration of this version: newer trainers must be able to run it.
    const STORED: &str = include_str!("samples/config-1.json");

    #[test]
    fn the_stored_configuration_of_this_version_is_read_without_loss() {
        let stored: Value = serde_json::from_str(STORED).unwrap();
        let (config, unknown) = TrainConfig::read(&stored).unwrap();
        assert_eq!((config.config_version, unknown), (1, Vec::new()));
        assert_eq!(serde_json::to_value(&config).unwrap(), stored);
    }

    #[test]
    fn what_a_newer_operator_has_added_is_left_out_and_named() {
        let mut value: Value = serde_json::from_str(STORED).unwrap();
        let plain = TrainConfig::read(&value).unwrap().0;
        value["surprise"] = json!(1);
        value["training"]["surprise"] = json!({"a": 1});
        value["training"]["absent"] = Value::Null;
        let (config, unknown) = TrainConfig::read(&value).unwrap();
        assert_eq!((config, unknown), (plain, vec!["surprise".to_owned(), "training.surprise".to_owned()]));
    }

    #[test]
    fn a_configuration_for_newer_trainers_is_refused_with_the_way_out() {
        let mut value: Value = serde_json::from_str(STORED).unwrap();
        value["configVersion"] = json!(CONFIG_VERSION + 1);
        let error = TrainConfig::read(&value).unwrap_err().to_string();
        assert!(error.contains("version 2") && error.contains("spec.image"), "{error}");
        // One from before there were versions.
        value.as_object_mut().unwrap().remove("configVersion");
        assert_eq!(TrainConfig::read(&value).unwrap().0.config_version, 0);
    }
}
