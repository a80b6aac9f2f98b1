//! What can be seen of a model without fetching its weights.

use std::io::Read as _;
use std::path::Path;

use bytes::Bytes;

use super::select::{self, MODEL_INDEX, RemoteFile};
use super::{ModelFolder, ModelSourceError, Origin, Parts, Result};
use crate::{NoProgress, StoreError};

/// A file of weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightFile {
    /// The part's folder, as `vae`.
    pub folder: String,
    /// Path in the model's folder.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
}

/// What there is of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The files of weights that a run would fetch.
    pub weights: Vec<WeightFile>,
    /// Everything that is missing, a sentence each.
    pub problems: Vec<String>,
}

impl ModelFolder {
    /// The class of the pipeline that `model_index.json` names, as `StableDiffusion3Pipeline`.
    pub fn class(&self) -> Option<&str> {
        self.contents.class()
    }

    /// Whether there is a `model_index.json`.
    pub fn has_contents(&self) -> bool {
        self.listing.iter().any(|file| file.path == MODEL_INDEX)
    }

    /// Fetches the files of `parts` but weights (configurations, tokenizers, indexes of shards), of those parts that are there.
    ///
    /// # Errors
    /// If the source cannot be read. What is missing is no error here.
    pub async fn look(&self, parts: Parts) -> Result<Found> {
        let (selection, mut problems) = select::select_present(&self.listing, &self.contents, parts);
        let (mut weights, texts): (Vec<_>, Vec<_>) = selection.files.into_iter().partition(|file| selection.weights.contains(file));
        self.bring(&texts, &NoProgress).await?;
        for index in &selection.indexes {
            match self.shards(index) {
                Ok(shards) => weights.extend(shards),
                Err(ModelSourceError::Unusable { problems: missing, .. }) => problems.extend(missing),
                Err(error) => return Err(error),
            }
        }
        let file = |RemoteFile { path, size, .. }| WeightFile { folder: select::folder_of(&path).to_owned(), path, size };
        Ok(Found { weights: weights.into_iter().map(file).collect(), problems })
    }

    /// The first `bytes` of a file, or all of a shorter one; of a remote file no more than that is read.
    ///
    /// # Errors
    /// [`ModelSourceError::Store`].
    pub async fn first_bytes(&self, path: &str, bytes: usize) -> Result<Bytes> {
        // What has been fetched before need not be asked for again.
        let local = self.path_of(path);
        let path = self.source_of(path);
        match &self.origin {
            Origin::Directory => Ok(read_first(&local, bytes)?),
            _ if local.is_file() => Ok(read_first(&local, bytes)?),
            Origin::Bucket(store) => Ok(store.get_range(path, 0..bytes as u64).await?),
            Origin::Hub(hub) => Ok(hub.first_bytes(path, bytes).await?.into()),
        }
    }

    /// Where the model is, for people.
    pub fn location(&self) -> &str {
        &self.location
    }
}

fn read_first(path: &Path, bytes: usize) -> Result<Bytes, StoreError> {
    let mut first = Vec::new();
    let file = std::fs::File::open(path).map_err(StoreError::local("open", path))?;
    file.take(bytes as u64).read_to_end(&mut first).map_err(StoreError::local("read", path))?;
    Ok(first.into())
}
