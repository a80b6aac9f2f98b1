//! Which files of a model are needed. Pure.

use std::collections::BTreeMap;

use super::ModelSourceError;
use super::index::{Listed, ModelIndex};

/// Parts of a Stable Diffusion 3 model in diffusers' folder layout. Combine with `|`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts(u8);

impl Parts {
    /// `model_index.json` alone, which every selection holds.
    pub const NONE: Self = Self(0);
    /// `tokenizer`, `tokenizer_2`, `tokenizer_3`.
    pub const TOKENIZERS: Self = Self(1);
    /// `text_encoder`, `text_encoder_2`, `text_encoder_3`.
    pub const TEXT_ENCODERS: Self = Self(2);
    /// `vae`.
    pub const VAE: Self = Self(4);
    /// `transformer`.
    pub const TRANSFORMER: Self = Self(8);
    /// `scheduler`.
    pub const SCHEDULER: Self = Self(16);
    /// Everything.
    pub const ALL: Self = Self(31);

    /// True when every part of `other` is in `self`.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for Parts {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A file that a source offers.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct RemoteFile {
    /// Path relative to the model's folder, `/`-separated.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 in hexadecimal, where the source knows it.
    pub sha256: Option<String>,
    /// Something that changes with the content, where the source knows it.
    pub version: Option<String>,
}

struct Component {
    folder: &'static str,
    part: Parts,
    /// Holds weights, not just text files.
    weights: bool,
    /// A model may leave it out: Stable Diffusion 3 runs without T5.
    optional: bool,
}

const fn component(folder: &'static str, part: Parts, weights: bool, optional: bool) -> Component {
    Component { folder, part, weights, optional }
}

const COMPONENTS: [Component; 9] = [
    component("tokenizer", Parts::TOKENIZERS, false, false),
    component("tokenizer_2", Parts::TOKENIZERS, false, false),
    component("tokenizer_3", Parts::TOKENIZERS, false, true),
    component("text_encoder", Parts::TEXT_ENCODERS, true, false),
    component("text_encoder_2", Parts::TEXT_ENCODERS, true, false),
    component("text_encoder_3", Parts::TEXT_ENCODERS, true, true),
    component("vae", Parts::VAE, true, false),
    component("transformer", Parts::TRANSFORMER, true, false),
    component("scheduler", Parts::SCHEDULER, false, false),
];

/// The model's table of contents, at the top of its folder.
pub(super) const MODEL_INDEX: &str = "model_index.json";

/// What to take of one selection.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Selection {
    /// Files to take in any case, sorted.
    pub files: Vec<RemoteFile>,
    /// Indexes of sharded weights (among `files`): each names further files of its folder.
    pub indexes: Vec<String>,
    /// All weight files that the selection may take, sorted; those of an index among them.
    pub weights: Vec<RemoteFile>,
}

/// Selects the files of `parts` in `listing`; `contents` is what `model_index.json` says.
///
/// # Errors
/// Every part that is missing or has no usable weights, at once.
pub(super) fn select(listing: &[RemoteFile], contents: &ModelIndex, parts: Parts, location: &str) -> Result<Selection, ModelSourceError> {
    let (selection, problems) = select_present(listing, contents, parts);
    if problems.is_empty() { Ok(selection) } else { Err(ModelSourceError::Unusable { location: location.to_owned(), problems }) }
}

/// Selects what there is of the files of `parts`, and names every part that is missing or has no usable weights.
pub(super) fn select_present(listing: &[RemoteFile], contents: &ModelIndex, parts: Parts) -> (Selection, Vec<String>) {
    let mut selection = Selection::default();
    let Some(index) = listing.iter().find(|file| file.path == MODEL_INDEX) else { return (selection, vec![no_index(listing)]) };
    selection.files.push(index.clone());
    let mut problems = Vec::new();
    for component in COMPONENTS.iter().filter(|component| parts.contains(component.part)) {
        let files = in_folder(listing, component.folder);
        let listed = contents.part(component.folder);
        if component.optional && (listed == Some(&Listed::LeftOut) || (listed.is_none() && files.is_empty())) {
            continue;
        }
        if files.is_empty() {
            problems.push(match (component.optional, listed) {
                (true, Some(Listed::As(class))) => format!(
                    "it has no folder {folder}/, which {MODEL_INDEX} lists ({class}): fetch it too, or, to go without T5, write \"text_encoder_3\": [null, null] and \
                     \"tokenizer_3\": [null, null] in {MODEL_INDEX}",
                    folder = component.folder
                ),
                _ => format!("it has no folder {}/", component.folder),
            });
            continue;
        }
        let config = |name: &&str| {
            let index = name.contains(".safetensors.index.") || name.contains(".bin.index.");
            ending(name) == "json" && !index && !name.starts_with("flax_")
        };
        // SentencePiece's own file only where it is needed: it holds what tokenizer.json does.
        let tokens = |name: &&str| **name == *"merges.txt" || (**name == *"spiece.model" && !files.contains_key("tokenizer.json"));
        let texts = files.keys().filter(|name| config(name) || tokens(name));
        selection.files.extend(texts.filter_map(|name| files.get(name)).map(|file| (*file).clone()));
        if component.weights
            && let Err(problem) = take_weights(&files, component.folder, &mut selection)
        {
            problems.push(problem);
        }
    }
    selection.files.sort_by(|a, b| a.path.cmp(&b.path));
    selection.weights.sort_by(|a, b| a.path.cmp(&b.path));
    (selection, problems)
}

/// What a folder without a table of contents is instead, and what to do.
fn no_index(listing: &[RemoteFile]) -> String {
    let mut problem = format!("it has no {MODEL_INDEX}; a model in diffusers' folder layout is needed");
    let has = |ending: &str| listing.iter().find(|file| file.path.to_ascii_lowercase().ends_with(ending)).map(|file| file.path.as_str());
    if let Some(below) = listing.iter().find_map(|file| file.path.strip_suffix(MODEL_INDEX)?.strip_suffix('/')) {
        problem = format!("{problem}: there is one in its folder {below}/, so name that");
    } else if listing.iter().any(|file| file.path == "refs/main") {
        problem += ": this is the hub's cache of a repository, whose folder snapshots/<commit>/ holds the model";
    } else if let Some(file) = has(".gguf") {
        problem = format!("{problem}; {file} is quantised (GGUF), which is not read");
    } else if let Some(file) = has(".safetensors") {
        problem = format!("{problem}; single files such as {file} are not read (names of repositories with folders often end in -diffusers)");
    } else {
        problem += " (names of such repositories often end in -diffusers)";
    }
    problem
}

/// Whether the model leaves T5 out: by its table of contents, or, where that does not mention it, for lack of its folder.
pub(super) fn is_without_t5(listing: &[RemoteFile], contents: &ModelIndex) -> bool {
    const FOLDER: &str = "text_encoder_3";
    match contents.part(FOLDER) {
        Some(Listed::LeftOut) => true,
        Some(Listed::As(_)) => false,
        None => in_folder(listing, FOLDER).is_empty(),
    }
}

/// What follows the last dot of a file's name.
fn ending(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(_, ending)| ending)
}

/// The folder of a path; nothing at the top.
pub(super) fn folder_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// The files directly in `folder`, by name.
fn in_folder<'a>(listing: &'a [RemoteFile], folder: &str) -> BTreeMap<&'a str, &'a RemoteFile> {
    let below = listing.iter().filter_map(|file| Some((file.path.strip_prefix(folder)?.strip_prefix('/')?, file)));
    below.filter(|(name, _)| !name.contains('/') && !name.starts_with('.')).collect()
}

/// A weight file's name: `model.fp16-00001-of-00002.safetensors` has stem `model`, variant `fp16`, shard (1, 2).
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct WeightName<'a> {
    stem: &'a str,
    variant: &'a str,
    shard: Option<(u32, u32)>,
}

fn weight_name(name: &str) -> Option<WeightName<'_>> {
    let base = name.strip_suffix(".safetensors")?;
    let (rest, mut shard) = split_shard(base);
    let (stem, variant) = rest.split_once('.').unwrap_or((rest, ""));
    // The old form has the variant last: model-00001-of-00002.fp16.
    let stem = if shard.is_none() {
        let (stem, numbers) = split_shard(stem);
        shard = numbers;
        stem
    } else {
        stem
    };
    matches!(stem, "model" | "diffusion_pytorch_model").then_some(WeightName { stem, variant, shard })
}

/// A name without its `-00001-of-00002`, and those numbers.
fn split_shard(base: &str) -> (&str, Option<(u32, u32)>) {
    let split = base.len().checked_sub("-00001-of-00002".len()).filter(|at| base.is_char_boundary(*at)).and_then(|at| {
        let (number, count) = base[at..].strip_prefix('-')?.split_once("-of-")?;
        Some((&base[..at], (number.parse().ok()?, count.parse().ok()?)))
    });
    split.map_or((base, None), |(rest, numbers)| (rest, Some(numbers)))
}

/// One variant of a component's weights: the one without a name, else `fp16`, else the first by name; one file rather than shards.
fn take_weights(files: &BTreeMap<&str, &RemoteFile>, folder: &str, selection: &mut Selection) -> Result<(), String> {
    let mut named: Vec<(WeightName<'_>, &RemoteFile)> = files.iter().filter_map(|(name, file)| Some((weight_name(name)?, *file))).collect();
    named.sort_by(|(a, _), (b, _)| {
        let rank = |name: &WeightName<'_>| (!name.variant.is_empty(), name.variant != "fp16");
        (rank(a), a).cmp(&(rank(b), b))
    });
    let Some((first, first_file)) = named.first() else {
        let other = files.keys().any(|name| [".bin", ".ckpt", ".pt", ".msgpack", ".onnx", ".h5"].iter().any(|ending| name.ends_with(ending)));
        let hint = if files.keys().any(|name| name.ends_with(".gguf")) {
            "; GGUF files, whose weights are quantised, are not read"
        } else if other {
            "; other formats (.bin, .ckpt) can run code when they are loaded and are not read"
        } else {
            ""
        };
        return Err(format!("its folder {folder}/ has no weights in safetensors format{hint}"));
    };
    let Some((_, count)) = first.shard else {
        selection.files.push((*first_file).clone());
        selection.weights.push((*first_file).clone());
        return Ok(());
    };
    // diffusers writes the variant last, transformers before; both read either.
    let index_names = match (first.stem, first.variant) {
        (stem, "") => vec![format!("{stem}.safetensors.index.json")],
        (stem, variant) => vec![format!("{stem}.safetensors.index.{variant}.json"), format!("{stem}.{variant}.safetensors.index.json")],
    };
    let index = index_names.iter().find_map(|name| files.get(name.as_str()));
    let index = index.ok_or_else(|| format!("its folder {folder}/ has weights in {count} shards but no {}", index_names.join(" or ")))?;
    selection.files.push((*index).clone());
    selection.indexes.push(index.path.clone());
    let same = |name: &WeightName<'_>| (name.stem, name.variant) == (first.stem, first.variant) && name.shard.is_some();
    selection.weights.extend(named.iter().filter(|(name, _)| same(name)).map(|(_, file)| (*file).clone()));
    Ok(())
}

/// The files that an index of shards names. `index_path` is the index's own path.
pub(super) fn shards(index: &[u8], index_path: &str, listing: &[RemoteFile], location: &str) -> Result<Vec<RemoteFile>, ModelSourceError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }

    let unusable = |problem: String| ModelSourceError::Unusable { location: location.to_owned(), problems: vec![problem] };
    let parsed: Index = serde_json::from_slice(index).map_err(|error| unusable(format!("{index_path} is no index of weights: {error}")))?;
    let files = in_folder(listing, folder_of(index_path));
    let names: std::collections::BTreeSet<&str> = parsed.weight_map.values().map(String::as_str).collect();
    if names.is_empty() {
        return Err(unusable(format!("{index_path} names no weights")));
    }
    let find = |name: &&str| {
        if !name.ends_with(".safetensors") {
            return Err(format!("{index_path} names {name:?}, which is not a safetensors file of its folder"));
        }
        // Only names that are listed directly in the folder are found, so "../" leads nowhere.
        files.get(name).map(|file| (*file).clone()).ok_or_else(|| format!("{index_path} names {name:?}, which does not exist in its folder"))
    };
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for name in &names {
        match find(name) {
            Ok(file) => found.push(file),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() { Ok(found) } else { Err(ModelSourceError::Unusable { location: location.to_owned(), problems }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(paths: &[&str]) -> Vec<RemoteFile> {
        paths.iter().map(|path| RemoteFile { path: (*path).into(), size: 1, sha256: None, version: None }).collect()
    }

    fn paths(files: &[RemoteFile]) -> Vec<&str> {
        files.iter().map(|file| file.path.as_str()).collect()
    }

    /// What their `model_index.json` says.
    fn sd3() -> ModelIndex {
        let classes = [
            ("text_encoder", "CLIPTextModelWithProjection"),
            ("text_encoder_3", "T5EncoderModel"),
            ("tokenizer_3", "T5TokenizerFast"),
            ("vae", "AutoencoderKL"),
        ];
        let json: serde_json::Map<_, _> = classes.map(|(name, class)| (name.to_owned(), serde_json::json!(["library", class]))).into_iter().collect();
        ModelIndex::parse(serde_json::Value::Object(json).to_string().as_bytes()).unwrap()
    }

    /// What the published repositories of Stable Diffusion 3 hold.
    const SD3: [&str; 38] = [
        ".gitattributes",
        "LICENSE.md",
        "README.md",
        "sd3_medium.safetensors",
        "sd3_medium_incl_clips.safetensors",
        "text_encoders/clip_g.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_2/config.json",
        "text_encoder_2/model.fp16.safetensors",
        "text_encoder_2/model.safetensors",
        "text_encoder_3/config.json",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model-00002-of-00002.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
        "text_encoder_3/model.fp16-00002-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.fp16.json",
        "text_encoder_3/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer_2/merges.txt",
        "tokenizer_2/vocab.json",
        "tokenizer_3/special_tokens_map.json",
        "tokenizer_3/spiece.model",
        "tokenizer_3/tokenizer.json",
        "tokenizer_3/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/model.onnx",
        "transformer/flax_model.msgpack",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ];

    #[test]
    fn each_part_takes_its_own_files_and_one_variant() {
        let files = listing(&SD3);
        let take = |parts| select(&files, &sd3(), parts, "x").unwrap();
        assert_eq!(paths(&take(Parts::NONE).files), ["model_index.json"]);
        assert_eq!(paths(&take(Parts::VAE).files), ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]);
        assert_eq!(
            paths(&take(Parts::TRANSFORMER | Parts::SCHEDULER).files),
            ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
        );
        let encoders = take(Parts::TEXT_ENCODERS);
        assert_eq!(
            paths(&encoders.files),
            [
                "model_index.json",
                "text_encoder/config.json",
                "text_encoder/model.safetensors",
                "text_encoder_2/config.json",
                "text_encoder_2/model.safetensors",
                "text_encoder_3/config.json",
                "text_encoder_3/model.safetensors.index.json"
            ]
        );
        assert_eq!(encoders.indexes, ["text_encoder_3/model.safetensors.index.json"]);
        assert!(paths(&encoders.weights).contains(&"text_encoder_3/model-00002-of-00002.safetensors"));
        assert!(paths(&take(Parts::TOKENIZERS).files).contains(&"tokenizer/merges.txt"));
        let pieces: Vec<&str> = SD3.iter().copied().filter(|path| *path != "tokenizer_3/tokenizer.json").collect();
        assert!(paths(&select(&listing(&pieces), &ModelIndex::default(), Parts::TOKENIZERS, "x").unwrap().files).contains(&"tokenizer_3/spiece.model"));
        assert!(
            !paths(&take(Parts::ALL).files)
                .iter()
                .any(|path| path.contains("fp16") || ending(path) == "bin" || path.contains("sd3_medium") || path.contains("spiece"))
        );
    }

    #[test]
    fn the_half_precision_variant_is_taken_where_it_is_the_only_one() {
        let half: Vec<&str> =
            SD3.iter().copied().filter(|path| !path.starts_with("text_encoder") || path.contains("fp16") || path.ends_with("config.json")).collect();
        let selection = select(&listing(&half), &sd3(), Parts::TEXT_ENCODERS, "x").unwrap();
        assert!(paths(&selection.files).contains(&"text_encoder/model.fp16.safetensors"));
        assert_eq!(selection.indexes, ["text_encoder_3/model.safetensors.index.fp16.json"]);
        assert_eq!(selection.weights.len(), 4);
    }

    #[test]
    fn t5_is_left_out_on_purpose_only_and_a_model_without_a_vae_is_none() {
        let without: Vec<&str> = SD3.iter().copied().filter(|path| !path.contains("_3/")).collect();
        for (part, class) in [(Parts::TEXT_ENCODERS, "T5EncoderModel"), (Parts::TOKENIZERS, "T5TokenizerFast")] {
            let error = select(&listing(&without), &sd3(), part, "x").unwrap_err().to_string();
            assert!(error.contains("_3/") && error.contains(class) && error.contains("[null, null]"), "{error}");
        }
        let left_out = ModelIndex::parse(br#"{"text_encoder_3": [null, null], "tokenizer_3": [null, null]}"#).unwrap();
        for contents in [&left_out, &ModelIndex::default()] {
            assert_eq!(select(&listing(&without), contents, Parts::TEXT_ENCODERS | Parts::TOKENIZERS, "x").unwrap().indexes, [""; 0]);
        }
        // The folder is there, and the model says that it is not used.
        assert_eq!(select(&listing(&SD3), &left_out, Parts::ALL, "x").unwrap().indexes, [""; 0]);
        let without: Vec<&str> = SD3.iter().copied().filter(|path| !path.starts_with("vae/")).collect();
        assert!(select(&listing(&without), &sd3(), Parts::VAE, "x").unwrap_err().to_string().contains("vae/"));
        assert!(select(&listing(&["sd3.safetensors"]), &sd3(), Parts::VAE, "x").unwrap_err().to_string().contains("model_index.json"));
        let pickled = listing(&["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.bin"]);
        assert!(select(&pickled, &sd3(), Parts::VAE, "x").unwrap_err().to_string().contains(".bin"));
        let no_index: Vec<&str> = SD3.iter().copied().filter(|path| !path.ends_with(".index.json")).collect();
        assert!(select(&listing(&no_index), &sd3(), Parts::TEXT_ENCODERS, "x").unwrap_err().to_string().contains("model.safetensors.index.json"));
    }

    #[test]
    fn every_part_that_is_missing_is_named() {
        let few: Vec<&str> = SD3.iter().copied().filter(|path| !path.starts_with("vae/") && !path.starts_with("scheduler/")).collect();
        let error = select(&listing(&few), &ModelIndex::default(), Parts::ALL, "x").unwrap_err().to_string();
        assert!(error.contains("no folder vae/") && error.contains("no folder scheduler/"), "{error}");
    }

    #[test]
    fn what_is_no_model_folder_gets_a_hint() {
        for (paths, part) in [
            (&["README.md"][..], "-diffusers"),
            (&["sd3_medium.safetensors", "README.md"], "sd3_medium.safetensors"),
            (&["sd3.5_medium-Q4_0.gguf"], "GGUF"),
            (&["tiny-sd3/model_index.json", "tiny-sd3/README.md"], "in its folder tiny-sd3/"),
            (&["refs/main"], "snapshots/<commit>/"),
        ] {
            let error = select(&listing(paths), &ModelIndex::default(), Parts::ALL, "x").unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let quantised = ["model_index.json", "transformer/config.json", "transformer/sd3.gguf"];
        assert!(select(&listing(&quantised), &ModelIndex::default(), Parts::TRANSFORMER, "x").unwrap_err().to_string().contains("GGUF"));
    }

    #[test]
    fn old_names_of_shards_and_indexes_are_known() {
        let old = [
            "model_index.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
            "transformer/diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
            "transformer/diffusion_pytorch_model.fp16.safetensors.index.json",
        ];
        let selection = select(&listing(&old), &ModelIndex::default(), Parts::TRANSFORMER, "x").unwrap();
        assert_eq!((selection.indexes, selection.weights.len()), (vec![old[4].to_owned()], 2));
    }

    #[test]
    fn an_index_decides_on_the_shards_and_cannot_leave_its_folder() {
        let files = listing(&SD3);
        let path = "text_encoder_3/model.safetensors.index.json";
        let index = br#"{"metadata": {}, "weight_map": {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"}}"#;
        let found = shards(index, path, &files, "x").unwrap();
        assert_eq!(paths(&found), ["text_encoder_3/model-00001-of-00002.safetensors", "text_encoder_3/model-00002-of-00002.safetensors"]);
        for bad in ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "model-00003-of-00002.safetensors", "config.json"] {
            let index = format!(r#"{{"weight_map": {{"a": "{bad}"}}}}"#);
            assert!(shards(index.as_bytes(), path, &files, "x").is_err(), "{bad}");
        }
        assert!(shards(b"{}", path, &files, "x").is_err());
        assert!(shards(br#"{"weight_map": {}}"#, path, &files, "x").is_err());
    }

    #[test]
    fn names_of_weight_files_are_taken_apart() {
        let name = |stem, variant, shard| Some(WeightName { stem, variant, shard });
        assert_eq!(weight_name("model.safetensors"), name("model", "", None));
        assert_eq!(weight_name("model.fp16.safetensors"), name("model", "fp16", None));
        assert_eq!(weight_name("diffusion_pytorch_model.fp16-00001-of-00002.safetensors"), name("diffusion_pytorch_model", "fp16", Some((1, 2))));
        assert_eq!(weight_name("model-00001-of-00002.fp16.safetensors"), name("model", "fp16", Some((1, 2))));
        for other in ["model.bin", "adapter.safetensors", "modelé-0001-of-0002.safetensors", "model.safetensors.index.json"] {
            assert_eq!(weight_name(other), None, "{other}");
        }
    }
}
