//! A look at a model before it is used: JSON files, tokenizers and the headers of weights, no values.
//!
//! Everything that a run would find wrong later is found here, all of it at once: [`check`]. What the files are and where they come from is the
//! caller's business, so that a model in a bucket or on the hub is looked at through the same code as a folder.

mod header;
mod identify;
pub(crate) mod tensors;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use serde::Deserialize;

pub use header::{Header, TensorInfo, Tensors, header};
pub use identify::{PUBLISHED, Published, name, published};

use super::layout::{ComponentConfig, ModelDir, Part};
use super::mmdit::MmditConfig;
use super::text::{CaptionTokenizer, ClipConfig, T5Config};
use super::vae::VaeConfig;
use super::weights::TensorMap;

/// What a model is.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// The transformer's shape.
    pub transformer: MmditConfig,
    /// Pixels per latent pixel, each way.
    pub downscale: usize,
    /// Whether it has T5.
    pub t5: bool,
}

impl Model {
    /// The largest side of a picture, in pixels: that of the table of position embeddings.
    pub fn largest_side(&self) -> usize {
        self.transformer.pos_embed_max_size * self.transformer.patch_size * self.downscale
    }

    /// What resolutions are multiples of.
    pub fn side_step(&self) -> usize {
        self.transformer.patch_size * self.downscale
    }
}

/// Tensors of the weights of a part, in all its files, or what its files are instead.
pub type PartTensors = BTreeMap<Part, Result<Tensors, Vec<String>>>;

/// What is to be said of a pipeline of this class (`_class_name` of `model_index.json`) that is no Stable Diffusion 3; nothing of one that is.
/// Asked first: the parts of another model are others.
pub fn other_model(class: &str) -> Option<String> {
    identify::other_pipeline(class)
}

/// Looks at the JSON files and tokenizers in `dir`, and at the tensors of each part that has weights. `length` is T5's number of tokens.
///
/// # Errors
/// Every problem, one sentence each.
pub fn check(dir: &ModelDir, parts: &PartTensors, length: usize, draws: bool) -> Result<Model, Vec<String>> {
    let mut look = Look { dir, parts, problems: Vec::new() };
    let transformer = look.transformer();
    let vae: Option<VaeConfig> = look.config(Part::Vae);
    if let Some(config) = &vae {
        look.compare(Part::Vae, &tensors::vae(config, draws));
    }
    let clip = [Part::TextEncoder, Part::TextEncoder2].map(|part| {
        let config: Option<ClipConfig> = look.config(part);
        if let Some(config) = &config {
            look.compare(part, &tensors::clip(config));
        }
        config
    });
    let has_t5 = look.has(Part::TextEncoder3);
    let t5: Option<T5Config> = has_t5.then(|| look.config(Part::TextEncoder3)).flatten();
    if let Some(config) = &t5 {
        look.compare(Part::TextEncoder3, &tensors::t5(config));
    }
    look.tokenizers(has_t5, length);
    if let Err(error) = dir.scheduler() {
        look.problem(&error);
    }
    look.widths(transformer.as_ref(), vae.as_ref(), &clip, t5.as_ref());
    match (transformer, vae, look.problems.is_empty()) {
        (Some(transformer), Some(vae), true) => Ok(Model { transformer, downscale: vae.downscale(), t5: has_t5 }),
        _ => Err(look.problems),
    }
}

/// The tensors of a part whose file, with these tensors, is of another layout, under their names in diffusers; those of the file where it is not. `dir`: the part's
/// folder.
///
/// # Errors
/// A sentence without its subject, the file.
pub fn mapped(dir: &Path, tensors: Tensors) -> Result<Tensors, String> {
    let map = TensorMap::read(dir).map_err(|error| format!("cannot be read through its map: {error}"))?;
    match map {
        Some(map) => map.of(&tensors),
        None => Ok(tensors),
    }
}

struct Look<'a> {
    dir: &'a ModelDir,
    parts: &'a PartTensors,
    problems: Vec<String>,
}

impl Look<'_> {
    /// An error and its causes; paths from the model's folder on.
    fn problem(&mut self, error: &dyn Error) {
        let mut chain = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            chain = format!("{chain}: {error}");
            cause = error.source();
        }
        self.problems.push(chain.replace(&format!("{}/", self.dir.root().display()), ""));
    }

    /// Whether a part is there and used. A table of contents that cannot be read is the business of whoever lists the files.
    fn has(&self, part: Part) -> bool {
        self.dir.has(part).unwrap_or(false)
    }

    /// The configuration of a part, where that is there: a missing part is the business of whoever lists the files.
    fn config<T: ComponentConfig>(&mut self, part: Part) -> Option<T> {
        #[derive(Deserialize)]
        struct Quantisation {
            quant_method: Option<String>,
        }
        #[derive(Deserialize)]
        struct Quantised {
            quantization_config: Option<Quantisation>,
        }
        if !self.has(part) {
            return None;
        }
        if let Ok(Quantised { quantization_config: Some(how) }) = self.dir.json(part, "config.json") {
            let how = how.quant_method.unwrap_or_else(|| "a quantiser".to_owned());
            self.problems.push(format!("{}/ is quantised by {how}, which is not read: use the original weights (F16, BF16 or F32)", part.folder()));
            return None;
        }
        self.dir.config(part).map_err(|error| self.problem(&error)).ok()
    }

    fn transformer(&mut self) -> Option<MmditConfig> {
        #[derive(Deserialize)]
        struct Class {
            #[serde(rename = "_class_name", default)]
            name: String,
        }
        if let Ok(Class { name }) = self.dir.json(Part::Transformer, "config.json")
            && let Some(other) = identify::other_transformer(&name)
        {
            self.problems.push(other);
            return None;
        }
        let config: MmditConfig = self.config(Part::Transformer)?;
        self.compare(Part::Transformer, &tensors::transformer(&config));
        Some(config)
    }

    fn compare(&mut self, part: Part, wanted: &[tensors::Wanted]) {
        let problems = match self.parts.get(&part) {
            None => return,
            Some(Ok(tensors)) => tensors::compare(tensors, wanted).into_iter().map(|problem| format!("{}/ {problem}", part.folder())).collect(),
            Some(Err(problems)) => problems.clone(),
        };
        self.problems.extend(problems);
    }

    fn tokenizers(&mut self, t5: bool, length: usize) {
        let there = |part: &Part| self.has(*part);
        let mut opened: Vec<_> = [Part::Tokenizer, Part::Tokenizer2].into_iter().filter(there).map(|part| CaptionTokenizer::clip(self.dir, part)).collect();
        if t5 && there(&Part::Tokenizer3) {
            opened.push(CaptionTokenizer::t5(self.dir, length));
        }
        opened.iter().filter_map(|tokenizer| tokenizer.as_ref().err()).for_each(|error| self.problem(error));
    }

    /// Whether the parts belong together.
    fn widths(&mut self, transformer: Option<&MmditConfig>, vae: Option<&VaeConfig>, clip: &[Option<ClipConfig>; 2], t5: Option<&T5Config>) {
        let mut differ = |what: &str, one: usize, other: usize| {
            if one != other {
                self.problems.push(format!("{what} ({one} and {other}): the parts do not belong to one model"));
            }
        };
        if let (Some(transformer), Some(vae)) = (transformer, vae) {
            differ("the latents of vae/ and transformer/ have different channels", vae.latent_channels, transformer.in_channels);
        }
        if let (Some(transformer), Some(t5)) = (transformer, t5) {
            differ("text_encoder_3/ and transformer/ have different widths", t5.d_model, transformer.joint_attention_dim);
        }
        if let (Some(transformer), [Some(one), Some(two)]) = (transformer, clip) {
            let pooled = one.projection_dim + two.projection_dim;
            differ(
                "the pooled outputs of text_encoder/ and text_encoder_2/ and what transformer/ takes have different widths",
                pooled,
                transformer.pooled_projection_dim,
            );
            let states = one.hidden_size + two.hidden_size;
            if states > transformer.joint_attention_dim {
                differ("text_encoder/ and text_encoder_2/ together are wider than what transformer/ takes", states, transformer.joint_attention_dim);
            }
        }
    }
}

impl ComponentConfig for MmditConfig {
    fn check(&self) -> Result<(), String> {
        Self::check(self).map_err(|error| error.to_string())
    }
}
