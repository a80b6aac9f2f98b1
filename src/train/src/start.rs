//! Where the weights of a run begin that is given a LoRA: a checkpoint or an output of this program, or a file of another.

use std::path::Path;

use bytes::Bytes;

use finetune_compute::optim::Param;
use finetune_model::lora::{self, LoraLayout, LoraState, Scaling};
use finetune_model::mmdit::MmditConfig;
use finetune_store::{Store, StoreError, manifest};

use super::checkpoint::{self, LORA_FILE};
use super::error::TrainError;
use super::setup;
use finetune_api::plan::TrainingConfig;

/// Where a LoRA may be in a folder of peft's.
const PEFT_CONFIG: &str = "adapter_config.json";

/// Why there is no LoRA to start from.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store failed.
    #[error("failed to read the LoRA to start from (spec.resume.fromCheckpoint)")]
    Store(#[from] StoreError),
    /// There is none.
    #[error("found neither a complete checkpoint nor a LoRA in {uri} (spec.resume.fromCheckpoint): {problem}")]
    NotFound {
        /// Where.
        uri: String,
        /// What there is instead.
        problem: String,
    },
}

/// The folder and, where the URI names one, the file.
pub fn split(uri: &str) -> (&str, Option<&str>) {
    match uri.rsplit_once('/') {
        Some((folder, file)) if file.ends_with(".safetensors") => (&uri[..=folder.len()], Some(file)),
        _ => (uri, None),
    }
}

/// The parameters of a run of `training` on this transformer that begins with the LoRA in `store`, the folder that [`split`] has given.
///
/// # Errors
/// If there is no LoRA, or one that does not fit the model or the job.
pub async fn parameters(store: &Store, file: Option<&str>, training: &TrainingConfig, transformer: &MmditConfig) -> Result<Vec<Param>, TrainError> {
    let sites = transformer.linear_sites();
    let (given, params) = read(store, file, training).await?.resolve(&sites)?;
    Ok(LoraLayout::new(&setup::lora(&training.lora), &sites)?.init_from(training.seed, &given, params)?)
}

async fn read(store: &Store, file: Option<&str>, training: &TrainingConfig) -> Result<LoraState, TrainError> {
    if file.is_none()
        && let Some(bytes) = of_checkpoint(store).await?
    {
        let state = LoraState::parse(&bytes, Path::new(LORA_FILE))?;
        // A checkpoint does not say its alpha: that of the job is meant.
        return Ok(LoraState { scaling: Scaling { alpha: Some(training.lora.alpha), ..Scaling::default() }, ..state });
    }
    let name = if let Some(file) = file {
        file.to_owned()
    } else {
        let objects = store.list("").await.map_err(StartError::Store)?;
        let not_found = |problem| StartError::NotFound { uri: store.uri().to_owned(), problem };
        lora::choose(objects.iter().map(|object| object.key.as_str())).map_err(not_found)?.to_owned()
    };
    let bytes = store.get(&name).await.map_err(StartError::Store)?;
    let beside = checkpoint::read_optional(store, PEFT_CONFIG).await.map_err(StartError::Store)?;
    let state = LoraState::parse(&bytes, Path::new(&name))?;
    Ok(match beside {
        Some(config) => state.with_adapter_config(&config)?,
        None => state,
    })
}

/// The LoRA of the checkpoint in this folder, or of the newest below it that verifies.
async fn of_checkpoint(store: &Store) -> Result<Option<Bytes>, StartError> {
    let files = match manifest::read(store).await? {
        Some(manifest) => manifest::read_files(store, &manifest).await?,
        None => match checkpoint::newest(store).await? {
            Some(files) => files,
            None => return Ok(None),
        },
    };
    Ok(files.into_iter().find_map(|(name, bytes)| (name == LORA_FILE).then_some(bytes)))
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn a_file_is_told_from_a_folder() {
        assert_eq!(split("s3://b/loras/robi.safetensors"), ("s3://b/loras/", Some("robi.safetensors")));
        assert_eq!(split("s3://b/loras/"), ("s3://b/loras/", None));
        assert_eq!(split("s3://b/x.safetensors/"), ("s3://b/x.safetensors/", None));
    }
}
