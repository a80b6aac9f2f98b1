//! T5's encoder (v1.1: gated GELU), streamed layer by layer: all captions go through one layer, then its weights are dropped.
//!
//! No attention mask: padding attends and is attended to, as in the reference pipeline. Weights of f16 and bf16 are
//! computed with in f32, so the overflow of `wo` in f16 does not occur.

use candle_core::{Device, Tensor};
use serde::Deserialize;

use super::TextError;
use super::layers::{LayerReader, Linear, attention, embed};
use crate::layout::ComponentConfig;
use crate::weights::Weights;

/// `config.json` of a T5 encoder.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct T5Config {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the states.
    pub d_model: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of layers.
    pub num_layers: usize,
    /// Heads of the attention.
    pub num_heads: usize,
    /// Buckets of the relative position bias.
    #[serde(default = "buckets")]
    pub relative_attention_num_buckets: usize,
    /// Distance from which on all positions share a bucket.
    #[serde(default = "distance")]
    pub relative_attention_max_distance: usize,
    /// Epsilon of the norms.
    #[serde(default = "epsilon")]
    pub layer_norm_epsilon: f64,
    /// Must be `gated-gelu`.
    #[serde(default = "relu")]
    pub feed_forward_proj: String,
}

fn buckets() -> usize {
    32
}

fn distance() -> usize {
    128
}

fn epsilon() -> f64 {
    1e-6
}

fn relu() -> String {
    "relu".into()
}

impl ComponentConfig for T5Config {
    fn check(&self) -> Result<(), String> {
        if [self.vocab_size, self.d_model, self.d_kv, self.d_ff, self.num_layers, self.num_heads].contains(&0) {
            return Err("a size is 0".into());
        }
        if self.feed_forward_proj != "gated-gelu" {
            return Err(format!("feed_forward_proj is {:?}; only the encoder of T5 v1.1 (\"gated-gelu\") is supported", self.feed_forward_proj));
        }
        if self.relative_attention_num_buckets < 4 || self.relative_attention_max_distance <= self.relative_attention_num_buckets / 4 {
            return Err("relative_attention_num_buckets must be at least 4 and relative_attention_max_distance above a quarter of it".into());
        }
        Ok(())
    }
}

impl T5Config {
    /// The bucket of a key at `offset` (key position minus query position); bidirectional.
    fn bucket(&self, offset: i64) -> usize {
        let half = self.relative_attention_num_buckets / 2;
        let side = if offset > 0 { half } else { 0 };
        let distance = offset.unsigned_abs() as usize;
        let exact = half / 2;
        if distance < exact {
            return side + distance;
        }
        // In f32, in the reference's order of operations: a bucket's border falls on whole distances.
        let log = (distance as f32 / exact as f32).ln() / (self.relative_attention_max_distance as f64 / exact as f64).ln() as f32;
        side + (exact + (log * (half - exact) as f32) as usize).min(half - 1)
    }

    /// The position bias [heads, tokens, tokens] from block 0's table, which all blocks share.
    pub(super) fn bias_values(&self, weights: &Weights, tokens: usize) -> Result<Vec<f32>, TextError> {
        const NAME: &str = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        weights.view_of_shape(NAME, &[self.relative_attention_num_buckets, self.num_heads])?;
        let table = weights.f32(NAME)?;
        let mut bias = Vec::with_capacity(self.num_heads * tokens * tokens);
        for head in 0..self.num_heads {
            for query in 0..tokens as i64 {
                bias.extend((0..tokens as i64).map(|key| table[self.bucket(key - query) * self.num_heads + head]));
            }
        }
        Ok(bias)
    }
}

struct Layer {
    norm1: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm2: Tensor,
    wi_0: Linear,
    wi_1: Linear,
    wo: Linear,
}

impl Layer {
    fn load(reader: &LayerReader, config: &T5Config) -> Result<Self, TextError> {
        let (d, ff, inner) = (config.d_model, config.d_ff, config.num_heads * config.d_kv);
        Ok(Self {
            norm1: reader.vector("layer.0.layer_norm.weight", d)?,
            q: reader.linear_without_bias("layer.0.SelfAttention.q", inner, d)?,
            k: reader.linear_without_bias("layer.0.SelfAttention.k", inner, d)?,
            v: reader.linear_without_bias("layer.0.SelfAttention.v", inner, d)?,
            o: reader.linear_without_bias("layer.0.SelfAttention.o", d, inner)?,
            norm2: reader.vector("layer.1.layer_norm.weight", d)?,
            wi_0: reader.linear_without_bias("layer.1.DenseReluDense.wi_0", ff, d)?,
            wi_1: reader.linear_without_bias("layer.1.DenseReluDense.wi_1", ff, d)?,
            wo: reader.linear_without_bias("layer.1.DenseReluDense.wo", d, ff)?,
        })
    }

    fn forward(&self, x: &Tensor, config: &T5Config, bias: &Tensor) -> candle_core::Result<Tensor> {
        let eps = config.layer_norm_epsilon as f32;
        let h = candle_nn::ops::rms_norm_slow(x, &self.norm1, eps)?;
        // T5 does not scale by 1/sqrt(d): the factor is in its weights.
        let h = attention(&self.q.forward(&h)?, &self.k.forward(&h)?, &self.v.forward(&h)?, config.num_heads, 1.0, bias)?;
        let x = (x + self.o.forward(&h)?)?;
        let h = candle_nn::ops::rms_norm_slow(&x, &self.norm2, eps)?;
        let h = (self.wi_0.forward(&h)?.gelu()? * self.wi_1.forward(&h)?)?;
        x + self.wo.forward(&h)?
    }
}

/// Encodes token ids in batches of captions to the final states [captions, tokens, d_model]. `progress` gets the number
/// of layers done.
pub(super) fn encode(
    weights: &Weights,
    config: &T5Config,
    batches: &[&[Vec<u32>]],
    device: &Device,
    progress: &mut dyn FnMut(usize) -> Result<(), TextError>,
) -> Result<Vec<Tensor>, TextError> {
    let tokens = batches.iter().flat_map(|b| b.iter()).map(Vec::len).max().unwrap_or(0);
    let table = if weights.contains("shared.weight") { "shared.weight" } else { "encoder.embed_tokens.weight" };
    let mut states = Vec::with_capacity(batches.len());
    for batch in batches {
        states.push(embed(weights, table, config.vocab_size, config.d_model, batch, device)?);
    }
    weights.release(table);
    let bias = Tensor::from_vec(config.bias_values(weights, tokens)?, (1, config.num_heads, tokens, tokens), device)?;
    for index in 0..config.num_layers {
        progress(index)?;
        let prefix = format!("encoder.block.{index}.");
        let layer = Layer::load(&LayerReader { weights, prefix: prefix.clone(), device }, config)?;
        // The weights are copies by now. Dropping the file's pages here, and asking for the next layer's while this one
        // computes, keeps one layer in memory and hides the disk.
        weights.release(&prefix);
        weights.will_need(&format!("encoder.block.{}.", index + 1));
        for state in &mut states {
            *state = layer.forward(state, config, &bias)?;
        }
    }
    let norm = LayerReader { weights, prefix: "encoder.".into(), device }.vector("final_layer_norm.weight", config.d_model)?;
    for state in &mut states {
        *state = candle_nn::ops::rms_norm_slow(state, &norm, config.layer_norm_epsilon as f32)?;
    }
    progress(config.num_layers)?;
    Ok(states)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of transformers' `T5Attention._relative_position_bucket(bidirectional=True, 32, 128)`.
    #[test]
    fn buckets_of_the_reference() {
        let config: T5Config =
            serde_json::from_value(serde_json::json!({"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2})).unwrap();
        for (offset, bucket) in
            [(0, 0), (-1, 1), (1, 17), (7, 23), (-8, 8), (8, 24), (-11, 8), (-12, 9), (16, 26), (-63, 13), (-64, 14), (90, 30), (91, 31), (-127, 15), (500, 31)]
        {
            assert_eq!(config.bucket(offset), bucket, "{offset}");
        }
        assert!(config.check().unwrap_err().contains("gated-gelu"));
    }
}
