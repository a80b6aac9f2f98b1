//! A model whose files have other names and places than diffusers' layout: a folder in that layout, of links to the files and of small ones that are written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use finetune_common::digest::sha256;

use super::select::{MODEL_INDEX, RemoteFile};
use super::{ModelFolder, ModelIndex, Origin, Result, fingerprint, push_file};
use crate::check_key;
use crate::error::StoreError;

/// How a folder is put together.
pub(super) struct Arranged {
    /// Files of the source by their paths in the folder.
    links: BTreeMap<String, RemoteFile>,
    /// Files with this content by their paths in the folder.
    texts: BTreeMap<String, String>,
    /// Where the source's own files are, or are fetched to.
    files: PathBuf,
}

impl Arranged {
    /// The file of the source that is at this path of the folder.
    pub(super) fn source(&self, path: &str) -> Option<&RemoteFile> {
        self.links.get(path)
    }

    /// Writes the small file of this path, where it is not there yet.
    pub(super) fn write(&self, folder: &Path, path: &str) -> Result<(), StoreError> {
        let (Some(text), dest) = (self.texts.get(path), folder.join(path)) else { return Ok(()) };
        if std::fs::read(&dest).is_ok_and(|there| there == text.as_bytes()) {
            return Ok(());
        }
        let parent = dest.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent).map_err(StoreError::local("create the directory", parent))?;
        // Of a name of its own until it is whole: other processes may do the same.
        let write = || {
            let file = tempfile::NamedTempFile::new_in(parent)?;
            std::fs::write(file.path(), text)?;
            file.persist(&dest)?;
            Ok(())
        };
        write().map_err(|error: std::io::Error| StoreError::local("write", &dest)(error))
    }
}

/// Puts a link to `file` at `dest`, where there is none yet.
pub(super) fn link(file: &Path, dest: &Path) -> Result<(), StoreError> {
    if std::fs::read_link(dest).is_ok_and(|there| there == file) {
        return Ok(());
    }
    let parent = dest.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(StoreError::local("create the directory", parent))?;
    let make = || {
        let folder = tempfile::tempdir_in(parent)?;
        let made = folder.path().join("link");
        std::os::unix::fs::symlink(file, &made)?;
        std::fs::rename(&made, dest)
    };
    make().map_err(StoreError::local("link", dest))
}

impl ModelFolder {
    /// Paths and sizes of the source's files, as they are listed.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.listing.iter().map(|file| (file.path.as_str(), file.size))
    }

    /// The size of the source's file at `path`. A folder of this machine is listed to its direct sub-folders only; a file further down is found here.
    ///
    /// # Errors
    /// If `path` is no path within the source.
    pub fn size_of(&mut self, path: &str) -> Result<Option<u64>> {
        check_key(path)?;
        if matches!(self.origin, Origin::Directory) && !self.listing.iter().any(|file| file.path == path) {
            push_file(&mut self.listing, &self.folder, &self.folder.join(path));
        }
        Ok(self.listing.iter().find(|file| file.path == path).map(|file| file.size))
    }

    /// The same model as a folder in diffusers' layout, made of `links` to files of the source and of files with the contents `texts`, both by their paths in
    /// the folder, which is in the cache. Files are fetched when their parts are asked for.
    ///
    /// # Errors
    /// If a link leads to a file that the source does not have, or the small files cannot be written.
    pub fn arranged(mut self, links: BTreeMap<String, String>, texts: BTreeMap<String, String>) -> Result<Self> {
        let find = |path: &String| self.listing.iter().find(|file| file.path == *path).cloned();
        let links = links.into_iter().map(|(at, path)| find(&path).map(|file| (at, file)).ok_or(path)).collect::<Result<BTreeMap<_, _>, _>>();
        let links = links.map_err(|path| self.unusable(format!("it has no file {path}")))?;
        let text = texts.get(MODEL_INDEX).map_or("{}", String::as_str);
        self.contents = ModelIndex::parse(text.as_bytes()).map_err(|problem| self.unusable(problem))?;
        let linked = links.iter().map(|(at, file)| RemoteFile { path: at.clone(), ..file.clone() });
        let written = texts.iter().map(|(at, text)| RemoteFile {
            path: at.clone(),
            size: text.len() as u64,
            sha256: Some(hex::encode(sha256(text.as_bytes()))),
            version: None,
        });
        let mut listing: Vec<RemoteFile> = linked.chain(written).collect();
        listing.sort_by(|a, b| a.path.cmp(&b.path));
        // Of a folder of this machine names and sizes may stay while the content changes: links always lead to what is there.
        let key = hex::encode(fingerprint(&listing, &self.location));
        let folder = self.cache.join("models").join("single-files").join(&key[..32]);
        let arranged = Arranged { links, texts, files: std::mem::replace(&mut self.folder, folder) };
        for path in arranged.texts.keys() {
            arranged.write(&self.folder, path)?;
        }
        self.listing = listing;
        self.arranged = Some(arranged);
        Ok(self)
    }

    /// Where a file of the source is, or is fetched to. One of a bucket has a folder of its own, named after what it is: its name stays when its content
    /// changes, and several jobs may use it with others beside it.
    pub(super) fn place(&self, arranged: &Arranged, file: &RemoteFile) -> PathBuf {
        match &self.origin {
            Origin::Directory | Origin::Hub(_) => arranged.files.join(&file.path),
            Origin::Bucket(_) => {
                let key = hex::encode(fingerprint(std::slice::from_ref(file), &self.location));
                let name = file.path.rsplit_once('/').map_or(file.path.as_str(), |(_, name)| name);
                self.cache.join("models").join("object-store").join(&key[..32]).join(name)
            }
        }
    }

    /// Where a file of the folder is, or will be.
    pub(super) fn path_of(&self, path: &str) -> PathBuf {
        match self.arranged.as_ref().and_then(|arranged| Some((arranged, arranged.source(path)?))) {
            Some((arranged, source)) => self.place(arranged, source),
            None => self.folder.join(path),
        }
    }

    /// What the source calls a file of the folder.
    pub fn source_of<'a>(&'a self, path: &'a str) -> &'a str {
        self.arranged.as_ref().and_then(|arranged| arranged.source(path)).map_or(path, |file| &file.path)
    }
}
