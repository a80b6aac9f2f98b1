//! `build`: from a validated job to the objects that carry it out. Pure and infallible; it knows no client.

pub mod affinity;
mod job;
mod pod;
#[cfg(test)]
mod tests;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use std::collections::BTreeMap;

pub use job::{JobInputs, job};

use crate::reconcile::validate::ValidatedJob;
use finetune_api::{JOB_LABEL, JOB_UID_LABEL};

/// Where things are mounted in the trainer's container, and under which names.
pub mod paths {
    /// Folder with the configuration.
    pub const CONFIG_DIR: &str = "/etc/finetune";
    /// The configuration, in that folder.
    pub const CONFIG_FILE: &str = "config.json";
    /// A model on a PersistentVolumeClaim.
    pub const MODEL_DIR: &str = "/model";
    /// The model cache, where the job has one.
    pub const CACHE_DIR: &str = "/cache";
    /// Scratch space of the pod.
    pub const WORK_DIR: &str = "/work";
    /// Certificates of the storage.
    pub const CA_BUNDLE: &str = "/etc/finetune-ca/storage/ca.crt";
    /// Certificates of the model's own storage.
    pub const MODEL_CA_BUNDLE: &str = "/etc/finetune-ca/model/ca.crt";
    /// Certificates that the operator's configuration adds.
    pub const TRUSTED_CA_BUNDLE: &str = "/etc/finetune-ca/trusted/ca.crt";
    /// Where the trainer leaves its last report.
    pub const TERMINATION_MESSAGE: &str = "/dev/termination-log";
}

/// Labels of every object of the job.
fn labels(job: &ValidatedJob) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "finetune-trainer"),
        ("app.kubernetes.io/instance", job.name.as_str()),
        ("app.kubernetes.io/component", "trainer"),
        ("app.kubernetes.io/managed-by", "finetune-operator"),
        (JOB_LABEL, job.name.as_str()),
        (JOB_UID_LABEL, job.uid.as_str()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect()
}

/// The FineTuneJob as the controller that owns an object.
fn owner(job: &ValidatedJob) -> OwnerReference {
    OwnerReference {
        api_version: finetune_api::API_VERSION.to_owned(),
        kind: finetune_api::KIND.to_owned(),
        name: job.name.clone(),
        uid: job.uid.clone(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}
