//! What the events about a Job or its pod say where nothing else does: that the API server refuses the pod, or that the node cannot start it. Listed only
//! while a pod is missing or being created, and each time at least `AGAIN` after the last.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams};

use crate::controller::context::Context;
use crate::error::Operation;
use crate::reconcile::world::{self, Warning, World};

/// How long a pod may be missing, or be created, before its events are looked at.
const FIRST: SignedDuration = SignedDuration::from_secs(10);
/// Pause between two looks.
const AGAIN: SignedDuration = SignedDuration::from_secs(30);
/// Most events that are read; the API server aggregates what is repeated.
const MOST: u32 = 200;
/// Clocks and times without fractions differ by so much.
const SLACK: SignedDuration = SignedDuration::from_secs(2);

/// Reasons with which the kubelet, the attach controller and the Job controller say that it does not go on.
const OBSTACLES: [&str; 7] =
    ["FailedCreate", "FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox", "NetworkNotReady", "FailedPrepareDynamicResources"];
/// Reasons that say that it does.
const ADVANCES: [&str; 6] = ["SuccessfulCreate", "SuccessfulAttachVolume", "Pulling", "Pulled", "Created", "Started"];

/// Whose events tell more, and since when it has been waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// UID of the pod, or of the Job where there is no pod.
    pub uid: String,
    /// Older events do not count.
    since: Timestamp,
}

/// What was found about a subject, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Looked {
    subject: Subject,
    at: Timestamp,
    warning: Option<Warning>,
}

/// Whose events are of interest; `None` where nothing is missing.
pub fn subject(world: &World) -> Option<Subject> {
    if let Some(pod) = world.live_pod() {
        let since = pod.metadata.creation_timestamp.as_ref()?.0;
        return (is_creating(pod) && pod.metadata.deletion_timestamp.is_none()).then(|| Subject { uid: pod.metadata.uid.clone().unwrap_or_default(), since });
    }
    let job = world.job.as_deref()?;
    let held = job.spec.as_ref().is_some_and(|spec| spec.suspend == Some(true));
    // Events of a Job that runs in another cluster are there.
    if held || world::is_deleting(job) || world::job_end(job).is_some() || world::runs_elsewhere(job) {
        return None;
    }
    let uid = job.metadata.uid.clone()?;
    let ended = world.pods.iter().filter(|pod| world::owner_uid(pod) == Some(&uid)).filter_map(|pod| world::finished_at(pod)).max();
    let started = job.status.as_ref().and_then(|status| status.start_time.as_ref()).map(|time| time.0);
    let since = [job.metadata.creation_timestamp.as_ref().map(|time| time.0), started, ended].into_iter().flatten().max()?;
    Some(Subject { uid, since })
}

/// When the events of `subject` are to be looked at next, given the last look at this job.
pub fn due(subject: &Subject, last: Option<&Looked>) -> Timestamp {
    let due = match last.filter(|last| last.subject == *subject) {
        Some(last) => last.at.checked_add(AGAIN),
        None => subject.since.checked_add(FIRST),
    };
    due.unwrap_or(Timestamp::MAX)
}

/// The warning about what is missing, from the events if it is time to look at them, else as it was found last.
pub async fn warning(job_uid: &str, namespace: &str, world: &World, ctx: &Context) -> Option<Warning> {
    let subject = subject(world)?;
    let (last, now) = (ctx.looked(job_uid).filter(|last| last.subject == subject), Timestamp::now());
    if now < due(&subject, last.as_ref()) {
        return last.and_then(|last| last.warning);
    }
    let events: Api<Event> = Api::namespaced(ctx.client.clone(), namespace);
    let about = ListParams::default().fields(&format!("regarding.uid={}", subject.uid)).limit(MOST);
    let warning = match ctx.call(Operation::ListEvents, events.list(&about)).await {
        Ok(events) => choose(&events.items, subject.since),
        // The status then explains less; nothing else depends on it.
        Err(error) => {
            tracing::warn!(namespace, error = &error as &dyn std::error::Error, "failed to see why a pod is missing");
            last.and_then(|last| last.warning)
        }
    };
    ctx.remember_look(job_uid, Looked { subject, at: now, warning: warning.clone() });
    warning
}

/// Whether the pod has a node and its container is being created.
pub fn is_creating(pod: &k8s_openapi::api::core::v1::Pod) -> bool {
    let state = world::trainer(pod).and_then(|container| container.state.as_ref());
    state.and_then(|state| state.waiting.as_ref()).is_some_and(|waiting| waiting.reason.as_deref() == Some("ContainerCreating"))
}

/// The newest warning that nothing newer contradicts.
fn choose(events: &[Event], since: Timestamp) -> Option<Warning> {
    let time = |event: &Event| {
        let times = [
            event.series.as_ref().map(|series| series.last_observed_time.0),
            event.deprecated_last_timestamp.as_ref().map(|time| time.0),
            event.event_time.as_ref().map(|time| time.0),
            event.metadata.creation_timestamp.as_ref().map(|time| time.0),
        ];
        times.into_iter().flatten().max().map(Timestamp::as_second)
    };
    let after = since.checked_sub(SLACK).unwrap_or(since).as_second();
    let known = |list: &[&str], event: &Event| event.reason.as_deref().is_some_and(|reason| list.contains(&reason));
    let newest = |list: &[&str]| events.iter().filter(|event| known(list, event)).filter_map(|event| Some((time(event)?, event))).max_by_key(|(time, _)| *time);
    let (warned, newest_warning) = newest(&OBSTACLES).filter(|(time, _)| *time >= after)?;
    if newest(&ADVANCES).is_some_and(|(advanced, _)| advanced >= warned) {
        return None;
    }
    // The kubelet says the cause first ("MountVolume.SetUp failed ...: configmap not found"), and after two minutes of it what it waits for.
    let vague = |event: &Event| event.note.as_deref().is_none_or(|note| note.starts_with("Unable to attach or mount volumes"));
    let same =
        events.iter().filter(|event| event.reason == newest_warning.reason && time(event) >= Some(after) && !vague(event)).max_by_key(|event| time(event));
    let event = same.filter(|_| vague(newest_warning)).unwrap_or(newest_warning);
    let note = event.note.as_deref().unwrap_or_default();
    Some(Warning { reason: event.reason.clone().unwrap_or_default(), note: note.strip_prefix("Error creating: ").unwrap_or(note).to_owned() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fixtures::{at, child, pod, running, terminated, waiting};

    fn event(reason: &str, seconds: i64, note: &str) -> Event {
        serde_json::from_value(json!({
            "metadata": {"name": "e"}, "reason": reason, "type": "Warning", "note": note, "deprecatedLastTimestamp": at(seconds).to_string(), "eventTime": null,
        }))
        .unwrap()
    }

    fn chosen(events: &[Event], since: i64) -> Option<String> {
        choose(events, at(since)).map(|warning| format!("{}: {}", warning.reason, warning.note))
    }

    #[test]
    fn the_newest_warning_counts_until_it_goes_on() {
        let quota = |seconds| event("FailedCreate", seconds, "Error creating: pods \"a\" is forbidden: exceeded quota: q");
        assert_eq!(chosen(&[quota(5)], 0).as_deref(), Some("FailedCreate: pods \"a\" is forbidden: exceeded quota: q"));
        assert_eq!(chosen(&[quota(5)], 60), None, "that was another pod");
        assert_eq!(chosen(&[quota(5), event("SuccessfulCreate", 9, "Created pod: a")], 0), None);
        assert_eq!(chosen(&[quota(15), event("SuccessfulCreate", 9, "Created pod: a")], 0).as_deref().map(|text| &text[..12]), Some("FailedCreate"));
        let mount = event("FailedMount", 5, "MountVolume.SetUp failed for volume \"ca\" : configmap \"ca\" not found");
        assert_eq!(chosen(&[mount.clone(), event("Pulling", 5, "")], 0), None, "a pull comes after every mount");
        let vague = event("FailedMount", 125, "Unable to attach or mount volumes: unmounted volumes=[ca]");
        assert!(chosen(&[vague.clone(), mount], 0).unwrap().ends_with("configmap \"ca\" not found"), "the cause is told");
        assert!(chosen(&[vague], 0).is_some());
        assert_eq!(chosen(&[event("Unhealthy", 5, ""), event("FailedScheduling", 5, "")], 0), None);
    }

    #[test]
    fn a_subject_is_a_job_without_a_pod_or_a_pod_that_is_being_created() {
        let born = |uid: &str| child(uid, |job| job["metadata"]["creationTimestamp"] = json!(at(1).to_string()));
        let of = |job, pods| subject(&World { job: Some(job), pods, ..World::default() }).map(|subject| (subject.uid, subject.since));
        assert_eq!(of(born("j1"), vec![]), Some(("j1".to_owned(), at(1))));
        assert_eq!(of(born("j1"), vec![pod("p1", "j1", &terminated(5, 90, 1, "Error", ""))]), Some(("j1".to_owned(), at(90))));
        assert_eq!(of(born("j1"), vec![pod("p1", "j1", &waiting("ContainerCreating", ""))]), Some(("p1".to_owned(), at(1))));
        assert_eq!(of(born("j1"), vec![pod("p1", "j1", &waiting("ImagePullBackOff", ""))]), None, "the pod's status tells");
        assert_eq!(of(born("j1"), vec![pod("p1", "j1", &running(5))]), None);
        let held = child("j1", |job| {
            job["metadata"]["creationTimestamp"] = json!(at(1).to_string());
            job["spec"]["suspend"] = json!(true);
        });
        assert_eq!(of(held, vec![]), None, "a queued Job has no pod");
    }

    #[test]
    fn events_are_looked_at_after_a_while_and_not_all_the_time() {
        let job = Subject { uid: "j1".into(), since: at(0) };
        assert_eq!(due(&job, None), at(10));
        let looked = Looked { subject: job.clone(), at: at(11), warning: None };
        assert_eq!(due(&job, Some(&looked)), at(41));
        assert_eq!(due(&Subject { uid: "p1".into(), since: at(20) }, Some(&looked)), at(30), "another subject");
    }
}
