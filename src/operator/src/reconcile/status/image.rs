//! `status.trainerImage`: the image that every attempt of the job runs.

use finetune_api::{CONFIG_VERSION_ANNOTATION, FineTuneJobStatus, IMAGE_ANNOTATION};
use k8s_openapi::api::batch::v1::Job;

use crate::reconcile::world::{self, World};

/// Fixes the image. A Job that was made for another `spec.image` than the one before, or with another version of the configuration, starts it anew.
pub(super) fn fix(after: &mut FineTuneJobStatus, before: &FineTuneJobStatus, job: &Job, world: &World) {
    let from = job.metadata.annotations.as_ref().and_then(|annotations| annotations.get(IMAGE_ANNOTATION));
    let version = job.metadata.annotations.as_ref().and_then(|annotations| annotations.get(CONFIG_VERSION_ANNOTATION)).and_then(|text| text.parse().ok());
    let same = (before.trainer_image_from.is_none() || before.trainer_image_from.as_ref() == from) && before.config_version == version;
    let fixed = before.trainer_image.as_deref().filter(|_| same);
    after.trainer_image = frozen(fixed, world);
    after.trainer_image_from = from.cloned();
    after.config_version = version;
}

/// The image, frozen: the Job's at first, then by the digest that the first pod ran.
fn frozen(fixed: Option<&str>, world: &World) -> Option<String> {
    if let Some(pinned) = fixed.filter(|image| image.contains("@sha256:")) {
        return Some(pinned.to_owned());
    }
    let asked = fixed.map(str::to_owned).or_else(|| {
        let template = &world.job.as_ref()?.spec.as_ref()?.template;
        template.spec.as_ref()?.containers.first()?.image.clone()
    })?;
    // A pod of an earlier Job may have run another image of that repository.
    let pods = world.pods.iter().filter(|pod| world::owner_uid(pod) == world.job_uid());
    let ran = pods.filter_map(|pod| world::trainer(pod)).map(|container| container.image_id.as_str()).find_map(|id| pinned(&asked, id));
    Some(ran.unwrap_or(asked))
}

/// `asked` by the digest in the kubelet's image id, if that is of the same repository. A bare image id cannot be pulled and pins nothing.
fn pinned(asked: &str, image_id: &str) -> Option<String> {
    let id = image_id.split_once("://").map_or(image_id, |(_, rest)| rest);
    let (repository, digest) = id.split_once("@sha256:")?;
    let name = asked.split('@').next().unwrap_or(asked);
    // A colon after the last slash begins the tag; one before it is a registry's port.
    let bare = match name.rfind(':') {
        Some(colon) if name.rfind('/').is_none_or(|slash| slash < colon) => name.get(..colon)?,
        _ => name,
    };
    let same = bare == repository || format!("docker.io/{bare}") == repository || format!("docker.io/library/{bare}") == repository;
    (same && digest.len() == 64).then(|| format!("{bare}@sha256:{digest}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fixtures::{at, child, job, pod, running, step};

    /// The status once a pod of the Job `uid`, made for `spec.image: image`, runs the digest of 64 times `digit`.
    fn after(before: &FineTuneJobStatus, uid: &str, image: &str, digit: &str, earlier: &World) -> (FineTuneJobStatus, World) {
        let mut status = running(10);
        status["containerStatuses"][0]["imageID"] = json!(format!("registry/trainer@sha256:{}", digit.repeat(64)));
        let child = child(uid, |value| {
            value["metadata"]["annotations"][IMAGE_ANNOTATION] = json!(image);
            value["spec"]["template"]["spec"]["containers"][0]["image"] = json!(if image.is_empty() { "registry/trainer:default" } else { image });
        });
        let pods = earlier.pods.iter().cloned().chain([pod(&format!("pod-of-{uid}"), uid, &status)]).collect();
        let world = World { job: Some(child), pods, ..World::default() };
        let job = job(|value| value["spec"]["image"] = json!(image));
        (step(&job, before, &world, at(20)).1, world)
    }

    #[test]
    fn an_image_stays_until_the_job_is_given_another() {
        let pinned = |digit: &str| Some(format!("registry/trainer@sha256:{}", digit.repeat(64)));
        let (first, world) = after(&FineTuneJobStatus::default(), "j1", "", "a", &World::default());
        assert_eq!((&first.trainer_image, first.trainer_image_from.as_deref()), (&pinned("a"), Some("")));
        // Suspended and resumed: the tag may have moved meanwhile.
        let (resumed, world) = after(&first, "j2", "", "b", &world);
        assert_eq!(resumed.trainer_image, pinned("a"));
        let (changed, world) = after(&resumed, "j3", "registry/trainer:v2", "c", &world);
        assert_eq!((&changed.trainer_image, changed.trainer_image_from.as_deref()), (&pinned("c"), Some("registry/trainer:v2")));
        assert_eq!(after(&changed, "j4", "registry/trainer:v2", "d", &world).0.trainer_image, pinned("c"));
        // Written by an operator that did not know where the image was from.
        let old = FineTuneJobStatus { trainer_image: pinned("a"), ..FineTuneJobStatus::default() };
        assert_eq!(after(&old, "j5", "registry/trainer:v1", "e", &World::default()).0.trainer_image, pinned("a"));
    }
}
