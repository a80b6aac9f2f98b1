//! The chart's life on a real cluster: what the API server thinks of its objects, upgrade, rollback, removal.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::jobs::micro;
use crate::support::stage::{LONG, NAMESPACES, RELEASE, SHORT, SYSTEM, install, stage, values};
use finetune_testing::kubernetes;
use finetune_testing::programs::{cluster, helm, kubectl, kubectl_with_input, repository};

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn the_api_server_accepts_every_object_of_the_chart() {
    let stage = stage("e2e-lifecycle").await;
    let crds = cluster(&["monitoring-crds"]);
    for kind in ["servicemonitors", "podmonitors", "prometheusrules"] {
        let file = Path::new(crds.trim()).join(format!("monitoring.coreos.com_{kind}.yaml"));
        kubernetes::install_crds(&file, &[&format!("{kind}.monitoring.coreos.com")]).await;
    }
    let on = json!({"enabled": true});
    let everything = json!({
        "networkPolicy": {"enabled": true, "metricsFrom": [{"namespaceSelector": {}}], "apiServerCIDRs": ["10.99.0.0/24"]},
        "metrics": {"dashboard": on, "serviceMonitor": on, "podMonitor": on, "prometheusRule": on},
        "operator": {"allowTtlScopeAll": true},
        "leaderElection": {"flowSchema": true},
        "admissionPolicy": {"enabled": true, "allowedImages": ["localhost/"], "allowedServiceAccounts": ["default"]},
    });
    let dry_run =
        |manifests: &str| kubectl_with_input(&["apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-"], manifests);
    for namespaces in [&NAMESPACES[..], &[]] {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("values.yaml");
        std::fs::write(&file, values(stage.site, namespaces, &everything).to_string()).expect("values");
        let chart = repository().join("charts/finetune-operator").display().to_string();
        let rendered = helm(&["template", RELEASE, &chart, "-n", SYSTEM, "-f", &file.display().to_string()]).unwrap_or_else(|error| panic!("{error}"));
        let said = dry_run(&rendered).unwrap_or_else(|error| panic!("{error}"));
        let monitors = ["servicemonitor", "podmonitor", "prometheusrule"];
        let others = [
            "networkpolicy",
            "flowschema",
            "validatingadmissionpolicy",
            "deployment",
            "poddisruptionbudget",
            "customresourcedefinition",
            "configmap/finetune-operator-dashboard",
        ];
        for kind in monitors.into_iter().chain(others) {
            assert!(said.contains(kind), "{kind}: {said}");
        }
        // The schemas are looked at: what they do not know is refused.
        for (field, wrong) in
            [("podMetricsEndpoints:", "podMetricsEndpoint:"), ("  endpoints:", "  endpoint:"), ("expr:", "expression:"), ("podSelector:", "podSelecter:")]
        {
            let broken = rendered.replacen(field, wrong, 1);
            assert_ne!(broken, rendered, "{field}");
            let said = dry_run(&broken).expect_err("a misspelt field");
            assert!(said.contains(wrong.trim().trim_end_matches(':')), "{said}");
        }
    }
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn the_operator_may_do_what_it_needs_and_cannot_read_secrets() {
    let stage = stage("e2e-lifecycle").await;
    let operator = format!("system:serviceaccount:{SYSTEM}:{RELEASE}");
    let may = |verb: &str, resource: &str, namespace: &str| {
        let (resource, sub) = resource.split_once('/').unwrap_or((resource, ""));
        let sub = format!("--subresource={sub}");
        let answer = kubectl(&["auth", "can-i", verb, resource, &sub, "-n", namespace, "--as", &operator]);
        answer.is_ok_and(|answer| answer.trim() == "yes")
    };
    assert!(may("create", "jobs.batch", stage.namespace));
    assert!(may("patch", "finetunejobs.finetune.dev/status", stage.namespace));
    for (verb, resource) in [
        ("get", "secrets"),
        ("list", "secrets"),
        ("update", "finetunejobs.finetune.dev"),
        ("patch", "finetunejobs.finetune.dev"),
        ("create", "pods"),
        ("get", "pods/log"),
        ("create", "pods/exec"),
        ("delete", "pods"),
        ("get", "serviceaccounts"),
        ("get", "configmaps"),
        ("create", "configmaps"),
    ] {
        assert!(!may(verb, resource, stage.namespace), "the operator may {verb} {resource}");
    }
    assert!(!may("list", "jobs.batch", "default"), "only the watched namespaces");
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn upgrade_rollback_and_removal_leave_jobs_alone() {
    let stage = stage("e2e-lifecycle").await;
    stage.submit(&micro(stage.namespace, "lasting", 3000, &json!({}))).await;
    stage.until_step("lasting", 1).await;
    let pod = stage.pods("lasting").await.remove(0);

    install(stage.site, &NAMESPACES, &json!({"podAnnotations": {"upgraded": "yes"}}));
    let annotation = |pods: &[Value]| pods.iter().filter(|pod| pod["metadata"]["annotations"]["upgraded"] == "yes").count();
    let operators = || async { kubernetes::list(&stage.client, "Pod", SYSTEM, &format!("app.kubernetes.io/instance={RELEASE}")).await };
    stage.until("both operators to be new", SHORT, || async { (annotation(&operators().await) == 2).then_some(()) }).await;
    helm(&["rollback", RELEASE, "-n", SYSTEM, "--wait", "--timeout", "120s"]).unwrap_or_else(|error| panic!("{error}"));
    stage.until("both operators to be old again", SHORT, || async { (annotation(&operators().await) == 0).then_some(()) }).await;

    helm(&["uninstall", RELEASE, "-n", SYSTEM, "--wait"]).unwrap_or_else(|error| panic!("{error}"));
    assert!(kubernetes::get(&stage.client, "CustomResourceDefinition", "", "finetunejobs.finetune.dev").await.is_some(), "the CRD stays");
    stage.job("lasting").await;
    let now = stage.pods("lasting").await.remove(0);
    assert_eq!(now["metadata"]["uid"], pod["metadata"]["uid"], "training was not touched");

    install(stage.site, &NAMESPACES, &json!({}));
    let done = stage.until_true("lasting", "Complete", LONG).await;
    assert_eq!(done["status"]["attempts"]["started"], 1);
    assert_eq!(stage.list("Job").await.len(), 1);
}
