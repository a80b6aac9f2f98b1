//! What a file of weights holds, by the names of its tensors.

use crate::layout::Part;
use crate::survey::Tensors;

use super::names::CLIP_POSITIONS;

/// A part's name in the settings, its name for people, what may precede its tensors' names, and a tensor that it always has.
pub(super) struct Kind {
    pub(super) part: Part,
    pub(super) field: &'static str,
    pub(super) what: &'static str,
    prefixes: &'static [&'static str],
    tensor: &'static str,
}

pub(super) const KINDS: [Kind; 5] = [
    Kind {
        part: Part::Transformer,
        field: "transformer",
        what: "transformer",
        prefixes: &["model.diffusion_model.", "diffusion_model.", ""],
        tensor: "joint_blocks.0.x_block.attn.qkv.weight",
    },
    Kind {
        part: Part::Vae,
        field: "vae",
        what: "autoencoder (VAE)",
        prefixes: &["first_stage_model.", "vae.", ""],
        tensor: "encoder.down.0.block.0.conv1.weight",
    },
    Kind { part: Part::TextEncoder, field: "clipL", what: "text encoder CLIP-L", prefixes: &["text_encoders.clip_l.transformer.", ""], tensor: CLIP_POSITIONS },
    Kind {
        part: Part::TextEncoder2,
        field: "clipG",
        what: "text encoder CLIP-G",
        prefixes: &["text_encoders.clip_g.transformer.", ""],
        tensor: CLIP_POSITIONS,
    },
    Kind {
        part: Part::TextEncoder3,
        field: "t5",
        what: "text encoder T5",
        prefixes: &["text_encoders.t5xxl.transformer.", ""],
        tensor: "encoder.block.0.layer.0.SelfAttention.q.weight",
    },
];

impl Kind {
    /// What precedes the part's tensors in this file, if it holds the part or, where it has a CLIP alone, may do so.
    pub(super) fn prefix(&self, tensors: &Tensors) -> Option<&'static str> {
        self.prefixes.iter().copied().find(|prefix| tensors.contains_key(&format!("{prefix}{}", self.tensor)))
    }

    /// Whether the file is plainly one with this part: of a CLIP alone the width decides.
    pub(super) fn is_in(&self, tensors: &Tensors) -> bool {
        let width = || tensors.get(CLIP_POSITIONS).and_then(|found| found.shape.last().copied());
        match (self.prefix(tensors), self.part) {
            (Some(""), Part::TextEncoder) => width() == Some(768),
            (Some(""), Part::TextEncoder2) => width() == Some(1280),
            (prefix, _) => prefix.is_some(),
        }
    }
}

/// Tensors of other models by the end or a part of their names, those that others have too at the end.
const OTHERS: [(&str, &str); 19] = [
    ("lora_down.weight", "a LoRA, not a base model"),
    ("lora_A.weight", "a LoRA, not a base model"),
    ("lora_unet_", "a LoRA, not a base model"),
    ("single_stream_modulation.lin.weight", "a FLUX.2 model"),
    ("distilled_guidance_layer.", "a Chroma model"),
    ("double_blocks.0.img_attn.qkv.weight", "a FLUX.1 model"),
    ("double_layers.0.attn.w1q.weight", "an AuraFlow model"),
    ("conditioner.embedders.1.model.", "a Stable Diffusion XL model"),
    ("conditioner.embedders.0.model.", "a Stable Diffusion XL refiner"),
    ("diffusion_model.label_emb.0.0.weight", "a Stable Diffusion XL model"),
    ("cond_stage_model.model.", "a Stable Diffusion 2 model"),
    ("cond_stage_model.transformer.", "a Stable Diffusion 1 model"),
    ("control_model.", "a ControlNet"),
    ("controlnet", "a ControlNet"),
    ("diffusion_model.input_blocks.", "the U-Net of a Stable Diffusion of another generation"),
    ("resblocks.0.attn.in_proj_weight", "a CLIP in OpenCLIP's own layout, whose tensors have other names"),
    ("vision_model.encoder.layers.", "a CLIP of pictures"),
    ("transformer_blocks.0.attn.to_q.weight", "a transformer in diffusers' layout, which belongs into a folder transformer/ with its config.json"),
    ("down_blocks.0.resnets.0.conv1.weight", "a part in diffusers' layout, which belongs into a folder with its config.json"),
];

/// What a file is that holds no part of a Stable Diffusion 3.
pub(super) fn other(tensors: &Tensors) -> &'static str {
    let has = |part: &str| tensors.keys().any(|name| name.contains(part));
    OTHERS.iter().find(|(part, _)| has(part)).map_or("no file that this program knows", |(_, what)| what)
}
