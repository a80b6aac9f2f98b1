//! Names of tensors in Stability AI's own files and in ComfyUI's, by their names in diffusers.
//!
//! The mapping is that of diffusers' `loaders/single_file_utils.py` (`convert_sd3_transformer_checkpoint_to_diffusers`, `convert_ldm_vae_checkpoint`,
//! `create_diffusers_clip_model_from_ldm`, `convert_sd3_t5_checkpoint_to_diffusers`).

use crate::layout::Part;
use crate::lora::kohya::{Place, place};
use crate::survey::Tensors;
use crate::weights::{Source, Stored, TensorMap};

/// Tensors of ComfyUI that hold the scale of an 8-bit weight, by what follows the layer's name: today's and the older form.
const SCALES: [&str; 2] = ["weight_scale", "scale_weight"];

/// Where the tensors `wanted` (their names in diffusers, each with others that it may have) of a part are in a file, where `prefix` precedes the part's
/// names. Those that the file does not have are left out.
pub(super) fn map(part: Part, prefix: &str, tensors: &Tensors, wanted: &[Vec<String>], levels: usize) -> TensorMap {
    let last = last_block(prefix, tensors);
    let find = |name: &String| -> Option<Source> {
        if (part, name.as_str()) == (Part::TextEncoder, CLIP_PROJECTION) {
            // Stable Diffusion 3 takes CLIP-L's pooled state as it is; diffusers' folders hold the identity here.
            return Some(Source::Identity(*tensors.get(&format!("{prefix}{CLIP_POSITIONS}"))?.shape.last()?));
        }
        let place = place_of(part, name, last, levels)?;
        let tensor = format!("{prefix}{}", place.layer);
        let found = tensors.get(&tensor)?;
        let scale = || SCALES.iter().map(|end| format!("{}{end}", tensor.strip_suffix("weight").unwrap_or(&tensor))).find(|name| tensors.contains_key(name));
        Some(Source::Stored(Stored {
            part: (place.parts > 1).then_some((place.index, place.parts)),
            swap_halves: place.swap_halves,
            scale: if found.dtype.starts_with("F8") { scale() } else { None },
            tensor,
        }))
    };
    TensorMap(wanted.iter().filter_map(|names| Some((names.first()?.clone(), names.iter().find_map(find)?))).collect())
}

/// Where a tensor of a part is; `last`: the number of the transformer's last block, `levels`: those of the autoencoder.
pub(super) fn place_of(part: Part, name: &str, last: usize, levels: usize) -> Option<Place> {
    match part {
        Part::Transformer => transformer(name, last),
        Part::Vae => Some(whole(vae(name, levels))),
        _ => Some(whole(name.to_owned())),
    }
}

const CLIP_PROJECTION: &str = "text_projection.weight";
pub(super) const CLIP_POSITIONS: &str = "text_model.embeddings.position_embedding.weight";

fn whole(layer: String) -> Place {
    Place { layer, index: 0, parts: 1, swap_halves: false }
}

/// The number of the last block.
pub(super) fn last_block(prefix: &str, tensors: &Tensors) -> usize {
    let number = |name: &String| name.strip_prefix(prefix)?.strip_prefix("joint_blocks.")?.split_once('.')?.0.parse().ok();
    tensors.keys().filter_map(number).max().unwrap_or(0)
}

/// A tensor of the transformer.
fn transformer(name: &str, last: usize) -> Option<Place> {
    match name {
        "pos_embed.pos_embed" => return Some(whole("pos_embed".to_owned())),
        "pos_embed.proj.weight" | "pos_embed.proj.bias" => return Some(whole(name.replacen("pos_embed", "x_embedder", 1))),
        _ => {}
    }
    let (module, end) = name.rsplit_once('.')?;
    let norm = module.rsplit_once('.').filter(|(_, norm)| norm.starts_with("norm_") && *norm != "norm_out");
    if let Some((attention, norm)) = norm {
        let attention = attention.strip_prefix("transformer_blocks.")?;
        let (stream, norm) = match norm {
            "norm_q" => ("x", "ln_q"),
            "norm_k" => ("x", "ln_k"),
            "norm_added_q" => ("context", "ln_q"),
            "norm_added_k" => ("context", "ln_k"),
            _ => return None,
        };
        let (block, attention) = attention.split_once('.')?;
        return Some(whole(format!("joint_blocks.{block}.{stream}_block.{attention}.{norm}.{end}")));
    }
    let place = place(module, last)?;
    Some(Place { layer: format!("{}.{end}", place.layer), ..place })
}

/// A tensor of the autoencoder, which has so many levels: those of the decoder are counted from the other end.
fn vae(name: &str, levels: usize) -> String {
    let mut parts: Vec<String> = name.split('.').map(str::to_owned).collect();
    let number = |text: &String| text.parse::<usize>().unwrap_or(0);
    let joined = match parts.get_mut(1..).unwrap_or_default() {
        [blocks, level, rest @ ..] if *blocks == "down_blocks" || *blocks == "up_blocks" => {
            let (old, level) = if *blocks == "down_blocks" { ("down", number(level)) } else { ("up", (levels - 1).saturating_sub(number(level))) };
            let rest = match rest {
                [what, _, rest @ ..] if *what == "downsamplers" || *what == "upsamplers" => format!("{}sample.{}", old, rest.join(".")),
                [_, block, rest @ ..] => format!("block.{block}.{}", rest.join(".").replace("conv_shortcut", "nin_shortcut")),
                _ => String::new(),
            };
            format!("{old}.{level}.{rest}")
        }
        [mid, what, which, rest @ ..] if *mid == "mid_block" => {
            let rest = rest.join(".");
            if *what == "resnets" {
                format!("mid.block_{}.{}", number(which) + 1, rest.replace("conv_shortcut", "nin_shortcut"))
            } else {
                let layers = [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")];
                let layer = layers.iter().find_map(|(today, old)| Some(format!("{old}{}", rest.strip_prefix(today)?)));
                format!("mid.attn_1.{}", layer.unwrap_or(rest))
            }
        }
        [norm, rest @ ..] if *norm == "conv_norm_out" => format!("norm_out.{}", rest.join(".")),
        _ => return name.to_owned(),
    };
    parts.truncate(1);
    format!("{}.{joined}", parts.join("."))
}
