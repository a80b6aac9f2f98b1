//! What a run is: the hash of everything that determines its weights.

use serde::Serialize;
use serde_json::{Value, json};

use super::{DatasetConfig, OutputFormat, TrainingConfig, ValidationConfig, canonical_json};
use finetune_common::digest;

/// Version of the identity's form; part of the hash.
const IDENTITY_VERSION: u32 = 2;

/// What determines the weights, after resolution: a default written out and a default left out are the same.
///
/// Not in it: name, namespace, suspension, queue, storage access, image, resources, scheduling, retries, deadlines, TTL, checkpoint policy,
/// what to do with an existing output, its number format, and gradient checkpointing, which changes memory and speed alone.
pub(super) struct Identity<'a> {
    pub(super) model: &'a crate::ModelSource,
    pub(super) dataset: &'a DatasetConfig,
    pub(super) training: &'a TrainingConfig,
    pub(super) validation: Option<&'a ValidationConfig>,
    pub(super) from_checkpoint: Option<&'a str>,
    pub(super) formats: &'a [OutputFormat],
}

impl Identity<'_> {
    /// `sha256:<hex>` of the canonical JSON.
    pub(super) fn hash(&self) -> Result<String, serde_json::Error> {
        Ok(digest::to_text(&digest::sha256(canonical_json(&self.value()?).as_bytes())))
    }

    fn value(&self) -> Result<Value, serde_json::Error> {
        let mut training = to_value(self.training)?;
        if let Some(map) = training.as_object_mut() {
            map.remove("gradientCheckpointing");
        }
        Ok(json!({
            "version": IDENTITY_VERSION,
            "model": self.model()?,
            "dataset": to_value(self.dataset)?,
            "training": training,
            "validation": to_value(&self.validation)?,
            "fromCheckpoint": self.from_checkpoint,
            "formats": to_value(self.formats)?,
        }))
    }

    /// The model's place, without how to get there, and which of its files are used where the job says so.
    fn model(&self) -> Result<Value, serde_json::Error> {
        let mut place = self.place();
        if let (Some(files), Some(map)) = (&self.model.files, place.as_object_mut()) {
            map.insert("files".to_owned(), to_value(files)?);
        }
        Ok(place)
    }

    fn place(&self) -> Value {
        if let Some(source) = &self.model.hugging_face {
            json!({"huggingFace": {"repo": source.repo, "revision": source.revision}})
        } else if let Some(source) = &self.model.object_store {
            json!({"objectStore": {"uri": source.uri, "sha256Manifest": source.sha256_manifest}})
        } else if let Some(source) = &self.model.persistent_volume_claim {
            json!({"persistentVolumeClaim": {"claimName": source.claim_name, "subPath": source.sub_path}})
        } else {
            Value::Null
        }
    }
}

fn to_value<T: Serialize + ?Sized>(value: &T) -> Result<Value, serde_json::Error> {
    serde_json::to_value(value)
}
