//! The tag of a TIFF file that decides whether it is read.

/// Number of the tag.
const COMPRESSION: u16 = 259;

/// How the first page is compressed; `None` where that is not said or the file is damaged.
pub(super) fn compression(bytes: &[u8]) -> Option<u16> {
    let big = bytes.starts_with(b"MM");
    let short = |at: usize| {
        let bytes = *bytes.get(at..)?.first_chunk()?;
        Some(if big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    };
    let long = |at: usize| {
        let bytes = *bytes.get(at..)?.first_chunk()?;
        Some(if big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    };
    let directory = long(4)? as usize;
    let entries = usize::from(short(directory)?);
    let entry = (0..entries).map(|index| directory + 2 + 12 * index).find(|at| short(*at) == Some(COMPRESSION))?;
    short(entry + 8)
}
