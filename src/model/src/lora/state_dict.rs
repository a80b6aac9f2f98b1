//! A LoRA as a file: the keys of diffusers, peft, kohya, ComfyUI and OneTrainer, and what the files say of its scale.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::keys::{self, Half, Slot};
use super::{LinearSite, LoraError, LoraLayout, LoraModule, target};
use finetune_compute::optim::Param;

/// The header key under which diffusers keeps the adapter's configuration.
pub const METADATA_KEY: &str = "lora_adapter_metadata";
/// The file of that configuration that peft writes beside the weights.
const PEFT_CONFIG: &str = "adapter_config.json";
/// Names of LoRA files in folders: diffusers', peft's, and that of this program's checkpoints.
const FILES: [&str; 3] = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "lora.safetensors"];

/// A LoRA read from a file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoraState {
    /// Its tensors by key (f32), as `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`.
    pub tensors: BTreeMap<String, Param>,
    /// How they are scaled, where the file says it; else every module's alpha is its rank.
    pub scaling: Scaling,
}

/// What the configuration of an adapter says of its scale, `alpha / r`. Tensors `.alpha` beside a module's come before it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Scaling {
    /// Alpha of every module.
    pub alpha: Option<f64>,
    /// Alpha of some modules, by names or suffixes.
    pub patterns: BTreeMap<String, f64>,
    /// The scale is `alpha / sqrt(r)`.
    pub rank_stabilised: bool,
}

/// peft's `LoraConfig`, as far as it changes what the tensors mean.
#[derive(Debug, Deserialize)]
struct AdapterConfig {
    lora_alpha: Option<f64>,
    #[serde(default)]
    alpha_pattern: Option<BTreeMap<String, f64>>,
    #[serde(default)]
    use_rslora: Option<bool>,
    #[serde(default)]
    use_dora: Option<bool>,
}

impl AdapterConfig {
    fn scaling(self) -> Result<Scaling, LoraError> {
        if self.use_dora == Some(true) {
            return Err(LoraError::Key { key: "use_dora".into(), problem: "the file holds DoRA, and LoRA alone is read".into() });
        }
        Ok(Scaling { alpha: self.lora_alpha, patterns: self.alpha_pattern.unwrap_or_default(), rank_stabilised: self.use_rslora == Some(true) })
    }
}

impl Scaling {
    /// The factor of a module's `B A`.
    fn scale(&self, module: &str, rank: usize) -> f64 {
        let alpha = self.patterns.iter().find(|(name, _)| target::matches(name, module)).map(|(_, alpha)| *alpha).or(self.alpha);
        let rank = rank as f64;
        alpha.map_or(1.0, |alpha| alpha / if self.rank_stabilised { rank.sqrt() } else { rank })
    }
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

/// The LoRA file among the names of a folder's files: one with a usual name, else the only one in safetensors format.
///
/// # Errors
/// Says what there is instead.
pub fn choose<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<&'a str, String> {
    let found: Vec<&str> = names.into_iter().filter(|name| name.ends_with(".safetensors") && !name.contains('/')).collect();
    match (FILES.iter().find(|usual| found.contains(usual)), &found[..]) {
        (Some(usual), _) => Ok(usual),
        (None, [only]) => Ok(only),
        (None, []) => Err("it holds no LoRA file (*.safetensors)".to_owned()),
        (None, several) => Err(format!("it holds several files ({}): name one of them", several.join(", "))),
    }
}

impl LoraState {
    /// Reads a LoRA file (f32, f16 or bf16), or the one in a folder: an output of this program, a checkpoint, what diffusers or peft have saved.
    ///
    /// # Errors
    /// If there is no such file, it is not safetensors, or its metadata is malformed.
    pub fn open(path: &Path) -> Result<Self, LoraError> {
        let read = |path: PathBuf| move |source| LoraError::Read { path, source: Box::new(source) };
        let file = if path.is_dir() {
            let entries = std::fs::read_dir(path).map_err(read(path.to_owned()))?;
            let names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
            let name = choose(names.iter().map(String::as_str)).map_err(|problem| LoraError::Folder { path: path.to_owned(), problem })?;
            path.join(name)
        } else {
            path.to_owned()
        };
        let state = Self::parse(&std::fs::read(&file).map_err(read(file.clone()))?, &file)?;
        let config = file.with_file_name(PEFT_CONFIG);
        if !config.is_file() {
            return Ok(state);
        }
        state.with_adapter_config(&std::fs::read(&config).map_err(read(config.clone()))?)
    }

    /// The same tensors, scaled as peft's `adapter_config.json` says.
    ///
    /// # Errors
    /// If that cannot be understood, or is of another method than LoRA.
    pub fn with_adapter_config(self, json: &[u8]) -> Result<Self, LoraError> {
        let scaling = serde_json::from_slice::<AdapterConfig>(json).map_err(LoraError::Metadata)?.scaling()?;
        Ok(Self { scaling, ..self })
    }

    /// As [`LoraState::open`], from memory; `path` names the source in errors.
    ///
    /// # Errors
    /// As [`LoraState::open`].
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, LoraError> {
        let read = |source| LoraError::Read { path: path.to_owned(), source: Box::new(source) };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(read)?;
        let mut scaling = Scaling::default();
        if let Some(text) = header.metadata().as_ref().and_then(|m| m.get(METADATA_KEY)) {
            let all: BTreeMap<String, serde_json::Value> = serde_json::from_str(text).map_err(LoraError::Metadata)?;
            let own = all.into_iter().filter_map(|(key, value)| Some((key.strip_prefix("transformer.")?.to_owned(), value))).collect();
            scaling = serde_json::from_value::<AdapterConfig>(serde_json::Value::Object(own)).map_err(LoraError::Metadata)?.scaling()?;
        }
        let file = SafeTensors::deserialize(bytes).map_err(read)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let value = decode(view.dtype(), view.data())
                .ok_or_else(|| LoraError::Key { key: name.clone(), problem: format!("values of type {:?} are not supported", view.dtype()) })?;
            tensors.insert(name.clone(), Param { name, shape: view.shape().to_vec(), value });
        }
        Ok(Self { tensors, scaling })
    }

    /// The layout of this LoRA on a model with these linear modules, and its parameters in canonical order and with canonical names.
    ///
    /// # Errors
    /// If a key names no module of the model, a half is missing, or a shape does not fit.
    pub fn resolve(&self, sites: &[LinearSite]) -> Result<(LoraLayout, Vec<Param>), LoraError> {
        let names = keys::names(sites);
        let mut groups: BTreeMap<String, Group<'_>> = BTreeMap::new();
        for (key, tensor) in &self.tensors {
            let (module, half) = keys::split(key)?;
            if !names.contains_key(&module) {
                return Err(LoraError::Key { key: key.clone(), problem: "it names no linear module of this transformer".into() });
            }
            let group = groups.entry(module).or_default();
            let place = match half {
                Half::Down => &mut group.down,
                Half::Up => &mut group.up,
                Half::Alpha => &mut group.alpha,
            };
            if place.replace(tensor).is_some() {
                return Err(LoraError::Key { key: key.clone(), problem: "another key names the same tensor".into() });
            }
        }
        let mut modules: BTreeMap<usize, (LoraModule, Param, Param)> = BTreeMap::new();
        for (name, group) in &groups {
            for (module, a, b) in group.modules(&names[name], &self.scaling)? {
                let (ordinal, key) = (module.site.ordinal, module.site.name.clone());
                if modules.insert(ordinal, (module, a, b)).is_some() {
                    return Err(LoraError::Key { key, problem: "the file has this module under two names".into() });
                }
            }
        }
        let mut layout = LoraLayout::default();
        let mut params = Vec::with_capacity(2 * modules.len());
        for (module, a, b) in modules.into_values() {
            layout.modules.push(module);
            params.extend([a, b]);
        }
        Ok((layout, params))
    }
}

/// The tensors of one module of a file.
#[derive(Debug, Default)]
struct Group<'a> {
    down: Option<&'a Param>,
    up: Option<&'a Param>,
    alpha: Option<&'a Param>,
}

impl Group<'_> {
    /// The modules of diffusers that this one is, and their parameters.
    fn modules(&self, slots: &[Slot<'_>], scaling: &Scaling) -> Result<Vec<(LoraModule, Param, Param)>, LoraError> {
        let (down, up) = match (self.down, self.up) {
            (Some(down), Some(up)) => (down, up),
            (one, other) => {
                let key = one.or(other).or(self.alpha).map(|p| p.name.clone()).unwrap_or_default();
                return Err(LoraError::Key { key, problem: "the other half of the pair is missing".into() });
            }
        };
        let Some(Slot { site, parts, .. }) = slots.first() else { return Ok(Vec::new()) };
        let rank = down.shape.first().copied().unwrap_or(0);
        for (param, expected) in [(down, vec![rank, site.in_features]), (up, vec![parts * site.out_features, rank])] {
            if param.shape != expected || rank == 0 {
                return Err(LoraError::Parameter { name: param.name.clone(), expected, got: param.shape.clone() });
            }
        }
        let alpha = self.alpha.map(|alpha| match alpha.value[..] {
            [alpha] if alpha.is_finite() => Ok(f64::from(alpha)),
            _ => Err(LoraError::Parameter { name: alpha.name.clone(), expected: vec![1], got: alpha.shape.clone() }),
        });
        let alpha = alpha.transpose()?;
        let mut modules = Vec::with_capacity(slots.len());
        let blocks = blocks(slots, up, rank, site.out_features);
        for (slot, columns) in slots.iter().zip(blocks) {
            let Some(columns) = columns else { continue };
            let (site, own) = (slot.site, columns.len());
            let scale = alpha.map_or_else(|| scaling.scale(&site.name, rank), |alpha| alpha / rank as f64);
            let module = LoraModule { site: site.clone(), rank: own, alpha: scale * own as f64 };
            let a = down.value[columns.start * site.in_features..columns.end * site.in_features].to_vec();
            let mut b = Vec::with_capacity(site.out_features * own);
            for row in 0..site.out_features {
                let row = if slot.swap_halves { (row + site.out_features / 2) % site.out_features } else { row };
                b.extend_from_slice(&up.value[(slot.index * site.out_features + row) * rank..][columns.clone()]);
            }
            let a = Param { name: module.name_a(), shape: module.shape_a(), value: a };
            let b = Param { name: module.name_b(), shape: module.shape_b(), value: b };
            modules.push((module, a, b));
        }
        Ok(modules)
    }
}

/// Which ranks (columns of `up`) each slot has to itself. This program's own files hold several modules in blocks on the diagonal; in others
/// all share every rank. A slot without any is untouched by the file.
fn blocks(slots: &[Slot<'_>], up: &Param, rank: usize, outputs: usize) -> Vec<Option<std::ops::Range<usize>>> {
    if slots.len() == 1 {
        return vec![Some(0..rank)];
    }
    let used = |slot: &Slot<'_>| {
        let rows = up.value[slot.index * outputs * rank..(slot.index + 1) * outputs * rank].chunks_exact(rank);
        let columns = rows.flat_map(|row| row.iter().enumerate().filter(|(_, x)| **x != 0.0).map(|(column, _)| column));
        columns.fold(None, |range: Option<(usize, usize)>, c| Some(range.map_or((c, c), |(first, last)| (first.min(c), last.max(c)))))
    };
    let used: Vec<_> = slots.iter().map(used).collect();
    let touched = used.iter().flatten().count();
    // All of them in order, else (where the file has some of them alone) those that are touched.
    for (count, all) in [(slots.len(), true), (touched, false)] {
        if count < 2 || !rank.is_multiple_of(count) {
            continue;
        }
        let size = rank / count;
        let mut next = 0;
        let assigned: Vec<_> = used
            .iter()
            .map(|columns| {
                (all || columns.is_some()).then(|| {
                    next += size;
                    next - size..next
                })
            })
            .collect();
        let fits = used.iter().zip(&assigned).all(|(columns, block)| match (columns, block) {
            (Some((first, last)), Some(block)) => block.contains(first) && block.contains(last),
            _ => true,
        });
        if fits {
            return assigned;
        }
    }
    // What nothing touches is left out, unless nothing touches anything.
    used.iter().map(|columns| (columns.is_some() || touched == 0).then_some(0..rank)).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::{EVERY_TARGET, LoraSpec, delta_weight, kohya, stack};
    use crate::mmdit::MmditConfig;
    use finetune_common::rng::{Purpose, Stream};

    fn sites() -> Vec<LinearSite> {
        let json = r#"{"patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 12,
            "caption_projection_dim": 8, "pooled_projection_dim": 6, "pos_embed_max_size": 8, "qk_norm": "rms_norm", "dual_attention_layers": [0]}"#;
        serde_json::from_str::<MmditConfig>(json).unwrap().linear_sites()
    }

    /// A LoRA on these targets with every value set.
    fn lora(targets: &[&str], rank: usize, alpha: f64) -> (LoraLayout, Vec<Param>) {
        let spec = LoraSpec { rank, alpha, dropout: 0.0, target_modules: targets.iter().map(|t| (*t).to_owned()).collect() };
        let layout = LoraLayout::new(&spec, &sites()).unwrap();
        let mut params = layout.init(3);
        let mut stream = Stream::new(4, Purpose::Noise, 0, 0);
        params.iter_mut().for_each(|param| stream.fill_normal(&mut param.value));
        (layout, params)
    }

    fn state(params: impl IntoIterator<Item = Param>, scaling: Scaling) -> LoraState {
        LoraState { tensors: params.into_iter().map(|p| (p.name.clone(), p)).collect(), scaling }
    }

    fn renamed(params: &[Param], name: &dyn Fn(&str) -> String) -> Vec<Param> {
        params.iter().map(|p| Param { name: name(&p.name), ..p.clone() }).collect()
    }

    fn alpha(value: f64) -> Scaling {
        Scaling { alpha: Some(value), ..Scaling::default() }
    }

    /// The same tensors under every name that files give them are the same LoRA, bit for bit.
    #[test]
    fn one_lora_under_every_name() {
        let (layout, params) = lora(&EVERY_TARGET, 4, 8.0);
        let bare = |name: &str| name.strip_prefix("transformer.").unwrap().to_owned();
        let flat = |name: &str| {
            let (module, end) = bare(name).rsplit_once(".lora_").map(|(m, e)| (m.replace('.', "_"), e.to_owned())).unwrap();
            let end = if end == "A.weight" { "lora_down.weight" } else { "lora_up.weight" };
            format!("lora_transformer_{module}.{end}")
        };
        let mut with_alpha = renamed(&params, &flat);
        let alphas = with_alpha.iter().filter_map(|p| p.name.strip_suffix(".lora_up.weight"));
        let alphas: Vec<Param> = alphas.map(|stem| Param { name: format!("{stem}.alpha"), shape: vec![], value: vec![8.0] }).collect();
        with_alpha.extend(alphas);
        let peft = |name: &str| format!("base_model.model.{}", bare(name));
        let old = |name: &str| name.replace("lora_A", "lora.down").replace("lora_B", "lora.up");
        for (what, state) in [
            ("diffusers", state(params.clone(), alpha(8.0))),
            ("peft", state(renamed(&params, &peft), alpha(8.0))),
            ("no prefix", state(renamed(&params, &bare), alpha(8.0))),
            ("old diffusers", state(renamed(&params, &old), alpha(8.0))),
            ("OneTrainer", state(with_alpha, Scaling::default())),
            (
                "patterns",
                state(params.clone(), Scaling { alpha: Some(1.0), patterns: EVERY_TARGET.map(|t| (t.to_owned(), 8.0)).into(), rank_stabilised: false }),
            ),
            ("rank-stabilised", state(params.clone(), Scaling { rank_stabilised: true, ..alpha(4.0) })),
        ] {
            let (found, values) = state.resolve(&sites()).unwrap();
            assert_eq!(found.modules, layout.modules, "{what}");
            assert!(values == params, "{what}");
        }
    }

    /// What is written for kohya and ComfyUI comes back as it was, whichever modules there are.
    #[test]
    fn own_kohya_files_come_back() {
        for targets in [&EVERY_TARGET[..], &["attn.to_q", "attn.to_v"], &["attn.to_k"], &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "linear"]] {
            let (layout, params) = lora(targets, 4, 8.0);
            for prefix in ["lora_unet_", "diffusion_model."] {
                let file = kohya::convert(&layout, &params, 2).unwrap();
                let (found, values) = state(renamed(&file, &|name| name.replace("lora_unet_", prefix)), Scaling::default()).resolve(&sites()).unwrap();
                assert_eq!(found.modules, layout.modules, "{targets:?}");
                assert!(values == params, "{targets:?}");
            }
        }
        // Nothing is trained yet: B is zero throughout.
        let (layout, _) = lora(&["attn.to_q", "attn.to_k", "attn.to_v"], 4, 4.0);
        let fresh = layout.init(1);
        let (found, values) = state(kohya::convert(&layout, &fresh, 2).unwrap(), Scaling::default()).resolve(&sites()).unwrap();
        assert!(found.modules == layout.modules && values == fresh);
    }

    /// kohya's own trainer has one LoRA for q, k and v together: each of the three gets all its ranks.
    #[test]
    fn a_shared_lora_becomes_three() {
        let (rank, width) = (3, 8);
        let value = |n: usize| (0..n).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<f32>>();
        let name = |end: &str| format!("lora_unet_joint_blocks_1_x_block_attn_qkv.{end}");
        let down = Param { name: name("lora_down.weight"), shape: vec![rank, width], value: value(rank * width) };
        let up = Param { name: name("lora_up.weight"), shape: vec![3 * width, rank], value: value(3 * width * rank) };
        let one = Param { name: name("alpha"), shape: vec![], value: vec![1.5] };
        let (layout, params) = state([down.clone(), up.clone(), one], Scaling::default()).resolve(&sites()).unwrap();
        let names: Vec<&str> = layout.modules.iter().map(|m| m.site.name.as_str()).collect();
        assert_eq!(names, ["to_q", "to_k", "to_v"].map(|p| format!("transformer_blocks.1.attn.{p}")));
        for (part, (module, pair)) in layout.modules.iter().zip(params.chunks_exact(2)).enumerate() {
            assert!((module.scale() - 0.5).abs() < 1e-12);
            let delta = delta_weight(module, &pair[0], &pair[1], 1.0).unwrap();
            for (i, found) in delta.iter().enumerate() {
                let (row, column) = (part * width + i / width, i % width);
                let want: f32 = (0..rank).map(|r| 0.5 * up.value[row * rank + r] * down.value[r * width + column]).sum();
                assert!((found - want).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn what_is_no_lora_of_this_model_is_named() {
        let (_, params) = lora(&["attn.to_q"], 4, 4.0);
        let refused = |change: &dyn Fn(&mut Vec<Param>)| {
            let mut params = params.clone();
            change(&mut params);
            state(params, Scaling::default()).resolve(&sites()).unwrap_err().to_string()
        };
        assert!(
            refused(&|p| {
                p.remove(0);
            })
            .contains("other half")
        );
        assert!(refused(&|p| p[0].name = p[0].name.replace("blocks.0", "blocks.7")).contains("no linear module"));
        assert!(refused(&|p| p[0].shape = vec![4, 9]).contains("shape"));
        assert!(
            refused(&|p| {
                let twice = Param { name: p[0].name.replace("transformer.", ""), ..p[0].clone() };
                p.push(twice);
            })
            .contains("same tensor")
        );
    }

    #[test]
    fn folders_hold_one_lora() {
        assert_eq!(choose(["a.safetensors", "pytorch_lora_weights.safetensors", "result.json"]), Ok("pytorch_lora_weights.safetensors"));
        assert_eq!(choose(["robi.safetensors", "README.md"]), Ok("robi.safetensors"));
        assert_eq!(choose(["lora.safetensors", "optimizer.safetensors", "manifest.json"]), Ok("lora.safetensors"));
        assert!(choose(["a.safetensors", "b.safetensors"]).unwrap_err().contains("a.safetensors, b.safetensors"));
        assert!(choose(["a.bin"]).unwrap_err().contains("no LoRA file"));

        // As peft saves: the scale in a file beside it.
        let dir = tempfile::tempdir().unwrap();
        let tensor = |rows: usize, columns: usize| (vec![rows, columns], vec![0_u8; 4 * rows * columns]);
        let ([a, b], [down, up]) =
            (["A", "B"].map(|half| format!("base_model.model.transformer_blocks.0.attn.to_q.lora_{half}.weight")), [tensor(4, 8), tensor(8, 4)]);
        let [down, up] = [&down, &up].map(|(shape, bytes)| safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap());
        std::fs::write(dir.path().join("adapter_model.safetensors"), safetensors::serialize([(a, down), (b, up)], None).unwrap()).unwrap();
        std::fs::write(dir.path().join(PEFT_CONFIG), r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 2, "alpha_pattern": {}, "use_rslora": false}"#).unwrap();
        let (layout, _) = LoraState::open(dir.path()).unwrap().resolve(&sites()).unwrap();
        assert!((layout.modules[0].scale() - 0.5).abs() < 1e-12);
        std::fs::write(dir.path().join(PEFT_CONFIG), r#"{"r": 4, "use_dora": true}"#).unwrap();
        assert!(LoraState::open(dir.path()).unwrap_err().to_string().contains("DoRA"));
    }

    /// The delta of every module, scaled.
    fn deltas(layout: &LoraLayout, params: &[Param]) -> BTreeMap<String, Vec<f32>> {
        let delta = |(module, pair): (&LoraModule, &[Param])| (module.site.name.clone(), delta_weight(module, &pair[0], &pair[1], 1.0).unwrap());
        layout.modules.iter().zip(params.chunks_exact(2)).map(delta).collect()
    }

    #[test]
    fn several_add_up() {
        let (one, two) = (lora(&["attn.to_q", "ff.net.2"], 4, 8.0), lora(&["attn.to_q", "attn.to_v"], 2, 2.0));
        let (layout, params) = stack(&[(one.0.clone(), one.1.clone(), 0.5), (two.0.clone(), two.1.clone(), -1.0)]).unwrap();
        let (all, first, second) = (deltas(&layout, &params), deltas(&one.0, &one.1), deltas(&two.0, &two.1));
        assert_eq!(all.len(), 6);
        for (name, delta) in all {
            for (i, found) in delta.iter().enumerate() {
                let part = |deltas: &BTreeMap<String, Vec<f32>>| deltas.get(&name).map_or(0.0, |d| d[i]);
                assert!((found - (0.5 * part(&first) - part(&second))).abs() < 1e-5, "{name}");
            }
        }
    }

    #[test]
    fn a_start_keeps_what_the_lora_does() {
        let (given, params) = lora(&["attn.to_q"], 4, 8.0);
        let spec = |rank, alpha, targets: &[&str]| LoraSpec { rank, alpha, dropout: 0.0, target_modules: targets.iter().map(|t| (*t).to_owned()).collect() };
        let layout = LoraLayout::new(&spec(4, 2.0, &["attn.to_q", "attn.to_k"]), &sites()).unwrap();
        let start = layout.init_from(9, &given, params.clone()).unwrap();
        let (found, want) = (deltas(&layout, &start), deltas(&given, &params));
        for (name, delta) in &found {
            let want = want.get(name).cloned().unwrap_or_else(|| vec![0.0; delta.len()]);
            assert!(delta.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5), "{name}");
        }
        let same = LoraLayout::new(&spec(4, 8.0, &["attn.to_q"]), &sites()).unwrap();
        assert!(same.init_from(9, &given, params.clone()).unwrap() == params);
        let refused = |spec| LoraLayout::new(&spec, &sites()).unwrap().init_from(9, &given, params.clone()).unwrap_err().to_string();
        assert!(refused(spec(8, 8.0, &["attn.to_q"])).contains("set rank to 4"));
        assert!(refused(spec(4, 8.0, &["attn.to_k"])).contains("2 modules that targetModules does not name"));
    }
}
