//! Weights of one component in diffusers layout: a single `*.safetensors` file or shards with an index, memory-mapped.
//!
//! A file of another layout is read in place through a [`TensorMap`] beside it: parts of its tensors under diffusers' names.
//!
//! Nothing is read until a tensor is asked for, and [`Weights::release`] drops its pages again, so a model larger than
//! memory can be streamed through.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use finetune_common::mmap::MappedFile;

mod map;
mod view;

pub use map::{Source, Stored, TensorMap};
pub use view::View;

/// Why weights cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file or folder cannot be read.
    #[error("failed to read {path}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The folder has no weights.
    #[error("found no weights in {dir}: expected diffusion_pytorch_model.safetensors, model.safetensors or their *.safetensors.index.json with shards")]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder has several variants, none of them the default.
    #[error("found several variants of weights in {dir} ({}): leave only one", variants.join(", "))]
    SeveralVariants {
        /// The folder.
        dir: PathBuf,
        /// Their names, as `fp16`.
        variants: Vec<String>,
    },
    /// A file is not valid safetensors: truncated, or its header contradicts its size.
    #[error("{path} is damaged or not a safetensors file: download it again")]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// An index file cannot be understood.
    #[error("failed to understand the index {path}")]
    Index {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// An index names a file that is not a plain file name beside it.
    #[error("the index {path} names the shard {shard:?}, which is not a file beside it")]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The offending name.
        shard: String,
    },
    /// There is no such tensor.
    #[error("{path} has no tensor {name:?}: the weights do not belong to this config.json")]
    MissingTensor {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        name: String,
    },
    /// A tensor has another shape than the configuration demands.
    #[error("tensor {name:?} of {path} has shape {got:?}, expected {want:?}: the weights do not belong to this config.json")]
    Shape {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// The shape in the file.
        got: Box<[usize]>,
        /// The shape demanded.
        want: Box<[usize]>,
    },
    /// A map of tensors cannot be understood, or does not fit its file.
    #[error("the map of tensors {path} cannot be used: {problem}")]
    Map {
        /// The map.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor's type is none that is read.
    #[error("tensor {name:?} of {path} is stored as {dtype}: only F16, BF16, F32 and F8_E4M3 weights can be used")]
    Dtype {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// The type in the file.
        dtype: Dtype,
    },
}

type Result<T, E = WeightsError> = std::result::Result<T, E>;

#[derive(Debug, Clone)]
struct Entry {
    place: Place,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes of the tensor within its place.
    range: Range<usize>,
    scale: f32,
}

/// Where a tensor's bytes are.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// In the file of this index.
    File(usize),
    /// Among the bytes made of others: rows in another order.
    Made(usize),
}

/// The tensors of one component, by name. See the module's documentation.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    files: Vec<MappedFile>,
    made: Vec<Vec<u8>>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl Weights {
    /// Opens the weights of the component folder `dir` (as `model/vae`).
    ///
    /// The default variant (`model.safetensors` or its index) is taken if it is there, else `fp16`, else the only other
    /// one. Every header is checked against its file's size.
    ///
    /// # Errors
    /// If there are none or several, or a file is missing, damaged or contradicts the index.
    pub fn open(dir: &Path) -> Result<Self> {
        let chosen = choose(dir)?;
        tracing::debug!(path = %chosen.display(), "opening weights");
        let weights = if chosen.extension().is_some_and(|e| e == "json") { Self::open_index(dir, &chosen) } else { Self::open_file(&chosen) }?;
        match TensorMap::read(dir)? {
            Some(map) => weights.mapped(&map),
            None => Ok(weights),
        }
    }

    /// The tensors that `map` makes of these.
    fn mapped(mut self, map: &TensorMap) -> Result<Self> {
        let path = self.path.clone();
        let wrong = |name: &str, problem: String| WeightsError::Map { path: path.clone(), problem: format!("{name:?} {problem}") };
        let mut entries = BTreeMap::new();
        for (name, source) in &map.0 {
            let entry = match source {
                Source::Identity(size) => self.make(Dtype::F32, vec![*size; 2], map::identity(*size), 1.0),
                Source::Stored(Stored { tensor, part, swap_halves, scale }) => {
                    let mut entry = self.entry(tensor)?.clone();
                    if let Some((index, count)) = *part {
                        let rows = map::part_of(&entry.shape, (index, count)).map_err(|problem| wrong(tensor, problem))?;
                        let bytes = entry.range.len() / count;
                        entry.range = entry.range.start + index * bytes..entry.range.start + (index + 1) * bytes;
                        entry.shape[0] = rows;
                    }
                    if let Some(scale) = scale {
                        let values = self.f32(scale)?;
                        let [value] = values[..] else { return Err(wrong(scale, format!("holds {} values, not one scale", values.len()))) };
                        entry.scale = value;
                    }
                    if *swap_halves {
                        map::part_of(&entry.shape, (0, 2)).map_err(|problem| wrong(tensor, problem))?;
                        let bytes = self.bytes(&entry);
                        let (first, second) = bytes.split_at(bytes.len() / 2);
                        self.make(entry.dtype, entry.shape, [second, first].concat(), entry.scale)
                    } else {
                        entry
                    }
                }
            };
            entries.insert(name.clone(), entry);
        }
        self.entries = entries;
        Ok(self)
    }

    fn make(&mut self, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>, scale: f32) -> Entry {
        let range = 0..bytes.len();
        self.made.push(bytes);
        Entry { place: Place::Made(self.made.len() - 1), dtype, shape, range, scale }
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        match entry.place {
            Place::File(file) => &self.files[file][entry.range.clone()],
            Place::Made(made) => &self.made[made][entry.range.clone()],
        }
    }

    /// Opens a single safetensors file, as a LoRA file.
    ///
    /// # Errors
    /// If the file cannot be read or its header contradicts its size.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut weights = Self { path: path.to_owned(), files: Vec::new(), made: Vec::new(), entries: BTreeMap::new(), metadata: BTreeMap::new() };
        weights.add_file(path, None)?;
        Ok(weights)
    }

    fn open_index(dir: &Path, index: &Path) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: HashMap<String, String>,
        }
        let text = std::fs::read(index).map_err(|source| WeightsError::Read { path: index.to_owned(), source })?;
        let parsed: Index = serde_json::from_slice(&text).map_err(|source| WeightsError::Index { path: index.to_owned(), source })?;
        let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, shard) in parsed.weight_map {
            let plain = Path::new(&shard).file_name().is_some_and(|f| f == shard.as_str()) && shard.ends_with(".safetensors");
            if !plain {
                return Err(WeightsError::ShardName { path: index.to_owned(), shard });
            }
            shards.entry(shard).or_default().push(name);
        }
        let mut weights = Self { path: dir.to_owned(), files: Vec::new(), made: Vec::new(), entries: BTreeMap::new(), metadata: BTreeMap::new() };
        for (shard, names) in shards {
            weights.add_file(&dir.join(shard), Some(&names))?;
        }
        if weights.entries.is_empty() {
            return Err(WeightsError::NoWeights { dir: dir.to_owned() });
        }
        Ok(weights)
    }

    /// Adds the tensors of a file, or only those of `names`, which must all be there.
    fn add_file(&mut self, path: &Path, names: Option<&[String]>) -> Result<()> {
        let map = MappedFile::open(path).map_err(|source| WeightsError::Read { path: path.to_owned(), source })?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|source| WeightsError::Safetensors { path: path.to_owned(), source })?;
        let start = header + size_of::<u64>();
        let file = self.files.len();
        // `read_metadata` compares the offsets with the file's size, but adds them up without a check of its own.
        let entry = |name: &str, info: &safetensors::tensor::TensorInfo| {
            let (first, end) = (start.checked_add(info.data_offsets.0), start.checked_add(info.data_offsets.1));
            match (first, end) {
                (Some(first), Some(end)) if first <= end && end <= map.len() => {
                    Ok(Entry { place: Place::File(file), dtype: info.dtype, shape: info.shape.clone(), range: first..end, scale: 1.0 })
                }
                _ => Err(WeightsError::Safetensors { path: path.to_owned(), source: safetensors::SafeTensorError::InvalidOffset(name.to_owned()) }),
            }
        };
        if let Some(names) = names {
            for name in names {
                let info = metadata.info(name).ok_or_else(|| WeightsError::MissingTensor { path: path.to_owned(), name: name.clone() })?;
                self.entries.insert(name.clone(), entry(name, info)?);
            }
        } else {
            for (name, info) in metadata.tensors() {
                let entry = entry(&name, info)?;
                self.entries.insert(name, entry);
            }
        }
        self.metadata.extend(metadata.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())));
        self.files.push(map);
        Ok(())
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(MappedFile::path)
    }

    /// Every tensor's name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The headers' metadata (`__metadata__`).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| WeightsError::MissingTensor { path: self.path.clone(), name: name.to_owned() })
    }

    /// The tensor as it lies in the file.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn view(&self, name: &str) -> Result<View<'_>> {
        let entry = self.entry(name)?;
        Ok(View { dtype: entry.dtype, shape: &entry.shape, bytes: self.bytes(entry), scale: entry.scale })
    }

    /// The tensor as it lies in the file, if its shape is `shape`.
    ///
    /// # Errors
    /// If there is none of this name, or its shape differs.
    pub fn view_of_shape(&self, name: &str, shape: &[usize]) -> Result<View<'_>> {
        let view = self.view(name)?;
        if view.shape == shape {
            return Ok(view);
        }
        Err(WeightsError::Shape { path: self.path.clone(), name: name.to_owned(), got: view.shape.into(), want: shape.into() })
    }

    /// The tensor's shape.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.entry(name)?.shape)
    }

    /// The tensor's values as f32.
    ///
    /// # Errors
    /// If there is none of this name, or it is not stored as f16, bf16, f32 or in the 8 bits of E4M3.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        let view = self.view(name)?;
        view.to_f32().ok_or_else(|| WeightsError::Dtype { path: self.path.clone(), name: name.to_owned(), dtype: view.dtype })
    }

    /// Asks for the pages of the tensors whose names begin with `prefix` to be read ahead. Best effort.
    pub fn will_need(&self, prefix: &str) {
        self.each(prefix, MappedFile::will_need);
    }

    /// Drops the pages of the tensors whose names begin with `prefix` from memory; they are read again when used again.
    pub fn release(&self, prefix: &str) {
        self.each(prefix, MappedFile::release);
    }

    fn each(&self, prefix: &str, apply: impl Fn(&MappedFile, Range<usize>)) {
        // Neighbours in the file are joined, so that small tensors between large ones go with them.
        let in_file = |entry: &Entry| match entry.place {
            Place::File(file) => Some((file, entry.range.clone())),
            Place::Made(_) => None,
        };
        let mut ranges: Vec<(usize, Range<usize>)> =
            self.entries.iter().filter(|(n, _)| n.starts_with(prefix)).filter_map(|(_, entry)| in_file(entry)).collect();
        ranges.sort_by_key(|(file, range)| (*file, range.start));
        let mut joined: Vec<(usize, Range<usize>)> = Vec::new();
        for (file, range) in ranges {
            match joined.last_mut() {
                Some((last_file, last)) if *last_file == file && last.end == range.start => last.end = range.end,
                _ => joined.push((file, range)),
            }
        }
        for (file, range) in joined {
            apply(&self.files[file], range);
        }
    }
}

/// The index or the single file to open in `dir`.
fn choose(dir: &Path) -> Result<PathBuf> {
    let read = |source| WeightsError::Read { path: dir.to_owned(), source };
    // Variant -> file; an index is preferred over a single file of the same variant only where the latter is absent.
    let mut found: BTreeMap<String, PathBuf> = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(read)? {
        let entry = entry.map_err(read)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((variant, is_index)) = variant_of(&name) else { continue };
        if is_index && found.contains_key(&variant) {
            continue;
        }
        found.insert(variant, entry.path());
    }
    if let Some(path) = found.remove("").or_else(|| found.remove("fp16")) {
        return Ok(path);
    }
    match found.len() {
        0 => Err(WeightsError::NoWeights { dir: dir.to_owned() }),
        1 => found.into_values().next().ok_or_else(|| WeightsError::NoWeights { dir: dir.to_owned() }),
        _ => Err(WeightsError::SeveralVariants { dir: dir.to_owned(), variants: found.into_keys().collect() }),
    }
}

/// The variant (`""` is the default) of a weight file's name, and whether it is an index; `None` for shards and other files.
///
/// diffusers writes `diffusion_pytorch_model.safetensors.index.fp16.json`; both it and transformers read
/// `model.fp16.safetensors.index.json` too.
fn variant_of(name: &str) -> Option<(String, bool)> {
    let rest = name.strip_prefix("diffusion_pytorch_model").or_else(|| name.strip_prefix("model"))?;
    let (variant, is_index) = if let Some(variant) = rest.strip_suffix(".safetensors") {
        (variant, false)
    } else if let Some(variant) = rest.strip_suffix(".safetensors.index.json") {
        (variant, true)
    } else {
        (rest.strip_prefix(".safetensors.index")?.strip_suffix(".json")?, true)
    };
    let variant = if variant.is_empty() { variant } else { variant.strip_prefix('.')? };
    let is_shard = variant.rsplit_once("-of-").is_some();
    (!is_shard).then(|| (variant.to_owned(), is_index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_compute::kernels::{Precision, StoredMatrix as _};

    fn bytes_of(tensors: &[(&str, &[f32])]) -> Vec<u8> {
        let data: Vec<(String, Vec<u8>, usize)> =
            tensors.iter().map(|(n, v)| ((*n).to_owned(), v.iter().flat_map(|x| x.to_le_bytes()).collect(), v.len())).collect();
        let views = data.iter().map(|(n, b, len)| (n.clone(), safetensors::tensor::TensorView::new(Dtype::F32, vec![*len], b).unwrap()));
        safetensors::serialize(views, None).unwrap()
    }

    fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    #[test]
    fn shards_are_read_through_the_index_and_released() {
        let index = br#"{"metadata": {"total_size": 16}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
        let dir = folder(&[
            ("model-00001-of-00002.safetensors", bytes_of(&[("a", &[1.0, 2.0])])),
            ("model-00002-of-00002.safetensors", bytes_of(&[("b", &[3.0, 4.0]), ("unlisted", &[0.0])])),
            ("model.safetensors.index.json", index.to_vec()),
            ("config.json", b"{}".to_vec()),
        ]);
        let weights = Weights::open(dir.path()).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
        weights.release("");
        assert_eq!(weights.f32("b").unwrap(), [3.0, 4.0]);
        assert!(matches!(weights.f32("c"), Err(WeightsError::MissingTensor { .. })));
        assert!(matches!(weights.view_of_shape("a", &[1, 2]), Err(WeightsError::Shape { .. })));
    }

    #[test]
    fn one_variant_is_chosen() {
        let file = |x: f32| bytes_of(&[("a", &[x])]);
        let both = folder(&[("model.fp16.safetensors", file(1.0)), ("model.safetensors", file(2.0))]);
        assert_eq!(Weights::open(both.path()).unwrap().f32("a").unwrap(), [2.0]);
        let half = folder(&[("diffusion_pytorch_model.fp16.safetensors", file(1.0))]);
        assert_eq!(Weights::open(half.path()).unwrap().f32("a").unwrap(), [1.0]);
        let unclear = folder(&[("model.x.safetensors", file(1.0)), ("model.y.safetensors", file(2.0))]);
        assert!(matches!(Weights::open(unclear.path()), Err(WeightsError::SeveralVariants { .. })));
        assert!(matches!(Weights::open(folder(&[("model.bin", vec![])]).path()), Err(WeightsError::NoWeights { .. })));
    }

    #[test]
    fn hostile_headers_and_indices_are_refused() {
        let with_header = |header: &str, body: usize| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend(vec![0; body]);
            bytes
        };
        let good = bytes_of(&[("a", &[1.0, 2.0])]);
        for bytes in [
            vec![],
            vec![1, 2, 3],
            u64::MAX.to_le_bytes().to_vec(),
            good[..good.len() - 1].to_vec(),
            [good.clone(), vec![0]].concat(),
            with_header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4),
            with_header(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}"#, 8),
            with_header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
            with_header(r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#, 0),
            with_header("not json", 8),
        ] {
            let dir = folder(&[("model.safetensors", bytes)]);
            assert!(matches!(Weights::open(dir.path()), Err(WeightsError::Safetensors { .. })));
        }
        for shard in ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin"] {
            let index = serde_json::json!({"weight_map": {"a": shard}}).to_string();
            let dir = folder(&[("model.safetensors.index.json", index.into_bytes())]);
            assert!(matches!(Weights::open(dir.path()), Err(WeightsError::ShardName { .. })), "{shard}");
        }
        let index = br#"{"weight_map": {"b": "model-00001-of-00001.safetensors"}}"#.to_vec();
        let dir = folder(&[("model.safetensors.index.json", index), ("model-00001-of-00001.safetensors", good)]);
        assert!(matches!(Weights::open(dir.path()), Err(WeightsError::MissingTensor { .. })));
    }

    #[test]
    fn half_types_convert_exactly() {
        let values: Vec<f32> = (0..5000).map(|i| (i as f32 - 2500.0) / 64.0).collect();
        let f16: Vec<u8> = values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
        let bf16: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        let ids = [0_u8; 8];
        let view = |dtype, bytes| safetensors::tensor::TensorView::new(dtype, vec![5000], bytes).unwrap();
        let tensors =
            [("h", view(Dtype::F16, &f16)), ("b", view(Dtype::BF16, &bf16)), ("ids", safetensors::tensor::TensorView::new(Dtype::I64, vec![1], &ids).unwrap())];
        let dir = folder(&[("model.safetensors", safetensors::serialize(tensors, None).unwrap())]);
        let weights = Weights::open(dir.path()).unwrap();
        assert_eq!(weights.f32("h").unwrap(), values.iter().map(|v| half::f16::from_f32(*v).to_f32()).collect::<Vec<_>>());
        assert_eq!(weights.f32("b").unwrap(), values.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect::<Vec<_>>());
        let mut part = [0.0; 3];
        assert!(weights.view("h").unwrap().read_f32(4997, &mut part) && !weights.view("h").unwrap().read_f32(4998, &mut part));
        assert!(matches!(weights.f32("ids"), Err(WeightsError::Dtype { .. })));
        let (b, ids) = (weights.view("b").unwrap(), weights.view("ids").unwrap());
        assert_eq!((b.precision(), b.shape, ids.precision()), (Some(Precision::Bf16), &[5000][..], None));
        assert_eq!(b.stored(), Some((Precision::Bf16, &bf16[..])));
    }
}
