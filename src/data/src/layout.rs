//! What the files of a folder are to a dataset: metadata files, pictures, captions in text files. Decided by names alone.
//!
//! Hidden files and folders (a segment that begins with ".") are nothing. Beside a folder `train/` at the top, the folders of
//! other splits are left alone, by the names that the `datasets` library gives splits.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use icu_normalizer::ComposingNormalizerBorrowed;

use super::captions::Names;
use super::shard::is_shard;

/// Endings of files that are taken for pictures when no line names them.
pub(super) const PICTURE_ENDINGS: [&str; 14] = ["png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl"];

/// Endings of caption files beside a picture; the first that exists is read.
const TEXT_ENDINGS: [&str; 2] = ["txt", "caption"];

/// Metadata files that are looked for where none is named.
pub(super) const METADATA_FILES: [&str; 2] = ["metadata.jsonl", "metadata.csv"];

/// Top folders, and beginnings of the names of Parquet files, that hold the training split.
const TRAIN: [&str; 2] = ["train", "training"];
/// Top folders that hold other splits.
const OTHER_SPLITS: [&str; 8] = ["validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"];

/// The form of a metadata file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    JsonLines,
    Csv,
}

/// Why a folder's files cannot be distinguished.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{first:?} and {second:?} are both there: set dataset.metadataFile to the one with the captions")]
pub struct Ambiguous {
    /// A metadata file.
    pub first: String,
    /// Another in the same folder.
    pub second: String,
}

/// See the module's documentation. Keys are relative to the dataset.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// All files with their sizes: a line of a metadata file may name any of them.
    pub(super) sizes: BTreeMap<String, u64>,
    /// Metadata files, by name.
    pub(super) metadata: Vec<(Arc<str>, Format)>,
    /// Files that are pictures by their ending.
    pub(super) pictures: BTreeSet<String>,
    /// Splits that are left alone, with the number of their pictures.
    pub(super) other_splits: BTreeMap<String, u64>,
    /// Parquet files that hold the pictures; only where there are no files of pictures or captions.
    pub(super) shards: Vec<Arc<str>>,
    /// Parquet files of other splits.
    pub(super) other_shards: Names,
    /// Parquet files that are not read, as there are files of pictures or captions.
    pub(super) unread_shards: Names,
    /// Keys by their composed form, where that is another.
    composed: HashMap<String, String>,
}

impl Layout {
    /// Sorts the listed files. `metadata_file` is the one that was asked for.
    pub(super) fn new(listed: impl IntoIterator<Item = (String, u64)>, metadata_file: Option<&str>) -> Result<Self, Ambiguous> {
        let sizes: BTreeMap<String, u64> = listed.into_iter().collect();
        let mut layout = Self::default();
        let top = |key: &str, names: &[&str]| key.split_once('/').is_some_and(|(first, _)| names.contains(&first));
        let splits = sizes.keys().any(|key| top(key, &TRAIN));
        let mut folders: BTreeMap<String, String> = BTreeMap::new();
        for key in sizes.keys() {
            let composed = compose(key);
            if composed != *key {
                layout.composed.insert(composed, key.clone());
            }
            if is_hidden(key) {
                continue;
            }
            if splits && top(key, &OTHER_SPLITS) {
                let folder = key.split('/').next().unwrap_or_default();
                *layout.other_splits.entry(folder.to_owned()).or_default() += u64::from(is_picture(key));
                continue;
            }
            let (folder, name) = key.rsplit_once('/').map_or(("", key.as_str()), |(folder, name)| (folder, name));
            let wanted = metadata_file.map_or_else(|| METADATA_FILES.contains(&name), |wanted| wanted == name);
            if is_shard(key) && (wanted || metadata_file.is_none()) {
                layout.shards.push(Arc::from(key.as_str()));
            } else if wanted {
                if let Some(first) = folders.insert(folder.to_owned(), key.clone()) {
                    return Err(Ambiguous { first, second: key.clone() });
                }
                let format = if ending(key).as_deref() == Some("csv") { Format::Csv } else { Format::JsonLines };
                layout.metadata.push((Arc::from(key.as_str()), format));
            } else if is_picture(key) {
                layout.pictures.insert(key.clone());
            }
        }
        layout.sizes = sizes;
        layout.choose_shards();
        Ok(layout)
    }

    /// Parquet files are the dataset where nothing else is; of several splits, the training split.
    fn choose_shards(&mut self) {
        if !self.pictures.is_empty() || !self.metadata.is_empty() {
            std::mem::take(&mut self.shards).iter().for_each(|shard| self.unread_shards.add(shard));
            return;
        }
        let split = |shard: &str, names: &[&str]| {
            let file = shard.rsplit('/').next().unwrap_or(shard);
            let name = file.split(['-', '.', '_']).next().unwrap_or(file);
            names.contains(&name)
        };
        if self.shards.iter().any(|shard| split(shard, &TRAIN)) {
            let (others, train) = std::mem::take(&mut self.shards).into_iter().partition(|shard| split(shard, &OTHER_SPLITS));
            self.shards = train;
            let others: Vec<Arc<str>> = others;
            others.iter().for_each(|shard| self.other_shards.add(shard));
        }
    }

    /// Whether problems have to name the file that they are in.
    pub(super) fn has_several_files(&self) -> bool {
        self.metadata.len() + self.shards.len() > 1
    }

    /// The file of this name, or of its other Unicode form: macOS decomposes "ü", and people and programs compose it.
    pub(super) fn find(&self, name: &str) -> Option<&str> {
        if let Some((key, _)) = self.sizes.get_key_value(name) {
            return Some(key);
        }
        let composed = compose(name);
        self.sizes.get_key_value(&composed).map(|(key, _)| key.as_str()).or_else(|| self.composed.get(&composed).map(String::as_str))
    }

    /// Caption files beside a picture, in the order in which they are looked at.
    pub(super) fn texts(&self, picture: &str) -> Vec<&str> {
        let stem = ending(picture).map_or(picture, |ending| &picture[..picture.len() - ending.len() - 1]);
        TEXT_ENDINGS.iter().filter_map(|ending| self.sizes.get_key_value(&format!("{stem}.{ending}"))).map(|(key, _)| key.as_str()).collect()
    }

    /// All files that could hold a picture's caption.
    pub(super) fn all_texts(&self) -> impl Iterator<Item = &str> {
        let is_text = |key: &&str| !is_hidden(key) && ending(key).is_some_and(|ending| TEXT_ENDINGS.contains(&ending.as_str()));
        self.sizes.keys().map(String::as_str).filter(is_text)
    }

    /// What is there, for people whose dataset lacks captions.
    pub(super) fn found(&self) -> Found {
        let tables = ["jsonl", "json", "csv", "ndjson"];
        let mut others: BTreeMap<String, (u64, String)> = BTreeMap::new();
        let mut candidates = Vec::new();
        for key in self.sizes.keys().filter(|key| !self.pictures.contains(*key) && !is_hidden(key)) {
            let ending = ending(key).unwrap_or_default();
            if tables.contains(&ending.as_str()) && candidates.len() < 4 {
                candidates.push(key.clone());
            }
            others.entry(ending).or_insert_with(|| (0, key.clone())).0 += 1;
        }
        Found { pictures: self.pictures.len() as u64, candidates, others }
    }
}

/// What a folder holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Pictures by their ending.
    pictures: u64,
    /// Files that may hold captions.
    candidates: Vec<String>,
    /// Other files by ending: how many, and the first.
    others: BTreeMap<String, (u64, String)>,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pictures == 0 && self.others.is_empty() {
            return f.write_str("nothing is stored there");
        }
        let others: Vec<String> = self
            .others
            .iter()
            .map(|(ending, (count, first))| match (ending.as_str(), count) {
                (_, 1) => format!("{first:?}"),
                ("", _) => format!("{count} files without ending, such as {first:?}"),
                _ => format!("{count} .{ending} files, such as {first:?}"),
            })
            .take(6)
            .collect();
        match self.pictures {
            0 => f.write_str("it holds no pictures")?,
            1 => f.write_str("it holds 1 picture")?,
            pictures => write!(f, "it holds {pictures} pictures")?,
        }
        if !others.is_empty() {
            write!(f, "{} {}", if self.pictures == 0 { ", but" } else { " and" }, others.join(", "))?;
        }
        if self.others.contains_key("parquet") {
            f.write_str("; Parquet files are read only where no pictures and metadata files lie beside them")?;
        }
        match self.candidates.as_slice() {
            [] => Ok(()),
            [only] if !only.contains('/') => write!(f, "; if the captions are in {only:?}, set dataset.metadataFile: {only}"),
            [first, ..] => write!(f, "; if captions are in one of them, such as {first:?}, set dataset.metadataFile to its name"),
        }
    }
}

/// The part after the last "." of a name, in lower case.
fn ending(key: &str) -> Option<String> {
    let name = key.rsplit('/').next().unwrap_or(key);
    name.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase())
}

fn is_picture(key: &str) -> bool {
    ending(key).is_some_and(|ending| PICTURE_ENDINGS.contains(&ending.as_str()))
}

fn is_hidden(key: &str) -> bool {
    key.split('/').any(|segment| segment.starts_with('.'))
}

fn compose(text: &str) -> String {
    if text.is_ascii() { text.to_owned() } else { ComposingNormalizerBorrowed::new_nfc().normalize(text).into_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(keys: &[&str], metadata_file: Option<&str>) -> Result<Layout, Ambiguous> {
        Layout::new(keys.iter().map(|key| ((*key).to_owned(), 1)), metadata_file)
    }

    fn metadata(layout: &Layout) -> Vec<&str> {
        layout.metadata.iter().map(|(key, _)| &**key).collect()
    }

    #[test]
    fn metadata_files_are_found_in_every_folder_and_by_name() {
        let keys = ["a.png", "metadata.jsonl", "b/metadata.csv", "b/c.PNG", "captions.jsonl", ".cache/metadata.jsonl", "x/.h.png"];
        let found = layout(&keys, None).unwrap();
        assert_eq!(metadata(&found), ["b/metadata.csv", "metadata.jsonl"]);
        assert_eq!(found.metadata.iter().map(|(_, format)| *format).collect::<Vec<_>>(), [Format::Csv, Format::JsonLines]);
        assert_eq!(found.pictures.iter().collect::<Vec<_>>(), ["a.png", "b/c.PNG"]);
        assert_eq!(metadata(&layout(&keys, Some("captions.jsonl")).unwrap()), ["captions.jsonl"]);
        let error = layout(&["x/metadata.jsonl", "x/metadata.csv"], None).unwrap_err();
        assert!(error.to_string().contains("\"x/metadata.csv\" and \"x/metadata.jsonl\""), "{error}");
        assert_eq!(metadata(&layout(&["x/metadata.jsonl", "x/metadata.csv"], Some("metadata.csv")).unwrap()), ["x/metadata.csv"]);
    }

    #[test]
    fn other_splits_are_left_alone_only_beside_a_training_split() {
        let found = layout(&["train/a.png", "test/b.png", "test/c.png", "val/metadata.jsonl", "more/test/d.png"], None).unwrap();
        assert_eq!(found.pictures.iter().collect::<Vec<_>>(), ["more/test/d.png", "train/a.png"]);
        assert_eq!((&found.other_splits, found.metadata.len()), (&[("test".to_owned(), 2), ("val".to_owned(), 0)].into(), 0));
        assert_eq!(found.find("test/b.png"), Some("test/b.png"));
        let found = layout(&["test/b.png", "x.png"], None).unwrap();
        assert_eq!((found.pictures.len(), found.other_splits.len()), (2, 0));
    }

    #[test]
    fn parquet_files_are_the_dataset_where_nothing_else_is() {
        let shards = |keys: &[&str], file: Option<&str>| -> Vec<String> { layout(keys, file).unwrap().shards.iter().map(ToString::to_string).collect() };
        let hub = ["README.md", "data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"];
        assert_eq!(shards(&hub, None), hub[2..]);
        assert_eq!(layout(&hub, None).unwrap().other_shards.to_string(), "\"data/test-00000-of-00001.parquet\"");
        assert_eq!(shards(&["default/train/0000.parquet", "default/train/0001.PARQUET"], None).len(), 2);
        assert_eq!(shards(&["train/0000.parquet", "test/0000.parquet"], None), ["train/0000.parquet"]);
        assert_eq!(shards(&["a.parquet", "test-1.parquet"], None).len(), 2);
        assert_eq!(shards(&["a.parquet", "b.parquet"], Some("b.parquet")), ["b.parquet"]);
        for beside in ["a.png", "metadata.jsonl"] {
            let found = layout(&["a.parquet", beside], None).unwrap();
            assert_eq!((found.shards.len(), found.unread_shards.to_string().as_str()), (0, "\"a.parquet\""));
        }
    }

    #[test]
    fn caption_files_share_the_pictures_name() {
        let keys = ["a.tar.png", "a.tar.txt", "a.txt", "s/b.jpg", "s/b.caption", "s/b.txt", "b.txt", "noending"];
        let found = layout(&keys, None).unwrap();
        assert_eq!(found.texts("a.tar.png"), ["a.tar.txt"]);
        assert_eq!(found.texts("s/b.jpg"), ["s/b.txt", "s/b.caption"]);
        assert_eq!(found.texts("noending"), Vec::<&str>::new());
        assert_eq!(found.all_texts().count(), 5);
    }

    #[test]
    fn names_match_in_either_unicode_form() {
        let (composed, decomposed) = ("M\u{fc}ller.png", "Mu\u{308}ller.png");
        for on_disk in [composed, decomposed] {
            let found = layout(&[on_disk, "plain.png"], None).unwrap();
            assert_eq!([composed, decomposed].map(|name| found.find(name)), [Some(on_disk); 2]);
            assert_eq!(found.find("Muller.png"), None);
        }
        // Where both are there, each name means its own file.
        let found = layout(&[composed, decomposed], None).unwrap();
        assert_eq!([composed, decomposed].map(|name| found.find(name)), [Some(composed), Some(decomposed)]);
    }

    #[test]
    fn what_is_there_is_said() {
        let text = |keys: &[&str]| layout(keys, None).unwrap().found().to_string();
        assert_eq!(text(&[]), "nothing is stored there");
        assert!(text(&["a.png", "metadata.parquet"]).contains("Parquet files are read only where no pictures"));
        assert_eq!(text(&["a.zip", "b.zip", "README"]), "it holds no pictures, but \"README\", 2 .zip files, such as \"a.zip\"");
        assert_eq!(
            text(&["a.png", "captions.json"]),
            "it holds 1 picture and \"captions.json\"; if the captions are in \"captions.json\", set dataset.metadataFile: captions.json"
        );
    }
}
