//! What a file is that is no usable picture, by its first bytes.

/// A name for people.
pub(super) fn what(bytes: &[u8]) -> &'static str {
    let text = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes).trim_ascii_start();
    let begins = |prefix: &[u8]| text.len() >= prefix.len() && text[..prefix.len()].eq_ignore_ascii_case(prefix);
    match bytes {
        [] => "an empty file",
        _ if bytes.iter().all(|byte| *byte == 0) => "a file of zeros (an interrupted download or copy)",
        _ if bytes.starts_with(b"version https://git-lfs.github.com/spec/") => "a Git LFS pointer: run \"git lfs pull\" where the files come from",
        _ if begins(b"<!doctype html") || begins(b"<html") || begins(b"<head") => "an HTML page (an error page that was saved as a picture?)",
        _ if begins(b"<svg") || (begins(b"<?xml") && contains(text, b"<svg")) => "an SVG drawing: export it as PNG",
        _ if begins(b"<?xml") => "an XML document (an error answer of a store that was saved as a picture?)",
        _ if bytes.get(4..8) == Some(b"ftyp") => brand(bytes),
        _ if bytes.starts_with(&[0xFF, 0x0A]) || bytes.starts_with(b"\0\0\0\x0cJXL ") => "a JPEG XL file: convert it to PNG or WebP",
        _ if bytes.starts_with(b"\0\0\0\x0cjP  ") || bytes.starts_with(&[0xFF, 0x4F, 0xFF, 0x51]) => "a JPEG 2000 file: convert it to PNG",
        _ if bytes.starts_with(b"8BPS") => "a Photoshop file: export it as PNG",
        _ if bytes.starts_with(b"\0\0\x01\0") => "an icon file: convert it to PNG",
        _ if bytes.starts_with(b"DDS ") => "a DDS texture: convert it to PNG",
        _ if bytes.starts_with(b"%PDF") => "a PDF document",
        _ if bytes.starts_with(b"PK\x03\x04") => "a ZIP archive: unpack it",
        _ if bytes.starts_with(&[0x1F, 0x8B]) => "a gzip archive: unpack it",
        _ if bytes.starts_with(b"PAR1") => "a Parquet file",
        _ if bytes.starts_with(b"gimp xcf") => "a GIMP file: export it as PNG",
        _ if matches!(bytes, [b'P', b'1'..=b'7', b' ' | b'\n' | b'\r' | b'\t', ..]) => "a Netpbm file: convert it to PNG",
        _ if bytes.starts_with(&[0x1A, 0x45, 0xDF, 0xA3]) => "a video",
        _ if begins(b"{") || begins(b"[{") => "JSON text",
        _ if std::str::from_utf8(&bytes[..bytes.len().min(512)]).is_ok_and(|text| !text.contains('\0')) => "text",
        _ => "something else",
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text[..text.len().min(1024)].windows(part.len()).any(|window| window == part)
}

/// An ISO media file says in its header what it is.
fn brand(bytes: &[u8]) -> &'static str {
    match bytes.get(8..12) {
        Some(b"avif" | b"avis") => "an AVIF file: convert it to PNG or WebP",
        Some(b"heic" | b"heix" | b"hevc" | b"hevx" | b"heim" | b"heis" | b"mif1" | b"msf1") => {
            "a HEIC file, as iPhones save pictures: convert it to JPEG or PNG"
        }
        _ => "a video",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_strangers_are_named() {
        for (bytes, part) in [
            (&b""[..], "empty"),
            (&[0; 4000], "zeros"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
            (b"\n<!DOCTYPE html><title>404</title>", "HTML"),
            ("\u{feff}<html>".as_bytes(), "HTML"),
            (b"<?xml version=\"1.0\"?><svg xmlns=\"\"/>", "SVG"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code>", "XML"),
            (b"\0\0\0\x20ftypavif\0\0", "AVIF"),
            (b"\0\0\0\x20ftypheic\0\0", "HEIC"),
            (b"\0\0\0\x20ftypisom\0\0", "video"),
            (b"\xff\x0a\x00", "JPEG XL"),
            (b"PK\x03\x04..", "ZIP"),
            (b"hello", "text"),
            (b"\x80\x81", "something else"),
        ] {
            assert!(what(bytes).contains(part), "{part}: {}", what(bytes));
        }
    }
}
