//! EXIF in a text chunk of a PNG file, as ImageMagick and older programs keep it: `Raw profile type exif`, in hexadecimal digits.

use miniz_oxide::inflate::decompress_to_vec_zlib_with_limit;

/// The chunk's keyword.
const KEYWORD: &[u8] = b"Raw profile type exif\0";

/// Largest profile: that of a JPEG file has at most 64 KiB.
const MAX_TEXT: usize = 1 << 20;

/// The profile of a PNG file, wherever in the file it stands; the last one counts, as in Pillow.
pub(super) fn raw_profile(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut rest = bytes.get(8..)?;
    let mut found = None;
    while let [l3, l2, l1, l0, kind @ ..] = rest
        && let Some((kind, after)) = kind.split_first_chunk::<4>()
    {
        let length = u32::from_be_bytes([*l3, *l2, *l1, *l0]) as usize;
        let Some(data) = after.get(..length) else { break };
        let text = match (kind, data.strip_prefix(KEYWORD)) {
            (b"tEXt", Some(text)) => Some(text.to_vec()),
            // One byte names the only compression there is.
            (b"zTXt", Some([0, packed @ ..])) => decompress_to_vec_zlib_with_limit(packed, MAX_TEXT).ok(),
            // Flags, language and translated keyword, each ended by a zero.
            (b"iTXt", Some([flag, 0, text @ ..])) => {
                let text = text.splitn(3, |byte| *byte == 0).nth(2);
                text.and_then(|text| if *flag == 1 { decompress_to_vec_zlib_with_limit(text, MAX_TEXT).ok() } else { Some(text.to_vec()) })
            }
            _ => None,
        };
        if let Some(text) = text {
            found = digits(&text);
        }
        rest = after.get(length + 4..).unwrap_or_default();
    }
    found
}

/// The bytes behind three lines of name and length.
fn digits(text: &[u8]) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.splitn(4, |byte| *byte == b'\n').nth(3)?.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    hex::decode(digits).ok()
}
