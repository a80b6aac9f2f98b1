//! What the API server does with a manifest, offline: unknown fields are errors, then defaults, then the schema, then the CEL rules.
//!
//! All violations come at once, each with the path of its field.

mod rules;
mod structure;

use kube::core::ObjectMeta;
use serde::Serialize;
use serde_json::{Map, Value};

use super::crd::schema;
use super::{API_VERSION, FineTuneJob, GROUP, KIND};
use finetune_common::yaml;

pub(super) use structure::apply_defaults;

/// One thing that the API server would refuse.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Violation {
    /// Which document of the text, from 1.
    pub document: usize,
    /// `metadata.name` of the object, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Path of the field, as in `spec.training.batchSize`; empty for the whole document.
    pub path: String,
    /// What is wrong, and what to do.
    pub message: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.object {
            Some(object) => write!(f, "{object}: ")?,
            None => write!(f, "document {}: ", self.document)?,
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// Everything that is wrong with a manifest; never empty.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct Violations(pub Vec<Violation>);

impl Violations {
    fn of_text(message: String) -> Self {
        Self(vec![Violation { document: 1, object: None, path: String::new(), message }])
    }
}

/// Reads every FineTuneJob of a YAML text, with defaults filled in, as an API server would store it. Objects of other API groups are passed over.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn manifest(text: &str) -> Result<Vec<FineTuneJob>, Violations> {
    let documents = yaml::documents(text).map_err(|error| Violations::of_text(error.to_string()))?;
    let schema = schema().map_err(|error| Violations::of_text(format!("failed to build the schema: {error}")))?;
    let mut jobs = Vec::new();
    let mut violations = Vec::new();
    for (index, document) in documents.into_iter().enumerate() {
        if belongs_to_another_group(&document) {
            continue;
        }
        let object = document.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned);
        match object_of(document, &schema) {
            Ok(job) => jobs.push(job),
            Err(found) => {
                violations.extend(found.into_iter().map(|f| Violation { document: index + 1, object: object.clone(), path: f.path, message: f.message }));
            }
        }
    }
    if !violations.is_empty() {
        return Err(Violations(violations));
    }
    if jobs.is_empty() {
        return Err(Violations::of_text(format!("there is no {KIND} ({API_VERSION}) in it")));
    }
    Ok(jobs)
}

/// What an API server would refuse about changing `old` to `new`: the rules of `new` and those that fix fields at creation.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn update(old: &FineTuneJob, new: &FineTuneJob) -> Result<(), Violations> {
    let run = || -> Result<Vec<Finding>, serde_json::Error> { Ok(rules::check(&schema()?, &serde_json::to_value(new)?, Some(&serde_json::to_value(old)?))) };
    let findings = run().map_err(|error| Violations::of_text(error.to_string()))?;
    if findings.is_empty() {
        return Ok(());
    }
    let object = new.metadata.name.clone();
    Err(Violations(findings.into_iter().map(|f| Violation { document: 1, object: object.clone(), path: f.path, message: f.message }).collect()))
}

/// A violation before it is known which document it is in.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Finding {
    path: String,
    message: String,
    /// The API server skips the rules where one of these is found.
    blocks_rules: bool,
}

fn belongs_to_another_group(document: &Value) -> bool {
    let api_version = document.get("apiVersion").and_then(Value::as_str);
    let kind = document.get("kind").and_then(Value::as_str);
    let ours = api_version.is_some_and(|v| v.split('/').next() == Some(GROUP)) || kind.is_some_and(|kind| kind.eq_ignore_ascii_case(KIND));
    api_version.is_some() && kind.is_some() && !ours
}

/// All findings of one document, or the object.
fn object_of(mut document: Value, schema: &Value) -> Result<FineTuneJob, Vec<Finding>> {
    let mut findings = Vec::new();
    let Some(map) = document.as_object_mut() else {
        return Err(vec![Finding { path: String::new(), message: "is not an object".to_owned(), blocks_rules: true }]);
    };
    type_meta(map, &mut findings);
    metadata(map, &mut findings);
    // The API server drops a status that a user sends.
    map.remove("status");
    structure::unknown_fields(&document, schema, &mut findings);
    structure::normalise(&mut document, schema);
    apply_defaults(&mut document, schema);
    structure::check(&document, schema, &mut findings);
    if findings.iter().any(|finding| finding.blocks_rules) {
        return Err(findings);
    }
    for finding in rules::check(schema, &document, None) {
        // A value that does not match its pattern makes the rules about it fail as well: once is enough.
        if !findings.iter().any(|known| known.path == finding.path) {
            findings.push(finding);
        }
    }
    if !findings.is_empty() {
        return Err(findings);
    }
    if let Some(map) = document.as_object_mut() {
        map.remove("status");
    }
    serde_json::from_value(document).map_err(|error| vec![Finding { path: String::new(), message: error.to_string(), blocks_rules: true }])
}

fn type_meta(map: &Map<String, Value>, findings: &mut Vec<Finding>) {
    for (field, wanted) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        if map.get(field).and_then(Value::as_str) != Some(wanted) {
            findings.push(Finding { path: field.to_owned(), message: format!("must be {wanted}"), blocks_rules: true });
        }
    }
}

/// Fields of `metadata` that a manifest may have.
const METADATA_FIELDS: [&str; 15] = [
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

fn metadata(map: &Map<String, Value>, findings: &mut Vec<Finding>) {
    let mut finding = |path: String, message: String| findings.push(Finding { path, message, blocks_rules: true });
    let Some(metadata) = map.get("metadata").and_then(Value::as_object) else {
        finding("metadata".to_owned(), "is required".to_owned());
        return;
    };
    for field in metadata.keys().filter(|field| !METADATA_FIELDS.contains(&field.as_str())) {
        finding(format!("metadata.{field}"), "unknown field".to_owned());
    }
    if let Err(error) = serde_json::from_value::<ObjectMeta>(Value::Object(metadata.clone())) {
        finding("metadata".to_owned(), error.to_string());
    }
    if metadata.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
        finding("metadata.name".to_owned(), "is required".to_owned());
    }
    for (key, value) in metadata.get("labels").and_then(Value::as_object).into_iter().flatten() {
        if !value.as_str().is_some_and(is_label_value) {
            finding(format!("metadata.labels.{key}"), "must be at most 63 letters, digits, \"-\", \"_\" or \".\", a letter or digit at both ends".to_owned());
        }
    }
}

fn is_label_value(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let ends = |b: Option<u8>| b.is_none_or(|b| b.is_ascii_alphanumeric());
    text.len() <= 63 && text.bytes().all(inner) && ends(text.bytes().next()) && ends(text.bytes().last())
}

#[cfg(test)]
mod tests;
