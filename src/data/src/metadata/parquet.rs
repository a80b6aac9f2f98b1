//! Parquet files: a row is a picture with its captions. What is read here are the captions alone; the pictures are in `crate::shard`.

use std::sync::Arc;

use ::parquet::data_type::ByteArray;
use sha2::{Digest as _, Sha256};

use super::{Cell, Collector, Keys, Rows};
use crate::problems::ProblemKind;
use crate::shard::{self, Column, Shard, ShardError, Values};
use finetune_common::digest::Sha256Digest;

/// The column of the pictures, unless another is asked for: that of the `datasets` library.
pub const IMAGE: &str = "image";

/// Most bytes of a file's captions, which are held: a dictionary may repeat a long one at every row.
const MAX_BYTES: usize = 256 << 20;

/// Reads the captions of a shard into `rows`. Blocks. Returns a digest of the captions, and the names of the rows.
pub(crate) fn read(shard: Shard, rows: &mut Rows, source: &Arc<str>, named: bool, keys: Keys<'_>) -> Result<(Sha256Digest, Vec<String>), ShardError> {
    let (pictures, captions, columns, count) = (shard.pictures(keys.image), shard.captions(keys.caption), shard.columns(), shard.rows());
    if count == 0 {
        return Err(ShardError::Unreadable("it has no rows".to_owned()));
    }
    for column in [pictures, captions] {
        if let Column::Leaf(leaf) = column {
            shard.check(leaf)?;
        }
    }
    // All of a file's captions, or none of its rows.
    let mut cells = Vec::new();
    if let (Column::Leaf(leaf), Column::Leaf(_) | Column::Absent) = (captions, pictures) {
        let (mut values, mut bytes) = (shard::Rows::new(shard, leaf), 0);
        for row in 0..count {
            let values = values.read().map_err(|error| error.at_row(row))?;
            bytes += values.iter().flat_map(|row| &row.values).map(ByteArray::len).sum::<usize>();
            if bytes > MAX_BYTES {
                return Err(ShardError::Unreadable(format!("its captions have more than {MAX_BYTES} bytes: split the file")));
            }
            cells.push(values.as_ref().map_or(Cell::Missing, cell));
        }
    }
    let mut collector = Collector::new(rows, source, named, keys);
    if let Column::Other(found) = pictures {
        collector.problem(None, None, ProblemKind::NotPictures { key: keys.image.to_owned(), found });
        return Ok((Sha256::new().finalize().into(), Vec::new()));
    }
    let folder = collector.folder.len();
    let (mut hasher, mut names, mut cells) = (Sha256::new(), Vec::new(), cells.into_iter());
    for row in 0..count {
        let caption = match captions {
            Column::Leaf(_) => cells.next().unwrap_or(Cell::Missing),
            Column::Other(found) => Cell::Other(found),
            Column::Absent => Cell::Missing,
        };
        hash(&mut hasher, &caption);
        let name = shard::name_of_row(source, row);
        let path = if pictures == Column::Absent { Cell::Missing } else { Cell::Text(name[folder..].to_owned()) };
        collector.line(row + 1, columns.iter().map(String::as_str), &path, caption);
        names.push(name);
    }
    collector.finish();
    Ok((hasher.finalize().into(), names))
}

/// A caption, a list of them, or what is there instead.
fn cell(row: &Values) -> Cell {
    let mut values = row.values.iter();
    let mut next = || {
        values.next().and_then(|value| std::str::from_utf8(value.data()).ok()).map_or(Cell::Other("text that is not UTF-8"), |text| Cell::Text(text.to_owned()))
    };
    // A required column has no levels.
    if row.full == 0 {
        return next();
    }
    let mut cells: Vec<Cell> = row.levels.iter().map(|level| if *level == row.full { next() } else { Cell::Other("null") }).collect();
    if !row.list {
        return cells.pop().unwrap_or(Cell::Missing);
    }
    match row.levels.as_slice() {
        // No list, or one without elements.
        [0] => Cell::Other("null"),
        [level] if *level + 1 < row.full => Cell::List(Vec::new()),
        _ => Cell::List(cells),
    }
}

/// Every caption with its length, so that none runs into another.
fn hash(hasher: &mut Sha256, cell: &Cell) {
    match cell {
        Cell::Text(text) => {
            hasher.update((text.len() as u64).to_le_bytes());
            hasher.update(text);
        }
        Cell::List(list) => {
            hasher.update((list.len() as u64 | 1 << 63).to_le_bytes());
            list.iter().for_each(|cell| hash(hasher, cell));
        }
        Cell::Missing | Cell::Other(_) => hasher.update(u64::MAX.to_le_bytes()),
    }
}
