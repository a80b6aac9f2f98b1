//! Rows of a Parquet file in a store, one after the other, with bounded memory.
//!
//! The Hugging Face hub keeps picture datasets as such files ("shards"): a column `image` of the pictures' bytes and a column of captions. Pages are fetched
//! and decompressed one at a time; nothing of a file is kept on disk. All functions here block, and are called on threads that may.

use std::collections::VecDeque;
use std::io::Read;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use parquet::basic::{Compression, ConvertedType, LogicalType, Type};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader as _, Length, SerializedFileReader};
use tokio::runtime::Handle;

use finetune_store::{Store, StoreError};

/// Bytes of a request, unless a page is larger.
const PIECE: u64 = 4 << 20;
/// Most bytes of a column in one row group, uncompressed: a page may hold all of them.
const MAX_ROW_GROUP: i64 = 1 << 30;
/// Rows that are kept behind the last one that was read: pictures are asked for nearly in order.
const RECENT: u64 = 16;

/// Digits of a row in a sample's name; longer numbers have more.
const DIGITS: usize = 7;

/// The name of a picture in a shard: `data/train-00000-of-00002.parquet/0000017`, rows counted from 0.
pub(super) fn name_of_row(shard: &str, row: u64) -> String {
    format!("{shard}/{row:0DIGITS$}")
}

/// Shard and row of such a name.
pub(super) fn row_of_name(name: &str) -> Option<(&str, u64)> {
    let (shard, digits) = name.rsplit_once('/')?;
    let row = digits.parse().ok().filter(|row| is_shard(shard) && format!("{row:0DIGITS$}") == digits)?;
    Some((shard, row))
}

/// Whether a file is a Parquet file by its name.
pub(super) fn is_shard(key: &str) -> bool {
    key.rsplit_once('.').is_some_and(|(_, ending)| ending.eq_ignore_ascii_case("parquet"))
}

/// Why a shard cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ShardError {
    /// The store failed.
    #[error(transparent)]
    Store(StoreError),
    /// The file is damaged, or needs what is not read here.
    #[error("{0}")]
    Unreadable(String),
}

impl From<ParquetError> for ShardError {
    fn from(error: ParquetError) -> Self {
        match error {
            ParquetError::External(source) => match source.downcast::<StoreError>() {
                Ok(error) => Self::Store(*error),
                Err(other) => Self::Unreadable(other.to_string()),
            },
            ParquetError::NYI(what) => Self::Unreadable(format!("it is written in a way that is not read here ({what})")),
            other => Self::Unreadable(other.to_string()),
        }
    }
}

impl ShardError {
    /// The same, met at a row, counted from 0.
    pub(super) fn at_row(self, row: u64) -> Self {
        match self {
            Self::Unreadable(why) => Self::Unreadable(format!("row {}: {why}", row + 1)),
            Self::Store(_) => self,
        }
    }
}

/// What `read` returns; a damaged file is unreadable even where the Parquet reader panics at bytes that no writer writes.
pub(super) fn guarded<T>(read: impl FnOnce() -> Result<T, ShardError>) -> Result<T, ShardError> {
    std::panic::catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err(ShardError::Unreadable("it is damaged".to_owned())))
}

/// An object as the Parquet reader takes it: ranges of it, with the last piece at hand.
#[derive(Clone)]
struct Remote(Arc<Inner>);

struct Inner {
    runtime: Handle,
    store: Store,
    key: Arc<str>,
    size: u64,
    /// Where the last piece begins, and the piece.
    piece: Mutex<(u64, Bytes)>,
}

impl Remote {
    fn range(&self, start: u64, length: u64) -> Result<Bytes, ParquetError> {
        let Inner { runtime, store, key, size, piece } = &*self.0;
        let cut_off = || ParquetError::EOF(format!("it ends before byte {}: it is cut off or damaged", start.saturating_add(length)));
        let end = start.checked_add(length).filter(|end| end <= size).ok_or_else(cut_off)?;
        let mut piece = piece.lock().unwrap_or_else(PoisonError::into_inner);
        if start < piece.0 || end > piece.0 + piece.1.len() as u64 {
            let to = end.max(start.saturating_add(PIECE).min(*size));
            // What is replaced is not held beside its successor.
            *piece = (0, Bytes::new());
            let bytes = runtime.block_on(store.get_range(key, start..to)).map_err(|error| ParquetError::External(Box::new(error)))?;
            if bytes.len() as u64 != to - start {
                return Err(cut_off());
            }
            *piece = (start, bytes);
        }
        let at = (start - piece.0) as usize;
        Ok(piece.1.slice(at..at + length as usize))
    }
}

impl Length for Remote {
    fn len(&self) -> u64 {
        self.0.size
    }
}

impl ChunkReader for Remote {
    type T = RemoteRead;

    fn get_read(&self, start: u64) -> Result<RemoteRead, ParquetError> {
        Ok(RemoteRead { remote: self.clone(), at: start })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        if length as u64 > MAX_ROW_GROUP as u64 {
            return Err(ParquetError::General(format!("a part of it has {length} bytes; {MAX_ROW_GROUP} are read at most")));
        }
        self.range(start, length as u64)
    }
}

/// An object from some byte on.
struct RemoteRead {
    remote: Remote,
    at: u64,
}

impl Read for RemoteRead {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = (buffer.len() as u64).min(PIECE).min(self.remote.0.size.saturating_sub(self.at));
        let bytes = self.remote.range(self.at, length).map_err(std::io::Error::other)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
}

/// What a column is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    /// There is no column of that name.
    Absent,
    /// It does not hold what is looked for, but this.
    Other(&'static str),
    /// The leaf with this number.
    Leaf(usize),
}

/// An open Parquet file: its footer.
pub(super) struct Shard {
    file: SerializedFileReader<Remote>,
}

impl Shard {
    /// Reads the footer of the object `key` of `size` bytes.
    pub(super) fn open(runtime: &Handle, store: &Store, key: &Arc<str>, size: u64) -> Result<Self, ShardError> {
        let inner = Inner { runtime: runtime.clone(), store: store.clone(), key: Arc::clone(key), size, piece: Mutex::default() };
        Ok(Self { file: SerializedFileReader::new(Remote(Arc::new(inner)))? })
    }

    /// Rows of all row groups.
    pub(super) fn rows(&self) -> u64 {
        (0..self.groups()).map(|group| self.rows_of(group)).sum()
    }

    fn groups(&self) -> usize {
        self.file.metadata().num_row_groups()
    }

    fn rows_of(&self, group: usize) -> u64 {
        u64::try_from(self.file.metadata().row_group(group).num_rows()).unwrap_or_default()
    }

    /// Names of the columns.
    pub(super) fn columns(&self) -> Vec<String> {
        self.file.metadata().file_metadata().schema_descr().root_schema().get_fields().iter().map(|field| field.name().to_owned()).collect()
    }

    /// The leaf of a column of pictures: of a struct with `bytes`, as the `datasets` library writes it, or of plain binary values.
    pub(super) fn pictures(&self, column: &str) -> Column {
        self.leaf(column, "something else than pictures", |path, binary| path == [column, "bytes"] || (path == [column] && binary))
    }

    /// The leaf of a column of strings, or of lists of them.
    pub(super) fn captions(&self, column: &str) -> Column {
        self.leaf(column, "another type", |path, binary| (path.len() == 1 || path.len() == 3) && !binary)
    }

    fn leaf(&self, column: &str, other: &'static str, fits: impl Fn(&[&str], bool) -> bool) -> Column {
        let mut found = Column::Absent;
        for (index, leaf) in self.file.metadata().file_metadata().schema_descr().columns().iter().enumerate() {
            let path: Vec<&str> = leaf.path().parts().iter().map(String::as_str).collect();
            if path.first() != Some(&column) {
                continue;
            }
            let text = matches!(leaf.logical_type_ref(), Some(LogicalType::String)) || leaf.converted_type() == ConvertedType::UTF8;
            if leaf.physical_type() == Type::BYTE_ARRAY && fits(&path, !text) {
                return Column::Leaf(index);
            }
            found = Column::Other(other);
        }
        found
    }
}

/// A row's values of one column.
#[derive(Debug, Default)]
pub(super) struct Values {
    /// For each value of the row, or for its absence, how much of its path is there.
    pub(super) levels: Vec<i16>,
    /// The values that are there.
    pub(super) values: Vec<ByteArray>,
    /// The level of a value that is there.
    pub(super) full: i16,
    /// Whether the column holds lists.
    pub(super) list: bool,
}

/// The values of one column, row by row.
pub(super) struct Rows {
    shard: Shard,
    leaf: usize,
    column: Option<ColumnReaderImpl<ByteArrayType>>,
    /// The row group of `column`, the row that comes next, and the first row that is not in it.
    group: usize,
    next: u64,
    end: u64,
}

impl Rows {
    /// Before the first row.
    pub(super) fn new(shard: Shard, leaf: usize) -> Self {
        Self { shard, leaf, column: None, group: 0, next: 0, end: 0 }
    }

    /// Opens the row group that `row` is in; false behind the last.
    fn open(&mut self, row: u64) -> Result<bool, ShardError> {
        let mut begin = 0;
        for group in 0..self.shard.groups() {
            let end = begin + self.shard.rows_of(group);
            if row < end {
                let chunk = self.shard.file.metadata().row_group(group).column(self.leaf);
                let compression = chunk.compression();
                if !matches!(compression, Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_)) {
                    return Err(ShardError::Unreadable(format!("it is compressed with {compression}: write it with Snappy or Zstandard")));
                }
                let size = chunk.uncompressed_size();
                if size > MAX_ROW_GROUP {
                    let what = format!("row group {group} holds {size} bytes of one column, more than {MAX_ROW_GROUP}: write it with smaller row groups");
                    return Err(ShardError::Unreadable(what));
                }
                let ColumnReader::ByteArrayColumnReader(column) = self.shard.file.get_row_group(group)?.get_column_reader(self.leaf)? else {
                    return Err(ShardError::Unreadable("its columns are not what its schema shows".to_owned()));
                };
                (self.column, self.group, self.next, self.end) = (Some(column), group, begin, end);
                self.skip_to(row)?;
                return Ok(true);
            }
            begin = end;
        }
        Ok(false)
    }

    fn skip_to(&mut self, row: u64) -> Result<(), ShardError> {
        let rows = (row - self.next) as usize;
        if let Some(column) = &mut self.column
            && rows > 0
            && column.skip_records(rows)? != rows
        {
            return Err(self.short());
        }
        self.next = row;
        Ok(())
    }

    fn short(&self) -> ShardError {
        ShardError::Unreadable(format!("row group {} has fewer rows than its footer counts", self.group))
    }

    /// The next row's values; none behind the last row.
    pub(super) fn read(&mut self) -> Result<Option<Values>, ShardError> {
        if (self.column.is_none() || self.next >= self.end) && !self.open(self.next)? {
            return Ok(None);
        }
        let descriptor = self.shard.file.metadata().file_metadata().schema_descr().column(self.leaf);
        let mut row = Values { full: descriptor.max_def_level(), list: descriptor.max_rep_level() > 0, ..Values::default() };
        let mut repetitions = Vec::new();
        let Some(column) = &mut self.column else { return Ok(None) };
        let (records, ..) = column.read_records(1, Some(&mut row.levels), Some(&mut repetitions), &mut row.values)?;
        if records != 1 {
            return Err(self.short());
        }
        self.next += 1;
        Ok(Some(row))
    }
}

/// The pictures of a shard, for whoever asks for its rows nearly in order.
pub(super) struct Pictures {
    rows: Rows,
    recent: VecDeque<(u64, Option<Bytes>)>,
}

impl Pictures {
    /// Before the first row; `leaf` is that of [`Shard::pictures`].
    pub(super) fn new(shard: Shard, leaf: usize) -> Self {
        Self { rows: Rows::new(shard, leaf), recent: VecDeque::new() }
    }

    /// The next row's picture: none where the row has no bytes, and nothing at all behind the last row. The bytes are a copy, so that no page is held by them.
    pub(super) fn read(&mut self) -> Result<Option<Option<Bytes>>, ShardError> {
        Ok(self.rows.read()?.map(|row| row.values.first().map(|bytes| Bytes::copy_from_slice(bytes.data()))))
    }

    /// A row's picture; as above.
    pub(super) fn row(&mut self, row: u64) -> Result<Option<Option<Bytes>>, ShardError> {
        if let Some((_, bytes)) = self.recent.iter().find(|(number, _)| *number == row) {
            return Ok(Some(bytes.clone()));
        }
        if row < self.rows.next || row >= self.rows.end || row - self.rows.next > RECENT {
            self.recent.clear();
            if !(self.rows.column.is_some() && row >= self.rows.next && row < self.rows.end) {
                if !self.rows.open(row)? {
                    return Ok(None);
                }
            } else {
                self.rows.skip_to(row)?;
            }
        }
        while self.rows.next <= row {
            let number = self.rows.next;
            let Some(bytes) = self.read()? else { return Ok(None) };
            self.recent.push_back((number, bytes));
            if self.recent.len() as u64 > RECENT {
                self.recent.pop_front();
            }
        }
        Ok(self.recent.back().map(|(_, bytes)| bytes.clone()))
    }
}
