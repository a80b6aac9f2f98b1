//! What the tests share: an operator in this process, a stand-in for the kubelet, a job.

use std::sync::Arc;
use std::time::Duration;

use finetune_operator::controller::context::FaultHook;
use finetune_operator::run::{Election, Options, run};
use finetune_operator::settings::{ConfigFile, Settings};
use finetune_operator::telemetry::metrics::Metrics;
use kube::Client;
use kube::api::{Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use finetune_testing::kubernetes;
use finetune_testing::programs::{kubeconfig, kubectl, kubectl_with_input, repository};

/// Longest wait for anything that should happen within a second or two.
pub(crate) const SOON: Duration = Duration::from_mins(1);

/// A namespace of its own with an API client.
pub(crate) struct Stage {
    /// As the cluster's admin.
    pub(crate) client: Client,
    /// Where the test's objects are.
    pub(crate) namespace: String,
}

/// An operator in this process.
pub(crate) struct Operator {
    /// Its counters.
    pub(crate) metrics: Arc<Metrics>,
    task: JoinHandle<Result<(), finetune_operator::run::RunError>>,
    stop: Option<oneshot::Sender<()>>,
}

impl Stage {
    /// An empty namespace called `name`.
    pub(crate) async fn new(name: &str) -> Self {
        let client = kubernetes::client().await;
        kubernetes::install_crds(&repository().join("crds/finetune.dev_finetunejobs.yaml"), &["finetunejobs.finetune.dev"]).await;
        let namespace = format!("controller-{name}");
        let _was_not_there = kubectl(&["delete", "namespace", &namespace, "--wait", "--timeout=60s"]);
        kubernetes::namespace(&client, &namespace).await;
        Self { client, namespace }
    }

    /// Starts an operator that watches this namespace alone.
    pub(crate) async fn operator(&self) -> Operator {
        self.operator_with(|_| {}).await
    }

    /// Starts an operator with changed options.
    pub(crate) async fn operator_with(&self, change: impl FnOnce(&mut Options)) -> Operator {
        let file: ConfigFile =
            serde_json::from_value(json!({"trainer": {"image": "localhost/trainer:test", "imagePullPolicy": "Never"}})).expect("a configuration");
        let mut settings = Settings::new(file).expect("valid settings");
        settings.progress_interval = Duration::from_secs(5);
        let mut options = Options {
            settings,
            namespaces: vec![self.namespace.clone()],
            concurrency: 8,
            poll_interval: Duration::from_secs(2),
            address: ([127, 0, 0, 1], 0).into(),
            metrics_address: None,
            election: None,
            instance: Some("test".to_owned()),
            watch_nodes: false,
            faults: FaultHook::default(),
        };
        change(&mut options);
        let kubeconfig = Kubeconfig::read_from(kubeconfig()).expect("a kubeconfig");
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("a usable kubeconfig");
        let metrics = Arc::new(Metrics::new());
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(run(config, options, Arc::clone(&metrics), async move {
            let _dropped = stopped.await;
        }));
        Operator { metrics, task, stop: Some(stop) }
    }

    /// An election of this stage for a candidate called `identity`.
    pub(crate) fn election(&self, identity: &str) -> Election {
        let intervals = finetune_operator::controller::lease::Intervals {
            duration: Duration::from_secs(4),
            renew_deadline: Duration::from_secs(3),
            retry: Duration::from_millis(500),
        };
        Election { namespace: self.namespace.clone(), name: "operator".to_owned(), identity: identity.to_owned(), intervals }
    }

    /// Creates a job whose pods no scheduler binds and no kubelet runs.
    pub(crate) async fn create(&self, name: &str, change: impl FnOnce(&mut Value)) -> Value {
        let mut job = json!({
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {
                "model": {"source": {"objectStore": {"uri": "s3://models/sd3/"}}},
                "dataset": {"uri": "s3://bucket/data/"},
                "output": {"uri": "s3://bucket/loras/corgi/"},
                "training": {"maxSteps": 100},
                "scheduling": {"schedulerName": "nobody"},
            },
        });
        change(&mut job);
        kubernetes::create(&self.client, &job, false).await.expect("a valid job")
    }

    /// The FineTuneJob.
    pub(crate) async fn get(&self, name: &str) -> Value {
        kubernetes::get(&self.client, "FineTuneJob", &self.namespace, name).await.unwrap_or_else(|| panic!("the FineTuneJob {name} is gone"))
    }

    /// The Job of the FineTuneJob, unless it is being deleted.
    pub(crate) async fn job(&self, name: &str) -> Option<Value> {
        kubernetes::get(&self.client, "Job", &self.namespace, &format!("{name}-train")).await.filter(|job| job["metadata"]["deletionTimestamp"].is_null())
    }

    /// Changes the FineTuneJob.
    pub(crate) async fn patch(&self, name: &str, change: &Value) {
        kubernetes::patch(&self.client, "FineTuneJob", &self.namespace, name, change, false).await.expect("a valid change");
    }

    /// Waits until the FineTuneJob satisfies `check`; on failure shows what it was.
    pub(crate) async fn until(&self, name: &str, what: &str, check: impl Fn(&Value) -> bool) -> Value {
        let began = std::time::Instant::now();
        loop {
            let job = self.get(name).await;
            if check(&job) {
                return job;
            }
            assert!(began.elapsed() < SOON, "waited in vain for {what}: {:#}", job["status"]);
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    }

    /// Waits for a condition with that status and reason.
    pub(crate) async fn condition(&self, name: &str, type_: &str, status: &str, reason: &str) -> Value {
        self.until(name, &format!("{type_}={status}/{reason}"), |job| kubernetes::condition(job, type_).is_some_and(|(s, r, _)| s == status && r == reason))
            .await
    }

    /// The pods of the FineTuneJob that have not ended, oldest first.
    pub(crate) async fn live_pods(&self, name: &str) -> Vec<Value> {
        let pods = kubernetes::list(&self.client, "Pod", &self.namespace, &format!("finetune.dev/job={name}")).await;
        pods.into_iter().filter(|pod| !matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))).collect()
    }

    /// Waits for the next pod: the only one that has not ended, and not the one called `before`.
    pub(crate) async fn pod(&self, name: &str, before: Option<&str>) -> String {
        kubernetes::eventually("a pod", SOON, || async {
            let pods = self.live_pods(name).await;
            assert!(pods.len() <= 1, "two pods of one job at once: {pods:#?}");
            let pod = pods.first()?["metadata"]["name"].as_str()?.to_owned();
            (Some(pod.as_str()) != before).then_some(pod)
        })
        .await
    }

    /// As the scheduler: the pod has a node, so that it is given time to end. There is no such node, nor a kubelet.
    pub(crate) async fn bind(&self, pod: &str) {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("{}-nowhere", self.namespace)}});
        if kubernetes::get(&self.client, "Node", "", &format!("{}-nowhere", self.namespace)).await.is_none() {
            kubernetes::create(&self.client, &node, false).await.expect("a node");
        }
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod, "namespace": self.namespace},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node["metadata"]["name"]},
        });
        kubectl_with_input(&["create", "-f", "-"], &binding.to_string()).expect("a binding");
    }

    /// As the kubelet: nothing is left of the pod.
    pub(crate) async fn remove(&self, pod: &str) {
        let now = kube::api::DeleteParams::default().grace_period(0);
        let _gone_already = kubernetes::api(&self.client, "Pod", &self.namespace).delete(pod, &now).await;
    }

    /// As the kubelet: the trainer runs.
    pub(crate) async fn start(&self, pod: &str) {
        let state = json!({"running": {"startedAt": now()}});
        self.pod_status(pod, "Running", &state, &json!([])).await;
    }

    /// The same, at an address.
    pub(crate) async fn start_at(&self, pod: &str, address: &str) {
        let status = json!({"status": {"podIP": address, "podIPs": [{"ip": address}]}});
        let pods = kubernetes::api(&self.client, "Pod", &self.namespace);
        pods.patch_status(pod, &PatchParams::default(), &Patch::Merge(&status)).await.expect("the API server takes the address");
        self.start(pod).await;
    }

    /// As the kubelet: the trainer has ended with `code` and `message`.
    pub(crate) async fn finish(&self, pod: &str, code: i32, reason: &str, message: &str) {
        let state = json!({"terminated": {"exitCode": code, "reason": reason, "message": message, "startedAt": now(), "finishedAt": now()}});
        self.pod_status(pod, if code == 0 { "Succeeded" } else { "Failed" }, &state, &json!([])).await;
    }

    /// As a drain: the pod is disrupted.
    pub(crate) async fn disrupt(&self, pod: &str) {
        let state = json!({"terminated": {"exitCode": 143, "reason": "Error", "startedAt": now(), "finishedAt": now()}});
        let condition = json!([{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "lastTransitionTime": now()}]);
        self.pod_status(pod, "Failed", &state, &condition).await;
    }

    async fn pod_status(&self, pod: &str, phase: &str, state: &Value, conditions: &Value) {
        let container = json!({"name": "trainer", "image": "localhost/trainer:test", "imageID": "", "ready": false, "restartCount": 0, "state": state});
        let status = json!({"status": {"phase": phase, "conditions": conditions, "containerStatuses": [container]}});
        kubernetes::api(&self.client, "Pod", &self.namespace)
            .patch_status(pod, &PatchParams::default(), &Patch::Strategic(&status))
            .await
            .expect("the API server takes the status");
    }

    /// UIDs of all Jobs that were ever created for the FineTuneJob, by its attempts and the present one.
    pub(crate) async fn job_uid(&self, name: &str) -> Option<String> {
        Some(self.job(name).await?["metadata"]["uid"].as_str()?.to_owned())
    }
}

impl Operator {
    /// Ends it as SIGTERM does, and waits.
    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        self.task.await.expect("the operator does not panic").expect("a clean end");
    }

    /// Ends it at once, as SIGKILL does.
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _aborted = self.task.await;
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// A counter's sum over all series whose line contains all of `parts`.
    pub(crate) fn count(&self, parts: &[&str]) -> u64 {
        let text = self.metrics.encode().expect("metrics");
        let lines = text.lines().filter(|line| !line.starts_with('#') && parts.iter().all(|part| line.contains(part)));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
    }

    /// Requests that change something, without events.
    pub(crate) fn writes(&self) -> u64 {
        ["create", "update", "patch", "delete"].iter().map(|verb| self.count(&["finetune_apiserver_requests_total{", &format!("verb=\"{verb}\"")])).sum()
    }
}

/// Where [`serve_progress`] serves.
pub(crate) const TRAINER: &str = "127.0.0.1";

/// Answers as a trainer that trains, on the port that the operator asks.
pub(crate) async fn serve_progress() {
    let body = json!({"stage": "Training", "step": 10, "totalSteps": 100, "loss": 0.5}).to_string();
    let listener = tokio::net::TcpListener::bind((TRAINER, finetune_api::PROGRESS_PORT)).await.expect("the port of trainers is free");
    let router = axum::Router::new().route("/progress", axum::routing::get(move || std::future::ready(body.clone())));
    tokio::spawn(async move { axum::serve(listener, router).await.expect("it serves") });
}

/// The termination message of a trainer that has published a LoRA.
pub(crate) fn success() -> String {
    let digest = format!("sha256:{}", "a1".repeat(32));
    json!({
        "stage": "Finished", "step": 100, "totalSteps": 100, "loss": 0.125, "datasetDigest": digest, "specHash": digest,
        "lastCheckpoint": {"step": 100, "uri": "s3://bucket/loras/corgi/.checkpoints/x/step-000100/", "sha256": digest, "time": "2026-08-24T10:00:00Z"},
        "artifacts": [{"format": "Diffusers", "uri": "s3://bucket/loras/corgi/pytorch_lora_weights.safetensors", "sha256": digest, "sizeBytes": 1234}],
        "result": {},
    })
    .to_string()
}

/// The termination message of a trainer that has failed.
pub(crate) fn failure(reason: &str, exit_code: i32, message: &str) -> String {
    json!({"stage": "Finished", "step": 7, "totalSteps": 100, "result": {"failure": {"reason": reason, "exitCode": exit_code, "message": message}}}).to_string()
}

fn now() -> String {
    let now = jiff::Timestamp::now();
    jiff::Timestamp::from_second(now.as_second()).expect("a time").to_string()
}
