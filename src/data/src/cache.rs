//! A content-addressed cache of small tensors: prompt embeddings and latents.
//!
//! # Guarantees
//! - An entry is found by what it was made from ([`latents_key`], [`prompt_key`]), never by a position.
//! - Entries lie in pack files of bounded size, named by their digest, written whole or not at all. A killed preparation
//!   keeps its finished packs; any number of processes may use one folder.
//! - A pack's digest is checked before anything of it is used; one that is damaged is dropped with a warning, and its
//!   entries are absent: they are made again.
//! - With a mirror, every entry that was put or asked for ([`TensorCache::contains`]) is in the mirror after
//!   [`TensorCache::flush`], also what another job had left in the folder. A run on another machine starts from there.
//!
//! The mirror holds the same pack files. There is no index beside them: the header of a pack names its keys.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt as _;
use safetensors::Dtype;
use tokio::task::JoinSet;

use super::pack::{self, Entry, Pack, Place, Raw};
use super::transform::Transform;
use finetune_common::digest::{Sha256Digest, sha256_parts};
use finetune_common::tensor::{HostTensor, ShapeError};
use finetune_store::{NoProgress, Store, StoreError, StoreErrorKind};

/// Bytes after which a pack is closed.
pub const PACK_BYTES: usize = 64 << 20;

/// Packs that are fetched or uploaded at the same time.
const PARALLEL: usize = 8;

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The folder or a file in it cannot be used.
    #[error("failed to {operation} {}", path.display())]
    Disk {
        /// What was tried.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The mirror failed.
    #[error("failed to use the mirror of the cache")]
    Store(#[from] StoreError),
    /// An entry's tensor has another type than it was written with.
    #[error("the cache holds a tensor of type {dtype:?} where f32 is expected: remove the cache folder and run again")]
    Dtype {
        /// Its type.
        dtype: Dtype,
    },
    /// An entry's tensor has other values than its shape.
    #[error("the cache holds a damaged tensor: remove the cache folder and run again")]
    Shape(#[from] ShapeError),
    /// A worker failed.
    #[error("failed to upload in the background")]
    Worker(#[from] tokio::task::JoinError),
}

/// Whether this is the name of a file that the mirror holds: a digest in lower-case hexadecimal, with the ending of packs.
pub fn is_pack_name(name: &str) -> bool {
    pack::digest_of_name(name).is_some_and(|digest| pack::name_of(&digest) == name)
}

/// The key of a picture's latents: the file's bytes, what is done to them, and the encoder that sees the result.
pub fn latents_key(image_digest: &Sha256Digest, transform: &Transform, vae: &Sha256Digest) -> Sha256Digest {
    sha256_parts([&b"latents v1"[..], image_digest, &transform.digest(), vae])
}

/// The key of a caption's embeddings: the text, the encoders and tokenizers, and the number of tokens.
pub fn prompt_key(caption: &str, encoders: &Sha256Digest, max_sequence_length: u32) -> Sha256Digest {
    sha256_parts([&b"prompt v1"[..], caption.as_bytes(), encoders, &max_sequence_length.to_le_bytes()])
}

/// A tensor of an entry: in memory until its pack is written, then mapped from disk.
#[derive(Debug, Clone)]
pub struct CachedTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    Pack(Arc<Pack>, Range<usize>),
    Memory(Arc<[u8]>),
}

impl CachedTensor {
    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Raw little-endian values.
    pub fn bytes(&self) -> &[u8] {
        match &self.source {
            Source::Pack(pack, range) => &pack.map[range.clone()],
            Source::Memory(bytes) => bytes,
        }
    }

    /// A tensor of f32 to be kept.
    pub fn f32(tensor: &HostTensor) -> Self {
        let bytes: Vec<u8> = tensor.values().iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: tensor.shape().to_vec(), source: Source::Memory(bytes.into()) }
    }

    /// Bytes to be kept, as the pixels of a picture.
    ///
    /// # Errors
    /// If they do not fill the shape.
    pub fn u8(bytes: Vec<u8>, shape: &[usize]) -> Result<Self, ShapeError> {
        if shape.iter().product::<usize>() != bytes.len() {
            return Err(ShapeError::Length { shape: shape.to_vec(), values: bytes.len() });
        }
        Ok(Self { dtype: Dtype::U8, shape: shape.to_vec(), source: Source::Memory(bytes.into()) })
    }

    /// Whole numbers to be kept, as counts of tokens.
    ///
    /// # Errors
    /// If they do not fill the shape.
    pub fn u32(values: &[u32], shape: &[usize]) -> Result<Self, ShapeError> {
        if shape.iter().product::<usize>() != values.len() {
            return Err(ShapeError::Length { shape: shape.to_vec(), values: values.len() });
        }
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Ok(Self { dtype: Dtype::U32, shape: shape.to_vec(), source: Source::Memory(bytes.into()) })
    }

    /// The values of a tensor of f32.
    ///
    /// # Errors
    /// If it has another type, or the entry is damaged.
    pub fn to_f32(&self) -> Result<HostTensor, CacheError> {
        if self.dtype != Dtype::F32 {
            return Err(CacheError::Dtype { dtype: self.dtype });
        }
        let values = self.bytes().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        Ok(HostTensor::new(values, self.shape.as_slice())?)
    }
}

/// The cache; see the module's documentation.
#[derive(Debug)]
pub struct TensorCache {
    dir: PathBuf,
    mirror: Option<Store>,
    pack_bytes: usize,
    /// Entries that are in no pack yet, and their size.
    pending: BTreeMap<Sha256Digest, Entry>,
    pending_bytes: usize,
    packs: Mutex<Packs>,
    /// Packs known to be in the mirror, or on their way.
    mirrored: BTreeSet<Sha256Digest>,
    uploads: JoinSet<Result<(), StoreError>>,
}

#[derive(Debug, Default)]
struct Packs {
    by_digest: BTreeMap<Sha256Digest, Arc<Pack>>,
    by_key: HashMap<Sha256Digest, Arc<Pack>>,
    /// Packs of entries that this run needs.
    wanted: BTreeSet<Sha256Digest>,
}

impl Packs {
    fn add(&mut self, pack: Arc<Pack>) {
        for key in pack.places.keys() {
            self.by_key.entry(*key).or_insert_with(|| Arc::clone(&pack));
        }
        self.by_digest.insert(pack.digest, pack);
    }

    /// The verified pack that holds `key`; packs found damaged on the way are dropped.
    fn find(&mut self, key: &Sha256Digest) -> Option<Arc<Pack>> {
        loop {
            let pack = Arc::clone(self.by_key.get(key)?);
            if pack.verify() {
                return Some(pack);
            }
            tracing::warn!(file = %pack.map.path().display(), entries = pack.places.len(), "a damaged pack of prepared data is dropped; its entries are made again");
            let _gone_already_is_fine = std::fs::remove_file(pack.map.path());
            self.by_digest.remove(&pack.digest);
            self.by_key.clear();
            for pack in std::mem::take(&mut self.by_digest).into_values() {
                self.add(pack);
            }
        }
    }
}

impl TensorCache {
    /// Opens the folder `dir`, making it if need be, and fetches what the mirror has and the folder lacks.
    ///
    /// # Errors
    /// If the folder cannot be used or the mirror not be read. Damaged packs are no error.
    pub async fn open(dir: &Path, mirror: Option<Store>) -> Result<Self, CacheError> {
        Self::with_pack_bytes(dir, mirror, PACK_BYTES).await
    }

    /// [`TensorCache::open`] with another size of packs.
    ///
    /// # Errors
    /// As [`TensorCache::open`].
    pub async fn with_pack_bytes(dir: &Path, mirror: Option<Store>, pack_bytes: usize) -> Result<Self, CacheError> {
        std::fs::create_dir_all(dir).and_then(|()| pack::remove_abandoned(dir)).map_err(disk("open", dir))?;
        let mut cache = Self {
            dir: dir.to_owned(),
            mirror,
            pack_bytes,
            pending: BTreeMap::new(),
            pending_bytes: 0,
            packs: Mutex::default(),
            mirrored: BTreeSet::new(),
            uploads: JoinSet::new(),
        };
        let mut local = BTreeMap::new();
        for entry in std::fs::read_dir(dir).map_err(disk("list", dir))? {
            let entry = entry.map_err(disk("list", dir))?;
            if let Some(digest) = pack::digest_of_name(&entry.file_name().to_string_lossy()) {
                local.insert(digest, false);
            }
        }
        for digest in cache.fetch(&local.keys().copied().collect()).await? {
            local.insert(digest, true);
        }
        for (digest, verified) in local {
            cache.add_pack(digest, verified)?;
        }
        Ok(cache)
    }

    /// Whether the entry is here and sound. Marks it as needed: see [`TensorCache::flush`].
    pub fn contains(&self, key: &Sha256Digest) -> bool {
        if self.pending.contains_key(key) {
            return true;
        }
        let mut packs = self.packs();
        let Some(pack) = packs.find(key) else { return false };
        packs.wanted.insert(pack.digest);
        true
    }

    /// A tensor of an entry.
    ///
    /// # Errors
    /// None at present; absent and damaged entries are `None`.
    pub fn get(&self, key: &Sha256Digest, name: &str) -> Result<Option<CachedTensor>, CacheError> {
        if let Some(raw) = self.pending.get(key).and_then(|entry| entry.get(name)) {
            return Ok(Some(CachedTensor { dtype: raw.dtype, shape: raw.shape.clone(), source: Source::Memory(Arc::clone(&raw.bytes)) }));
        }
        let Some(pack) = self.packs().find(key) else { return Ok(None) };
        let Some(Place { dtype, shape, range }) = pack.places.get(key).and_then(|entry| entry.get(name)).cloned() else { return Ok(None) };
        Ok(Some(CachedTensor { dtype, shape, source: Source::Pack(pack, range) }))
    }

    /// Adds an entry; one that exists already is left as it is. A full pack is written, and uploaded in the background.
    ///
    /// # Errors
    /// If a pack cannot be written.
    pub fn put(&mut self, key: Sha256Digest, tensors: &[(&str, CachedTensor)]) -> Result<(), CacheError> {
        if self.contains(&key) {
            return Ok(());
        }
        let mut entry = Entry::new();
        for (name, tensor) in tensors {
            let bytes: Arc<[u8]> = match &tensor.source {
                Source::Memory(bytes) => Arc::clone(bytes),
                Source::Pack(..) => tensor.bytes().into(),
            };
            self.pending_bytes += bytes.len();
            entry.insert((*name).to_owned(), Raw { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes });
        }
        self.pending.insert(key, entry);
        if self.pending_bytes >= self.pack_bytes { self.close_pack() } else { Ok(()) }
    }

    /// Writes what is in memory and waits until all needed packs are in the mirror.
    ///
    /// # Errors
    /// If a pack cannot be written or uploaded.
    pub async fn flush(&mut self) -> Result<(), CacheError> {
        self.close_pack()?;
        let wanted: Vec<Sha256Digest> = self.packs().wanted.iter().copied().collect();
        for digest in wanted {
            self.upload(digest);
            if self.uploads.len() >= PARALLEL {
                self.finish_upload().await?;
            }
        }
        while !self.uploads.is_empty() {
            self.finish_upload().await?;
        }
        Ok(())
    }

    async fn finish_upload(&mut self) -> Result<(), CacheError> {
        match self.uploads.join_next().await {
            Some(done) => Ok(done??),
            None => Ok(()),
        }
    }

    fn close_pack(&mut self) -> Result<(), CacheError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (_, digest) = pack::write(&self.dir, &self.pending).map_err(disk("write a pack in", &self.dir))?;
        self.add_pack(digest, true)?;
        self.pending.clear();
        self.pending_bytes = 0;
        self.packs().wanted.insert(digest);
        while let Some(done) = self.uploads.try_join_next() {
            done??;
        }
        // Where preparing outruns the uploads, `flush` does the rest.
        if self.uploads.len() < PARALLEL && tokio::runtime::Handle::try_current().is_ok() {
            self.upload(digest);
        }
        Ok(())
    }

    /// Starts an upload unless the mirror has the pack.
    fn upload(&mut self, digest: Sha256Digest) {
        let Some(mirror) = self.mirror.clone() else { return };
        if self.mirrored.insert(digest) {
            let name = pack::name_of(&digest);
            let path = self.dir.join(&name);
            self.uploads.spawn(async move { mirror.put_file(&name, &path).await });
        }
    }

    /// Downloads the mirror's packs that are not `local`; returns the new ones.
    async fn fetch(&mut self, local: &BTreeSet<Sha256Digest>) -> Result<Vec<Sha256Digest>, CacheError> {
        let Some(mirror) = self.mirror.clone() else { return Ok(Vec::new()) };
        let remote: Vec<Sha256Digest> = mirror.list("").await?.iter().filter_map(|object| pack::digest_of_name(&object.key)).collect();
        self.mirrored.extend(remote.iter().filter(|digest| local.contains(*digest)));
        let fetches = remote.into_iter().filter(|digest| !local.contains(digest)).map(|digest| {
            let name = pack::name_of(&digest);
            let (mirror, path) = (mirror.clone(), self.dir.join(&name));
            async move { (digest, mirror.download_verified(&name, &path, Some(digest), &NoProgress).await) }
        });
        let results: Vec<(Sha256Digest, Result<(), StoreError>)> = futures::stream::iter(fetches).buffer_unordered(PARALLEL).collect().await;
        let mut new = Vec::new();
        for (digest, result) in results {
            match result {
                Ok(()) => {
                    self.mirrored.insert(digest);
                    new.push(digest);
                }
                Err(error) if matches!(error.kind(), StoreErrorKind::Corrupt | StoreErrorKind::NotFound) => {
                    tracing::warn!(object = %mirror.uri_of(&pack::name_of(&digest)), error = %error, "a damaged pack in the mirror is left out; its entries are made again");
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(new)
    }

    fn add_pack(&self, digest: Sha256Digest, verified: bool) -> Result<(), CacheError> {
        let path = self.dir.join(pack::name_of(&digest));
        match Pack::open(&path, digest, verified) {
            Ok(Some(pack)) => self.packs().add(Arc::new(pack)),
            // Whole, and no pack: somebody else's file that happens to be named by its digest.
            Ok(None) if finetune_common::digest::sha256_file(&path).is_ok_and(|found| found == digest) => {}
            Ok(None) => {
                tracing::warn!(file = %path.display(), "a damaged pack of prepared data is dropped; its entries are made again");
                let _gone_already_is_fine = std::fs::remove_file(&path);
            }
            // Another process may have dropped it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(disk("open", &path)(source)),
        }
        Ok(())
    }

    fn packs(&self) -> MutexGuard<'_, Packs> {
        self.packs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn disk(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CacheError {
    let path = path.to_owned();
    move |source| CacheError::Disk { operation, path, source }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
