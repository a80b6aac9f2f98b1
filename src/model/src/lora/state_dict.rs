//! A LoRA as a file: diffusers' keys and metadata.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::{LinearSite, LoraError, LoraLayout, LoraModule, PREFIX};
use finetune_compute::optim::Param;

/// The header key under which diffusers keeps the adapter's configuration.
pub const METADATA_KEY: &str = "lora_adapter_metadata";

/// A LoRA read from a file.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraState {
    /// Its tensors by key (f32), as `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`.
    pub tensors: BTreeMap<String, Param>,
    /// Alpha where the file's metadata gives one; else every module's alpha is its rank.
    pub alpha: Option<f64>,
}

/// The value of `lora_adapter_metadata`: what diffusers needs to know when alpha differs from the rank.
pub fn metadata_json(rank: usize, alpha: f64, dropout: f64, target_modules: &[String]) -> String {
    let alpha = if alpha.fract() == 0.0 { serde_json::json!(alpha as i64) } else { serde_json::json!(alpha) };
    serde_json::json!({
        "transformer.r": rank,
        "transformer.lora_alpha": alpha,
        "transformer.lora_dropout": dropout,
        "transformer.target_modules": target_modules,
        "transformer.init_lora_weights": "gaussian",
        "transformer.peft_type": "LORA",
        "transformer.bias": "none",
    })
    .to_string()
}

impl LoraState {
    /// Reads a LoRA file in diffusers' layout (f32, f16 or bf16).
    ///
    /// # Errors
    /// If the file cannot be read, is not safetensors, or its metadata is malformed.
    pub fn open(path: &Path) -> Result<Self, LoraError> {
        let bytes = std::fs::read(path).map_err(|source| LoraError::Read { path: path.to_owned(), source: Box::new(source) })?;
        Self::parse(&bytes, path)
    }

    /// As [`LoraState::open`], from memory; `path` names the source in errors.
    ///
    /// # Errors
    /// As [`LoraState::open`].
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, LoraError> {
        let read = |source| LoraError::Read { path: path.to_owned(), source: Box::new(source) };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(read)?;
        let mut alpha = None;
        if let Some(text) = header.metadata().as_ref().and_then(|m| m.get(METADATA_KEY)) {
            let value: serde_json::Value = serde_json::from_str(text).map_err(LoraError::Metadata)?;
            alpha = value["transformer.lora_alpha"].as_f64();
        }
        let file = SafeTensors::deserialize(bytes).map_err(read)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let value = decode(view.dtype(), view.data())
                .ok_or_else(|| LoraError::Key { key: name.clone(), problem: format!("values of type {:?} are not supported", view.dtype()) })?;
            tensors.insert(name.clone(), Param { name, shape: view.shape().to_vec(), value });
        }
        Ok(Self { tensors, alpha })
    }

    /// The layout of this LoRA on a model with these linear modules, and its parameters in canonical order.
    ///
    /// # Errors
    /// If a key names no module of the model, a half is missing, or a shape does not fit.
    pub fn resolve(&self, sites: &[LinearSite]) -> Result<(LoraLayout, Vec<Param>), LoraError> {
        let mut layout = LoraLayout::default();
        let mut params = Vec::new();
        let mut used = 0;
        for site in sites {
            let key = |half| format!("{PREFIX}{}.lora_{half}.weight", site.name);
            let (a, b) = match (self.tensors.get(&key("A")), self.tensors.get(&key("B"))) {
                (None, None) => continue,
                (Some(a), Some(b)) => (a, b),
                (a, _) => {
                    let key = if a.is_none() { key("A") } else { key("B") };
                    return Err(LoraError::Key { key, problem: "this half of the pair is missing".into() });
                }
            };
            let rank = a.shape.first().copied().unwrap_or(0);
            let module = LoraModule { site: site.clone(), rank, alpha: self.alpha.unwrap_or(rank as f64) };
            for (param, expected) in [(a, module.shape_a()), (b, module.shape_b())] {
                if param.shape != expected || rank == 0 {
                    return Err(LoraError::Parameter { name: param.name.clone(), expected, got: param.shape.clone() });
                }
            }
            used += 2;
            params.extend([a.clone(), b.clone()]);
            layout.modules.push(module);
        }
        if used < self.tensors.len() {
            let known: std::collections::BTreeSet<&str> = params.iter().map(|p| p.name.as_str()).collect();
            if let Some(key) = self.tensors.keys().find(|k| !known.contains(k.as_str())) {
                return Err(LoraError::Key { key: key.clone(), problem: "it names no linear module of this transformer".into() });
            }
        }
        Ok((layout, params))
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F32 => Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        Dtype::F16 => Some(pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect()),
        Dtype::BF16 => Some(pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect()),
        _ => None,
    }
}
