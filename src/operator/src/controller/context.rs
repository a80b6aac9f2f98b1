//! What the steps that talk to the API server share.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::batch::v1::Job;
use kube::{Client, ResourceExt as _};
use tokio::time::Instant;

use crate::controller::backoff::Backoff;
use crate::controller::lease::Leadership;
use crate::controller::strip::strip_child;
use crate::error::{Error, Operation};
use crate::reconcile::warnings::Looked;
use crate::settings::Settings;
use crate::telemetry::metrics::Metrics;
use finetune_api::{FineTuneJob, FineTuneJobStatus};

/// Longest time for one call of the API server.
const CALL: Duration = Duration::from_secs(20);
/// How long our own write is believed against a cache that has not seen it.
const BELIEF: Duration = Duration::from_secs(10);

/// Asked before and after each call with its name (`before:create_job`, `after:create_job`); where it says true, this process does nothing more, as
/// if it had been killed there. For tests of what a successor makes of it.
#[derive(Clone)]
pub struct FaultHook(Arc<dyn Fn(&str) -> bool + Send + Sync>);

impl FaultHook {
    /// A hook.
    pub fn new(hook: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(hook))
    }
}

impl Default for FaultHook {
    fn default() -> Self {
        Self::new(|_| false)
    }
}

impl fmt::Debug for FaultHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FaultHook")
    }
}

/// What this process knows of a job beyond the caches.
#[derive(Debug, Clone, Default)]
struct Memory {
    /// The FineTuneJob as the API server returned it to our last status write.
    written: Option<(u64, Box<FineTuneJobStatus>)>,
    /// When that was.
    written_at: Option<Instant>,
    /// What the caches would keep of the Job as the API server returned it to our last write, and when.
    created: Option<(Arc<Job>, Instant)>,
    /// The last look at the events about its pod.
    looked: Option<Looked>,
    /// Why the object cannot be read, where that has been said.
    unreadable: Option<String>,
}

/// Shared by all reconciliations of a process.
pub struct Context {
    /// Client for everything but the lease.
    pub client: Client,
    /// What the administrator decides.
    pub settings: Settings,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Whether this process may write.
    pub leadership: Leadership,
    /// Pauses after errors.
    pub backoff: Backoff,
    /// Where to stop, in tests.
    pub faults: FaultHook,
    memory: Mutex<HashMap<String, Memory>>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Context {
    /// A context with nothing remembered.
    pub fn new(client: Client, settings: Settings, metrics: Arc<Metrics>, leadership: Leadership, faults: FaultHook) -> Self {
        Self { client, settings, metrics, leadership, backoff: Backoff::default(), faults, memory: Mutex::default() }
    }

    /// Makes one call: bounded in time, and a write only while this process leads.
    pub async fn call<T>(&self, operation: Operation, call: impl Future<Output = kube::Result<T>>) -> Result<T, Error> {
        self.fault("before", operation).await;
        if operation.is_write() && !self.leadership.is_valid() {
            return Err(Error::NotLeading { operation });
        }
        let answer = tokio::time::timeout(CALL, call).await;
        self.fault("after", operation).await;
        match answer {
            Err(_elapsed) => Err(Error::TimedOut { operation, limit: CALL }),
            Ok(Err(source)) => Err(Error::Api { operation, source: Box::new(source) }),
            Ok(Ok(value)) => Ok(value),
        }
    }

    async fn fault(&self, when: &str, operation: Operation) {
        if (self.faults.0)(&format!("{when}:{}", operation.as_str())) {
            std::future::pending::<()>().await;
        }
    }

    /// The newest status known, with the resource version of the object that has it: the cache's, or that of our own last write where the cache has not
    /// seen it yet.
    pub fn newest_status(&self, job: &FineTuneJob) -> (FineTuneJobStatus, Option<String>) {
        let cached = (job.status.clone().unwrap_or_default(), job.resource_version());
        let (Some(uid), Some(seen)) = (job.uid(), version(job.resource_version())) else { return cached };
        let mut memory = self.lock();
        let Some(memory) = memory.get_mut(&uid) else { return cached };
        match &memory.written {
            Some((written, status)) if *written > seen => (FineTuneJobStatus::clone(status), Some(written.to_string())),
            // The cache has caught up.
            _ => {
                memory.written = None;
                cached
            }
        }
    }

    /// Notes what the API server returned to a status write.
    pub fn remember_status(&self, job: &FineTuneJob) {
        let (Some(uid), Some(version)) = (job.uid(), version(job.resource_version())) else { return };
        let mut memory = self.lock();
        let memory = memory.entry(uid).or_default();
        memory.written = Some((version, Box::new(job.status.clone().unwrap_or_default())));
        memory.written_at = Some(Instant::now());
    }

    /// How long ago this process wrote the status.
    pub fn since_write(&self, uid: &str) -> Option<Duration> {
        self.lock().get(uid)?.written_at.map(|at| at.elapsed())
    }

    /// Notes a Job that was created or changed, and returns of it what the caches would keep.
    pub fn remember_job(&self, uid: &str, mut job: Job) -> Arc<Job> {
        strip_child(&mut job);
        let job = Arc::new(job);
        self.lock().entry(uid.to_owned()).or_default().created = Some((Arc::clone(&job), Instant::now()));
        job
    }

    /// Forgets the Job that was created: it has been deleted.
    pub fn forget_job(&self, uid: &str) {
        if let Some(memory) = self.lock().get_mut(uid) {
            memory.created = None;
        }
    }

    /// The newer of the Job in the cache and the one that this process has created a moment ago.
    pub fn newest_job(&self, uid: &str, cached: Option<Arc<Job>>) -> Option<Arc<Job>> {
        let mut memory = self.lock();
        let Some(memory) = memory.get_mut(uid) else { return cached };
        let Some((created, at)) = &memory.created else { return cached };
        let older = match &cached {
            Some(cached) => version(cached.resource_version()) < version(created.resource_version()),
            None => true,
        };
        if older && at.elapsed() < BELIEF {
            return Some(Arc::clone(created));
        }
        memory.created = None;
        cached
    }

    /// The last look at the events about the job's pod.
    pub fn looked(&self, uid: &str) -> Option<Looked> {
        self.lock().get(uid)?.looked.clone()
    }

    /// Notes a look at the events about the job's pod.
    pub fn remember_look(&self, uid: &str, looked: Looked) {
        self.lock().entry(uid.to_owned()).or_default().looked = Some(looked);
    }

    /// Whether it has been said that the object cannot be read for that reason; from now on it has.
    pub fn told_unreadable(&self, uid: &str, problem: &str) -> bool {
        let mut memory = self.lock();
        let told = &mut memory.entry(uid.to_owned()).or_default().unreadable;
        let before = told.replace(problem.to_owned());
        before.as_deref() == Some(problem)
    }

    /// Forgets all about a job that is gone.
    pub fn forget(&self, uid: &str) {
        self.lock().remove(uid);
        self.backoff.succeeded(uid);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Memory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long after a creation the cache is asked again.
pub const BELIEF_ENDS: Duration = BELIEF.saturating_add(Duration::from_secs(1));

/// Resource versions of one kind are numbers that grow (Kubernetes says so since 1.35, and etcd always has); where one is not, the cache wins.
fn version(text: Option<String>) -> Option<u64> {
    text?.parse().ok()
}
