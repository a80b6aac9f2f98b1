//! The bytes of a Parquet file in a store, as the Parquet reader takes them: ranges, with the last piece at hand, and page headers that were checked.

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};
use tokio::runtime::Handle;

use super::thrift;
use super::{MAX_ROW_GROUP, ShardError};
use finetune_store::Store;

/// Bytes of a request, unless a page is larger.
const PIECE: u64 = 4 << 20;
/// Most bytes of a page's header; statistics in it may hold values.
const MAX_HEADER: u64 = 1 << 20;

/// An object of a store.
#[derive(Clone)]
pub(super) struct Remote(Arc<Inner>);

struct Inner {
    runtime: Handle,
    store: Store,
    key: Arc<str>,
    size: u64,
    /// Where the last piece begins, and the piece.
    piece: Mutex<(u64, Bytes)>,
    /// Why the last range was not had: the Parquet reader keeps a text alone.
    failure: Mutex<Option<ShardError>>,
}

impl Remote {
    pub(super) fn new(runtime: &Handle, store: &Store, key: &Arc<str>, size: u64) -> Self {
        let (runtime, store, key) = (runtime.clone(), store.clone(), Arc::clone(key));
        Self(Arc::new(Inner { runtime, store, key, size, piece: Mutex::default(), failure: Mutex::default() }))
    }

    /// Bytes of the object.
    pub(super) fn size(&self) -> u64 {
        self.0.size
    }

    /// `length` bytes from `start` on. Blocks.
    pub(super) fn range(&self, start: u64, length: u64) -> Result<Bytes, ShardError> {
        let Inner { runtime, store, key, size, piece, .. } = &*self.0;
        let cut_off = || ShardError::Unreadable(format!("it ends before byte {}: it is cut off or damaged", start.saturating_add(length)));
        let end = start.checked_add(length).filter(|end| end <= size).ok_or_else(cut_off)?;
        let mut piece = piece.lock().unwrap_or_else(PoisonError::into_inner);
        if start < piece.0 || end > piece.0 + piece.1.len() as u64 {
            let to = end.max(start.saturating_add(PIECE).min(*size));
            // What is replaced is not held beside its successor.
            *piece = (0, Bytes::new());
            let bytes = runtime.block_on(store.get_range(key, start..to)).map_err(ShardError::Store)?;
            if bytes.len() as u64 != to - start {
                return Err(cut_off());
            }
            *piece = (start, bytes);
        }
        let at = (start - piece.0) as usize;
        Ok(piece.1.slice(at..at + length as usize))
    }

    /// What the Parquet reader returned; where it failed for want of bytes, why they were not had.
    pub(super) fn explain<T>(&self, result: Result<T, ParquetError>) -> Result<T, ShardError> {
        let failure = self.0.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        result.map_err(|error| failure.unwrap_or_else(|| error.into()))
    }

    fn keep<T>(&self, result: Result<T, ShardError>) -> Result<T, ParquetError> {
        result.map_err(|failure| {
            let text = failure.to_string();
            *self.0.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
            ParquetError::General(text)
        })
    }
}

/// The pages of a column in one row group.
pub(super) struct Pages {
    pub(super) remote: Remote,
    /// Most bytes of a page, uncompressed.
    pub(super) limit: u64,
    /// Most bytes that a stored byte becomes.
    pub(super) ratio: u64,
}

impl Length for Pages {
    fn len(&self) -> u64 {
        self.remote.size()
    }
}

impl ChunkReader for Pages {
    type T = Header;

    fn get_read(&self, start: u64) -> Result<Header, ParquetError> {
        Ok(Header { remote: self.remote.clone(), start, limit: self.limit, ratio: self.ratio, left: None })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let refused = || ShardError::Unreadable(format!("a part of it has {length} bytes; {MAX_ROW_GROUP} are read at most"));
        self.remote.keep(if length as u64 > MAX_ROW_GROUP { Err(refused()) } else { self.remote.range(start, length as u64) })
    }
}

/// A page's header. It is fetched when it is read, as the Parquet reader also asks for readers that it does not use.
pub(super) struct Header {
    remote: Remote,
    start: u64,
    limit: u64,
    ratio: u64,
    left: Option<Bytes>,
}

impl Header {
    /// The header's bytes, if what it announces can be.
    fn check(&self) -> Result<Bytes, ShardError> {
        let damaged = |why: String| ShardError::Unreadable(format!("the page at byte {}: {why}", self.start));
        let most = self.remote.size().saturating_sub(self.start).min(MAX_HEADER);
        let bytes = self.remote.range(self.start, most)?;
        let header = thrift::page_header(&bytes).map_err(|_| damaged("its header is damaged".to_owned()))?;
        if header.uncompressed > self.limit {
            return Err(damaged(format!("its header announces {} bytes, its column has {}: the file is damaged", header.uncompressed, self.limit)));
        }
        if header.uncompressed > header.compressed.saturating_mul(self.ratio) {
            let why =
                format!("its header announces {} bytes, which {} stored bytes cannot become: the file is damaged", header.uncompressed, header.compressed);
            return Err(damaged(why));
        }
        Ok(bytes.slice(..header.length))
    }
}

impl Read for Header {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.left.is_none() {
            self.left = Some(self.remote.keep(self.check()).map_err(std::io::Error::other)?);
        }
        let Some(left) = &mut self.left else { return Ok(0) };
        let piece = left.split_to(buffer.len().min(left.len()));
        buffer[..piece.len()].copy_from_slice(&piece);
        Ok(piece.len())
    }
}
