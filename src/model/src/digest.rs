//! What a component is: a digest of its files' contents, for cache keys.
//!
//! Two components share a digest only if every file that decides their output is equal, byte for byte: configurations,
//! tokenizer files and weights. Nothing less is sound: a fine-tuned encoder has the same header and size as its base.
//! Contents of 10 GB take about ten seconds to hash, so each file's digest is remembered beside the file's identity (path,
//! size, modification and change time to the nanosecond, inode). A file written to after it was hashed has another change
//! time, which programs cannot set, and is hashed again.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use finetune_common::digest::{Sha256Digest, sha256, sha256_file, sha256_parts};

/// Why a component's digest could not be made.
#[derive(Debug, thiserror::Error)]
#[error("failed to read {path}")]
pub struct DigestError {
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

/// Names of files that do not decide a component's output.
fn is_ignored(name: &str) -> bool {
    name.starts_with('.')
        || Path::new(name).extension().is_some_and(|e| ["md", "bin", "msgpack", "h5", "onnx", "lock"].iter().any(|i| e.eq_ignore_ascii_case(i)))
}

/// Digest of the component folder `dir`: of the names and contents of its files, sorted by name. Sub-folders and files
/// that nothing here reads (hidden, Markdown, pickles) do not count.
///
/// `memory` is a folder where digests of files are remembered between runs; without it every call reads every byte.
///
/// # Errors
/// If the folder or a file cannot be read. A memory that cannot be read or written is only slower.
pub fn component_digest(dir: &Path, memory: Option<&Path>) -> Result<Sha256Digest, DigestError> {
    let failed = |source| DigestError { path: dir.to_owned(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Through links: the hub's cache keeps files as links to blobs.
        if !is_ignored(&name) && std::fs::metadata(entry.path()).is_ok_and(|m| m.is_file()) {
            names.push(name);
        }
    }
    names.sort();
    let digests: Vec<Sha256Digest> = names.par_iter().map(|name| file_digest(&dir.join(name), memory)).collect::<Result<_, _>>()?;
    Ok(sha256_parts(names.iter().zip(&digests).flat_map(|(name, digest)| [name.as_bytes(), &digest[..]])))
}

/// What is remembered of a file.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Remembered {
    identity: Identity,
    sha256: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Identity {
    path: PathBuf,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(path: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let path = path.canonicalize()?;
        let meta = std::fs::metadata(&path)?;
        Ok(Self {
            path,
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            device: meta.dev(),
            inode: meta.ino(),
        })
    }
}

/// Files smaller than this are hashed each time.
const SMALL: u64 = 4 << 20;

fn file_digest(path: &Path, memory: Option<&Path>) -> Result<Sha256Digest, DigestError> {
    let failed = |source| DigestError { path: path.to_owned(), source };
    let before = Identity::of(path).map_err(failed)?;
    let Some(memory) = memory.filter(|_| before.size >= SMALL) else { return sha256_file(path).map_err(failed) };
    let place = memory.join(format!("{}.json", hex::encode(sha256(before.path.as_os_str().as_encoded_bytes()))));
    if let Some(digest) = recall(&place, &before) {
        return Ok(digest);
    }
    tracing::info!(path = %path.display(), bytes = before.size, "hashing weights");
    let digest = sha256_file(path).map_err(failed)?;
    // Changed meanwhile: the digest is of neither state for certain, so it is not remembered.
    if Identity::of(path).map_err(failed)? == before {
        remember(memory, &place, &Remembered { identity: before, sha256: hex::encode(digest) });
    }
    Ok(digest)
}

fn recall(place: &Path, identity: &Identity) -> Option<Sha256Digest> {
    let remembered: Remembered = serde_json::from_slice(&std::fs::read(place).ok()?).ok()?;
    (remembered.identity == *identity).then(|| finetune_common::digest::from_text(&remembered.sha256)).flatten()
}

fn remember(memory: &Path, place: &Path, what: &Remembered) {
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(memory)?;
        let file = tempfile::NamedTempFile::new_in(memory)?;
        serde_json::to_writer(&file, what)?;
        file.persist(place)?;
        Ok(())
    };
    if let Err(error) = write() {
        tracing::debug!(%error, path = %place.display(), "digest not remembered");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_decide_and_memory_never_lies() {
        let root = tempfile::tempdir().unwrap();
        let (dir, memory) = (root.path().join("vae"), root.path().join("memory"));
        std::fs::create_dir(&dir).unwrap();
        let big = vec![7_u8; SMALL as usize + 1];
        std::fs::write(dir.join("config.json"), "{}").unwrap();
        std::fs::write(dir.join("model.safetensors"), &big).unwrap();
        let first = component_digest(&dir, Some(&memory)).unwrap();
        assert_eq!(first, component_digest(&dir, None).unwrap());
        assert_eq!(std::fs::read_dir(&memory).unwrap().count(), 1, "the large file is remembered");
        assert_eq!(first, component_digest(&dir, Some(&memory)).unwrap());
        std::fs::write(dir.join("README.md"), "words").unwrap();
        assert_eq!(first, component_digest(&dir, Some(&memory)).unwrap());

        // Same size, same modification time, other contents.
        let modified = std::fs::metadata(dir.join("model.safetensors")).unwrap().modified().unwrap();
        let mut other = big.clone();
        other[5] = 8;
        std::fs::write(dir.join("model.safetensors"), &other).unwrap();
        std::fs::File::options().write(true).open(dir.join("model.safetensors")).unwrap().set_modified(modified).unwrap();
        let second = component_digest(&dir, Some(&memory)).unwrap();
        assert_ne!(first, second);
        assert_eq!(second, component_digest(&dir, None).unwrap());

        std::fs::write(dir.join("config.json"), "{ }").unwrap();
        assert_ne!(second, component_digest(&dir, Some(&memory)).unwrap());
    }

    #[test]
    fn the_memory_is_used() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("model.safetensors");
        std::fs::write(&path, vec![1_u8; SMALL as usize]).unwrap();
        let memory = root.path().join("memory");
        file_digest(&path, Some(&memory)).unwrap();
        let place = std::fs::read_dir(&memory).unwrap().next().unwrap().unwrap().path();
        let mut remembered: Remembered = serde_json::from_slice(&std::fs::read(&place).unwrap()).unwrap();
        remembered.sha256 = hex::encode([9; 32]);
        std::fs::write(&place, serde_json::to_vec(&remembered).unwrap()).unwrap();
        assert_eq!(file_digest(&path, Some(&memory)).unwrap(), [9; 32]);
    }
}
