//! CLIP's text encoder, as transformers' `CLIPTextModelWithProjection`, one layer's weights in memory at a time.
//!
//! Stable Diffusion 3 takes `hidden_states[-2]` (the output of the last but one layer, without the final norm) and the
//! projection of the end token's final state. Attention is causal; padding is not masked.

use candle_core::{Device, IndexOp as _, Tensor};
use rayon::prelude::*;
use serde::Deserialize;

use super::TextError;
use super::layers::{LayerNorm, LayerReader, Linear, attention, embed};
use crate::layout::ComponentConfig;
use crate::weights::Weights;

/// `config.json` of a CLIP text encoder.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ClipConfig {
    /// Number of token ids.
    #[serde(default = "vocabulary")]
    pub vocab_size: usize,
    /// Width of the states.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Heads of the attention.
    pub num_attention_heads: usize,
    /// Longest sequence.
    #[serde(default = "positions")]
    pub max_position_embeddings: usize,
    /// Width of the pooled output.
    pub projection_dim: usize,
    /// `quick_gelu` (CLIP-L) or `gelu` (CLIP-G).
    #[serde(default)]
    pub hidden_act: Activation,
    /// Epsilon of the norms.
    #[serde(default = "epsilon")]
    pub layer_norm_eps: f64,
    /// The end token, whose first occurrence is pooled. 2 is the old form: the largest id of the sequence is pooled.
    #[serde(default = "end_token")]
    pub eos_token_id: u32,
}

/// Activation of CLIP's MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x σ(1.702 x).
    #[default]
    QuickGelu,
    /// x Φ(x), with the error function.
    Gelu,
}

fn vocabulary() -> usize {
    49408
}

fn positions() -> usize {
    77
}

fn epsilon() -> f64 {
    1e-5
}

fn end_token() -> u32 {
    49407
}

impl ComponentConfig for ClipConfig {
    fn check(&self) -> Result<(), String> {
        let sizes = [
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.max_position_embeddings,
            self.projection_dim,
        ];
        if sizes.contains(&0) {
            return Err("a size is 0".into());
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(format!("hidden_size {} is not a multiple of num_attention_heads {}", self.hidden_size, self.num_attention_heads));
        }
        Ok(())
    }
}

/// What CLIP says about captions.
pub(super) struct ClipOutput {
    /// `hidden_states[-2]` [captions, tokens, hidden_size].
    pub(super) hidden: Tensor,
    /// [captions, projection_dim].
    pub(super) pooled: Tensor,
}

struct Layer {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Layer {
    fn load(reader: &LayerReader, config: &ClipConfig) -> Result<Self, TextError> {
        let (d, ff, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        Ok(Self {
            norm1: reader.layer_norm("layer_norm1", d, eps)?,
            q: reader.linear("self_attn.q_proj", d, d)?,
            k: reader.linear("self_attn.k_proj", d, d)?,
            v: reader.linear("self_attn.v_proj", d, d)?,
            out: reader.linear("self_attn.out_proj", d, d)?,
            norm2: reader.layer_norm("layer_norm2", d, eps)?,
            fc1: reader.linear("mlp.fc1", ff, d)?,
            fc2: reader.linear("mlp.fc2", d, ff)?,
        })
    }

    fn forward(&self, x: &Tensor, config: &ClipConfig, mask: &Tensor) -> candle_core::Result<Tensor> {
        let heads = config.num_attention_heads;
        let scale = 1.0 / ((config.hidden_size / heads) as f64).sqrt();
        let h = self.norm1.forward(x)?;
        let h = attention(&self.q.forward(&h)?, &self.k.forward(&h)?, &self.v.forward(&h)?, heads, scale, mask)?;
        let x = (x + self.out.forward(&h)?)?;
        let h = self.fc1.forward(&self.norm2.forward(&x)?)?;
        let h = match config.hidden_act {
            Activation::QuickGelu => (&h * candle_nn::ops::sigmoid(&(&h * 1.702)?)?)?,
            Activation::Gelu => h.gelu_erf()?,
        };
        x + self.fc2.forward(&h)?
    }
}

/// Position whose final state is pooled.
fn pooled_position(ids: &[u32], end: u32) -> usize {
    let first_of = |wanted: u32| ids.iter().position(|id| *id == wanted).unwrap_or(0);
    if end == 2 { first_of(ids.iter().copied().max().unwrap_or(0)) } else { first_of(end) }
}

/// Embeddings of tokens and positions [captions, tokens, hidden_size].
pub(super) fn embed_tokens(weights: &Weights, config: &ClipConfig, batch: &[Vec<u32>], device: &Device) -> Result<Tensor, TextError> {
    let (d, tokens) = (config.hidden_size, batch.iter().map(Vec::len).max().unwrap_or(0));
    if tokens > config.max_position_embeddings {
        return Err(TextError::TooManyTokens { tokens, limit: config.max_position_embeddings, path: weights.path().to_owned() });
    }
    let top = LayerReader { weights, prefix: "text_model.".into(), device };
    let positions = top.matrix("embeddings.position_embedding.weight", config.max_position_embeddings, d)?.narrow(0, 0, tokens)?;
    let x = embed(weights, "text_model.embeddings.token_embedding.weight", config.vocab_size, d, batch, device)?;
    Ok(x.broadcast_add(&positions)?)
}

/// What is done to a caption's end token.
pub(super) struct Pooling {
    norm: LayerNorm,
    projection: Linear,
    end: u32,
}

impl Pooling {
    pub(super) fn load(weights: &Weights, config: &ClipConfig, device: &Device) -> Result<Self, TextError> {
        let d = config.hidden_size;
        Ok(Self {
            norm: LayerReader { weights, prefix: "text_model.".into(), device }.layer_norm("final_layer_norm", d, config.layer_norm_eps)?,
            projection: LayerReader { weights, prefix: String::new(), device }.linear_without_bias("text_projection", config.projection_dim, d)?,
            end: config.eos_token_id,
        })
    }

    /// The projection [captions, projection_dim] of the final norm of each caption's end token, from the final states [captions, tokens, hidden_size].
    pub(super) fn pool(&self, batch: &[Vec<u32>], states: &Tensor) -> Result<Tensor, TextError> {
        // Each caption by itself: a product's rounding may depend on its rows where they are few, and a caption's numbers
        // must not depend on the captions beside it.
        let pool = |(i, ids): (usize, &Vec<u32>)| {
            let end = states.i((i, pooled_position(ids, self.end)))?;
            let end = end.reshape((1, 1, end.elem_count()))?;
            self.projection.forward(&self.norm.forward(&end)?)?.reshape((1, ()))
        };
        let pooled = batch.par_iter().enumerate().map(pool).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&pooled, 0)?)
    }
}

/// Encodes token ids in batches of captions. `progress` gets the number of layers done.
pub(super) fn encode(
    weights: &Weights,
    config: &ClipConfig,
    batches: &[&[Vec<u32>]],
    device: &Device,
    progress: &mut dyn FnMut(usize) -> Result<(), TextError>,
) -> Result<Vec<ClipOutput>, TextError> {
    let tokens = batches.iter().flat_map(|b| b.iter()).map(Vec::len).max().unwrap_or(0);
    let mut states = batches.iter().map(|batch| embed_tokens(weights, config, batch, device)).collect::<Result<Vec<_>, _>>()?;
    weights.release("text_model.embeddings.");
    let causal: Vec<f32> = (0..tokens * tokens).map(|i| if i % tokens > i / tokens { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(causal, (1, 1, tokens, tokens), device)?;

    // With a single layer the last but one state is the embedding.
    let mut hidden = states.clone();
    for index in 0..config.num_hidden_layers {
        progress(index)?;
        let prefix = format!("text_model.encoder.layers.{index}.");
        let layer = Layer::load(&LayerReader { weights, prefix: prefix.clone(), device }, config)?;
        for state in &mut states {
            *state = layer.forward(state, config, &mask)?;
        }
        if index + 2 == config.num_hidden_layers {
            hidden.clone_from(&states);
        }
        weights.release(&prefix);
    }
    let pooling = Pooling::load(weights, config, device)?;
    let mut outputs = Vec::with_capacity(batches.len());
    for ((batch, state), hidden) in batches.iter().zip(&states).zip(hidden) {
        outputs.push(ClipOutput { hidden, pooled: pooling.pool(batch, state)? });
    }
    progress(config.num_hidden_layers)?;
    Ok(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_rules_of_the_end_token() {
        let ids = [90, 5, 91, 7, 91, 99, 99];
        assert_eq!(pooled_position(&ids, 91), 2, "first end token");
        assert_eq!(pooled_position(&ids, 2), 5, "largest id, first of equals");
        assert_eq!(pooled_position(&ids, 1), 0, "as argmax of nothing found");
    }
}
