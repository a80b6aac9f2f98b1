//! Pods that are gone, as they last were. A pod that somebody deletes may end and vanish between two reconciliations; how it ended decides whether its
//! Job's failure counts.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::watcher::Event;

use crate::controller::pod_names::{self, Key};
use crate::reconcile::{attempts, world};
use finetune_api::FineTuneJobStatus;

/// How long a pod is kept whose end nobody writes down: its FineTuneJob is gone, too.
const KEPT: Duration = Duration::from_hours(1);

/// A pod, and when it was seen to be gone.
type Gone = (Instant, Arc<Pod>);
/// Pods by FineTuneJob.
type Pods = HashMap<Key, Vec<Gone>>;

/// Pods that had started and are gone, by their FineTuneJob, until its status holds their end.
#[derive(Debug, Clone, Default)]
pub struct Departed(Arc<Mutex<Pods>>);

impl Departed {
    /// Follows the watch of pods.
    pub fn follow(&self, event: &Event<Pod>) {
        let Event::Delete(pod) = event else { return };
        let Some(key) = pod_names::key(pod) else { return };
        if attempts::started_at(pod).is_none() {
            return;
        }
        let now = Instant::now();
        let mut departed = self.lock();
        departed.retain(|_, pods| {
            pods.retain(|(since, _)| now.duration_since(*since) < KEPT);
            !pods.is_empty()
        });
        departed.entry(key).or_default().push((now, Arc::new(ended(pod.clone()))));
    }

    /// The pods of the FineTuneJob `namespace/job` whose end `status` does not hold yet. Those whose end it holds are forgotten.
    pub fn take(&self, namespace: &str, job: &str, status: &FineTuneJobStatus) -> Vec<Arc<Pod>> {
        let key = (namespace.to_owned(), job.to_owned());
        let mut departed = self.lock();
        let Some(pods) = departed.get_mut(&key) else { return Vec::new() };
        let written = |pod: &Pod| status.attempt_history.iter().any(|attempt| Some(&attempt.pod_uid) == pod.metadata.uid.as_ref() && attempt.cause.is_some());
        pods.retain(|(_, pod)| !written(pod));
        let left = pods.iter().map(|(_, pod)| Arc::clone(pod)).collect();
        if pods.is_empty() {
            departed.remove(&key);
        }
        left
    }

    fn lock(&self) -> MutexGuard<'_, Pods> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pod as one that has ended. The API server forgets a pod before the kubelet has reported its end where somebody deletes it by force: then that it
/// was asked to end is all that is known.
fn ended(mut pod: Pod) -> Pod {
    if !world::has_ended(&pod) {
        pod.status.get_or_insert_default().phase = Some("Failed".to_owned());
        pod.metadata.deletion_timestamp.get_or_insert_with(|| Time(Timestamp::now()));
    }
    pod
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(uid: &str, phase: &str, state: &Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"namespace": "n", "name": uid, "uid": uid, "creationTimestamp": "2026-08-24T10:00:00Z", "labels": {finetune_api::JOB_LABEL: "corgi"}},
            "status": {"phase": phase, "containerStatuses": [{"name": finetune_api::TRAINER_CONTAINER, "image": "", "imageID": "", "ready": false,
                "restartCount": 0, "state": state}]},
        }))
        .unwrap()
    }

    fn status(attempts: &Value) -> FineTuneJobStatus {
        serde_json::from_value(json!({"attemptHistory": attempts})).unwrap()
    }

    #[test]
    fn a_pod_is_kept_until_its_end_is_written() {
        let departed = Departed::default();
        let failed = pod("p1", "Failed", &json!({"terminated": {"exitCode": 137, "startedAt": "2026-08-24T10:00:01Z", "finishedAt": "2026-08-24T10:00:09Z"}}));
        departed.follow(&Event::Apply(failed.clone()));
        assert!(departed.take("n", "corgi", &status(&json!([]))).is_empty(), "it is still there");
        departed.follow(&Event::Delete(failed.clone()));
        let running = status(&json!([{"podUID": "p1", "jobUID": "j1"}]));
        assert_eq!(departed.take("n", "corgi", &running), [Arc::new(failed)]);
        assert_eq!(departed.take("n", "corgi", &running).len(), 1, "the write may have failed");
        assert!(departed.take("n", "cat", &running).is_empty() && departed.take("m", "corgi", &running).is_empty());
        let written = status(&json!([{"podUID": "p1", "jobUID": "j1", "cause": "Disrupted"}]));
        assert!(departed.take("n", "corgi", &written).is_empty());
        assert!(departed.take("n", "corgi", &running).is_empty(), "forgotten");
    }

    #[test]
    fn a_running_pod_that_vanishes_was_asked_to_end() {
        let departed = Departed::default();
        departed.follow(&Event::Delete(pod("waiting", "Pending", &json!({"waiting": {}}))));
        departed.follow(&Event::Delete(pod("running", "Running", &json!({"running": {"startedAt": "2026-08-24T10:00:01Z"}}))));
        let left = departed.take("n", "corgi", &FineTuneJobStatus::default());
        let names: Vec<&str> = left.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect();
        assert_eq!(names, ["running"], "one that never started is no attempt");
        assert!(world::has_ended(&left[0]) && left[0].metadata.deletion_timestamp.is_some());
    }
}
