//! Names and layout of kohya's and ComfyUI's LoRA files.
//!
//! They follow Stability AI's original module names, in which q, k and v of a stream are one linear layer: the LoRAs of the
//! three become one, with the down factors stacked and the up factors in blocks on the diagonal. Readers scale by
//! `alpha / rows of lora_down`, so alpha carries the whole numerator: n · alpha for n stacked ranks.

use std::collections::BTreeMap;

use super::{LoraError, LoraLayout, LoraModule};
use finetune_compute::optim::Param;

/// Where a diffusers module lies in the original model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The original layer's name, as `joint_blocks.0.x_block.attn.qkv`.
    pub(crate) layer: String,
    /// Which rows of the original weight, in parts of the module's own outputs: part `index` of `parts`.
    pub(crate) index: usize,
    /// Parts of the original weight.
    pub(crate) parts: usize,
    /// The module's rows are two halves, (scale, shift) in diffusers and (shift, scale) in the original.
    pub(crate) swap_halves: bool,
}

impl Place {
    /// The layer's name as LoRA files have it, with underscores.
    pub(super) fn underscored(&self) -> String {
        self.layer.replace('.', "_")
    }
}

/// The original place of a diffusers module.
pub(crate) fn place(name: &str, last_block: usize) -> Option<Place> {
    let whole = |layer: String| Some(Place { layer, index: 0, parts: 1, swap_halves: false });
    if let Some(rest) = name.strip_prefix("transformer_blocks.") {
        let (block, part) = rest.split_once('.')?;
        let last = block.parse::<usize>().ok()? == last_block;
        let layer = |stream: &str, layer: &str| format!("joint_blocks.{block}.{stream}_block.{layer}");
        let qkv = |stream: &str, attention: &str, index| Some(Place { layer: layer(stream, &format!("{attention}.qkv")), index, parts: 3, swap_halves: false });
        return match part {
            "attn.to_q" => qkv("x", "attn", 0),
            "attn.to_k" => qkv("x", "attn", 1),
            "attn.to_v" => qkv("x", "attn", 2),
            "attn.add_q_proj" => qkv("context", "attn", 0),
            "attn.add_k_proj" => qkv("context", "attn", 1),
            "attn.add_v_proj" => qkv("context", "attn", 2),
            "attn2.to_q" => qkv("x", "attn2", 0),
            "attn2.to_k" => qkv("x", "attn2", 1),
            "attn2.to_v" => qkv("x", "attn2", 2),
            "attn.to_out.0" => whole(layer("x", "attn.proj")),
            "attn.to_add_out" => whole(layer("context", "attn.proj")),
            "attn2.to_out.0" => whole(layer("x", "attn2.proj")),
            "ff.net.0.proj" => whole(layer("x", "mlp.fc1")),
            "ff.net.2" => whole(layer("x", "mlp.fc2")),
            "ff_context.net.0.proj" => whole(layer("context", "mlp.fc1")),
            "ff_context.net.2" => whole(layer("context", "mlp.fc2")),
            "norm1.linear" => whole(layer("x", "adaLN_modulation.1")),
            "norm1_context.linear" => Some(Place { layer: layer("context", "adaLN_modulation.1"), index: 0, parts: 1, swap_halves: last }),
            _ => None,
        };
    }
    match name {
        "time_text_embed.timestep_embedder.linear_1" => whole("t_embedder.mlp.0".into()),
        "time_text_embed.timestep_embedder.linear_2" => whole("t_embedder.mlp.2".into()),
        "time_text_embed.text_embedder.linear_1" => whole("y_embedder.mlp.0".into()),
        "time_text_embed.text_embedder.linear_2" => whole("y_embedder.mlp.2".into()),
        "context_embedder" => whole("context_embedder".into()),
        "norm_out.linear" => Some(Place { layer: "final_layer.adaLN_modulation.1".into(), index: 0, parts: 1, swap_halves: true }),
        "proj_out" => whole("final_layer.linear".into()),
        _ => None,
    }
}

/// One original layer's LoRA while it is put together.
struct Fused<'a> {
    parts: usize,
    members: Vec<(usize, bool, &'a LoraModule, &'a Param, &'a Param)>,
}

/// The tensors of a kohya file, by key: `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight`, `.alpha`.
///
/// `params`: those of `layout` in canonical order; `blocks`: the model's number of blocks. Modules of one fused layer may have
/// different ranks as long as they have one scale.
///
/// # Errors
/// If the parameters are not the layout's, a module has no original name, or fused modules have different scales.
pub fn convert(layout: &LoraLayout, params: &[Param], blocks: usize) -> Result<Vec<Param>, LoraError> {
    layout.check(params)?;
    let mut layers: BTreeMap<String, Fused<'_>> = BTreeMap::new();
    for (module, pair) in layout.modules.iter().zip(params.chunks_exact(2)) {
        let name = &module.site.name;
        let unknown = || LoraError::Key { key: name.clone(), problem: "this module has no name in kohya's format".into() };
        let place = place(name, blocks.saturating_sub(1)).ok_or_else(unknown)?;
        let fused = layers.entry(place.underscored()).or_insert(Fused { parts: place.parts, members: Vec::new() });
        if let Some((_, _, other, ..)) = fused.members.first().filter(|(_, _, other, ..)| (other.scale() - module.scale()).abs() > 1e-12 * module.scale()) {
            let problem = format!("its scale differs from that of {}, with which it is one layer in kohya's format", other.site.name);
            return Err(LoraError::Key { key: name.clone(), problem });
        }
        fused.members.push((place.index, place.swap_halves, module, &pair[0], &pair[1]));
    }
    let mut file = Vec::with_capacity(3 * layers.len());
    for (layer, mut fused) in layers {
        fused.members.sort_by_key(|(index, ..)| *index);
        let Some(&(_, _, first, ..)) = fused.members.first() else { continue };
        let (inputs, outputs) = (first.site.in_features, first.site.out_features);
        let rank: usize = fused.members.iter().map(|(_, _, module, ..)| module.rank).sum();
        let mut down = Vec::with_capacity(rank * inputs);
        let mut up = vec![0.0; fused.parts * outputs * rank];
        let mut column = 0;
        for (index, swap_halves, module, a, b) in &fused.members {
            down.extend_from_slice(&a.value);
            for (i, row) in b.value.chunks_exact(module.rank).enumerate() {
                let i = if *swap_halves { (i + outputs / 2) % outputs } else { i };
                up[(index * outputs + i) * rank + column..][..module.rank].copy_from_slice(row);
            }
            column += module.rank;
        }
        let key = |end: &str| format!("lora_unet_{layer}.{end}");
        file.push(Param { name: key("alpha"), shape: Vec::new(), value: vec![(first.scale() * rank as f64) as f32] });
        file.push(Param { name: key("lora_down.weight"), shape: vec![rank, inputs], value: down });
        file.push(Param { name: key("lora_up.weight"), shape: vec![fused.parts * outputs, rank], value: up });
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::{EVERY_TARGET, LoraSpec, delta_weight};
    use crate::mmdit::MmditConfig;
    use finetune_common::rng::{Purpose, Stream};

    fn config() -> MmditConfig {
        let json = r#"{"patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 12,
            "caption_projection_dim": 8, "pooled_projection_dim": 6, "pos_embed_max_size": 8, "qk_norm": "rms_norm", "dual_attention_layers": [0]}"#;
        serde_json::from_str(json).unwrap()
    }

    /// Every module's delta W, put where the original model has it, equals scale · up · down of the file: all targets at
    /// once, and sets that leave parts of a fused layer untouched.
    #[test]
    fn up_times_down_is_every_modules_delta() {
        for targets in [EVERY_TARGET.to_vec(), vec!["to_q", "to_v"], vec!["attn.to_k"]] {
            let spec = LoraSpec { rank: 3, alpha: 5.0, dropout: 0.0, target_modules: targets.iter().map(|t| (*t).to_owned()).collect() };
            let layout = LoraLayout::new(&spec, &config().linear_sites()).unwrap();
            let mut params = layout.init(1);
            let mut stream = Stream::new(2, Purpose::Noise, 0, 0);
            for param in &mut params {
                stream.fill_normal(&mut param.value);
            }
            let file: BTreeMap<String, Param> = convert(&layout, &params, 2).unwrap().into_iter().map(|p| (p.name.clone(), p)).collect();

            // What the file means, read as ComfyUI reads it: alpha / rows of down.
            let mut meant: BTreeMap<String, Vec<f64>> = BTreeMap::new();
            for (key, down) in file.iter().filter(|(k, _)| k.ends_with("lora_down.weight")) {
                let layer = key.trim_end_matches(".lora_down.weight");
                let (up, alpha) = (&file[&format!("{layer}.lora_up.weight")], &file[&format!("{layer}.alpha")]);
                let (rank, inputs) = (down.shape[0], down.shape[1]);
                assert_eq!(up.shape[1], rank);
                let scale = f64::from(alpha.value[0]) / rank as f64;
                let delta = (0..up.shape[0] * inputs).map(|i| {
                    let (row, column) = (i / inputs, i % inputs);
                    scale * (0..rank).map(|r| f64::from(up.value[row * rank + r]) * f64::from(down.value[r * inputs + column])).sum::<f64>()
                });
                meant.insert(layer.to_owned(), delta.collect());
            }
            // What was trained, put in place.
            let mut trained: BTreeMap<String, Vec<f64>> = meant.iter().map(|(k, v)| (k.clone(), vec![0.0; v.len()])).collect();
            for (module, pair) in layout.modules.iter().zip(params.chunks_exact(2)) {
                let place = place(&module.site.name, 1).unwrap();
                let delta = delta_weight(module, &pair[0], &pair[1], 1.0).unwrap();
                let target = trained.get_mut(&format!("lora_unet_{}", place.underscored())).unwrap();
                let (rows, inputs) = (module.site.out_features, module.site.in_features);
                for (i, row) in delta.chunks_exact(inputs).enumerate() {
                    let i = if place.swap_halves { (i + rows / 2) % rows } else { i };
                    let to = &mut target[(place.index * rows + i) * inputs..][..inputs];
                    to.iter_mut().zip(row).for_each(|(t, d)| *t += f64::from(*d));
                }
            }
            for (layer, want) in &trained {
                for (w, m) in want.iter().zip(&meant[layer]) {
                    assert!((w - m).abs() < 1e-5 * (1.0 + w.abs()), "{layer}: {w} {m}");
                }
            }
            assert_eq!(file.len(), 3 * meant.len());
        }
    }

    #[test]
    fn names_are_those_of_the_original_model() {
        let layer = |name: &str| place(name, 1).unwrap().underscored();
        assert_eq!(layer("transformer_blocks.0.attn.to_k"), "joint_blocks_0_x_block_attn_qkv");
        assert_eq!(layer("transformer_blocks.0.attn2.to_q"), "joint_blocks_0_x_block_attn2_qkv");
        assert_eq!(layer("transformer_blocks.0.attn.to_add_out"), "joint_blocks_0_context_block_attn_proj");
        assert_eq!(layer("transformer_blocks.1.ff.net.2"), "joint_blocks_1_x_block_mlp_fc2");
        assert_eq!(layer("transformer_blocks.1.norm1_context.linear"), "joint_blocks_1_context_block_adaLN_modulation_1");
        assert_eq!((place("transformer_blocks.1.attn.to_v", 1).unwrap().index, place("nonsense", 1)), (2, None));
        assert!(
            place("transformer_blocks.1.norm1_context.linear", 1).unwrap().swap_halves
                && !place("transformer_blocks.0.norm1_context.linear", 1).unwrap().swap_halves
        );
        assert!(config().linear_sites().iter().all(|s| place(&s.name, 1).is_some()), "every module has a name");
    }

    #[test]
    fn fused_modules_must_share_their_scale() {
        let spec = |targets: &[&str], alpha| LoraSpec { rank: 2, alpha, dropout: 0.0, target_modules: targets.iter().map(|t| (*t).to_owned()).collect() };
        let mut layout = LoraLayout::new(&spec(&["attn.to_q", "attn.to_k"], 2.0), &config().linear_sites()).unwrap();
        layout.modules[1].alpha = 7.0;
        let params = layout.init(1);
        assert!(matches!(convert(&layout, &params, 2), Err(LoraError::Key { .. })));
    }
}
