//! The ConfigMap with the resolved configuration.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::ObjectMeta;

use super::{labels, owner, paths};
use crate::reconcile::validate::ValidatedJob;

/// The ConfigMap. It never changes; other content has another name.
pub fn config_map(job: &ValidatedJob) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(job.config_map_name.clone()),
            namespace: Some(job.namespace.clone()),
            labels: Some(labels(job)),
            owner_references: Some(vec![owner(job)]),
            ..ObjectMeta::default()
        },
        data: Some([(paths::CONFIG_FILE.to_owned(), job.config_json.clone())].into()),
        immutable: Some(true),
        ..ConfigMap::default()
    }
}
