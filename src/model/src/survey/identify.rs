//! What a model is, by the class names and sizes of its JSON files.

use crate::mmdit::MmditConfig;

/// Pipelines of diffusers by the begin of their class names, longer ones before those that they begin with, and what they draw with.
const PIPELINES: [(&str, &str); 26] = [
    ("StableDiffusionXL", "Stable Diffusion XL"),
    ("StableDiffusion", "Stable Diffusion 1 or 2"),
    ("StableCascade", "Stable Cascade"),
    ("Flux2", "FLUX.2"),
    ("Flux", "FLUX.1"),
    ("QwenImage", "Qwen-Image"),
    ("ZImage", "Z-Image"),
    ("PixArt", "PixArt"),
    ("Sana", "Sana"),
    ("HunyuanDiT", "Hunyuan-DiT"),
    ("HunyuanVideo", "HunyuanVideo"),
    ("HunyuanImage", "HunyuanImage"),
    ("AuraFlow", "AuraFlow"),
    ("Chroma", "Chroma"),
    ("HiDream", "HiDream"),
    ("CogView", "CogView"),
    ("CogVideoX", "CogVideoX"),
    ("OmniGen", "OmniGen"),
    ("Lumina", "Lumina"),
    ("Kandinsky", "Kandinsky"),
    ("Kolors", "Kolors"),
    ("Bria", "Bria"),
    ("Wan", "Wan"),
    ("LTX", "LTX-Video"),
    ("Mochi", "Mochi"),
    ("If", "DeepFloyd IF"),
];

/// Why a pipeline of this class (`_class_name` of `model_index.json`) is not trained; nothing if it is one of Stable Diffusion 3, or unknown.
pub(super) fn other_pipeline(class: &str) -> Option<String> {
    if class.is_empty() || class.starts_with("StableDiffusion3") {
        return None;
    }
    let name = PIPELINES.iter().find(|(begin, _)| class.starts_with(begin)).map_or("another kind of model", |(_, name)| name);
    Some(format!("it is {name} ({class}); this program trains Stable Diffusion 3 Medium and 3.5 Medium"))
}

/// Why a transformer of this class is not trained, where the pipeline does not say it.
pub(super) fn other_transformer(class: &str) -> Option<String> {
    (!class.is_empty() && class != "SD3Transformer2DModel")
        .then(|| format!("transformer/config.json describes a {class}; this program trains SD3Transformer2DModel (Stable Diffusion 3 Medium and 3.5 Medium)"))
}

/// A published model, and what others call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Its name in prose.
    pub name: &'static str,
    /// ModelSpec's identifier of the architecture, as the headers of the published single files have it.
    pub architecture: &'static str,
    /// kohya's `ss_base_model_version`.
    pub version: &'static str,
    /// Its repository in diffusers' layout.
    pub repository: &'static str,
    /// The hub's tags for LoRAs of it, as diffusers' training script sets them.
    pub tags: &'static [&'static str],
}

/// Every model of this kind that Stability AI has published and that differs in shape from the others.
pub const PUBLISHED: [&Published; 3] = [
    &Published {
        name: "Stable Diffusion 3 Medium",
        architecture: "stable-diffusion-v3-medium",
        version: "sd3_medium",
        repository: "stabilityai/stable-diffusion-3-medium-diffusers",
        tags: &["sd3", "sd3-diffusers"],
    },
    &Published {
        name: "Stable Diffusion 3.5 Medium",
        architecture: "stable-diffusion-v3.5-medium",
        version: "sd3.5_medium",
        repository: "stabilityai/stable-diffusion-3.5-medium",
        tags: &["sd3.5-medium", "sd3.5", "sd3.5-diffusers"],
    },
    &Published {
        name: "Stable Diffusion 3.5 Large",
        architecture: "stable-diffusion-v3.5-large",
        version: "sd3.5_large",
        repository: "stabilityai/stable-diffusion-3.5-large",
        tags: &["sd3.5-large", "sd3.5", "sd3.5-diffusers"],
    },
];

/// The published model that has a transformer of this shape; fine-tuned ones have the shape of theirs.
pub fn published(config: &MmditConfig) -> Option<&'static Published> {
    let [medium, medium_35, large_35] = PUBLISHED;
    let dual: Vec<usize> = (0..config.num_layers).filter(|layer| config.is_dual(*layer)).collect();
    match (config.num_layers, config.width(), config.qk_norm.is_some(), &dual[..]) {
        (24, 1536, false, []) => Some(medium),
        (24, 1536, true, [0, .., 12]) if dual.len() == 13 => Some(medium_35),
        (38, 2432, true, []) => Some(large_35),
        _ => None,
    }
}

/// A transformer's name among those that are published.
pub fn name(config: &MmditConfig) -> &'static str {
    published(config).map_or("a Stable Diffusion 3 model of its own size", |published| published.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_models_have_their_names() {
        for (class, part) in [
            ("StableDiffusionXLPipeline", "it is Stable Diffusion XL ("),
            ("StableDiffusionPipeline", "Stable Diffusion 1 or 2"),
            ("FluxPipeline", "FLUX.1"),
            ("Flux2Pipeline", "FLUX.2"),
            ("QwenImagePipeline", "Qwen-Image"),
            ("NewPipeline", "another kind of model (NewPipeline)"),
        ] {
            assert!(other_pipeline(class).unwrap().contains(part), "{class}");
        }
        for class in ["StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", ""] {
            assert_eq!(other_pipeline(class), None);
        }
        assert!(other_transformer("FluxTransformer2DModel").is_some() && other_transformer("SD3Transformer2DModel").is_none());
    }

    #[test]
    fn published_transformers_have_their_names() {
        let large = MmditConfig { num_layers: 38, num_attention_heads: 38, caption_projection_dim: 2432, ..MmditConfig::medium(Some("rms_norm"), vec![]) };
        for (config, expected) in [
            (MmditConfig::medium(None, vec![]), "Stable Diffusion 3 Medium"),
            (MmditConfig::medium(Some("rms_norm"), (0..13).collect()), "Stable Diffusion 3.5 Medium"),
            (large, "Stable Diffusion 3.5 Large"),
            (MmditConfig::medium(None, vec![3]), "a Stable Diffusion 3 model of its own size"),
        ] {
            assert_eq!(name(&config), expected);
        }
    }
}
