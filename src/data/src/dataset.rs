//! A dataset: captioned pictures below a URI, checked and digested in one pass.
//!
//! # Expected flow
//! [`Dataset::scan`] lists the folder, reads its metadata and caption files, then every picture once: its digest is taken and
//! it is decoded, to find all problems before anything is trained. Only names, captions, digests and sizes are kept.
//! [`Pictures::load`] reads a picture again when it is prepared and refuses one that has changed meanwhile.
//!
//! # Guarantees
//! - Samples are sorted by file name, whatever the order of lines or listing.
//! - Pictures in memory are bounded: by bytes while they are fetched, by pixels while they are decoded.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::runtime::Handle;

use super::captions::{Notice, Sources};
use super::image::{self, ImageLimits, RgbImage};
use super::layout::{Ambiguous, Found};
use super::problems::Problems;
use super::shard::{self, Column, Picture, Shard, ShardError};
use finetune_api::Reason;
use finetune_common::digest::{Sha256Digest, sha256};
use finetune_store::{Store, StoreError, StoreErrorKind};

/// A captioned picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Path relative to the dataset.
    pub file_name: String,
    /// The captions as they are trained, at least one; where there are several, each epoch trains with one of them. See [`Dataset::tag_orders`].
    pub captions: Vec<String>,
    /// Digest of the file's bytes.
    pub image_digest: Sha256Digest,
    /// Upright width and height in pixels.
    pub size: (u32, u32),
}

/// A dataset whose every sample has been decoded once.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The usable samples, sorted by file name; at least one.
    pub samples: Vec<Sample>,
    /// So many entries of [`Sample::captions`] follow each other that are one caption, with its tags in different orders; the first as it is written.
    pub tag_orders: usize,
    /// `sha256:<hex>` of the metadata files, of (name, content) of every picture, and of (name, caption) of every caption file.
    pub digest: String,
    /// `sha256:<hex>` of the metadata file alone, where there is exactly one.
    pub metadata_digest: Option<String>,
    /// What was left out (`onBadSample: Skip`).
    pub skipped: Problems,
    /// Where the captions come from.
    pub sources: Sources,
    /// What else people should know about the folder.
    pub notices: Vec<Notice>,
    /// The column of Parquet files that holds the pictures.
    pub image_column: Arc<str>,
}

/// Why a dataset cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// Lines or files are unusable.
    #[error("the dataset at {uri} has {problems}")]
    Problems {
        /// The dataset.
        uri: String,
        /// All of them.
        problems: Problems,
    },
    /// No picture has a caption, or there is no picture.
    #[error(
        "the dataset at {uri} has no {missing}: {found}. Captions come from {missing}, else from a .txt beside each picture, else from \
         dataset.caption, which may be the only one"
    )]
    NoMetadata {
        /// The dataset.
        uri: String,
        /// The metadata files that were looked for.
        missing: String,
        /// What is there.
        found: Found,
    },
    /// Several metadata files are in one folder.
    #[error("the dataset at {uri} has captions twice: {source}")]
    Ambiguous {
        /// The dataset.
        uri: String,
        /// The files.
        source: Ambiguous,
    },
    /// No usable sample.
    #[error("the dataset at {uri} has no usable sample; left out: {skipped}")]
    NoSamples {
        /// The dataset.
        uri: String,
        /// What was left out.
        skipped: Problems,
    },
    /// A file changed while it was read, or since.
    #[error("{uri} has changed while the job was running")]
    Changed {
        /// The file.
        uri: String,
    },
    /// A picture that was usable before is not any more.
    #[error("failed to decode {uri}")]
    Image {
        /// The file.
        uri: String,
        /// The decoder's error.
        #[source]
        source: image::ImageError,
    },
    /// The store failed.
    #[error("failed to read the dataset")]
    Store(#[from] StoreError),
    /// A worker thread failed.
    #[error("failed to decode in the background")]
    Worker(#[from] tokio::task::JoinError),
}

impl DatasetError {
    /// The reason for status, exit code and metrics.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Problems { .. } | Self::NoSamples { .. } | Self::Ambiguous { .. } | Self::Image { .. } => Reason::InvalidDataset,
            Self::NoMetadata { .. } => Reason::NotFound,
            Self::Changed { .. } => Reason::DatasetChanged,
            Self::Worker(_) => Reason::TrainerCrashed,
            Self::Store(error) => match error.kind() {
                StoreErrorKind::InvalidLocation => Reason::InvalidConfig,
                StoreErrorKind::NotFound => Reason::NotFound,
                StoreErrorKind::PermissionDenied => Reason::PermissionDenied,
                StoreErrorKind::Unavailable => Reason::StorageUnavailable,
                StoreErrorKind::Superseded => Reason::Superseded,
                StoreErrorKind::InUse => Reason::OutputInUse,
                StoreErrorKind::Corrupt | StoreErrorKind::LocalDisk => Reason::TrainerCrashed,
            },
        }
    }
}

/// Bounds of a scan.
#[derive(Debug, Clone, Copy)]
pub struct ScanOptions {
    /// Bounds of a picture.
    pub image: ImageLimits,
    /// Largest file in bytes.
    pub max_file_bytes: u64,
    /// Files that are read at the same time.
    pub parallel: usize,
}

impl Default for ScanOptions {
    fn default() -> Self {
        Self { image: ImageLimits::default(), max_file_bytes: 256 << 20, parallel: 32 }
    }
}

impl Dataset {
    /// Every caption with the file that it belongs to, in the order of the samples.
    pub fn captions(&self) -> impl Iterator<Item = (&str, &str)> {
        self.samples.iter().flat_map(|sample| sample.captions.iter().map(|caption| (sample.file_name.as_str(), caption.as_str())))
    }

    /// The captions of a sample, each once, with the trigger word and with its tags as they are written.
    pub fn captions_of<'a>(&self, sample: &'a Sample) -> impl Iterator<Item = &'a String> {
        sample.captions.iter().step_by(self.tag_orders.max(1))
    }

    /// Reads pictures of this dataset, which is at `store`, again.
    pub fn pictures(&self, store: &Store) -> Pictures {
        Pictures { store: store.clone(), column: Arc::clone(&self.image_column), open: Arc::default() }
    }
}

/// Reads and decodes pictures of samples again. Clones share the place in a Parquet file: rows that are asked for nearly in order are read once.
#[derive(Clone)]
pub struct Pictures {
    store: Store,
    column: Arc<str>,
    open: Arc<Mutex<Option<Open>>>,
}

/// The Parquet file that was read last.
struct Open {
    key: Arc<str>,
    pictures: shard::Pictures,
}

impl Pictures {
    /// A sample's picture.
    ///
    /// # Errors
    /// [`DatasetError::Changed`] if its bytes are not those of the scan; [`DatasetError::Store`].
    pub async fn load(&self, sample: &Sample) -> Result<RgbImage, DatasetError> {
        let changed = || DatasetError::Changed { uri: self.store.uri_of(&sample.file_name) };
        let bytes = match self.bytes(&sample.file_name).await {
            Ok(bytes) => bytes.ok_or_else(changed)?,
            Err(error) if matches!(error.kind(), StoreErrorKind::NotFound | StoreErrorKind::Corrupt) => return Err(changed()),
            Err(error) => return Err(error.into()),
        };
        if sha256(&bytes) != sample.image_digest {
            return Err(changed());
        }
        let decoded = tokio::task::spawn_blocking(move || image::decode(&bytes, &ImageLimits::default())).await?;
        decoded.map_err(|source| DatasetError::Image { uri: self.store.uri_of(&sample.file_name), source })
    }

    /// The picture's file; none if it was a row of a Parquet file that is another now.
    async fn bytes(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        let Some((key, row)) = shard::row_of_name(name) else {
            return self.store.get_limited(name, ScanOptions::default().max_file_bytes).await.map(Some);
        };
        let key: Arc<str> = Arc::from(key);
        let (this, runtime) = (self.clone(), Handle::current());
        let reading = tokio::task::spawn_blocking(move || {
            let mut open = this.open.lock().unwrap_or_else(PoisonError::into_inner);
            let found = shard::guarded(|| {
                let last = open.take().filter(|last| last.key == key);
                let last = if last.is_some() { last } else { Open::new(&runtime, &this, key)? };
                // Kept where nothing fails: an error may leave it between two rows.
                let Some(mut last) = last else { return Ok(None) };
                let found = last.pictures.row(row)?;
                *open = Some(last);
                Ok(found)
            })?;
            Ok(found.and_then(|picture| if let Picture::Bytes(bytes) = picture { Some(bytes) } else { None }))
        });
        match reading.await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(ShardError::Store(error))) => Err(error),
            // It could be read before.
            Ok(Err(ShardError::Unreadable(_))) | Err(_) => Ok(None),
        }
    }
}

impl Open {
    /// Opens the file; none if it is gone, or without the column. Blocks.
    fn new(runtime: &Handle, pictures: &Pictures, key: Arc<str>) -> Result<Option<Self>, ShardError> {
        let Some(object) = runtime.block_on(pictures.store.head(&key)).map_err(ShardError::Store)? else { return Ok(None) };
        let shard = Shard::open(runtime, &pictures.store, &key, object.size)?;
        let Column::Leaf(leaf) = shard.pictures(&pictures.column) else { return Ok(None) };
        Ok(Some(Self { key, pictures: shard::Pictures::new(shard, leaf) }))
    }
}

#[cfg(test)]
#[path = "dataset_tests.rs"]
mod tests;
