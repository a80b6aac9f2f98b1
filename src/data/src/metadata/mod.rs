//! Metadata files: which picture has which captions. `metadata.jsonl` has a JSON object per line, `metadata.csv` a row per picture,
//! a Parquet file the pictures themselves.
//!
//! [`Rows`] takes the lines of any number of files and finds every problem in one reading. A line without a caption is not yet a problem:
//! the picture may have one elsewhere, so each [`Row`] says what became of its own.

pub mod csv;
pub mod json_lines;
pub mod parquet;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::problems::{Problem, ProblemKind, Problems, WholeFile};

/// Longest accepted line in bytes.
pub const MAX_LINE: usize = 1 << 20;

/// Most captions of one picture: each is encoded and kept.
pub const MAX_CAPTIONS: usize = 100;

/// The key of the path, relative to the metadata file's folder, unless another is asked for.
pub const FILE_NAME: &str = "file_name";

/// Other names of the key of the path, the likeliest first.
const NAMES_OF_PATHS: [&str; 14] =
    ["file_name", "image", "filename", "file", "image_file", "image_path", "file_path", "filepath", "path", "img", "image_name", "name", "picture", "url"];

/// Other names of the key of the caption, the likeliest first.
const NAMES_OF_CAPTIONS: [&str; 13] =
    ["caption", "text", "captions", "prompt", "description", "prompts", "texts", "txt", "caption_text", "text_prompt", "label", "title", "tags"];

/// Different keys that are remembered.
const MAX_KEYS: usize = 64;

/// A line that names a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The metadata file.
    pub source: Arc<str>,
    /// Its number, from 1.
    pub line: u64,
    /// Clean path relative to the dataset, `/`-separated.
    pub file_name: String,
    /// The captions, as written; or why there is none.
    pub captions: Result<Vec<String>, ProblemKind>,
}

/// The value of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Cell {
    Missing,
    Text(String),
    List(Vec<Cell>),
    /// Its type.
    Other(&'static str),
}

impl Cell {
    fn kind(&self) -> &'static str {
        match self {
            Self::Missing => "nothing",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Other(kind) => kind,
        }
    }
}

/// The keys to look for.
#[derive(Debug, Clone, Copy)]
pub struct Keys<'a> {
    /// Of the path.
    pub image: &'a str,
    /// Of the caption.
    pub caption: &'a str,
}

/// What metadata files say.
#[derive(Debug, Default)]
pub struct Rows {
    /// The lines that name a picture, in their order.
    pub rows: Vec<Row>,
    /// Lines that name none, and names that cannot be used.
    pub problems: Problems,
    /// Every clean name, also of lines that are unusable for another reason, with its first line.
    pub names: HashMap<String, u64>,
}

/// One file's part of [`Rows`].
struct Collector<'a> {
    rows: &'a mut Rows,
    source: &'a Arc<str>,
    /// Whether problems name the file.
    named: bool,
    /// Where names are relative to: "" or a path that ends with "/".
    folder: &'a str,
    keys: Keys<'a>,
    /// Rows of this file begin here.
    first: usize,
    /// Lines with keys and values.
    objects: u64,
    found: BTreeMap<String, u64>,
    /// Lines without a path: only counted, until it is known whether any line has one.
    without_path: Vec<u64>,
}

impl<'a> Collector<'a> {
    fn new(rows: &'a mut Rows, source: &'a Arc<str>, named: bool, keys: Keys<'a>) -> Self {
        let folder = source.rfind('/').map_or("", |at| &source[..=at]);
        let first = rows.rows.len();
        Self { rows, source, named, folder, keys, first, objects: 0, found: BTreeMap::new(), without_path: Vec::new() }
    }

    fn problem(&mut self, line: Option<u64>, file_name: Option<String>, kind: ProblemKind) {
        let source = self.named.then(|| Arc::clone(self.source));
        self.rows.problems.push(Problem { source, line, file_name, kind });
    }

    fn whole(&mut self, what: WholeFile) {
        self.problem(None, None, ProblemKind::WholeFile(what));
    }

    /// A line's keys, and the values of the two that matter.
    fn line<'k>(&mut self, line: u64, keys: impl Iterator<Item = &'k str>, path: &Cell, caption: Cell) {
        self.objects += 1;
        for key in keys {
            if let Some(count) = self.found.get_mut(key) {
                *count += 1;
            } else if self.found.len() < MAX_KEYS {
                self.found.insert(key.to_owned(), 1);
            }
        }
        let captions = captions(self.keys.caption, caption);
        let name = match text(self.keys.image, path) {
            Ok(name) => name.strip_prefix("./").unwrap_or(name),
            Err(kind) => {
                if matches!(kind, ProblemKind::MissingKey(_)) {
                    self.without_path.push(line);
                } else {
                    self.problem(Some(line), None, kind);
                }
                // A caption that is missing as well says little; a wrong one is worth its line.
                if let Err(kind) = captions
                    && !matches!(kind, ProblemKind::MissingKey(_))
                {
                    self.problem(Some(line), None, kind);
                }
                return;
            }
        };
        if let Some(why) = unsafe_path(name) {
            return self.problem(Some(line), Some(name.to_owned()), ProblemKind::UnsafePath(why));
        }
        let full = format!("{}{name}", self.folder);
        if let Some(first) = self.rows.names.get(&full).copied() {
            return self.problem(Some(line), Some(full), ProblemKind::Duplicate { first });
        }
        self.rows.names.insert(full.clone(), line);
        self.rows.rows.push(Row { source: Arc::clone(self.source), line, file_name: full, captions });
    }

    /// The end of the file: a key that no line has is named together with those that are there.
    fn finish(mut self) {
        let other = |key: &str, names: &[&str], setting: &str, taken: &str| {
            if self.found.contains_key(key) || self.objects == 0 {
                return None;
            }
            let candidate = names.iter().find(|name| self.found.contains_key(**name) && **name != taken);
            let keys: Vec<String> = self.found.keys().take(8).map(|key| format!("{key:?}")).collect();
            let more = if self.found.len() > keys.len() { ", ..." } else { "" };
            let value = candidate.map_or("to the right one".to_owned(), |name| (*name).to_owned());
            let setting = if candidate.is_some() { format!("{setting}: {value}") } else { format!("{setting} {value}") };
            Some(ProblemKind::OtherKeys { key: key.to_owned(), found: keys.join(", ") + more, setting })
        };
        let no_path = other(self.keys.image, &NAMES_OF_PATHS, "dataset.imageColumn", self.keys.caption);
        let no_caption = other(self.keys.caption, &NAMES_OF_CAPTIONS, "dataset.captionColumn", self.keys.image);
        if let Some(kind) = no_caption {
            for row in &mut self.rows.rows[self.first..] {
                if matches!(row.captions, Err(ProblemKind::MissingKey(_))) {
                    row.captions = Err(kind.clone());
                }
            }
            // Otherwise no row is there to carry it.
            if !self.without_path.is_empty() {
                self.problem(None, None, kind);
            }
        }
        let missing = ProblemKind::MissingKey(self.keys.image.to_owned());
        match no_path {
            Some(kind) if self.without_path.len() as u64 == self.objects => self.problem(None, None, kind),
            kind => {
                for line in std::mem::take(&mut self.without_path) {
                    self.problem(Some(line), None, kind.clone().unwrap_or_else(|| missing.clone()));
                }
            }
        }
    }
}

/// A string that is not blank.
fn text<'a>(key: &str, cell: &'a Cell) -> Result<&'a str, ProblemKind> {
    match cell {
        Cell::Missing => Err(ProblemKind::MissingKey(key.to_owned())),
        Cell::Text(text) if text.trim().is_empty() => Err(ProblemKind::Empty(key.to_owned())),
        Cell::Text(text) => Ok(text),
        other => Err(ProblemKind::NotAString { key: key.to_owned(), found: other.kind() }),
    }
}

/// One caption, or a list of them.
fn captions(key: &str, cell: Cell) -> Result<Vec<String>, ProblemKind> {
    let Cell::List(list) = cell else { return text(key, &cell).map(|text| vec![text.to_owned()]) };
    if list.is_empty() {
        return Err(ProblemKind::Empty(key.to_owned()));
    }
    if list.len() > MAX_CAPTIONS {
        return Err(ProblemKind::TooManyCaptions { found: list.len(), limit: MAX_CAPTIONS });
    }
    let not = |found| Err(ProblemKind::NotAString { key: key.to_owned(), found });
    let one = |cell: &Cell| match cell {
        Cell::Text(text) if text.trim().is_empty() => not("a list with an empty caption"),
        Cell::Text(text) => Ok(text.clone()),
        _ => not("a list of something else than strings"),
    };
    list.iter().map(one).collect()
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

/// Whether a file begins as UTF-16 text does: with a byte order mark, or with ASCII whose other bytes are zero.
pub(super) fn is_utf16(start: &[u8]) -> bool {
    let zeros = |at: usize| start.iter().skip(at).step_by(2).take(32).all(|b| *b == 0);
    start.starts_with(&[0xFF, 0xFE]) || start.starts_with(&[0xFE, 0xFF]) || (start.len() >= 4 && (zeros(0) != zeros(1)))
}

#[cfg(test)]
mod tests;
