//! Pods that are refused, or that do not get as far as training.

use serde_json::json;

use super::{training, world};
use crate::fixtures::{at, child, job, pod, running, step, told, waiting};
use crate::reconcile::decide::Intent;
use crate::reconcile::status::lifecycle_differs;
use crate::reconcile::world::{Warning, World};
use finetune_api::{ConditionType as C, FineTuneJobStatus, Phase, ResumePolicy};

#[test]
fn what_keeps_a_pod_from_running_is_told() {
    let lost = |deleted: i64| {
        let mut pod = (*pod("p1", "j1", &running(5))).clone();
        pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(deleted)));
        std::sync::Arc::new(pod)
    };
    let unschedulable =
        |message: &str| json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]});
    let cases = [
        (pod("p1", "j1", &waiting("ErrImagePull", "denied")), "ImagePullBackOff"),
        (pod("p1", "j1", &waiting("ImagePullBackOff", "Back-off")), "ImagePullBackOff"),
        (pod("p1", "j1", &waiting("CreateContainerConfigError", "secret \"s3\" not found")), "SecretNotFound"),
        (pod("p1", "j1", &waiting("CreateContainerConfigError", "container has runAsNonRoot and image will run as root")), "CreateContainerError"),
        (pod("p1", "j1", &waiting("ContainerCreating", "")), "PullingImage"),
        (pod("p1", "j1", &unschedulable("persistentvolumeclaim \"models\" not found")), "VolumeNotFound"),
        (pod("p1", "j1", &unschedulable("0/3 nodes are available")), "Starting"),
        (lost(10), "NodeLost"),
    ];
    for (pod, reason) in cases {
        let (_, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &world(Some(child("j1", |_| {})), vec![pod.clone()]), at(60));
        assert_eq!(told(&after, C::Running), Some(("False", reason)), "{pod:?}");
    }
    let ending = world(Some(child("j1", |_| {})), vec![lost(50)]);
    assert_eq!(told(&step(&job(|_| {}), &training(), &ending, at(60)).1, C::Running), Some(("True", "Training")), "it may still end by itself");
    let nowhere = World { node_matches: Some(false), ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &unschedulable("0/3"))]) };
    assert_eq!(told(&step(&job(|_| {}), &FineTuneJobStatus::default(), &nowhere, at(60)).1, C::PodsScheduled), Some(("False", "NoMatchingGPUNode")));
    let note = "MountVolume.SetUp failed for volume \"ca\" : configmap references non-existent config key: ca.crt";
    let certificates = World {
        warning: Some(Warning { reason: "FailedMount".into(), note: note.into() }),
        ..world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &waiting("ContainerCreating", ""))])
    };
    let (_, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &certificates, at(60));
    assert_eq!(told(&after, C::Running), Some(("False", "ConfigMapNotFound")));
    assert_eq!((told(&after, C::Reconciling), after.reason.as_deref()), (Some(("True", "Progressing")), Some("ConfigMapNotFound")), "kstatus and kubectl get");
    assert!(crate::reconcile::conditions::find(&after.conditions, C::Reconciling).unwrap().message.contains("non-existent config key"));
}

#[test]
fn a_pod_that_the_api_server_refuses_is_told_in_its_words() {
    let note = "pods \"corgi-train-0-\" is forbidden: exceeded quota: no-gpus, requested: requests.nvidia.com/gpu=1";
    let refused = World { warning: Some(Warning { reason: "FailedCreate".into(), note: note.into() }), ..world(Some(child("j1", |_| {})), vec![]) };
    let (intent, after) = step(&job(|_| {}), &FineTuneJobStatus::default(), &refused, at(20));
    assert_eq!((intent, after.phase, after.reason.as_deref()), (Intent::Keep, Some(Phase::Starting), Some("QuotaExceeded")));
    let condition = crate::reconcile::conditions::find(&after.conditions, C::PodsScheduled).unwrap();
    assert!((condition.status.as_str(), condition.reason.as_str()) == ("False", "QuotaExceeded") && condition.message.ends_with(note), "{condition:?}");
    assert_eq!((told(&after, C::Reconciling), told(&after, C::Stalled)), (Some(("True", "Progressing")), Some(("False", "NotStalled"))));
    let events = crate::reconcile::transitions::events(&FineTuneJobStatus::default(), &after, &[], ResumePolicy::Auto);
    assert!(events.iter().any(|event| event.reason == "QuotaExceeded" && event.note.as_ref().is_some_and(|text| text.contains(note))));
    // The quota is raised: the pod is there, and no scheduler has looked at it.
    let mut fresh = (*pod("p1", "j1", &json!({"phase": "Pending"}))).clone();
    fresh.spec.as_mut().unwrap().node_name = None;
    let (_, created) = step(&job(|_| {}), &after, &world(Some(child("j1", |_| {})), vec![std::sync::Arc::new(fresh)]), at(30));
    assert_eq!((created.reason.as_deref(), told(&created, C::PodsScheduled), told(&created, C::Reconciling)), (None, None, Some(("False", "Reconciled"))));
    assert!(lifecycle_differs(&after, &created), "it is written at once");
    let (_, mended) = step(&job(|_| {}), &after, &world(Some(child("j1", |_| {})), vec![pod("p1", "j1", &running(30))]), at(31));
    assert_eq!((mended.reason.as_deref(), told(&mended, C::Reconciling)), (None, Some(("False", "Reconciled"))));
}

#[test]
fn a_pod_of_which_nothing_is_known_yet_changes_nothing() {
    let (_, created) = step(&job(|_| {}), &FineTuneJobStatus::default(), &world(Some(child("j1", |_| {})), vec![]), at(1));
    let mut pod = (*pod("p1", "j1", &json!({"phase": "Pending"}))).clone();
    pod.spec.as_mut().unwrap().node_name = None;
    let (_, after) = step(&job(|_| {}), &created, &world(Some(child("j1", |_| {})), vec![std::sync::Arc::new(pod)]), at(40));
    assert_eq!(after, created, "every difference is a write");
}
