//! All that a run needs to go on: taken at an optimizer update, restored bit for bit.

use std::collections::BTreeMap;

use bytes::Bytes;
use finetune_api::plan::FrozenWeights;
use serde::{Deserialize, Serialize};

use crate::history::History;
use crate::tensor_file::{self, TensorFileError};
use finetune_compute::optim::{Param, StateTensor};
use finetune_data::sampler::Position;

/// The masters.
pub const LORA_FILE: &str = "lora.safetensors";
/// The optimizer's state.
pub(super) const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Everything small.
pub(super) const STATE_FILE: &str = "state.json";
/// What was measured.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// Why files are not a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file is not there.
    #[error("the checkpoint has no {0}")]
    Missing(&'static str),
    /// A JSON file cannot be read or written.
    #[error("failed to understand {file}")]
    Json {
        /// The file.
        file: &'static str,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A tensor file cannot be read.
    #[error(transparent)]
    Tensors(#[from] TensorFileError),
}

/// The small part of a snapshot, as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct State {
    /// Optimizer updates done. Also the index of the next learning rate.
    pub step: u64,
    /// The next batch. Snapshots are taken between updates, so that no gradients are pending: every random number is a
    /// function of (seed, epoch, ordinal, purpose) and needs no state.
    pub position: Position,
    /// The seed of those functions.
    pub seed: u64,
    /// How the numbers were made; the run goes on in the same way.
    pub plan: ExecutionPlan,
    /// Seconds spent training so far, all attempts together.
    pub training_seconds: f64,
    /// When the first attempt began (seconds since 1970).
    pub started: f64,
    /// The version of the program.
    pub version: String,
}

/// What, besides the spec, the last bits of the weights depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExecutionPlan {
    /// `cpu` or `cuda`.
    pub device: String,
    /// Type of the frozen weights and activations: `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// How the blocks' frozen weights are kept.
    #[serde(default, skip_serializing_if = "FrozenWeights::is_float")]
    pub weights: FrozenWeights,
    /// Samples per forward pass.
    pub micro_batch: u32,
    /// Blocks that are recomputed in the backward pass, from the first.
    pub recomputed_blocks: u32,
}

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// The small part.
    pub state: State,
    /// f32 masters in the layout's order (by name after reading back).
    pub params: Vec<Param>,
    /// The optimizer's state.
    pub optimizer: Vec<StateTensor>,
    /// What was measured so far.
    pub history: History,
}

impl Snapshot {
    /// The checkpoint's files by name.
    ///
    /// # Errors
    /// If the history has a number that JSON cannot express.
    pub fn encode(&self) -> Result<BTreeMap<String, Bytes>, SnapshotError> {
        let json = |file| move |source| SnapshotError::Json { file, source };
        let none = BTreeMap::new();
        Ok([
            (LORA_FILE, tensor_file::write(tensor_file::param_entries(&self.params), &none)),
            (OPTIMIZER_FILE, tensor_file::write(tensor_file::state_entries(&self.optimizer), &none)),
            (STATE_FILE, serde_json::to_vec_pretty(&self.state).map_err(json(STATE_FILE))?),
            (METRICS_FILE, self.history.to_jsonl().map_err(json(METRICS_FILE))?),
        ]
        .into_iter()
        .map(|(name, bytes)| (name.to_owned(), Bytes::from(bytes)))
        .collect())
    }

    /// Reads the files back.
    ///
    /// # Errors
    /// If a file is missing or is not what [`Snapshot::encode`] writes.
    pub fn decode(files: &BTreeMap<String, Bytes>) -> Result<Self, SnapshotError> {
        let file = |name: &'static str| files.get(name).ok_or(SnapshotError::Missing(name));
        let json = |file| move |source| SnapshotError::Json { file, source };
        Ok(Self {
            state: serde_json::from_slice(file(STATE_FILE)?).map_err(json(STATE_FILE))?,
            params: tensor_file::read_params(file(LORA_FILE)?, LORA_FILE)?.into_values().collect(),
            optimizer: tensor_file::read_state(file(OPTIMIZER_FILE)?, OPTIMIZER_FILE)?,
            history: History::from_jsonl(file(METRICS_FILE)?).map_err(json(METRICS_FILE))?,
        })
    }
}
