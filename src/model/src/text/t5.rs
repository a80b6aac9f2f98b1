//! T5's encoder (v1.1: gated GELU), streamed layer by layer: all captions go through one layer, then its weights are dropped.
//!
//! No attention mask: padding attends and is attended to, as in the reference pipeline. The residual stream is f32, so the overflow of `wo`
//! in f16 does not occur.

use serde::Deserialize;

use super::TextError;
use super::layers::{Batching, Layers, Shape, linear, table, vector};
use crate::layout::ComponentConfig;
use crate::weights::{Weights, WeightsError};
use finetune_compute::kernels::{Device, TextAttention};

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

/// The final states [tokens, d_model] of each caption, to its place. `progress` gets the number of layers done.
pub(super) fn encode<D: Device>(
    device: &D,
    weights: &Weights,
    config: &T5Config,
    ids: &[Vec<u32>],
    places: &mut [&mut [f32]],
    progress: &mut dyn FnMut(usize) -> Result<(), TextError>,
) -> Result<(), TextError> {
    let Some(tokens) = ids.first().map(Vec::len) else { return Ok(()) };
    let (d, ff, heads, dim) = (config.d_model, config.d_ff, config.num_heads, config.d_kv);
    let (inner, epsilon) = (heads * dim, config.layer_norm_epsilon as f32);
    let shapes = [
        Shape { names: &["layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"], outputs: inner, inputs: d },
        Shape { names: &["layer.0.SelfAttention.o"], outputs: d, inputs: inner },
        Shape { names: &["layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"], outputs: ff, inputs: d },
        Shape { names: &["layer.1.DenseReluDense.wo"], outputs: d, inputs: ff },
    ];
    let layers = Layers::new(weights, "encoder.block.", config.num_layers, shapes)?;
    let norms = |name: &str| (0..config.num_layers).map(|i| Ok(device.upload_f32(&layers.vector(i, &[name], d)?))).collect::<Result<Vec<_>, WeightsError>>();
    let (norm1, norm2) = (norms("layer.0.layer_norm.weight")?, norms("layer.1.layer_norm.weight")?);
    let last = device.upload_f32(&vector(weights, "encoder.final_layer_norm.weight", d)?);
    let bias = device.upload_f32(&config.bias_values(weights, tokens)?);
    let embeddings = if weights.contains("shared.weight") { "shared.weight" } else { "encoder.embed_tokens.weight" };
    // T5 does not scale by 1/√d: the factor is in its weights.
    let attention = TextAttention { tokens, heads, dim, scale: 1.0, causal: false };
    let batching = Batching::new(device.is_batch_invariant(), tokens, d);
    for (pass, places) in ids.chunks(batching.pass()).zip(places.chunks_mut(batching.pass())) {
        let mut states = Vec::new();
        for batch in pass.chunks(batching.captions) {
            let ids = batch.concat();
            let table = table(weights, embeddings, (config.vocab_size, d), &ids)?;
            let rows = batching.rows(batch);
            states.push((rows, device.embed(&table, d, &ids, rows)));
        }
        weights.release(embeddings);
        device.stream_layers(config.num_layers, &layers, &mut |index, matrices| {
            progress(index)?;
            let &[qkv, o, wi, wo] = matrices else { return Ok(()) };
            for (rows, state) in &mut states {
                let h = linear(device, *rows, &device.rms_norm_rows(state, &norm1[index], epsilon), qkv, None);
                device.layer_product(*rows, &device.text_attention(attention, &h, Some(&bias)), o, None, state, true);
                let h = linear(device, *rows, &device.rms_norm_rows(state, &norm2[index], epsilon), wi, None);
                device.layer_product(*rows, &device.gated_gelu(&h, ff), wo, None, state, true);
            }
            Ok::<_, TextError>(())
        })?;
        for (places, (_, state)) in places.chunks_mut(batching.captions).zip(states) {
            device.download_to(&device.rms_norm_rows(&state, &last, epsilon), places);
        }
    }
    progress(config.num_layers)
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
