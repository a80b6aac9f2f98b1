//! Downloads to files: resumable, verified, complete or absent.
//!
//! Bytes go to `<name>.part`; `<name>.part.json` beside it says which object they are of. The file takes its name when it is
//! complete, verified and on disk. The part file is locked meanwhile, so that processes that share a folder (a cache volume) wait
//! for each other instead of mixing their bytes.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use object_store::{GetOptions, GetRange};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

use super::error::{Result, StoreError, StoreErrorKind};
use super::progress::Progress;
use super::retry::{Attempts, RetryPolicy};
use super::{Store, backend};

/// Which version of which object a partial file is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Where it comes from.
    pub location: String,
    /// Changes whenever the content does. Without one nothing is resumed.
    pub version: Option<String>,
    /// Its size in bytes.
    pub size: u64,
}

/// Bytes of a remote object, from `start` on.
pub(super) struct Opened {
    pub start: u64,
    pub stream: BoxStream<'static, Result<Bytes>>,
}

/// Something that can be downloaded.
pub(super) trait Remote: Send + Sync {
    /// Name for progress reports.
    fn name(&self) -> &str;
    /// What it is now.
    fn identity(&self) -> BoxFuture<'_, Result<Identity>>;
    /// Its bytes from `offset` on, or from an earlier start when the server knows no ranges; [`StoreErrorKind::Corrupt`] when it
    /// is no longer `identity`.
    fn open<'a>(&'a self, identity: &'a Identity, offset: u64) -> BoxFuture<'a, Result<Opened>>;
}

/// An object of a store.
pub(super) struct StoreObject<'a> {
    pub store: &'a Store,
    pub key: &'a str,
}

impl Remote for StoreObject<'_> {
    fn name(&self) -> &str {
        self.key
    }

    fn identity(&self) -> BoxFuture<'_, Result<Identity>> {
        Box::pin(async move {
            let info = self.store.head(self.key).await?.ok_or_else(|| {
                let source = super::Cause("no such object".to_owned());
                StoreError::NotFound { operation: "download", location: self.store.uri_of(self.key), source }
            })?;
            Ok(Identity { location: self.store.uri_of(self.key), version: info.etag, size: info.size })
        })
    }

    fn open<'a>(&'a self, identity: &'a Identity, offset: u64) -> BoxFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let range = (offset > 0).then_some(GetRange::Offset(offset));
            let options = GetOptions { range, if_match: identity.version.clone(), ..GetOptions::default() };
            let failed = |error: &object_store::Error| {
                if backend::is_changed(error) {
                    StoreError::corrupt(&identity.location, "changed while it was downloaded")
                } else {
                    self.store.failed(error, "download", self.key)
                }
            };
            let result = self.store.backend()?.get_opts(&self.store.path(self.key)?, options).await.map_err(|error| failed(&error))?;
            let (connection, location) = (self.store.connection.clone(), identity.location.clone());
            let stream = result.into_stream().map(move |piece| piece.map_err(|error| backend::classify(&error, "download", &location, &connection.secrets)));
            Ok(Opened { start: offset, stream: stream.boxed() })
        })
    }
}

/// Downloads `remote` to `dest`. With `sha256` the content must have that digest.
pub(super) async fn fetch(remote: &dyn Remote, dest: &Path, sha256: Option<[u8; 32]>, policy: &RetryPolicy, progress: &dyn Progress) -> Result<()> {
    let part = with_suffix(dest, ".part");
    let notes = with_suffix(dest, ".part.json");
    if let Some(parent) = dest.parent() {
        tokio::fs::create_dir_all(parent).await.map_err(StoreError::local("create the directory", parent))?;
    }
    let Some(lock) = lock_part(&part, dest).await? else { return Ok(()) };
    let mut attempts = Attempts::new(policy);
    loop {
        let identity = remote.identity().await?;
        let resumable = identity.version.is_some() && read_notes(&notes).as_ref() == Some(&identity);
        let mut have = lock.metadata().map_err(StoreError::local("read the size of", &part))?.len();
        if !resumable || have > identity.size {
            lock.set_len(0).map_err(StoreError::local("empty", &part))?;
            have = 0;
            write_notes(&notes, &identity)?;
        }
        let resumed = have > 0;
        progress.start(remote.name(), identity.size, have);
        let result = transfer(remote, &identity, &lock, &part, have, policy, progress).await;
        let problem = match result {
            Ok(digest) if sha256.is_none_or(|want| want == digest) => break,
            Ok(digest) => {
                let want = hex::encode(sha256.unwrap_or_default());
                StoreError::corrupt(&identity.location, format!("its SHA-256 is {}, not {want}", hex::encode(digest)))
            }
            Err(error) => error,
        };
        if problem.kind() != StoreErrorKind::Corrupt {
            return Err(problem);
        }
        // Another version, or damaged bytes: nothing of them is kept. Bytes of an earlier process get a second chance, and so
        // does an object that was replaced meanwhile; a complete fresh copy with a wrong digest does not.
        lock.set_len(0).map_err(StoreError::local("empty", &part))?;
        let changed = matches!(&problem, StoreError::Corrupt { problem, .. } if problem.starts_with("changed"));
        let Some(delay) = (resumed || changed).then(|| attempts.next_delay(None)).flatten() else {
            remove(&notes)?;
            remove(&part)?;
            return Err(problem);
        };
        tracing::warn!(error = %problem, "starting a download again");
        progress.restart(remote.name());
        tokio::time::sleep(delay).await;
    }
    lock.sync_all().map_err(StoreError::local("flush", &part))?;
    std::fs::rename(&part, dest).map_err(StoreError::local("rename", &part))?;
    remove(&notes)?;
    progress.finish(remote.name());
    Ok(())
}

/// Appends the rest of the object to the part file, which holds `have` bytes, and returns the digest of the whole. Broken answers
/// are continued; every byte that arrives renews the budget for that. Requests without an answer have been retried below.
async fn transfer(
    remote: &dyn Remote,
    identity: &Identity,
    lock: &File,
    path: &Path,
    mut have: u64,
    policy: &RetryPolicy,
    progress: &dyn Progress,
) -> Result<[u8; 32]> {
    let mut hasher = digest_of_start(lock, path, have).await?;
    let mut attempts = Attempts::new(policy);
    while have < identity.size {
        let before = have;
        let result = append(remote, identity, lock, path, &mut have, &mut hasher, progress).await;
        let Err(error) = result else { continue };
        let error = match error {
            Stop::Broken(error) => error,
            Stop::Final(error) => return Err(error),
        };
        if have > before {
            attempts = Attempts::new(policy);
        }
        let Some(delay) = attempts.next_delay(None) else { return Err(error) };
        tracing::warn!(name = remote.name(), have, size = identity.size, error = %super::http::chain(&error), "resuming a download");
        tokio::time::sleep(delay).await;
    }
    Ok(hasher.finalize().into())
}

/// Why [`append`] ended early.
enum Stop {
    /// The answer broke off: another request may bring the rest.
    Broken(StoreError),
    /// Another request would end in the same way, or has been tried.
    Final(StoreError),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Final(error)
    }
}

/// One request's worth of [`transfer`]. `Ok` when the object is complete.
async fn append(
    remote: &dyn Remote,
    identity: &Identity,
    lock: &File,
    path: &Path,
    have: &mut u64,
    hasher: &mut Sha256,
    progress: &dyn Progress,
) -> Result<(), Stop> {
    let mut opened = remote.open(identity, *have).await?;
    if opened.start != *have {
        // The server starts at the beginning.
        progress.restart(remote.name());
        *hasher = Sha256::new();
        *have = 0;
        lock.set_len(0).map_err(StoreError::local("empty", path))?;
    }
    let mut handle = lock.try_clone().map_err(StoreError::local("open", path))?;
    handle.seek(SeekFrom::Start(*have)).map_err(StoreError::local("seek in", path))?;
    let mut file = tokio::io::BufWriter::with_capacity(1 << 20, tokio::fs::File::from_std(handle));
    let mut failure = None;
    while let Some(piece) = opened.stream.next().await {
        let piece = match piece {
            Ok(piece) => piece,
            Err(error) => {
                failure = Some(Stop::Broken(error));
                break;
            }
        };
        if piece.len() as u64 > identity.size - *have {
            let problem = format!("more than the {} bytes announced", identity.size);
            failure = Some(Stop::Final(StoreError::corrupt(&identity.location, problem)));
            break;
        }
        file.write_all(&piece).await.map_err(StoreError::local("write", path))?;
        hasher.update(&piece);
        *have += piece.len() as u64;
        progress.advance(remote.name(), piece.len() as u64);
    }
    // What has arrived counts, also when the rest does not.
    file.flush().await.map_err(StoreError::local("write", path))?;
    match failure {
        Some(stop) => Err(stop),
        None if *have == identity.size => Ok(()),
        None => {
            let source = super::Cause(format!("the answer ended after {} of {} bytes", *have, identity.size));
            Err(Stop::Broken(StoreError::Unavailable { operation: "download", location: identity.location.clone(), source }))
        }
    }
}

/// Digest state after the first `length` bytes of the part file.
async fn digest_of_start(lock: &File, path: &Path, length: u64) -> Result<Sha256> {
    let mut handle = lock.try_clone().map_err(StoreError::local("open", path))?;
    let task = tokio::task::spawn_blocking(move || {
        let mut hasher = Sha256::new();
        handle.seek(SeekFrom::Start(0))?;
        let mut rest = handle.take(length);
        let mut buffer = vec![0_u8; 1 << 20];
        loop {
            let n = rest.read(&mut buffer)?;
            if n == 0 {
                return Ok(hasher);
            }
            hasher.update(&buffer[..n]);
        }
    });
    task.await.map_err(std::io::Error::other).and_then(|result| result).map_err(StoreError::local("read", path))
}

/// Opens and locks the part file. `None` when another process held the lock and has completed `dest` meanwhile.
async fn lock_part(part: &Path, dest: &Path) -> Result<Option<File>> {
    let mut waited = false;
    loop {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(part).map_err(StoreError::local("open", part))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                if !waited {
                    tracing::info!(path = %dest.display(), "waiting for another process that downloads the same file");
                }
                waited = true;
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            // Some network file systems know no locks. Two processes at once would then spoil each other's file, which its digest
            // shows; to refuse such volumes altogether would be worse.
            Err(std::fs::TryLockError::Error(error)) if is_without_locks(&error) => {
                tracing::debug!(path = %part.display(), %error, "downloading without a lock");
            }
            Err(std::fs::TryLockError::Error(error)) => return Err(StoreError::local("lock", part)(error)),
        }
        // The holder before may have renamed this very file to `dest`, or removed it.
        let locked = file.metadata().map_err(StoreError::local("look up", part))?;
        let same = std::fs::metadata(part).is_ok_and(|now| (now.dev(), now.ino()) == (locked.dev(), locked.ino()));
        if waited && dest.exists() {
            if same {
                remove(part)?;
            }
            return Ok(None);
        }
        if same {
            return Ok(Some(file));
        }
    }
}

/// `ENOLCK`, `ENOSYS` and `EOPNOTSUPP`: this file system has no locks.
fn is_without_locks(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::Unsupported || error.raw_os_error() == Some(37)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn read_notes(path: &Path) -> Option<Identity> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn write_notes(path: &Path, identity: &Identity) -> Result<()> {
    let json = serde_json::to_vec(identity).map_err(std::io::Error::other).map_err(StoreError::local("write", path))?;
    std::fs::write(path, json).map_err(StoreError::local("write", path))
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(StoreError::local("remove", path)(error)),
        _ => Ok(()),
    }
}
