//! Kueue's Workloads: whether the cluster has any, and which belongs to which Job. Kueue may come and go while the operator runs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use std::time::Duration;

use futures::StreamExt as _;
use kube::Client;
use kube::api::{Api, DynamicObject};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::sync::{mpsc, watch};

use crate::controller::caches::{JobRef, Request};
use crate::controller::queue::Urgency;
use crate::controller::readiness::until;
use crate::reconcile::kueue::{self, Workload};

/// How often Kueue is looked for.
const KUEUE_CHECK: Duration = Duration::from_secs(30);

/// What is known of Kueue. Clones share it.
#[derive(Debug, Clone)]
pub struct Workloads {
    /// Workloads by the UID of their Job.
    by_job: Arc<RwLock<HashMap<String, Workload>>>,
    installed: Arc<AtomicBool>,
    /// Whether it is known if there is Kueue, and its Workloads with it.
    seen: Arc<watch::Sender<bool>>,
}

impl Default for Workloads {
    fn default() -> Self {
        Self { by_job: Arc::default(), installed: Arc::default(), seen: Arc::new(watch::Sender::new(false)) }
    }
}

impl Workloads {
    /// The Workload of a Job.
    pub fn of(&self, job_uid: &str) -> Option<Workload> {
        self.by_job.read().unwrap_or_else(PoisonError::into_inner).get(job_uid).cloned()
    }

    /// Whether the cluster has Kueue.
    pub fn installed(&self) -> bool {
        self.installed.load(Ordering::Relaxed)
    }

    /// Waits until it is known whether there is Kueue, and its Workloads with it: without them every queued job would look as if it had lost its quota.
    pub async fn ready(&self) -> bool {
        until(&mut self.seen.subscribe()).await
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<String, Workload>> {
        self.by_job.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks for Kueue again and again; while it is there, watches its Workloads. Only the API server's word that it is not there means so: what cannot be
/// known in an outage stays as it was.
pub(super) async fn follow(
    client: Client,
    namespace: Option<String>,
    workloads: Workloads,
    requests: mpsc::UnboundedSender<Request>,
    everyone: impl Fn() -> Vec<JobRef>,
) {
    let ask_everyone = || {
        for job in everyone() {
            let _ended = requests.send(Request { job, urgency: Urgency::Routine });
        }
    };
    loop {
        match find_kueue(&client).await {
            Some(Some(resource)) => {
                tracing::info!(version = %resource.api_version, "found Kueue");
                workloads.installed.store(true, Ordering::Relaxed);
                ask_everyone();
                let api: Api<DynamicObject> = match &namespace {
                    Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
                    None => Api::all_with(client.clone(), &resource),
                };
                if watch_workloads(api, &resource.api_version, &client, &workloads, &requests).await == Ended::OtherVersion {
                    continue;
                }
                tracing::info!("Kueue is gone");
                workloads.installed.store(false, Ordering::Relaxed);
                workloads.write().clear();
                ask_everyone();
            }
            Some(None) => {
                workloads.seen.send_replace(true);
            }
            None => {}
        }
        tokio::time::sleep(KUEUE_CHECK).await;
    }
}

/// Kueue's Workload, or `Some(None)` where the cluster has none; `None` where the API server does not say.
async fn find_kueue(client: &Client) -> Option<Option<kube::api::ApiResource>> {
    match tokio::time::timeout(KUEUE_CHECK, kube::discovery::group(client, kueue::GROUP)).await {
        Ok(Ok(group)) => Some(group.recommended_kind("Workload").map(|(resource, _)| resource)),
        Ok(Err(kube::Error::Discovery(kube::error::DiscoveryError::MissingApiGroup(_)))) => Some(None),
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => Some(None),
        Ok(Err(error)) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "failed to look for Kueue; trying again");
            None
        }
        Err(_elapsed) => None,
    }
}

/// Why Workloads are not watched any more.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// The API server does not know them.
    Gone,
    /// The API server serves them in another version.
    OtherVersion,
}

/// Keeps the Workloads until the API server says that it does not know them, or not in this version.
async fn watch_workloads(api: Api<DynamicObject>, version: &str, client: &Client, workloads: &Workloads, requests: &mpsc::UnboundedSender<Request>) -> Ended {
    let mut stream = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    let mut listed = HashMap::new();
    let request = |object: &DynamicObject| {
        let job = object.metadata.owner_references.iter().flatten().find(|owner| owner.kind == "Job")?;
        // Children are named after their FineTuneJob; a Job of others asks for a FineTuneJob that does not exist, which is nothing.
        Some(ObjectRef::new(job.name.strip_suffix(finetune_api::JOB_SUFFIX)?).within(object.metadata.namespace.as_deref()?))
    };
    while let Some(event) = stream.next().await {
        let concerned = match event {
            Ok(watcher::Event::Init) => {
                listed.clear();
                None
            }
            Ok(watcher::Event::InitApply(object)) => {
                listed.extend(Workload::read(&object).map(|workload| (workload.job_uid.clone(), workload)));
                request(&object)
            }
            Ok(watcher::Event::InitDone) => {
                *workloads.write() = std::mem::take(&mut listed);
                workloads.seen.send_replace(true);
                None
            }
            Ok(watcher::Event::Apply(object)) => {
                workloads.write().extend(Workload::read(&object).map(|workload| (workload.job_uid.clone(), workload)));
                request(&object)
            }
            Ok(watcher::Event::Delete(object)) => {
                if let Some(workload) = Workload::read(&object) {
                    workloads.write().remove(&workload.job_uid);
                }
                request(&object)
            }
            Err(error) => {
                tracing::warn!(watch = "workloads", error = &error as &dyn std::error::Error, "failed to watch; trying again");
                match find_kueue(client).await {
                    Some(None) => return Ended::Gone,
                    Some(Some(found)) if found.api_version != version => return Ended::OtherVersion,
                    // Jobs without a queue must not wait for a Kueue that cannot be read.
                    _ => workloads.seen.send_replace(true),
                };
                None
            }
        };
        if let Some(job) = concerned {
            let _ended = requests.send(Request { job, urgency: Urgency::Change });
        }
    }
    Ended::Gone
}
