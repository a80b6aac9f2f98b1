//! Which caption a picture has, by one rule: its line in a metadata file, else the text file beside it, else `dataset.caption`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _};

use super::layout::Layout;
use super::metadata::{MAX_LINE, Row, Rows, is_utf16};
use super::problems::{Problem, ProblemKind, Problems, TextProblem};
use finetune_store::{Store, StoreError, StoreErrorKind};

/// Text files that are read at the same time.
const PARALLEL: usize = 32;

/// Names that a notice shows.
const SHOWN: usize = 3;

/// A picture with its captions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Captioned {
    /// The file.
    pub(super) file_name: String,
    /// At least one.
    pub(super) captions: Vec<String>,
    /// Where they come from.
    pub(super) origin: Origin,
    /// The metadata file and the line that names the picture.
    pub(super) row: Option<(Arc<str>, u64)>,
}

/// Where a picture's captions come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// Its line in a metadata file.
    Row,
    /// The text file beside it.
    Text,
    /// `dataset.caption`.
    Setting,
}

/// Where the captions of the pictures come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    /// Pictures with captions from a metadata file, by file.
    pub metadata: BTreeMap<String, u64>,
    /// From text files beside the pictures.
    pub texts: u64,
    /// From `dataset.caption`.
    pub caption: u64,
    /// Pictures with more than one caption.
    pub several: u64,
}

impl fmt::Display for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<String> = match self.metadata.len() {
            0..=3 => self.metadata.iter().map(|(file, count)| format!("{count} from {file}")).collect(),
            files => vec![format!("{} from {files} metadata files", self.metadata.values().sum::<u64>())],
        };
        if self.texts > 0 {
            parts.push(format!("{} from .txt", self.texts));
        }
        if self.caption > 0 {
            parts.push(format!("{} from dataset.caption", self.caption));
        }
        write!(f, "captions: {}", parts.join(", "))?;
        match self.several {
            0 => Ok(()),
            1 => f.write_str(" (1 picture has several: one is drawn each epoch)"),
            several => write!(f, " ({several} pictures have several: one is drawn each epoch)"),
        }
    }
}

/// Something that is there and not used, or used otherwise than it may seem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Text files that belong to no picture.
    TextsWithoutPicture(Names),
    /// Text files beside pictures that have a caption already.
    UnreadTexts(Names),
    /// Text files of several lines.
    LongTexts(Names),
    /// `dataset.caption` stands in for captions that the metadata file seems to have under another key.
    OtherKeys(String),
    /// Folders of other splits, with the number of their pictures.
    OtherSplits(BTreeMap<String, u64>),
    /// Parquet files of other splits.
    OtherShards(Names),
    /// Parquet files beside pictures or metadata files.
    UnreadShards(Names),
    /// Pictures with transparent parts.
    Transparent(Names),
    /// Pictures whose captions have the trigger word that is added to them.
    TriggerTwice(Names),
    /// `dataset.captions.tagOrders` where no caption has tags to shuffle.
    NothingToShuffle,
}

/// Names of files, the first of them and their number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    first: BTreeSet<String>,
    total: u64,
}

impl Names {
    /// Adds a name.
    pub fn add(&mut self, name: &str) {
        self.total += 1;
        self.first.insert(name.to_owned());
        if self.first.len() > SHOWN {
            self.first.pop_last();
        }
    }

    /// How many were added.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Whether none was added.
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// The notice about them, if there are any.
    pub fn notice(self, kind: impl FnOnce(Self) -> Notice) -> Option<Notice> {
        (self.total > 0).then(|| kind(self))
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.first.iter().map(|name| format!("{name:?}")).collect();
        f.write_str(&names.join(", "))?;
        match self.total - self.first.len() as u64 {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |total: u64, one: &str, many: &str| if total == 1 { format!("1 {one}") } else { format!("{total} {many}") };
        match self {
            Self::TextsWithoutPicture(names) => {
                write!(f, "{} without a picture of the same name: {names}", count(names.total, "text file is", "text files are"))
            }
            Self::UnreadTexts(names) => {
                write!(
                    f,
                    "{} not read, as the pictures have captions in a metadata file or a .txt: {names}",
                    count(names.total, "caption file is", "caption files are")
                )
            }
            Self::LongTexts(names) => {
                let files = count(names.total, "caption file has several lines", "caption files have several lines");
                write!(f, "{files}; each file is one caption: {names}")
            }
            Self::OtherKeys(why) => write!(f, "dataset.caption stands in for captions: {why}"),
            Self::OtherSplits(folders) => {
                let folders: Vec<String> =
                    folders.iter().map(|(folder, pictures)| format!("{folder}/ ({})", count(*pictures, "picture", "pictures"))).collect();
                write!(f, "train/ is trained, other splits are left alone: {}", folders.join(", "))
            }
            Self::OtherShards(names) => {
                write!(
                    f,
                    "the training split is trained, {} left alone: {names}",
                    count(names.total, "Parquet file of another split is", "Parquet files of other splits are")
                )
            }
            Self::UnreadShards(names) => {
                let files = count(names.total, "Parquet file is", "Parquet files are");
                write!(f, "{files} not read, as pictures or metadata files lie beside them: {names}")
            }
            Self::Transparent(names) => write!(
                f,
                "{} transparent parts; as in the reference, alpha is dropped and the colours hidden under it are trained; \
                 flatten them onto a background if that is not meant: {names}",
                count(names.total, "picture has", "pictures have")
            ),
            Self::TriggerTwice(names) => {
                write!(f, "{} the trigger word in a caption already and get it again: {names}", count(names.total, "picture has", "pictures have"))
            }
            Self::NothingToShuffle => {
                f.write_str("dataset.captions.tagOrders has no effect: no caption has two tags, between commas, after the first keepTags")
            }
        }
    }
}

/// What a folder's captions are.
pub(super) struct Resolved {
    /// Every picture that has one.
    pub(super) pictures: Vec<Captioned>,
    pub(super) problems: Problems,
    pub(super) notices: Vec<Notice>,
}

/// A picture before its text file is read.
struct Open {
    file_name: String,
    row: Option<(Arc<str>, u64)>,
    /// Why the metadata file has no caption for it; none without a metadata file.
    reason: Option<ProblemKind>,
}

/// Gives each picture its captions. `fallback` is `dataset.caption`.
pub(super) async fn resolve(store: &Store, layout: &Layout, rows: Rows, fallback: Option<&str>) -> Result<Resolved, StoreError> {
    let Rows { rows, problems, names } = rows;
    let several_files = layout.has_several_files();
    let mut resolved = Resolved { pictures: Vec::new(), problems, notices: Vec::new() };
    let mut taken: HashMap<String, u64> = HashMap::new();
    let mut open = Vec::new();
    for Row { source, line, file_name, captions } in rows {
        let mut problem = |file_name: &str, kind| {
            let source = several_files.then(|| Arc::clone(&source));
            resolved.problems.push(Problem { source, line: Some(line), file_name: Some(file_name.to_owned()), kind });
        };
        let Some(key) = layout.find(&file_name) else {
            problem(&file_name, ProblemKind::MissingFile);
            continue;
        };
        if let Some(first) = taken.insert(key.to_owned(), line) {
            problem(&file_name, ProblemKind::Duplicate { first });
            continue;
        }
        let row = Some((source, line));
        match captions {
            Ok(captions) => resolved.pictures.push(Captioned { file_name: key.to_owned(), captions, origin: Origin::Row, row }),
            Err(reason) => open.push(Open { file_name: key.to_owned(), row, reason: Some(reason) }),
        }
    }
    // Lines that are unusable for another reason have been reported.
    let named: BTreeSet<&str> = names.keys().filter_map(|name| layout.find(name)).collect();
    for key in layout.pictures.iter().filter(|key| !taken.contains_key(*key) && !named.contains(key.as_str())) {
        let reason = (!layout.metadata.is_empty()).then_some(ProblemKind::NoRow);
        open.push(Open { file_name: key.clone(), row: None, reason });
    }

    let mut unread = Names::default();
    for picture in &resolved.pictures {
        layout.texts(&picture.file_name).into_iter().for_each(|text| unread.add(text));
    }
    for picture in &open {
        layout.texts(&picture.file_name).into_iter().skip(1).for_each(|text| unread.add(text));
    }
    let texts: Vec<_> = futures::stream::iter(open)
        .map(|picture| async move {
            let Some(name) = layout.texts(&picture.file_name).first().copied() else { return Ok::<_, StoreError>((picture, None)) };
            let text = read_text(store, name).await?;
            Ok((picture, Some((name, text))))
        })
        .buffered(PARALLEL)
        .try_collect()
        .await?;
    let (mut long, mut other_keys) = (Names::default(), None);
    for (Open { file_name, row, reason }, text) in texts {
        let text = text.map(|(name, text)| text.map_err(|why| ProblemKind::Text { name: name.to_owned(), why }));
        // A value that is there and wrong is not replaced.
        let wrong =
            matches!(reason, Some(ProblemKind::NotAString { found, .. }) if found != "null") || matches!(reason, Some(ProblemKind::TooManyCaptions { .. }));
        let (caption, origin) = match (text, fallback) {
            _ if wrong => (Err(reason.unwrap_or(ProblemKind::NoText)), Origin::Row),
            (Some(Ok(text)), _) => {
                if text.contains('\n') {
                    long.add(&file_name);
                }
                (Ok(text), Origin::Text)
            }
            (Some(Err(ProblemKind::Text { why: TextProblem::Empty, .. })) | None, Some(caption)) => {
                if let Some(kind @ ProblemKind::OtherKeys { .. }) = &reason {
                    other_keys.get_or_insert_with(|| kind.to_string());
                }
                (Ok(caption.to_owned()), Origin::Setting)
            }
            (Some(Err(kind)), _) => (Err(kind), Origin::Text),
            (None, None) => (Err(reason.unwrap_or(ProblemKind::NoText)), Origin::Setting),
        };
        match caption {
            Ok(caption) => resolved.pictures.push(Captioned { file_name, captions: vec![caption], origin, row }),
            Err(kind) => {
                let source = row.as_ref().filter(|_| several_files).map(|(source, _)| Arc::clone(source));
                resolved.problems.push(Problem { source, line: row.map(|(_, line)| line), file_name: Some(file_name), kind });
            }
        }
    }
    resolved.pictures.sort_by(|a, b| a.file_name.cmp(&b.file_name));

    let beside: BTreeSet<&str> = layout.pictures.iter().chain(taken.keys()).flat_map(|picture| layout.texts(picture)).collect();
    let mut alone = Names::default();
    layout.all_texts().filter(|text| !beside.contains(text)).for_each(|text| alone.add(text));
    let splits = (!layout.other_splits.is_empty()).then(|| Notice::OtherSplits(layout.other_splits.clone()));
    resolved.notices = [
        splits,
        layout.other_shards.clone().notice(Notice::OtherShards),
        layout.unread_shards.clone().notice(Notice::UnreadShards),
        other_keys.map(Notice::OtherKeys),
        alone.notice(Notice::TextsWithoutPicture),
        unread.notice(Notice::UnreadTexts),
        long.notice(Notice::LongTexts),
    ]
    .into_iter()
    .flatten()
    .collect();
    Ok(resolved)
}

impl Sources {
    /// Counts a picture.
    pub(super) fn count(&mut self, picture: &Captioned) {
        match (picture.origin, &picture.row) {
            (Origin::Row, Some((source, _))) => *self.metadata.entry(source.to_string()).or_default() += 1,
            (Origin::Text, _) => self.texts += 1,
            (Origin::Row | Origin::Setting, _) => self.caption += 1,
        }
        self.several += u64::from(picture.captions.len() > 1);
    }
}

/// The text of a caption file.
async fn read_text(store: &Store, name: &str) -> Result<Result<String, TextProblem>, StoreError> {
    let bytes = match store.get_limited(name, MAX_LINE as u64).await {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == StoreErrorKind::Corrupt => return Ok(Err(TextProblem::TooLarge)),
        Err(error) => return Err(error),
    };
    Ok(text(&bytes))
}

fn text(bytes: &[u8]) -> Result<String, TextProblem> {
    if is_utf16(bytes) {
        return Err(TextProblem::Utf16);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| TextProblem::NotUtf8)?;
    match text.strip_prefix('\u{feff}').unwrap_or(text).trim() {
        "" => Err(TextProblem::Empty),
        text => Ok(text.replace("\r\n", "\n")),
    }
}
