//! Models in single files: Stability AI's checkpoints (`sd3_medium_incl_clips.safetensors`) and ComfyUI's separate parts (`t5xxl_fp16.safetensors`), as a
//! folder in diffusers' layout without a copy of any weight.
//!
//! [`choose`] finds out which file holds which part, [`arrange`] writes what the files lack: configurations, by the shapes of the tensors; the tokenizers
//! of CLIP; and for each part a [`TensorMap`] with its tensors' names in diffusers. Pure: files are read by whoever calls.

mod configs;
mod names;
mod recognise;
mod tokenizers;

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use self::recognise::{KINDS, Kind};
use crate::layout::{ComponentConfig, Part};
use crate::mmdit::MmditConfig;
use crate::survey::{Tensors, tensors as wanted};
use crate::text::{ClipConfig, T5Config};
use crate::vae::VaeConfig;
use crate::weights::TensorMap;

/// A file of weights: its path in the model's source, and its tensors or what it is instead of complete weights.
#[derive(Debug, Clone)]
pub struct File {
    /// The path.
    pub path: String,
    /// What its header says, else a sentence without its subject.
    pub header: Result<Tensors, String>,
}

/// Which file holds which part, where the job says so, and whether it goes without T5.
#[derive(Debug, Clone, Default)]
pub struct Named {
    /// Paths in the source.
    pub files: BTreeMap<Part, String>,
    /// The tokenizer of T5: `tokenizer.json` or a model of SentencePiece.
    pub t5_tokenizer: Option<String>,
    /// No T5, whether a file has it or not.
    pub without_t5: bool,
}

/// The setting that names the file of a part.
const SETTING: &str = "spec.model.source.files";

/// The file of each part.
///
/// `files`: those that are named, or, where none is, all that might be meant.
///
/// # Errors
/// Every part that no file holds or several do, and every file that cannot be used, a sentence each.
pub fn choose<'a>(files: &'a [File], named: &Named) -> Result<BTreeMap<Part, &'a File>, Vec<String>> {
    let (mut chosen, mut problems, mut missing) = (BTreeMap::new(), Vec::new(), Vec::new());
    for kind in KINDS.iter().filter(|kind| kind.part != Part::TextEncoder3 || !named.without_t5) {
        if let Some(path) = named.files.get(&kind.part) {
            // A file that cannot be read is named below.
            let Some((file, tensors)) = files.iter().find(|file| file.path == *path).and_then(|file| Some((file, file.header.as_ref().ok()?))) else {
                continue;
            };
            match kind.prefix(tensors) {
                Some(_) => {
                    chosen.insert(kind.part, file);
                }
                None => problems.push(format!("{SETTING}.{} names {path}, which holds no {}: it is {}", kind.field, kind.what, description(tensors))),
            }
            continue;
        }
        let holders: Vec<&File> = files.iter().filter(|file| file.header.as_ref().is_ok_and(|tensors| kind.is_in(tensors))).collect();
        match &holders[..] {
            [] => missing.push(kind),
            [one] => {
                chosen.insert(kind.part, *one);
            }
            several => {
                let names: Vec<&str> = several.iter().map(|file| file.path.as_str()).collect();
                problems.push(format!("several files hold the {} ({}): name one in {SETTING}.{}", kind.what, names.join(", "), kind.field));
            }
        }
    }
    // Of files that nobody named only a lack is a reason to speak.
    let named_file = |file: &File| named.files.values().any(|path| *path == file.path);
    let broken = files.iter().filter(|file| named_file(file) || !missing.is_empty());
    problems.extend(broken.filter_map(|file| Some(format!("{} {}", file.path, file.header.as_ref().err()?))));
    if problems.is_empty() {
        problems.extend(lack(files, &missing));
    }
    if problems.is_empty() { Ok(chosen) } else { Err(problems) }
}

/// What is to be said of parts that no file holds.
fn lack(files: &[File], missing: &[&Kind]) -> Vec<String> {
    let seen = || {
        let each: Vec<String> = files.iter().filter_map(|file| Some(format!("{} is {}", file.path, description(file.header.as_ref().ok()?)))).collect();
        if each.is_empty() { "it has no safetensors file".to_owned() } else { each.join(", ") }
    };
    if missing.iter().any(|kind| kind.part == Part::Transformer) {
        return vec![format!("none of its files holds the transformer of a Stable Diffusion 3: {}", seen())];
    }
    let each = missing.iter().map(|kind| {
        let t5 = if kind.part == Part::TextEncoder3 { format!(", or set {SETTING}.withoutT5: true to train without it") } else { String::new() };
        format!("none of its files holds the {}: name a file that does in {SETTING}.{}{t5}", kind.what, kind.field)
    });
    each.collect()
}

/// What a file is, for people.
fn description(tensors: &Tensors) -> String {
    let parts: Vec<&str> = KINDS.iter().filter(|kind| kind.is_in(tensors)).map(|kind| kind.what).collect();
    match &parts[..] {
        [] if tensors.contains_key(names::CLIP_POSITIONS) => "a CLIP of another width".to_owned(),
        [] => recognise::other(tensors).to_owned(),
        parts => format!("a file with {}", parts.join(", ")),
    }
}

/// A folder in diffusers' layout that is made of single files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Arrangement {
    /// Files with this content, by their paths in the folder.
    pub texts: BTreeMap<String, String>,
    /// Files of the source, by their paths in the folder.
    pub links: BTreeMap<String, String>,
}

/// Puts the files into a folder in diffusers' layout.
///
/// `beside`: the small files (JSON, tokenizers) of a folder in diffusers' layout that the source has as well, as `transformer/config.json`: those come before
/// what is known here. `configs`: the contents of those that are called `config.json`.
///
/// # Errors
/// Everything that the files lack, a sentence each.
pub fn arrange(chosen: &BTreeMap<Part, &File>, named: &Named, beside: &[&str], configs: &BTreeMap<Part, Value>) -> Result<Arrangement, Vec<String>> {
    let (mut folder, mut problems) = (Arrangement::default(), Vec::new());
    let with_t5 = chosen.contains_key(&Part::TextEncoder3);
    for (&part, file) in chosen {
        let weights = if matches!(part, Part::Transformer | Part::Vae) { "diffusion_pytorch_model" } else { "model" };
        folder.links.insert(format!("{}/{weights}.safetensors", part.folder()), file.path.clone());
        match described(part, file, configs.get(&part)) {
            Ok((config, map)) => {
                folder.texts.insert(format!("{}/config.json", part.folder()), config.to_string());
                let json = serde_json::to_string(&map).map_err(|error| vec![error.to_string()])?;
                folder.texts.insert(format!("{}/{}", part.folder(), TensorMap::FILE), json);
            }
            Err(problem) => problems.push(format!("{} {problem}", file.path)),
        }
    }
    for (part, pad) in [(Part::Tokenizer, "<|endoftext|>"), (Part::Tokenizer2, "!")] {
        if !link(&mut folder, beside, part) {
            let files = tokenizers::clip(pad).map(|(name, text)| (format!("{}/{name}", part.folder()), text));
            folder.texts.extend(files);
        }
    }
    match &named.t5_tokenizer {
        _ if !with_t5 => {}
        Some(path) => {
            let name = if path.ends_with(".json") { "tokenizer.json" } else { "spiece.model" };
            folder.links.insert(format!("{}/{name}", Part::Tokenizer3.folder()), path.clone());
        }
        None if link(&mut folder, beside, Part::Tokenizer3) => {}
        None => problems.push(format!(
            "files of weights hold no tokenizer of T5: name its tokenizer.json or spiece.model in {SETTING}.t5Tokenizer, or set {SETTING}.withoutT5: true to \
             train without T5"
        )),
    }
    if !link(&mut folder, beside, Part::Scheduler) {
        folder.texts.insert(
            "scheduler/scheduler_config.json".into(),
            json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}).to_string(),
        );
    }
    folder.texts.insert("model_index.json".into(), contents(with_t5).to_string());
    if problems.is_empty() { Ok(folder) } else { Err(problems) }
}

/// Links the files that the source has for a part; whether there are any.
fn link(folder: &mut Arrangement, beside: &[&str], part: Part) -> bool {
    let of_part = |path: &&&str| path.strip_prefix(part.folder()).is_some_and(|rest| rest.starts_with('/'));
    let before = folder.links.len();
    folder.links.extend(beside.iter().filter(of_part).map(|path| ((*path).to_owned(), (*path).to_owned())));
    folder.links.len() > before
}

/// `model_index.json`.
fn contents(with_t5: bool) -> Value {
    let t5 = |library: &str, class: &str| if with_t5 { json!([library, class]) } else { json!([null, null]) };
    json!({
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": t5("transformers", "T5EncoderModel"),
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": t5("transformers", "T5TokenizerFast"),
    })
}

/// The configuration of a part, that of the source where it has one, and where its tensors are in the file.
fn described(part: Part, file: &File, given: Option<&Value>) -> Result<(Value, TensorMap), String> {
    let no_part = || format!("holds no {}/", part.folder());
    let tensors = file.header.as_ref().map_err(Clone::clone)?;
    let prefix = KINDS.iter().find(|kind| kind.part == part).and_then(|kind| kind.prefix(tensors)).ok_or_else(no_part)?;
    let config = match given {
        Some(config) => config.clone(),
        None => configs::infer(part, prefix, tensors)?,
    };
    let mut levels = 1;
    let wanted = match part {
        Part::Transformer => wanted::transformer(&parsed::<MmditConfig>(&config)?),
        Part::Vae => {
            let config: VaeConfig = parsed(&config)?;
            levels = config.block_out_channels.len();
            wanted::vae(&config, true)
        }
        Part::TextEncoder | Part::TextEncoder2 => wanted::clip(&parsed::<ClipConfig>(&config)?),
        Part::TextEncoder3 => wanted::t5(&parsed::<T5Config>(&config)?),
        Part::Tokenizer | Part::Tokenizer2 | Part::Tokenizer3 | Part::Scheduler => return Err(no_part()),
    };
    let names: Vec<Vec<String>> = wanted.into_iter().map(|tensor| tensor.names).collect();
    Ok((config, names::map(part, prefix, tensors, &names, levels)))
}

fn parsed<T: ComponentConfig + DeserializeOwned>(config: &Value) -> Result<T, String> {
    let config: T = T::deserialize(config).map_err(|error| format!("has no usable configuration: {error}"))?;
    config.check().map_err(|problem| format!("has no usable configuration: {problem}"))?;
    Ok(config)
}

#[cfg(test)]
mod tests;
