//! What `config.json` would say of a part, by the shapes of its tensors and the constants that every published Stable Diffusion 3 has.

use serde_json::{Value, json};

use super::names::{CLIP_POSITIONS, last_block};
use crate::layout::Part;
use crate::survey::Tensors;

/// Width of an attention head in every published transformer and text encoder.
const HEAD: usize = 64;
/// What the autoencoder's latents are scaled and shifted by.
const LATENTS: (f64, f64) = (1.5305, 0.0609);
/// Groups of the autoencoder's norms.
const GROUPS: usize = 32;

/// Shapes of the tensors after a prefix.
struct Shapes<'a> {
    prefix: &'a str,
    tensors: &'a Tensors,
}

impl Shapes<'_> {
    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(&format!("{}{name}", self.prefix))
    }

    /// The shape of a tensor that has so many dimensions.
    fn of<const N: usize>(&self, name: &str) -> Result<[usize; N], String> {
        let name = format!("{}{name}", self.prefix);
        let shape = &self.tensors.get(&name).ok_or_else(|| format!("has no tensor {name:?}"))?.shape;
        shape[..].try_into().map_err(|_| format!("has a tensor {name:?} of shape {shape:?}, which should have {N} dimensions"))
    }

    /// How many of the numbered modules there are that have the tensor `name(number)`.
    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..self.tensors.len()).take_while(|number| self.has(&name(*number))).count()
    }
}

/// The configuration of a part whose tensors' names begin with `prefix`.
///
/// # Errors
/// A sentence without its subject, the file: which tensor is missing or of another form.
pub(super) fn infer(part: Part, prefix: &str, tensors: &Tensors) -> Result<Value, String> {
    let shapes = Shapes { prefix, tensors };
    match part {
        Part::Transformer => transformer(&shapes),
        Part::Vae => vae(&shapes),
        Part::TextEncoder => clip(&shapes, "quick_gelu", None),
        Part::TextEncoder2 => clip(&shapes, "gelu", Some("text_projection.weight")),
        Part::TextEncoder3 => t5(&shapes),
        Part::Tokenizer | Part::Tokenizer2 | Part::Tokenizer3 | Part::Scheduler => Ok(json!({})),
    }
}

fn transformer(shapes: &Shapes<'_>) -> Result<Value, String> {
    let [width, channels, patch, _] = shapes.of("x_embedder.proj.weight")?;
    let [_, positions, _] = shapes.of("pos_embed")?;
    let side = positions.isqrt();
    let [_, joint] = shapes.of("context_embedder.weight")?;
    let [_, pooled] = shapes.of("y_embedder.mlp.0.weight")?;
    let [outputs, _] = shapes.of("final_layer.linear.weight")?;
    let layers = last_block(shapes.prefix, shapes.tensors) + 1;
    let norm = "joint_blocks.0.x_block.attn.ln_q.weight";
    let head = if shapes.has(norm) { shapes.of::<1>(norm)?[0] } else { HEAD };
    let dual: Vec<usize> = (0..layers).filter(|layer| shapes.has(&format!("joint_blocks.{layer}.x_block.attn2.qkv.weight"))).collect();
    if head == 0 || patch == 0 || width % head != 0 || side * side != positions {
        return Err(format!("has a transformer of width {width} with heads of {head}, patches of {patch} and {positions} positions, which fits no model"));
    }
    Ok(json!({
        "_class_name": "SD3Transformer2DModel",
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": outputs / (patch * patch),
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width / head,
        "joint_attention_dim": joint,
        "caption_projection_dim": width,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": side,
        "qk_norm": shapes.has(norm).then_some("rms_norm"),
        "dual_attention_layers": dual,
    }))
}

fn vae(shapes: &Shapes<'_>) -> Result<Value, String> {
    let [_, inputs, ..] = shapes.of::<4>("encoder.conv_in.weight")?;
    let [moments, ..] = shapes.of::<4>("encoder.conv_out.weight")?;
    let outputs = if shapes.has("decoder.conv_out.weight") { shapes.of::<4>("decoder.conv_out.weight")?[0] } else { inputs };
    let levels = shapes.count(|level| format!("encoder.down.{level}.block.0.conv1.weight"));
    let channels =
        (0..levels).map(|level| Ok(shapes.of::<4>(&format!("encoder.down.{level}.block.0.conv1.weight"))?[0])).collect::<Result<Vec<_>, String>>()?;
    Ok(json!({
        "_class_name": "AutoencoderKL",
        "in_channels": inputs,
        "out_channels": outputs,
        "block_out_channels": channels,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "layers_per_block": shapes.count(|block| format!("encoder.down.0.block.{block}.conv1.weight")),
        "latent_channels": moments / 2,
        "norm_num_groups": GROUPS,
        "act_fn": "silu",
        "scaling_factor": LATENTS.0,
        "shift_factor": LATENTS.1,
        "use_quant_conv": shapes.has("quant_conv.weight"),
        "use_post_quant_conv": shapes.has("post_quant_conv.weight"),
        "mid_block_add_attention": shapes.has("encoder.mid.attn_1.q.weight"),
    }))
}

/// `projection`: the matrix whose rows are the pooled output; without one it is as wide as the states.
fn clip(shapes: &Shapes<'_>, activation: &str, projection: Option<&str>) -> Result<Value, String> {
    let [positions, width] = shapes.of(CLIP_POSITIONS)?;
    let [vocabulary, _] = shapes.of("text_model.embeddings.token_embedding.weight")?;
    let [inner, _] = shapes.of("text_model.encoder.layers.0.mlp.fc1.weight")?;
    let projected = projection.map_or(Ok(width), |name| shapes.of::<2>(name).map(|[rows, _]| rows))?;
    Ok(json!({
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": shapes.count(|layer| format!("text_model.encoder.layers.{layer}.mlp.fc1.weight")),
        "num_attention_heads": width / HEAD,
        "max_position_embeddings": positions,
        "projection_dim": projected,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "eos_token_id": vocabulary.saturating_sub(1),
    }))
}

fn t5(shapes: &Shapes<'_>) -> Result<Value, String> {
    let table = if shapes.has("shared.weight") { "shared.weight" } else { "encoder.embed_tokens.weight" };
    let [vocabulary, width] = shapes.of(table)?;
    let [inner, _] = shapes.of("encoder.block.0.layer.0.SelfAttention.q.weight")?;
    let [buckets, heads] = shapes.of("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")?;
    let [ff, _] = shapes.of("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")?;
    Ok(json!({
        "architectures": ["T5EncoderModel"],
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner.checked_div(heads).unwrap_or(0),
        "d_ff": ff,
        "num_layers": shapes.count(|layer| format!("encoder.block.{layer}.layer.0.SelfAttention.q.weight")),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    }))
}
