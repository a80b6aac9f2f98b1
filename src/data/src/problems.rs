//! What is wrong with a dataset: all of it at once, each with its line.

use std::fmt;

/// Problems that are listed; more are only counted.
pub const MAX_LISTED: usize = 500;

/// One unusable line, row or file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
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
    /// The line is no JSON object.
    #[error("not a JSON object: {0}")]
    MalformedJson(String),
    /// The line is longer than is accepted.
    #[error("the line is longer than {limit} bytes")]
    LineTooLong {
        /// The limit.
        limit: usize,
    },
    /// A key is missing.
    #[error("key {0:?} is missing")]
    MissingKey(String),
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
    /// The path is not a clean relative path.
    #[error("the path must stay in the dataset's folder: {0}")]
    UnsafePath(&'static str),
    /// A name occurs again.
    #[error("already named on line {first}")]
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
    /// A picture that no line names.
    #[error("no line of the metadata file names this picture")]
    NoRow,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if let Some(name) = &self.file_name {
            write!(f, "{name:?}: ")?;
        }
        write!(f, "{}", self.kind)
    }
}

/// Problems in the order of their lines; those without a line come last, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems {
    listed: Vec<Problem>,
    total: u64,
}

impl Problems {
    /// Adds a problem; beyond [`MAX_LISTED`] it is only counted.
    pub fn push(&mut self, problem: Problem) {
        self.total += 1;
        if self.listed.len() < MAX_LISTED {
            self.listed.push(problem);
        }
    }

    /// Adds all of `other`.
    pub fn append(&mut self, other: Self) {
        let unlisted = other.total - other.listed.len() as u64;
        other.listed.into_iter().for_each(|problem| self.push(problem));
        self.total += unlisted;
        self.listed.sort_by(|a, b| (a.line.is_none(), a.line, &a.file_name).cmp(&(b.line.is_none(), b.line, &b.file_name)));
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.total
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// The first [`MAX_LISTED`].
    pub fn listed(&self) -> &[Problem] {
        &self.listed
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} problem{}", self.total, if self.total == 1 { "" } else { "s" })?;
        for problem in &self.listed {
            write!(f, "\n  {problem}")?;
        }
        match self.total - self.listed.len() as u64 {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}
