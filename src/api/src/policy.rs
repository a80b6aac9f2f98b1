//! Retries and cleaning up.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::{default_is_empty_object, default_values};
use super::rules::immutable;

/// How many failures a job may have.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailurePolicy {
    /// Failures after which the job fails. Disruptions (drain, preemption, lost node) are never counted.
    #[serde(default = "max_retries")]
    #[schemars(range(max = 100))]
    pub max_retries: u32,
    /// Restarts within an hour, of whatever cause, after which the job fails with `RestartStorm`.
    #[serde(default = "max_restarts_per_hour")]
    #[schemars(range(min = 1, max = 1000))]
    #[x_kube(validation = immutable("failurePolicy.maxRestartsPerHour"))]
    pub max_restarts_per_hour: u32,
}

/// What `ttlSecondsAfterFinished` deletes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum TtlScope {
    /// The batch Job and its pods.
    #[default]
    Job,
    /// The FineTuneJob too. Under GitOps it would be created again.
    All,
}

default_values! {
    max_retries: u32 = 3;
    max_restarts_per_hour: u32 = 12;
}
default_is_empty_object!(FailurePolicy);
