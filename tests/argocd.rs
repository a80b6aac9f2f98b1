//! The Argo CD health script, run by a Lua interpreter over statuses that a real operator wrote.
//!
//! `tests/fixtures/statuses/PHASE.json` are recorded: `FINETUNE_RECORD_STATUS=tests/fixtures/statuses tests/run --cluster e2e::` adds those that are missing.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::process::Command;

use finetune_testing::programs::repository;
use serde_json::{Value, json};

fn recorded(phase: &str) -> Value {
    let path = repository().join(format!("tests/fixtures/statuses/{phase}.json"));
    serde_json::from_str(&std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).expect("JSON")
}

/// A value as a Lua expression.
fn lua(value: &Value) -> String {
    match value {
        Value::Null => "nil".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => quoted(text),
        Value::Array(items) => format!("{{{}}}", items.iter().map(lua).collect::<Vec<_>>().join(",")),
        Value::Object(fields) => {
            let fields: Vec<String> = fields.iter().map(|(name, value)| format!("[{}]={}", quoted(name), lua(value))).collect();
            format!("{{{}}}", fields.join(","))
        }
    }
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for byte in text.bytes() {
        let _infallible = write!(quoted, "\\x{byte:02x}");
    }
    quoted + "\""
}

/// (status, message) of the script for one object. Argo CD gives it the object as `obj` and takes the table that it returns.
fn health(object: &Value) -> (String, String) {
    let script = repository().join("deploy/argocd/health.lua");
    let program =
        format!("obj = {}\nlocal health = dofile({})\nio.write(health.status, \"\\n\", health.message)", lua(object), quoted(&script.display().to_string()));
    let output = Command::new("lua5.4").arg("-e").arg(program).output().expect("lua5.4 is installed: tests/testbed/cluster build installs it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    let (status, message) = text.split_once('\n').expect("two lines");
    (status.to_owned(), message.to_owned())
}

#[test]
fn every_phase_has_a_health() {
    let expected = [
        ("pending", "Progressing", "waiting for the operator"),
        ("queued", "Progressing", "KueueNotInstalled"),
        ("starting", "Progressing", "Unschedulable"),
        ("running", "Progressing", "Training"),
        ("suspended", "Suspended", "UserRequested"),
        ("succeeded", "Healthy", "TrainingSucceeded"),
        ("failed", "Degraded", "InvalidConfig"),
    ];
    for (phase, status, message) in expected {
        let (got, said) = health(&recorded(phase));
        assert_eq!(got, status, "{phase}: {said}");
        assert!(said.contains(message), "{phase}: {said}");
    }
    let covered: BTreeSet<&str> = expected.iter().map(|(phase, _, _)| *phase).collect();
    let schema: Value =
        serde_yaml::from_str(&std::fs::read_to_string(repository().join("crds/finetune.dev_finetunejobs.yaml")).expect("the CRD")).expect("YAML");
    let phases = &schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["phase"]["enum"];
    for phase in phases.as_array().expect("phases") {
        let phase = phase.as_str().expect("text").to_lowercase();
        assert!(covered.contains(phase.as_str()), "no recorded status of {phase}");
    }
}

#[test]
fn a_changed_spec_is_progressing_until_it_is_seen_and_an_end_is_an_end() {
    let newer = |phase: &str| {
        let mut object = recorded(phase);
        object["metadata"]["generation"] = json!(object["status"]["observedGeneration"].as_i64().expect("a number") + 1);
        object
    };
    assert_eq!(health(&newer("suspended")).0, "Progressing");
    assert_eq!(health(&newer("succeeded")).0, "Healthy", "a later change of ttlSecondsAfterFinished does not undo the LoRA");
    assert_eq!(health(&newer("failed")).0, "Degraded");
    assert_eq!(health(&json!({"metadata": {"generation": 1}})).0, "Progressing", "no status at all");
    assert_eq!(health(&json!({"metadata": {"generation": 1}, "status": {"observedGeneration": 1}})).0, "Progressing");
}
