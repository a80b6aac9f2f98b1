//! What the hub's own tools have downloaded: `models--OWNER--NAME/snapshots/COMMIT/PATH`, links to the files themselves.
//!
//! A file of the commit is used where it lies: a link to it takes the place of a download, after the same check.

use std::path::{Path, PathBuf};

use super::digests::Remembered;
use super::select::RemoteFile;
use crate::error::{Result, StoreError};
use finetune_common::digest;

/// Puts a link at `dest` to the copy of `file` in the cache folder of the hub's own tools, if there is a good one.
///
/// # Errors
/// Those of this machine's disk.
pub(super) async fn link(snapshot: &Path, file: &RemoteFile, dest: &Path, digests: &Remembered) -> Result<bool> {
    let Ok(found) = std::fs::canonicalize(snapshot.join(&file.path)) else { return Ok(false) };
    if !std::fs::metadata(&found).is_ok_and(|metadata| metadata.is_file() && metadata.len() == file.size) {
        return Ok(false);
    }
    if let Some(want) = file.sha256.as_deref().and_then(digest::from_text)
        && digests.of(&found).await? != want
    {
        tracing::warn!(path = %found.display(), "the hub's own cache holds a damaged copy: downloading the file");
        return Ok(false);
    }
    if let Some(parent) = dest.parent() {
        std::fs::create_dir_all(parent).map_err(StoreError::local("create the directory", parent))?;
    }
    match std::os::unix::fs::symlink(&found, dest) {
        Ok(()) => {
            tracing::info!(path = %found.display(), "using the file in the hub's own cache");
            Ok(true)
        }
        // Of another process, or a link whose file has gone: a download replaces it.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(StoreError::local("link", dest)(error)),
    }
}

/// The folder of a commit in the cache folder of the hub's own tools.
pub(super) fn snapshot(cache: &Path, repo: &str, revision: &str) -> PathBuf {
    cache.join(format!("models--{}", repo.replace('/', "--"))).join("snapshots").join(revision)
}
