//! Publishing several objects as one: files first, then a manifest that names each with size and digest, last.
//!
//! # Guarantees
//! Whoever finds a manifest that verifies has every file it names, byte for byte. A publication that was cut short has no
//! manifest and does not exist for readers.

use std::collections::BTreeSet;
use std::path::PathBuf;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::claims::Claim;
use super::error::{Result, StoreError, StoreErrorKind};
use super::{Store, check_key};
use finetune_common::digest;

/// Name of the manifest in the folder that it describes.
pub const FILE_NAME: &str = "manifest.json";
/// Largest manifest that is read.
const MAX_BYTES: u64 = 16 << 20;
/// Transfers at a time.
const PARALLEL: usize = 4;

/// One file of a publication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entry {
    /// Key relative to the manifest's folder.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
    /// `sha256:<hex>` of the content.
    pub sha256: String,
}

/// What a folder holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format: 1.
    pub version: u32,
    /// The files, sorted by key.
    pub files: Vec<Entry>,
    /// Whatever the publisher wants to say about them.
    pub metadata: Value,
}

/// The manifest as it is stored, with a digest of itself.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Envelope {
    /// `sha256:<hex>` of `manifest` as compact JSON with sorted keys.
    sha256: String,
    manifest: Value,
}

/// Content to publish.
#[derive(Debug, Clone)]
pub enum Content {
    /// Bytes in memory.
    Bytes(Bytes),
    /// A file of this machine.
    File(PathBuf),
}

impl Manifest {
    /// The entry of `key`.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.files.iter().find(|entry| entry.key == key)
    }

    /// The manifest's own digest, `sha256:<hex>`; two manifests with the same digest name the same content.
    pub fn digest(&self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        digest::to_text(&digest::sha256(value.to_string().as_bytes()))
    }

    fn to_json(&self) -> Vec<u8> {
        let manifest = serde_json::to_value(self).unwrap_or_default();
        let envelope = Envelope { sha256: self.digest(), manifest };
        serde_json::to_vec_pretty(&envelope).unwrap_or_default()
    }

    fn from_json(json: &[u8], location: &str) -> Result<Self> {
        let corrupt = |problem: String| StoreError::corrupt(location, problem);
        let envelope: Envelope = serde_json::from_slice(json).map_err(|error| corrupt(format!("not a manifest: {error}")))?;
        let manifest: Self = serde_json::from_value(envelope.manifest).map_err(|error| corrupt(format!("not a manifest: {error}")))?;
        if manifest.digest() != envelope.sha256 {
            return Err(corrupt("its digest does not match its content".to_owned()));
        }
        if manifest.version != 1 {
            return Err(corrupt(format!("manifest version {} is not known to this program", manifest.version)));
        }
        let mut keys = BTreeSet::new();
        for entry in &manifest.files {
            check_key(&entry.key)?;
            if digest::from_text(&entry.sha256).is_none() || !keys.insert(&entry.key) {
                return Err(corrupt(format!("the entry of {:?} is malformed", entry.key)));
            }
        }
        Ok(manifest)
    }
}

/// Writes `files` into `folder` and then the manifest. With a claim, it must still be the newest when everything but the manifest
/// is written.
///
/// # Errors
/// Those of writing; [`StoreError::Superseded`] when a newer attempt has taken over, and then there is no manifest.
pub async fn publish(folder: &Store, files: Vec<(String, Content)>, metadata: Value, claim: Option<&Claim>) -> Result<Manifest> {
    let uploads: Vec<_> = files.into_iter().map(|(key, content)| upload(folder, key, content)).collect();
    let mut entries: Vec<Entry> = futures::stream::iter(uploads).buffer_unordered(PARALLEL).try_collect().await?;
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    let manifest = Manifest { version: 1, files: entries, metadata };
    if let Some(claim) = claim {
        claim.check().await?;
    }
    super::fault::pause("before-manifest").await;
    folder.put(FILE_NAME, manifest.to_json()).await?;
    Ok(manifest)
}

async fn upload(folder: &Store, key: String, content: Content) -> Result<Entry> {
    let (size, digest) = match content {
        Content::Bytes(data) => {
            let described = (data.len() as u64, digest::sha256(&data));
            folder.put(&key, data).await?;
            described
        }
        Content::File(path) => {
            let reading = path.clone();
            let described = tokio::task::spawn_blocking(move || Ok((std::fs::metadata(&reading)?.len(), digest::sha256_file(&reading)?)));
            let described = described.await.map_err(std::io::Error::other).and_then(|result| result).map_err(StoreError::local("read", &path))?;
            folder.put_file(&key, &path).await?;
            described
        }
    };
    Ok(Entry { key, size, sha256: digest::to_text(&digest) })
}

/// Reads the manifest of `folder`, or `None` when it has none.
///
/// # Errors
/// Those of reading; [`StoreError::Corrupt`] when it is damaged.
pub async fn read(folder: &Store) -> Result<Option<Manifest>> {
    match folder.get_limited(FILE_NAME, MAX_BYTES).await {
        Ok(json) => Manifest::from_json(&json, &folder.uri_of(FILE_NAME)).map(Some),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads one file of a manifest and verifies it.
///
/// # Errors
/// Those of reading; [`StoreError::Corrupt`] when size or digest differ.
pub async fn read_file(folder: &Store, entry: &Entry) -> Result<Bytes> {
    let data = folder.get_limited(&entry.key, entry.size).await?;
    let found = digest::to_text(&digest::sha256(&data));
    if data.len() as u64 != entry.size || found != entry.sha256 {
        let problem = format!("{} bytes with {found}; its manifest says {} bytes with {}", data.len(), entry.size, entry.sha256);
        return Err(StoreError::corrupt(folder.uri_of(&entry.key), problem));
    }
    Ok(data)
}

/// Reads every file of a manifest, in the manifest's order, and verifies each. All of them are in memory at once: for
/// checkpoints, not for models.
///
/// # Errors
/// The first failure; a missing file is [`StoreErrorKind::NotFound`].
pub async fn read_files(folder: &Store, manifest: &Manifest) -> Result<Vec<(String, Bytes)>> {
    // Collected, for a stream with a closure in it could not be spawned.
    let reads: Vec<_> = manifest.files.iter().map(|entry| async move { Ok((entry.key.clone(), read_file(folder, entry).await?)) }).collect();
    futures::stream::iter(reads).buffered(PARALLEL).try_collect().await
}

/// A folder whose manifest and files have been verified.
#[derive(Debug, Clone)]
pub struct Verified {
    /// The folder.
    pub folder: Store,
    /// Its manifest.
    pub manifest: Manifest,
    /// Its files in the manifest's order.
    pub files: Vec<(String, Bytes)>,
}

/// The first of `folders` (relative to `store`, best first) whose manifest exists and whose files all verify. Damaged and incomplete
/// ones are passed over with a warning.
///
/// # Errors
/// Permission and availability: they say nothing about what is there, so nothing is passed over because of them.
pub async fn first_that_verifies<S: AsRef<str>>(store: &Store, folders: &[S]) -> Result<Option<Verified>> {
    for folder in folders {
        let folder = store.child(folder.as_ref())?;
        let outcome = async {
            let Some(manifest) = read(&folder).await? else { return Ok(None) };
            let files = read_files(&folder, &manifest).await?;
            Ok(Some(Verified { folder: folder.clone(), manifest, files }))
        };
        match outcome.await {
            Ok(Some(verified)) => return Ok(Some(verified)),
            Ok(None) => tracing::debug!(folder = folder.uri(), "passed over: it has no manifest"),
            Err(error) if matches!(StoreError::kind(&error), StoreErrorKind::Corrupt | StoreErrorKind::NotFound) => {
                tracing::warn!(folder = folder.uri(), error = %super::http::chain(&error), "passed over: it does not verify");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StoreOptions;

    fn files() -> Vec<(String, Content)> {
        vec![("b/two.bin".into(), Content::Bytes(Bytes::from_static(b"two"))), ("a.bin".into(), Content::Bytes(Bytes::from_static(b"one")))]
    }

    async fn published(dir: &std::path::Path, metadata: Value) -> Store {
        let store = Store::open(dir.to_str().unwrap(), &StoreOptions::default()).unwrap();
        publish(&store.child("x").unwrap(), files(), metadata, None).await.unwrap();
        store
    }

    #[tokio::test]
    async fn a_publication_round_trips_with_its_metadata() {
        let dir = tempfile::tempdir().unwrap();
        let metadata = serde_json::json!({"step": 7, "loss": 0.1, "nested": {"z": 1, "a": [1.5e-300, u64::MAX]}});
        let store = published(dir.path(), metadata.clone()).await;
        let verified = first_that_verifies(&store, &["none", "x"]).await.unwrap().unwrap();
        assert_eq!(verified.manifest.metadata, metadata);
        assert_eq!(verified.files, [("a.bin".to_owned(), Bytes::from_static(b"one")), ("b/two.bin".to_owned(), Bytes::from_static(b"two"))]);
    }

    #[tokio::test]
    async fn any_change_of_a_file_or_of_the_manifest_is_noticed() {
        for (name, from, to) in [("a.bin", "one", "One"), ("a.bin", "one", "onee"), ("manifest.json", "\"step\": 7", "\"step\": 8"), ("manifest.json", "}", "")]
        {
            let dir = tempfile::tempdir().unwrap();
            let store = published(dir.path(), serde_json::json!({"step": 7})).await;
            let path = dir.path().join("x").join(name);
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
            assert!(first_that_verifies(&store, &["x"]).await.unwrap().is_none(), "{name}: {to}");
        }
        let dir = tempfile::tempdir().unwrap();
        let store = published(dir.path(), Value::Null).await;
        store.delete("x/b/two.bin").await.unwrap();
        assert!(first_that_verifies(&store, &["x"]).await.unwrap().is_none());
    }

    #[test]
    fn keys_that_leave_the_folder_are_refused() {
        let entry = Entry { key: "../x".into(), size: 1, sha256: digest::to_text(&digest::sha256(b"x")) };
        let manifest = Manifest { version: 1, files: vec![entry], metadata: Value::Null };
        assert!(matches!(Manifest::from_json(&manifest.to_json(), "here"), Err(StoreError::InvalidKey { .. })));
    }

    #[tokio::test]
    async fn a_superseded_attempt_writes_no_manifest() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().to_str().unwrap(), &StoreOptions::default()).unwrap();
        let old = Claim::acquire(&store, "old").await.unwrap();
        let new = Claim::acquire(&store, "new").await.unwrap();
        let error = publish(&store.child("e1").unwrap(), files(), Value::Null, Some(&old)).await.unwrap_err();
        assert!(matches!(error, StoreError::Superseded { epoch: 1, newest: 2, .. }), "{error}");
        assert!(read(&store.child("e1").unwrap()).await.unwrap().is_none());
        publish(&store.child("e2").unwrap(), files(), Value::Null, Some(&new)).await.unwrap();
    }
}
