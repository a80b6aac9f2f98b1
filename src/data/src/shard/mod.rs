//! Rows of a Parquet file in a store, one after the other, with bounded memory.
//!
//! The Hugging Face hub keeps picture datasets as such files ("shards"): a column `image` of the pictures' bytes and a column of captions. Pages are fetched
//! and decompressed one at a time; nothing of a file is kept on disk. All functions here block, and are called on threads that may.

mod pages;
mod remote;
mod thrift;

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{Compression, ConvertedType, LogicalType, Type};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl, get_column_reader};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::serialized_reader::SerializedPageReader;
use tokio::runtime::Handle;

use self::pages::CheckedPages;
use self::remote::{Pages, Remote};
use super::sniff;
use finetune_store::{Store, StoreError};

/// Most bytes of a column in one row group, uncompressed: a page may hold all of them.
const MAX_ROW_GROUP: u64 = 1 << 30;
/// Bytes that are read from a file's end; most footers are shorter.
const TAIL: u64 = 64 << 10;
/// Most bytes of a footer.
const MAX_FOOTER: u64 = 16 << 20;
/// Most rows of a file, which is also bounded by its size: each is held, and a damaged footer may count any number.
const MAX_ROWS: u64 = 1_000_000;
/// Rows that are kept behind the last one that was read, as pictures are asked for nearly in order; and the bytes from which on fewer are.
const RECENT: u64 = 16;
const MAX_RECENT: usize = 128 << 20;

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
            ParquetError::External(source) => Self::Unreadable(source.to_string()),
            ParquetError::General(why) | ParquetError::EOF(why) => Self::Unreadable(why),
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

/// A number in groups of seven bits, the lowest first, and the bytes that it takes.
fn varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0;
    for (index, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, index + 1));
        }
    }
    None
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
    remote: Remote,
    metadata: ParquetMetaData,
    rows: u64,
}

impl Shard {
    /// Reads the footer of the object `key` of `size` bytes.
    pub(super) fn open(runtime: &Handle, store: &Store, key: &Arc<str>, size: u64) -> Result<Self, ShardError> {
        let remote = Remote::new(runtime, store, key, size);
        let end = remote.range(size - size.min(TAIL), size.min(TAIL))?;
        let Some((_, [length @ .., b'P', b'A', b'R', last])) = end.split_last_chunk::<8>().filter(|_| size >= 12) else {
            let what = sniff::what(&remote.range(0, size.min(512))?);
            let what = if what == "a Parquet file" { "a Parquet file that is cut off" } else { what };
            return Err(ShardError::Unreadable(format!("it does not end as Parquet files do: it is {what}")));
        };
        if *last == b'E' {
            return Err(ShardError::Unreadable("it is encrypted: write it without encryption".to_owned()));
        }
        let length = u64::from(u32::from_le_bytes(*length));
        if length > MAX_FOOTER || length + 12 > size {
            let why =
                format!("its footer has {length} bytes by its last ones, and the file {size}: it is damaged, or the footer larger than {MAX_FOOTER} bytes");
            return Err(ShardError::Unreadable(why));
        }
        let footer = remote.range(size - 8 - length, length)?;
        thrift::check_footer(&footer).map_err(|_| ShardError::Unreadable("its footer is damaged".to_owned()))?;
        let metadata = ParquetMetaDataReader::decode_metadata(&footer)?;
        let of_group = |group: usize| u64::try_from(metadata.row_group(group).num_rows()).unwrap_or_default();
        let rows = (0..metadata.num_row_groups()).map(of_group).fold(0, u64::saturating_add);
        if rows > MAX_ROWS || rows > size {
            return Err(ShardError::Unreadable(format!(
                "its footer counts {rows} rows in {size} bytes; {MAX_ROWS} rows of a byte are read at most: split the file"
            )));
        }
        Ok(Self { remote, metadata, rows })
    }

    /// Rows of all row groups.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    fn groups(&self) -> usize {
        self.metadata.num_row_groups()
    }

    fn rows_of(&self, group: usize) -> u64 {
        u64::try_from(self.metadata.row_group(group).num_rows()).unwrap_or_default()
    }

    /// Checks whether a leaf can be read at all.
    pub(super) fn check(&self, leaf: usize) -> Result<(), ShardError> {
        (0..self.groups()).try_for_each(|group| bounds(group, self.metadata.row_group(group).column(leaf)).map(|_| ()))
    }

    /// The values of a leaf in one row group.
    fn column(&self, group: usize, leaf: usize) -> Result<ColumnReaderImpl<ByteArrayType>, ShardError> {
        let rows = self.rows_of(group) as usize;
        let chunk = self.metadata.row_group(group).column(leaf);
        let (limit, ratio) = bounds(group, chunk)?;
        let pages = SerializedPageReader::new(Arc::new(Pages { remote: self.remote.clone(), limit, ratio }), chunk, rows, None)?;
        let descriptor = self.metadata.file_metadata().schema_descr().column(leaf);
        let checked = Box::new(CheckedPages::new(pages, &descriptor));
        match get_column_reader(descriptor, checked) {
            ColumnReader::ByteArrayColumnReader(column) => Ok(column),
            _ => Err(ShardError::Unreadable("its columns are not what its schema shows".to_owned())),
        }
    }

    /// Names of the columns.
    pub(super) fn columns(&self) -> Vec<String> {
        self.metadata.file_metadata().schema_descr().root_schema().get_fields().iter().map(|field| field.name().to_owned()).collect()
    }

    /// The leaf of a column of pictures: of a struct with `bytes`, as the `datasets` library writes it, or of plain binary values.
    pub(super) fn pictures(&self, column: &str) -> Column {
        self.leaf(column, |path, binary| path == [column, "bytes"] || (path == [column] && binary))
    }

    /// The leaf of a column of strings, or of lists of them.
    pub(super) fn captions(&self, column: &str) -> Column {
        self.leaf(column, |path, binary| (path.len() == 1 || path.len() == 3) && !binary)
    }

    fn leaf(&self, column: &str, fits: impl Fn(&[&str], bool) -> bool) -> Column {
        let mut found = Column::Absent;
        for (index, leaf) in self.metadata.file_metadata().schema_descr().columns().iter().enumerate() {
            let path: Vec<&str> = leaf.path().parts().iter().map(String::as_str).collect();
            if path.first() != Some(&column) {
                continue;
            }
            let text = matches!(leaf.logical_type_ref(), Some(LogicalType::String)) || leaf.converted_type() == ConvertedType::UTF8;
            if leaf.physical_type() == Type::BYTE_ARRAY && fits(&path, !text) {
                return Column::Leaf(index);
            }
            found = Column::Other(match leaf.physical_type() {
                _ if path.len() > 3 => "a list of structs",
                _ if path.len() > 2 => "a list",
                _ if path.len() > 1 => "a struct",
                Type::BOOLEAN => "a boolean",
                Type::INT32 | Type::INT64 | Type::INT96 => "an integer",
                Type::FLOAT | Type::DOUBLE => "a number",
                Type::BYTE_ARRAY | Type::FIXED_LEN_BYTE_ARRAY if text => "a string",
                Type::BYTE_ARRAY | Type::FIXED_LEN_BYTE_ARRAY => "bytes",
            });
        }
        found
    }
}

/// Most bytes of a page of a column in a row group, and most that a stored byte becomes.
fn bounds(group: usize, chunk: &ColumnChunkMetaData) -> Result<(u64, u64), ShardError> {
    let ratio = match chunk.compression() {
        Compression::UNCOMPRESSED => 1,
        // Its longest copy: 64 bytes of three.
        Compression::SNAPPY => 22,
        // A block of one byte repeated.
        Compression::ZSTD(_) => 128 << 10,
        other => {
            let name = other.to_string();
            let name = name.split('(').next().unwrap_or(&name);
            return Err(ShardError::Unreadable(format!("it is compressed with {name}: write it with Snappy or Zstandard")));
        }
    };
    let size = chunk.uncompressed_size().try_into().unwrap_or(u64::MAX);
    if size > MAX_ROW_GROUP {
        let what = format!("row group {group} holds {size} bytes of one column, more than {MAX_ROW_GROUP}: write it with smaller row groups");
        return Err(ShardError::Unreadable(what));
    }
    Ok((size, ratio))
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
        // Rows mostly come in order: the search goes on where the last one ended.
        let (mut group, mut begin) = if row >= self.end && self.column.is_some() { (self.group + 1, self.end) } else { (0, 0) };
        while group < self.shard.groups() {
            let end = begin + self.shard.rows_of(group);
            if row < end {
                self.column = Some(self.shard.column(group, self.leaf)?);
                (self.group, self.next, self.end) = (group, begin, end);
                self.skip_to(row)?;
                return Ok(true);
            }
            (group, begin) = (group + 1, end);
        }
        Ok(false)
    }

    fn skip_to(&mut self, row: u64) -> Result<(), ShardError> {
        let rows = (row - self.next) as usize;
        if let Some(column) = &mut self.column
            && rows > 0
            && self.shard.remote.explain(column.skip_records(rows))? != rows
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
        let descriptor = self.shard.metadata.file_metadata().schema_descr().column(self.leaf);
        let mut row = Values { full: descriptor.max_def_level(), list: descriptor.max_rep_level() > 0, ..Values::default() };
        let mut repetitions = Vec::new();
        let Some(column) = &mut self.column else { return Ok(None) };
        let read = column.read_records(1, Some(&mut row.levels), Some(&mut repetitions), &mut row.values);
        let (records, ..) = self.shard.remote.explain(read)?;
        if records != 1 {
            return Err(self.short());
        }
        self.next += 1;
        Ok(Some(row))
    }
}

/// The picture of a row.
#[derive(Debug, Clone)]
pub(super) enum Picture {
    /// Its file, copied, so that no page is held by it.
    Bytes(Bytes),
    /// The row has none.
    Absent,
}

impl Picture {
    fn len(&self) -> usize {
        if let Self::Bytes(bytes) = self { bytes.len() } else { 0 }
    }
}

/// The pictures of a shard, for whoever asks for its rows nearly in order.
pub(super) struct Pictures {
    rows: Rows,
    recent: VecDeque<(u64, Picture)>,
}

impl Pictures {
    /// Before the first row; `leaf` is that of [`Shard::pictures`].
    pub(super) fn new(shard: Shard, leaf: usize) -> Self {
        Self { rows: Rows::new(shard, leaf), recent: VecDeque::new() }
    }

    /// The next row's picture; none behind the last row.
    pub(super) fn read(&mut self) -> Result<Option<Picture>, ShardError> {
        let picture = |row: Values| row.values.first().map_or(Picture::Absent, |bytes| Picture::Bytes(Bytes::copy_from_slice(bytes.data())));
        Ok(self.rows.read()?.map(picture))
    }

    /// A row's picture; none where there is no such row.
    pub(super) fn row(&mut self, row: u64) -> Result<Option<Picture>, ShardError> {
        if let Some((_, picture)) = self.recent.iter().find(|(number, _)| *number == row) {
            return Ok(Some(picture.clone()));
        }
        if row < self.rows.next || row - self.rows.next > RECENT {
            self.recent.clear();
            if self.rows.column.is_some() && row >= self.rows.next && row < self.rows.end {
                self.rows.skip_to(row)?;
            } else if !self.rows.open(row)? {
                return Ok(None);
            }
        }
        while self.rows.next <= row {
            let number = self.rows.next;
            let Some(picture) = self.read()? else { return Ok(None) };
            self.recent.push_back((number, picture));
            let too_many = |recent: &VecDeque<(u64, Picture)>| recent.iter().map(|(_, picture)| picture.len()).sum::<usize>() > MAX_RECENT;
            while self.recent.len() as u64 > RECENT || (self.recent.len() > 1 && too_many(&self.recent)) {
                self.recent.pop_front();
            }
        }
        Ok(self.recent.back().map(|(_, picture)| picture.clone()))
    }
}
