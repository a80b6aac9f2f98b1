//! Object stores by URI: `s3://`, `gs://`, `az://`, and directories. Nothing else talks to a bucket.
//!
//! # Guarantees
//! - [`Store::put`], [`Store::put_file`] and [`Store::create`] are atomic: readers see the whole object or none of it.
//! - [`Store::create`] has one winner on every kind of store, directories included.
//! - Requests are retried within [`RetryPolicy`]; what fails after that is classified by [`StoreErrorKind`].
//! - No error, log line or `Debug` text holds a secret of the environment.

mod backend;
pub mod claims;
mod create;
mod download;
mod env;
mod error;
pub mod fault;
mod http;
mod listing;
pub mod manifest;
pub mod model_source;
mod placeholder;
mod progress;
mod retry;
mod upload;
mod uri;

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, TryFutureExt as _, TryStreamExt as _};
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt as _};

pub use env::Environment;
pub use error::{Cause, Result, StoreError, StoreErrorKind};
pub use placeholder::is_placeholder;
pub use progress::{NoProgress, Progress};
pub use retry::RetryPolicy;
pub use uri::{Buckets, Location, Scheme, check_key, same_server};

/// How stores are reached. Credentials come from the environment only.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// Address of the server, for other providers than the scheme's own; `http://` only when written so.
    pub endpoint: Option<String>,
    /// Where a bucket's name goes in the addresses of S3; the path where absent.
    pub addressing_style: Option<AddressingStyle>,
    /// Region of the buckets (S3).
    pub region: Option<String>,
    /// PEM file of certificate authorities, in addition to the system's.
    pub ca_bundle: Option<PathBuf>,
    /// Directories that stand in for buckets.
    pub buckets: Buckets,
    /// The variables that credentials and settings come from; the process's own by default.
    pub environment: Environment,
    /// Bounds of retrying.
    pub retry: RetryPolicy,
}

/// Where the bucket's name goes in the addresses of an S3 server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressingStyle {
    /// `ENDPOINT/BUCKET/KEY`.
    Path,
    /// `BUCKET.ENDPOINT/KEY`; the endpoint is written without the bucket's name.
    VirtualHost,
}

/// What a store knows about an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Key, relative to the store's prefix.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
    /// Changes whenever the content does.
    pub etag: Option<String>,
}

/// Outcome of [`Store::create`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Created {
    /// The object did not exist and now holds the caller's bytes.
    Yes,
    /// The object exists and was left alone.
    AlreadyExists,
}

/// A URI prefix of an object store, or a directory. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    connection: Arc<Connection>,
    /// Key prefix inside the bucket, or inside the directory.
    prefix: String,
    uri: String,
}

/// What the clones and children of one store share.
struct Connection {
    target: Target,
    secrets: env::Secrets,
    retry: RetryPolicy,
}

enum Target {
    Bucket(Arc<dyn ObjectStore>),
    /// A directory is opened by the first access that finds it; only writing makes it.
    Directory {
        root: PathBuf,
        opened: OnceLock<Arc<dyn ObjectStore>>,
    },
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.uri).finish()
    }
}

impl Store {
    /// Opens `uri` (a prefix; a trailing `/` is implied). Makes no request: wrong credentials show at the first access.
    ///
    /// # Errors
    /// [`StoreErrorKind::InvalidLocation`] for a URI, endpoint or setting that cannot be used.
    pub fn open(uri: &str, options: &StoreOptions) -> Result<Self> {
        let (target, prefix, uri) = match Location::parse(uri)? {
            Location::Directory(root) => {
                let uri = format!("{}/", root.display()).replace("//", "/");
                (Target::Directory { root, opened: OnceLock::new() }, String::new(), uri)
            }
            Location::Bucket { scheme, bucket, prefix } => {
                let uri = format!("{}://{bucket}/{prefix}{}", scheme.as_str(), if prefix.is_empty() { "" } else { "/" });
                let target = match options.buckets.directory(scheme, &bucket) {
                    Some(root) => Target::Directory { root: root.to_path_buf(), opened: OnceLock::new() },
                    None => Target::Bucket(backend::connect(scheme, &bucket, options)?),
                };
                (target, prefix, uri)
            }
        };
        let connection = Connection { target, secrets: options.environment.secrets(), retry: options.retry.clone() };
        Ok(Self { connection: Arc::new(connection), prefix, uri })
    }

    /// The URI of this prefix, with a trailing `/`.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The URI of `key` in this store.
    pub fn uri_of(&self, key: &str) -> String {
        format!("{}{key}", self.uri)
    }

    /// The prefix `prefix` below this one.
    ///
    /// # Errors
    /// [`StoreError::InvalidKey`] when `prefix` is not a clean relative path (one trailing `/` is fine).
    pub fn child(&self, prefix: &str) -> Result<Self> {
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        check_key(prefix)?;
        let joined = if self.prefix.is_empty() { prefix.to_owned() } else { format!("{}/{prefix}", self.prefix) };
        Ok(Self { connection: Arc::clone(&self.connection), prefix: joined, uri: format!("{}{prefix}/", self.uri) })
    }

    /// The directory behind this store, when it is one (or stands in for a bucket). It need not exist yet.
    pub fn local_directory(&self) -> Option<PathBuf> {
        match &self.connection.target {
            Target::Directory { root, .. } => Some(root.join(&self.prefix)),
            Target::Bucket(_) => None,
        }
    }

    /// Reads an object whole.
    ///
    /// # Errors
    /// [`StoreErrorKind::NotFound`] when there is none, and the other kinds of [`StoreErrorKind`].
    pub async fn get(&self, key: &str) -> Result<Bytes> {
        self.get_limited(key, u64::MAX).await
    }

    /// Reads an object whole if it has at most `limit` bytes: for everything whose size others decide.
    ///
    /// # Errors
    /// As [`Store::get`]; [`StoreError::Corrupt`] when it is larger.
    pub async fn get_limited(&self, key: &str, limit: u64) -> Result<Bytes> {
        let (backend, path) = (self.backend()?, self.path(key)?);
        let read = || {
            let read = async {
                let result = backend.get_opts(&path, GetOptions::default()).await?;
                let size = result.meta.size;
                Ok(if size > limit { Err(size) } else { Ok(result.bytes().await?) })
            };
            read.boxed()
        };
        match self.with_whole_bodies(read).await.map_err(|error| self.failed(&error, "read", key))? {
            Ok(data) => Ok(data),
            Err(size) => Err(StoreError::corrupt(self.uri_of(key), format!("{size} bytes; at most {limit} are accepted"))),
        }
    }

    /// Reads `range` of an object; a range that reaches beyond the end is cut there.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let (backend, path) = (self.backend()?, self.path(key)?);
        let options = GetOptions { range: Some(range.into()), ..GetOptions::default() };
        let read = || async { backend.get_opts(&path, options.clone()).await?.bytes().await }.boxed();
        self.with_whole_bodies(read).await.map_err(|error| self.failed(&error, "read", key))
    }

    /// Size and etag of an object, or `None` when there is none.
    ///
    /// # Errors
    /// All kinds but [`StoreErrorKind::NotFound`].
    pub async fn head(&self, key: &str) -> Result<Option<ObjectInfo>> {
        let path = self.path(key)?;
        let look_up = async |backend: &Arc<dyn ObjectStore>| match backend.head(&path).await {
            // An answer to HEAD has no body that could say why.
            Err(error) if backend::is_unexplained(&error) => {
                let options = GetOptions { range: Some((0..1).into()), ..GetOptions::default() };
                backend.get_opts(&path, options).await.map(|found| found.meta)
            }
            result => result,
        };
        let result = match self.backend() {
            Ok(backend) => look_up(backend).await.map_err(|error| self.failed(&error, "look up", key)),
            Err(error) => Err(error),
        };
        match result {
            Ok(meta) => Ok(Some(ObjectInfo { key: key.to_owned(), size: meta.size, etag: meta.e_tag })),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All objects below the folder `prefix` (`""` for everything), sorted by key; none where nothing exists.
    ///
    /// # Errors
    /// [`StoreErrorKind::NotFound`] for a bucket that does not exist.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        self.list_from(prefix, None).await
    }

    /// [`Store::list`], without keys up to and including `after`.
    async fn list_from(&self, prefix: &str, after: Option<&str>) -> Result<Vec<ObjectInfo>> {
        let folder = prefix.strip_suffix('/').unwrap_or(prefix);
        let path =
            if folder.is_empty() { ObjectPath::parse(&self.prefix).map_err(|error| self.failed(&error.into(), "list", prefix))? } else { self.path(folder)? };
        let backend = match self.backend() {
            Ok(backend) => backend,
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let after = after.map(|after| self.path(after)).transpose()?;
        let read = || {
            let stream = match &after {
                Some(after) => backend.list_with_offset(Some(&path), after),
                None => backend.list(Some(&path)),
            };
            // A server whose pages come round again would be read for ever.
            let each_once = |(mut found, mut keys): (Vec<ObjectMeta>, HashSet<ObjectPath>), meta: ObjectMeta| {
                let again = !keys.insert(meta.location.clone());
                found.push(meta);
                std::future::ready(if again { Err(backend::endless_listing()) } else { Ok((found, keys)) })
            };
            stream.try_fold(Default::default(), each_once).map_ok(|(found, _)| found).boxed()
        };
        let found = self.with_whole_bodies(read).await.map_err(|error| self.failed(&error, "list", prefix))?;
        let skip = if self.prefix.is_empty() { 0 } else { self.prefix.len() + 1 };
        let mut objects: Vec<ObjectInfo> = found
            .into_iter()
            .filter_map(|meta| {
                let key = meta.location.as_ref().get(skip..).filter(|key| !key.is_empty())?.to_owned();
                Some(ObjectInfo { key, size: meta.size, etag: meta.e_tag })
            })
            .collect();
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(without_folder_markers(objects))
    }

    /// Writes an object, replacing what was there.
    ///
    /// # Errors
    /// See [`StoreErrorKind`].
    pub async fn put(&self, key: &str, data: impl Into<Bytes>) -> Result<()> {
        upload::put(self, key, upload::Source::Memory(data.into())).await
    }

    /// Writes a file of this machine as an object, in parts when it is large, with at most four parts in memory.
    ///
    /// # Errors
    /// See [`StoreErrorKind`]; [`StoreErrorKind::LocalDisk`] when the file cannot be read or changes its size meanwhile.
    pub async fn put_file(&self, key: &str, file: &Path) -> Result<()> {
        upload::put(self, key, upload::Source::open(file)?).await
    }

    /// Removes an object; one that does not exist is fine.
    ///
    /// # Errors
    /// See [`StoreErrorKind`].
    pub async fn delete(&self, key: &str) -> Result<()> {
        let path = self.path(key)?;
        let result = match self.backend() {
            Ok(backend) => backend.delete(&path).await.map_err(|error| self.failed(&error, "delete", key)),
            Err(error) => Err(error),
        };
        match result {
            Err(error) if error.is_not_found() => Ok(()),
            result => result,
        }
    }

    /// Downloads an object to the file `dest`, which appears when it is complete. A download that was cut short, also by the end of
    /// the process, goes on where it stopped, unless the object has changed.
    ///
    /// # Errors
    /// See [`StoreErrorKind`].
    pub async fn download(&self, key: &str, dest: &Path, progress: &dyn Progress) -> Result<()> {
        self.download_verified(key, dest, None, progress).await
    }

    /// [`Store::download`], and the content must have the SHA-256 digest `sha256`.
    ///
    /// # Errors
    /// As [`Store::download`]; [`StoreError::Corrupt`] when the digest differs.
    pub async fn download_verified(&self, key: &str, dest: &Path, sha256: Option<[u8; 32]>, progress: &dyn Progress) -> Result<()> {
        let remote = download::StoreObject { store: self, key };
        download::fetch(&remote, dest, sha256, &self.connection.retry, progress).await
    }

    /// Downloads `keys` into `directory`, each under its key, `parallel` at a time. What was complete before stays complete
    /// when another download fails.
    ///
    /// # Errors
    /// The first failure.
    pub async fn download_all(&self, keys: &[String], directory: &Path, parallel: usize, progress: &dyn Progress) -> Result<()> {
        use futures::StreamExt as _;

        for key in keys {
            check_key(key)?;
        }
        // Collected, for a stream with a closure in it could not be spawned.
        let downloads: Vec<_> = keys.iter().map(|key| async move { self.download(key, &directory.join(key), progress).await }).collect();
        futures::stream::iter(downloads).buffer_unordered(parallel.max(1)).try_collect().await
    }

    /// The object path of `key`.
    fn path(&self, key: &str) -> Result<ObjectPath> {
        check_key(key)?;
        let full = if self.prefix.is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) };
        ObjectPath::parse(full).map_err(|error| self.failed(&error.into(), "address", key))
    }

    fn backend(&self) -> Result<&Arc<dyn ObjectStore>> {
        match &self.connection.target {
            Target::Bucket(store) => Ok(store),
            Target::Directory { root, opened } => match opened.get() {
                Some(store) => Ok(store),
                None => Ok(opened.get_or_init({
                    let store = backend::directory(root)?;
                    || store
                })),
            },
        }
    }

    fn backend_for_writing(&self) -> Result<&Arc<dyn ObjectStore>> {
        if let Target::Directory { root, opened } = &self.connection.target
            && opened.get().is_none()
        {
            std::fs::create_dir_all(root).map_err(StoreError::local("create the directory", root))?;
        }
        self.backend()
    }

    /// Repeats `read` while the body of its answer breaks off; other failures have been retried below.
    async fn with_whole_bodies<'a, T>(&self, read: impl Fn() -> BoxFuture<'a, object_store::Result<T>>) -> object_store::Result<T> {
        let mut attempts = retry::Attempts::new(&self.connection.retry);
        loop {
            match read().await {
                Err(error) if backend::is_cut_body(&error) => {
                    let Some(delay) = attempts.next_delay(None) else { return Err(error) };
                    tracing::warn!(prefix = self.uri, attempt = attempts.made(), "an answer broke off; reading again");
                    tokio::time::sleep(delay).await;
                }
                result => return result,
            }
        }
    }

    fn failed(&self, error: &object_store::Error, operation: &'static str, key: &str) -> StoreError {
        backend::classify(error, operation, &self.uri_of(key), &self.connection.secrets)
    }
}

/// Drops the empty objects that consoles make for folders (`sub/`, which lists as `sub`), given all objects sorted by key.
fn without_folder_markers(objects: Vec<ObjectInfo>) -> Vec<ObjectInfo> {
    let is_folder = |marker: &ObjectInfo| {
        let below = format!("{}/", marker.key);
        let at = objects.partition_point(|object| object.key < below);
        marker.size == 0 && objects.get(at).is_some_and(|object| object.key.starts_with(&below))
    };
    let keep: Vec<bool> = objects.iter().map(|object| !is_folder(object)).collect();
    objects.into_iter().zip(keep).filter_map(|(object, keep)| keep.then_some(object)).collect()
}

#[cfg(test)]
mod tests;
