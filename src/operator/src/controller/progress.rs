//! Pulls progress from trainers: `GET http://POD_IP:9400/progress`.
//!
//! What comes is untrusted: no redirects, no proxy, two seconds, 16 KiB, strict types ([`Progress::parse`]). Only addresses of pods that the API
//! server names are asked, never a URL from a user.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::reconcile::world::{self, Report};
use crate::telemetry::metrics::Metrics;
use finetune_api::{JOB_LABEL, PROGRESS_MAX_BYTES, PROGRESS_PORT, Progress, ProgressError};

/// Longest time for one answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Trainers asked at the same time.
const CONCURRENCY: usize = 64;
/// Of these, trainers of one namespace: one whose trainers are silent, or only look like trainers, costs the others little.
const SHARE: usize = 16;
/// Pause between two looks at who is to be asked.
const TICK: Duration = Duration::from_millis(500);
/// A trainer that has not answered yet is asked this often.
const FIRST: Duration = Duration::from_secs(3);
/// So many times in vain; then the pauses double.
const PATIENCE: u32 = 5;
/// Longest pause before a trainer that does not answer is asked again.
const LONGEST: Duration = Duration::from_mins(2);

/// Why a trainer's progress is not known.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No connection, or no answer in time.
    #[error("failed to ask the trainer")]
    Http(#[from] reqwest::Error),
    /// Not a 200.
    #[error("the trainer answered with status {0}")]
    Status(u16),
    /// Not a report.
    #[error(transparent)]
    Report(#[from] ProgressError),
}

/// A client that goes to the address it is given and nowhere else.
pub fn http_client() -> reqwest::Result<reqwest::Client> {
    // The client wants a TLS provider even where it speaks plain HTTP only. A second installation is refused; the first one is the same.
    let _already_installed = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .timeout(TIMEOUT)
        .connect_timeout(TIMEOUT)
        .pool_max_idle_per_host(1)
        .build()
}

/// Asks one trainer.
pub async fn fetch(client: &reqwest::Client, address: IpAddr, port: u16) -> Result<Progress, FetchError> {
    let authority = std::net::SocketAddr::new(address, port);
    let mut response = client.get(format!("http://{authority}/progress")).send().await?;
    if response.status() != reqwest::StatusCode::OK {
        return Err(FetchError::Status(response.status().as_u16()));
    }
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await? {
        body.extend_from_slice(&piece);
        if body.len() > PROGRESS_MAX_BYTES {
            return Err(ProgressError::TooLong { length: body.len(), limit: PROGRESS_MAX_BYTES }.into());
        }
    }
    Ok(Progress::parse(&body)?)
}

/// What is known of one pod's trainer.
#[derive(Debug, Clone)]
struct Entry {
    report: Report,
    next: Instant,
    in_flight: bool,
    /// Questions in a row without an answer.
    in_vain: u32,
}

/// A job whose trainer reports something that should be written at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Namespace of the job.
    pub namespace: String,
    /// Name of the job.
    pub name: String,
}

/// Asks all running trainers in turn and keeps their answers.
#[derive(Debug)]
pub struct Poller {
    client: reqwest::Client,
    port: u16,
    interval: Duration,
    entries: Mutex<HashMap<String, Entry>>,
    permits: Semaphore,
    metrics: Arc<Metrics>,
}

impl Poller {
    /// Asks each trainer every `interval` (with some spread).
    pub fn new(client: reqwest::Client, interval: Duration, metrics: Arc<Metrics>) -> Self {
        Self { client, port: PROGRESS_PORT, interval, entries: Mutex::default(), permits: Semaphore::new(CONCURRENCY), metrics }
    }

    /// What the trainer of the pod with that UID has said.
    pub fn report(&self, uid: &str) -> Report {
        self.lock().get(uid).map(|entry| entry.report.clone()).unwrap_or_default()
    }

    /// Runs until dropped. `trainers` lists the pods to ask; `changed` hears of trainers whose stage has changed.
    pub async fn run(self: Arc<Self>, trainers: impl Fn() -> Vec<Arc<Pod>>, changed: impl Fn(Changed) + Clone + Send + Sync + 'static) {
        let mut rounds: HashMap<String, tokio::task::JoinHandle<()>> = HashMap::new();
        loop {
            tokio::time::sleep(TICK).await;
            let running = trainers();
            self.forget_all_but(&running);
            rounds.retain(|_, round| !round.is_finished());
            for (namespace, pods) in self.due(running, |namespace| rounds.contains_key(namespace)) {
                let (poller, changed) = (Arc::clone(&self), changed.clone());
                let round = async move {
                    futures::stream::iter(pods).for_each_concurrent(SHARE, |pod| poller.ask(pod, &changed)).await;
                };
                rounds.insert(namespace, tokio::spawn(round));
            }
        }
    }

    /// The pods whose turn it is, by namespace; those of namespaces that are still being asked come later.
    fn due(&self, running: Vec<Arc<Pod>>, is_busy: impl Fn(&str) -> bool) -> HashMap<String, Vec<Arc<Pod>>> {
        let mut due: HashMap<String, Vec<Arc<Pod>>> = HashMap::new();
        for pod in running {
            let (Some(uid), Some(namespace)) = (&pod.metadata.uid, &pod.metadata.namespace) else { continue };
            if !is_busy(namespace) && self.is_due(uid) {
                due.entry(namespace.clone()).or_default().push(pod);
            }
        }
        due
    }

    /// Asks one trainer, once there is room, and notes its answer.
    async fn ask(&self, pod: Arc<Pod>, changed: &(impl Fn(Changed) + Sync)) {
        let (Some(uid), Some(address)) = (&pod.metadata.uid, address(&pod)) else { return };
        let _permit = self.permits.acquire().await;
        let answer = fetch(&self.client, address, self.port).await;
        if self.note(uid, answer, Timestamp::now())
            && let (Some(namespace), Some(name)) = (&pod.metadata.namespace, pod.metadata.labels.as_ref().and_then(|labels| labels.get(JOB_LABEL)))
        {
            changed(Changed { namespace: namespace.clone(), name: name.clone() });
        }
    }

    /// Whether it is the pod's turn; if so it is marked as being asked.
    fn is_due(&self, uid: &str) -> bool {
        let mut entries = self.lock();
        let entry = entries.entry(uid.to_owned()).or_insert_with(|| Entry { report: Report::default(), next: Instant::now(), in_flight: false, in_vain: 0 });
        let due = !entry.in_flight && entry.next <= Instant::now();
        entry.in_flight |= due;
        due
    }

    /// Notes an answer. True where it should be written at once: the first one, or another stage.
    fn note(&self, uid: &str, answer: Result<Progress, FetchError>, now: Timestamp) -> bool {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(uid) else { return false };
        entry.in_flight = false;
        entry.in_vain = if answer.is_ok() { 0 } else { entry.in_vain.saturating_add(1) };
        let pause = self.pause(entry.report.progress.is_some() || answer.is_ok(), entry.in_vain);
        entry.next = Instant::now() + pause.mul_f64(0.9 + rand::random::<f64>() * 0.2);
        match answer {
            Ok(progress) => {
                self.metrics.progress_fetched("ok");
                let news = entry.report.progress.as_ref().is_none_or(|before| before.stage != progress.stage) || entry.report.failing_since.is_some();
                let same = |before: &Progress| before.stage == progress.stage && before.step == progress.step;
                let unchanged_since = entry.report.unchanged_since.filter(|_| entry.report.progress.as_ref().is_some_and(same)).unwrap_or(now);
                entry.report = Report { progress: Some(progress), at: Some(now), unchanged_since: Some(unchanged_since), failing_since: None };
                news
            }
            Err(error) => {
                self.metrics.progress_fetched(match error {
                    FetchError::Http(_) => "unreachable",
                    FetchError::Status(_) => "refused",
                    FetchError::Report(_) => "invalid",
                });
                tracing::debug!(pod_uid = uid, error = &error as &dyn std::error::Error, "failed to fetch progress");
                entry.report.failing_since.get_or_insert(now);
                false
            }
        }
    }

    /// Pause before the next question to a trainer that has ever `answered`, and now `in_vain` times in a row has not.
    fn pause(&self, answered: bool, in_vain: u32) -> Duration {
        let base = if answered { self.interval } else { self.interval.min(FIRST) };
        let doublings = in_vain.saturating_sub(PATIENCE).min(16);
        base.saturating_mul(1 << doublings).min(LONGEST.max(self.interval))
    }

    fn forget_all_but(&self, running: &[Arc<Pod>]) {
        let uids: std::collections::HashSet<&str> = running.iter().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        self.lock().retain(|uid, _| uids.contains(uid.as_str()));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where to ask the pod's trainer, if it runs.
pub(super) fn address(pod: &Pod) -> Option<IpAddr> {
    world::trainer(pod)?.state.as_ref()?.running.as_ref()?;
    pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::response::Redirect;
    use axum::routing::get;
    use finetune_api::Stage;

    async fn serve(router: Router) -> (IpAddr, u16) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (address.ip(), address.port())
    }

    #[tokio::test]
    async fn a_report_is_read_and_a_hostile_answer_is_not() {
        let client = http_client().unwrap();
        let good = Progress { stage: Stage::Training, step: 3, total_steps: 10, ..Progress::default() };
        let body = serde_json::to_string(&good).unwrap();
        let (ip, port) = serve(Router::new().route("/progress", get(move || async { body }))).await;
        assert_eq!(fetch(&client, ip, port).await.unwrap(), good);

        let (ip, port) = serve(Router::new().route("/progress", get(|| async { Redirect::temporary("http://169.254.169.254/latest/meta-data") }))).await;
        assert!(matches!(fetch(&client, ip, port).await, Err(FetchError::Status(307))), "redirects are not followed");

        let (ip, port) = serve(Router::new().route("/progress", get(|| async { " ".repeat(1 << 20) }))).await;
        assert!(matches!(fetch(&client, ip, port).await, Err(FetchError::Report(ProgressError::TooLong { .. }))));

        let (ip, port) = serve(Router::new().route("/progress", get(|| async { r#"{"stage": 1}"# }))).await;
        assert!(matches!(fetch(&client, ip, port).await, Err(FetchError::Report(ProgressError::Malformed(_)))));

        let (ip, port) = serve(Router::new().route("/progress", get(|| async { tokio::time::sleep(Duration::from_mins(1)).await }))).await;
        assert!(matches!(fetch(&client, ip, port).await, Err(FetchError::Http(_))), "an answer that does not come is not waited for");
    }

    #[tokio::test]
    async fn a_first_answer_and_a_new_stage_are_told_at_once_and_silence_has_a_beginning() {
        let poller = Poller::new(http_client().unwrap(), Duration::from_secs(15), Arc::new(Metrics::new()));
        let at = |second| Timestamp::from_second(second).unwrap();
        let progress = |stage, step| Ok(Progress { stage, step, ..Progress::default() });
        assert!(poller.is_due("a"));
        assert!(!poller.is_due("a"), "it is being asked");
        assert!(poller.note("a", progress(Stage::Training, 0), at(1)));
        assert!(!poller.is_due("a"), "it was asked just now");
        assert!(!poller.note("a", progress(Stage::Training, 1), at(2)));
        assert!(poller.note("a", progress(Stage::Publishing, 1), at(3)));
        assert!(!poller.note("a", Err(FetchError::Status(500)), at(4)));
        assert!(!poller.note("a", Err(FetchError::Status(500)), at(5)));
        assert_eq!(poller.report("a").failing_since, Some(at(4)));
        assert_eq!(poller.report("a").progress.unwrap().stage, Stage::Publishing, "the last answer is kept");
        assert!(poller.note("a", progress(Stage::Publishing, 1), at(6)), "it answers again");
        poller.forget_all_but(&[]);
        assert_eq!(poller.report("a"), Report::default());
    }

    #[tokio::test]
    async fn a_silent_trainer_is_asked_less_and_less_and_one_that_answers_again_as_before() {
        let poller = Poller::new(http_client().unwrap(), Duration::from_secs(15), Arc::new(Metrics::new()));
        let pauses = |answered| (0..12).map(|in_vain| poller.pause(answered, in_vain).as_secs()).collect::<Vec<_>>();
        assert_eq!(pauses(false), [3, 3, 3, 3, 3, 3, 6, 12, 24, 48, 96, 120]);
        assert_eq!(pauses(true), [15, 15, 15, 15, 15, 15, 30, 60, 120, 120, 120, 120]);
        assert_eq!(poller.pause(false, u32::MAX), LONGEST);

        assert!(poller.is_due("a"));
        for _ in 0..9 {
            poller.note("a", Err(FetchError::Status(500)), Timestamp::UNIX_EPOCH);
        }
        assert_eq!(poller.lock()["a"].in_vain, 9);
        poller.note("a", Ok(Progress::default()), Timestamp::UNIX_EPOCH);
        assert_eq!(poller.lock()["a"].in_vain, 0);
    }

    fn running(namespace: &str, uid: &str, ip: &str) -> Arc<Pod> {
        Arc::new(
            serde_json::from_value(serde_json::json!({
                "metadata": {"namespace": namespace, "name": uid, "uid": uid, "labels": {JOB_LABEL: uid}},
                "status": {"podIP": ip, "containerStatuses": [{"name": finetune_api::TRAINER_CONTAINER, "image": "", "imageID": "", "ready": true,
                    "restartCount": 0, "state": {"running": {}}}]},
            }))
            .unwrap(),
        )
    }

    #[tokio::test]
    async fn a_namespace_of_silent_trainers_does_not_hold_up_another() {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // Connections are made, and nobody ever answers.
        let _silent = std::net::TcpListener::bind(("127.0.0.2", port)).unwrap();
        let body = serde_json::to_string(&Progress { stage: Stage::Training, ..Progress::default() }).unwrap();
        tokio::spawn(async move { axum::serve(listener, Router::new().route("/progress", get(move || async { body }))).await.unwrap() });
        let silent = (0..500).map(|number| running("silent", &format!("silent-{number}"), "127.0.0.2"));
        let pods: Vec<Arc<Pod>> = silent.chain([running("good", "good-1", "127.0.0.1")]).collect();
        let poller = Arc::new(Poller { port, ..Poller::new(http_client().unwrap(), Duration::from_secs(15), Arc::new(Metrics::new())) });
        let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let task = tokio::spawn(Arc::clone(&poller).run(move || pods.clone(), move |changed| told.send(changed).unwrap()));
        let first = tokio::time::timeout(Duration::from_secs(5), heard.recv()).await.expect("the good trainer is asked at once");
        assert_eq!(first, Some(Changed { namespace: "good".into(), name: "good-1".into() }));
        assert!(CONCURRENCY - poller.permits.available_permits() <= SHARE, "the silent ones take no more than their share");
        task.abort();
    }
}
