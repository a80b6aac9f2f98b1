//! What `transformer/config.json` says, checked.

use std::path::Path;

use serde::Deserialize;

use super::MmditError;
use crate::lora::LinearSite;

/// The shape of a Stable Diffusion 3 transformer (diffusers' `SD3Transformer2DModel`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MmditConfig {
    /// Side of a patch in latent pixels.
    pub patch_size: usize,
    /// Latent channels in.
    pub in_channels: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of prompt embeddings.
    pub joint_attention_dim: usize,
    /// Width of the context stream; equal to the image stream's.
    pub caption_projection_dim: usize,
    /// Width of pooled prompt embeddings.
    pub pooled_projection_dim: usize,
    /// Latent channels out; absent: as in.
    #[serde(default)]
    pub out_channels: Option<usize>,
    /// Side of the table of position embeddings, in patches.
    pub pos_embed_max_size: usize,
    /// Normalisation of queries and keys: absent or `rms_norm`.
    #[serde(default)]
    pub qk_norm: Option<String>,
    /// Blocks with a second, image-only attention.
    #[serde(default, deserialize_with = "none_as_empty")]
    pub dual_attention_layers: Vec<usize>,
}

/// Some files say `null` where none are meant.
fn none_as_empty<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Sinusoidal features of a timestep.
pub const TIMESTEP_FEATURES: usize = 256;

impl MmditConfig {
    /// Reads `config.json` of the transformer's folder.
    ///
    /// # Errors
    /// If it cannot be read or describes a model that is not supported.
    pub fn open(transformer_dir: &Path) -> Result<Self, MmditError> {
        let path = transformer_dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| MmditError::ReadConfig { path: path.clone(), source })?;
        let config: Self = serde_json::from_str(&text).map_err(|source| MmditError::ParseConfig { path, source })?;
        config.check()?;
        Ok(config)
    }

    /// Checks that this code can run the model.
    ///
    /// # Errors
    /// Names the field that is not supported.
    pub fn check(&self) -> Result<(), MmditError> {
        let unsupported = |field: &'static str, value: String, expected: String| Err(MmditError::Unsupported { field, value, expected });
        for (field, value) in [
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("num_layers", self.num_layers),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("joint_attention_dim", self.joint_attention_dim),
            ("pooled_projection_dim", self.pooled_projection_dim),
            ("pos_embed_max_size", self.pos_embed_max_size),
            ("out_channels", self.out_channels()),
        ] {
            if value == 0 {
                return unsupported(field, "0".into(), "a positive number".into());
            }
        }
        if self.caption_projection_dim != self.width() {
            return unsupported(
                "caption_projection_dim",
                self.caption_projection_dim.to_string(),
                format!("num_attention_heads x attention_head_dim = {}", self.width()),
            );
        }
        if let Some(norm) = self.qk_norm.as_deref().filter(|n| *n != "rms_norm") {
            return unsupported("qk_norm", format!("{norm:?}"), "null or \"rms_norm\"".into());
        }
        if let Some(layer) = self.dual_attention_layers.iter().find(|&&l| l >= self.num_layers) {
            return unsupported("dual_attention_layers", layer.to_string(), format!("below num_layers = {}", self.num_layers));
        }
        Ok(())
    }

    /// Width D of both streams.
    pub fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Latent channels out.
    pub fn out_channels(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Values of one patch of the output.
    pub fn patch_out(&self) -> usize {
        self.patch_size * self.patch_size * self.out_channels()
    }

    /// Whether block `layer` has a second attention.
    pub fn is_dual(&self, layer: usize) -> bool {
        self.dual_attention_layers.contains(&layer)
    }

    /// Whether block `layer` is the last: its context output is discarded.
    pub fn is_last(&self, layer: usize) -> bool {
        layer + 1 == self.num_layers
    }

    /// Every linear module, in order of definition.
    pub fn linear_sites(&self) -> Vec<LinearSite> {
        let mut sites: Vec<LinearSite> = Vec::new();
        let mut add = |name: String, in_features, out_features| {
            let ordinal = sites.len();
            sites.push(LinearSite { name, ordinal, in_features, out_features });
        };
        let d = self.width();
        for (name, inputs) in [("timestep_embedder", TIMESTEP_FEATURES), ("text_embedder", self.pooled_projection_dim)] {
            add(format!("time_text_embed.{name}.linear_1"), inputs, d);
            add(format!("time_text_embed.{name}.linear_2"), d, d);
        }
        add("context_embedder".into(), self.joint_attention_dim, d);
        for layer in 0..self.num_layers {
            let (dual, last) = (self.is_dual(layer), self.is_last(layer));
            let mut add = |name: &str, inputs, outputs| add(format!("transformer_blocks.{layer}.{name}"), inputs, outputs);
            add("norm1.linear", d, if dual { 9 * d } else { 6 * d });
            add("norm1_context.linear", d, if last { 2 * d } else { 6 * d });
            for name in ["to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0"] {
                add(&format!("attn.{name}"), d, d);
            }
            if !last {
                add("attn.to_add_out", d, d);
            }
            if dual {
                for name in ["to_q", "to_k", "to_v", "to_out.0"] {
                    add(&format!("attn2.{name}"), d, d);
                }
            }
            add("ff.net.0.proj", d, 4 * d);
            add("ff.net.2", 4 * d, d);
            if !last {
                add("ff_context.net.0.proj", d, 4 * d);
                add("ff_context.net.2", 4 * d, d);
            }
        }
        add("norm_out.linear".into(), d, 2 * d);
        add("proj_out".into(), d, self.patch_out());
        sites
    }
}

impl MmditConfig {
    /// SD3-Medium, or with RMSNorm and dual attention SD3.5-Medium.
    pub fn medium(qk_norm: Option<&str>, dual: Vec<usize>) -> Self {
        Self {
            patch_size: 2,
            in_channels: 16,
            num_layers: 24,
            attention_head_dim: 64,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            caption_projection_dim: 1536,
            pooled_projection_dim: 2048,
            out_channels: Some(16),
            pos_embed_max_size: 192,
            qk_norm: qk_norm.map(str::to_owned),
            dual_attention_layers: dual,
        }
    }

    /// SD3.5-Large.
    pub fn large() -> Self {
        Self { num_layers: 38, num_attention_heads: 38, caption_projection_dim: 2432, ..Self::medium(Some("rms_norm"), Vec::new()) }
    }

    /// The published model of this name: `sd3-medium`, `sd3.5-medium` or `sd3.5-large`.
    pub fn published(name: &str) -> Option<Self> {
        match name {
            "sd3-medium" => Some(Self::medium(None, Vec::new())),
            "sd3.5-medium" => Some(Self::medium(Some("rms_norm"), (0..13).collect())),
            "sd3.5-large" => Some(Self::large()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published sizes: SD3-Medium 2,028,328,000 parameters, SD3.5-Medium 2,243,171,520, without position tables.
    #[test]
    fn parameter_counts_are_the_published_ones() {
        for (config, norms, expected) in [
            (MmditConfig::medium(None, vec![]), 0, 2_028_328_000),
            (MmditConfig::medium(Some("rms_norm"), (0..13).collect()), (24 * 4 + 13 * 2) * 64, 2_243_171_520_usize),
        ] {
            config.check().unwrap();
            let linears: usize = config.linear_sites().iter().map(|s| s.out_features * (s.in_features + 1)).sum();
            let patch = 1536 * (16 * 4 + 1);
            assert_eq!(linears + patch + norms, expected);
        }
    }

    /// Counts of trained values in the reference: the article's targets and diffusers' default set.
    #[test]
    fn lora_counts_are_those_of_peft() {
        use crate::lora::{LoraLayout, LoraSpec};
        let config = MmditConfig::medium(None, vec![]);
        let count = |targets: &[&str]| {
            let spec = LoraSpec { rank: 4, alpha: 4.0, dropout: 0.0, target_modules: targets.iter().map(|t| (*t).to_owned()).collect() };
            let layout = LoraLayout::new(&spec, &config.linear_sites()).unwrap();
            (layout.modules.len(), layout.parameter_count())
        };
        assert_eq!(count(&["to_k", "to_q", "to_v", "to_out.0"]), (96, 1_179_648));
        let all = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"].map(|n| format!("attn.{n}"));
        assert_eq!(count(&all.each_ref().map(String::as_str)), (191, 2_347_008));
    }

    #[test]
    fn no_dual_attention_has_three_forms() {
        let json = |field: &str| {
            let text = r#"{"patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 12,
                "caption_projection_dim": 8, "pooled_projection_dim": 6, "pos_embed_max_size": 8"#;
            serde_json::from_str::<MmditConfig>(&format!("{text}{field}}}")).unwrap().dual_attention_layers
        };
        assert_eq!([json(""), json(r#", "dual_attention_layers": null"#), json(r#", "dual_attention_layers": []"#)], [const { Vec::<usize>::new() }; 3]);
        assert_eq!(json(r#", "dual_attention_layers": [1]"#), [1]);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let mut config = MmditConfig::medium(Some("layer_norm"), vec![]);
        assert!(config.check().unwrap_err().to_string().contains("qk_norm"));
        config.qk_norm = None;
        config.caption_projection_dim = 7;
        assert!(config.check().unwrap_err().to_string().contains("caption_projection_dim"));
        config.caption_projection_dim = 1536;
        config.dual_attention_layers = vec![24];
        assert!(config.check().unwrap_err().to_string().contains("dual_attention_layers"));
    }
}
