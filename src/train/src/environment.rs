//! What a run has besides its configuration: stores, folders, the wish to stop, somebody to tell.

use std::path::PathBuf;
use std::time::Duration;

use super::interrupt::Interrupt;
use super::report::Reporter;
use finetune_api::plan::{ModelConfig, ModelSource, StorageConfig, TrainConfig};
use finetune_store::{Buckets, Environment, RetryPolicy, StoreError, StoreOptions, model_source};

/// What a run has besides its configuration.
#[derive(Clone)]
pub struct JobEnvironment {
    /// Directories that stand in for buckets.
    pub buckets: Buckets,
    /// Folder for downloads and prepared data.
    pub cache_dir: PathBuf,
    /// A name for people to see in claims: the pod or the host.
    pub owner: String,
    /// The wish to stop.
    pub interrupt: Interrupt,
    /// Somebody to tell.
    pub reporter: Reporter,
}

impl JobEnvironment {
    /// How the run's own stores are reached.
    pub fn store_options(&self, config: &TrainConfig) -> StoreOptions {
        options(config.storage.as_ref(), &self.buckets)
    }

    /// Where the model is, and how that is reached.
    pub fn model_source(&self, config: &TrainConfig) -> (model_source::ModelSource, StoreOptions) {
        let ModelConfig { source, cache_dir: _ } = &config.model;
        let own = self.store_options(config);
        match source {
            ModelSource::HuggingFace { repo, revision } => (model_source::ModelSource::HuggingFace { repo: repo.clone(), revision: revision.clone() }, own),
            ModelSource::Directory { path } => (model_source::ModelSource::Directory(path.clone()), own),
            ModelSource::ObjectStore { uri, sha256_manifest, storage } => {
                let source = model_source::ModelSource::ObjectStore { uri: uri.clone(), sha256_manifest: sha256_manifest.clone() };
                (source, storage.as_ref().map_or(own, |storage| options(Some(storage), &self.buckets)))
            }
        }
    }

    /// Opens a prefix of the run's own stores.
    ///
    /// # Errors
    /// If the location cannot be used.
    pub fn open(&self, uri: &str, config: &TrainConfig) -> Result<finetune_store::Store, StoreError> {
        finetune_store::Store::open(uri, &self.store_options(config))
    }
}

/// Bounds of retrying; `FINETUNE_STORAGE_RETRY_SECONDS` changes how long a request is tried before the run gives up.
fn retry() -> RetryPolicy {
    let seconds = std::env::var("FINETUNE_STORAGE_RETRY_SECONDS").ok().and_then(|text| text.parse().ok());
    let policy = RetryPolicy::default();
    RetryPolicy { total: seconds.map_or(policy.total, Duration::from_secs), ..policy }
}

fn options(storage: Option<&StorageConfig>, buckets: &Buckets) -> StoreOptions {
    let storage = storage.cloned().unwrap_or_default();
    let environment = match &storage.credentials_prefix {
        None => Environment::process(),
        Some(prefix) => Environment::from_pairs(std::env::vars().filter_map(|(name, value)| Some((name.strip_prefix(prefix.as_str())?.to_owned(), value)))),
    };
    StoreOptions { endpoint: storage.endpoint, region: storage.region, ca_bundle: storage.ca_bundle, buckets: buckets.clone(), environment, retry: retry() }
}
