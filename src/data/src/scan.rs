//! Looks at a whole dataset once: names, captions, and every picture to its last byte.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};

use super::caption_rules;
use super::captions::{self, Captioned, Names, Notice, Origin, Resolved, Sources};
use super::dataset::{Dataset, DatasetError, Sample, ScanOptions};
use super::image;
use super::layout::{Format, Layout, METADATA_FILES};
use super::metadata::csv;
use super::metadata::json_lines::JsonLines;
use super::metadata::{FILE_NAME, Keys, Rows, parquet};
use super::problems::{Problem, ProblemKind, Problems, WholeFile};
use super::shard::{self, Column, Picture, Pictures, Shard, ShardError};
use finetune_api::plan::{DatasetConfig, OnBadSample};
use finetune_common::digest::{self, Sha256Digest, sha256, sha256_parts};
use finetune_store::{ObjectInfo, Store, StoreErrorKind};

/// Bytes of files that are held while they wait or are decoded.
const BYTES_IN_FLIGHT: u64 = 512 << 20;
/// Pixels that are decoded at the same time (about 16 bytes each at worst).
const PIXELS_IN_FLIGHT: u64 = 100_000_000;
/// Pictures of a Parquet file that are decoded at the same time.
const SHARD_PARALLEL: usize = 4;
/// Bytes of a metadata file read by one request.
const METADATA_PIECE: u64 = 8 << 20;

impl Dataset {
    /// Checks the dataset at `store` with default bounds.
    ///
    /// # Errors
    /// See [`Dataset::scan_with`].
    pub async fn scan(store: &Store, config: &DatasetConfig) -> Result<Self, DatasetError> {
        Self::scan_with(store, config, ScanOptions::default()).await
    }

    /// Checks the dataset at `store`.
    ///
    /// # Errors
    /// With `onBadSample: Fail` [`DatasetError::Problems`] lists everything that is wrong; with `Skip` it is left out,
    /// and [`DatasetError::NoSamples`] reports that nothing remains.
    pub async fn scan_with(store: &Store, config: &DatasetConfig, options: ScanOptions) -> Result<Self, DatasetError> {
        let uri = || store.uri().to_owned();
        let listed = store.list("").await?.into_iter().map(|object| (object.key, object.size));
        let mut layout = Layout::new(listed, config.metadata_file.as_deref()).map_err(|source| DatasetError::Ambiguous { uri: uri(), source })?;
        let fallback = config.caption.as_deref();
        let captioned = fallback.is_some() || layout.pictures.iter().any(|picture| !layout.texts(picture).is_empty());
        if layout.metadata.is_empty() && layout.shards.is_empty() && (config.metadata_file.is_some() || layout.pictures.is_empty() || !captioned) {
            let missing = config.metadata_file.clone().unwrap_or_else(|| METADATA_FILES.join(" or "));
            return Err(DatasetError::NoMetadata { uri: uri(), missing, found: layout.found() });
        }
        let (mut rows, mut metadata_digests) = read_metadata(store, &layout, config).await?;
        for shard in layout.shards.clone() {
            rows = read_shard(store, &mut layout, &shard, rows, &mut metadata_digests, config).await?;
        }
        let Resolved { pictures, mut problems, mut notices } = captions::resolve(store, &layout, rows, fallback).await?;

        let scan = Arc::new(Scan {
            store: store.clone(),
            options,
            bytes: Semaphore::new(permits(BYTES_IN_FLIGHT)),
            pixels: Semaphore::new(permits(PIXELS_IN_FLIGHT.max(options.image.max_pixels))),
        });
        let mut in_shards: BTreeMap<Arc<str>, BTreeMap<u64, Captioned>> = BTreeMap::new();
        let mut files = Vec::new();
        for picture in pictures {
            match shard::row_of_name(&picture.file_name).and_then(|(shard, row)| Some((layout.shards.iter().find(|name| ***name == *shard)?, row))) {
                Some((shard, row)) => _ = in_shards.entry(Arc::clone(shard)).or_default().insert(row, picture),
                None => files.push(picture),
            }
        }
        let checks = files.into_iter().map(|picture| {
            let size = layout.sizes.get(&picture.file_name).copied();
            let scan = Arc::clone(&scan);
            async move { scan.picture(picture, size).await }
        });
        let mut checked: Vec<Checked> = futures::stream::iter(checks).buffer_unordered(options.parallel.max(1)).try_collect().await?;
        for (shard, wanted) in in_shards {
            let (pictures, unreadable) = scan.shard(&shard, config.image_column.as_deref().unwrap_or(parquet::IMAGE), wanted).await?;
            checked.extend(pictures);
            unreadable.into_iter().for_each(|problem| problems.push(problem));
        }
        checked.sort_by(|a, b| a.picture.file_name.cmp(&b.picture.file_name));

        let digest = digest::to_text(&content(&metadata_digests, &checked));
        let (mut bad_pictures, mut samples) = (Problems::default(), Vec::new());
        let (mut sources, mut transparent) = (Sources::default(), Names::default());
        let rules = config.captions.as_ref();
        let tag_orders = rules.map_or(1, |rules| rules.tag_orders as usize);
        let (mut triggered, mut shuffled) = (Names::default(), false);
        for Checked { picture, digest, seen } in checked {
            match (digest, seen) {
                (Some(image_digest), Ok(seen)) => {
                    sources.count(&picture);
                    if seen.transparent {
                        transparent.add(&picture.file_name);
                    }
                    if caption_rules::has_trigger(rules, &picture.captions) {
                        triggered.add(&picture.file_name);
                    }
                    shuffled |= caption_rules::has_orders(rules, &picture.captions);
                    let captions = caption_rules::apply(rules, &picture.captions);
                    samples.push(Sample { file_name: picture.file_name, captions, image_digest, size: seen.size });
                }
                (_, Err(kind)) => {
                    let source = picture.row.as_ref().filter(|_| layout.has_several_files()).map(|(source, _)| Arc::clone(source));
                    bad_pictures.push(Problem { source, line: picture.row.map(|(_, line)| line), file_name: Some(picture.file_name), kind });
                }
                (None, Ok(_)) => {}
            }
        }
        problems.append(bad_pictures);
        if !problems.is_empty() && config.on_bad_sample == OnBadSample::Fail {
            return Err(DatasetError::Problems { uri: uri(), problems });
        }
        if samples.is_empty() {
            return Err(DatasetError::NoSamples { uri: uri(), skipped: problems });
        }
        notices.extend(transparent.notice(Notice::Transparent));
        notices.extend(triggered.notice(Notice::TriggerTwice));
        notices.extend((tag_orders > 1 && !shuffled).then_some(Notice::NothingToShuffle));
        let metadata_digest = match metadata_digests.as_slice() {
            [(_, only)] if layout.shards.is_empty() => Some(digest::to_text(only)),
            _ => None,
        };
        let image_column = Arc::from(config.image_column.as_deref().unwrap_or(parquet::IMAGE));
        Ok(Self { samples, tag_orders, digest, metadata_digest, skipped: problems, sources, notices, image_column })
    }

    /// Logs where the captions come from and what was left out or is noteworthy.
    pub fn log(&self) {
        tracing::info!(samples = self.samples.len(), "{}", self.sources);
        for notice in &self.notices {
            tracing::warn!("{notice}");
        }
        if !self.skipped.is_empty() {
            let first = self.skipped.listed().into_iter().next();
            tracing::warn!(skipped = self.skipped.len(), samples = self.samples.len(), first = first.as_ref().map(tracing::field::display), "samples left out");
        }
    }
}

/// Digest of what the folder says about its pictures. A single metadata file counts by its content alone, several with their names.
fn content(metadata: &[(Arc<str>, Sha256Digest)], checked: &[Checked]) -> Sha256Digest {
    let mut parts: Vec<&[u8]> = match metadata {
        [(_, only)] => vec![only],
        several => several.iter().flat_map(|(name, digest)| [name.as_bytes(), digest]).collect(),
    };
    for file in checked {
        parts.push(file.picture.file_name.as_bytes());
        parts.push(file.digest.as_ref().map_or(&[], |digest| digest));
    }
    for file in checked.iter().filter(|file| file.picture.origin == Origin::Text) {
        parts.extend([&b"caption file"[..], file.picture.file_name.as_bytes()]);
        parts.extend(file.picture.captions.iter().map(String::as_bytes));
    }
    sha256_parts(parts)
}

/// A picture and what its file is.
struct Checked {
    picture: Captioned,
    /// None where the file could not be read.
    digest: Option<Sha256Digest>,
    seen: Result<Seen, ProblemKind>,
}

/// What decoding has shown.
struct Seen {
    size: (u32, u32),
    transparent: bool,
}

struct Scan {
    store: Store,
    options: ScanOptions,
    bytes: Semaphore,
    pixels: Semaphore,
}

/// Semaphores count units of 4 KiB (or 4,096 pixels), so that their numbers stay small.
const UNIT: u64 = 4096;

fn permits(amount: u64) -> usize {
    amount.div_ceil(UNIT).clamp(1, Semaphore::MAX_PERMITS as u64) as usize
}

impl Scan {
    async fn picture(&self, picture: Captioned, size: Option<u64>) -> Result<Checked, DatasetError> {
        let unusable = |picture, digest, kind| Ok(Checked { picture, digest, seen: Err(kind) });
        let Some(size) = size else { return unusable(picture, None, ProblemKind::MissingFile) };
        let limit = self.options.max_file_bytes;
        if size > limit {
            return unusable(picture, None, ProblemKind::FileTooLarge { size, limit });
        }
        let _bytes = self.bytes.acquire_many(permits(size.min(BYTES_IN_FLIGHT)) as u32).await.ok();
        let bytes = match self.store.get_limited(&picture.file_name, limit).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return unusable(picture, None, ProblemKind::MissingFile),
            Err(error) if error.kind() == StoreErrorKind::Corrupt => return Err(DatasetError::Changed { uri: self.store.uri_of(&picture.file_name) }),
            Err(error) => return Err(error.into()),
        };
        self.check(picture, bytes).await
    }

    /// What these bytes of a picture are.
    async fn check(&self, picture: Captioned, bytes: Bytes) -> Result<Checked, DatasetError> {
        let unusable = |picture, digest, kind| Ok(Checked { picture, digest, seen: Err(kind) });
        let digest = sha256(&bytes);
        let pixels = match image::probe(&bytes, &self.options.image) {
            Ok((width, height)) => u64::from(width) * u64::from(height),
            Err(error) => return unusable(picture, Some(digest), ProblemKind::Undecodable(chain(&error))),
        };
        let _pixels = self.pixels.acquire_many(permits(pixels) as u32).await.ok();
        let limits = self.options.image;
        let decoded = tokio::task::spawn_blocking(move || {
            image::decode_seen(&bytes, &limits).map(|(picture, transparent)| Seen { size: (picture.width, picture.height), transparent })
        })
        .await?;
        Ok(Checked { picture, digest: Some(digest), seen: decoded.map_err(|error| ProblemKind::Undecodable(chain(&error))) })
    }
}

impl Scan {
    /// Checks the `wanted` rows of a shard, which is read once, from its begin to its end; with what keeps it from being read further.
    async fn shard(&self, name: &Arc<str>, column: &str, mut wanted: BTreeMap<u64, Captioned>) -> Result<(Vec<Checked>, Option<Problem>), DatasetError> {
        let (sender, receiver) = mpsc::channel(1);
        let (runtime, store, limit) = (Handle::current(), self.store.clone(), self.options.max_file_bytes);
        let (key, column, size) = (Arc::clone(name), column.to_owned(), size_of(&self.store, name).await?);
        let reading = tokio::task::spawn_blocking(move || {
            let mut at = 0;
            let read = shard::guarded(|| {
                let shard = Shard::open(&runtime, &store, &key, size)?;
                let Column::Leaf(leaf) = shard.pictures(&column) else { return Ok(()) };
                let mut pictures = Pictures::new(shard, leaf);
                while let Some(found) = pictures.read()? {
                    if let Some(picture) = wanted.remove(&at) {
                        let bytes = match found {
                            Picture::Absent => Err(ProblemKind::NoBytes),
                            Picture::Bytes(bytes) if bytes.len() as u64 > limit => Err(ProblemKind::FileTooLarge { size: bytes.len() as u64, limit }),
                            Picture::Bytes(bytes) => Ok(bytes),
                        };
                        // Nobody listens any more after an error.
                        if sender.blocking_send((picture, bytes)).is_err() {
                            break;
                        }
                    }
                    at += 1;
                }
                Ok(())
            });
            (at, read)
        });
        let rows = futures::stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|row| (row, receiver)) });
        let checked: Vec<Checked> = rows
            .map(|(picture, bytes)| async move {
                match bytes {
                    Ok(bytes) => self.check(picture, bytes).await,
                    Err(kind) => Ok(Checked { picture, digest: None, seen: Err(kind) }),
                }
            })
            .buffer_unordered(SHARD_PARALLEL)
            .try_collect()
            .await?;
        match reading.await? {
            (_, Ok(())) => Ok((checked, None)),
            (row, Err(ShardError::Unreadable(why))) => {
                Ok((checked, Some(Problem { source: Some(Arc::clone(name)), line: Some(row + 1), file_name: None, kind: ProblemKind::ShardFrom(why) })))
            }
            (_, Err(ShardError::Store(error))) => Err(error.into()),
        }
    }
}

async fn size_of(store: &Store, key: &str) -> Result<u64, DatasetError> {
    let object = store.head(key).await?.ok_or_else(|| DatasetError::Changed { uri: store.uri_of(key) })?;
    Ok(object.size)
}

/// Reads the captions of a shard into `rows`, and enters its rows among the files of `layout`.
async fn read_shard(
    store: &Store,
    layout: &mut Layout,
    name: &Arc<str>,
    mut rows: Rows,
    digests: &mut Vec<(Arc<str>, Sha256Digest)>,
    config: &DatasetConfig,
) -> Result<Rows, DatasetError> {
    let size = size_of(store, name).await?;
    let (runtime, store, key, named) = (Handle::current(), store.clone(), Arc::clone(name), layout.has_several_files());
    let (image, caption) = (config.image_column.clone().unwrap_or_else(|| parquet::IMAGE.to_owned()), config.caption_column.clone());
    let reading = tokio::task::spawn_blocking(move || {
        let keys = Keys { image: &image, caption: &caption };
        let read = shard::guarded(|| parquet::read(Shard::open(&runtime, &store, &key, size)?, &mut rows, &key, named, keys));
        (rows, read)
    });
    let (mut rows, read) = reading.await?;
    match read {
        Ok((digest, names)) => {
            digests.push((Arc::clone(name), digest));
            // The bytes are counted when they are read.
            layout.sizes.extend(names.into_iter().map(|name| (name, 0)));
        }
        Err(ShardError::Unreadable(why)) => {
            rows.problems.push(Problem { source: Some(Arc::clone(name)), line: None, file_name: None, kind: ProblemKind::Shard(why) });
        }
        Err(ShardError::Store(error)) => return Err(error.into()),
    }
    Ok(rows)
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

/// Reads every metadata file; with the digest of each.
async fn read_metadata(store: &Store, layout: &Layout, config: &DatasetConfig) -> Result<(Rows, Vec<(Arc<str>, Sha256Digest)>), DatasetError> {
    let keys = Keys { image: config.image_column.as_deref().unwrap_or(FILE_NAME), caption: &config.caption_column };
    let (mut rows, mut digests) = (Rows::default(), Vec::new());
    let named = layout.metadata.len() > 1;
    for (name, format) in &layout.metadata {
        let changed = || DatasetError::Changed { uri: store.uri_of(name) };
        let before = store.head(name).await?.ok_or_else(changed)?;
        let digest = match format {
            Format::JsonLines => {
                let mut parser = JsonLines::new(&mut rows, name, named, keys);
                let mut hasher = Sha256::new();
                pieces(store, &before, |piece| {
                    hasher.update(piece);
                    parser.push(piece);
                })
                .await?;
                parser.finish();
                hasher.finalize().into()
            }
            Format::Csv if before.size > csv::MAX_FILE => {
                let kind = ProblemKind::WholeFile(WholeFile::TooLarge(csv::MAX_FILE));
                rows.problems.push(Problem { source: Some(Arc::clone(name)), line: None, file_name: None, kind });
                continue;
            }
            Format::Csv => {
                let mut bytes = Vec::new();
                pieces(store, &before, |piece| bytes.extend_from_slice(piece)).await?;
                csv::read(&bytes, &mut rows, name, named, keys);
                sha256(&bytes)
            }
        };
        if store.head(name).await? != Some(before) {
            return Err(changed());
        }
        digests.push((Arc::clone(name), digest));
    }
    Ok((rows, digests))
}

/// Reads an object piece by piece.
async fn pieces(store: &Store, object: &ObjectInfo, mut each: impl FnMut(&[u8])) -> Result<(), DatasetError> {
    let changed = || DatasetError::Changed { uri: store.uri_of(&object.key) };
    let mut at = 0;
    while at < object.size {
        let piece = match store.get_range(&object.key, at..(at + METADATA_PIECE).min(object.size)).await {
            Ok(piece) if !piece.is_empty() => piece,
            Ok(_) => return Err(changed()),
            Err(error) if error.is_not_found() => return Err(changed()),
            Err(error) => return Err(error.into()),
        };
        at += piece.len() as u64;
        each(&piece);
    }
    Ok(())
}
