//! LoRA of the transformer: which modules, how they are named and initialised.
//!
//! A module with weight `W` [out, in] computes `y = W x + b + scale · B (A dropout(x))` with `A` [r, in], `B` [out, r] and
//! `scale = alpha / r` (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; names and semantics as peft).

mod keys;
mod merge;
mod stack;
mod state_dict;
mod target;

pub mod kohya;

pub use merge::{delta_weight, merge_into};
pub use stack::stack;
pub use state_dict::{LoraState, METADATA_KEY, Scaling, choose, metadata_json};
pub use target::{LinearSite, matches, select};

use finetune_common::rng::{Purpose, Stream};
use finetune_compute::optim::Param;

/// The prefix of every key of a transformer's LoRA.
pub const PREFIX: &str = "transformer.";

/// Target modules that together name every linear module of the transformer.
pub const EVERY_TARGET: [&str; 15] = [
    "linear_1",
    "linear_2",
    "context_embedder",
    "linear",
    "to_q",
    "to_k",
    "to_v",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_out.0",
    "to_add_out",
    "net.0.proj",
    "net.2",
    "proj_out",
];

/// What to train: rank, scale, dropout and the modules.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSpec {
    /// The rank r of every module, at least 1.
    pub rank: usize,
    /// The numerator of the scale `alpha / r`.
    pub alpha: f64,
    /// Probability in [0, 1) with which an input element of A is dropped while training.
    pub dropout: f64,
    /// Module names or suffixes, as peft's `target_modules`: `to_q`, `attn.to_q`, `ff.net.2`, `transformer_blocks.0.norm1.linear`.
    pub target_modules: Vec<String>,
}

/// Why a LoRA does not fit.
#[derive(Debug, thiserror::Error)]
pub enum LoraError {
    /// Rank, alpha or dropout out of range.
    #[error("failed to use LoRA setting {field}: {value} is not {expected}")]
    Setting {
        /// The setting.
        field: &'static str,
        /// Its value.
        value: f64,
        /// What it should be.
        expected: &'static str,
    },
    /// No target modules.
    #[error("failed to attach LoRA: the list of target modules is empty")]
    NoTargets,
    /// Targets without a module.
    #[error("failed to attach LoRA: no module of this transformer is called {}; it has {blocks} blocks, and modules are called as {examples:?}", few(targets))]
    UnmatchedTargets {
        /// The targets.
        targets: Vec<String>,
        /// Some names that exist (the last parts of module names).
        examples: Vec<String>,
        /// Blocks of the transformer.
        blocks: usize,
    },
    /// A key of a LoRA file is not understood.
    #[error("failed to understand LoRA key {key:?}: {problem}")]
    Key {
        /// The key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// A parameter is missing or has the wrong name or shape.
    #[error("failed to set LoRA parameter {name:?}: expected shape {expected:?}, got {got:?}")]
    Parameter {
        /// The parameter.
        name: String,
        /// The shape it should have.
        expected: Vec<usize>,
        /// The shape that was given; empty if there is none.
        got: Vec<usize>,
    },
    /// The LoRA file cannot be read.
    #[error("failed to read LoRA file {path}")]
    Read {
        /// The file.
        path: std::path::PathBuf,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The folder holds no LoRA file, or several.
    #[error("{path} is a folder, and {problem}")]
    Folder {
        /// The folder.
        path: std::path::PathBuf,
        /// What it holds instead.
        problem: String,
    },
    /// A LoRA to start from is not what the job trains.
    #[error("the LoRA to start from does not fit spec.training.lora: {problem}")]
    Start {
        /// What differs, and what to set.
        problem: String,
    },
    /// The configuration of the LoRA is not what diffusers and peft write.
    #[error("failed to understand the configuration of the LoRA (lora_adapter_metadata or adapter_config.json)")]
    Metadata(#[source] serde_json::Error),
}

/// The first names, and how many there are beside them: a range of blocks may stand for many.
fn few(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let more = names.len().saturating_sub(SHOWN);
    let shown = format!("{:?}", &names[..names.len() - more]);
    if more == 0 { shown } else { format!("{shown} (and {more} more)") }
}

/// LoRA on one linear module.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraModule {
    /// The module.
    pub site: LinearSite,
    /// Rank r.
    pub rank: usize,
    /// Alpha; the scale is `alpha / rank`.
    pub alpha: f64,
}

impl LoraModule {
    /// `alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Key of A.
    pub fn name_a(&self) -> String {
        format!("{PREFIX}{}.lora_A.weight", self.site.name)
    }

    /// Key of B.
    pub fn name_b(&self) -> String {
        format!("{PREFIX}{}.lora_B.weight", self.site.name)
    }

    /// Shape of A: [r, in].
    pub fn shape_a(&self) -> Vec<usize> {
        vec![self.rank, self.site.in_features]
    }

    /// Shape of B: [out, r].
    pub fn shape_b(&self) -> Vec<usize> {
        vec![self.site.out_features, self.rank]
    }
}

/// The modules of a LoRA in canonical order (that of the model's definition) and the dropout common to them.
/// Parameters come in this order, A before B.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoraLayout {
    /// The modules.
    pub modules: Vec<LoraModule>,
    /// Dropout probability before A.
    pub dropout: f64,
}

impl LoraLayout {
    /// Selects the modules of `spec` among all linear modules of a model.
    ///
    /// # Errors
    /// If a setting is out of range or a target matches no module.
    pub fn new(spec: &LoraSpec, sites: &[LinearSite]) -> Result<Self, LoraError> {
        let setting = |field, value, expected| Err(LoraError::Setting { field, value, expected });
        if spec.rank == 0 {
            return setting("rank", 0.0, "at least 1");
        }
        if !spec.alpha.is_finite() || spec.alpha <= 0.0 {
            return setting("alpha", spec.alpha, "a positive number");
        }
        if !(0.0..1.0).contains(&spec.dropout) {
            return setting("dropout", spec.dropout, "in [0, 1)");
        }
        let modules =
            select(&spec.target_modules, sites)?.into_iter().map(|i| LoraModule { site: sites[i].clone(), rank: spec.rank, alpha: spec.alpha }).collect();
        Ok(Self { modules, dropout: spec.dropout })
    }

    /// Number of trainable values.
    pub fn parameter_count(&self) -> usize {
        self.modules.iter().map(|m| m.rank * (m.site.in_features + m.site.out_features)).sum()
    }

    /// Names and shapes of the parameters in canonical order.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        self.modules.iter().flat_map(|m| [(m.name_a(), m.shape_a()), (m.name_b(), m.shape_b())]).collect()
    }

    /// Fresh parameters: A ~ N(0, (1/r)²) (peft's "gaussian"), B = 0. Each A has a random stream of its own,
    /// named by the module's place in the model, so that other targets do not change it.
    pub fn init(&self, seed: u64) -> Vec<Param> {
        let mut params = Vec::with_capacity(2 * self.modules.len());
        for module in &self.modules {
            let mut value = vec![0.0; module.rank * module.site.in_features];
            let std = 1.0 / module.rank as f64;
            let mut stream = Stream::new(seed, Purpose::LoraInit, 0, module.site.ordinal as u64);
            for x in &mut value {
                *x = (stream.normal_f64() * std) as f32;
            }
            params.push(Param { name: module.name_a(), shape: module.shape_a(), value });
            params.push(Param { name: module.name_b(), shape: module.shape_b(), value: vec![0.0; module.site.out_features * module.rank] });
        }
        params
    }

    /// Checks that `params` are this layout's parameters in canonical order.
    ///
    /// # Errors
    /// Names the first parameter that differs.
    pub fn check(&self, params: &[Param]) -> Result<(), LoraError> {
        let expected = self.parameters();
        for (i, (name, shape)) in expected.iter().enumerate() {
            let got = params.get(i).filter(|p| p.name == *name && p.shape == *shape && p.value.len() == shape.iter().product::<usize>());
            if got.is_none() {
                let got = params.iter().find(|p| p.name == *name).map(|p| p.shape.clone()).unwrap_or_default();
                return Err(LoraError::Parameter { name: name.clone(), expected: shape.clone(), got });
            }
        }
        match params.get(expected.len()) {
            Some(extra) => Err(LoraError::Parameter { name: extra.name.clone(), expected: Vec::new(), got: extra.shape.clone() }),
            None => Ok(()),
        }
    }
}
