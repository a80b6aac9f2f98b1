//! The shape of a Parquet file's footer and page headers, checked before the Parquet reader sees them.
//!
//! They are structs in [Thrift's compact protocol](https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md). The reader reserves
//! memory for the numbers that stand in them and goes down as deep as they nest; here no list may have more elements than bytes follow, no group more
//! children than elements follow, and nothing may nest deeper than datasets do.

const I32: u8 = 5;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// Structs, lists and groups of columns in each other; datasets have five.
const MAX_DEPTH: usize = 32;

/// The bytes are not what any writer writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// What is asked of a page's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageHeader {
    /// Bytes of the header itself.
    pub(super) length: usize,
    /// Bytes of the page as it is stored.
    pub(super) compressed: u64,
    /// Bytes of the page as it is read.
    pub(super) uncompressed: u64,
}

/// Checks a footer (`FileMetaData`).
pub(super) fn check_footer(bytes: &[u8]) -> Result<(), Malformed> {
    let mut walker = Walker { bytes };
    let mut last = 0;
    while let Some(kind) = walker.field(&mut last)? {
        match (last, kind) {
            (2, LIST) => walker.schema()?,
            _ => walker.skip(kind, MAX_DEPTH)?,
        }
    }
    Ok(())
}

/// Reads the header (`PageHeader`) that `bytes` begin with.
pub(super) fn page_header(bytes: &[u8]) -> Result<PageHeader, Malformed> {
    let mut walker = Walker { bytes };
    let (mut last, mut compressed, mut uncompressed) = (0, None, None);
    while let Some(kind) = walker.field(&mut last)? {
        match (last, kind) {
            (2, I32) => uncompressed = Some(walker.size()?),
            (3, I32) => compressed = Some(walker.size()?),
            _ => walker.skip(kind, MAX_DEPTH)?,
        }
    }
    let length = bytes.len() - walker.bytes.len();
    Ok(PageHeader { length, compressed: compressed.ok_or(Malformed)?, uncompressed: uncompressed.ok_or(Malformed)? })
}

/// What has not been read yet.
struct Walker<'a> {
    bytes: &'a [u8],
}

impl Walker<'_> {
    fn byte(&mut self) -> Result<u8, Malformed> {
        let (first, rest) = self.bytes.split_first().ok_or(Malformed)?;
        self.bytes = rest;
        Ok(*first)
    }

    fn advance(&mut self, count: u64) -> Result<(), Malformed> {
        let count = usize::try_from(count).map_err(|_| Malformed)?;
        self.bytes = self.bytes.get(count..).ok_or(Malformed)?;
        Ok(())
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let (value, length) = super::varint(self.bytes).ok_or(Malformed)?;
        self.bytes = &self.bytes[length..];
        Ok(value)
    }

    fn i32(&mut self) -> Result<i32, Malformed> {
        let zigzag = self.varint()?;
        i32::try_from((zigzag >> 1) as i64 ^ -((zigzag & 1) as i64)).map_err(|_| Malformed)
    }

    fn size(&mut self) -> Result<u64, Malformed> {
        u64::try_from(self.i32()?).map_err(|_| Malformed)
    }

    /// The type of a struct's next field, whose number follows `last`; none at the struct's end.
    fn field(&mut self, last: &mut i16) -> Result<Option<u8>, Malformed> {
        let byte = self.byte()?;
        let kind = byte & 15;
        if kind == 0 {
            return Ok(None);
        }
        *last = match byte >> 4 {
            0 => i16::try_from(self.i32()?).map_err(|_| Malformed)?,
            delta => last.checked_add(i16::from(delta)).ok_or(Malformed)?,
        };
        Ok(Some(kind))
    }

    /// Type and number of a list's elements, each of which has a byte at least.
    fn list(&mut self) -> Result<(u8, u64), Malformed> {
        let byte = self.byte()?;
        let count = if byte >> 4 == 15 { self.varint()? } else { u64::from(byte >> 4) };
        if count > self.bytes.len() as u64 { Err(Malformed) } else { Ok((byte & 15, count)) }
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Result<(), Malformed> {
        let depth = depth.checked_sub(1).ok_or(Malformed)?;
        match kind {
            // A field's type is its value.
            1 | 2 => Ok(()),
            3 => self.advance(1),
            4..=6 => self.varint().map(|_| ()),
            7 => self.advance(8),
            8 => self.varint().and_then(|length| self.advance(length)),
            LIST | 10 => {
                let (kind, count) = self.list()?;
                (0..count).try_for_each(|_| if kind <= 2 { self.advance(1) } else { self.skip(kind, depth) })
            }
            STRUCT => {
                let mut last = 0;
                while let Some(kind) = self.field(&mut last)? {
                    self.skip(kind, depth)?;
                }
                Ok(())
            }
            // Maps and UUIDs occur nowhere in Parquet.
            _ => Err(Malformed),
        }
    }

    /// The list of the schema's elements, groups before what is in them.
    fn schema(&mut self) -> Result<(), Malformed> {
        let (kind, count) = self.list()?;
        if kind != STRUCT {
            return Err(Malformed);
        }
        // Children that are still to come of each group that is open.
        let mut open: Vec<u64> = Vec::new();
        for element in 0..count {
            let (mut last, mut children) = (0, 0);
            while let Some(kind) = self.field(&mut last)? {
                match (last, kind) {
                    (5, I32) => children = self.size()?,
                    _ => self.skip(kind, MAX_DEPTH)?,
                }
            }
            match open.last_mut() {
                Some(left) => *left -= 1,
                None if element == 0 => {}
                None => return Err(Malformed),
            }
            if children > 0 {
                open.push(children);
            }
            while open.last() == Some(&0) {
                open.pop();
            }
            if open.len() > MAX_DEPTH || children > count - element - 1 {
                return Err(Malformed);
            }
        }
        if open.is_empty() { Ok(()) } else { Err(Malformed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A footer with this list of schema elements, each given by its number of children.
    fn footer(children: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x15, 2, 0x19, 0xfc, children.len() as u8];
        for children in children {
            bytes.extend_from_slice(&[0x48, 1, b'a', 0x15, children * 2, 0]);
        }
        bytes.push(0);
        bytes
    }

    #[test]
    fn groups_have_the_children_that_follow() {
        for (children, fits) in [
            (&[2, 0, 0][..], true),
            (&[2, 1, 0, 0], true),
            (&[2, 0, 1, 0], true),
            (&[0], true),
            (&[3, 0, 0], false),
            (&[1, 0, 0], false),
            (&[60, 0, 0], false),
            (&[1; 40], false),
        ] {
            assert_eq!(check_footer(&footer(children)).is_ok(), fits, "{children:?}");
        }
    }

    #[test]
    fn nothing_counts_more_than_follows_or_nests_without_end() {
        // A list of 2^31 - 1 key-value pairs; a string of 2^40 bytes; a list of lists of lists...
        let mut deep = vec![0x59];
        deep.extend([0x19; 40]);
        for bytes in [&[0x59, 0xfc, 0xff, 0xff, 0xff, 0xff, 0x07, 0][..], &[0x68, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20, 0], &deep, &[0x15], &[]] {
            assert_eq!(check_footer(bytes), Err(Malformed), "{bytes:?}");
        }
    }

    #[test]
    fn sizes_of_pages_are_read() {
        // Type 0, 300 bytes, 20 bytes, no checksum, a struct with the number of values.
        let header = [0x15, 0, 0x15, 0xd8, 0x04, 0x15, 40, 0x2c, 0x15, 4, 0, 0, 0xaa];
        assert_eq!(page_header(&header), Ok(PageHeader { length: 12, compressed: 20, uncompressed: 300 }));
        assert_eq!(page_header(&header[..11]), Err(Malformed));
        // No negative size, and both are there.
        assert_eq!(page_header(&[0x15, 0, 0x15, 3, 0x15, 40, 0]), Err(Malformed));
        assert_eq!(page_header(&[0x15, 0, 0x15, 4, 0]), Err(Malformed));
    }
}
