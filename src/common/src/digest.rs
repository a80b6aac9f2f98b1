//! SHA-256 digests: of bytes, of files, and their textual form.

use std::io::Read;
use std::path::Path;

use sha2::{Digest as _, Sha256};

/// A SHA-256 digest.
pub type Sha256Digest = [u8; 32];

/// Digest of `bytes`.
pub fn sha256(bytes: &[u8]) -> Sha256Digest {
    Sha256::digest(bytes).into()
}

/// Digest of several parts, each preceded by its length (little-endian u64), so that
/// `("ab", "c")` and `("a", "bc")` differ.
pub fn sha256_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Sha256Digest {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// Digest of a file's content, read in pieces.
///
/// # Errors
/// Whatever opening or reading the file returns.
pub fn sha256_file(path: &Path) -> std::io::Result<Sha256Digest> {
    let mut file = std::fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0_u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hasher.finalize().into());
        }
        hasher.update(&buffer[..n]);
    }
}

/// `sha256:<64 hex digits>`, the form used in status, manifests and `result.json`.
pub fn to_text(digest: &Sha256Digest) -> String {
    format!("sha256:{}", hex::encode(digest))
}

/// Reads `sha256:<64 hex digits>` or the bare hex digits.
pub fn from_text(text: &str) -> Option<Sha256Digest> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    let mut digest = [0; 32];
    hex::decode_to_slice(digits, &mut digest).ok()?;
    Some(digest)
}

/// The first 64 bits of a digest: for names of streams of random numbers.
pub fn leading_u64(digest: &Sha256Digest) -> u64 {
    digest.iter().take(8).fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer_and_text_round_trip() {
        let digest = sha256(b"abc");
        let text = to_text(&digest);
        assert_eq!(text, "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(from_text(&text), Some(digest));
        assert_eq!(from_text("sha256:12"), None);
    }

    #[test]
    fn parts_are_kept_apart() {
        assert_ne!(sha256_parts([&b"ab"[..], b"c"]), sha256_parts([&b"a"[..], b"bc"]));
    }
}
