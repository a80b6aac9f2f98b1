//! The Helm chart, rendered: what the objects say for several sets of values, and what the schema of the values refuses.
//!
//! `tests/cluster/e2e` installs the chart on a real cluster. `alerts.rs` runs its alerts by Prometheus' own promtool.
#![cfg(feature = "operator")]
#![expect(clippy::panic, clippy::expect_used, clippy::unwrap_in_result, reason = "helpers of tests stop at the first failure")]

mod alerts;

use std::collections::BTreeSet;
use std::path::Path;

use finetune_operator::settings::{ConfigFile, PodIds, Settings};
use finetune_testing::programs::{helm, repository};
use serde::Deserialize as _;
use serde_json::{Value, json};

const RELEASE: &str = "finetune-operator";
const NAMESPACE: &str = "finetune-system";
/// Name of the release's objects of the cluster.
const CLUSTER_NAME: &str = "finetune-system-finetune-operator";

/// Every optional part of the chart turned on.
const EVERYTHING: &str = r#"
image: {digest: "sha256:0000000000000000000000000000000000000000000000000000000000000000"}
imagePullSecrets: [{name: registry}]
trainer:
  allowCpuFallback: true
  image: {architectures: [amd64, arm64]}
  imagePullSecrets: [{name: registry}]
  podSecurityContext: {runAsUser: 1000, runAsGroup: null, fsGroup: null, supplementalGroups: [7]}
  env: [{name: EXTRA, value: "1"}, {name: KEY, valueFrom: {secretKeyRef: {name: s, key: k}}}]
  proxy: {https: "http://proxy.example.com:3128", noProxy: ".svc,10.0.0.0/8"}
  hubEndpoint: https://hub.example.com
  caBundleConfigMapRef: {name: company-ca, key: ca.crt}
defaultStorage: {endpoint: "http://10.0.0.1:8333", region: here, credentials: {secretRef: {name: storage}}, caBundleConfigMapRef: {name: ca, key: ca.crt}}
operator: {allowTtlScopeAll: true, extraEnv: [{name: EXTRA, value: "1"}]}
serviceAccount: {annotations: {team: one}}
podLabels: {team: one}
podAnnotations: {team: one}
nodeSelector: {pool: system}
tolerations: [{operator: Exists}]
affinity: {nodeAffinity: {}}
topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: DoNotSchedule}]
priorityClassName: high
networkPolicy: {enabled: true, metricsFrom: [{namespaceSelector: {matchLabels: {name: monitoring}}}], apiServerCIDRs: [10.0.0.0/8]}
leaderElection: {flowSchema: true}
admissionPolicy: {enabled: true, allowedImages: [registry.example.com/team/], allowedServiceAccounts: [default, trainer]}
metrics:
  serviceMonitor: {enabled: true, labels: {release: prometheus}}
  podMonitor: {enabled: true, labels: {release: prometheus}}
  prometheusRule: {enabled: true, labels: {release: prometheus}}
  dashboard: {enabled: true, annotations: {folder: gpu}}
"#;

fn chart() -> String {
    repository().join("charts/finetune-operator").display().to_string()
}

/// `helm template` with these values.
fn template(values: &str) -> Result<Vec<Value>, String> {
    template_in(NAMESPACE, values)
}

/// The same in another namespace.
fn template_in(namespace: &str, values: &str) -> Result<Vec<Value>, String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("values.yaml");
    std::fs::write(&file, values).expect("values are written");
    let text = helm(&["template", RELEASE, &chart(), "-n", namespace, "--kube-version", "1.33.0", "-f", &file.display().to_string()])?;
    Ok(serde_yaml::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).expect("rendered YAML parses"))
        .filter(|object| !object.is_null())
        .collect())
}

fn rendered(values: &str) -> Vec<Value> {
    template(values).unwrap_or_else(|error| panic!("{error}"))
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

fn only<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    match of_kind(objects, kind).as_slice() {
        [one] => one,
        found => panic!("{} objects of kind {kind}", found.len()),
    }
}

fn kinds(objects: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<&str> = objects.iter().filter_map(|object| object["kind"].as_str()).collect();
    kinds.sort_unstable();
    kinds
}

/// (group, resource, verb), one for each right that `rules` give.
fn rights(rules: &Value) -> BTreeSet<(String, String, String)> {
    let texts = |value: &Value| value.as_array().expect("a list").iter().map(|item| item.as_str().expect("text").to_owned()).collect::<Vec<_>>();
    let mut rights = BTreeSet::new();
    for rule in rules.as_array().expect("rules") {
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    rights.insert((group.clone(), resource.clone(), verb));
                }
            }
        }
    }
    rights
}

fn expected(list: &[(&str, &str, &[&str])]) -> BTreeSet<(String, String, String)> {
    list.iter().flat_map(|(group, resource, verbs)| verbs.iter().map(|verb| ((*group).to_owned(), (*resource).to_owned(), (*verb).to_owned()))).collect()
}

/// What the operator may do in a namespace that it watches: the whole list.
const NAMESPACED_RIGHTS: &[(&str, &str, &[&str])] = &[
    ("finetune.dev", "finetunejobs", &["get", "list", "watch"]),
    ("finetune.dev", "finetunejobs/status", &["patch"]),
    ("finetune.dev", "finetunejobs/finalizers", &["update"]),
    ("batch", "jobs", &["get", "list", "watch", "create", "delete", "patch"]),
    ("", "pods", &["list", "watch"]),
    ("events.k8s.io", "events", &["create", "list", "patch"]),
    ("kueue.x-k8s.io", "workloads", &["list", "watch"]),
];

#[test]
fn lint_has_nothing_to_say() {
    let said = helm(&["lint", "--strict", &chart()]).unwrap_or_else(|error| panic!("{error}"));
    assert!(said.contains("0 chart(s) failed"), "{said}");
}

#[test]
fn defaults_render_what_every_cluster_has_and_nothing_more() {
    let objects = rendered("");
    assert_eq!(
        kinds(&objects),
        [
            "ClusterRole", // the operator's
            "ClusterRole", // edit
            "ClusterRole", // view
            "ClusterRoleBinding",
            "ConfigMap",
            "CustomResourceDefinition",
            "Deployment",
            "PodDisruptionBudget",
            "Role", // the lease
            "RoleBinding",
            "Service",
            "ServiceAccount",
        ]
    );
}

#[test]
fn every_optional_part_renders() {
    let objects = rendered(EVERYTHING);
    for kind in ["NetworkPolicy", "ServiceMonitor", "PodMonitor", "PrometheusRule"] {
        assert_eq!(only(&objects, kind)["metadata"]["namespace"], NAMESPACE, "{kind}");
    }
    let flow = &only(&objects, "FlowSchema")["spec"];
    assert_eq!(flow["priorityLevelConfiguration"]["name"], "leader-election");
    let (subject, lease) = (&flow["rules"][0]["subjects"][0]["serviceAccount"], only(&objects, "Role"));
    assert_eq!(subject, &json!({"name": only(&objects, "ServiceAccount")["metadata"]["name"], "namespace": NAMESPACE}));
    assert_eq!(rights(&json!([flow["rules"][0]["resourceRules"][0]])), rights(&lease["rules"]), "it is for the Lease and nothing else");
    let pod = &only(&objects, "Deployment")["spec"]["template"];
    assert_eq!(pod["metadata"]["labels"]["team"], "one");
    assert_eq!(pod["metadata"]["annotations"]["team"], "one");
    assert_eq!(pod["spec"]["priorityClassName"], "high");
    assert_eq!(pod["spec"]["tolerations"], json!([{"operator": "Exists"}]));
    assert_eq!(pod["spec"]["topologySpreadConstraints"][0]["topologyKey"], "zone");
    let image = pod["spec"]["containers"][0]["image"].as_str().expect("an image");
    assert!(image.ends_with(&format!("@sha256:{}", "0".repeat(64))), "a digest wins over the tag: {image}");
}

#[test]
fn operator_pods_are_restricted_and_spread() {
    let objects = rendered("");
    let spec = &only(&objects, "Deployment")["spec"]["template"]["spec"];
    assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
    assert_eq!(spec["securityContext"]["runAsUser"], 65532);
    assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    let container = &spec["containers"][0];
    assert_eq!(container["securityContext"], json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}}));
    assert_eq!(container["livenessProbe"]["httpGet"]["path"], "/healthz");
    assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/readyz");
    assert_eq!(spec["topologySpreadConstraints"][0]["topologyKey"], "kubernetes.io/hostname");
}

#[test]
fn the_operator_gets_these_rights_and_no_others() {
    let objects = rendered("");
    let role = of_kind(&objects, "ClusterRole").into_iter().find(|role| role["metadata"]["name"] == CLUSTER_NAME).expect("the operator's role");
    let mut list = NAMESPACED_RIGHTS.to_vec();
    list.push(("", "nodes", &["list", "watch"]));
    assert_eq!(rights(&role["rules"]), expected(&list));

    let lease = only(&objects, "Role");
    assert_eq!(lease["metadata"]["namespace"], NAMESPACE);
    assert_eq!(rights(&lease["rules"]), expected(&[("coordination.k8s.io", "leases", &["get", "create", "update", "patch"])]));
}

#[test]
fn deleting_jobs_is_a_right_of_its_own() {
    let objects = rendered("operator: {allowTtlScopeAll: true}");
    let role = of_kind(&objects, "ClusterRole").into_iter().find(|role| role["metadata"]["name"] == CLUSTER_NAME).expect("the operator's role");
    assert!(rights(&role["rules"]).contains(&("finetune.dev".to_owned(), "finetunejobs".to_owned(), "delete".to_owned())));
}

#[test]
fn watched_namespaces_replace_the_cluster_role() {
    let objects = rendered("watchNamespaces: [team-a, team-b]");
    assert_eq!(of_kind(&objects, "ClusterRoleBinding").len(), 0);
    assert!(of_kind(&objects, "ClusterRole").iter().all(|role| role["metadata"]["name"] != CLUSTER_NAME), "only the aggregated roles");
    for namespace in ["team-a", "team-b"] {
        let role = of_kind(&objects, "Role").into_iter().find(|role| role["metadata"]["namespace"] == namespace).expect("a role");
        assert_eq!(rights(&role["rules"]), expected(NAMESPACED_RIGHTS));
        let binding = of_kind(&objects, "RoleBinding").into_iter().find(|binding| binding["metadata"]["namespace"] == namespace).expect("a binding");
        assert_eq!(binding["subjects"][0]["namespace"], NAMESPACE);
    }
}

#[test]
fn users_roles_aggregate_into_the_built_in_ones() {
    let objects = rendered("");
    let role = |name: &str| of_kind(&objects, "ClusterRole").into_iter().find(|role| role["metadata"]["name"] == name).expect("a role").clone();
    let edit = role(&format!("{CLUSTER_NAME}-edit"));
    let view = role(&format!("{CLUSTER_NAME}-view"));
    assert_eq!(edit["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"], "true");
    assert_eq!(view["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"], "true");
    assert!(view["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-admin"] == "true");
    assert!(rights(&view["rules"]).iter().all(|(_, _, verb)| ["get", "list", "watch"].contains(&verb.as_str())));
}

#[test]
fn the_crd_stays_when_the_chart_goes_and_is_the_generated_one() {
    let generated = std::fs::read_to_string(repository().join("crds/finetune.dev_finetunejobs.yaml")).expect("the generated CRD");
    let copy = std::fs::read_to_string(repository().join("charts/finetune-operator/files/finetune.dev_finetunejobs.yaml")).expect("the chart's copy");
    assert!(generated == copy, "the chart's copy is out of date: cp crds/*.yaml charts/finetune-operator/files/");

    let objects = rendered("");
    let crd = only(&objects, "CustomResourceDefinition");
    assert_eq!(crd["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    let generated: Value = serde_yaml::from_str(&generated).expect("the generated CRD parses");
    assert_eq!(crd["spec"], generated["spec"]);
    assert_eq!(crd["metadata"]["name"], generated["metadata"]["name"]);
    assert!(of_kind(&rendered("crd: {install: false}"), "CustomResourceDefinition").is_empty());
}

#[test]
fn the_operator_understands_its_configuration() {
    for values in ["", EVERYTHING] {
        let objects = rendered(values);
        let text = of_kind(&objects, "ConfigMap").into_iter().find_map(|map| map["data"]["config.yaml"].as_str()).expect("the configuration").to_owned();
        let file: ConfigFile = serde_yaml::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let settings = Settings::new(file).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(settings.trainer_image.contains("finetune-trainer"));
        assert_eq!(settings.node_classes.len(), 3, "Karpenter, EKS, GKE");
        assert_eq!(settings.default_storage.endpoint.is_some(), values == EVERYTHING);
        let trainer = settings.trainer;
        let ids = trainer.pod_ids();
        if values == EVERYTHING {
            let variables: Vec<&str> = trainer.env.iter().map(|variable| variable.name.as_str()).collect();
            assert_eq!(variables, ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "EXTRA", "KEY"]);
            assert_eq!((ids.run_as_user, ids.run_as_group, ids.fs_group, ids.supplemental_groups), (Some(1000), None, None, vec![7]));
            assert_eq!((trainer.hub_endpoint.as_deref(), trainer.image_pull_secrets[0].name.as_str()), (Some("https://hub.example.com"), "registry"));
            assert_eq!((trainer.ca_bundle_config_map_ref.expect("a bundle").name.as_str(), trainer.architectures.len()), ("company-ca", 2));
        } else {
            assert_eq!(ids, PodIds::IMAGE);
            assert!(trainer.env.is_empty() && trainer.hub_endpoint.is_none() && trainer.ca_bundle_config_map_ref.is_none());
            assert_eq!(trainer.architectures, ["amd64"]);
        }
    }
}

/// OpenShift's `restricted-v2` gives each namespace a range of users of its own, and refuses pods that ask for another.
#[test]
fn users_and_groups_can_be_left_to_the_cluster() {
    let objects = rendered("{podSecurityContext: null, trainer: {podSecurityContext: null}}");
    let context = &only(&objects, "Deployment")["spec"]["template"]["spec"]["securityContext"];
    assert_eq!(context, &json!({"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}}));
    let text = of_kind(&objects, "ConfigMap").into_iter().find_map(|map| map["data"]["config.yaml"].as_str()).expect("the configuration").to_owned();
    let settings = Settings::new(serde_yaml::from_str(&text).expect("it parses")).expect("it is valid");
    assert_eq!(settings.trainer.pod_ids(), PodIds::default());
}

#[test]
fn two_releases_of_one_name_share_no_object_of_the_cluster() {
    let names = |namespace| {
        let objects = template_in(namespace, EVERYTHING).unwrap_or_else(|error| panic!("{error}"));
        let of_cluster = |object: &&Value| object["metadata"]["namespace"].is_null() && object["kind"] != "CustomResourceDefinition";
        objects.iter().filter(of_cluster).map(|object| format!("{} {}", object["kind"], object["metadata"]["name"])).collect::<BTreeSet<_>>()
    };
    let (one, other) = (names("one"), names("other"));
    assert!(one.len() >= 9, "{one:?}");
    assert!(one.is_disjoint(&other), "{one:?} {other:?}");
}

#[test]
fn without_a_lease_an_upgrade_never_runs_two_operators() {
    let strategy = |values| only(&rendered(values), "Deployment")["spec"]["strategy"].clone();
    assert_eq!(strategy("{replicas: 1, leaderElection: {enabled: false}}"), json!({"type": "Recreate"}));
    assert_eq!(strategy(""), json!({"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}));
}

#[test]
fn operator_pods_that_are_not_ready_block_no_drain() {
    assert_eq!(only(&rendered(""), "PodDisruptionBudget")["spec"]["unhealthyPodEvictionPolicy"], "AlwaysAllow");
}

/// `tests/cluster/admission` has them evaluated.
#[test]
fn admission_policies_are_off_until_somebody_wants_them() {
    assert!(of_kind(&rendered(""), "ValidatingAdmissionPolicy").is_empty());
    let objects = rendered("admissionPolicy: {enabled: true}");
    let policy = only(&objects, "ValidatingAdmissionPolicy");
    assert_eq!(policy["spec"]["matchConditions"][0]["expression"], format!("request.userInfo.username == 'system:serviceaccount:{NAMESPACE}:{RELEASE}'"));
    assert_eq!(only(&objects, "ValidatingAdmissionPolicyBinding")["spec"]["policyName"], policy["metadata"]["name"]);
    let objects = rendered(EVERYTHING);
    let policies = of_kind(&objects, "ValidatingAdmissionPolicy");
    assert_eq!(policies.len(), 2);
    let expressions: Vec<&str> =
        policies[0]["spec"]["validations"].as_array().expect("validations").iter().filter_map(|rule| rule["expression"].as_str()).collect();
    assert!(expressions[0].contains(r#"["registry.example.com/team/"].exists("#) && expressions[1].contains(r#" in ["default","trainer"]"#), "{expressions:?}");
}

/// What a scrape may bring is bounded, and of a tenant's pod nothing but a trainer's metrics is kept.
#[test]
fn monitors_keep_names_of_ones_own_and_labels_as_they_are() {
    let objects = rendered(EVERYTHING);
    let (service, pods) = (&only(&objects, "ServiceMonitor")["spec"], &only(&objects, "PodMonitor")["spec"]);
    let (operator, trainer) = (&service["endpoints"][0], &pods["podMetricsEndpoints"][0]);
    assert_eq!((&operator["honorLabels"], &trainer["honorLabels"]), (&json!(true), &json!(false)));
    for (monitor, endpoint, regex) in [(service, operator, "finetune_.*|process_resident_memory_bytes"), (pods, trainer, "finetune_trainer_.*")] {
        assert_eq!(endpoint["metricRelabelings"], json!([{"sourceLabels": ["__name__"], "regex": regex, "action": "keep"}]));
        assert!(monitor["sampleLimit"].is_u64() && monitor["bodySizeLimit"].is_string());
    }
    assert_eq!(trainer["relabelings"][0]["action"], "keep");
}

#[test]
fn one_replica_has_no_disruption_budget() {
    assert!(of_kind(&rendered("replicas: 1"), "PodDisruptionBudget").is_empty());
}

#[test]
fn values_that_make_no_sense_are_refused() {
    for (values, complaint) in [
        ("replcas: 2", "replcas"),
        ("replicas: -1", "replicas"),
        ("leaderElection: {enabled: false}", "replicas"),
        ("image: {repository: ''}", "repository"),
        ("image: {digest: latest}", "digest"),
        ("image: {pullPolicy: Sometimes}", "pullPolicy"),
        ("defaultStorage: {endpoint: 's3.example.com'}", "endpoint"),
        ("defaultStorage: {endpoint: 'https://user:password@s3.example.com'}", "endpoint"),
        ("defaultStorage: {secret: name}", "secret"),
        ("watchNamespaces: [Team_A]", "watchNamespaces"),
        ("nodeAffinityTerms: [{computeCapability: '7.5'}]", "nodeAffinityTerms"),
        ("nodeAffinityTerms: [{memoryLabel: a, memoryMiB: 15360, computeCapability: '7.5'}]", "nodeAffinityTerms"),
        ("nodeAffinityTerms: [{memoryLabel: a, computeCapability: '7.5', matchExpressions: [{key: a, operator: Near}]}]", "nodeAffinityTerms"),
        ("operator: {concurrency: 0}", "concurrency"),
        ("networkPolicy: {apiServerPorts: []}", "apiServerPorts"),
        ("metrics: {prometheusRule: {queuedFor: soon}}", "queuedFor"),
        ("metrics: {prometheusRule: {operatorMatchers: 'job=x'}}", "operatorMatchers"),
        ("metrics: {prometheusRule: {runbookUrl: docs/runbooks.md}}", "runbookUrl"),
        ("metrics: {podMonitor: {sampleLimit: 0}}", "sampleLimit"),
        ("metrics: null", "metrics"),
        ("podSecurityContext: {runAsUser: 0}", "runAsUser"),
        ("trainer: {podSecurityContext: {privileged: true}}", "privileged"),
        ("trainer: {image: {architectures: amd64}}", "architectures"),
        ("trainer: {proxy: {https: 'http://user:password@proxy:3128'}}", "proxy"),
        ("trainer: {hubEndpoint: hub.example.com}", "hubEndpoint"),
        ("trainer: {env: [{value: x}]}", "name"),
        ("trainer: {caBundleConfigMapRef: {key: ca.crt}}", "caBundleConfigMapRef"),
        ("admissionPolicy: {allowedImages: [registry.example.com/team]}", "allowedImages"),
        ("nameOverride: Bad Name", "nameOverride"),
        ("podDisruptionBudget: {minAvailable: 2}", "minAvailable (2) must be less than replicas (2)"),
        ("podDisruptionBudget: {minAvailable: 100%}", "minAvailable"),
        ("defaultStorage: {credentials: {secretRef: {name: ''}}}", "name"),
        ("operator: {logLevel: finetune=verbose}", "logLevel"),
    ] {
        match template(values) {
            Ok(_) => panic!("{values} was accepted"),
            Err(said) => assert!(said.contains(complaint), "{values}: {said}"),
        }
    }
    rendered("{replicas: 1, leaderElection: {enabled: false}}");
}

#[test]
fn a_cluster_that_is_too_old_is_refused() {
    let said = helm(&["template", RELEASE, &chart(), "--kube-version", "1.32.9"]).expect_err("1.32 is too old");
    assert!(said.contains("1.33"), "{said}");
}

/// Names of metrics in queries: words that begin with `finetune_`, without the suffixes of histograms.
fn metric_names(text: &str) -> BTreeSet<String> {
    text.split(|character: char| !(character.is_ascii_alphanumeric() || character == '_'))
        .filter(|word| word.starts_with("finetune_"))
        .map(|word| word.trim_end_matches("_bucket").to_owned())
        .collect()
}

/// All Rust text below a folder.
fn sources(folder: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).expect("the folder is there").filter_map(Result::ok) {
        let path = entry.path();
        if path.is_dir() {
            text.push_str(&sources(&path));
        } else {
            text.push_str(&std::fs::read_to_string(&path).expect("the source is read"));
        }
    }
    text
}

/// The trainer's metrics, which its source lists as rows of `("name", "gauge" or "counter", "help", value)`.
fn trainer_metrics(source: &str) -> Vec<String> {
    let kinds = [r#"", "gauge", ""#, r#"", "counter", ""#];
    let row = |line: &str| kinds.iter().find_map(|kind| line.trim().strip_prefix("(\"")?.split_once(kind).map(|(name, _)| format!("finetune_trainer_{name}")));
    source.lines().filter_map(row).collect()
}

#[test]
fn dashboard_and_alerts_ask_for_metrics_that_exist() {
    let objects = rendered(EVERYTHING);
    let dashboard = of_kind(&objects, "ConfigMap").into_iter().find_map(|map| map["data"]["finetune.json"].as_str()).expect("the dashboard");
    serde_json::from_str::<Value>(dashboard).expect("the dashboard is JSON");
    let rules: Vec<&str> = only(&objects, "PrometheusRule")["spec"]["groups"][0]["rules"]
        .as_array()
        .expect("rules")
        .iter()
        .map(|rule| rule["expr"].as_str().expect("an expression"))
        .collect();
    let asked: BTreeSet<String> = metric_names(dashboard).union(&metric_names(&rules.join("\n"))).cloned().collect();
    let asked: BTreeSet<String> = asked.into_iter().filter(|name| name != "finetune_operator").collect();

    let mut known = metric_names(&sources(&repository().join("src/operator/src")));
    known.extend(trainer_metrics(&sources(&repository().join("src/train/src"))));
    let unknown: Vec<&String> = asked.iter().filter(|name| !known.contains(*name) && !known.contains(name.trim_end_matches("_total"))).collect();
    assert!(unknown.is_empty(), "nobody serves {unknown:?}");
}

#[test]
fn the_readme_names_every_value() {
    let readme = std::fs::read_to_string(repository().join("charts/finetune-operator/README.md")).expect("the chart's README");
    let values: Value =
        serde_yaml::from_str(&std::fs::read_to_string(repository().join("charts/finetune-operator/values.yaml")).expect("values")).expect("values parse");
    for (name, value) in values.as_object().expect("a map") {
        assert!(readme.contains(&format!("`{name}")), "README.md does not name {name}");
        let Some(fields) = value.as_object().filter(|_| !["resources", "defaultStorage"].contains(&name.as_str())) else { continue };
        for field in fields.keys() {
            let full = format!("`{name}.{field}");
            let short = format!("`.{field}`");
            assert!(readme.contains(&full) || readme.contains(&short), "README.md does not name {name}.{field}");
        }
    }
}

#[test]
fn chart_and_crate_have_one_version() {
    let chart: Value =
        serde_yaml::from_str(&std::fs::read_to_string(repository().join("charts/finetune-operator/Chart.yaml")).expect("Chart.yaml")).expect("it parses");
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}
