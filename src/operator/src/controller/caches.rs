//! Caches of what is watched, and who is to be reconciled when something changes.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ListParams};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, Resource, ResourceExt as _};
use tokio::sync::mpsc;

use crate::controller::departed::Departed;
use crate::controller::pod_names::PodNames;
use crate::controller::progress::{self, Changed};
use crate::controller::queue::Urgency;
use crate::controller::readiness::{Problem, Readiness, Scope, Trouble};
use crate::controller::strip::{strip_child, strip_job, strip_pod};
use crate::controller::workloads::{self, Workloads};
use crate::reconcile::conditions;
use crate::reconcile::dereference::is_ours;
use crate::reconcile::kueue::Workload;
use crate::reconcile::nodes;
use crate::reconcile::world;
use crate::telemetry::metrics::Census;
use finetune_api::{FineTuneJob, FineTuneJobStatus, JOB_LABEL, JOB_UID_LABEL, job_name};

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

/// How often something that could not be watched is asked for: a watch that goes on where it was has nothing to show for it.
const TROUBLE_CHECK: Duration = Duration::from_secs(5);

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
    /// Those that are gone.
    departed: Departed,
    /// Kueue's.
    workloads: Workloads,
    /// Nodes, where they may be watched.
    nodes: Option<Store<PartialObjectMeta<Node>>>,
}

impl Debug for Caches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caches").field("jobs", &self.jobs.len()).field("children", &self.children.len()).field("pods", &self.pods.len()).finish_non_exhaustive()
    }
}

impl Caches {
    /// The pods with the label of the FineTuneJob `namespace/job`, also those of an earlier one of that name, and those that are gone and whose end is
    /// not in `status`.
    pub fn pods_of(&self, namespace: &str, job: &str, status: &FineTuneJobStatus) -> Vec<Arc<Pod>> {
        let listed = self.pod_names.of(namespace, job).into_iter().filter_map(|name| self.pods.get(&ObjectRef::new(&name).within(namespace)));
        let mut pods: Vec<_> = listed.collect();
        // The watch reports a pod as gone shortly before the cache forgets it.
        for gone in self.departed.take(namespace, job, status) {
            pods.retain(|pod| pod.metadata.uid != gone.metadata.uid);
            pods.push(gone);
        }
        pods
    }

    /// Running pods of the Jobs of known FineTuneJobs: those that may be asked for progress. A label alone proves nothing, since anybody may put it onto
    /// a pod; owner and UIDs must be right.
    pub fn trainers(&self) -> Vec<Arc<Pod>> {
        let mut pods = self.pods.state();
        pods.retain(|pod| progress::address(pod).is_some() && self.is_trainer(pod).unwrap_or(false));
        pods
    }

    fn is_trainer(&self, pod: &Pod) -> Option<bool> {
        let (namespace, labels) = (pod.metadata.namespace.as_deref()?, pod.metadata.labels.as_ref()?);
        let (name, uid) = (labels.get(JOB_LABEL)?, labels.get(JOB_UID_LABEL)?);
        let known = self.jobs.get(&ObjectRef::new(name).within(namespace))?;
        let child = self.children.get(&ObjectRef::new(&job_name(name)).within(namespace))?;
        let owned = world::owner_uid(pod) == child.metadata.uid.as_deref();
        Some(known.uid().as_ref() == Some(uid) && is_ours(&child, uid) && owned)
    }

    /// The Workload of a Job.
    pub fn workload(&self, job_uid: &str) -> Option<Workload> {
        self.workloads.of(job_uid)
    }

    /// Whether the cluster has Kueue.
    pub fn kueue_installed(&self) -> bool {
        self.workloads.installed()
    }

    /// Whether any node's labels satisfy the pod; `None` where nodes are not watched.
    pub fn any_node_matches(&self, pod: &Pod) -> Option<bool> {
        let (nodes, spec) = (self.nodes.as_ref()?, pod.spec.as_ref()?);
        Some(nodes.find(|node| nodes::matches(spec, &node.name_any(), node.labels())).is_some())
    }

    /// The jobs of the caches, for metrics.
    pub fn census(&self, now: Timestamp) -> Census {
        let mut census = Census::default();
        for job in self.jobs.state() {
            let status = job.0.as_ref().ok().and_then(|job| job.status.as_ref());
            let phase = status.and_then(|status| status.phase).map_or("Pending", finetune_api::Phase::as_str);
            let list = status.map_or(&[][..], |status| &status.conditions);
            let created = job.meta().creation_timestamp.as_ref().map_or(now, |created| created.0);
            let since = conditions::phase_since(list).unwrap_or(created);
            census.add(&job.namespace().unwrap_or_default(), phase, now.duration_since(since).as_secs().max(0), conditions::is_progress_unknown(list));
        }
        census
    }

    /// Waits until every cache is filled. An error means that a watch has ended for good, which happens at shutdown only.
    pub async fn ready(&self) -> bool {
        let nodes = async {
            match &self.nodes {
                Some(nodes) => nodes.wait_until_ready().await.is_ok(),
                None => true,
            }
        };
        let (jobs, children, pods) = (self.jobs.wait_until_ready(), self.children.wait_until_ready(), self.pods.wait_until_ready());
        let (jobs, children, pods, nodes, kueue) = futures::join!(jobs, children, pods, nodes, self.workloads.ready());
        jobs.is_ok() && children.is_ok() && pods.is_ok() && nodes && kueue
    }
}

/// Starts the watches. The futures returned drive them and never end by themselves; `requests` hears who is to be reconciled.
pub fn start(
    client: &Client,
    namespace: Option<&str>,
    watch_nodes: bool,
    requests: &mpsc::UnboundedSender<Request>,
    readiness: &Arc<Readiness>,
    gone: impl Fn(&str) + Send + Sync + 'static,
) -> (Caches, Vec<futures::future::BoxFuture<'static, ()>>) {
    let ours = || watcher::Config::default().labels(JOB_LABEL);
    let (job_writer, child_writer, pod_writer) = (Writer::<Guarded>::default(), Writer::<Job>::default(), Writer::<Pod>::default());
    let jobs = job_writer.as_reader();
    let node_writer = watch_nodes.then(Writer::<PartialObjectMeta<Node>>::default);
    let health = |kind| Health { readiness: Arc::clone(readiness), namespace: namespace.unwrap_or_default().to_owned(), kind };
    let caches = Caches {
        jobs: jobs.clone(),
        children: child_writer.as_reader(),
        pods: pod_writer.as_reader(),
        pod_names: PodNames::default(),
        departed: Departed::default(),
        workloads: Workloads::default(),
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
    drivers.push(Box::pin(drive(health("finetunejobs"), stream, job_writer, requests.clone(), |job: &Guarded| Some(ObjectRef::from_obj(job)), Vec::new)));

    let stream = watcher(scoped::<Job>(client, namespace), ours()).default_backoff().modify(strip_child);
    drivers.push(Box::pin(drive(health("jobs"), stream, child_writer, requests.clone(), |job: &Job| by_label(job.meta()), everyone.clone())));

    let (pod_names, departed) = (caches.pod_names.clone(), caches.departed.clone());
    let stream = watcher(scoped::<Pod>(client, namespace), ours()).default_backoff().modify(strip_pod).inspect(move |event| {
        if let Ok(event) = event {
            pod_names.follow(event);
            departed.follow(event);
        }
    });
    drivers.push(Box::pin(drive(health("pods"), stream, pod_writer, requests.clone(), |pod: &Pod| by_label(pod.meta()), everyone.clone())));

    if let Some(writer) = node_writer {
        let stream = watcher(Api::<PartialObjectMeta<Node>>::all(client.clone()), watcher::Config::default()).default_backoff().modify(|node| {
            let labels = node.metadata.labels.take();
            let name = node.metadata.name.take();
            node.metadata = ObjectMeta { name, labels, ..ObjectMeta::default() };
        });
        // A node alone changes nothing for a job: the scheduler changes the pod.
        drivers.push(Box::pin(drive(health("nodes"), stream, writer, requests.clone(), |_: &PartialObjectMeta<Node>| None, Vec::new)));
    }
    drivers.push(Box::pin(workloads::follow(client.clone(), namespace.map(str::to_owned), caches.workloads.clone(), requests.clone(), everyone)));
    drivers.push(Box::pin(recover(client.clone(), namespace.map(str::to_owned), Arc::clone(readiness))));
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

/// Notes whether one kind can be watched.
struct Health {
    readiness: Arc<Readiness>,
    namespace: String,
    kind: &'static str,
}

impl Health {
    fn recovered(&self) {
        if self.readiness.recovered(&self.namespace, self.kind) {
            tracing::info!(watch = self.kind, "{} is watched again", Scope(&self.namespace));
        }
    }

    fn failed(&self, trouble: Trouble) {
        tracing::warn!(watch = self.kind, "{}; trying again", Problem { namespace: &self.namespace, kind: self.kind, trouble: &trouble });
        self.readiness.failed(&self.namespace, self.kind, trouble);
    }
}

/// Asks for what could not be watched until it can be listed again. The watch itself goes on by its own backoff.
async fn recover(client: Client, namespace: Option<String>, readiness: Arc<Readiness>) {
    let namespace = namespace.as_deref();
    let health = |kind| Health { readiness: Arc::clone(&readiness), namespace: namespace.unwrap_or_default().to_owned(), kind };
    loop {
        tokio::time::sleep(TROUBLE_CHECK).await;
        for kind in readiness.troubles(namespace.unwrap_or_default()) {
            let listed = match kind {
                "finetunejobs" => can_list(scoped::<FineTuneJob>(&client, namespace)).await,
                "jobs" => can_list(scoped::<Job>(&client, namespace)).await,
                "pods" => can_list(scoped::<Pod>(&client, namespace)).await,
                _ => can_list(Api::<Node>::all(client.clone())).await,
            };
            match listed {
                Some(Ok(())) => health(kind).recovered(),
                // The text may have changed; the log has it from the watch.
                Some(Err(trouble)) => readiness.failed(namespace.unwrap_or_default(), kind, trouble),
                None => {}
            }
        }
    }
}

/// Whether a kind can be listed; `None` where there is no answer.
async fn can_list<K: Resource + Clone + serde::de::DeserializeOwned + Debug>(api: Api<K>) -> Option<Result<(), Trouble>> {
    let answer = tokio::time::timeout(TROUBLE_CHECK, api.list_metadata(&ListParams::default().limit(1))).await.ok()?;
    Some(answer.map(drop).map_err(|error| Trouble::of(&error)))
}

/// Applies a watch to its cache and asks for those concerned. After a (re-)listing everyone is asked: what vanished meanwhile has no event.
async fn drive<K>(
    health: Health,
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
                health.recovered();
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
            Err(error) => health.failed(Trouble::of_watch(&error)),
        }
    }
}

/// The FineTuneJob that an object of ours belongs to, by its label.
fn by_label(metadata: &ObjectMeta) -> Option<JobRef> {
    let name = metadata.labels.as_ref()?.get(JOB_LABEL)?;
    Some(ObjectRef::new(name).within(metadata.namespace.as_deref()?))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Caches with one FineTuneJob `a` (UID `u1`) and its Job (UID `j1`), and these pods.
    fn caches(pods: &[Value]) -> Caches {
        let (mut jobs, mut children, mut pod_writer) = (Writer::default(), Writer::default(), Writer::default());
        let job: Guarded = serde_json::from_value(json!({
            "metadata": {"namespace": "n", "name": "a", "uid": "u1"},
            "spec": {"model": {"source": {"objectStore": {"uri": "s3://m/m/"}}}, "dataset": {"uri": "s3://d/d/"}, "output": {"uri": "s3://o/o/"}},
        }))
        .unwrap();
        assert!(job.0.is_ok());
        jobs.apply_watcher_event(&watcher::Event::Apply(job));
        let owner = json!([{"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "name": "a", "uid": "u1", "controller": true}]);
        let child = json!({"metadata": {"namespace": "n", "name": job_name("a"), "uid": "j1", "ownerReferences": owner}});
        children.apply_watcher_event(&watcher::Event::Apply(serde_json::from_value(child).unwrap()));
        for pod in pods {
            pod_writer.apply_watcher_event(&watcher::Event::Apply(serde_json::from_value(pod.clone()).unwrap()));
        }
        Caches {
            jobs: jobs.as_reader(),
            children: children.as_reader(),
            pods: pod_writer.as_reader(),
            pod_names: PodNames::default(),
            departed: Departed::default(),
            workloads: Workloads::default(),
            nodes: None,
        }
    }

    #[test]
    fn only_pods_of_known_jobs_are_asked_for_progress() {
        let pod = |name: &str, change: Value| {
            let mut pod = json!({
                "metadata": {"namespace": "n", "name": name, "uid": name, "labels": {JOB_LABEL: "a", JOB_UID_LABEL: "u1"},
                    "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "a-train", "uid": "j1", "controller": true}]},
                "status": {"podIP": "10.0.0.1", "containerStatuses": [{"name": finetune_api::TRAINER_CONTAINER, "image": "", "imageID": "", "ready": true,
                    "restartCount": 0, "state": {"running": {}}}]},
            });
            for (pointer, value) in change.as_object().unwrap() {
                *pod.pointer_mut(pointer).unwrap() = value.clone();
            }
            pod
        };
        let pods = [
            pod("right", json!({})),
            pod("labels-alone", json!({"/metadata/ownerReferences": []})),
            pod("owned-by-another", json!({"/metadata/ownerReferences/0/uid": "j2"})),
            pod("no-controller", json!({"/metadata/ownerReferences/0/controller": false})),
            pod("of-an-earlier-job", json!({"/metadata/labels": {JOB_LABEL: "a", JOB_UID_LABEL: "u0"}})),
            pod("of-no-job", json!({"/metadata/labels": {JOB_LABEL: "b", JOB_UID_LABEL: "u1"}})),
            pod("elsewhere", json!({"/metadata/namespace": "m"})),
            pod("not-running", json!({"/status/containerStatuses/0/state": {"waiting": {}}})),
        ];
        let asked: Vec<String> = caches(&pods).trainers().iter().map(|pod| pod.name_any()).collect();
        assert_eq!(asked, ["right"]);
    }
}
