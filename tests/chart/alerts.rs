//! The chart's alerts and the operator's metrics, judged by Prometheus' own promtool (`tests/testbed/install-servers promtool`).

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use finetune_operator::telemetry::metrics::{Census, Metrics};
use serde_json::{Value, json};

use super::{EVERYTHING, only, rendered};
use finetune_testing::programs::{repository, run};

/// Pinned in `tests/testbed/install-servers`.
const PROMTOOL: &str = "promtool-0.316.0";

fn promtool() -> Command {
    let cache = || std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let tools = std::env::var_os("FINETUNE_TEST_TOOLS").map(PathBuf::from).or_else(|| Some(cache()?.join("finetune-operator/tools"))).expect("HOME is set");
    let program = tools.join("bin").join(PROMTOOL);
    assert!(program.exists(), "{} is not installed: run tests/testbed/install-servers promtool", program.display());
    Command::new(program)
}

fn groups() -> Value {
    only(&rendered(EVERYTHING), "PrometheusRule")["spec"]["groups"].clone()
}

fn rules(groups: &Value) -> Vec<&Value> {
    groups.as_array().expect("groups").iter().flat_map(|group| group["rules"].as_array().expect("rules")).collect()
}

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut groups = groups();
    // promtool compares annotations too; what these say is tested below.
    for rule in groups.as_array_mut().expect("groups").iter_mut().flat_map(|group| group["rules"].as_array_mut().expect("rules")) {
        rule.as_object_mut().expect("a rule").remove("annotations");
    }
    // YAML is a superset of JSON.
    std::fs::write(folder.path().join("rules.yaml"), json!({ "groups": groups }).to_string()).expect("rules are written");
    let cases = std::fs::read_to_string(repository().join("tests/fixtures/alerts/alerts.test.yaml")).expect("the cases");
    std::fs::write(folder.path().join("alerts.test.yaml"), &cases).expect("cases are written");
    let said =
        run(promtool().current_dir(&folder).args(["check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"])).unwrap_or_else(|error| panic!("{error}"));
    assert!(said.contains("SUCCESS"), "{said}");
    run(promtool().current_dir(&folder).args(["test", "rules", "alerts.test.yaml"])).unwrap_or_else(|error| panic!("{error}"));

    let cases: Value = serde_yaml::from_str(&cases).expect("the cases parse");
    let tested: BTreeSet<&str> = cases["tests"]
        .as_array()
        .expect("tests")
        .iter()
        .flat_map(|test| test["alert_rule_test"].as_array().expect("cases"))
        .filter(|case| case["exp_alerts"].as_array().is_some_and(|alerts| !alerts.is_empty()))
        .filter_map(|case| case["alertname"].as_str())
        .collect();
    let alerts: BTreeSet<&str> = rules(&groups).into_iter().filter_map(|rule| rule["alert"].as_str()).collect();
    assert_eq!(tested, alerts, "each alert has a case in which it fires");
}

#[test]
fn every_alert_leads_to_its_runbook() {
    let page = std::fs::read_to_string(repository().join("docs/guides/runbooks.md")).expect("the runbooks");
    let headings: BTreeSet<String> = page.lines().filter_map(|line| line.strip_prefix("## ")).map(str::to_lowercase).collect();
    let groups = groups();
    let mut linked = BTreeSet::new();
    for rule in rules(&groups) {
        let annotations = &rule["annotations"];
        let url = annotations["runbook_url"].as_str().unwrap_or_else(|| panic!("{rule} has no runbook"));
        let (page, anchor) = url.split_once('#').expect("an anchor");
        assert!(page.ends_with("/docs/guides/runbooks.md"), "{url}");
        assert_eq!(anchor, rule["alert"].as_str().expect("a name").to_lowercase());
        assert!(annotations["summary"].is_string() && annotations["description"].is_string() && rule["labels"]["severity"].is_string(), "{rule}");
        linked.insert(anchor.to_owned());
    }
    assert_eq!(linked, headings, "a runbook for each alert, and an alert for each runbook");
}

/// What the operator serves is OpenMetrics; promtool reads the text format before it, in which counters and infos carry their suffix in the name.
fn as_text_format(openmetrics: &str) -> String {
    let mut kind = "";
    let mut lines = Vec::new();
    let mut help = None;
    for line in openmetrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name), Some(text)) => help = Some((name, text)),
            (Some("#"), Some("TYPE"), Some(name), Some(type_)) => {
                kind = type_;
                let (name, kind) = match kind {
                    "counter" => (format!("{name}_total"), kind),
                    "info" => (format!("{name}_info"), "gauge"),
                    _ => (name.to_owned(), kind),
                };
                lines.extend(help.take().map(|(_, text)| format!("# HELP {name} {text}")));
                lines.push(format!("# TYPE {name} {kind}"));
            }
            (Some("#"), ..) => {}
            _ => lines.push(line.to_owned()),
        }
    }
    assert!(!kind.is_empty());
    lines.join("\n") + "\n"
}

#[test]
fn the_operators_metrics_follow_the_conventions() {
    let metrics = Metrics::new();
    metrics.add_job_counts(Box::new(|| {
        let mut census = Census::default();
        census.add("team-a", "Running", 5, true);
        census
    }));
    metrics.job_ended("failed", "NotFound", Some(Duration::from_secs(5)));
    metrics.job_admitted(Duration::from_secs(5));
    metrics.job_started(Duration::from_secs(5));
    metrics.job_restarted("Disrupted");
    metrics.reconciled(Duration::from_secs(1), Some("create_job"));
    metrics.waited(Duration::from_secs(1));
    metrics.progress_fetched("ok");
    metrics.api_request("get", "pods", "200");
    metrics.set_watch_failing("team-a", true);
    let text = as_text_format(&metrics.encode().expect("it encodes"));
    for name in ["finetune_build_info{", "finetune_job_terminal_total{", "finetune_jobs_longest_seconds{", "finetune_watch_failing{"] {
        assert!(text.contains(name), "{name} is missing in {text}");
    }
    assert!(text.lines().all(|line| line.contains("finetune_") || line.contains("process_")), "every name has the prefix");

    let mut child = promtool().args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("promtool runs");
    child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}\n{text}", String::from_utf8_lossy(&said));
}
