//! Caches of what is watched, and who is to be reconciled when something changes.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DynamicObject};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, Resource, ResourceExt as _};
use tokio::sync::mpsc;

use super::kueue::{self, Workload};
use super::nodes;
use super::pod_names::PodNames;
use super::progress::Changed;
use super::queue::Urgency;
use super::strip::{strip_child, strip_job, strip_pod};
use finetune_api::{FineTuneJob, JOB_LABEL};

/// A FineTuneJob, or why it cannot be read: one bad object must not stop the watch of all.
pub type Guarded = DeserializeGuard<FineTuneJob>;
/// Names a FineTuneJob.
pub type JobRef = ObjectRef<Guarded>;

/// Who is to be reconciled, and why.
#[derive(Debug, Clone)]
pub struct Request {
    /// The job.
    pub job: JobRef,
    /// Whether something has changed.
    pub urgency: Urgency,
}

/// How often Kueue is looked for.
const KUEUE_CHECK: Duration = Duration::from_secs(30);

/// What is known of one namespace, or of all.
#[derive(Clone)]
pub struct Caches {
    /// FineTuneJobs.
    pub jobs: Store<Guarded>,
    /// Batch Jobs with our label.
    pub children: Store<Job>,
    /// Pods with our label.
    pub pods: Store<Pod>,
    /// Which of them belong to whom.
    pod_names: PodNames,
    /// Workloads by the UID of their Job.
    workloads: Arc<RwLock<HashMap<String, Workload>>>,
    kueue: Arc<AtomicBool>,
    /// Nodes, where they may be watched.
    nodes: Option<Store<PartialObjectMeta<Node>>>,
}

impl Debug for Caches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caches").field("jobs", &self.jobs.len()).field("children", &self.children.len()).field("pods", &self.pods.len()).finish_non_exhaustive()
    }
}

impl Caches {
    /// The pods with the label of the FineTuneJob `namespace/job`, also those of an earlier one of that name.
    pub fn pods_of(&self, namespace: &str, job: &str) -> Vec<Arc<Pod>> {
        self.pod_names.of(namespace, job).into_iter().filter_map(|name| self.pods.get(&ObjectRef::new(&name).within(namespace))).collect()
    }

    /// The Workload of a Job.
    pub fn workload(&self, job_uid: &str) -> Option<Workload> {
        self.workloads.read().unwrap_or_else(PoisonError::into_inner).get(job_uid).cloned()
    }

    /// Whether the cluster has Kueue.
    pub fn kueue_installed(&self) -> bool {
        self.kueue.load(Ordering::Relaxed)
    }

    /// Whether any node's labels satisfy the pod; `None` where nodes are not watched.
    pub fn any_node_matches(&self, pod: &Pod) -> Option<bool> {
        let (nodes, spec) = (self.nodes.as_ref()?, pod.spec.as_ref()?);
        Some(nodes.find(|node| nodes::matches(spec, &node.name_any(), node.labels())).is_some())
    }

    /// Number of jobs by (namespace, phase).
    pub fn counts(&self) -> Vec<((String, String), i64)> {
        let mut counts = HashMap::new();
        for job in self.jobs.state() {
            let phase = job.0.as_ref().ok().and_then(|job| job.status.as_ref()).and_then(|status| status.phase).map_or("Pending", finetune_api::Phase::as_str);
            *counts.entry((job.namespace().unwrap_or_default(), phase.to_owned())).or_insert(0) += 1;
        }
        counts.into_iter().collect()
    }

    /// Waits until every cache is filled. An error means that a watch has ended for good, which happens at shutdown only.
    pub async fn ready(&self) -> bool {
        let nodes = async {
            match &self.nodes {
                Some(nodes) => nodes.wait_until_ready().await.is_ok(),
                None => true,
            }
        };
        let (jobs, children, pods, nodes) = futures::join!(self.jobs.wait_until_ready(), self.children.wait_until_ready(), self.pods.wait_until_ready(), nodes);
        jobs.is_ok() && children.is_ok() && pods.is_ok() && nodes
    }
}

/// Starts the watches. The futures returned drive them and never end by themselves; `requests` hears who is to be reconciled.
pub fn start(
    client: &Client,
    namespace: Option<&str>,
    watch_nodes: bool,
    requests: &mpsc::UnboundedSender<Request>,
    gone: impl Fn(&str) + Send + Sync + 'static,
) -> (Caches, Vec<futures::future::BoxFuture<'static, ()>>) {
    let ours = || watcher::Config::default().labels(JOB_LABEL);
    let (job_writer, child_writer, pod_writer) = (Writer::<Guarded>::default(), Writer::<Job>::default(), Writer::<Pod>::default());
    let jobs = job_writer.as_reader();
    let node_writer = watch_nodes.then(Writer::<PartialObjectMeta<Node>>::default);
    let caches = Caches {
        jobs: jobs.clone(),
        children: child_writer.as_reader(),
        pods: pod_writer.as_reader(),
        pod_names: PodNames::default(),
        workloads: Arc::default(),
        kueue: Arc::default(),
        nodes: node_writer.as_ref().map(Writer::as_reader),
    };
    let everyone = {
        let jobs = jobs.clone();
        move || jobs.state().iter().map(|job| ObjectRef::from_obj(job.as_ref())).collect::<Vec<JobRef>>()
    };

    let mut drivers: Vec<futures::future::BoxFuture<'static, ()>> = Vec::new();
    let stream = watcher(scoped::<Guarded>(client, namespace), watcher::Config::default()).default_backoff().modify(strip_job);
    let stream = stream.inspect(move |event| {
        if let Ok(watcher::Event::Delete(job)) = event
            && let Some(uid) = job.uid()
        {
            gone(&uid);
        }
    });
    drivers.push(Box::pin(drive("finetunejobs", stream, job_writer, requests.clone(), |job: &Guarded| Some(ObjectRef::from_obj(job)), Vec::new)));

    let stream = watcher(scoped::<Job>(client, namespace), ours()).default_backoff().modify(strip_child);
    drivers.push(Box::pin(drive("jobs", stream, child_writer, requests.clone(), |job: &Job| by_label(job.meta()), everyone.clone())));

    let pod_names = caches.pod_names.clone();
    let stream = watcher(scoped::<Pod>(client, namespace), ours()).default_backoff().modify(strip_pod).inspect(move |event| {
        if let Ok(event) = event {
            pod_names.follow(event);
        }
    });
    drivers.push(Box::pin(drive("pods", stream, pod_writer, requests.clone(), |pod: &Pod| by_label(pod.meta()), everyone.clone())));

    if let Some(writer) = node_writer {
        let stream = watcher(Api::<PartialObjectMeta<Node>>::all(client.clone()), watcher::Config::default()).default_backoff().modify(|node| {
            let labels = node.metadata.labels.take();
            let name = node.metadata.name.take();
            node.metadata = ObjectMeta { name, labels, ..ObjectMeta::default() };
        });
        // A node alone changes nothing for a job: the scheduler tells the pod.
        drivers.push(Box::pin(drive("nodes", stream, writer, requests.clone(), |_: &PartialObjectMeta<Node>| None, Vec::new)));
    }
    drivers.push(Box::pin(watch_kueue(client.clone(), namespace.map(str::to_owned), caches.clone(), requests.clone(), everyone)));
    (caches, drivers)
}

/// Turns changes that a trainer reports into requests.
pub fn request_of(changed: &Changed) -> Request {
    Request { job: ObjectRef::new(&changed.name).within(&changed.namespace), urgency: Urgency::Routine }
}

fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = kube::core::NamespaceResourceScope>,
    K::DynamicType: Default,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Applies a watch to its cache and asks for those concerned. After a (re-)listing everyone is asked: what vanished meanwhile has no event.
async fn drive<K>(
    what: &'static str,
    stream: impl Stream<Item = watcher::Result<watcher::Event<K>>>,
    mut writer: Writer<K>,
    requests: mpsc::UnboundedSender<Request>,
    concerned: impl Fn(&K) -> Option<JobRef>,
    everyone: impl Fn() -> Vec<JobRef>,
) where
    K: Resource + Clone,
    K::DynamicType: Eq + Hash + Clone,
{
    let mut stream = std::pin::pin!(stream);
    while let Some(event) = stream.next().await {
        match event {
            Ok(event) => {
                writer.apply_watcher_event(&event);
                let (asked, urgency) = match &event {
                    watcher::Event::Apply(object) | watcher::Event::Delete(object) => (concerned(object).into_iter().collect(), Urgency::Change),
                    watcher::Event::InitApply(object) => (concerned(object).into_iter().collect(), Urgency::Routine),
                    watcher::Event::InitDone => (everyone(), Urgency::Routine),
                    watcher::Event::Init => (Vec::new(), Urgency::Routine),
                };
                for job in asked {
                    // The receiver goes when the controller ends.
                    let _ended = requests.send(Request { job, urgency });
                }
            }
            Err(error) => tracing::warn!(watch = what, error = &error as &dyn std::error::Error, "failed to watch; trying again"),
        }
    }
}

/// The FineTuneJob that an object of ours belongs to, by its label.
fn by_label(metadata: &ObjectMeta) -> Option<JobRef> {
    let name = metadata.labels.as_ref()?.get(JOB_LABEL)?;
    Some(ObjectRef::new(name).within(metadata.namespace.as_deref()?))
}

/// Looks for Kueue again and again; while it is there, watches its Workloads.
async fn watch_kueue(client: Client, namespace: Option<String>, caches: Caches, requests: mpsc::UnboundedSender<Request>, everyone: impl Fn() -> Vec<JobRef>) {
    loop {
        if let Some(resource) = find_kueue(&client).await {
            tracing::info!(version = %resource.api_version, "found Kueue");
            caches.kueue.store(true, Ordering::Relaxed);
            for job in everyone() {
                let _ended = requests.send(Request { job, urgency: Urgency::Routine });
            }
            let api: Api<DynamicObject> = match &namespace {
                Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
                None => Api::all_with(client.clone(), &resource),
            };
            watch_workloads(api, &client, &caches, &requests).await;
            tracing::info!("Kueue is gone");
            caches.kueue.store(false, Ordering::Relaxed);
            caches.workloads.write().unwrap_or_else(PoisonError::into_inner).clear();
        }
        tokio::time::sleep(KUEUE_CHECK).await;
    }
}

async fn find_kueue(client: &Client) -> Option<kube::api::ApiResource> {
    match tokio::time::timeout(KUEUE_CHECK, kube::discovery::group(client, kueue::GROUP)).await {
        Ok(Ok(group)) => group.recommended_kind("Workload").map(|(resource, _)| resource),
        Ok(Err(_)) | Err(_) => None,
    }
}

/// Keeps the Workloads until the API server does not know them any more.
async fn watch_workloads(api: Api<DynamicObject>, client: &Client, caches: &Caches, requests: &mpsc::UnboundedSender<Request>) {
    let mut stream = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    let mut listed = HashMap::new();
    let request = |object: &DynamicObject| {
        let job = object.metadata.owner_references.iter().flatten().find(|owner| owner.kind == "Job")?;
        // Children are named after their FineTuneJob; a Job of others asks for a FineTuneJob that does not exist, which is nothing.
        Some(ObjectRef::new(job.name.strip_suffix(finetune_api::JOB_SUFFIX)?).within(object.metadata.namespace.as_deref()?))
    };
    let write = || caches.workloads.write().unwrap_or_else(PoisonError::into_inner);
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
                *write() = std::mem::take(&mut listed);
                None
            }
            Ok(watcher::Event::Apply(object)) => {
                write().extend(Workload::read(&object).map(|workload| (workload.job_uid.clone(), workload)));
                request(&object)
            }
            Ok(watcher::Event::Delete(object)) => {
                if let Some(workload) = Workload::read(&object) {
                    write().remove(&workload.job_uid);
                }
                request(&object)
            }
            Err(error) => {
                tracing::warn!(watch = "workloads", error = &error as &dyn std::error::Error, "failed to watch; trying again");
                if find_kueue(client).await.is_none() {
                    return;
                }
                None
            }
        };
        if let Some(job) = concerned {
            let _ended = requests.send(Request { job, urgency: Urgency::Change });
        }
    }
}
