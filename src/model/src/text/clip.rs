//! CLIP's text encoder, as transformers' `CLIPTextModelWithProjection`, one layer's weights in memory at a time.
//!
//! Stable Diffusion 3 takes `hidden_states[-2]` (the output of the last but one layer, without the final norm) and the
//! projection of the end token's final state. Attention is causal; padding is not masked.

use serde::Deserialize;

use super::TextError;
use super::layers::{Batching, Layers, Shape, linear, table, vector};
use crate::layout::ComponentConfig;
use crate::weights::{Weights, WeightsError};
use finetune_compute::kernels::{Cpu, Device, StoredMatrix as _, TextActivation, TextAttention};

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

/// What CLIP makes of a batch of captions.
pub(super) struct ClipOutput {
    /// `hidden_states[-2]` of each caption: [tokens, hidden_size].
    pub(super) hidden: Vec<Vec<f32>>,
    /// [projection_dim] of each caption.
    pub(super) pooled: Vec<Vec<f32>>,
}

/// Position whose final state is pooled.
fn pooled_position(ids: &[u32], end: u32) -> usize {
    let first_of = |wanted: u32| ids.iter().position(|id| *id == wanted).unwrap_or(0);
    if end == 2 { first_of(ids.iter().copied().max().unwrap_or(0)) } else { first_of(end) }
}

/// Embeddings of tokens and positions [captions · tokens, hidden_size], followed by zeros up to `rows` rows.
fn embed(weights: &Weights, config: &ClipConfig, batch: &[Vec<u32>], rows: usize) -> Result<Vec<f32>, TextError> {
    const TOKENS: &str = "text_model.embeddings.token_embedding.weight";
    const POSITIONS: &str = "text_model.embeddings.position_embedding.weight";
    let (d, limit) = (config.hidden_size, config.max_position_embeddings);
    if let Some(ids) = batch.iter().find(|ids| ids.len() > limit) {
        return Err(TextError::TooManyTokens { tokens: ids.len(), limit, path: weights.path().to_owned() });
    }
    weights.view_of_shape(POSITIONS, &[limit, d])?;
    let (positions, ids) = (weights.f32(POSITIONS)?, batch.concat());
    let table = table(weights, TOKENS, (config.vocab_size, d), &ids)?;
    let mut values = vec![0.0; rows * d];
    let places = batch.iter().flat_map(|ids| ids.iter().zip(positions.chunks_exact(d)));
    for (row, (&id, position)) in values.chunks_exact_mut(d).zip(places) {
        table.read_block(id as usize..id as usize + 1, 0..d, row);
        row.iter_mut().zip(position).for_each(|(value, position)| *value += position);
    }
    Ok(values)
}

/// What is done to a caption's end token, on the CPU.
struct Pooling {
    device: Cpu,
    norm: [<Cpu as Device>::Buffer; 2],
    projection: <Cpu as Device>::Weight,
}

impl Pooling {
    fn load(weights: &Weights, config: &ClipConfig) -> Result<Self, WeightsError> {
        const PROJECTION: &str = "text_projection.weight";
        let (device, d) = (Cpu::default(), config.hidden_size);
        let norm = |part: &str| Ok::<_, WeightsError>(device.upload(&vector(weights, &format!("text_model.final_layer_norm.{part}"), d)?));
        weights.view_of_shape(PROJECTION, &[config.projection_dim, d])?;
        Ok(Self { norm: [norm("weight")?, norm("bias")?], projection: device.frozen(config.projection_dim, d, &weights.f32(PROJECTION)?), device })
    }

    /// The projection of the final norm of each caption's end token, from its final states [tokens, hidden_size].
    fn pool<'a>(&self, config: &ClipConfig, captions: impl Iterator<Item = (&'a Vec<u32>, &'a [f32])>) -> Vec<Vec<f32>> {
        let d = config.hidden_size;
        let ends: Vec<f32> = captions.flat_map(|(ids, states)| states[pooled_position(ids, config.eos_token_id) * d..][..d].iter().copied()).collect();
        let rows = ends.len() / d;
        let normal = self.device.layer_norm(&self.device.upload(&ends), &self.norm[0], &self.norm[1], config.layer_norm_eps as f32);
        let mut pooled = self.device.alloc(rows * config.projection_dim);
        self.device.linear(rows, &normal, &self.projection, None, None, &mut pooled);
        self.device.download(&pooled).chunks_exact(config.projection_dim).map(<[f32]>::to_vec).collect()
    }
}

/// The biases and norms of a layer, on the device.
struct Vectors<D: Device> {
    norm1: [D::Buffer; 2],
    norm2: [D::Buffer; 2],
    qkv: D::Buffer,
    out: D::Buffer,
    fc1: D::Buffer,
    fc2: D::Buffer,
}

impl<D: Device> Vectors<D> {
    fn load(device: &D, layers: &Layers<'_>, config: &ClipConfig, index: usize) -> Result<Self, WeightsError> {
        let d = config.hidden_size;
        let f32 = |name: &str| Ok::<_, WeightsError>(device.upload_f32(&layers.vector(index, &[name], d)?));
        // In the type of what they are added to: the residual stream's is f32.
        Ok(Self {
            norm1: [f32("layer_norm1.weight")?, f32("layer_norm1.bias")?],
            norm2: [f32("layer_norm2.weight")?, f32("layer_norm2.bias")?],
            qkv: device.upload(&layers.vector(index, &["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"], d)?),
            out: f32("self_attn.out_proj.bias")?,
            fc1: device.upload(&layers.vector(index, &["mlp.fc1.bias"], config.intermediate_size)?),
            fc2: f32("mlp.fc2.bias")?,
        })
    }
}

/// Encodes token ids; one output for each batch of captions. `progress` gets the number of layers done.
pub(super) fn encode<D: Device>(
    device: &D,
    weights: &Weights,
    config: &ClipConfig,
    ids: &[Vec<u32>],
    progress: &mut dyn FnMut(usize) -> Result<(), TextError>,
) -> Result<Vec<ClipOutput>, TextError> {
    let Some(tokens) = ids.first().map(Vec::len) else { return Ok(Vec::new()) };
    let (d, ff, heads) = (config.hidden_size, config.intermediate_size, config.num_attention_heads);
    let (dim, epsilon, count) = (d / heads, config.layer_norm_eps as f32, config.num_hidden_layers);
    let shapes = [
        Shape { names: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], outputs: d, inputs: d },
        Shape { names: &["self_attn.out_proj"], outputs: d, inputs: d },
        Shape { names: &["mlp.fc1"], outputs: ff, inputs: d },
        Shape { names: &["mlp.fc2"], outputs: d, inputs: ff },
    ];
    let layers = Layers::new(weights, "text_model.encoder.layers.", count, shapes)?;
    let vectors = (0..count).map(|i| Vectors::load(device, &layers, config, i)).collect::<Result<Vec<_>, _>>()?;
    let activation = match config.hidden_act {
        Activation::QuickGelu => TextActivation::QuickGelu,
        Activation::Gelu => TextActivation::Gelu,
    };
    let attention = TextAttention { tokens, heads, dim, scale: 1.0 / (dim as f32).sqrt(), causal: true };
    let batching = Batching::new(device.is_batch_invariant(), tokens, d);
    let pooling = Pooling::load(weights, config)?;
    let mut outputs = Vec::new();
    for pass in ids.chunks(batching.pass()) {
        let mut states = Vec::new();
        for batch in pass.chunks(batching.captions) {
            let rows = batching.rows(batch);
            states.push((rows, device.upload_f32(&embed(weights, config, batch, rows)?)));
        }
        weights.release("text_model.embeddings.");
        // With a single layer the last but one state is the embedding.
        let mut hidden: Vec<D::Buffer> = if count == 1 { states.iter().map(|(_, state)| device.copy(state)).collect() } else { Vec::new() };
        device.stream_layers(count, &layers, &mut |index, matrices| {
            progress(index)?;
            let (&[qkv, out, fc1, fc2], own) = (matrices, &vectors[index]) else { return Ok(()) };
            for (rows, state) in &mut states {
                let h = linear(device, *rows, &device.layer_norm(state, &own.norm1[0], &own.norm1[1], epsilon), qkv, Some(&own.qkv));
                device.layer_product(*rows, &device.text_attention(attention, &h, None), out, Some(&own.out), state, true);
                let mut h = linear(device, *rows, &device.layer_norm(state, &own.norm2[0], &own.norm2[1], epsilon), fc1, Some(&own.fc1));
                device.activate(&mut h, activation);
                device.layer_product(*rows, &h, fc2, Some(&own.fc2), state, true);
            }
            if index + 2 == count {
                hidden = states.iter().map(|(_, state)| device.copy(state)).collect();
            }
            Ok::<_, TextError>(())
        })?;
        for ((batch, (_, state)), hidden) in pass.chunks(batching.captions).zip(states).zip(hidden) {
            let (state, hidden) = (device.download(&state), device.download(&hidden));
            outputs.push(ClipOutput {
                hidden: hidden.chunks_exact(tokens * d).take(batch.len()).map(<[f32]>::to_vec).collect(),
                pooled: pooling.pool(config, batch.iter().zip(state.chunks_exact(tokens * d))),
            });
        }
    }
    progress(count)?;
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
