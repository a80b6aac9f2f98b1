//! Pulls progress from trainers: `GET http://POD_IP:9400/progress`.
//!
//! What comes is untrusted: no redirects, no proxy, two seconds, 16 KiB, strict types ([`Progress::parse`]). Only addresses of pods that the API
//! server names are asked, never a URL from a user.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::metrics::Metrics;
use super::world::{self, Report};
use finetune_api::{JOB_LABEL, PROGRESS_MAX_BYTES, PROGRESS_PORT, Progress, ProgressError};

/// Longest time for one answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Trainers asked at the same time.
const CONCURRENCY: usize = 64;
/// Pause between two looks at who is to be asked.
const TICK: Duration = Duration::from_millis(500);
/// A trainer that has not answered yet is asked this often.
const FIRST: Duration = Duration::from_secs(3);

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
}

/// A job whose trainer says something that should be told at once.
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
    interval: Duration,
    entries: Mutex<HashMap<String, Entry>>,
    permits: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

impl Poller {
    /// Asks each trainer every `interval` (with some spread).
    pub fn new(client: reqwest::Client, interval: Duration, metrics: Arc<Metrics>) -> Self {
        Self { client, interval, entries: Mutex::default(), permits: Arc::new(Semaphore::new(CONCURRENCY)), metrics }
    }

    /// What the trainer of the pod with that UID has said.
    pub fn report(&self, uid: &str) -> Report {
        self.lock().get(uid).map(|entry| entry.report.clone()).unwrap_or_default()
    }

    /// Runs until dropped. `pods` lists those in the cache; `changed` hears of trainers whose stage has changed.
    pub async fn run(self: Arc<Self>, pods: impl Fn() -> Vec<Arc<Pod>>, changed: impl Fn(Changed) + Clone + Send + 'static) {
        loop {
            tokio::time::sleep(TICK).await;
            let running: Vec<Arc<Pod>> = pods().into_iter().filter(|pod| address(pod).is_some()).collect();
            self.forget_all_but(&running);
            for pod in running {
                let (Some(uid), Some(address)) = (pod.metadata.uid.clone(), address(&pod)) else { continue };
                if !self.is_due(&uid) {
                    continue;
                }
                let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else { return };
                let (poller, changed) = (Arc::clone(&self), changed.clone());
                tokio::spawn(async move {
                    let answer = fetch(&poller.client, address, PROGRESS_PORT).await;
                    if poller.note(&uid, answer, Timestamp::now())
                        && let (Some(namespace), Some(name)) = (&pod.metadata.namespace, pod.metadata.labels.as_ref().and_then(|labels| labels.get(JOB_LABEL)))
                    {
                        changed(Changed { namespace: namespace.clone(), name: name.clone() });
                    }
                    drop(permit);
                });
            }
        }
    }

    /// Whether it is the pod's turn; if so it is marked as being asked.
    fn is_due(&self, uid: &str) -> bool {
        let mut entries = self.lock();
        let entry = entries.entry(uid.to_owned()).or_insert_with(|| Entry { report: Report::default(), next: Instant::now(), in_flight: false });
        let due = !entry.in_flight && entry.next <= Instant::now();
        entry.in_flight |= due;
        due
    }

    /// Notes an answer. True where it should be told at once: the first one, or another stage.
    fn note(&self, uid: &str, answer: Result<Progress, FetchError>, now: Timestamp) -> bool {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(uid) else { return false };
        entry.in_flight = false;
        let answered = entry.report.progress.is_some();
        let pause = if answered || answer.is_ok() { self.interval } else { self.interval.min(FIRST) };
        entry.next = Instant::now() + pause.mul_f64(0.9 + rand::random::<f64>() * 0.2);
        match answer {
            Ok(progress) => {
                self.metrics.progress_fetched("ok");
                let news = entry.report.progress.as_ref().is_none_or(|before| before.stage != progress.stage) || entry.report.failing_since.is_some();
                entry.report = Report { progress: Some(progress), at: Some(now), failing_since: None };
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

    fn forget_all_but(&self, running: &[Arc<Pod>]) {
        let uids: std::collections::HashSet<&str> = running.iter().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        self.lock().retain(|uid, _| uids.contains(uid.as_str()));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where to ask the pod's trainer, if it runs.
fn address(pod: &Pod) -> Option<IpAddr> {
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

        let (ip, port) = serve(Router::new().route("/progress", get(|| async { r#"{"stage": "Training", "surprise": 1}"# }))).await;
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
}
