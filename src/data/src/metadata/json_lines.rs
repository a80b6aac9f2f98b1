//! `metadata.jsonl`: one JSON object per line with a file name and a caption.
//!
//! The file is read in pieces with bounded lines, so its size does not matter. Blank lines, a byte order mark, CRLF and
//! further keys are accepted. A leading `./` of a path is dropped.

use std::sync::Arc;

use serde_json::Value;

use super::{Cell, Collector, Keys, MAX_LINE, Rows, is_utf16};
use crate::problems::{ProblemKind, WholeFile};

/// Bytes that show the encoding.
const START: usize = 64;

/// Reads a file piece by piece.
pub struct JsonLines<'a> {
    collector: Collector<'a>,
    /// The beginning of a line whose end has not come yet; cut where the line is too long.
    partial: Vec<u8>,
    too_long: bool,
    line: u64,
    /// The first bytes of the file.
    start: Vec<u8>,
    /// A line that is not blank has been read.
    begun: bool,
    /// The file is something else: what follows is not read.
    given_up: bool,
}

impl<'a> JsonLines<'a> {
    /// A parser of the file `source` that adds to `rows`. Problems name the file if `named`.
    pub fn new(rows: &'a mut Rows, source: &'a Arc<str>, named: bool, keys: Keys<'a>) -> Self {
        let collector = Collector::new(rows, source, named, keys);
        Self { collector, partial: Vec::new(), too_long: false, line: 0, start: Vec::new(), begun: false, given_up: false }
    }

    /// Reads the next piece of the file.
    pub fn push(&mut self, piece: &[u8]) {
        if self.start.len() < START {
            self.start.extend_from_slice(&piece[..piece.len().min(START - self.start.len())]);
        }
        let mut rest = piece;
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            self.extend(&rest[..end]);
            self.end_line();
            rest = &rest[end + 1..];
        }
        self.extend(rest);
    }

    /// The end of the file.
    pub fn finish(mut self) {
        if !self.partial.is_empty() || self.too_long {
            self.end_line();
        }
        self.collector.finish();
    }

    /// Bytes of an unfinished line.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.partial.len()
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
        if !self.given_up && (too_long || !bytes.iter().all(u8::is_ascii_whitespace)) {
            match self.whole_file(&bytes) {
                Some(what) if !std::mem::replace(&mut self.begun, true) => {
                    self.given_up = true;
                    self.collector.whole(what);
                }
                _ if too_long => self.collector.problem(Some(self.line), None, ProblemKind::LineTooLong { limit: MAX_LINE }),
                _ => self.object(&bytes),
            }
            self.begun = true;
        }
        bytes.clear();
        self.partial = bytes;
    }

    /// What the file is instead, seen at its first line that is not blank.
    fn whole_file(&self, line: &[u8]) -> Option<WholeFile> {
        let start = self.start.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&self.start);
        match start.trim_ascii_start().first() {
            _ if self.start.starts_with(b"PAR1") => Some(WholeFile::Parquet),
            _ if is_utf16(&self.start) => Some(WholeFile::Utf16),
            Some(b'[') => Some(WholeFile::JsonArray),
            Some(b'{') if line.trim_ascii() == b"{" => Some(WholeFile::PrettyJson),
            _ => None,
        }
    }

    fn object(&mut self, bytes: &[u8]) {
        let malformed = |why: String| ProblemKind::MalformedJson(why);
        let parsed = match std::str::from_utf8(bytes) {
            Err(_) => Err(ProblemKind::NotUtf8),
            Ok(text) => match serde_json::from_str(text) {
                Ok(Value::Object(object)) => Ok(object),
                Ok(other) => Err(malformed(format!("the line holds {}", cell(Some(other)).kind()))),
                Err(error) => Err(malformed(error.to_string().replace("line 1 column", "column"))),
            },
        };
        match parsed {
            Ok(mut object) => {
                let keys: Vec<String> = object.keys().cloned().collect();
                let path = cell(object.remove(self.collector.keys.image));
                let caption = cell(object.remove(self.collector.keys.caption));
                self.collector.line(self.line, keys.iter().map(String::as_str), &path, caption);
            }
            Err(kind) => self.collector.problem(Some(self.line), None, kind),
        }
    }
}

fn cell(value: Option<Value>) -> Cell {
    match value {
        None => Cell::Missing,
        Some(Value::Null) => Cell::Other("null"),
        Some(Value::Bool(_)) => Cell::Other("a boolean"),
        Some(Value::Number(_)) => Cell::Other("a number"),
        Some(Value::String(text)) => Cell::Text(text),
        Some(Value::Array(list)) => Cell::List(list.into_iter().map(|value| cell(Some(value))).collect()),
        Some(Value::Object(_)) => Cell::Other("an object"),
    }
}
