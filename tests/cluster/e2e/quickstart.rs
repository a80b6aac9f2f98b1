//! The happy path: the quickstart's manifest, unchanged, on a cluster.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::support::stage::{LONG, RELEASE, SHORT, SYSTEM, Stage, stage};
use finetune_testing::kubernetes::{self, condition};
use finetune_testing::programs::{self, kubectl, repository};

const JOB: &str = "robi";
const OUTPUT: &str = "loras/robi/";

#[tokio::test]
#[ignore = "needs a cluster: make cluster-up"]
async fn the_quickstart_trains_on_the_16_gb_node_and_publishes_what_finetune_run_makes() {
    let stage = stage("e2e-quickstart").await;
    let local = std::thread::spawn(run_locally);
    {
        let s3 = stage.site.s3.lock().await;
        s3.upload("quickstart", &repository().join("examples/quickstart/bucket"), "").await;
        for stale in s3.list("quickstart", OUTPUT).await {
            s3.delete("quickstart", &stale).await;
        }
    }
    let manifest = repository().join("examples/quickstart/job.yaml").display().to_string();
    kubectl(&["-n", stage.namespace, "apply", "-f", &manifest]).unwrap_or_else(|error| panic!("{error}"));

    let pod =
        stage.until("the trainer's pod on a node", SHORT, || async { stage.pods(JOB).await.pop().filter(|pod| pod["spec"]["nodeName"].is_string()) }).await;
    only_the_16_gb_node_fits(&stage, &pod).await;
    restricted(&pod);

    stage.until_step(JOB, 1).await;
    let running = stage.job(JOB).await;
    assert_eq!(running["status"]["phase"], "Running");
    assert!(kubernetes::is_true(&running, "Running"), "{running}");
    trainer_serves_metrics(&stage, &pod).await;
    operator_serves_metrics(&stage).await;
    stage
        .until("a checkpoint in the bucket", LONG, || async {
            let files = stage.site.s3.lock().await.list("quickstart", OUTPUT).await;
            files.iter().any(|file| file.contains(".checkpoints/")).then_some(())
        })
        .await;

    kubectl(&["-n", stage.namespace, "wait", "--for=condition=Complete", "--timeout=1800s", "finetunejob/robi"])
        .unwrap_or_else(|error| panic!("{error}\n{}", stage.dump()));
    let done = stage.job(JOB).await;
    status_is_complete(&done);
    operator_logs_name_the_job(&stage).await;
    let lora = stage.lora("quickstart", OUTPUT).await;
    artifacts_match(&stage, &done).await;
    let expected = local.join().expect("finetune run succeeds");
    assert!(lora == expected, "the cluster's LoRA ({} bytes) differs from that of finetune run ({} bytes)", lora.len(), expected.len());

    the_job_goes_with_its_resource(&stage).await;
    assert!(!stage.lora("quickstart", OUTPUT).await.is_empty(), "the bucket is left alone");
}

/// `finetune run` of the same manifest on this machine: bytes of its LoRA.
fn run_locally() -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a folder");
    let bucket = folder.path().join("bucket");
    programs::run(Command::new("cp").arg("-r").arg(repository().join("examples/quickstart/bucket")).arg(&bucket)).unwrap_or_else(|error| panic!("{error}"));
    let said = programs::run(
        Command::new(env!("CARGO_BIN_EXE_finetune"))
            .arg("run")
            .arg(repository().join("examples/quickstart/job.yaml"))
            .arg("--device=cpu")
            .arg(format!("--bucket=s3://quickstart={}", bucket.display()))
            .arg("--cache-dir")
            .arg(folder.path().join("cache")),
    );
    said.unwrap_or_else(|error| panic!("{error}"));
    std::fs::read(bucket.join(OUTPUT).join("pytorch_lora_weights.safetensors")).expect("the LoRA of finetune run")
}

/// The pod is on a node of the 16 GB class, and its terms exclude every other node that is free.
async fn only_the_16_gb_node_fits(stage: &Stage, pod: &Value) {
    let node = kubernetes::get(&stage.client, "Node", "", pod["spec"]["nodeName"].as_str().expect("a node")).await.expect("the node");
    assert_eq!(node["metadata"]["labels"]["nvidia.com/gpu.memory"], "15360");
    let terms = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"];
    let first = terms[0]["matchExpressions"].as_array().expect("terms");
    let bound = |operator: &str| first.iter().find(|e| e["key"] == "nvidia.com/gpu.memory" && e["operator"] == operator).map(|e| e["values"][0].clone());
    assert_eq!(bound("Gt"), Some("14999".into()));
    assert_eq!(bound("Lt"), Some("17001".into()));
    assert_eq!(pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], "1");
}

/// What the namespace's Pod Security level demanded anyway, and what it does not.
fn restricted(pod: &Value) {
    assert_eq!(pod["spec"]["automountServiceAccountToken"], false);
    let container = &pod["spec"]["containers"][0];
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    let mounts: Vec<&Value> = container["volumeMounts"].as_array().into_iter().flatten().collect();
    assert!(mounts.iter().all(|mount| !mount["mountPath"].as_str().unwrap_or_default().contains("serviceaccount")), "{mounts:?}");
}

async fn trainer_serves_metrics(stage: &Stage, pod: &Value) {
    let name = pod["metadata"]["name"].as_str().expect("a name");
    let pod = kubernetes::get(&stage.client, "Pod", stage.namespace, name).await.expect("the pod");
    let text = get(&format!("http://{}:9400/metrics", pod["status"]["podIP"].as_str().expect("an address"))).await;
    for metric in ["finetune_trainer_step ", "finetune_trainer_loss ", "finetune_trainer_steps_planned 400"] {
        assert!(text.contains(metric), "{metric}: {text}");
    }
}

/// The leader's metrics know of the running job; the other pod does not lead.
async fn operator_serves_metrics(stage: &Stage) {
    let mut leaders = 0;
    let mut all = String::new();
    for pod in kubernetes::list(&stage.client, "Pod", SYSTEM, &format!("app.kubernetes.io/instance={RELEASE}")).await {
        let Some(address) = pod["status"]["podIP"].as_str() else { continue };
        let text = get(&format!("http://{address}:8080/metrics")).await;
        leaders += text.lines().filter(|line| *line == "finetune_leader 1").count();
        all.push_str(&text);
    }
    assert_eq!(leaders, 1, "{all}");
    assert!(all.contains("finetune_jobs{namespace=\"e2e-quickstart\",phase=\"Running\"} 1"), "{all}");
    assert!(all.contains("finetune_apiserver_requests_total{verb=\"create\",resource=\"jobs\",code=\"201\"}"), "{all}");
}

/// A transition is a line of JSON that names the job.
async fn operator_logs_name_the_job(stage: &Stage) {
    let mut logs = String::new();
    for pod in kubernetes::list(&stage.client, "Pod", SYSTEM, &format!("app.kubernetes.io/instance={RELEASE}")).await {
        let name = pod["metadata"]["name"].as_str().expect("a name");
        logs += &kubectl(&["-n", SYSTEM, "logs", name]).unwrap_or_else(|error| panic!("{error}"));
        // Where its container was never restarted there is no such log.
        logs += &kubectl(&["-n", SYSTEM, "logs", name, "--previous"]).unwrap_or_default();
    }
    let mut lines = logs.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let succeeded = lines.any(|line| {
        let span = &line["span"];
        line["message"] == "job changed" && line["reason"] == "TrainingSucceeded" && span["namespace"] == stage.namespace && span["job"] == JOB
    });
    assert!(succeeded, "{logs}");
}

async fn get(url: &str) -> String {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().expect("a client");
    let answer = client.get(url).send().await.unwrap_or_else(|error| panic!("{url}: {error}"));
    assert!(answer.status().is_success(), "{url}: {}", answer.status());
    answer.text().await.expect("text")
}

fn status_is_complete(job: &Value) {
    let status = &job["status"];
    assert_eq!(status["phase"], "Succeeded");
    assert_eq!(condition(job, "Complete").map(|(_, reason, _)| reason).as_deref(), Some("TrainingSucceeded"));
    assert_eq!(status["observedGeneration"], job["metadata"]["generation"]);
    for (field, prefix) in [("specHash", "sha256:"), ("datasetDigest", "sha256:"), ("startTime", "2"), ("completionTime", "2")] {
        assert!(status[field].as_str().is_some_and(|value| value.starts_with(prefix)), "{field}: {status}");
    }
    assert!(status["trainerImage"].as_str().is_some_and(|image| image.contains("finetune")), "{status}");
    assert_eq!(status["progress"]["step"], 400);
    assert_eq!(status["progress"]["percent"], 100);
    assert_eq!(status["attempts"], serde_json::json!({"started": 1, "disrupted": 0, "failed": 0}));
    for kind in ["Failed", "Stalled", "Reconciling"] {
        assert!(!kubernetes::is_true(job, kind), "{kind}: {status}");
    }
    for condition in status["conditions"].as_array().expect("conditions") {
        assert_eq!(condition["observedGeneration"], job["metadata"]["generation"], "{condition}");
    }
}

/// Every artifact of the status is in the bucket, with that digest and size.
async fn artifacts_match(stage: &Stage, job: &Value) {
    let artifacts = job["status"]["artifacts"].as_array().expect("artifacts");
    assert_eq!(artifacts.len(), 2, "{artifacts:?}");
    for artifact in artifacts {
        let key = artifact["uri"].as_str().and_then(|uri| uri.strip_prefix("s3://quickstart/")).expect("an object of the bucket");
        let bytes = stage.site.s3.lock().await.read("quickstart", key).await.unwrap_or_else(|| panic!("no {key}"));
        assert_eq!(artifact["sizeBytes"], bytes.len());
        let digest = hex::encode(finetune_common::digest::sha256(&bytes));
        assert!(artifact["sha256"].as_str().is_some_and(|told| told.trim_start_matches("sha256:") == digest), "{artifact} is {digest}");
    }
}

/// Deleting the FineTuneJob deletes Job and pods.
async fn the_job_goes_with_its_resource(stage: &Stage) {
    kubectl(&["-n", stage.namespace, "delete", "finetunejob", JOB]).unwrap_or_else(|error| panic!("{error}"));
    stage
        .until("the job's objects to go", SHORT * 2, || async { (stage.list("Job").await.is_empty() && stage.list("Pod").await.is_empty()).then_some(()) })
        .await;
}
