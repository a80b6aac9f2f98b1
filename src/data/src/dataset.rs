//! A dataset: captioned pictures below a URI, checked and digested in one pass.
//!
//! # Expected flow
//! [`Dataset::scan`] reads the metadata file, lists the folder, then reads every named picture once: its digest is taken and
//! it is decoded, to find all problems before anything is trained. Only names, captions, digests and sizes are kept.
//! [`Dataset::load`] reads a picture again when it is prepared and refuses one that has changed meanwhile.
//!
//! # Guarantees
//! - Samples are sorted by file name, whatever the order of lines or listing.
//! - Pictures in memory are bounded: by bytes while they are fetched, by pixels while they are decoded.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _};
use tokio::sync::Semaphore;

use super::image::{self, ImageLimits, RgbImage};
use super::metadata::{Metadata, MetadataParser, Row};
use super::problems::{Problem, ProblemKind, Problems};
use finetune_api::Reason;
use finetune_api::plan::{DatasetConfig, OnBadSample};
use finetune_common::digest::{self, Sha256Digest, sha256, sha256_parts};
use finetune_store::{Store, StoreError, StoreErrorKind};

/// A captioned picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Path relative to the dataset.
    pub file_name: String,
    /// The caption.
    pub caption: String,
    /// Digest of the file's bytes.
    pub image_digest: Sha256Digest,
    /// Upright width and height in pixels.
    pub size: (u32, u32),
}

impl Sample {
    /// Content key of the pair of picture and caption.
    pub fn key(&self) -> Sha256Digest {
        sha256_parts([&self.image_digest[..], self.caption.as_bytes()])
    }
}

/// A dataset whose every sample has been decoded once.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The usable samples, sorted by file name; at least one.
    pub samples: Vec<Sample>,
    /// `sha256:<hex>` of the metadata file and of (name, content) of every file that it names.
    pub digest: String,
    /// `sha256:<hex>` of the metadata file alone.
    pub metadata_digest: String,
    /// What was left out (`onBadSample: Skip`).
    pub skipped: Problems,
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
    /// There is no metadata file.
    #[error("the dataset has no metadata file {uri}: write one JSON object per line with \"file_name\" and {caption_column:?}")]
    NoMetadata {
        /// The file.
        uri: String,
        /// The caption's key.
        caption_column: String,
        /// The store's error.
        #[source]
        source: Option<StoreError>,
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
            Self::Problems { .. } | Self::NoSamples { .. } | Self::Image { .. } => Reason::InvalidDataset,
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

/// Sees each usable picture once, in any order and from several threads: to prepare it without reading it again.
pub trait Visitor: Send + Sync {
    /// A decoded picture. Called on a thread where computing is fine.
    fn picture(&self, file_name: &str, digest: &Sha256Digest, picture: &RgbImage);
}

/// Looks at nothing.
#[derive(Debug, Clone, Copy)]
pub struct NoVisitor;

impl Visitor for NoVisitor {
    fn picture(&self, _: &str, _: &Sha256Digest, _: &RgbImage) {}
}

/// Bytes of files that are held while they wait or are decoded.
const BYTES_IN_FLIGHT: u64 = 512 << 20;
/// Pixels that are decoded at the same time (about 16 bytes each at worst).
const PIXELS_IN_FLIGHT: u64 = 100_000_000;
/// Bytes of the metadata file read by one request.
const METADATA_PIECE: u64 = 8 << 20;

/// Endings of files that are taken for pictures when no line names them.
const PICTURE_ENDINGS: [&str; 12] = ["png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic"];

impl Dataset {
    /// Checks the dataset at `store` with default bounds.
    ///
    /// # Errors
    /// See [`Dataset::scan_with`].
    pub async fn scan(store: &Store, config: &DatasetConfig) -> Result<Self, DatasetError> {
        Self::scan_with(store, config, ScanOptions::default(), Arc::new(NoVisitor)).await
    }

    /// Checks the dataset at `store`.
    ///
    /// # Errors
    /// With `onBadSample: Fail` [`DatasetError::Problems`] lists everything that is wrong; with `Skip` it is left out,
    /// and [`DatasetError::NoSamples`] tells that nothing remains.
    pub async fn scan_with(store: &Store, config: &DatasetConfig, options: ScanOptions, visitor: Arc<dyn Visitor>) -> Result<Self, DatasetError> {
        let Metadata { rows, mut problems, names, digest: metadata_digest } = read_metadata(store, config).await?;
        let sizes: BTreeMap<String, u64> = store.list("").await?.into_iter().map(|object| (object.key, object.size)).collect();
        problems.append(without_row(&sizes, &names, config));

        let scan = Arc::new(Scan {
            store: store.clone(),
            options,
            visitor,
            bytes: Semaphore::new(permits(BYTES_IN_FLIGHT)),
            pixels: Semaphore::new(permits(PIXELS_IN_FLIGHT.max(options.image.max_pixels))),
        });
        let pictures = rows.into_iter().map(|row| {
            let size = sizes.get(&row.file_name).copied();
            let scan = Arc::clone(&scan);
            async move { scan.row(row, size).await }
        });
        let mut checked: Vec<Checked> = futures::stream::iter(pictures).buffer_unordered(options.parallel.max(1)).try_collect().await?;
        checked.sort_by(|a, b| a.row.file_name.cmp(&b.row.file_name));

        let mut parts: Vec<&[u8]> = vec![&metadata_digest];
        for file in &checked {
            parts.push(file.row.file_name.as_bytes());
            parts.push(file.digest.as_ref().map_or(&[], |digest| digest));
        }
        let digest = digest::to_text(&sha256_parts(parts));
        let mut bad_pictures = Problems::default();
        let mut samples = Vec::new();
        for Checked { row, digest, size } in checked {
            match (digest, size) {
                (Some(image_digest), Ok(size)) => samples.push(Sample { file_name: row.file_name, caption: row.caption, image_digest, size }),
                (_, Err(kind)) => bad_pictures.push(Problem { line: Some(row.line), file_name: Some(row.file_name), kind }),
                (None, Ok(_)) => {}
            }
        }
        problems.append(bad_pictures);
        if !problems.is_empty() && config.on_bad_sample == OnBadSample::Fail {
            return Err(DatasetError::Problems { uri: store.uri().to_owned(), problems });
        }
        if samples.is_empty() {
            return Err(DatasetError::NoSamples { uri: store.uri().to_owned(), skipped: problems });
        }
        if !problems.is_empty() {
            tracing::warn!(
                skipped = problems.len(),
                samples = samples.len(),
                first = problems.listed().first().map(tracing::field::display),
                "samples left out"
            );
        }
        Ok(Self { samples, digest, metadata_digest: digest::to_text(&metadata_digest), skipped: problems })
    }

    /// Reads and decodes a sample's picture again.
    ///
    /// # Errors
    /// [`DatasetError::Changed`] if its bytes are not those of the scan; [`DatasetError::Store`].
    pub async fn load(store: &Store, sample: &Sample) -> Result<RgbImage, DatasetError> {
        let uri = || store.uri_of(&sample.file_name);
        let bytes = match store.get_limited(&sample.file_name, ScanOptions::default().max_file_bytes).await {
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), StoreErrorKind::NotFound | StoreErrorKind::Corrupt) => return Err(DatasetError::Changed { uri: uri() }),
            Err(error) => return Err(error.into()),
        };
        if sha256(&bytes) != sample.image_digest {
            return Err(DatasetError::Changed { uri: uri() });
        }
        let decoded = tokio::task::spawn_blocking(move || image::decode(&bytes, &ImageLimits::default())).await?;
        decoded.map_err(|source| DatasetError::Image { uri: uri(), source })
    }
}

/// A row and what its file is.
struct Checked {
    row: Row,
    /// None where the file could not be read.
    digest: Option<Sha256Digest>,
    size: Result<(u32, u32), ProblemKind>,
}

struct Scan {
    store: Store,
    options: ScanOptions,
    visitor: Arc<dyn Visitor>,
    bytes: Semaphore,
    pixels: Semaphore,
}

/// Semaphores count units of 4 KiB (or 4,096 pixels), so that their numbers stay small.
const UNIT: u64 = 4096;

fn permits(amount: u64) -> usize {
    amount.div_ceil(UNIT).clamp(1, Semaphore::MAX_PERMITS as u64) as usize
}

impl Scan {
    async fn row(&self, row: Row, size: Option<u64>) -> Result<Checked, DatasetError> {
        let unusable = |row, digest, kind| Ok(Checked { row, digest, size: Err(kind) });
        let Some(size) = size else { return unusable(row, None, ProblemKind::MissingFile) };
        let limit = self.options.max_file_bytes;
        if size > limit {
            return unusable(row, None, ProblemKind::FileTooLarge { size, limit });
        }
        let _bytes = self.bytes.acquire_many(permits(size.min(BYTES_IN_FLIGHT)) as u32).await.ok();
        let bytes = match self.store.get_limited(&row.file_name, limit).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return unusable(row, None, ProblemKind::MissingFile),
            Err(error) if error.kind() == StoreErrorKind::Corrupt => return Err(DatasetError::Changed { uri: self.store.uri_of(&row.file_name) }),
            Err(error) => return Err(error.into()),
        };
        let digest = sha256(&bytes);
        let pixels = match image::probe(&bytes, &self.options.image) {
            Ok((width, height)) => u64::from(width) * u64::from(height),
            Err(error) => return unusable(row, Some(digest), ProblemKind::Undecodable(chain(&error))),
        };
        let _pixels = self.pixels.acquire_many(permits(pixels) as u32).await.ok();
        let (limits, visitor, name) = (self.options.image, Arc::clone(&self.visitor), row.file_name.clone());
        let decoded = tokio::task::spawn_blocking(move || {
            image::decode(&bytes, &limits).map(|picture| {
                visitor.picture(&name, &digest, &picture);
                (picture.width, picture.height)
            })
        })
        .await?;
        Ok(Checked { row, digest: Some(digest), size: decoded.map_err(|error| ProblemKind::Undecodable(chain(&error))) })
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

async fn read_metadata(store: &Store, config: &DatasetConfig) -> Result<Metadata, DatasetError> {
    let key = &config.metadata_file;
    let missing = |source| DatasetError::NoMetadata { uri: store.uri_of(key), caption_column: config.caption_column.clone(), source };
    let before = store.head(key).await?.ok_or_else(|| missing(None))?;
    let mut parser = MetadataParser::new(&config.caption_column);
    let mut at = 0;
    while at < before.size {
        let piece = match store.get_range(key, at..(at + METADATA_PIECE).min(before.size)).await {
            Ok(piece) if !piece.is_empty() => piece,
            Ok(_) => return Err(DatasetError::Changed { uri: store.uri_of(key) }),
            Err(error) if error.is_not_found() => return Err(missing(Some(error))),
            Err(error) => return Err(error.into()),
        };
        at += piece.len() as u64;
        parser.push(&piece);
    }
    if store.head(key).await? != Some(before) {
        return Err(DatasetError::Changed { uri: store.uri_of(key) });
    }
    Ok(parser.finish())
}

/// Pictures that no line names, not even an unusable one.
fn without_row(sizes: &BTreeMap<String, u64>, names: &HashMap<String, u64>, config: &DatasetConfig) -> Problems {
    let is_picture = |key: &str| {
        let ending = key.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase());
        ending.is_some_and(|ending| PICTURE_ENDINGS.contains(&ending.as_str())) && !key.split('/').any(|segment| segment.starts_with('.'))
    };
    let mut found = Problems::default();
    for key in sizes.keys().filter(|key| **key != config.metadata_file && is_picture(key) && !names.contains_key(key.as_str())) {
        found.push(Problem { line: None, file_name: Some(key.clone()), kind: ProblemKind::NoRow });
    }
    found
}

#[cfg(test)]
#[path = "dataset_tests.rs"]
mod tests;
