//! Uploads: small objects in one request, large ones in parts with bounded memory.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use object_store::{ObjectStoreExt as _, PutPayload};

use super::Store;
use super::error::{Result, StoreError, StoreErrorKind};

/// Objects up to this size go in one request.
const SINGLE_REQUEST: u64 = 8 << 20;
/// Smallest part; S3 asks for at least 5 MiB.
const SMALLEST_PART: u64 = 8 << 20;
/// Most parts of one object; S3 allows 10,000.
const MOST_PARTS: u64 = 9_000;
/// Parts in flight, which bounds memory.
const PARALLEL_PARTS: usize = 4;

/// What is uploaded. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Memory(Bytes),
    Disk { file: Arc<File>, path: PathBuf, size: u64 },
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(StoreError::local("open", path))?;
        let size = file.metadata().map_err(StoreError::local("read the size of", path))?.len();
        Ok(Self::Disk { file: Arc::new(file), path: path.to_path_buf(), size })
    }

    fn size(&self) -> u64 {
        match self {
            Self::Memory(data) => data.len() as u64,
            Self::Disk { size, .. } => *size,
        }
    }

    async fn read(&self, start: u64, length: u64) -> Result<Bytes> {
        match self {
            Self::Memory(data) => Ok(data.slice(start as usize..(start + length) as usize)),
            Self::Disk { file, path, .. } => {
                let file = Arc::clone(file);
                let task = tokio::task::spawn_blocking(move || {
                    let mut buffer = vec![0; length as usize];
                    file.read_exact_at(&mut buffer, start).map(|()| Bytes::from(buffer))
                });
                task.await.map_err(std::io::Error::other).and_then(|read| read).map_err(StoreError::local("read", path))
            }
        }
    }
}

/// Writes `source` as the object `key`, atomically.
pub(super) async fn put(store: &Store, key: &str, source: Source) -> Result<()> {
    if source.size() <= SINGLE_REQUEST {
        let data = source.read(0, source.size()).await?;
        let backend = store.backend_for_writing()?;
        return backend.put(&store.path(key)?, data.into()).await.map(|_| ()).map_err(|error| store.failed(&error, "write", key));
    }
    match put_parts(store, key, &source).await {
        // The upload may have been completed by a request whose answer was lost: its repetition finds no such upload. To write
        // the object once more settles it.
        Err(error) if error.kind() == StoreErrorKind::NotFound => put_parts(store, key, &source).await,
        result => result,
    }
}

async fn put_parts(store: &Store, key: &str, source: &Source) -> Result<()> {
    let backend = store.backend_for_writing()?;
    let mut upload = backend.put_multipart(&store.path(key)?).await.map_err(|error| store.failed(&error, "start writing", key))?;
    let result = send_parts(store, key, source, upload.as_mut()).await;
    let result = match result {
        Ok(()) => upload.complete().await.map(|_| ()).map_err(|error| store.failed(&error, "finish writing", key)),
        failed => failed,
    };
    if result.is_err()
        && let Err(error) = upload.abort().await
    {
        let error = store.failed(&error, "abort writing", key);
        tracing::debug!(error = %error, "an unfinished upload is left to the bucket's lifecycle rules");
    }
    result
}

async fn send_parts(store: &Store, key: &str, source: &Source, upload: &mut dyn object_store::MultipartUpload) -> Result<()> {
    let size = source.size();
    let part = part_size(size);
    let mut in_flight = FuturesUnordered::new();
    let mut start = 0;
    while start < size || !in_flight.is_empty() {
        if start < size && in_flight.len() < PARALLEL_PARTS {
            let length = part.min(size - start);
            // Read first: a borrow of the set across an await would make this future unusable in a spawned task.
            let payload = PutPayload::from(source.read(start, length).await?);
            in_flight.push(upload.put_part(payload));
            start += length;
        } else if let Some(done) = in_flight.next().await {
            done.map_err(|error| store.failed(&error, "write a part of", key))?;
        }
    }
    Ok(())
}

/// The size of every part but the last, whole MiB.
fn part_size(size: u64) -> u64 {
    size.div_ceil(MOST_PARTS).next_multiple_of(1 << 20).max(SMALLEST_PART)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_large_enough_and_few_enough() {
        for size in [1, SINGLE_REQUEST + 1, 10 << 30, 100 << 30, 5 << 40] {
            let part = part_size(size);
            assert!(part >= 5 << 20 && size.div_ceil(part) <= 10_000, "{size}: {part}");
        }
        assert_eq!(part_size(10 << 30), SMALLEST_PART);
    }
}
