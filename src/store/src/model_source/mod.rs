//! Base models: a folder on this machine, an object store, or the Hugging Face hub at a fixed commit.
//!
//! [`ModelFolder::fetch`] brings the files of some [`Parts`] into a local folder, so that the trainer can ask for them stage by stage:
//! only the needed files, one variant of the weights, each complete and verified before it has its name. A folder on this machine is used
//! where it is.

mod arranged;
mod hub;
mod hub_cache;
mod index;
mod look;
mod select;

use std::path::{Path, PathBuf};

use futures::TryStreamExt as _;
use sha2::{Digest as _, Sha256};

use self::arranged::Arranged;
use self::hub::{Hub, HubFile};
use self::index::ModelIndex;
use self::select::{RemoteFile, Selection};
use super::error::{StoreError, StoreErrorKind};
use super::{NoProgress, Progress, Store, StoreOptions, check_key, download};
use finetune_common::digest;

pub use look::{Found, WeightFile};
pub use select::Parts;

/// Files downloaded at a time.
const PARALLEL: usize = 4;
/// Largest index of sharded weights that is read; that of T5-XXL has 30 kB.
const MAX_INDEX_BYTES: u64 = 16 << 20;
/// Largest list of digests that is read.
const MAX_SUMS_BYTES: u64 = 4 << 20;
/// Largest table of contents that is read.
const MAX_CONTENTS_BYTES: u64 = 1 << 20;

/// Where a model is. The layout is that of diffusers: `model_index.json` and a folder per component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A folder of this machine.
    Directory(PathBuf),
    /// A prefix of an object store.
    ObjectStore {
        /// `s3://`, `gs://`, `az://` or `file://`.
        uri: String,
        /// Name of a file of lines `<sha256>  <path>` (as `sha256sum` writes them) that every file taken must be in and agree with.
        sha256_manifest: Option<String>,
    },
    /// A repository of the hub. `HF_TOKEN` and `HF_ENDPOINT` come from the environment.
    HuggingFace {
        /// `owner/name`.
        repo: String,
        /// Commit, 40 hexadecimal digits.
        revision: String,
    },
}

/// Why a model cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModelSourceError {
    /// The source cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The source was read and does not hold what is needed.
    #[error("the model at {location} cannot be used: {}", problems.join("; "))]
    Unusable {
        /// Where the model is.
        location: String,
        /// Everything that is missing or wrong, a sentence each.
        problems: Vec<String>,
    },
}

type Result<T, E = ModelSourceError> = std::result::Result<T, E>;

enum Origin {
    Directory,
    Bucket(Store),
    Hub(Hub),
}

/// A model whose files have been listed, and the folder that its files are fetched into.
pub struct ModelFolder {
    origin: Origin,
    /// Where the jobs of this machine keep what they have fetched.
    cache: PathBuf,
    folder: PathBuf,
    /// How the folder is put together, where the source's files have other names.
    arranged: Option<Arranged>,
    listing: Vec<RemoteFile>,
    /// What `model_index.json` says.
    contents: ModelIndex,
    /// For error messages.
    location: String,
    /// Where digests of local files are remembered.
    digests: digests::Remembered,
}

mod digests;

impl std::fmt::Debug for ModelFolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelFolder").field("location", &self.location).field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl ModelFolder {
    /// Lists the model's files. Files that are fetched go below `cache`, in a folder named after the commit (hub) or after the names,
    /// sizes and versions of the files (object store); jobs may share it.
    ///
    /// # Errors
    /// [`ModelSourceError`]; nothing at the location is [`StoreErrorKind::NotFound`].
    pub async fn open(source: &ModelSource, options: &StoreOptions, cache: &Path) -> Result<Self> {
        let mut folder = Self::list(source, options, cache).await?;
        folder.contents = folder.read_contents().await?;
        Ok(folder)
    }

    /// Reads `model_index.json`, a few hundred bytes. Where there is none, every selection says so.
    async fn read_contents(&self) -> Result<ModelIndex> {
        let Some(file) = self.listing.iter().find(|file| file.path == select::MODEL_INDEX) else { return Ok(ModelIndex::default()) };
        if file.size > MAX_CONTENTS_BYTES {
            return Err(self.unusable(format!("{} is larger than {MAX_CONTENTS_BYTES} bytes", file.path)));
        }
        self.bring_one(file, &NoProgress).await?;
        let path = self.folder.join(&file.path);
        let json = std::fs::read(&path).map_err(StoreError::local("read", &path))?;
        ModelIndex::parse(&json).map_err(|problem| self.unusable(format!("failed to understand {}: {problem}", file.path)))
    }

    /// Whether the model has been made to go without its third text encoder, T5.
    pub fn is_without_t5(&self) -> bool {
        select::is_without_t5(&self.listing, &self.contents)
    }

    async fn list(source: &ModelSource, options: &StoreOptions, cache: &Path) -> Result<Self> {
        let digests = digests::Remembered::new(cache);
        match source {
            ModelSource::Directory(path) => {
                let folder = std::path::absolute(path).map_err(StoreError::local("resolve", path))?;
                let listing = list_directory(&folder)?;
                Ok(Self {
                    origin: Origin::Directory,
                    cache: cache.to_path_buf(),
                    arranged: None,
                    location: folder.display().to_string(),
                    folder,
                    listing,
                    contents: ModelIndex::default(),
                    digests,
                })
            }
            ModelSource::ObjectStore { uri, sha256_manifest } => {
                let store = Store::open(uri, options)?;
                let location = store.uri().to_owned();
                let (origin, mut listing, mut folder) = match store.local_directory() {
                    Some(folder) => (Origin::Directory, list_directory(&folder)?, folder),
                    None => (Origin::Bucket(store.clone()), list_bucket(&store).await?, PathBuf::new()),
                };
                if let Some(name) = sha256_manifest {
                    let sums = store.get_limited(name, MAX_SUMS_BYTES).await?;
                    let sums = parse_sums(&sums).map_err(|problem| StoreError::corrupt(store.uri_of(name), problem))?;
                    // A file without a digest is as good as absent: it must not be used.
                    listing.retain_mut(|file| {
                        file.sha256 = sums.get(&file.path).cloned();
                        file.sha256.is_some()
                    });
                }
                if matches!(origin, Origin::Bucket(_)) {
                    // Other files of the prefix (a README, say) may change without a new download.
                    let parts: Vec<RemoteFile> = listing.iter().filter(|file| file.path.contains('/') || file.path == select::MODEL_INDEX).cloned().collect();
                    let key = fingerprint(&parts, &location);
                    folder = cache.join("models").join("object-store").join(&hex::encode(key)[..32]);
                }
                Ok(Self { origin, cache: cache.to_path_buf(), arranged: None, folder, listing, location, contents: ModelIndex::default(), digests })
            }
            ModelSource::HuggingFace { repo, revision } => {
                let hub = Hub::new(repo, revision, options)?;
                let folder = cache.join("models").join("hugging-face").join(repo.replace('/', "--")).join(revision);
                let listing = cached_listing(&hub, &folder).await?;
                Ok(Self {
                    location: hub.location(),
                    origin: Origin::Hub(hub),
                    cache: cache.to_path_buf(),
                    arranged: None,
                    folder,
                    listing,
                    contents: ModelIndex::default(),
                    digests,
                })
            }
        }
    }

    /// Makes the files of `parts` present and returns the model's folder. What is there already is not fetched again; what was cut short
    /// is resumed. May be called any number of times, also from several processes that share a cache.
    ///
    /// # Errors
    /// [`ModelSourceError`].
    pub async fn fetch(&self, parts: Parts, progress: &dyn Progress) -> Result<PathBuf> {
        let selection = self.select(parts)?;
        self.bring(&selection.files, progress).await?;
        for index in &selection.indexes {
            self.bring(&self.shards(index)?, progress).await?;
        }
        Ok(self.folder.clone())
    }

    /// The model's folder. Holds what has been fetched.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Digest of what the files of `parts` are, without fetching them: over path, size and digest (else version) of each. Where a source
    /// knows digests of content (hub, a list of digests, a folder of this machine), equal content gives equal digests wherever it is.
    ///
    /// # Errors
    /// [`ModelSourceError`].
    pub async fn fingerprint(&self, parts: Parts) -> Result<[u8; 32]> {
        let Selection { files, weights, .. } = self.select(parts)?;
        let mut all = files;
        all.extend(weights);
        all.sort_by(|a, b| a.path.cmp(&b.path));
        all.dedup();
        if matches!(self.origin, Origin::Directory) {
            use futures::StreamExt as _;

            // Collected, for a stream with a closure in it could not be spawned.
            let digests: Vec<_> = all.iter().map(|file| self.digest(file)).collect();
            let digests: Vec<[u8; 32]> = futures::stream::iter(digests).buffered(PARALLEL).try_collect().await?;
            for (file, digest) in all.iter_mut().zip(digests) {
                file.sha256 = Some(hex::encode(digest));
            }
        }
        Ok(fingerprint(&all, ""))
    }

    async fn digest(&self, file: &RemoteFile) -> Result<[u8; 32]> {
        Ok(self.digests.of(&self.path_of(&file.path)).await?)
    }

    async fn bring(&self, files: &[RemoteFile], progress: &dyn Progress) -> Result<()> {
        use futures::StreamExt as _;

        // Collected, for a stream with a closure in it could not be spawned.
        let transfers: Vec<_> = files.iter().map(|file| self.bring_one(file, progress)).collect();
        futures::stream::iter(transfers).buffer_unordered(PARALLEL).try_collect().await
    }

    /// Makes a file of the folder present: for an arranged one, the source's file and a link to it.
    async fn bring_one(&self, file: &RemoteFile, progress: &dyn Progress) -> Result<()> {
        check_key(&file.path)?;
        match &self.arranged {
            None => self.bring_to(file, self.folder.join(&file.path), progress).await,
            Some(arranged) => match arranged.source(&file.path) {
                Some(source) => {
                    let place = self.place(arranged, source);
                    self.bring_to(source, place.clone(), progress).await?;
                    Ok(arranged::link(&place, &self.folder.join(&file.path))?)
                }
                None => Ok(arranged.write(&self.folder, &file.path)?),
            },
        }
    }

    async fn bring_to(&self, file: &RemoteFile, dest: PathBuf, progress: &dyn Progress) -> Result<()> {
        let sha256 = file.sha256.as_deref().and_then(digest::from_text);
        match &self.origin {
            Origin::Directory => {
                if let Some(want) = sha256 {
                    let found = self.digests.of(&dest).await?;
                    if found != want {
                        let problem = format!("its SHA-256 is {}, not {}", hex::encode(found), hex::encode(want));
                        return Err(StoreError::corrupt(dest.display().to_string(), problem).into());
                    }
                }
                Ok(())
            }
            // A complete file has its name; its size is checked against cut-off copies by other tools.
            _ if std::fs::metadata(&dest).is_ok_and(|found| found.len() == file.size) => Ok(()),
            Origin::Bucket(store) => Ok(store.download_verified(&file.path, &dest, sha256, progress).await?),
            Origin::Hub(hub) => {
                let linked = match hub.snapshot() {
                    Some(snapshot) => hub_cache::link(snapshot, file, &dest, &self.digests).await?,
                    None => false,
                };
                if linked { Ok(()) } else { Ok(download::fetch(&HubFile { hub, file }, &dest, sha256, hub.retry(), progress).await?) }
            }
        }
    }

    fn select(&self, parts: Parts) -> Result<Selection> {
        select::select(&self.listing, &self.contents, parts, &self.location)
    }

    /// The files that an index names; the index has been fetched.
    fn shards(&self, index: &str) -> Result<Vec<RemoteFile>> {
        let path = self.folder.join(index);
        let size = std::fs::metadata(&path).map_err(StoreError::local("read the size of", &path))?.len();
        if size > MAX_INDEX_BYTES {
            return Err(self.unusable(format!("{index} is larger than {MAX_INDEX_BYTES} bytes")));
        }
        let json = std::fs::read(&path).map_err(StoreError::local("read", &path))?;
        select::shards(&json, index, &self.listing, &self.location)
    }

    fn unusable(&self, problem: String) -> ModelSourceError {
        ModelSourceError::Unusable { location: self.location.clone(), problems: vec![problem] }
    }
}

/// The hub's list of files, kept beside the commit's folder: a commit never changes, so later runs need no network.
async fn cached_listing(hub: &Hub, folder: &Path) -> Result<Vec<RemoteFile>> {
    let path = folder.with_extension("files.json");
    if let Some(listing) = std::fs::read(&path).ok().and_then(|json| serde_json::from_slice::<Vec<RemoteFile>>(&json).ok()) {
        return Ok(listing);
    }
    let listing = hub.list().await?;
    let json = serde_json::to_vec(&listing).map_err(std::io::Error::other).map_err(StoreError::local("write", &path))?;
    let parent = path.parent().unwrap_or(folder);
    std::fs::create_dir_all(parent).map_err(StoreError::local("create the directory", parent))?;
    let write =
        || tempfile::NamedTempFile::new_in(parent).and_then(|file| std::fs::write(file.path(), &json).map(|()| file)).and_then(|file| Ok(file.persist(&path)?));
    write().map_err(StoreError::local("write", &path))?;
    Ok(listing)
}

async fn list_bucket(store: &Store) -> Result<Vec<RemoteFile>> {
    let objects = store.list("").await?;
    if objects.is_empty() {
        let source = super::Cause("there is nothing below this prefix".to_owned());
        return Err(StoreError::NotFound { operation: "list the model at", location: store.uri().to_owned(), source }.into());
    }
    Ok(objects.into_iter().map(|object| RemoteFile { path: object.key, size: object.size, sha256: None, version: object.etag }).collect())
}

/// The files of a folder of this machine and of its direct sub-folders; links are followed (the hub's own cache is made of them).
fn list_directory(folder: &Path) -> Result<Vec<RemoteFile>> {
    let mut files = Vec::new();
    let top = std::fs::read_dir(folder).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            StoreError::NotFound { operation: "open the model folder", location: folder.display().to_string(), source: super::Cause(error.to_string()) }
        }
        _ => StoreError::local("list", folder)(error),
    })?;
    for entry in top {
        let path = entry.map_err(StoreError::local("list", folder))?.path();
        if !path.is_dir() {
            push_file(&mut files, folder, &path);
            continue;
        }
        for entry in std::fs::read_dir(&path).map_err(StoreError::local("list", &path))? {
            push_file(&mut files, folder, &entry.map_err(StoreError::local("list", &path))?.path());
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn push_file(files: &mut Vec<RemoteFile>, folder: &Path, path: &Path) {
    let name = path.strip_prefix(folder).ok().and_then(Path::to_str);
    if let (Some(name), Ok(metadata)) = (name, std::fs::metadata(path))
        && metadata.is_file()
    {
        files.push(RemoteFile { path: name.to_owned(), size: metadata.len(), sha256: None, version: None });
    }
}

/// Reads lines of `<64 hex digits>  <path>` (or ` *<path>`).
fn parse_sums(text: &[u8]) -> Result<std::collections::BTreeMap<String, String>, String> {
    let text = std::str::from_utf8(text).map_err(|error| format!("not UTF-8 text: {error}"))?;
    let mut sums = std::collections::BTreeMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#')) {
        let entry = line.split_once(char::is_whitespace).map(|(sum, path)| (sum, path.trim_start_matches([' ', '\t', '*'])));
        let Some((sum, path)) = entry.filter(|(sum, path)| sum.len() == 64 && digest::from_text(sum).is_some() && !path.is_empty()) else {
            return Err(format!("line {} is not of the form \"<SHA-256 in hexadecimal>  <path>\"", number + 1));
        };
        sums.insert(path.strip_prefix("./").unwrap_or(path).to_owned(), sum.to_ascii_lowercase());
    }
    Ok(sums)
}

fn fingerprint(files: &[RemoteFile], location: &str) -> [u8; 32] {
    let mut hasher = Sha256::new();
    let mut field = |text: &str| {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    };
    field(location);
    for file in files {
        field(&file.path);
        field(&file.size.to_string());
        field(file.sha256.as_deref().or(file.version.as_deref()).unwrap_or_default());
    }
    hasher.finalize().into()
}

impl ModelSourceError {
    /// The class of failure of the source, when it is one.
    pub fn store_kind(&self) -> Option<StoreErrorKind> {
        match self {
            Self::Store(error) => Some(error.kind()),
            Self::Unusable { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NoProgress;

    fn write(folder: &Path, path: &str, content: &str) {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn model(folder: &Path) {
        for (path, content) in [
            ("model_index.json", "{}"),
            ("vae/config.json", "{}"),
            ("vae/diffusion_pytorch_model.safetensors", "weights"),
            ("vae/diffusion_pytorch_model.fp16.safetensors", "half"),
        ] {
            write(folder, path, content);
        }
    }

    #[tokio::test]
    async fn a_folder_is_used_where_it_is() {
        let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        model(dir.path());
        let source = ModelSource::Directory(dir.path().to_path_buf());
        let folder = ModelFolder::open(&source, &StoreOptions::default(), cache.path()).await.unwrap();
        assert_eq!(folder.fetch(Parts::VAE, &NoProgress).await.unwrap(), dir.path());
        let error = folder.fetch(Parts::TRANSFORMER, &NoProgress).await.unwrap_err();
        assert!(error.to_string().contains("no folder transformer/"), "{error}");
        let missing = ModelSource::Directory(dir.path().join("none"));
        let error = ModelFolder::open(&missing, &StoreOptions::default(), cache.path()).await.unwrap_err();
        assert_eq!(error.store_kind(), Some(StoreErrorKind::NotFound));
    }

    #[tokio::test]
    async fn the_fingerprint_follows_the_content_of_what_is_selected_only() {
        let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let print = async || {
            let source = ModelSource::Directory(dir.path().to_path_buf());
            ModelFolder::open(&source, &StoreOptions::default(), cache.path()).await.unwrap().fingerprint(Parts::VAE).await.unwrap()
        };
        model(dir.path());
        let first = print().await;
        assert_eq!(print().await, first);
        write(dir.path(), "vae/diffusion_pytorch_model.fp16.safetensors", "other");
        write(dir.path(), "README.md", "other");
        assert_eq!(print().await, first);
        write(dir.path(), "vae/diffusion_pytorch_model.safetensors", "Weights");
        assert_ne!(print().await, first);
    }

    #[tokio::test]
    async fn a_list_of_digests_is_held_against_a_mapped_folder() {
        let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        model(dir.path());
        let sum = |path: &str| format!("{}  {path}\n", hex::encode(digest::sha256_file(&dir.path().join(path)).unwrap()));
        let paths = ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"];
        let buckets = crate::Buckets::parse(&[format!("s3://models={}", dir.path().display())]).unwrap();
        let options = StoreOptions { buckets, ..StoreOptions::default() };
        let source = ModelSource::ObjectStore { uri: "s3://models/".into(), sha256_manifest: Some("SHA256SUMS".into()) };
        let fetch = async || ModelFolder::open(&source, &options, cache.path()).await?.fetch(Parts::VAE, &NoProgress).await;

        assert_eq!(fetch().await.unwrap_err().store_kind(), Some(StoreErrorKind::NotFound));
        std::fs::write(dir.path().join("SHA256SUMS"), paths.map(sum).concat()).unwrap();
        assert_eq!(fetch().await.unwrap(), std::fs::canonicalize(dir.path()).unwrap());
        write(dir.path(), paths[2], "WEIGHTS");
        assert_eq!(fetch().await.unwrap_err().store_kind(), Some(StoreErrorKind::Corrupt));
        std::fs::write(dir.path().join("SHA256SUMS"), paths.map(sum)[..2].concat()).unwrap();
        assert!(fetch().await.unwrap_err().to_string().contains("no weights"), "a file without a digest must not be used");
    }

    #[test]
    fn lists_of_digests_are_read_as_sha256sum_writes_them() {
        let sum = "AB".repeat(32);
        let text = format!("# made by hand\n{sum}  ./vae/a b.json\n\n{sum} *x\n");
        let sums = parse_sums(text.as_bytes()).unwrap();
        assert_eq!(sums.keys().collect::<Vec<_>>(), ["vae/a b.json", "x"]);
        assert_eq!(sums["x"], "ab".repeat(32));
        for bad in ["abc  x", sum.as_str(), &format!("{}  x", "zz".repeat(32))] {
            assert!(parse_sums(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
