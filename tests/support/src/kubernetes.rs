//! A cluster's API for tests: objects, namespaces, waiting.
//!
//! The cluster is the one that `KUBECONFIG` names, else the one that `tests/testbed/cluster up` started.

use std::future::Future;
use std::time::{Duration, Instant};

use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Config};
use serde_json::{Value, json};

use crate::programs;

/// Field manager of the tests' own writes.
pub const MANAGER: &str = "tests";

/// A client for the test cluster.
pub async fn client() -> Client {
    // A second installation is refused; the first one is the same.
    let _already_installed = rustls::crypto::ring::default_provider().install_default();
    let path = programs::kubeconfig();
    let kubeconfig = Kubeconfig::read_from(&path).unwrap_or_else(|error| panic!("no cluster ({}: {error}): run `make cluster-up`", path.display()));
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("a usable kubeconfig");
    config.default_retry = false;
    Client::try_from(config).expect("a client")
}

/// The API of `kind`, in `namespace` or (for "") of the whole cluster.
pub fn api(client: &Client, kind: &str, namespace: &str) -> Api<DynamicObject> {
    let (group, version, plural) = match kind {
        "FineTuneJob" => ("finetune.dev", "v1alpha1", "finetunejobs"),
        "Job" => ("batch", "v1", "jobs"),
        "Deployment" => ("apps", "v1", "deployments"),
        "Lease" => ("coordination.k8s.io", "v1", "leases"),
        "Event" => ("events.k8s.io", "v1", "events"),
        "CustomResourceDefinition" => ("apiextensions.k8s.io", "v1", "customresourcedefinitions"),
        "Pod" => ("", "v1", "pods"),
        "ConfigMap" => ("", "v1", "configmaps"),
        "Namespace" => ("", "v1", "namespaces"),
        "Node" => ("", "v1", "nodes"),
        "ResourceQuota" => ("", "v1", "resourcequotas"),
        "LimitRange" => ("", "v1", "limitranges"),
        "Secret" => ("", "v1", "secrets"),
        "Workload" => ("kueue.x-k8s.io", "v1beta2", "workloads"),
        other => panic!("kubernetes::api does not know {other}"),
    };
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
    if namespace.is_empty() { Api::all_with(client.clone(), &resource) } else { Api::namespaced_with(client.clone(), namespace, &resource) }
}

/// An object as the API server has it.
pub async fn get(client: &Client, kind: &str, namespace: &str, name: &str) -> Option<Value> {
    api(client, kind, namespace).get_opt(name).await.expect("the API server answers").map(|object| serde_json::to_value(object).expect("an object is JSON"))
}

/// All objects that match a label selector ("" for all).
pub async fn list(client: &Client, kind: &str, namespace: &str, selector: &str) -> Vec<Value> {
    let found = api(client, kind, namespace).list(&ListParams::default().labels(selector)).await.expect("the API server answers");
    found.items.into_iter().map(|object| serde_json::to_value(object).expect("an object is JSON")).collect()
}

/// Creates an object; the error is the API server's answer.
pub async fn create(client: &Client, object: &Value, dry_run: bool) -> Result<Value, kube::Error> {
    let object: DynamicObject = serde_json::from_value(object.clone()).expect("a Kubernetes object");
    let kind = object.types.as_ref().expect("a kind").kind.clone();
    let namespace = object.metadata.namespace.clone().unwrap_or_default();
    let params = PostParams { dry_run, field_manager: Some(MANAGER.to_owned()) };
    let created = api(client, &kind, &namespace).create(&params, &object).await?;
    Ok(serde_json::to_value(created).expect("an object is JSON"))
}

/// Changes an object by a merge patch; the error is the API server's answer.
pub async fn patch(client: &Client, kind: &str, namespace: &str, name: &str, change: &Value, dry_run: bool) -> Result<Value, kube::Error> {
    let params = PatchParams { dry_run, ..PatchParams::default() };
    let changed = api(client, kind, namespace).patch(name, &params, &Patch::Merge(change)).await?;
    Ok(serde_json::to_value(changed).expect("an object is JSON"))
}

/// Deletes an object; one that is gone already is fine.
pub async fn delete(client: &Client, kind: &str, namespace: &str, name: &str) {
    match api(client, kind, namespace).delete(name, &DeleteParams::background()).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.is_not_found() => {}
        Err(error) => panic!("failed to delete {kind} {namespace}/{name}: {error}"),
    }
}

/// Makes a namespace that enforces the restricted Pod Security Standard, unless it is there.
pub async fn namespace(client: &Client, name: &str) {
    let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
    let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
    match create(client, &object, false).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.is_already_exists() => {}
        Err(error) => panic!("failed to create the namespace {name}: {error}"),
    }
    eventually("the namespace's service account", Duration::from_secs(30), || async {
        programs::kubectl(&["-n", name, "get", "serviceaccount", "default"]).ok().map(|_| ())
    })
    .await;
}

/// Installs CRDs from a file and waits until the API server serves those called `names`.
pub async fn install_crds(file: &std::path::Path, names: &[&str]) {
    let file = file.display().to_string();
    programs::kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &file]).unwrap_or_else(|error| panic!("{error}"));
    for name in names {
        // kubectl wait fails while a CRD has no conditions at all.
        let served = || async { programs::kubectl(&["wait", "--for=condition=Established", "--timeout=5s", &format!("crd/{name}")]).ok() };
        eventually(&format!("the CRD {name}"), Duration::from_mins(1), served).await;
    }
}

/// Repeats `check` until it answers `Some`, and fails the test after `timeout`.
pub async fn eventually<T, F, Fut>(what: &str, timeout: Duration, mut check: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let began = Instant::now();
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(began.elapsed() < timeout, "waited {timeout:?} in vain for {what}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The condition `kind` of an object's status: (status, reason, message).
pub fn condition(object: &Value, kind: &str) -> Option<(String, String, String)> {
    let found = object["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)?;
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason"), text("message")))
}

/// Whether the condition `kind` is True.
pub fn is_true(object: &Value, kind: &str) -> bool {
    condition(object, kind).is_some_and(|(status, _, _)| status == "True")
}
