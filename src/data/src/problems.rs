//! What is wrong with a dataset: all of it at once, equal problems folded into one line with their number and the first places.

use std::fmt;
use std::sync::Arc;

use super::shard::{is_shard, row_of_name};

/// Problems of one kind that are held; more are only counted.
const HELD_PER_KIND: usize = 20;

/// Kinds that are held; more are only counted.
const MAX_KINDS: usize = 200;

/// Problems of one kind that get a line each; more are folded into one line.
const UNFOLDED: u64 = 3;

/// One unusable line, row or file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The metadata file, where there are several.
    pub source: Option<Arc<str>>,
    /// Line of the metadata file, from 1; none for a file without a line.
    pub line: Option<u64>,
    /// The picture's name where it is known.
    pub file_name: Option<String>,
    /// What is wrong.
    pub kind: ProblemKind,
}

/// The kinds of problem.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProblemKind {
    /// The whole file has another form than its name promises.
    #[error("{0}")]
    WholeFile(WholeFile),
    /// The line is no JSON object.
    #[error("not a JSON object: {0}")]
    MalformedJson(String),
    /// A row of a table is not as wide as its header.
    #[error("the row has {found} columns, the header {expected}")]
    Columns {
        /// Columns of the row.
        found: usize,
        /// Columns of the header.
        expected: usize,
    },
    /// The text is not UTF-8.
    #[error("not UTF-8 (Latin-1 or Windows-1252?): save the file as UTF-8")]
    NotUtf8,
    /// The line is longer than is accepted.
    #[error("the line is longer than {limit} bytes")]
    LineTooLong {
        /// The limit.
        limit: usize,
    },
    /// A key is missing.
    #[error("key {0:?} is missing")]
    MissingKey(String),
    /// No line has the key; others are there.
    #[error("key {key:?} is missing on every line; the keys are {found}: set {setting}")]
    OtherKeys {
        /// The key.
        key: String,
        /// The keys that are there.
        found: String,
        /// The setting that would use one of them.
        setting: String,
    },
    /// A column of a Parquet file holds no pictures.
    #[error("the column {key:?} holds {found}: it must hold bytes, or a struct with \"bytes\", of one picture each (dataset.imageColumn names another column)")]
    NotPictures {
        /// The column.
        key: String,
        /// What it holds.
        found: &'static str,
    },
    /// A Parquet file cannot be read, or a part of it.
    #[error("the Parquet file cannot be read: {0}")]
    Shard(String),
    /// A Parquet file cannot be read any further.
    #[error("the Parquet file cannot be read from this row on: {0}")]
    ShardFrom(String),
    /// A row of a Parquet file has no bytes of a picture.
    #[error("the row has no bytes of a picture, and files that it only names are not read: write the pictures into the Parquet file, as push_to_hub does")]
    NoBytes,
    /// The value is no string.
    #[error("{key:?} must be a string, not {found}")]
    NotAString {
        /// The key.
        key: String,
        /// The value's type.
        found: &'static str,
    },
    /// The value is empty or blank.
    #[error("{0:?} is empty")]
    Empty(String),
    /// Too many captions for one picture.
    #[error("{found} captions; at most {limit} are accepted")]
    TooManyCaptions {
        /// How many there are.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// The path is not a clean relative path.
    #[error("the path must stay in the dataset's folder: {0}")]
    UnsafePath(&'static str),
    /// A name occurs again.
    #[error("already named on line {first} (several captions of one picture are a list on one line)")]
    Duplicate {
        /// Line of the first occurrence.
        first: u64,
    },
    /// No such file.
    #[error("the file does not exist")]
    MissingFile,
    /// The file is larger than is accepted.
    #[error("the file has {size} bytes; at most {limit} are accepted")]
    FileTooLarge {
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// The file is no usable picture.
    #[error("not a usable picture: {0}")]
    Undecodable(String),
    /// A picture that no line names, without a text file.
    #[error("no caption: no line of the metadata file names the picture, no .txt stands beside it, and dataset.caption is not set")]
    NoRow,
    /// A picture without a text file, in a folder without a metadata file.
    #[error("no caption: no .txt stands beside the picture, and dataset.caption is not set")]
    NoText,
    /// The text file beside the picture is not usable.
    #[error("the caption file {name:?} is not usable: {why}")]
    Text {
        /// The file.
        name: String,
        /// Why.
        why: TextProblem,
    },
}

/// Why a caption file is not usable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TextProblem {
    /// It has no text.
    #[error("it is empty")]
    Empty,
    /// It is not UTF-8.
    #[error("it is not UTF-8 (Latin-1 or Windows-1252?): save it as UTF-8")]
    NotUtf8,
    /// It is UTF-16.
    #[error("it is UTF-16: save it as UTF-8")]
    Utf16,
    /// It is larger than is accepted.
    #[error("it is larger than a megabyte")]
    TooLarge,
}

/// What a whole metadata file is instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WholeFile {
    /// A Parquet file.
    #[error("it is a Parquet file with another ending: name it .parquet")]
    Parquet,
    /// UTF-16 text.
    #[error("the metadata file is UTF-16, as PowerShell's \">\" writes it: save it as UTF-8")]
    Utf16,
    /// One JSON array.
    #[error("the metadata file is one JSON array: write one object per line, without the brackets and commas around them (jq -c '.[]')")]
    JsonArray,
    /// A JSON object over several lines.
    #[error("the metadata file has its JSON objects over several lines: write each object on one line (jq -c .)")]
    PrettyJson,
    /// A table with another separator.
    #[error("the columns of the metadata file are separated by {0:?}: save it with commas")]
    Separator(char),
    /// No header.
    #[error("the metadata file has no header line that names its columns")]
    NoHeader,
    /// A table that is too large.
    #[error("the metadata file is larger than {0} bytes: split it, or write metadata.jsonl")]
    TooLarge(u64),
}

impl ProblemKind {
    /// Problems with equal keys are folded into one line.
    fn key(&self) -> String {
        match self {
            Self::MalformedJson(_) => "malformed JSON".to_owned(),
            Self::Duplicate { .. } => "duplicate".to_owned(),
            Self::FileTooLarge { .. } => "large file".to_owned(),
            Self::Text { why, .. } => format!("text {why:?}"),
            other => other.to_string(),
        }
    }
}

impl Problem {
    /// Problems are listed by file, line and name; those without a line come last.
    fn place(&self) -> (bool, Option<&str>, Option<u64>, Option<&str>) {
        (self.line.is_none(), self.source.as_deref(), self.line, self.file_name.as_deref())
    }
}

impl Problem {
    /// What `line` counts.
    fn unit(&self) -> &'static str {
        let row = self.file_name.as_deref().is_some_and(|name| row_of_name(name).is_some()) || self.source.as_deref().is_some_and(is_shard);
        if row { "row" } else { "line" }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.source, self.line) {
            (Some(source), Some(line)) => write!(f, "{source:?} {} {line}: ", self.unit())?,
            (Some(source), None) => write!(f, "{source:?}: ")?,
            (None, Some(line)) => write!(f, "{} {line}: ", self.unit())?,
            (None, None) => {}
        }
        if let Some(name) = &self.file_name {
            write!(f, "{name:?}: ")?;
        }
        write!(f, "{}", self.kind)
    }
}

/// Problems of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    key: String,
    /// The first of them, by place.
    held: Vec<Problem>,
    total: u64,
}

impl Group {
    fn sort(&mut self) {
        self.held.sort_by(|a, b| a.place().cmp(&b.place()));
        self.held.truncate(HELD_PER_KIND);
    }

    /// The lines that show the group, each with the problem that decides its place.
    fn lines(&self) -> Vec<(&Problem, String)> {
        match self.held.first() {
            Some(first) if self.total > UNFOLDED => vec![(first, self.folded(first))],
            _ => self.held.iter().map(|problem| (problem, problem.to_string())).collect(),
        }
    }

    fn folded(&self, first: &Problem) -> String {
        let shown: Vec<&Problem> = self.held.iter().take(UNFOLDED as usize).collect();
        let same_source = shown.iter().all(|problem| problem.source == first.source);
        let name = |problem: &Problem| problem.file_name.as_ref().map(|name| format!("{name:?}"));
        let place = |problem: &Problem| {
            let source = problem.source.as_ref().filter(|_| !same_source).map(|source| format!("{source:?} "));
            let line = problem.line.map(|line| line.to_string());
            let text = match (line, name(problem)) {
                (Some(line), Some(name)) => format!("{line} ({name})"),
                (Some(line), None) => line,
                (None, name) => name.unwrap_or_default(),
            };
            source.unwrap_or_default() + &text
        };
        let places: Vec<String> = shown.into_iter().map(place).collect();
        let source = first.source.as_ref().filter(|_| same_source).map(|source| format!("{source:?} ")).unwrap_or_default();
        let lines = first.line.map(|_| format!("{}s ", first.unit())).unwrap_or_default();
        format!("{source}{lines}{} and {} more: {}", places.join(", "), self.total - places.len() as u64, first.kind)
    }
}

/// Problems in the order of their lines; those without a line come last, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems {
    groups: Vec<Group>,
    total: u64,
}

impl Problems {
    /// Adds a problem. Of each kind the first ones are held, and all are counted.
    pub fn push(&mut self, problem: Problem) {
        self.add(problem.kind.key(), vec![problem], 1);
    }

    /// Adds all of `other`.
    pub fn append(&mut self, other: Self) {
        let grouped: u64 = other.groups.iter().map(|group| group.total).sum();
        self.total += other.total - grouped;
        for group in other.groups {
            self.add(group.key, group.held, group.total);
        }
    }

    fn add(&mut self, key: String, problems: Vec<Problem>, total: u64) {
        self.total += total;
        if let Some(group) = self.groups.iter_mut().find(|group| group.key == key) {
            group.total += total;
            // Problems mostly come in order; those beyond what is held are sorted away.
            group.held.extend(problems);
            if group.held.len() > 2 * HELD_PER_KIND {
                group.sort();
            }
        } else if self.groups.len() < MAX_KINDS {
            self.groups.push(Group { key, held: problems, total });
        }
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.total
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// The first ones of each kind, by place.
    pub fn listed(&self) -> Vec<Problem> {
        let mut groups = self.groups.clone();
        groups.iter_mut().for_each(Group::sort);
        let mut listed: Vec<Problem> = groups.into_iter().flat_map(|group| group.held).collect();
        listed.sort_by(|a, b| a.place().cmp(&b.place()));
        listed
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} problem{}", self.total, if self.total == 1 { "" } else { "s" })?;
        let mut groups = self.groups.clone();
        groups.iter_mut().for_each(Group::sort);
        let mut lines: Vec<(&Problem, String)> = groups.iter().flat_map(Group::lines).collect();
        lines.sort_by(|a, b| a.0.place().cmp(&b.0.place()));
        for (_, line) in lines {
            write!(f, "\n  {line}")?;
        }
        match self.total - groups.iter().map(|group| group.total).sum::<u64>() {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more of other kinds"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(line: u64, name: Option<&str>, kind: ProblemKind) -> Problem {
        Problem { source: None, line: Some(line), file_name: name.map(str::to_owned), kind }
    }

    #[test]
    fn up_to_three_of_a_kind_have_a_line_each_and_more_are_folded() {
        let mut problems = Problems::default();
        for line in (1..=2000).rev() {
            problems.push(problem(line, None, ProblemKind::MissingKey("caption".into())));
        }
        for line in [5, 7] {
            problems.push(problem(line, Some("a.png"), ProblemKind::MissingFile));
        }
        for (line, column) in [(3000, 1), (3001, 2), (3002, 3), (3003, 4)] {
            problems.push(problem(line, None, ProblemKind::MalformedJson(format!("column {column}"))));
        }
        for name in ["z.png", "b.png", "c.png", "a.png"] {
            problems.push(Problem { source: None, line: None, file_name: Some(name.into()), kind: ProblemKind::NoText });
        }
        assert_eq!(problems.len(), 2010);
        assert_eq!(
            problems.to_string(),
            "2010 problems\n  lines 1, 2, 3 and 1997 more: key \"caption\" is missing\n  line 5: \"a.png\": the file does not exist\n  \
             line 7: \"a.png\": the file does not exist\n  lines 3000, 3001, 3002 and 1 more: not a JSON object: column 1\n  \
             \"a.png\", \"b.png\", \"c.png\" and 1 more: no caption: no .txt stands beside the picture, and dataset.caption is not set"
        );
        assert!(problems.listed().len() <= 4 * HELD_PER_KIND);
    }

    #[test]
    fn kinds_beyond_the_bound_are_counted_and_files_are_named_where_there_are_several() {
        let mut problems = Problems::default();
        for n in 0..MAX_KINDS as u64 + 9 {
            problems.push(problem(n, None, ProblemKind::Undecodable(n.to_string())));
        }
        let mut all = Problems::default();
        all.append(problems);
        assert_eq!(all.len(), MAX_KINDS as u64 + 9);
        assert!(all.to_string().ends_with("and 9 more of other kinds"), "{all}");

        let mut problems = Problems::default();
        for (source, line) in [("b/metadata.csv", 2), ("a/metadata.csv", 9), ("a/metadata.csv", 8), ("b/metadata.csv", 4)] {
            let kind = ProblemKind::MissingFile;
            problems.push(Problem { source: Some(source.into()), line: Some(line), file_name: Some("x.png".into()), kind });
        }
        let text = problems.to_string();
        assert!(text.contains("\"a/metadata.csv\" 8 (\"x.png\"), \"a/metadata.csv\" 9 (\"x.png\"), \"b/metadata.csv\" 2"), "{text}");
    }
}
