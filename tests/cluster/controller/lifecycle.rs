//! A job's life, undisturbed: what is written, when, and that nothing is written when nothing changes.

use std::time::Duration;

use serde_json::json;

use super::stage::{SOON, Stage, TRAINER, serve_progress, success};
use finetune_testing::kubernetes;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_job_goes_from_created_to_complete_with_few_writes_and_its_job_is_cleaned_up_once() {
    let stage = Stage::new("lifecycle").await;
    let operator = stage.operator().await;
    stage.create("corgi", |job| job["spec"]["ttlSecondsAfterFinished"] = json!(3)).await;

    let created = stage.condition("corgi", "JobCreated", "True", "Created").await;
    assert_eq!(created["status"]["observedGeneration"], 1);
    assert_eq!(created["status"]["phase"], "Starting");
    assert_eq!(created["status"]["trainerImage"], "localhost/trainer:test");
    assert!(created["status"]["specHash"].as_str().is_some_and(|hash| hash.starts_with("sha256:")));
    for (type_, status, reason) in [
        ("Validated", "True", "SpecAccepted"),
        ("Admitted", "True", "NoQueue"),
        ("Reconciling", "False", "Reconciled"),
        ("Stalled", "False", "NotStalled"),
        ("Running", "False", "Starting"),
    ] {
        let seen = kubernetes::condition(&created, type_).map(|(s, r, _)| (s, r));
        assert_eq!(seen, Some((status.to_owned(), reason.to_owned())), "{type_}");
    }
    let job = stage.job("corgi").await.expect("the Job");
    assert!(job["spec"]["ttlSecondsAfterFinished"].is_null(), "a Job must not vanish before its result is saved");

    serve_progress().await;
    let pod = stage.pod("corgi", None).await;
    stage.start_at(&pod, TRAINER).await;
    let trains = stage.condition("corgi", "Running", "True", "Training").await;
    assert!(trains["status"]["startTime"].is_string() && trains["status"]["attempts"]["started"] == 1);
    assert_eq!(trains["status"]["progress"]["summary"], "10/100 (10%)");
    stage.finish(&pod, 0, "Completed", &success()).await;
    let done = stage.condition("corgi", "Complete", "True", "TrainingSucceeded").await;
    assert_eq!(done["status"]["phase"], "Succeeded");
    assert_eq!(done["status"]["artifacts"][0]["sizeBytes"], 1234);
    assert_eq!(done["status"]["progress"]["summary"], "100/100 (100%)");
    assert_eq!(done["status"]["lastCheckpoint"]["step"], 100);
    assert_eq!(done["status"]["attemptHistory"][0]["cause"], "Succeeded");
    assert!(done["status"]["completionTime"].is_string() && done["status"]["failure"].is_null());
    assert!(kubernetes::is_true(&done, "Complete") && !kubernetes::is_true(&done, "Running"));

    // The time to live deletes the Job; the FineTuneJob stays as it is, and nothing is started again.
    kubernetes::eventually("the Job's end", SOON, || async { stage.job("corgi").await.is_none().then_some(()) }).await;
    let writes = operator.writes();
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert!(stage.job("corgi").await.is_none(), "a finished job must never be started again");
    assert_eq!(stage.get("corgi").await["status"], done["status"]);
    assert_eq!(operator.writes(), writes, "a finished job causes no writes");

    // The Job and its time to live; the status when it was created, trained, and had ended.
    let writes_of =
        |verb: &str, resource: &str| operator.count(&["finetune_apiserver_requests_total{", &format!("verb=\"{verb}\""), &format!("resource=\"{resource}\"")]);
    let lists = ["create", "update", "patch", "delete"].map(|verb| writes_of(verb, "jobs"));
    assert_eq!(lists, [1, 0, 1, 0], "creations, replacements, patches and deletions of Jobs");
    let statuses = writes_of("patch", "finetunejobs/status");
    assert!((2..=3).contains(&statuses), "{statuses} status writes");
    let events = writes_of("create", "events");
    assert!((1..=4).contains(&events), "{events} events");
    assert_eq!(operator.writes(), 2 + statuses + events + writes_of("patch", "events"), "at most five writes, and events");
    assert_eq!(operator.count(&["finetune_job_terminal_total{", "result=\"succeeded\"", "reason=\"TrainingSucceeded\""]), 1);
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn nothing_is_written_while_nothing_changes() {
    let stage = Stage::new("quiet").await;
    let operator = stage.operator().await;
    stage.create("trains", |_| {}).await;
    stage.create("waits", |_| {}).await;
    stage.create("suspended", |job| job["spec"]["suspend"] = json!(true)).await;
    let pod = stage.pod("trains", None).await;
    stage.start(&pod).await;
    stage.until("trains", "an attempt", |job| job["status"]["attempts"]["started"] == 1).await;
    stage.condition("waits", "JobCreated", "True", "Created").await;
    stage.condition("suspended", "Suspended", "True", "UserRequested").await;
    // What was held back as less urgent is written within the interval.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let (writes, version) = (operator.writes(), stage.get("trains").await["metadata"]["resourceVersion"].clone());
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(operator.writes(), writes, "a status that does not change is not written");
    assert_eq!(stage.get("trains").await["metadata"]["resourceVersion"], version);

    // A successor finds everything as it should be, too.
    operator.kill().await;
    let successor = stage.operator().await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!(successor.writes(), 0, "an operator that takes over writes nothing");
    assert!(successor.count(&["finetune_reconcile_duration_seconds_count"]) >= 3, "it has looked at them");
    successor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn suspend_frees_the_pod_and_resume_continues_with_the_same_image() {
    let stage = Stage::new("suspend").await;
    let operator = stage.operator().await;
    stage.create("paused", |_| {}).await;
    let pod = stage.pod("paused", None).await;
    stage.start(&pod).await;
    stage.until("paused", "an attempt", |job| job["status"]["attempts"]["started"] == 1).await;
    let first = stage.job_uid("paused").await.expect("the Job");

    stage.patch("paused", &json!({"spec": {"suspend": true}})).await;
    let paused = stage.condition("paused", "Suspended", "True", "UserRequested").await;
    assert_eq!(paused["status"]["phase"], "Suspended");
    assert!(stage.job("paused").await.is_none() && stage.live_pods("paused").await.is_empty(), "suspended means that nothing runs");
    assert_eq!(paused["status"]["attemptHistory"][0]["cause"], "Suspended");
    assert_eq!(paused["spec"]["suspend"], true, "the operator never writes the spec");

    // The default image of another operator version is not used: the image is frozen.
    operator.stop().await;
    let operator = stage.operator_with(|options| options.settings.trainer_image = "localhost/trainer:newer".to_owned()).await;
    stage.patch("paused", &json!({"spec": {"suspend": false}})).await;
    let resumed = stage.condition("paused", "Suspended", "False", "Resumed").await;
    assert!(!kubernetes::is_true(&resumed, "Suspended"));
    let next = stage.pod("paused", Some(&pod)).await;
    assert_ne!(stage.job_uid("paused").await, Some(first));
    let image = kubernetes::get(&stage.client, "Pod", &stage.namespace, &next).await.expect("the pod")["spec"]["containers"][0]["image"].clone();
    assert_eq!(image, "localhost/trainer:test");
    stage.start(&next).await;
    stage.finish(&next, 0, "Completed", &success()).await;
    let done = stage.condition("paused", "Complete", "True", "TrainingSucceeded").await;
    assert_eq!(done["status"]["attempts"], json!({"started": 2, "disrupted": 1, "failed": 0}));
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_finished_job_deletes_itself_only_where_the_administrator_allows_it() {
    let stage = Stage::new("ttl-all").await;
    let finished = async |name: &str| {
        stage
            .create(name, |job| {
                job["spec"]["ttlScope"] = json!("All");
                job["spec"]["ttlSecondsAfterFinished"] = json!(4);
            })
            .await;
        let pod = stage.pod(name, None).await;
        stage.start(&pod).await;
        stage.finish(&pod, 0, "Completed", &success()).await;
        stage.condition(name, "Complete", "True", "TrainingSucceeded").await;
    };
    let operator = stage.operator_with(|options| options.settings.allow_ttl_scope_all = true).await;
    finished("fleeting").await;
    kubernetes::eventually("the FineTuneJob to go with all that it owns", SOON, || async {
        let job = kubernetes::get(&stage.client, "FineTuneJob", &stage.namespace, "fleeting").await;
        let children = [kubernetes::list(&stage.client, "Job", &stage.namespace, "").await, kubernetes::list(&stage.client, "Pod", &stage.namespace, "").await];
        (job.is_none() && children.concat().is_empty()).then_some(())
    })
    .await;
    assert_eq!(operator.count(&["finetune_apiserver_requests_total{", "verb=\"delete\"", "resource=\"finetunejobs\""]), 1);
    operator.stop().await;

    let operator = stage.operator().await;
    finished("kept").await;
    kubernetes::eventually("the Job's end", SOON, || async { stage.job("kept").await.is_none().then_some(()) }).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(stage.get("kept").await["status"]["phase"], "Succeeded", "it is not for its author to decide");
    operator.stop().await;
}
