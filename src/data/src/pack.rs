//! Pack files: many small tensors in one safetensors file that is named by the digest of its bytes.
//!
//! A tensor is called `<key in hex>/<name>`. A pack never changes, so it may be mapped, copied and uploaded without locks.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use safetensors::{Dtype, SafeTensors, View};

use finetune_common::digest::{Sha256Digest, from_text, sha256, sha256_file};
use finetune_common::mmap::MappedFile;

/// Ending of pack files.
pub(super) const ENDING: &str = ".safetensors";

/// Beginning of files that are being written.
const PARTIAL: &str = ".partial-";

/// Abandoned files are removed after this time.
const PARTIAL_LIFETIME: std::time::Duration = std::time::Duration::from_hours(1);

/// A tensor's values as raw little-endian bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Raw {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: std::sync::Arc<[u8]>,
}

impl View for &Raw {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&*self.bytes).into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The tensors of one key.
pub(super) type Entry = BTreeMap<String, Raw>;

/// Where a tensor lies in a pack.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

/// A pack on disk. Its content counts only after [`Pack::verify`].
#[derive(Debug)]
pub(super) struct Pack {
    pub(super) digest: Sha256Digest,
    pub(super) map: MappedFile,
    pub(super) places: HashMap<Sha256Digest, HashMap<String, Place>>,
    verified: AtomicBool,
}

/// The digest in a pack's file name.
pub(super) fn digest_of_name(name: &str) -> Option<Sha256Digest> {
    let digits = name.strip_suffix(ENDING)?;
    (digits.len() == 64).then(|| from_text(digits)).flatten()
}

/// The file name of the pack with this digest.
pub(super) fn name_of(digest: &Sha256Digest) -> String {
    format!("{}{ENDING}", hex::encode(digest))
}

impl Pack {
    /// Maps a pack and reads its header; `None` if it is no pack.
    pub(super) fn open(path: &Path, digest: Sha256Digest, verified: bool) -> std::io::Result<Option<Self>> {
        let map = MappedFile::open(path)?;
        let Ok((header, metadata)) = SafeTensors::read_metadata(&map) else { return Ok(None) };
        let mut places: HashMap<_, HashMap<_, _>> = HashMap::new();
        for (name, info) in metadata.tensors() {
            let Some((key, name)) = name.split_once('/').and_then(|(key, name)| Some((from_text(key)?, name.to_owned()))) else { return Ok(None) };
            let (start, end) = info.data_offsets;
            let place = Place { dtype: info.dtype, shape: info.shape.clone(), range: 8 + header + start..8 + header + end };
            places.entry(key).or_default().insert(name, place);
        }
        Ok(Some(Self { digest, map, places, verified: AtomicBool::new(verified) }))
    }

    /// Whether the bytes are those that the name promises. Reads the file once.
    pub(super) fn verify(&self) -> bool {
        if !self.verified.load(Ordering::Acquire) {
            if !sha256_file(self.map.path()).is_ok_and(|digest| digest == self.digest) {
                return false;
            }
            self.verified.store(true, Ordering::Release);
        }
        true
    }
}

/// Writes a pack so that it appears whole or not at all. The same entries give the same file.
pub(super) fn write(dir: &Path, entries: &BTreeMap<Sha256Digest, Entry>) -> std::io::Result<(PathBuf, Sha256Digest)> {
    let tensors = entries.iter().flat_map(|(key, entry)| entry.iter().map(move |(name, raw)| (format!("{}/{name}", hex::encode(key)), raw)));
    let bytes = safetensors::serialize(tensors, None).map_err(std::io::Error::other)?;
    let digest = sha256(&bytes);
    let path = dir.join(name_of(&digest));
    let mut file = tempfile::Builder::new().prefix(PARTIAL).tempfile_in(dir)?;
    file.write_all(&bytes)?;
    file.as_file().sync_all()?;
    file.persist(&path)?;
    // The name must last as well.
    std::fs::File::open(dir)?.sync_all()?;
    Ok((path, digest))
}

/// Removes what killed processes left half-written.
pub(super) fn remove_abandoned(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let old = || entry.metadata().and_then(|m| m.modified()).is_ok_and(|t| t.elapsed().is_ok_and(|age| age > PARTIAL_LIFETIME));
        if entry.file_name().to_string_lossy().starts_with(PARTIAL) && old() {
            let _gone_already_is_fine = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}
