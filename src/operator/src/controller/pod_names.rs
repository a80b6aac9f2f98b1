//! Which pods belong to which FineTuneJob: a reconciliation looks at its own pods, however many others there are.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::runtime::watcher::Event;

use finetune_api::JOB_LABEL;

/// A FineTuneJob: its namespace and its name.
pub type Key = (String, String);
/// Names of pods by FineTuneJob.
type Names = HashMap<Key, BTreeSet<String>>;

/// Names of pods by the FineTuneJob in their label, kept by the events of their watch.
#[derive(Debug, Clone, Default)]
pub struct PodNames(Arc<RwLock<Listed>>);

#[derive(Debug, Default)]
struct Listed {
    known: Names,
    /// Those of a listing that is not complete yet.
    coming: Names,
}

impl PodNames {
    /// Follows the watch.
    pub fn follow(&self, event: &Event<Pod>) {
        let mut listed = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Apply(pod) => enter(&mut listed.known, pod),
            Event::Delete(pod) => {
                if let Some(key) = key(pod)
                    && let Some(names) = listed.known.get_mut(&key)
                {
                    names.remove(&pod.name_any());
                    if names.is_empty() {
                        listed.known.remove(&key);
                    }
                }
            }
            Event::Init => listed.coming.clear(),
            Event::InitApply(pod) => enter(&mut listed.coming, pod),
            Event::InitDone => listed.known = std::mem::take(&mut listed.coming),
        }
    }

    /// Names of the pods of one FineTuneJob.
    pub fn of(&self, namespace: &str, job: &str) -> Vec<String> {
        let listed = self.0.read().unwrap_or_else(PoisonError::into_inner);
        listed.known.get(&(namespace.to_owned(), job.to_owned())).into_iter().flatten().cloned().collect()
    }
}

/// The FineTuneJob in the pod's label.
pub fn key(pod: &Pod) -> Option<Key> {
    Some((pod.namespace()?, pod.labels().get(JOB_LABEL)?.clone()))
}

fn enter(names: &mut Names, pod: &Pod) {
    if let Some(key) = key(pod) {
        names.entry(key).or_default().insert(pod.name_any());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(namespace: &str, job: &str, name: &str) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"namespace": namespace, "name": name, "labels": {JOB_LABEL: job}}})).unwrap()
    }

    #[test]
    fn pods_are_found_by_namespace_and_job_until_they_go() {
        let names = PodNames::default();
        for event in [
            Event::Init,
            Event::InitApply(pod("a", "corgi", "p1")),
            Event::InitApply(pod("b", "corgi", "p2")),
            Event::InitDone,
            Event::Apply(pod("a", "corgi", "p3")),
            Event::Apply(pod("a", "cat", "p4")),
            Event::Apply(pod("a", "cat", "p4")),
        ] {
            names.follow(&event);
        }
        assert_eq!(names.of("a", "corgi"), ["p1", "p3"]);
        assert_eq!((names.of("b", "corgi"), names.of("a", "cat")), (vec!["p2".to_owned()], vec!["p4".to_owned()]));
        names.follow(&Event::Delete(pod("a", "corgi", "p1")));
        assert_eq!(names.of("a", "corgi"), ["p3"]);
        assert!(names.of("a", "dog").is_empty());
    }

    #[test]
    fn a_new_listing_replaces_the_old_one_once_it_is_complete() {
        let names = PodNames::default();
        names.follow(&Event::Apply(pod("a", "corgi", "gone")));
        names.follow(&Event::Init);
        names.follow(&Event::InitApply(pod("a", "corgi", "new")));
        assert_eq!(names.of("a", "corgi"), ["gone"], "the cache does not have the new one yet either");
        names.follow(&Event::InitDone);
        assert_eq!(names.of("a", "corgi"), ["new"]);
    }
}
