//! `metadata.jsonl`: one JSON object per line with a file name and a caption.
//!
//! The file is read in pieces with bounded lines, so its size does not matter; every problem is found in one reading.
//! Blank lines, a byte order mark, CRLF and further keys are accepted. A leading `./` of a path is dropped.

use std::collections::HashMap;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::problems::{Problem, ProblemKind, Problems};
use finetune_common::digest::Sha256Digest;

/// Longest accepted line in bytes.
pub const MAX_LINE: usize = 1 << 20;

/// The key of the path, relative to the metadata file.
pub const FILE_NAME: &str = "file_name";

/// A usable line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its number, from 1.
    pub line: u64,
    /// Clean relative path, `/`-separated.
    pub file_name: String,
    /// The caption, as written.
    pub caption: String,
}

/// A read metadata file.
#[derive(Debug, Clone)]
pub struct Metadata {
    /// The usable rows, in the order of the lines.
    pub rows: Vec<Row>,
    /// All other lines but blank ones.
    pub problems: Problems,
    /// Every clean name of the file, also of rows that are unusable for another reason, with its first line.
    pub names: HashMap<String, u64>,
    /// Digest of the file's bytes.
    pub digest: Sha256Digest,
}

/// Reads a metadata file piece by piece.
#[derive(Debug)]
pub struct MetadataParser {
    caption_column: String,
    /// The beginning of a line whose end has not come yet; cut where the line is too long.
    partial: Vec<u8>,
    too_long: bool,
    line: u64,
    first_lines: HashMap<String, u64>,
    rows: Vec<Row>,
    problems: Problems,
    hasher: Sha256,
}

impl MetadataParser {
    /// A parser that takes captions from this key.
    pub fn new(caption_column: &str) -> Self {
        Self {
            caption_column: caption_column.to_owned(),
            partial: Vec::new(),
            too_long: false,
            line: 0,
            first_lines: HashMap::new(),
            rows: Vec::new(),
            problems: Problems::default(),
            hasher: Sha256::new(),
        }
    }

    /// Reads the next piece of the file.
    pub fn push(&mut self, piece: &[u8]) {
        self.hasher.update(piece);
        let mut rest = piece;
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            self.extend(&rest[..end]);
            self.end_line();
            rest = &rest[end + 1..];
        }
        self.extend(rest);
    }

    /// The end of the file.
    pub fn finish(mut self) -> Metadata {
        if !self.partial.is_empty() || self.too_long {
            self.end_line();
        }
        Metadata { rows: self.rows, problems: self.problems, names: self.first_lines, digest: self.hasher.finalize().into() }
    }

    fn extend(&mut self, part: &[u8]) {
        if self.partial.len() + part.len() > MAX_LINE {
            self.too_long = true;
            self.partial.clear();
        } else if !self.too_long {
            self.partial.extend_from_slice(part);
        }
    }

    fn end_line(&mut self) {
        self.line += 1;
        let too_long = std::mem::take(&mut self.too_long);
        let mut bytes = std::mem::take(&mut self.partial);
        if self.line == 1 && bytes.starts_with("\u{feff}".as_bytes()) {
            bytes.drain(..3);
        }
        let mut file_name = None;
        let kinds = if too_long {
            vec![ProblemKind::LineTooLong { limit: MAX_LINE }]
        } else if bytes.iter().all(u8::is_ascii_whitespace) {
            Vec::new()
        } else {
            match self.row(&bytes, &mut file_name) {
                Ok(row) => {
                    self.rows.push(row);
                    Vec::new()
                }
                Err(kinds) => kinds,
            }
        };
        for kind in kinds {
            self.problems.push(Problem { line: Some(self.line), file_name: file_name.clone(), kind });
        }
        bytes.clear();
        self.partial = bytes;
    }

    /// A usable row, or all that is wrong with the line.
    fn row(&mut self, line: &[u8], named: &mut Option<String>) -> Result<Row, Vec<ProblemKind>> {
        let object = match serde_json::from_slice(line) {
            Ok(Value::Object(object)) => object,
            Ok(other) => return Err(vec![ProblemKind::MalformedJson(format!("the line holds {}", type_of(&other)))]),
            Err(error) => return Err(vec![ProblemKind::MalformedJson(error.to_string().replace("line 1 column", "column"))]),
        };
        let mut problems = Vec::new();
        let file_name = match string(&object, FILE_NAME) {
            Ok(name) => {
                let name = name.strip_prefix("./").unwrap_or(name);
                *named = Some(name.to_owned());
                let first = self.first_lines.get(name).copied();
                match (unsafe_path(name), first) {
                    (Some(why), _) => {
                        problems.push(ProblemKind::UnsafePath(why));
                        None
                    }
                    (None, Some(first)) => {
                        problems.push(ProblemKind::Duplicate { first });
                        None
                    }
                    (None, None) => {
                        self.first_lines.insert(name.to_owned(), self.line);
                        Some(name.to_owned())
                    }
                }
            }
            Err(kind) => {
                problems.push(kind);
                None
            }
        };
        let caption = string(&object, &self.caption_column).map_err(|kind| problems.push(kind));
        match (file_name, caption) {
            (Some(file_name), Ok(caption)) => Ok(Row { line: self.line, file_name, caption: caption.to_owned() }),
            _ => Err(problems),
        }
    }
}

/// A string that is not blank.
fn string<'a>(object: &'a serde_json::Map<String, Value>, key: &str) -> Result<&'a str, ProblemKind> {
    match object.get(key) {
        None => Err(ProblemKind::MissingKey(key.to_owned())),
        Some(Value::String(text)) if text.trim().is_empty() => Err(ProblemKind::Empty(key.to_owned())),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(ProblemKind::NotAString { key: key.to_owned(), found: type_of(other) }),
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Why a name is no clean relative path.
fn unsafe_path(name: &str) -> Option<&'static str> {
    let drive = name.as_bytes().first_chunk::<2>().is_some_and(|[letter, colon]| letter.is_ascii_alphabetic() && *colon == b':');
    if name.starts_with('/') || drive {
        Some("it is absolute")
    } else if name.contains('\\') {
        Some("it has a backslash; separate folders with \"/\"")
    } else if name.chars().any(char::is_control) {
        Some("it has a control character")
    } else if name.split('/').any(|segment| segment == "..") {
        Some("it has a segment \"..\"")
    } else if name.split('/').any(|segment| segment.is_empty() || segment == ".") {
        Some("it has an empty segment or a segment \".\"")
    } else if name.len() > 1024 {
        Some("it is longer than 1024 bytes")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &[u8]) -> Metadata {
        // In pieces of every small size the result is the same.
        let read = |size: usize| {
            let mut parser = MetadataParser::new("caption");
            text.chunks(size).for_each(|piece| parser.push(piece));
            parser.finish()
        };
        let whole = read(text.len().max(1));
        for size in [1, 2, 3, 7] {
            let other = read(size);
            assert_eq!((&other.rows, &other.problems, other.digest), (&whole.rows, &whole.problems, whole.digest));
        }
        assert_eq!(whole.digest, finetune_common::digest::sha256(text));
        whole
    }

    #[test]
    fn reads_rows_with_sub_folders_other_keys_crlf_bom_blank_lines_and_no_last_newline() {
        let text =
            "\u{feff}{\"file_name\": \"a.png\", \"caption\": \"ein Hund läuft\", \"x\": [1]}\r\n\n  \n{\"caption\": \" c \", \"file_name\": \"./sub/b c.jpg\"}";
        let metadata = parse(text.as_bytes());
        assert!(metadata.problems.is_empty(), "{}", metadata.problems);
        let rows: Vec<_> = metadata.rows.iter().map(|r| (r.line, r.file_name.as_str(), r.caption.as_str())).collect();
        assert_eq!(rows, [(1, "a.png", "ein Hund läuft"), (4, "sub/b c.jpg", " c ")]);
    }

    #[test]
    fn every_problem_is_found_at_once_with_its_line() {
        let lines: Vec<(&[u8], &str)> = vec![
            (br#"{"file_name": "ok.png", "caption": "c"}"#, ""),
            (br#"{"file_name": "x.png", "caption": "c""#, "line 2: not a JSON object: EOF while parsing an object at column 37"),
            (b"[1]", "line 3: not a JSON object: the line holds a list"),
            (b"\xff\xfe", "line 4: not a JSON object: expected value at column 1"),
            (br#"{"caption": "c"}"#, "line 5: key \"file_name\" is missing"),
            (br#"{"file_name": "y.png"}"#, "line 6: \"y.png\": key \"caption\" is missing"),
            (br#"{"file_name": "z.png", "caption": ""}"#, "line 7: \"z.png\": \"caption\" is empty"),
            (br#"{"file_name": "w.png", "caption": "  "}"#, "line 8: \"w.png\": \"caption\" is empty"),
            (br#"{"file_name": "v.png", "caption": null}"#, "line 9: \"v.png\": \"caption\" must be a string, not null"),
            (
                br#"{"file_name": 7, "caption": 8}"#,
                "line 10: \"file_name\" must be a string, not a number\nline 10: \"caption\" must be a string, not a number",
            ),
            (br#"{"file_name": "ok.png", "caption": "d"}"#, "line 11: \"ok.png\": already named on line 1"),
            (br#"{"file_name": "./ok.png", "caption": "d"}"#, "line 12: \"ok.png\": already named on line 1"),
            (br#"{"file_name": "../up.png", "caption": "d"}"#, "line 13: \"../up.png\": the path must stay in the dataset's folder: it has a segment \"..\""),
            (
                br#"{"file_name": "a/../../up.png", "caption": "d"}"#,
                "line 14: \"a/../../up.png\": the path must stay in the dataset's folder: it has a segment \"..\"",
            ),
            (br#"{"file_name": "/etc/passwd", "caption": "d"}"#, "line 15: \"/etc/passwd\": the path must stay in the dataset's folder: it is absolute"),
            (br#"{"file_name": "C:\\a.png", "caption": "d"}"#, "line 16: \"C:\\\\a.png\": the path must stay in the dataset's folder: it is absolute"),
            (
                br#"{"file_name": "a\\b.png", "caption": "d"}"#,
                "line 17: \"a\\\\b.png\": the path must stay in the dataset's folder: it has a backslash; separate folders with \"/\"",
            ),
            (
                br#"{"file_name": "a\u0000.png", "caption": "d"}"#,
                "line 18: \"a\\0.png\": the path must stay in the dataset's folder: it has a control character",
            ),
            (
                br#"{"file_name": "a//b.png", "caption": "d"}"#,
                "line 19: \"a//b.png\": the path must stay in the dataset's folder: it has an empty segment or a segment \".\"",
            ),
            (br#"{"file_name": "", "caption": "d"}"#, "line 20: \"file_name\" is empty"),
        ];
        let text: Vec<u8> = lines.iter().flat_map(|(line, _)| [*line, b"\n"].concat()).collect();
        let metadata = parse(&text);
        assert_eq!(metadata.rows.len(), 1);
        let got: Vec<String> = metadata.problems.listed().iter().map(ToString::to_string).collect();
        let want: Vec<&str> = lines.iter().flat_map(|(_, problem)| problem.lines()).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn over_long_lines_are_skipped_without_being_held() {
        let mut parser = MetadataParser::new("caption");
        parser.push(b"{\"file_name\": \"a.png\", \"caption\": \"");
        for _ in 0..40 {
            parser.push(&vec![b'x'; 1 << 16]);
            assert!(parser.partial.len() <= MAX_LINE);
        }
        parser.push(b"\"}\n{\"file_name\": \"b.png\", \"caption\": \"b\"}\n");
        parser.push(&vec![b'y'; MAX_LINE + 1]);
        let metadata = parser.finish();
        assert_eq!(metadata.rows.iter().map(|r| r.line).collect::<Vec<_>>(), [2]);
        let lines: Vec<_> = metadata.problems.listed().iter().map(|p| (p.line, p.kind.clone())).collect();
        assert_eq!(lines, [(Some(1), ProblemKind::LineTooLong { limit: MAX_LINE }), (Some(3), ProblemKind::LineTooLong { limit: MAX_LINE })]);
    }

    #[test]
    fn listed_problems_are_bounded_and_all_are_counted() {
        let text = "{}\n".repeat(2000);
        let metadata = parse(text.as_bytes());
        assert_eq!((metadata.problems.len(), metadata.problems.listed().len()), (4000, super::super::problems::MAX_LISTED));
        assert!(metadata.problems.to_string().ends_with("and 3500 more"));
    }
}
