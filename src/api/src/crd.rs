//! The CustomResourceDefinition: what kube derives from the types, made fit for an API server that counts every byte and every step of a rule.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use kube::core::cel::Validator;
use serde_json::{Map, Value, json};

use super::FineTuneJob;
use super::validate::apply_defaults;

/// Longest string where a type says nothing: the embedded Kubernetes types have no bounds, and a rule over an unbounded field has unbounded cost.
const MAX_LENGTH: u64 = 1024;
/// Longest list where a type says nothing.
const MAX_ITEMS: u64 = 64;
/// Largest map where a type says nothing.
const MAX_PROPERTIES: u64 = 64;
/// What a quantity looks like.
const QUANTITY_PATTERN: &str = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$";

/// The CustomResourceDefinition, as `finetune crd` prints it.
///
/// # Errors
/// None in practice: the definition is fixed at build time and tested.
pub fn crd() -> Result<CustomResourceDefinition, serde_json::Error> {
    let mut crd = FineTuneJob::crd();
    for version in &mut crd.spec.versions {
        if let Some(schema) = version.schema.as_mut().and_then(|validation| validation.open_api_v3_schema.as_mut()) {
            let mut value = serde_json::to_value(&*schema)?;
            finish(&mut value);
            *schema = serde_json::from_value(value)?;
        }
    }
    Ok(crd)
}

/// The schema of the whole object, as the API server has it.
///
/// # Errors
/// As [`crd`].
pub fn schema() -> Result<Value, serde_json::Error> {
    let crd = crd()?;
    let schema = crd.spec.versions.into_iter().next().and_then(|version| version.schema).and_then(|schema| schema.open_api_v3_schema);
    serde_json::to_value(schema).map(with_integers)
}

fn finish(root: &mut Value) {
    tidy(root);
    if let Some(status) = root.pointer_mut("/properties/status").and_then(Value::as_object_mut) {
        // An object that no controller has seen must not look current to kstatus.
        status.insert("default".to_owned(), json!({"observedGeneration": -1}));
    }
    shorten_defaults(root);
}

/// Removes what structural schemas do not need and adds the bounds that they do.
fn tidy(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    map.remove("nullable");
    map.remove("title");
    if map.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
        let wide =
            map.get("format").and_then(Value::as_str) == Some("uint64") || map.get("maximum").and_then(Value::as_f64).is_none_or(|max| max > 2_147_483_647.0);
        map.insert("format".to_owned(), json!(if wide { "int64" } else { "int32" }));
    }
    if map.get("x-kubernetes-int-or-string") == Some(&json!(true)) {
        map.insert("anyOf".to_owned(), json!([{"type": "integer"}, {"type": "string"}]));
        map.entry("pattern").or_insert_with(|| json!(QUANTITY_PATTERN));
        map.entry("maxLength").or_insert_with(|| json!(32));
        return;
    }
    match map.get("type").and_then(Value::as_str) {
        Some("string") if !map.contains_key("enum") && map.get("format").and_then(Value::as_str) != Some("date-time") => {
            map.entry("maxLength").or_insert_with(|| json!(MAX_LENGTH));
        }
        Some("array") => {
            map.entry("maxItems").or_insert_with(|| json!(MAX_ITEMS));
        }
        Some("object") if map.contains_key("additionalProperties") => {
            map.entry("maxProperties").or_insert_with(|| json!(MAX_PROPERTIES));
        }
        _ => {}
    }
    for key in ["properties"] {
        if let Some(properties) = map.get_mut(key).and_then(Value::as_object_mut) {
            properties.values_mut().for_each(tidy);
        }
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = map.get_mut(key) {
            tidy(inner);
        }
    }
}

/// Writes the default of a block as `{}` where the defaults of its fields give the same.
fn shorten_defaults(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    if let Some(properties) = map.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(shorten_defaults);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = map.get_mut(key) {
            shorten_defaults(inner);
        }
    }
    if !map.contains_key("properties") {
        return;
    }
    let Some(default) = map.get("default").filter(|default| default.is_object()).cloned() else { return };
    let schema = Value::Object(map.clone());
    let mut from_empty = Value::Object(Map::new());
    apply_defaults(&mut from_empty, &schema);
    if from_empty == default && rules_accept_empty(&schema) {
        map.insert("default".to_owned(), json!({}));
    }
}

/// The API server tries the rules of a block on its default as it is written, before the defaults of its fields are filled in.
fn rules_accept_empty(schema: &Value) -> bool {
    let mut bare = schema.clone();
    if let Some(properties) = bare.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().filter_map(Value::as_object_mut).for_each(|property| {
            property.remove("default");
        });
    }
    Validator::new().validate(&bare, &json!({}), None).is_ok()
}

/// `value` with whole numbers written as integers: the definition's type holds every bound as a float.
pub fn with_integers(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => match number.as_f64() {
            Some(float) if float.fract() == 0.0 && float.abs() < 9.1e15 => json!(float as i64),
            _ => Value::Number(number),
        },
        Value::Array(items) => Value::Array(items.into_iter().map(with_integers).collect()),
        Value::Object(map) => Value::Object(map.into_iter().map(|(key, value)| (key, with_integers(value))).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(schema: &Value, path: &str, visit: &mut impl FnMut(&str, &Map<String, Value>)) {
        let Some(map) = schema.as_object() else { return };
        visit(path, map);
        for (name, inner) in map.get("properties").and_then(Value::as_object).into_iter().flatten() {
            walk(inner, &format!("{path}.{name}"), visit);
        }
        for key in ["items", "additionalProperties"] {
            if let Some(inner) = map.get(key) {
                walk(inner, &format!("{path}[]"), visit);
            }
        }
    }

    #[test]
    fn everything_is_bounded_and_explained() {
        let mut count = 0;
        walk(&schema().unwrap(), "", &mut |path, map| {
            let kind = map.get("type").and_then(Value::as_str).unwrap_or_default();
            let bounded = match kind {
                "string" => map.contains_key("enum") || map.contains_key("maxLength") || map.get("format") == Some(&json!("date-time")),
                "array" => map.contains_key("maxItems"),
                "object" if map.contains_key("additionalProperties") => map.contains_key("maxProperties"),
                _ => true,
            };
            assert!(bounded, "{path} has no bound");
            assert!(!map.contains_key("nullable"), "{path}: a client in Go cannot tell null from absent");
            assert!(!map.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")), "{path}");
            let named = path.starts_with(".spec") || path.starts_with(".status");
            assert!(!named || path.ends_with("[]") || map.contains_key("description"), "{path} has no description");
            count += 1;
        });
        assert!(count > 200, "{count}");
    }

    #[test]
    fn blocks_default_to_their_fields_defaults() {
        let schema = schema().unwrap();
        for block in ["training", "resume", "scheduling", "podTemplate", "failurePolicy"] {
            assert_eq!(schema["properties"]["spec"]["properties"][block]["default"], json!({}), "{block}");
        }
        // Its rule speaks about fields that `{}` does not have.
        assert_eq!(schema["properties"]["spec"]["properties"]["checkpoint"]["default"]["everySteps"], 100);
        assert_eq!(schema["properties"]["status"]["default"], json!({"observedGeneration": -1}));
        assert_eq!(schema["properties"]["status"]["properties"]["conditions"]["x-kubernetes-list-map-keys"], json!(["type"]));
    }
}
