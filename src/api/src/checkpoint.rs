//! Checkpoints and how a run continues from them.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::{default_is_empty_object, default_values};

/// When to save the whole state of training, and for how long to keep it.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.everySteps > 0 || self.everySeconds > 0").message("everySteps and everySeconds cannot both be 0: a lost node would lose the whole run"))]
pub struct CheckpointSpec {
    /// Save after this many steps (or `everySeconds`, whichever comes first). 0 leaves it to `everySeconds`.
    #[serde(default = "every_steps")]
    #[schemars(range(max = 10_000_000))]
    pub every_steps: u64,
    /// Save after this many seconds. 0 leaves it to `everySteps`.
    #[serde(default = "every_seconds")]
    #[schemars(range(max = 604_800))]
    pub every_seconds: u64,
    /// How many checkpoints to keep.
    #[serde(default = "keep_last")]
    #[schemars(range(min = 1, max = 100))]
    pub keep_last: u32,
    /// Save when the pod is asked to end (drain, preemption, suspend), within its grace period.
    #[serde(default = "yes")]
    pub on_termination: bool,
    /// Where checkpoints go; ends with "/". Absent: `<output.uri>.checkpoints/<first 16 hex digits of the spec hash>/`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new(super::storage::URI_RULE).message(super::storage::URI_MESSAGE))]
    #[x_kube(validation = Rule::new("self.endsWith('/')").message("must end with \"/\", as it is a folder"))]
    pub uri: Option<String>,
    /// Keep the checkpoints after the outputs are published.
    #[serde(default)]
    pub keep_after_success: bool,
}

/// How a run continues from a checkpoint.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ResumeSpec {
    /// Whether to look for a checkpoint of this job.
    #[serde(default)]
    pub policy: ResumePolicy,
    /// LoRA to start from, of any trainer: a folder (of checkpoints, an output, or with a LoRA file) ends with "/", a file with ".safetensors".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new(super::storage::URI_RULE).message(super::storage::URI_MESSAGE))]
    #[x_kube(validation = Rule::new("self.endsWith('/') || self.endsWith('.safetensors')").message("must end with \"/\", if it is a folder, or with \".safetensors\""))]
    pub from_checkpoint: Option<String>,
}

/// Whether to look for a checkpoint.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ResumePolicy {
    /// Continue from the newest checkpoint that verifies; start afresh where there is none.
    #[default]
    Auto,
    /// Always start afresh.
    Never,
    /// Continue from a checkpoint; fail where there is none.
    Required,
}

default_values! {
    every_steps: u64 = 100;
    every_seconds: u64 = 600;
    keep_last: u32 = 3;
    yes: bool = true;
}
default_is_empty_object!(CheckpointSpec, ResumeSpec);
