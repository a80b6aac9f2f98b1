//! Pages of a column, checked before their values are decoded: the Parquet reader reserves memory for the numbers that a page counts.

use parquet::basic::Encoding;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::ParquetError;
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::ColumnDescriptor;

use super::remote::Pages;
use super::varint;

/// Most values of a page: writers keep pages near a megabyte, and a value of a column that repeats has a few bits.
const MAX_VALUES: u32 = 4 << 20;

/// Pages that are checked.
pub(super) struct CheckedPages {
    pages: SerializedPageReader<Pages>,
    /// Whether values repeat, and whether they may be absent: each has its levels before the values.
    levels: [bool; 2],
}

impl CheckedPages {
    pub(super) fn new(pages: SerializedPageReader<Pages>, column: &ColumnDescriptor) -> Self {
        Self { pages, levels: [column.max_rep_level() > 0, column.max_def_level() > 0] }
    }

    /// Skips pages without values, as pyarrow writes them between others: the Parquet reader takes one for the column's end.
    fn pass_empty(&mut self) -> Result<Option<PageMetadata>, ParquetError> {
        loop {
            match self.pages.peek_next_page()? {
                Some(page) if page.num_levels == Some(0) => self.pages.skip_next_page()?,
                page => return Ok(page),
            }
        }
    }

    fn check(&self, page: Option<Page>) -> Result<Option<Page>, ParquetError> {
        page.map(|page| check(&page, self.levels).map(|()| page)).transpose()
    }
}

impl Iterator for CheckedPages {
    type Item = Result<Page, ParquetError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for CheckedPages {
    fn get_next_page(&mut self) -> Result<Option<Page>, ParquetError> {
        self.pass_empty()?;
        let page = self.pages.get_next_page()?;
        self.check(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>, ParquetError> {
        self.pass_empty()
    }

    fn skip_next_page(&mut self) -> Result<(), ParquetError> {
        self.pages.skip_next_page()
    }

    fn supports_deferred_dictionary(&self) -> bool {
        self.pages.supports_deferred_dictionary()
    }

    fn take_deferred_dictionary(&mut self) -> Result<Option<Page>, ParquetError> {
        let page = self.pages.take_deferred_dictionary()?;
        self.check(page)
    }

    fn at_record_boundary(&mut self) -> Result<bool, ParquetError> {
        // The end, or a page of version 2: no row reaches from one into the next.
        Ok(self.pass_empty()?.is_none_or(|page| page.num_rows.is_some()))
    }
}

fn check(page: &Page, levels: [bool; 2]) -> Result<(), ParquetError> {
    let count = page.num_values();
    let (values, encoding) = match page {
        // Each value has its length, of four bytes.
        Page::DictionaryPage { buf, .. } if u64::from(count) * 4 > buf.len() as u64 => {
            return Err(ParquetError::General(format!("a dictionary of {} bytes counts {count} values: it is damaged", buf.len())));
        }
        Page::DictionaryPage { .. } => return Ok(()),
        Page::DataPage { buf, encoding, .. } => {
            let mut at = Some(0);
            for _ in levels.iter().filter(|levels| **levels) {
                at = at.and_then(|at: usize| {
                    let length = u32::from_le_bytes(*buf.get(at..)?.first_chunk()?);
                    at.checked_add(4)?.checked_add(length as usize)
                });
            }
            (at.and_then(|at| buf.get(at..)), encoding)
        }
        Page::DataPageV2 { buf, encoding, def_levels_byte_len, rep_levels_byte_len, .. } => {
            (buf.get((*def_levels_byte_len as usize).saturating_add(*rep_levels_byte_len as usize)..), encoding)
        }
    };
    if count > MAX_VALUES {
        return Err(ParquetError::General(format!("a page counts {count} values; {MAX_VALUES} are read at most")));
    }
    let lengths = match encoding {
        Encoding::PLAIN | Encoding::PLAIN_DICTIONARY | Encoding::RLE_DICTIONARY => return Ok(()),
        Encoding::DELTA_LENGTH_BYTE_ARRAY => 1,
        // Lengths of what a value shares with the one before it, and lengths of the rest.
        Encoding::DELTA_BYTE_ARRAY => 2,
        other => return Err(ParquetError::NYI(format!("encoding {other}"))),
    };
    let mut values = values;
    for _ in 0..lengths {
        values = values.and_then(|values| after_lengths(values, count));
    }
    values.map(|_| ()).ok_or_else(|| ParquetError::General(format!("a page of {count} values has other numbers of lengths: it is damaged")))
}

/// What follows a list of at most `count` lengths in the encoding `DELTA_BINARY_PACKED`: block size, blocks' parts, number, first value; then blocks of the
/// smallest difference, the bits of each part's differences, and these.
fn after_lengths(bytes: &[u8], count: u32) -> Option<&[u8]> {
    let mut at = 0;
    let mut next = || {
        let (value, length) = varint(&bytes[at..])?;
        at += length;
        Some(value)
    };
    let (block, parts, total, _first) = (next()?, next()?, next()?, next()?);
    if parts == 0 || block % parts != 0 || total > u64::from(count) || parts > bytes.len() as u64 {
        return None;
    }
    let (parts, in_part) = (parts as usize, block / parts);
    if in_part == 0 {
        return None;
    }
    let mut left = total.saturating_sub(1);
    while left > 0 {
        at += varint(bytes.get(at..)?)?.1;
        let widths = bytes.get(at..)?.get(..parts)?;
        at += parts;
        for width in widths {
            if left > 0 {
                let bits = in_part.checked_mul(u64::from(*width))?;
                at = at.checked_add(usize::try_from(bits / 8).ok()?)?;
            }
            left = left.saturating_sub(in_part);
        }
    }
    bytes.get(at..)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three lengths 5, 5, 6 as arrow-rs and parquet-mr write them, then the values.
    #[test]
    fn lengths_are_counted_before_they_are_read() {
        // Blocks of 128 in 4 parts, 3 values, the first 5; smallest difference 0, the first part of 1 bit.
        let mut bytes = vec![0x80, 0x01, 4, 3, 10, 0, 1, 0, 0, 0, 0b10, 0, 0, 0];
        bytes.extend(b"value");
        assert_eq!(after_lengths(&bytes, 3), Some(&b"value"[..]));
        assert_eq!(after_lengths(&bytes, 2), None);
        assert_eq!(after_lengths(&bytes[..9], 3), None);
        // 2^40 lengths; no parts; parts of nothing.
        assert_eq!(after_lengths(&[0x80, 0x01, 4, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20, 0], u32::MAX), None);
        assert_eq!(after_lengths(&[0x80, 0x01, 0, 3, 0, 0], 3), None);
        assert_eq!(after_lengths(&[0, 4, 3, 0, 0, 0, 0, 0, 0], 3), None);
    }

    #[test]
    fn a_dictionary_has_the_bytes_of_its_values() {
        let page = |num_values| Page::DictionaryPage { buf: vec![0; 20].into(), num_values, encoding: Encoding::PLAIN, is_sorted: false };
        assert!(check(&page(5), [false, true]).is_ok());
        assert!(check(&page(6), [false, true]).is_err());
    }
}
