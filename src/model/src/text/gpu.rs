//! The text encoders on a GPU: all captions of a pass through one layer, while the next layer's weights are on their way.
//!
//! The residual stream is f32 (in f16 T5's would overflow), products have the engine's precision. Every product has the same number of
//! rows, whatever the number of captions: a caption's numbers do not depend on its company.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use safetensors::Dtype;

use super::TextError;
use super::clip::{self, Activation, ClipConfig, ClipOutput};
use super::t5::T5Config;
use crate::weights::{Weights, WeightsError};
use finetune_compute::kernels::{Buffer, EncodeOps, LayerSource, Matrix, Precision, StoredRows, TextActivation, TextAttention};

/// Tokens of one product: 32 captions of 77 tokens.
const ROWS: usize = 32 * 77;
/// Values of the residual streams that are on the device at once (512 MiB).
const RESIDENT_VALUES: usize = 1 << 27;

/// A matrix of a layer: what its rows are made of, how many each part has, and its columns.
struct Shape {
    names: &'static [&'static str],
    outputs: usize,
    inputs: usize,
}

/// The matrices of layers called `prefix0`, `prefix1`...
struct Layers<'a> {
    weights: &'a Weights,
    prefix: &'static str,
    shapes: [Shape; 4],
    kinds: [Precision; 4],
}

impl<'a> Layers<'a> {
    /// Checks every layer's shapes and types first: nothing fails on the way.
    fn new(weights: &'a Weights, prefix: &'static str, count: usize, shapes: [Shape; 4]) -> Result<Self, WeightsError> {
        let mut kinds = HashMap::new();
        for layer in 0..count {
            for (index, shape) in shapes.iter().enumerate() {
                for name in shape.names {
                    let name = format!("{prefix}{layer}.{name}.weight");
                    let view = weights.view_of_shape(&name, &[shape.outputs, shape.inputs])?;
                    let kind = stored(view.dtype).filter(|kind| *kinds.entry(index).or_insert(*kind) == *kind);
                    if kind.is_none() {
                        return Err(WeightsError::Dtype { path: weights.path().to_owned(), name, dtype: view.dtype });
                    }
                }
            }
        }
        let kinds = std::array::from_fn(|index| kinds.get(&index).copied().unwrap_or_default());
        Ok(Self { weights, prefix, shapes, kinds })
    }

    /// A vector of layer `layer`, made of these parts, as f32.
    fn vector(&self, layer: usize, names: &[&str], size: usize) -> Result<Vec<f32>, WeightsError> {
        let mut values = Vec::with_capacity(names.len() * size);
        for name in names {
            values.extend(vector(self.weights, &format!("{}{layer}.{name}", self.prefix), size)?);
        }
        Ok(values)
    }
}

impl LayerSource for Layers<'_> {
    fn matrices(&self, index: usize) -> Vec<StoredRows<'_>> {
        let part = |name: &&str| self.weights.view(&format!("{}{index}.{name}.weight", self.prefix)).map(|view| view.bytes).unwrap_or_default();
        (self.shapes.iter().zip(self.kinds))
            .map(|(shape, kind)| StoredRows {
                parts: shape.names.iter().map(part).collect(),
                kind,
                outputs: shape.outputs * shape.names.len(),
                inputs: shape.inputs,
            })
            .collect()
    }

    fn done(&self, index: usize) {
        self.weights.release(&format!("{}{index}.", self.prefix));
        self.weights.will_need(&format!("{}{}.", self.prefix, index + 2));
    }
}

fn stored(dtype: Dtype) -> Option<Precision> {
    match dtype {
        Dtype::F32 => Some(Precision::F32),
        Dtype::F16 => Some(Precision::F16),
        Dtype::BF16 => Some(Precision::Bf16),
        _ => None,
    }
}

fn vector(weights: &Weights, name: &str, size: usize) -> Result<Vec<f32>, WeightsError> {
    weights.view_of_shape(name, &[size])?;
    weights.f32(name)
}

/// Captions that are multiplied at once, and how many such batches are on the device at once.
fn division(tokens: usize, width: usize) -> (usize, usize) {
    let captions = (ROWS / tokens).max(1);
    (captions, (RESIDENT_VALUES / (captions * tokens * width)).max(1))
}

/// Captions of one pass of T5 over its weights: a group of captions should be a multiple of it, or nearly nothing is done with the last pass.
pub(super) fn t5_pass(tokens: usize, width: usize) -> usize {
    let (captions, batches) = division(tokens, width);
    captions * batches
}

/// The rows of a batch on the device, from a tensor [captions, tokens, width]; captions that are missing are zeros.
fn upload_rows(ops: EncodeOps<'_>, rows: &Tensor, captions: usize) -> Result<Buffer, TextError> {
    let (_, tokens, width) = rows.dims3()?;
    let size = tokens * width;
    let mut values = rows.flatten_all()?.to_vec1::<f32>()?;
    values.resize(captions * size, 0.0);
    Ok(ops.upload_f32(&values))
}

/// `h Wᵀ (+ bias)` in new memory.
fn linear(ops: EncodeOps<'_>, rows: usize, h: &Buffer, w: Matrix<'_>, bias: Option<&Buffer>) -> Buffer {
    let mut y = ops.alloc(rows * w.outputs);
    ops.product(rows, h, w, bias, &mut y, 0, false);
    y
}

/// The rows of T5's table for a batch of captions on the device, as f32; captions that are missing are zeros. They travel as they are stored.
fn upload_tokens(ops: EncodeOps<'_>, weights: &Weights, table: &str, config: &T5Config, batch: &[Vec<u32>], rows: usize) -> Result<Buffer, TextError> {
    let view = weights.view_of_shape(table, &[config.vocab_size, config.d_model])?;
    let Some(kind) = stored(view.dtype) else {
        return Err(WeightsError::Dtype { path: weights.path().to_owned(), name: table.to_owned(), dtype: view.dtype }.into());
    };
    let ids: Vec<u32> = batch.iter().flatten().copied().collect();
    if let Some(&id) = ids.iter().find(|id| **id as usize >= config.vocab_size) {
        return Err(TextError::TokenOutOfRange { id, vocabulary: config.vocab_size, path: weights.path().to_owned() });
    }
    let width = config.d_model * kind.bytes();
    let mut bytes = vec![0; rows * width];
    bytes.par_chunks_exact_mut(width).zip(&ids).for_each(|(row, id)| row.copy_from_slice(&view.bytes[*id as usize * width..][..width]));
    Ok(ops.upload_stored_f32(&bytes, kind))
}

/// T5's final states [tokens, d_model] of each caption, to its place. `progress` gets the number of layers done.
pub(super) fn t5(
    ops: EncodeOps<'_>,
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
    let norms = |name: &str| (0..config.num_layers).map(|i| Ok(ops.upload_f32(&layers.vector(i, &[name], d)?))).collect::<Result<Vec<_>, WeightsError>>();
    let (norm1, norm2) = (norms("layer.0.layer_norm.weight")?, norms("layer.1.layer_norm.weight")?);
    let last = ops.upload_f32(&vector(weights, "encoder.final_layer_norm.weight", d)?);
    let bias = ops.upload_f32(&config.bias_values(weights, tokens)?);
    let table = if weights.contains("shared.weight") { "shared.weight" } else { "encoder.embed_tokens.weight" };
    // T5 does not scale by 1/√d: the factor is in its weights.
    let attention = TextAttention { tokens, heads, dim, scale: 1.0, causal: false };
    let (captions, batches) = division(tokens, d);
    let rows = captions * tokens;
    for (pass, places) in ids.chunks(captions * batches).zip(places.chunks_mut(captions * batches)) {
        let mut states = Vec::new();
        for batch in pass.chunks(captions) {
            states.push(upload_tokens(ops, weights, table, config, batch, rows)?);
        }
        weights.release(table);
        ops.stream_layers(config.num_layers, &layers, &mut |index, matrices| {
            progress(index)?;
            let &[qkv, o, wi, wo] = matrices else { return Ok(()) };
            for state in &mut states {
                let h = linear(ops, rows, &ops.rms_norm(state, &norm1[index], epsilon), qkv, None);
                ops.product(rows, &ops.text_attention(attention, &h, Some(&bias)), o, None, state, 0, true);
                let h = linear(ops, rows, &ops.rms_norm(state, &norm2[index], epsilon), wi, None);
                ops.product(rows, &ops.gated_gelu(&h, ff), wo, None, state, 0, true);
            }
            Ok::<_, TextError>(())
        })?;
        for (places, state) in places.chunks_mut(captions).zip(states) {
            ops.download_to(&ops.rms_norm(&state, &last, epsilon), places);
        }
    }
    progress(config.num_layers)
}

/// What CLIP says about each batch of captions, as [`clip::encode`].
pub(super) fn clip(
    ops: EncodeOps<'_>,
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
    let mut vectors = Vec::with_capacity(count);
    for i in 0..count {
        let f32 = |name: &str| Ok::<_, WeightsError>(ops.upload_f32(&layers.vector(i, &[name], d)?));
        let qkv = layers.vector(i, &["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"], d)?;
        vectors.push((
            [f32("layer_norm1.weight")?, f32("layer_norm1.bias")?, f32("layer_norm2.weight")?, f32("layer_norm2.bias")?],
            ops.upload(&qkv),
            f32("self_attn.out_proj.bias")?,
            ops.upload(&layers.vector(i, &["mlp.fc1.bias"], ff)?),
            f32("mlp.fc2.bias")?,
        ));
    }
    let activation = match config.hidden_act {
        Activation::QuickGelu => TextActivation::QuickGelu,
        Activation::Gelu => TextActivation::Gelu,
    };
    let attention = TextAttention { tokens, heads, dim, scale: 1.0 / (dim as f32).sqrt(), causal: true };
    let (captions, batches) = division(tokens, d);
    let rows = captions * tokens;
    let pooling = clip::Pooling::load(weights, config, &Device::Cpu)?;
    let mut outputs = Vec::new();
    for pass in ids.chunks(captions * batches) {
        let mut states = Vec::new();
        for batch in pass.chunks(captions) {
            states.push(upload_rows(ops, &clip::embed_tokens(weights, config, batch, &Device::Cpu)?, captions)?);
        }
        // With a single layer the last but one state is the embedding.
        let mut hidden: Vec<Buffer> = if count == 1 { states.iter().map(|s| ops.copy(s)).collect() } else { Vec::new() };
        ops.stream_layers(count, &layers, &mut |index, matrices| {
            progress(index)?;
            let &[qkv, out, fc1, fc2] = matrices else { return Ok(()) };
            let (norms, qkv_bias, out_bias, fc1_bias, fc2_bias) = &vectors[index];
            for state in &mut states {
                let h = linear(ops, rows, &ops.layer_norm(state, &norms[0], &norms[1], epsilon), qkv, Some(qkv_bias));
                ops.product(rows, &ops.text_attention(attention, &h, None), out, Some(out_bias), state, 0, true);
                let mut h = linear(ops, rows, &ops.layer_norm(state, &norms[2], &norms[3], epsilon), fc1, Some(fc1_bias));
                ops.activate(&mut h, activation);
                ops.product(rows, &h, fc2, Some(fc2_bias), state, 0, true);
            }
            if index + 2 == count {
                hidden = states.iter().map(|s| ops.copy(s)).collect();
            }
            Ok::<_, TextError>(())
        })?;
        for ((batch, state), hidden) in pass.chunks(captions).zip(states).zip(hidden) {
            let host = |buffer: &Buffer| Tensor::from_vec(ops.download(buffer), (captions, tokens, d), &Device::Cpu)?.narrow(0, 0, batch.len());
            let (state, hidden) = (host(&state)?, host(&hidden)?);
            outputs.push(ClipOutput { hidden, pooled: pooling.pool(batch, &state)? });
        }
    }
    progress(count)?;
    Ok(outputs)
}
