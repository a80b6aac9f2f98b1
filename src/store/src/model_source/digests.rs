//! Digests of local files, remembered by path, size and time of change: a model of many gigabytes is read once, not at every start.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::StoreError;
use finetune_common::digest;

/// Digests known from earlier runs and this one.
pub(super) struct Remembered {
    path: PathBuf,
    known: Mutex<BTreeMap<String, String>>,
}

impl Remembered {
    /// Those remembered in `cache`. A damaged or missing record is an empty one.
    pub(super) fn new(cache: &Path) -> Self {
        let path = cache.join("digests.json");
        let known = std::fs::read(&path).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
        Self { path, known: Mutex::new(known) }
    }

    /// SHA-256 of the file.
    pub(super) async fn of(&self, file: &Path) -> Result<[u8; 32], StoreError> {
        let metadata = std::fs::metadata(file).map_err(StoreError::local("read", file))?;
        // The time of the last change of content or attributes cannot be set back by ordinary means.
        let key = format!("{}:{}:{}:{}.{:09}", file.display(), metadata.ino(), metadata.len(), metadata.ctime(), metadata.ctime_nsec());
        if let Some(found) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&key).and_then(|text| digest::from_text(text)) {
            return Ok(found);
        }
        let path = file.to_path_buf();
        let task = tokio::task::spawn_blocking(move || digest::sha256_file(&path));
        let found = task.await.map_err(std::io::Error::other).and_then(|result| result).map_err(StoreError::local("read", file))?;
        self.remember(key, digest::to_text(&found));
        Ok(found)
    }

    /// To remember is a convenience; to fail at it (a read-only cache, say) is none of the caller's business.
    fn remember(&self, key: String, digest: String) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(key, digest);
        let write = || -> std::io::Result<()> {
            let parent = self.path.parent().unwrap_or(Path::new("."));
            std::fs::create_dir_all(parent)?;
            let file = tempfile::NamedTempFile::new_in(parent)?;
            serde_json::to_writer(&file, &*known)?;
            file.persist(&self.path)?;
            Ok(())
        };
        if let Err(error) = write() {
            tracing::debug!(path = %self.path.display(), %error, "digests of local files are not remembered");
        }
    }
}
