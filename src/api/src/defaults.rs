//! One place for each default: the functions that serde, the schema and `Default` share.

/// Defines functions that return the default of a field, for `#[serde(default = "...")]`.
macro_rules! default_values {
    ($($name:ident: $type:ty = $value:expr;)+) => {
        $(fn $name() -> $type { $value })+
    };
}

/// Implements `Default` as "every field left out": what the API server makes of `{}`.
macro_rules! default_is_empty_object {
    ($($type:ty),+ $(,)?) => {
        $(impl Default for $type {
            fn default() -> Self {
                serde_json::from_value(serde_json::Value::Object(serde_json::Map::new())).expect("should have a default for every field")
            }
        })+
    };
}

pub(super) use default_is_empty_object;
pub(super) use default_values;
