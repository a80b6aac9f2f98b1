//! What CLIP and T5 have in common: embeddings, linear layers, attention. Tensors of candle; nothing here is trained.

use candle_core::{D, DType, Device, Tensor};

use super::TextError;
use crate::weights::{Weights, WeightsError};

/// Reads weights of one layer as f32, checking shapes.
pub(super) struct LayerReader<'a> {
    pub(super) weights: &'a Weights,
    pub(super) prefix: String,
    pub(super) device: &'a Device,
}

impl LayerReader<'_> {
    pub(super) fn vector(&self, name: &str, size: usize) -> Result<Tensor, WeightsError> {
        self.weights.tensor_of_shape(&format!("{}{name}", self.prefix), &[size], DType::F32, self.device)
    }

    pub(super) fn matrix(&self, name: &str, out: usize, input: usize) -> Result<Tensor, WeightsError> {
        self.weights.tensor_of_shape(&format!("{}{name}", self.prefix), &[out, input], DType::F32, self.device)
    }

    /// A linear layer with bias, `name.weight` and `name.bias`.
    pub(super) fn linear(&self, name: &str, out: usize, input: usize) -> Result<Linear, WeightsError> {
        Ok(Linear { weight: self.matrix(&format!("{name}.weight"), out, input)?, bias: Some(self.vector(&format!("{name}.bias"), out)?) })
    }

    /// A linear layer without bias, `name.weight`.
    pub(super) fn linear_without_bias(&self, name: &str, out: usize, input: usize) -> Result<Linear, WeightsError> {
        Ok(Linear { weight: self.matrix(&format!("{name}.weight"), out, input)?, bias: None })
    }

    pub(super) fn layer_norm(&self, name: &str, size: usize, eps: f64) -> Result<LayerNorm, WeightsError> {
        Ok(LayerNorm { weight: self.vector(&format!("{name}.weight"), size)?, bias: self.vector(&format!("{name}.bias"), size)?, eps })
    }
}

/// y = x Wᵀ + b.
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// [b, s, in] -> [b, s, out].
    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (b, s, d) = x.dims3()?;
        let y = x.reshape((b * s, d))?.matmul(&self.weight.t()?)?.reshape((b, s, ()))?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// LayerNorm over the last dimension.
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        candle_nn::ops::layer_norm_slow(x, &self.weight, &self.bias, self.eps as f32)
    }
}

/// softmax(scale q kᵀ + bias) v for tensors [b, s, heads * d]; `bias` broadcasts to [b, heads, s, s].
pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, scale: f64, bias: &Tensor) -> candle_core::Result<Tensor> {
    let (b, s, inner) = q.dims3()?;
    let split = |x: &Tensor| x.reshape((b, s, heads, inner / heads))?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let q = if (scale - 1.0).abs() < f64::EPSILON { q } else { (q * scale)? };
    let scores = q.matmul(&k.t()?)?.broadcast_add(bias)?;
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
    weights.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((b, s, inner))
}

/// Rows `ids` of the table `name` [vocabulary, width], as [captions, tokens, width]. Only those rows are read.
pub(super) fn embed(weights: &Weights, name: &str, vocabulary: usize, width: usize, ids: &[Vec<u32>], device: &Device) -> Result<Tensor, TextError> {
    let table = weights.view_of_shape(name, &[vocabulary, width])?;
    let tokens = ids.first().map_or(0, Vec::len);
    let mut rows = vec![0.0_f32; ids.len() * tokens * width];
    for (row, id) in rows.chunks_exact_mut(width).zip(ids.iter().flatten()) {
        if *id as usize >= vocabulary {
            return Err(TextError::TokenOutOfRange { id: *id, vocabulary, path: weights.path().to_owned() });
        }
        if !table.read_f32(*id as usize * width, row) {
            return Err(WeightsError::Dtype { path: weights.path().to_owned(), name: name.to_owned(), dtype: table.dtype }.into());
        }
    }
    Ok(Tensor::from_vec(rows, (ids.len(), tokens, width), device)?)
}
