//! The chart's ValidatingAdmissionPolicies, evaluated by the API server: which images and service accounts a job may name, and what the operator's own
//! service account may create.

use std::time::Duration;

use serde_json::{Value, json};

use super::fixture::{NAMESPACE, at, cluster, job, merge};
use finetune_testing::kubernetes;
use finetune_testing::programs::{helm, kubectl, kubectl_with_input, repository};

const VALUES: &str = r#"
admissionPolicy: {enabled: true, allowedImages: [registry.example.com/team/], allowedServiceAccounts: [default, trainer]}
watchNamespaces: [admission]
"#;
const OPERATOR: &str = "system:serviceaccount:finetune-system:finetune-operator";

/// Applies something, and takes it away at the end of the test.
struct Applied(String);

impl Applied {
    fn new(manifests: String) -> Self {
        kubectl_with_input(&["apply", "--server-side", "--force-conflicts", "--validate=strict", "-f", "-"], &manifests)
            .unwrap_or_else(|error| panic!("{error}"));
        Self(manifests)
    }
}

impl Drop for Applied {
    fn drop(&mut self) {
        let _gone_already = kubectl_with_input(&["delete", "--ignore-not-found", "--wait=false", "-f", "-"], &self.0);
    }
}

fn policies() -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("values.yaml");
    std::fs::write(&file, VALUES).expect("values");
    let chart = repository().join("charts/finetune-operator").display().to_string();
    let file = file.display().to_string();
    helm(&["template", "finetune-operator", &chart, "-n", "finetune-system", "-s", "templates/admissionpolicy.yaml", "-f", &file])
        .unwrap_or_else(|error| panic!("{error}"))
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn jobs_may_name_the_images_and_service_accounts_that_are_allowed_and_no_others() {
    let client = cluster().await;
    kubernetes::delete(&client, "FineTuneJob", NAMESPACE, "older").await;
    let mut older = job("older");
    merge(&mut older, &at("spec.image", json!("docker.io/other:1")));
    kubernetes::create(&client, &older, false).await.expect("there is no policy yet");
    let _policies = Applied::new(policies());

    let answer = |change: Value| {
        let mut wanted = job("named");
        merge(&mut wanted, &at("spec", change));
        let client = client.clone();
        async move { kubernetes::create(&client, &wanted, true).await.map(drop).map_err(|error| error.to_string()) }
    };
    // The API server takes a new policy into account a little later.
    kubernetes::eventually("the policy to be in force", Duration::from_secs(30), || async { answer(json!({"image": "docker.io/other:1"})).await.err() }).await;
    for (change, complaint) in [
        (json!({"image": "docker.io/other:1"}), "spec.image must begin with one of: registry.example.com/team/"),
        (json!({"image": "registry.example.com/team-of-others/trainer:1"}), "spec.image must begin"),
        (json!({"serviceAccountName": "admin"}), "spec.serviceAccountName must be one of: default, trainer"),
    ] {
        let said = answer(change.clone()).await.expect_err("it is refused");
        assert!(said.contains(complaint), "{change}: {said}");
    }
    for change in [json!({}), json!({"image": "registry.example.com/team/trainer:1"}), json!({"serviceAccountName": "trainer"})] {
        answer(change.clone()).await.unwrap_or_else(|error| panic!("{change}: {error}"));
    }

    // What is there may be suspended, but not given another image that is not allowed.
    let client = &client;
    let patch = |change: Value| async move { kubernetes::patch(client, "FineTuneJob", NAMESPACE, "older", &change, false).await };
    patch(json!({"spec": {"suspend": true}})).await.map_err(|error| error.to_string()).map(drop).expect("it may be suspended");
    let said = patch(json!({"spec": {"image": "docker.io/other:2"}})).await.expect_err("another image").to_string();
    assert!(said.contains("spec.image must begin"), "{said}");
    kubernetes::delete(client, "FineTuneJob", NAMESPACE, "older").await;
}

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn the_operators_account_may_create_jobs_of_finetunejobs_only() {
    let _client = cluster().await;
    let _policies = Applied::new(policies());
    // As the chart's role does, and more: what follows is the policy's own refusal.
    let _rights = Applied::new(
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "admission-test-operator"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [{"kind": "User", "name": OPERATOR, "apiGroup": "rbac.authorization.k8s.io"}],
        })
        .to_string(),
    );
    let create = |owners: Value, who: Option<&str>| {
        let pod = json!({"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]});
        let object = json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "policy", "namespace": NAMESPACE, "ownerReferences": owners},
            "spec": {"template": {"spec": pod}},
        });
        let mut args = vec!["create", "--dry-run=server", "-f", "-"];
        args.extend(who.map(|_| "--as"));
        args.extend(who);
        kubectl_with_input(&args, &object.to_string())
    };
    let owner = |api: &str, kind: &str, controller: bool| json!([{"apiVersion": api, "kind": kind, "name": "a", "uid": "u", "controller": controller}]);
    kubernetes::eventually("the policy to be in force", Duration::from_secs(30), || async {
        create(json!([]), Some(OPERATOR)).err().filter(|said| said.contains("only create"))
    })
    .await;
    for refused in [owner("apps/v1", "Deployment", true), owner("finetune.dev/v1alpha1", "FineTuneJob", false)] {
        let said = create(refused.clone(), Some(OPERATOR)).expect_err("it is refused");
        assert!(said.contains("finetune-operator may only create Jobs that a FineTuneJob controls"), "{refused}: {said}");
    }
    create(owner("finetune.dev/v1alpha1", "FineTuneJob", true), Some(OPERATOR)).unwrap_or_else(|error| panic!("{error}"));
    create(json!([]), None).unwrap_or_else(|error| panic!("others create what they like: {error}"));
    let said = kubectl(&["get", "validatingadmissionpolicies", "-o", "jsonpath={.items[*].status.typeChecking.expressionWarnings}"]);
    assert_eq!(said.expect("an answer").trim(), "", "the API server's type checker has nothing to say");
}
