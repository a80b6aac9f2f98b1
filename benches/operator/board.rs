//! Who came to which moment when, as watches of the API server see it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use finetune_api::{FineTuneJob, FineTuneJobStatus, JOB_LABEL, JOB_SUFFIX};
use finetune_operator::reconcile::status::lifecycle_differs;
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};

/// Moments of a job's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Moment {
    /// Its pod exists.
    PodSeen,
    /// The FineTuneJob shows that its Job exists.
    CreatedSeen,
    /// The stand-in is about to write that the pod runs.
    StartSent,
    /// A watch has reported the running pod: what lies before is the API server's, what follows the operator's, and the API server's again.
    RunSeen,
    /// The API server has answered the operator's write of the status that counts the attempt: the operator's log has the time.
    StartWritten,
    /// A watch shows that the FineTuneJob counts the attempt.
    StartSeen,
    /// The FineTuneJob shows that it trains: its trainer was asked.
    TrainingSeen,
    /// The stand-in is about to write that the pod has succeeded.
    EndSent,
    /// The batch Job is complete.
    ChildSeen,
    /// The FineTuneJob is complete.
    EndSeen,
}

/// Moments by job (`namespace/name`).
#[derive(Debug, Default)]
pub(crate) struct Board {
    moments: Mutex<HashMap<(String, Moment), Timestamp>>,
    pods: Mutex<HashMap<String, String>>,
    /// The last status of each job, and how many writes changed nothing of its life: progress.
    progress: Mutex<HashMap<String, (FineTuneJobStatus, usize)>>,
}

impl Board {
    /// Notes the first time that a job came to a moment.
    pub(crate) fn note(&self, key: &str, moment: Moment) {
        self.note_at(key, moment, Timestamp::now());
    }

    /// Notes when a job came to a moment, unless that is known.
    pub(crate) fn note_at(&self, key: &str, moment: Moment, time: Timestamp) {
        self.moments.lock().expect("no panic").entry((key.to_owned(), moment)).or_insert(time);
    }

    /// How many of these have come to a moment.
    pub(crate) fn count(&self, keys: &[String], moment: Moment) -> usize {
        let moments = self.moments.lock().expect("no panic");
        keys.iter().filter(|key| moments.contains_key(&((*key).clone(), moment))).count()
    }

    /// From one moment to another, for each of these.
    pub(crate) fn spans(&self, keys: &[String], from: Moment, to: Moment) -> Vec<Duration> {
        let moments = self.moments.lock().expect("no panic");
        let at = |key: &String, moment| moments.get(&(key.clone(), moment)).unwrap_or_else(|| panic!("{key} never came to {moment:?}"));
        keys.iter().map(|key| Duration::try_from(at(key, to).duration_since(*at(key, from))).unwrap_or_default()).collect()
    }

    /// Of these, status writes that reported progress alone.
    pub(crate) fn progress_writes(&self, keys: &[String]) -> usize {
        let progress = self.progress.lock().expect("no panic");
        keys.iter().filter_map(|key| progress.get(key)).map(|(_, writes)| writes).sum()
    }

    /// All moments as lines of job, moment and time, to be laid beside the operator's log.
    pub(crate) fn lines(&self) -> String {
        let moments = self.moments.lock().expect("no panic");
        let mut lines: Vec<String> = moments.iter().map(|((key, moment), when)| format!("{key}\t{moment:?}\t{when}\n")).collect();
        lines.sort_unstable();
        lines.concat()
    }

    /// Name of the job's pod.
    pub(crate) fn pod(&self, key: &str) -> String {
        self.pods.lock().expect("no panic")[key].clone()
    }

    /// Watches FineTuneJobs, batch Jobs and pods until the process ends.
    pub(crate) fn watch(self: &Arc<Self>, client: &Client) {
        let board = Arc::clone(self);
        let jobs: Api<FineTuneJob> = Api::all(client.clone());
        tokio::spawn(watcher(jobs, watcher::Config::default()).default_backoff().touched_objects().for_each(move |job| {
            if let Ok(job) = job {
                board.job(&job);
            }
            std::future::ready(())
        }));
        let board = Arc::clone(self);
        let children: Api<Job> = Api::all(client.clone());
        tokio::spawn(watcher(children, watcher::Config::default().labels(JOB_LABEL)).default_backoff().touched_objects().for_each(move |child| {
            if let Ok(child) = child {
                board.child(&child);
            }
            std::future::ready(())
        }));
        let board = Arc::clone(self);
        let pods: Api<Pod> = Api::all(client.clone());
        tokio::spawn(watcher(pods, watcher::Config::default().labels(JOB_LABEL)).default_backoff().touched_objects().for_each(move |pod| {
            if let Ok(pod) = pod {
                board.seen(&pod);
            }
            std::future::ready(())
        }));
    }

    fn job(&self, job: &FineTuneJob) {
        let Some(status) = &job.status else { return };
        let key = format!("{}/{}", job.namespace().unwrap_or_default(), job.name_any());
        {
            let mut progress = self.progress.lock().expect("no panic");
            let (last, writes) = progress.entry(key.clone()).or_default();
            if *last != *status && !lifecycle_differs(last, status) {
                *writes += 1;
            }
            last.clone_from(status);
        }
        if status.attempts.is_some_and(|attempts| attempts.started > 0) {
            self.note(&key, Moment::StartSeen);
        }
        let is_true = |kind: &str| status.conditions.iter().any(|condition| condition.type_ == kind && condition.status == "True");
        if is_true("JobCreated") {
            self.note(&key, Moment::CreatedSeen);
        }
        if is_true("Running") {
            self.note(&key, Moment::TrainingSeen);
        }
        if is_true("Complete") {
            self.note(&key, Moment::EndSeen);
        }
    }

    fn child(&self, child: &Job) {
        let name = child.name_any();
        let key = format!("{}/{}", child.namespace().unwrap_or_default(), name.strip_suffix(JOB_SUFFIX).unwrap_or(&name));
        let conditions = child.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        if conditions.iter().any(|condition| condition.type_ == "Complete" && condition.status == "True") {
            self.note(&key, Moment::ChildSeen);
        }
    }

    fn seen(&self, pod: &Pod) {
        let Some(job) = pod.labels().get(JOB_LABEL) else { return };
        let key = format!("{}/{job}", pod.namespace().unwrap_or_default());
        self.pods.lock().expect("no panic").insert(key.clone(), pod.name_any());
        self.note(&key, Moment::PodSeen);
        if pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running") {
            self.note(&key, Moment::RunSeen);
        }
    }
}

/// Median, 99th percentile and maximum.
pub(crate) fn quantiles(mut spans: Vec<Duration>) -> [Duration; 3] {
    spans.sort_unstable();
    let at = |share: f64| spans[((spans.len() - 1) as f64 * share).round() as usize];
    [at(0.5), at(0.99), at(1.0)]
}
