//! The places that a run reads and writes, as they are on this machine: two buckets of different names may be one directory.

use super::environment::JobEnvironment;
use super::error::TrainError;
use finetune_api::plan::{Folder, ModelSource, TrainConfig, Use, overlaps};
use finetune_store::{Store, StoreError, StoreOptions};

/// Refuses folders that cannot be used together. [`finetune_api::plan::resolve`] has compared their names.
///
/// # Errors
/// [`TrainError::Folders`] with every pair; a location that cannot be used.
pub fn check(config: &TrainConfig, environment: &JobEnvironment) -> Result<(), TrainError> {
    let own = environment.store_options(config);
    let mut folders = vec![
        folder("spec.output.uri", &config.output.uri, Use::Output, &own)?,
        folder("spec.checkpoint.uri", &config.checkpoint.uri, Use::Checkpoint, &own)?,
        folder("spec.dataset.uri", &config.dataset.uri, Use::Input, &own)?,
    ];
    if let Some(uri) = config.validation.as_ref().and_then(|validation| validation.dataset_uri.as_ref()) {
        folders.push(folder("spec.validation.datasetUri", uri, Use::Input, &own)?);
    }
    let (_, options) = environment.model_source(config);
    match &config.model.source {
        ModelSource::ObjectStore { uri, .. } => folders.push(folder("spec.model.source.objectStore.uri", uri, Use::Input, &options)?),
        ModelSource::Directory { path } => {
            folders.push(folder("spec.model.source.persistentVolumeClaim", &path.to_string_lossy(), Use::Input, &options)?);
        }
        ModelSource::HuggingFace { .. } => {}
    }
    let problems = overlaps(&folders);
    if problems.is_empty() { Ok(()) } else { Err(TrainError::Folders(problems)) }
}

/// Where a folder really is: a directory by its path without links, a prefix by its server and URI.
fn folder(path: &'static str, uri: &str, used_as: Use, options: &StoreOptions) -> Result<Folder, StoreError> {
    let store = Store::open(uri, options)?;
    let uri = match store.local_directory() {
        Some(directory) => format!("{}/", without_links(&directory).display()),
        None => format!("{} {}", options.endpoint.as_deref().unwrap_or_default(), store.uri()),
    };
    Ok(Folder { path, uri: uri.trim_start().to_owned(), used_as })
}

/// The path with the links of the part that exists resolved.
fn without_links(path: &std::path::Path) -> std::path::PathBuf {
    let found = path.ancestors().find_map(|part| Some((part, std::fs::canonicalize(part).ok()?)));
    let Some((part, real)) = found else { return path.to_owned() };
    path.strip_prefix(part).map_or(real.clone(), |rest| rest.components().fold(real, |path, component| path.join(component)))
}
