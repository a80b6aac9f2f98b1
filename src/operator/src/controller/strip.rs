//! What the caches keep of an object: what the steps look at, in memory of just its size. With thousands of jobs this is most of what the operator
//! holds.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::controller::caches::Guarded;
use crate::reconcile::status::is_unschedulable;

/// Leaves out what only the API server and other clients want.
pub(super) fn strip_job(job: &mut Guarded) {
    let Ok(job) = &mut job.0 else { return };
    strip_metadata(&mut job.metadata);
    job.metadata.annotations = None;
    if let Some(status) = &mut job.status {
        status.conditions.shrink_to_fit();
    }
}

/// Of the template the image alone: it is what a job started with.
pub(super) fn strip_child(job: &mut Job) {
    strip_metadata(&mut job.metadata);
    if let Some(spec) = &mut job.spec {
        spec.pod_failure_policy = None;
        spec.selector = None;
        spec.template.metadata = None;
        if let Some(pod) = &mut spec.template.spec {
            let image = pod.containers.first().and_then(|container| container.image.clone());
            *pod = PodSpec { containers: vec![Container { image, ..Default::default() }], ..Default::default() };
        }
    }
    if let Some(status) = &mut job.status {
        shrink(&mut status.conditions);
    }
}

/// Of its spec the node, and where it may run while the scheduler finds no node for it.
pub(super) fn strip_pod(pod: &mut Pod) {
    strip_metadata(&mut pod.metadata);
    pod.metadata.annotations = None;
    let asks = is_unschedulable(pod);
    if let Some(spec) = &mut pod.spec {
        *spec = PodSpec {
            node_name: spec.node_name.take(),
            node_selector: spec.node_selector.take().filter(|_| asks),
            affinity: spec.affinity.take().filter(|_| asks),
            ..Default::default()
        };
    }
    if let Some(status) = &mut pod.status {
        status.init_container_statuses = None;
        status.host_ips = None;
        status.pod_ips = None;
        shrink(&mut status.conditions);
        shrink(&mut status.container_statuses);
    }
}

fn strip_metadata(metadata: &mut ObjectMeta) {
    metadata.managed_fields = None;
    shrink(&mut metadata.owner_references);
}

/// A list read from JSON has room for several more.
fn shrink<T>(list: &mut Option<Vec<T>>) {
    if let Some(list) = list {
        list.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::fixtures::{settings, validated};
    use crate::reconcile::build;

    /// The pod that the Job controller makes of a job's template, with a status.
    fn stripped(node: Option<&str>, status: &Value) -> Pod {
        let inputs = build::JobInputs { image: "trainer:1".to_owned(), failed_before: 0, backoff_limit: 3, active_before: 0, active_deadline: None };
        let template = build::job(&validated(|_| ()), &settings(), &inputs).spec.unwrap().template;
        let mut pod = Pod { metadata: template.metadata.unwrap(), spec: template.spec, status: serde_json::from_value(status.clone()).unwrap() };
        pod.spec.as_mut().unwrap().node_name = node.map(str::to_owned);
        strip_pod(&mut pod);
        pod
    }

    #[test]
    fn where_a_pod_may_run_is_kept_only_while_no_node_is_found() {
        let unschedulable = json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]});
        let waiting = stripped(None, &unschedulable);
        assert!(is_unschedulable(&waiting) && waiting.spec.unwrap().affinity.is_some());
        for (node, status) in [
            (None, json!({"phase": "Pending"})),
            (None, json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]})),
            (Some("node1"), json!({"phase": "Running", "conditions": [{"type": "PodScheduled", "status": "True"}]})),
        ] {
            let spec = stripped(node, &status).spec.unwrap();
            assert_eq!(spec, PodSpec { node_name: node.map(str::to_owned), ..Default::default() }, "{status}");
        }
    }

    #[test]
    fn labels_image_and_limits_of_a_job_are_kept() {
        let inputs = build::JobInputs { image: "trainer:1".to_owned(), failed_before: 2, backoff_limit: 3, active_before: 0, active_deadline: None };
        let mut built = build::job(&validated(|_| ()), &settings(), &inputs);
        built.spec.as_mut().unwrap().managed_by = Some("kueue.x-k8s.io/multikueue".to_owned());
        let mut job = built.clone();
        strip_child(&mut job);
        let (kept, before) = (job.spec.unwrap(), built.spec.unwrap());
        assert_eq!(kept.template.spec.unwrap().containers[0].image.as_deref(), Some("trainer:1"));
        assert_eq!((kept.template.metadata, kept.managed_by), (None, before.managed_by), "the configuration is long");
        assert_eq!((kept.backoff_limit, kept.active_deadline_seconds, kept.suspend), (before.backoff_limit, before.active_deadline_seconds, before.suspend));
        assert_eq!((job.metadata.labels, job.metadata.annotations), (built.metadata.labels, built.metadata.annotations));
    }
}
