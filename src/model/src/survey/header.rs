//! The header of a safetensors file, without its values.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Largest header that is read; the library's own limit.
const MAX_BYTES: u64 = 100_000_000;
/// The first line of a file that stands in for one of Git LFS.
const LFS: &[u8] = b"version https://git-lfs";

/// A tensor as the header describes it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct TensorInfo {
    /// Its type, as `F16`.
    pub dtype: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its first byte and the one after its last, counted from the end of the header.
    data_offsets: (u64, u64),
}

impl TensorInfo {
    /// A tensor of f32 that is made, not stored.
    pub(crate) fn made(shape: Vec<usize>) -> Self {
        let bytes = shape.iter().product::<usize>() as u64 * 4;
        Self { dtype: "F32".to_owned(), shape, data_offsets: (0, bytes) }
    }

    /// One of `count` equal parts of its rows, of which it then has `rows`.
    pub(crate) fn part(&mut self, rows: usize, count: usize) {
        self.shape[0] = rows;
        self.data_offsets = (0, self.bytes() / count.max(1) as u64);
    }

    /// Bytes of its values.
    pub(crate) fn bytes(&self) -> u64 {
        self.data_offsets.1.saturating_sub(self.data_offsets.0)
    }
}

/// Every tensor of a file by name.
pub type Tensors = BTreeMap<String, TensorInfo>;

/// What the file's first bytes say.
#[derive(Debug, PartialEq, Eq)]
pub enum Header {
    /// The header is so many bytes long, counted from the file's begin; fewer were given.
    Longer(u64),
    /// The tensors.
    Whole(Tensors),
}

/// Reads the header from the first bytes of a file of `size` bytes.
///
/// # Errors
/// Says, for a person, what the file is instead of complete weights.
pub fn header(first: &[u8], size: u64) -> Result<Header, String> {
    if let Some(what) = other_file(first) {
        return Err(what.to_owned());
    }
    let length = first.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
    let end = length.and_then(|n| n.checked_add(8)).filter(|end| *end <= MAX_BYTES);
    let Some(end) = end else { return Err("is not a safetensors file: download it again".to_owned()) };
    if end > size {
        return Err(cut_off(size, None));
    }
    let Some(json) = first.get(8..end as usize) else { return Ok(Header::Longer(end)) };
    let tensors = parse(json).map_err(|problem| format!("is not a safetensors file: download it again ({problem})"))?;
    let last = tensors.values().map(|t| t.data_offsets.1).max().unwrap_or(0);
    let want = end.saturating_add(last);
    if want > size {
        return Err(cut_off(size, Some(want)));
    }
    if want < size {
        return Err(format!("has {} bytes after its last tensor: it is damaged, download it again", size - want));
    }
    Ok(Header::Whole(tensors))
}

fn parse(json: &[u8]) -> Result<Tensors, String> {
    let mut all: BTreeMap<String, serde_json::Value> = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    all.remove("__metadata__");
    all.into_iter().map(|(name, value)| Ok((name, serde_json::from_value(value).map_err(|error| error.to_string())?))).collect()
}

fn cut_off(size: u64, want: Option<u64>) -> String {
    let want = want.map_or_else(String::new, |want| format!(" of {want}"));
    format!("is cut off: it has {size}{want} bytes; download it again")
}

/// What else lies under the name of weights.
fn other_file(first: &[u8]) -> Option<&'static str> {
    let kinds: [(&[u8], &str); 5] = [
        (LFS, "is a pointer of Git LFS, not the weights themselves: run \"git lfs pull\" in the model's folder"),
        (b"GGUF", "is a GGUF file, whose quantised weights are not read: use the safetensors files of the original model"),
        (b"PK\x03\x04", "is a PyTorch file (a zip with pickles), which can run code when it is loaded and is not read: use safetensors"),
        (b"<", "is a web page, not weights: download it again, with a token if the model asks for one"),
        (b"{", "is a JSON text, not weights: download it again"),
    ];
    // A length that happens to begin like a text is no text.
    let text = first.get(..8).is_none_or(|eight| eight.iter().all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace()));
    let kind = kinds.iter().find(|(begin, _)| first.starts_with(begin) && (begin.len() > 1 || text));
    kind.map(|(_, what)| *what).or(first.is_empty().then_some("is empty: download it again"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, body: usize) -> Vec<u8> {
        [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![0; body]].concat()
    }

    #[test]
    fn tensors_come_from_the_first_bytes_alone() {
        let whole = file(r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]}}"#, 12);
        let end = whole.len() as u64 - 12;
        assert_eq!(header(&whole[..20], whole.len() as u64), Ok(Header::Longer(end)));
        let Ok(Header::Whole(tensors)) = header(&whole[..end as usize], whole.len() as u64) else { panic!("should be whole") };
        assert_eq!((tensors["a"].dtype.as_str(), &tensors["a"].shape[..], tensors.len()), ("F16", &[2, 3][..], 1));
    }

    #[test]
    fn whatever_else_it_is_has_a_name() {
        let good = file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8);
        let cases: [(&[u8], u64, &str); 12] = [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9", 62, "git lfs pull"),
            (b"GGUF\x03\0\0\0\0\0\0\0", 12, "GGUF"),
            (b"PK\x03\x04aaaaaaaaaa", 14, "PyTorch"),
            (b"<!doctype html><html>", 21, "web page"),
            (b"{\"error\": \"no\"}", 15, "JSON"),
            (b"", 0, "empty"),
            (b"abc", 3, "not a safetensors"),
            (&u64::MAX.to_le_bytes(), 8, "not a safetensors"),
            (&good, good.len() as u64 - 1, "cut off"),
            (&good[..20], 20, "cut off"),
            (&good, good.len() as u64 + 1, "1 bytes after"),
            (&file("nonsense", 0), 16, "not a safetensors"),
        ];
        for (first, size, part) in cases {
            let problem = header(first, size).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        }
    }
}
