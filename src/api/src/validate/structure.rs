//! The schema without its rules: unknown fields, defaults, types and bounds, as the API server does it.

use regex::Regex;
use serde_json::{Map, Value, json};

use super::Finding;

/// Adds a finding for each field that the schema does not know.
pub(super) fn unknown_fields(value: &Value, schema: &Value, findings: &mut Vec<Finding>) {
    each_unknown(value, schema, "", &mut |path| {
        findings.push(Finding { path, message: "unknown field".to_owned(), blocks_rules: false });
    });
}

fn each_unknown(value: &Value, schema: &Value, path: &str, report: &mut impl FnMut(String)) {
    match value {
        Value::Object(map) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            let additional = schema.get("additionalProperties").filter(|inner| inner.is_object());
            let open = schema.get("x-kubernetes-preserve-unknown-fields") == Some(&json!(true)) || (properties.is_none() && additional.is_none());
            for (key, inner) in map {
                let inner_path = join(path, key);
                match properties.and_then(|properties| properties.get(key)).or(additional) {
                    Some(inner_schema) => each_unknown(inner, inner_schema, &inner_path, report),
                    None if open || (path.is_empty() && matches!(key.as_str(), "apiVersion" | "kind" | "metadata")) => {}
                    None => report(inner_path),
                }
            }
        }
        Value::Array(items) => {
            if let Some(inner_schema) = schema.get("items") {
                for (index, item) in items.iter().enumerate() {
                    each_unknown(item, inner_schema, &format!("{path}[{index}]"), report);
                }
            }
        }
        _ => {}
    }
}

/// Takes out `null` where the schema has no use for it, and writes whole numbers as integers.
pub(super) fn normalise(value: &mut Value, schema: &Value) {
    if schema.get("type") == Some(&json!("integer"))
        && let Some(float) = value.as_f64().filter(|float| value.is_f64() && float.fract() == 0.0 && float.abs() < 9e15)
    {
        *value = json!(float as i64);
    }
    let additional = schema.get("additionalProperties");
    match value {
        Value::Object(map) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            let schema_of = |key: &str| properties.and_then(|properties| properties.get(key)).or(additional);
            map.retain(|key, inner| !inner.is_null() || schema_of(key).is_none_or(|schema| schema.get("nullable") == Some(&json!(true))));
            for (key, inner) in map.iter_mut() {
                if let Some(inner_schema) = schema_of(key) {
                    normalise(inner, inner_schema);
                }
            }
        }
        Value::Array(items) => {
            if let Some(inner_schema) = schema.get("items") {
                for item in items {
                    normalise(item, inner_schema);
                }
            }
        }
        _ => {}
    }
}

/// Fills in the schema's defaults, from the outside in.
pub(crate) fn apply_defaults(value: &mut Value, schema: &Value) {
    match value {
        Value::Object(map) => {
            if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
                for (key, inner_schema) in properties {
                    if let Some(default) = inner_schema.get("default").filter(|_| !map.contains_key(key)) {
                        map.insert(key.clone(), default.clone());
                    }
                    if let Some(inner) = map.get_mut(key) {
                        apply_defaults(inner, inner_schema);
                    }
                }
            }
            if let Some(inner_schema) = schema.get("additionalProperties") {
                map.values_mut().for_each(|inner| apply_defaults(inner, inner_schema));
            }
        }
        Value::Array(items) => {
            if let Some(inner_schema) = schema.get("items") {
                for item in items {
                    apply_defaults(item, inner_schema);
                }
            }
        }
        _ => {}
    }
}

/// Adds a finding for each value of the wrong type or out of its bounds, and for each required field that is missing.
pub(super) fn check(value: &Value, schema: &Value, findings: &mut Vec<Finding>) {
    Checker { findings }.value(value, schema, "");
}

struct Checker<'a> {
    findings: &'a mut Vec<Finding>,
}

impl Checker<'_> {
    fn add(&mut self, path: &str, message: String, blocks_rules: bool) {
        self.findings.push(Finding { path: path.to_owned(), message, blocks_rules });
    }

    fn value(&mut self, value: &Value, schema: &Value, path: &str) {
        if value.is_null() && schema.get("nullable") == Some(&json!(true)) {
            return;
        }
        if !has_type(value, schema) {
            let wanted = if is_int_or_string(schema) { "an integer or a string" } else { with_article(schema.get("type").and_then(Value::as_str)) };
            self.add(path, format!("must be {wanted}, is {}{}", type_name(value), hint(value, schema)), true);
            return;
        }
        if let Some(allowed) = schema.get("enum").and_then(Value::as_array).filter(|allowed| !allowed.contains(value)) {
            let names: Vec<_> = allowed.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect();
            self.add(path, format!("must be one of {}, is {value}", names.join(", ")), false);
        }
        match value {
            Value::Number(_) => self.number(value, schema, path),
            Value::String(text) => self.text(text, schema, path),
            Value::Array(items) => self.list(items, schema, path),
            Value::Object(map) => self.map(map, schema, path),
            Value::Null | Value::Bool(_) => {}
        }
    }

    fn number(&mut self, value: &Value, schema: &Value, path: &str) {
        let Some(number) = value.as_f64() else { return };
        let bound = |key: &str| schema.get(key).filter(|bound| bound.is_number());
        if let Some(minimum) = bound("minimum").filter(|m| m.as_f64().is_some_and(|m| number < m)) {
            self.add(path, format!("must be at least {}, is {value}", shown(minimum)), false);
        }
        if let Some(maximum) = bound("maximum").filter(|m| m.as_f64().is_some_and(|m| number > m)) {
            self.add(path, format!("must be at most {}, is {value}", shown(maximum)), false);
        }
        if let Some(step) = bound("multipleOf").filter(|m| m.as_f64().is_some_and(|m| m > 0.0 && (number / m).fract() != 0.0)) {
            self.add(path, format!("must be a multiple of {}, is {value}", shown(step)), false);
        }
    }

    fn text(&mut self, text: &str, schema: &Value, path: &str) {
        let length = text.chars().count() as u64;
        if let Some(max) = limit(schema, "maxLength").filter(|&max| length > max) {
            self.add(path, format!("has {length} characters, at most {max} are allowed"), true);
        }
        if let Some(min) = limit(schema, "minLength").filter(|&min| length < min) {
            self.add(path, if min == 1 { "must not be empty".to_owned() } else { format!("has {length} characters, at least {min} are needed") }, false);
        }
        if let Some(pattern) = schema.get("pattern").and_then(Value::as_str) {
            let matches = Regex::new(pattern).is_ok_and(|regex| regex.is_match(text));
            if !matches {
                self.add(path, format!("{text:?} does not match {pattern}"), false);
            }
        }
        if schema.get("format").and_then(Value::as_str) == Some("date-time") && text.parse::<jiff::Timestamp>().is_err() {
            self.add(path, format!("{text:?} is not a time such as 2026-01-31T12:00:00Z"), false);
        }
    }

    fn list(&mut self, items: &[Value], schema: &Value, path: &str) {
        let length = items.len() as u64;
        if let Some(max) = limit(schema, "maxItems").filter(|&max| length > max) {
            self.add(path, format!("has {length} items, at most {max} are allowed"), true);
        }
        if let Some(min) = limit(schema, "minItems").filter(|&min| length < min) {
            self.add(path, format!("has {length} items, at least {min} needed"), false);
        }
        let keys = match schema.get("x-kubernetes-list-type").and_then(Value::as_str) {
            Some("set") => Some(Vec::new()),
            Some("map") => Some(schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array).cloned().unwrap_or_default()),
            _ => None,
        };
        if let Some(keys) = keys {
            let key_of = |item: &Value| -> Value {
                if keys.is_empty() {
                    item.clone()
                } else {
                    keys.iter().map(|key| item.get(key.as_str().unwrap_or_default()).cloned().unwrap_or_default()).collect()
                }
            };
            for (index, item) in items.iter().enumerate() {
                if items[..index].iter().any(|earlier| key_of(earlier) == key_of(item)) {
                    self.add(&format!("{path}[{index}]"), format!("{item} occurs twice"), false);
                }
            }
        }
        if let Some(inner) = schema.get("items") {
            for (index, item) in items.iter().enumerate() {
                self.value(item, inner, &format!("{path}[{index}]"));
            }
        }
    }

    fn map(&mut self, map: &Map<String, Value>, schema: &Value, path: &str) {
        let count = map.len() as u64;
        if let Some(max) = limit(schema, "maxProperties").filter(|&max| count > max) {
            self.add(path, format!("has {count} entries, at most {max} are allowed"), true);
        }
        for key in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            if !map.contains_key(key) {
                self.add(&join(path, key), "is required".to_owned(), true);
            }
        }
        let properties = schema.get("properties").and_then(Value::as_object);
        for (key, inner) in map {
            if let Some(inner_schema) = properties.and_then(|properties| properties.get(key)).or_else(|| schema.get("additionalProperties")) {
                self.value(inner, inner_schema, &join(path, key));
            }
        }
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn limit(schema: &Value, key: &str) -> Option<u64> {
    schema.get(key).and_then(Value::as_u64)
}

/// A bound without the `.0` that the schema's numbers carry.
fn shown(bound: &Value) -> String {
    bound.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < 9e15).map_or_else(|| bound.to_string(), |float| (float as i64).to_string())
}

fn is_int_or_string(schema: &Value) -> bool {
    schema.get("x-kubernetes-int-or-string") == Some(&json!(true))
}

fn has_type(value: &Value, schema: &Value) -> bool {
    if is_int_or_string(schema) {
        return value.is_i64() || value.is_u64() || value.is_string();
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        _ => true,
    }
}

fn with_article(kind: Option<&str>) -> &'static str {
    match kind {
        Some("object") => "an object",
        Some("array") => "a list",
        Some("string") => "a string",
        Some("boolean") => "true or false",
        Some("integer") => "an integer",
        _ => "a number",
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(number) if number.is_f64() => "a number with a fraction",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Numbers with fractions are strings here: the most frequent slip.
fn hint(value: &Value, schema: &Value) -> String {
    match schema.get("type").and_then(Value::as_str) {
        Some("string") if value.is_number() || value.is_boolean() => format!(" (write \"{value}\")"),
        _ => String::new(),
    }
}
