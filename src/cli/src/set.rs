//! `--set FIELD=VALUE`: fields of the spec, from the command line.

use serde_json::Value;

use super::job;
use finetune_common::yaml;

/// The manifest with fields of each FineTuneJob's spec changed.
pub(super) fn with_changes(text: &str, changes: &[String]) -> Result<String, String> {
    let mut documents = yaml::documents(text).map_err(|error| job::chain(&error))?;
    let schema = finetune_api::schema().map_err(|error| job::chain(&error))?;
    for change in changes {
        let (field, value) = change.split_once('=').ok_or_else(|| format!("--set {change}: write FIELD=VALUE, as training.maxSteps=20"))?;
        let field = field.strip_prefix("spec.").unwrap_or(field);
        let parsed: Value = yaml::from_str(value).map_err(|error| format!("--set {change}: {}", job::chain(&error)))?;
        let schema = field.split('.').try_fold(&schema["properties"]["spec"], below);
        let value = if wants_text(schema) && is_plain(&parsed) { value.trim().into() } else { fitting(parsed, schema) };
        for document in documents.iter_mut().filter(|d| d["kind"] == finetune_api::KIND) {
            let mut place = &mut document["spec"];
            for key in field.split('.') {
                if !(place.is_object() || place.is_null()) {
                    return Err(format!("--set {change}: {key} lies below something that is not an object"));
                }
                place = &mut place[key];
            }
            *place = value.clone();
        }
    }
    let texts: Vec<String> = documents.iter().map(|d| yaml::to_string(d).map_err(|error| job::chain(&error))).collect::<Result<_, _>>()?;
    Ok(texts.join("---\n"))
}

/// The schema of the member `key` of an object with this schema.
fn below<'a>(schema: &'a Value, key: &str) -> Option<&'a Value> {
    schema.get("properties").and_then(|properties| properties.get(key)).or_else(|| schema.get("additionalProperties"))
}

/// Whether the schema has a string there: decimal numbers are, so that they stay what was written.
fn wants_text(schema: Option<&Value>) -> bool {
    schema.is_some_and(|schema| schema["type"] == "string")
}

fn is_plain(value: &Value) -> bool {
    value.is_number() || value.is_boolean()
}

/// `value` with text in place of the numbers for which the schema wants text.
fn fitting(value: Value, schema: Option<&Value>) -> Value {
    match value {
        plain if is_plain(&plain) && wants_text(schema) => plain.to_string().into(),
        Value::Object(members) => members
            .into_iter()
            .map(|(key, value)| {
                let schema = schema.and_then(|schema| below(schema, &key));
                (key, fitting(value, schema))
            })
            .collect(),
        Value::Array(items) => items.into_iter().map(|item| fitting(item, schema.and_then(|schema| schema.get("items")))).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_spec_are_changed_and_made() {
        let text = "kind: FineTuneJob\nspec:\n  training: {maxSteps: 5}\n---\nkind: Other\nspec: {}\n";
        let changed =
            with_changes(text, &["training.maxSteps=20".into(), "spec.output.existing=Fail".into(), "training.optimizer.learningRate='1e-3'".into()]).unwrap();
        let documents = yaml::documents(&changed).unwrap();
        assert_eq!(
            documents[0]["spec"],
            serde_json::json!({"training": {"maxSteps": 20, "optimizer": {"learningRate": "1e-3"}}, "output": {"existing": "Fail"}})
        );
        assert_eq!(documents[1]["spec"], serde_json::json!({}));
        assert!(with_changes(text, &["training.maxSteps.x=1".into()]).is_err());
        assert!(with_changes(text, &["training".into()]).is_err());
    }

    #[test]
    fn numbers_become_text_where_the_schema_wants_text() {
        let text = "kind: FineTuneJob\nspec: {}\n";
        let spec = |change: &str| yaml::documents(&with_changes(text, &[change.to_owned()]).unwrap()).unwrap().remove(0)["spec"].clone();
        for (change, want) in [
            ("training.optimizer.learningRate=1e-4", serde_json::json!({"training": {"optimizer": {"learningRate": "1e-4"}}})),
            ("training.optimizer.learningRate=0.00010", serde_json::json!({"training": {"optimizer": {"learningRate": "0.00010"}}})),
            ("training.optimizer.learningRate=\"1e-4\"", serde_json::json!({"training": {"optimizer": {"learningRate": "1e-4"}}})),
            ("validation.guidanceScale=7", serde_json::json!({"validation": {"guidanceScale": "7"}})),
            ("validation={guidanceScale: 4.5, steps: 3}", serde_json::json!({"validation": {"guidanceScale": "4.5", "steps": 3}})),
            ("training.lora.targetModules=[to_q, 1]", serde_json::json!({"training": {"lora": {"targetModules": ["to_q", "1"]}}})),
            ("training.maxSteps=20", serde_json::json!({"training": {"maxSteps": 20}})),
            ("training.randomFlip=true", serde_json::json!({"training": {"randomFlip": true}})),
            ("validation=null", serde_json::json!({"validation": null})),
        ] {
            assert_eq!(spec(change), want, "{change}");
        }
    }
}
