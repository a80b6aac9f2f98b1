//! Sizes of the models, as far as memory and work depend on them.

/// Shape of a Stable Diffusion 3 transformer (MMDiT).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ModelShape {
    /// Name for people.
    pub name: &'static str,
    /// Blocks.
    pub layers: u64,
    /// Width `D`: heads times head size.
    pub hidden: u64,
    /// Size of an attention head.
    pub head: u64,
    /// Blocks, from the first, with a second attention over the picture alone.
    pub dual_layers: u64,
    /// Queries and keys are normalised.
    pub qk_norm: bool,
    /// Width of the prompt embeddings.
    pub joint: u64,
    /// Width of the pooled prompt embedding.
    pub pooled: u64,
    /// Channels of a latent.
    pub channels: u64,
    /// Side of a patch.
    pub patch: u64,
    /// Pixels per latent pixel along one side.
    pub vae_factor: u64,
    /// Text encoders and autoencoder.
    pub encoders: EncoderShape,
}

/// Shape of the models that prepare the data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct EncoderShape {
    /// Parameters of one T5 layer.
    pub t5_layer: u64,
    /// T5's width.
    pub t5_width: u64,
    /// T5's inner width.
    pub t5_feed_forward: u64,
    /// Parameters of the larger of the two CLIP text encoders.
    pub clip: u64,
    /// Parameters of the autoencoder's encoder.
    pub vae_encoder: u64,
    /// Parameters of the autoencoder's decoder.
    pub vae_decoder: u64,
    /// Channels of the autoencoder at full resolution.
    pub vae_channels: u64,
}

/// T5-XXL, CLIP-G and the 16-channel autoencoder.
const SD3_ENCODERS: EncoderShape = EncoderShape {
    // Four 4096 x 4096 projections, three 4096 x 10240 matrices, two norms.
    t5_layer: 4 * 4096 * 4096 + 3 * 4096 * 10_240 + 2 * 4096,
    t5_width: 4096,
    t5_feed_forward: 10_240,
    clip: 694_659_840,
    vae_encoder: 34_273_952,
    vae_decoder: 49_545_731,
    vae_channels: 128,
};

impl ModelShape {
    /// Stable Diffusion 3 Medium.
    pub const SD3_MEDIUM: Self = Self {
        name: "Stable Diffusion 3 Medium",
        layers: 24,
        hidden: 1536,
        head: 64,
        dual_layers: 0,
        qk_norm: false,
        joint: 4096,
        pooled: 2048,
        channels: 16,
        patch: 2,
        vae_factor: 8,
        encoders: SD3_ENCODERS,
    };

    /// Stable Diffusion 3.5 Medium.
    pub const SD35_MEDIUM: Self = Self { name: "Stable Diffusion 3.5 Medium", dual_layers: 13, qk_norm: true, ..Self::SD3_MEDIUM };

    /// Stable Diffusion 3.5 Large.
    pub const SD35_LARGE: Self = Self { name: "Stable Diffusion 3.5 Large", layers: 38, hidden: 2432, dual_layers: 0, ..Self::SD35_MEDIUM };

    /// The published model that a source is named after: its single file, else its repository on the hub.
    pub fn of_source(source: &crate::ModelSource) -> Option<Self> {
        let named = source.files.as_ref().and_then(|files| files.transformer.as_ref());
        let file = named.or_else(|| source.object_store.as_ref().map(|store| &store.uri));
        file.and_then(|path| Self::of_file(path)).or_else(|| Self::of_repository(&source.hugging_face.as_ref()?.repo))
    }

    fn of_file(path: &str) -> Option<Self> {
        let name = path.rsplit('/').next().filter(|name| name.ends_with(".safetensors"))?.to_ascii_lowercase();
        let published = [("sd3.5_medium", Self::SD35_MEDIUM), ("sd3.5_large", Self::SD35_LARGE), ("sd3_medium", Self::SD3_MEDIUM)];
        published.into_iter().find(|(part, _)| name.contains(part)).map(|(_, shape)| shape)
    }

    /// The published model that a repository of the hub is named after; its files say it for certain, later.
    pub fn of_repository(repo: &str) -> Option<Self> {
        let name = repo.rsplit('/').next().unwrap_or(repo).to_ascii_lowercase();
        let published = [("3.5-medium", Self::SD35_MEDIUM), ("3.5-large", Self::SD35_LARGE), ("3-medium", Self::SD3_MEDIUM)];
        published.into_iter().find(|(part, _)| name.contains("stable-diffusion-") && name.contains(part)).map(|(_, shape)| shape)
    }

    /// Parameters of the transformer, without the table of positions.
    pub fn parameters(&self) -> u64 {
        let d = self.hidden;
        let linear = |inputs: u64, outputs: u64| inputs * outputs + outputs;
        let patch_size = self.patch * self.patch * self.channels;
        let embeddings = linear(patch_size, d) + linear(256, d) + linear(self.pooled, d) + 2 * linear(d, d) + linear(self.joint, d);
        let feed_forward = linear(d, 4 * d) + linear(4 * d, d);
        let norms = if self.qk_norm { 4 * self.head } else { 0 };
        let full = 2 * linear(d, 6 * d) + 8 * linear(d, d) + norms + 2 * feed_forward;
        // The last block gives nothing back to the text.
        let last = linear(d, 6 * d) + linear(d, 2 * d) + 7 * linear(d, d) + norms + feed_forward;
        let dual = linear(d, 3 * d) + 4 * linear(d, d) + if self.qk_norm { 2 * self.head } else { 0 };
        embeddings + (self.layers - 1) * full + last + self.dual_layers * dual + linear(d, 2 * d) + linear(d, patch_size)
    }

    /// Those of the weights that can be kept in 8 bits, and their outputs: the attentions and feed-forwards of all blocks, without biases.
    pub fn block_weights(&self) -> (u64, u64) {
        let d = self.hidden;
        // Eight projections and two feed-forwards [4 d, d], [d, 4 d]; the last block has no text behind its attention.
        let (full, last, dual) = (8 + 16, 7 + 8, 4);
        let (full_outputs, last_outputs) = (8 + 10, 7 + 5);
        let of = |full: u64, last: u64| (self.layers - 1) * full + last + self.dual_layers * dual;
        (of(full, last) * d * d, of(full_outputs, last_outputs) * d)
    }

    /// Tokens of one picture at `resolution`.
    pub fn picture_tokens(&self, resolution: u32) -> u64 {
        (u64::from(resolution) / (self.vae_factor * self.patch)).pow(2)
    }

    /// Tokens of a picture and its caption: 77 of CLIP and `max_sequence_length` of T5.
    pub fn tokens(&self, resolution: u32, max_sequence_length: u32) -> u64 {
        self.picture_tokens(resolution) + 77 + u64::from(max_sequence_length)
    }

    /// Bytes of a caption's embeddings as they are prepared, in 32 bits: 77 tokens of CLIP and `max_sequence_length` of T5, and the pooled one.
    pub fn caption_bytes(&self, max_sequence_length: u32) -> u64 {
        ((77 + u64::from(max_sequence_length)) * self.joint + self.pooled) * 4
    }

    /// Parameters of a LoRA of `rank` on the modules whose names end in one of `targets`.
    pub fn lora_parameters(&self, rank: u64, targets: &[String]) -> u64 {
        let mut parameters = 0;
        self.each_target(targets, &mut |_, inputs, outputs| parameters += rank * (inputs + outputs));
        parameters
    }

    /// Modules with LoRA that see a picture's tokens, and those that see a caption's; the ones that make modulations see neither.
    pub fn lora_modules(&self, targets: &[String]) -> (u64, u64) {
        let (mut picture, mut text) = (0, 0);
        self.each_target(targets, &mut |name, _, _| match name {
            _ if name.starts_with("norm1") => {}
            _ if name.contains("add_") || name.starts_with("ff_context") => text += 1,
            _ => picture += 1,
        });
        (picture, text)
    }

    /// Calls `f` with name within its block, inputs and outputs of each module of the blocks whose name ends in one of `targets`.
    fn each_target(&self, targets: &[String], f: &mut dyn FnMut(&str, u64, u64)) {
        let d = self.hidden;
        let matches = |name: &str| targets.iter().any(|target| name == target || name.ends_with(&format!(".{target}")));
        for block in 0..self.layers {
            let last = block + 1 == self.layers;
            let mut module = |name: &str, inputs: u64, outputs: u64| {
                if matches(&format!("transformer_blocks.{block}.{name}")) {
                    f(name, inputs, outputs);
                }
            };
            let dual = block < self.dual_layers;
            module("norm1.linear", d, if dual { 9 * d } else { 6 * d });
            module("norm1_context.linear", d, if last { 2 * d } else { 6 * d });
            for name in ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"] {
                module(&format!("attn.{name}"), d, d);
            }
            if !last {
                module("attn.to_add_out", d, d);
                module("ff_context.net.0.proj", d, 4 * d);
                module("ff_context.net.2", 4 * d, d);
            }
            if dual {
                for name in ["to_q", "to_k", "to_v", "to_out.0"] {
                    module(&format!("attn2.{name}"), d, d);
                }
            }
            module("ff.net.0.proj", d, 4 * d);
            module("ff.net.2", 4 * d, d);
        }
    }

    /// Floating-point operations of one forward pass over one picture: (matrix products with weights, attention).
    pub fn forward_flops(&self, resolution: u32, max_sequence_length: u32) -> (f64, f64) {
        let d = self.hidden as f64;
        let picture = self.picture_tokens(resolution) as f64;
        let all = self.tokens(resolution, max_sequence_length) as f64;
        let text = all - picture;
        let layers = self.layers as f64;
        let dual = self.dual_layers as f64;
        let weights = 2.0 * 12.0 * d * d * (layers * picture + (layers - 1.0) * text) + 2.0 * 2.0 * d * d * text + 2.0 * 4.0 * d * d * dual * picture;
        let attention = 4.0 * d * (layers * all * all + dual * picture * picture);
        (weights, attention)
    }
}

#[cfg(test)]
mod tests {
    use super::ModelShape;

    #[test]
    fn parameters_are_those_of_the_published_models() {
        assert_eq!(ModelShape::SD3_MEDIUM.parameters(), 2_028_328_000);
        assert_eq!(ModelShape::SD35_MEDIUM.parameters(), 2_243_171_520);
        // 8.06 thousand million without the table of positions.
        assert!((8.0e9..8.2e9).contains(&(ModelShape::SD35_LARGE.parameters() as f64)));
    }

    /// The tensors of a configuration, counted one by one: those of attentions and feed-forwards.
    #[test]
    fn weights_of_blocks_are_most_of_the_parameters() {
        for (shape, share) in [(ModelShape::SD3_MEDIUM, 0.65), (ModelShape::SD35_MEDIUM, 0.64), (ModelShape::SD35_LARGE, 0.66)] {
            let found = shape.block_weights().0 as f64 / shape.parameters() as f64;
            assert!((found - share).abs() < 0.02, "{}: {found}", shape.name);
        }
        // By hand: 24 blocks of 1536: 23 · 24 + 15 squares, 23 · 18 + 12 rows of outputs.
        assert_eq!(ModelShape::SD3_MEDIUM.block_weights(), (567 * 1536 * 1536, 426 * 1536));
    }

    #[test]
    fn published_repositories_are_known_by_name() {
        for (repo, shape) in [
            ("stabilityai/stable-diffusion-3-medium-diffusers", Some(ModelShape::SD3_MEDIUM)),
            ("stabilityai/stable-diffusion-3.5-medium", Some(ModelShape::SD35_MEDIUM)),
            ("stabilityai/stable-diffusion-3.5-large-turbo", Some(ModelShape::SD35_LARGE)),
            ("somebody/medium", None),
        ] {
            assert_eq!(ModelShape::of_repository(repo), shape, "{repo}");
        }
        for (source, shape) in [
            (serde_json::json!({"objectStore": {"uri": "s3://m/SD3.5_Large_fp8.safetensors"}}), Some(ModelShape::SD35_LARGE)),
            (serde_json::json!({"objectStore": {"uri": "s3://m/"}, "files": {"transformer": "a/sd3.5_medium.safetensors"}}), Some(ModelShape::SD35_MEDIUM)),
            (serde_json::json!({"objectStore": {"uri": "s3://m/sd3_medium/"}}), None),
        ] {
            assert_eq!(ModelShape::of_source(&serde_json::from_value(source.clone()).unwrap()), shape, "{source}");
        }
    }

    #[test]
    fn modules_are_counted_by_what_they_see() {
        let of = |targets: &[&str]| ModelShape::SD35_MEDIUM.lora_modules(&targets.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&["to_q"]), (24 + 13, 0));
        assert_eq!(of(&["attn.add_k_proj", "to_add_out", "ff_context.net.2"]), (0, 24 + 23 + 23));
        assert_eq!(of(&["linear", "ff.net.2"]), (24, 0));
    }

    #[test]
    fn lora_parameters_are_those_of_peft() {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let article = names(&["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]);
        let all = names(&["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]);
        let short = names(&["to_q", "to_k", "to_v", "to_out.0"]);
        assert_eq!(ModelShape::SD3_MEDIUM.lora_parameters(4, &article), 1_179_648);
        assert_eq!(ModelShape::SD3_MEDIUM.lora_parameters(4, &all), 2_347_008);
        assert_eq!(ModelShape::SD35_MEDIUM.lora_parameters(4, &article), 1_179_648);
        assert_eq!(ModelShape::SD35_MEDIUM.lora_parameters(4, &short), (96 + 52) * 4 * 2 * 1536);
        assert_eq!(ModelShape::SD3_MEDIUM.lora_parameters(4, &names(&["o_q"])), 0);
    }

    #[test]
    fn work_is_that_of_the_reference() {
        let tera = |shape: ModelShape, resolution, length| {
            let (weights, attention) = shape.forward_flops(resolution, length);
            (weights + attention) / 1e12
        };
        for (shape, resolution, length, expected) in [
            (ModelShape::SD3_MEDIUM, 512, 77, 1.80),
            (ModelShape::SD3_MEDIUM, 512, 256, 2.11),
            (ModelShape::SD3_MEDIUM, 768, 77, 4.23),
            (ModelShape::SD3_MEDIUM, 1024, 77, 8.44),
            (ModelShape::SD35_MEDIUM, 512, 77, 2.14),
            (ModelShape::SD35_MEDIUM, 1024, 77, 10.78),
        ] {
            let found: f64 = tera(shape, resolution, length);
            assert!((found / expected - 1.0).abs() < 0.02, "{} at {resolution}: {found} instead of {expected}", shape.name);
        }
    }
}
