//! The names that LoRA files give to modules: diffusers, peft, kohya, ComfyUI, OneTrainer, with and without prefixes.
//!
//! A key is a prefix, a module and an end. Modules have diffusers' names or those of Stability AI's original model, with dots or with
//! underscores; an original module may be several of diffusers' ([`kohya::place`]).

use std::collections::BTreeMap;

use super::kohya::{self, Place};
use super::{LinearSite, LoraError};

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    /// [r, in].
    Down,
    /// [out, r].
    Up,
    /// The numerator of the scale.
    Alpha,
}

const ENDS: [(&str, Half); 11] = [
    (".lora_A.default.weight", Half::Down),
    (".lora_B.default.weight", Half::Up),
    (".lora_A.weight", Half::Down),
    (".lora_B.weight", Half::Up),
    (".lora_down.weight", Half::Down),
    (".lora_up.weight", Half::Up),
    (".lora.down.weight", Half::Down),
    (".lora.up.weight", Half::Up),
    (".lora_linear_layer.down.weight", Half::Down),
    (".lora_linear_layer.up.weight", Half::Up),
    (".alpha", Half::Alpha),
];

/// Prefixes of the transformer, after peft's own.
const PREFIXES: [&str; 6] = ["transformer.", "model.diffusion_model.", "diffusion_model.", "lora_transformer_", "lora_unet_", "unet."];

/// Methods other than LoRA by what their keys hold.
const OTHER_METHODS: [(&str, &str); 7] = [
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("hada_w", "LoHa"),
    ("lokr_w", "LoKr"),
    ("lora_mid", "LoCon"),
    ("oft_", "OFT"),
    (".diff", "whole differences of weights"),
];

/// Other models by parts of their modules' names.
const OTHER_MODELS: [(&str, &str); 5] = [
    ("single_transformer_blocks", "FLUX"),
    ("double_blocks", "FLUX"),
    ("single_blocks", "FLUX"),
    ("down_blocks", "Stable Diffusion 1, 2 or XL"),
    ("input_blocks", "Stable Diffusion 1, 2 or XL"),
];

/// The module of a key, with underscores, and what the tensor is.
///
/// # Errors
/// Says what the key is instead.
pub(super) fn split(key: &str) -> Result<(String, Half), LoraError> {
    let failed = |problem: String| Err(LoraError::Key { key: key.to_owned(), problem });
    if ["text_encoder", "lora_te", "te1.", "te2.", "te3.", "conditioner."].iter().any(|begin| key.starts_with(begin)) {
        return failed("it belongs to a text encoder, and LoRA of text encoders is not applied: take the keys of the transformer alone".into());
    }
    if let Some((_, method)) = OTHER_METHODS.iter().find(|(part, _)| key.contains(part)) {
        return failed(format!("the file holds {method}, and LoRA alone is read"));
    }
    let Some((stem, half)) = ENDS.iter().find_map(|(end, half)| Some((key.strip_suffix(end)?, *half))) else {
        return failed("it ends like no tensor of a LoRA (.lora_A.weight, .lora_down.weight, .alpha, ...)".into());
    };
    let stem = stem.strip_prefix("base_model.model.").unwrap_or(stem);
    let stem = PREFIXES.iter().find_map(|prefix| stem.strip_prefix(prefix)).unwrap_or(stem);
    if let Some((_, model)) = OTHER_MODELS.iter().find(|(part, _)| stem.replace('.', "_").contains(part)) {
        return failed(format!("this LoRA is for {model}, not for Stable Diffusion 3"));
    }
    Ok((stem.replace('.', "_"), half))
}

/// Where a module of a file lies in the transformer: some rows of it, for each of diffusers' modules that it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slot<'a> {
    pub(super) site: &'a LinearSite,
    /// The rows are part `index` of `parts`.
    pub(super) index: usize,
    pub(super) parts: usize,
    /// The two halves of the rows change places.
    pub(super) swap_halves: bool,
}

/// Every name, with underscores, that a file may have for modules of this transformer.
pub(super) fn names(sites: &[LinearSite]) -> BTreeMap<String, Vec<Slot<'_>>> {
    let block = |site: &LinearSite| site.name.strip_prefix("transformer_blocks.")?.split('.').next()?.parse::<usize>().ok();
    let last = sites.iter().filter_map(block).max().unwrap_or(0);
    let mut names: BTreeMap<String, Vec<Slot<'_>>> = BTreeMap::new();
    for site in sites {
        let own = site.name.replace('.', "_");
        if let Some(place) = kohya::place(&site.name, last).filter(|place| place.underscored() != own) {
            let (layer, Place { index, parts, swap_halves, .. }) = (place.underscored(), place);
            names.entry(layer).or_default().push(Slot { site, index, parts, swap_halves });
        }
        names.insert(own, vec![Slot { site, index: 0, parts: 1, swap_halves: false }]);
    }
    names.values_mut().for_each(|slots| slots.sort_by_key(|slot| slot.index));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_key_is_taken_apart() {
        for (key, module, half) in [
            ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "transformer_blocks_0_attn_to_q", Half::Down),
            ("base_model.model.transformer_blocks.0.attn.to_q.lora_B.weight", "transformer_blocks_0_attn_to_q", Half::Up),
            ("base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight", "transformer_blocks_0_attn_to_q", Half::Down),
            ("transformer_blocks.0.attn.to_out.0.lora_B.weight", "transformer_blocks_0_attn_to_out_0", Half::Up),
            ("lora_transformer_transformer_blocks_0_attn_to_q.alpha", "transformer_blocks_0_attn_to_q", Half::Alpha),
            ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight", "joint_blocks_0_x_block_attn_qkv", Half::Up),
            ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_down.weight", "joint_blocks_0_x_block_attn_qkv", Half::Down),
            ("transformer.transformer_blocks.0.attn.to_q.lora.down.weight", "transformer_blocks_0_attn_to_q", Half::Down),
        ] {
            assert_eq!(split(key).unwrap(), (module.to_owned(), half), "{key}");
        }
        for (key, part) in [
            ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "text encoder"),
            ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder"),
            ("lora_unet_joint_blocks_0_x_block_attn_qkv.dora_scale", "DoRA"),
            ("lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a", "LoHa"),
            ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "FLUX"),
            ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "Stable Diffusion 1, 2 or XL"),
            ("transformer_blocks.0.attn.to_q.weight", "ends like no tensor"),
        ] {
            assert!(split(key).unwrap_err().to_string().contains(part), "{key}");
        }
    }
}
