//! What every test needs, made once: bucket with a model and a dataset, image on the nodes, chart installed.

use std::fmt::Write as _;
use std::future::Future;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use kube::Client;
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard, OnceCell};

use finetune_testing::kubernetes::{self, condition};
use finetune_testing::programs::{self, cluster, helm, kubectl, repository};
use finetune_testing::s3::{ACCESS_KEY, S3, SECRET_KEY};

/// Namespace of the operator.
pub(crate) const SYSTEM: &str = "finetune-system";
/// Helm release, and name of the operator's Deployment.
pub(crate) const RELEASE: &str = "finetune-operator";
/// The namespaces that the operator watches: one for each test.
pub(crate) const NAMESPACES: [&str; 8] =
    ["e2e-quickstart", "e2e-eviction", "e2e-operator-kill", "e2e-bad-dataset", "e2e-queue", "e2e-gitops", "e2e-lifecycle", "e2e-faults"];
/// Bucket with the model and the dataset of [`super::jobs::micro`].
pub(crate) const BUCKET: &str = "micro";

/// Until when a job of the small model must be done on a busy machine.
pub(crate) const LONG: Duration = Duration::from_mins(10);
/// Until when the operator must have reacted.
pub(crate) const SHORT: Duration = Duration::from_mins(1);

/// What all tests share.
pub(crate) struct Site {
    /// The object store.
    pub s3: Mutex<S3>,
    /// Its address, for pods and for this machine.
    pub endpoint: String,
    /// Name of the image on the nodes.
    pub image: String,
}

static SITE: OnceCell<Site> = OnceCell::const_new();
static TURN: Mutex<()> = Mutex::const_new(());

/// One test's turn: nobody else uses the GPU until it is dropped.
pub(crate) struct Stage {
    /// A client of this test's runtime.
    pub client: Client,
    /// What all tests share.
    pub site: &'static Site,
    /// The test's namespace.
    pub namespace: &'static str,
    _turn: MutexGuard<'static, ()>,
}

/// Waits for this test's turn and prepares an empty namespace.
pub(crate) async fn stage(namespace: &'static str) -> Stage {
    let turn = TURN.lock().await;
    let client = kubernetes::client().await;
    let site = SITE.get_or_init(|| prepare(&client)).await;
    let stage = Stage { client, site, namespace, _turn: turn };
    stage.clear().await;
    stage
}

async fn prepare(client: &Client) -> Site {
    let began = Instant::now();
    let s3 = S3::start().await;
    s3.upload(BUCKET, &repository().join("tests/fixtures/micro-sd3"), "model/").await;
    s3.upload(BUCKET, &repository().join("tests/fixtures/dataset"), "dataset/").await;
    for namespace in NAMESPACES {
        kubernetes::namespace(client, namespace).await;
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "storage", "namespace": namespace},
            "stringData": {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
        });
        kubernetes::delete(client, "Secret", namespace, "storage").await;
        kubernetes::create(client, &secret, false).await.expect("a secret");
    }
    let image = image();
    let site = Site { endpoint: s3.endpoint.clone(), s3: Mutex::new(s3), image };
    install(&site, &NAMESPACES, &json!({}));
    eprintln!("prepared bucket, image and chart in {:.1?}", began.elapsed());
    site
}

/// The image of the binary under test, on every node. `FINETUNE_TEST_IMAGE` names one that the cluster can pull instead.
fn image() -> String {
    if let Ok(image) = std::env::var("FINETUNE_TEST_IMAGE") {
        return image;
    }
    let binary = env!("CARGO_BIN_EXE_finetune");
    let folder = tempfile::tempdir().expect("a folder");
    let archive = folder.path().join("image.tar");
    // The tag distinguishes versions: a pod template with the same tag would not be rolled out again.
    let bytes = std::fs::read(binary).expect("the binary under test");
    let tag = hex::encode(&finetune_common::digest::sha256(&bytes)[..6]);
    let name = format!("localhost/finetune:{tag}");
    programs::run(Command::new(repository().join("tests/testbed/image")).arg(binary).arg(&name).arg(&archive)).unwrap_or_else(|error| panic!("{error}"));
    cluster(&["load", &archive.display().to_string()]);
    name
}

/// The chart's values for these tests.
pub(crate) fn values(site: &Site, namespaces: &[&str], more: &Value) -> Value {
    let (repository, tag) = site.image.rsplit_once(':').expect("an image with a tag");
    let image = json!({"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"});
    let mut values = json!({
        "image": image,
        "trainer": {"image": image, "allowCpuFallback": true},
        "defaultStorage": {"endpoint": site.endpoint, "region": "us-east-1", "credentials": {"secretRef": {"name": "storage"}}},
        "watchNamespaces": namespaces,
        "operator": {"logLevel": "info,finetune=debug", "extraArgs": ["--progress-interval=2"]},
        // Leaves the processors of the 16 GB node to the trainer.
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{
            "matchExpressions": [{"key": "nvidia.com/gpu.memory", "operator": "NotIn", "values": ["15360"]}],
        }]}}},
    });
    merge(&mut values, more);
    values
}

/// Installs or upgrades the chart and waits until the operator is ready.
pub(crate) fn install(site: &Site, namespaces: &[&str], more: &Value) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("values.yaml");
    std::fs::write(&file, values(site, namespaces, more).to_string()).expect("values are written");
    let chart = repository().join("charts/finetune-operator");
    let arguments: Vec<PathBuf> = vec![
        "upgrade".into(),
        "--install".into(),
        RELEASE.into(),
        chart,
        "-n".into(),
        SYSTEM.into(),
        "--create-namespace".into(),
        "--take-ownership".into(),
        "--force-conflicts".into(),
        "-f".into(),
        file,
        "--wait".into(),
        "--timeout".into(),
        "180s".into(),
    ];
    helm(&arguments).unwrap_or_else(|error| panic!("{error}\n{}", operator_logs()));
}

/// What the operator's pods have to say.
pub(crate) fn operator_logs() -> String {
    let selector = format!("app.kubernetes.io/instance={RELEASE}");
    let pods = kubectl(&["-n", SYSTEM, "get", "pods", "-o", "wide"]).unwrap_or_else(|error| error);
    let logs = kubectl(&["-n", SYSTEM, "logs", "-l", &selector, "--tail=60", "--prefix"]).unwrap_or_else(|error| error);
    format!("{pods}\n{logs}")
}

impl Stage {
    /// Deletes what an earlier run left in the namespace.
    async fn clear(&self) {
        kubectl(&["-n", self.namespace, "delete", "finetunejobs", "--all", "--wait=false"]).unwrap_or_else(|error| panic!("{error}"));
        self.until("the namespace to be empty", SHORT * 2, || async {
            let objects = [self.list("FineTuneJob").await, self.list("Job").await, self.list("Pod").await].concat();
            objects.is_empty().then_some(())
        })
        .await;
        // A test's jobs have names of their own, and none may find an earlier run's outputs.
        self.empty(BUCKET, &format!("loras/{}/", self.namespace)).await;
    }

    /// All objects of a kind in the test's namespace.
    pub(crate) async fn list(&self, kind: &str) -> Vec<Value> {
        kubernetes::list(&self.client, kind, self.namespace, "").await
    }

    /// Creates a job.
    pub(crate) async fn submit(&self, job: &Value) {
        kubernetes::create(&self.client, job, false).await.unwrap_or_else(|error| panic!("the API server refuses the job: {error}"));
    }

    /// The job as it is now.
    pub(crate) async fn job(&self, name: &str) -> Value {
        let job = kubernetes::get(&self.client, "FineTuneJob", self.namespace, name).await.unwrap_or_else(|| panic!("there is no job {name}"));
        record(&job);
        job
    }

    /// The trainer pods of a job, oldest first.
    pub(crate) async fn pods(&self, name: &str) -> Vec<Value> {
        let mut pods = kubernetes::list(&self.client, "Pod", self.namespace, &format!("finetune.dev/job={name}")).await;
        pods.sort_by_key(|pod| pod["metadata"]["creationTimestamp"].as_str().unwrap_or_default().to_owned());
        pods
    }

    /// Waits for `check` to answer; shows everything about the namespace when it does not in time.
    pub(crate) async fn until<T, F, Fut>(&self, what: &str, timeout: Duration, mut check: F) -> T
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Option<T>>,
    {
        let began = Instant::now();
        loop {
            if let Some(value) = check().await {
                return value;
            }
            assert!(began.elapsed() < timeout, "waited {timeout:?} in vain for {what}\n{}", self.dump());
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Waits until the job has the condition `kind`, True; fails at once when it ends the other way. However slow the machine, a job that trains on
    /// is waited for: `patience` is how long it may stay at its step.
    pub(crate) async fn until_true(&self, name: &str, kind: &str, patience: Duration) -> Value {
        let (mut step, mut since) = (Value::Null, Instant::now());
        loop {
            let job = self.job(name).await;
            for other in ["Complete", "Failed"] {
                assert!(
                    other == kind || !kubernetes::is_true(&job, other),
                    "{name} became {other} {:?} instead of {kind}\n{}",
                    condition(&job, other),
                    self.dump()
                );
            }
            if kubernetes::is_true(&job, kind) {
                return job;
            }
            let now = &job["status"]["progress"]["step"];
            if *now != step {
                (step, since) = (now.clone(), Instant::now());
            }
            assert!(since.elapsed() < patience, "waited {patience:?} in vain for {kind} of {name}\n{}", self.dump());
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Waits until the job's reported step is at least `step`.
    pub(crate) async fn until_step(&self, name: &str, step: u64) -> Value {
        self.until(&format!("step {step} of {name}"), LONG, || async {
            let job = self.job(name).await;
            for end in ["Complete", "Failed"] {
                assert!(!kubernetes::is_true(&job, end), "{name} became {end} {:?} before its step {step} was seen\n{}", condition(&job, end), self.dump());
            }
            (job["status"]["progress"]["step"].as_u64().unwrap_or(0) >= step).then_some(job)
        })
        .await
    }

    /// The step from which the job's last pod went on, by its log; 0 where it started afresh.
    pub(crate) async fn resumed_at(&self, name: &str) -> u64 {
        let pod = self.pods(name).await.pop().expect("a pod");
        let log = kubectl(&["-n", self.namespace, "logs", pod["metadata"]["name"].as_str().expect("a name")]).unwrap_or_else(|error| panic!("{error}"));
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["message"] == "resuming from a checkpoint").find_map(|line| line["step"].as_u64()).unwrap_or(0)
    }

    /// Deletes every object below a prefix.
    pub(crate) async fn empty(&self, bucket: &str, prefix: &str) {
        let s3 = self.site.s3.lock().await;
        for stale in s3.list(bucket, prefix).await {
            s3.delete(bucket, &stale).await;
        }
    }

    /// Bytes of the job's published LoRA.
    pub(crate) async fn lora(&self, bucket: &str, prefix: &str) -> Vec<u8> {
        let key = format!("{prefix}pytorch_lora_weights.safetensors");
        self.site.s3.lock().await.read(bucket, &key).await.unwrap_or_else(|| panic!("there is no {key} in {bucket}"))
    }

    /// Everything about the test's namespace, for a failed test.
    pub(crate) fn dump(&self) -> String {
        let mut text = String::new();
        for arguments in [
            &["get", "finetunejobs", "-o", "yaml"][..],
            &["get", "jobs,pods,configmaps", "-o", "wide"],
            &["get", "events", "--sort-by=.lastTimestamp"],
            &["logs", "-l", "finetune.dev/job", "--tail=40", "--prefix"],
        ] {
            let said = kubectl(&[&["-n", self.namespace], arguments].concat()).unwrap_or_else(|error| error);
            let _infallible = writeln!(text, "--- kubectl {arguments:?}\n{said}");
        }
        let _infallible = writeln!(text, "--- operator\n{}", operator_logs());
        text
    }
}

/// With `FINETUNE_RECORD_STATUS` set, keeps the first job seen in each phase in that folder: the fixtures of tests/argocd.rs.
fn record(job: &Value) {
    let (Some(folder), Some(phase)) = (std::env::var_os("FINETUNE_RECORD_STATUS"), job["status"]["phase"].as_str()) else { return };
    let file = PathBuf::from(folder).join(format!("{}.json", phase.to_lowercase()));
    if !file.exists() {
        let mut job = job.clone();
        job["metadata"]["managedFields"].take();
        std::fs::write(file, serde_json::to_string_pretty(&job).expect("JSON")).expect("the fixture is written");
    }
}

/// RFC 7386 without removal.
pub(crate) fn merge(target: &mut Value, change: &Value) {
    match (target, change) {
        (Value::Object(target), Value::Object(change)) => {
            for (name, value) in change {
                merge(target.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (target, change) => *target = change.clone(),
    }
}
