//! The one wrapper of a memory-mapped file. Read-only, and the only unsafe code outside the kernels.
#![expect(unsafe_code, reason = "mapping a file and dropping its pages are unsafe calls; both are confined to this module")]

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap, MmapOptions, UncheckedAdvice};

/// A file mapped read-only. Pages are loaded when touched and can be dropped again with [`MappedFile::release`].
///
/// The file must not be changed in place while it is mapped: write a new file and rename it over the old one, as
/// everything in this crate does.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    /// `None` for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// Whatever opening or mapping the file returns; a folder or a device is refused.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if meta.len() == 0 {
            return Ok(Self { path: path.to_owned(), map: None });
        }
        // SAFETY: the map is private and read-only, and this type hands out shared slices only. The remaining hazard is
        // another process that truncates or overwrites the file in place (the type's documentation forbids it; files of
        // this crate are replaced by rename, which leaves the mapped one intact).
        let map = unsafe { MmapOptions::new().map(&file)? };
        Ok(Self { path: path.to_owned(), map: Some(map) })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tells the kernel that `range` will be read soon. Best effort.
    pub fn will_need(&self, range: Range<usize>) {
        self.advise(range, |map, offset, length| {
            let _best_effort = map.advise_range(Advice::WillNeed, offset, length);
        });
    }

    /// Drops the pages that lie wholly in `range` from this process's memory; they are read from the file again when
    /// touched again. Best effort.
    pub fn release(&self, range: Range<usize>) {
        self.advise(range, |map, offset, length| {
            // Whole pages inside the range only: its neighbours may still be in use.
            let first = offset.next_multiple_of(PAGE);
            let end = if offset + length == map.len() { map.len() } else { (offset + length) / PAGE * PAGE };
            if first < end {
                // SAFETY: MADV_DONTNEED destroys data of anonymous or written pages only. This map is file-backed and
                // never written, so the next access reads the same bytes from the file.
                let _best_effort = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, first, end - first) };
            }
        });
    }

    fn advise(&self, range: Range<usize>, apply: impl FnOnce(&Mmap, usize, usize)) {
        let Some(map) = &self.map else { return };
        let end = range.end.min(map.len());
        if range.start < end {
            apply(map, range.start, end - range.start);
        }
    }
}

/// A multiple of every page size in use on machines that this program is built for.
const PAGE: usize = 64 << 10;

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_release() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..1_000_003_u32).map(|i| (i * 31 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = MappedFile::open(&path).unwrap();
        assert_eq!(&map[..], &bytes[..]);
        for range in [0..bytes.len(), 1..70_000, 65_536..131_072, 999_999..2_000_000, 5..5] {
            map.will_need(range.clone());
            map.release(range);
            assert_eq!(&map[..], &bytes[..]);
        }
    }

    #[test]
    fn empty_files_are_empty_and_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty");
        std::fs::write(&path, b"").unwrap();
        let map = MappedFile::open(&path).unwrap();
        assert!(map.is_empty());
        map.release(0..10);
        assert!(MappedFile::open(dir.path()).is_err());
        assert!(MappedFile::open(&dir.path().join("absent")).is_err());
    }
}
