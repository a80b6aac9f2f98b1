//! What people see: `kubectl explain`, `kubectl get`.

use serde_json::{Value, json};

use super::fixture::{NAMESPACE, cluster, job, schema};
use finetune_testing::kubernetes;
use finetune_testing::programs::kubectl;

/// Paths of all objects of the schema with the names of their fields.
fn objects(schema: &Value, path: &str, found: &mut Vec<(String, Vec<String>)>) {
    let Some(properties) = schema["properties"].as_object() else {
        for inner in ["items", "additionalProperties"] {
            if schema[inner].is_object() {
                objects(&schema[inner], path, found);
            }
        }
        return;
    };
    found.push((path.to_owned(), properties.keys().cloned().collect()));
    for (name, property) in properties {
        objects(property, &format!("{path}.{name}"), found);
    }
}

/// The part of `kubectl explain`'s output about one field: its line and the indented ones below.
fn section<'a>(output: &'a str, field: &str) -> Vec<&'a str> {
    let mut lines = output.lines().skip_while(|line| line.split_whitespace().next() != Some(field) || !line.starts_with("  ") || line.starts_with("   "));
    let Some(first) = lines.next() else { return Vec::new() };
    std::iter::once(first).chain(lines.take_while(|line| line.starts_with("   ") || line.starts_with("  enum:"))).collect()
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn kubectl_explains_every_field() {
    let _client = cluster().await;
    let schema = schema();
    let mut all = Vec::new();
    for part in ["spec", "status"] {
        objects(&schema["properties"][part], &format!("finetunejob.{part}"), &mut all);
    }
    assert!(all.len() > 25, "the schema has lost its objects: {}", all.len());
    let mut unexplained = Vec::new();
    for (path, fields) in all {
        let output = kubectl(&["explain", &path]).unwrap_or_else(|error| panic!("{error}"));
        for field in fields {
            let lines = section(&output, &field);
            // Name and type, then a description.
            let described = lines.iter().skip(1).any(|line| !line.trim().is_empty() && !line.trim().starts_with("enum:"));
            if !described {
                unexplained.push(format!("{path}.{field}"));
            }
        }
    }
    assert!(unexplained.is_empty(), "kubectl explain says nothing about {unexplained:#?}");
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn kubectl_get_shows_where_a_job_is() {
    let client = cluster().await;
    kubernetes::delete(&client, "FineTuneJob", NAMESPACE, "columns").await;
    let mut columns = job("columns");
    columns["spec"]["queueName"] = json!("team-a-gpu");
    kubernetes::create(&client, &columns, false).await.expect("a valid job");
    let status = json!({"status": {
        "observedGeneration": 1,
        "phase": "Running",
        "attempts": {"started": 2, "disrupted": 1, "failed": 0},
        "progress": {"step": 900, "totalSteps": 2000, "percent": 45, "loss": "0.0831", "summary": "900/2000 (45%)"},
    }})
    .to_string();
    kubectl(&["-n", NAMESPACE, "patch", "ftj", "columns", "--subresource=status", "--type=merge", "-p", &status]).unwrap_or_else(|error| panic!("{error}"));

    let short = kubectl(&["-n", NAMESPACE, "get", "ftj", "columns"]).unwrap_or_else(|error| panic!("{error}"));
    let (head, row) = short.trim().split_once('\n').expect("two lines");
    assert_eq!(head.split_whitespace().collect::<Vec<_>>(), ["NAME", "PHASE", "PROGRESS", "LOSS", "REASON", "AGE"]);
    for word in ["columns", "Running", "900/2000 (45%)", "0.0831"] {
        assert!(row.contains(word), "{word}: {row}");
    }
    let wide = kubectl(&["-n", NAMESPACE, "get", "ftj", "columns", "-o", "wide"]).unwrap_or_else(|error| panic!("{error}"));
    for word in ["ETA", "ATTEMPTS", "QUEUE", "OUTPUT", "team-a-gpu", "s3://bucket/loras/corgi/"] {
        assert!(wide.contains(word), "{word}: {wide}");
    }
    let running = kubectl(&["-n", NAMESPACE, "get", "ftj", "--field-selector=status.phase=Running", "-o", "name"]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(running.trim(), "finetunejob.finetune.dev/columns");
    let all = kubectl(&["-n", NAMESPACE, "get", "all"]).unwrap_or_else(|error| panic!("{error}"));
    assert!(all.contains("finetunejob.finetune.dev/columns"), "category all: {all}");
    kubernetes::delete(&client, "FineTuneJob", NAMESPACE, "columns").await;
}
