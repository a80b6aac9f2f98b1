//! What CLIP and T5 have in common: layers that pass through the device one after another, and the batches that go through each.

use std::collections::HashMap;

use super::TextError;
use crate::weights::{View, Weights, WeightsError};
use finetune_compute::kernels::{Device, LayerMatrix as _, LayerSource, Precision, StoredRows};

/// Tokens of one product: 32 captions of 77 tokens.
const ROWS: usize = 32 * 77;
/// Values of the residual streams that are on the device at once (512 MiB).
const RESIDENT_VALUES: usize = 1 << 27;

/// A matrix of a layer: the layers that it is made of, how many rows each has, and its columns.
pub(super) struct Shape {
    pub(super) names: &'static [&'static str],
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// The matrices of layers called `prefix0`, `prefix1`...
pub(super) struct Layers<'a> {
    weights: &'a Weights,
    prefix: &'static str,
    shapes: [Shape; 4],
    kinds: [Precision; 4],
}

impl<'a> Layers<'a> {
    /// Checks every layer's shapes and types first: nothing fails on the way.
    pub(super) fn new(weights: &'a Weights, prefix: &'static str, count: usize, shapes: [Shape; 4]) -> Result<Self, WeightsError> {
        let mut kinds = HashMap::new();
        for layer in 0..count {
            for (index, shape) in shapes.iter().enumerate() {
                for name in shape.names {
                    let name = format!("{prefix}{layer}.{name}.weight");
                    let view = weights.view_of_shape(&name, &[shape.outputs, shape.inputs])?;
                    let kind = view.precision().filter(|kind| *kinds.entry(index).or_insert(*kind) == *kind);
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
    pub(super) fn vector(&self, layer: usize, names: &[&str], size: usize) -> Result<Vec<f32>, WeightsError> {
        let mut values = Vec::with_capacity(names.len() * size);
        for name in names {
            values.extend(vector(self.weights, &format!("{}{layer}.{name}", self.prefix), size)?);
        }
        Ok(values)
    }
}

impl LayerSource for Layers<'_> {
    fn matrices(&self, index: usize) -> Vec<StoredRows<'_>> {
        let part = |name: &&str| {
            let view = self.weights.view(&format!("{}{index}.{name}.weight", self.prefix)).ok()?;
            Some(view.stored_or_scaled())
        };
        (self.shapes.iter().zip(self.kinds))
            .map(|(shape, kind)| StoredRows { parts: shape.names.iter().filter_map(part).collect(), kind, part_outputs: shape.outputs, inputs: shape.inputs })
            .collect()
    }

    fn will_need(&self, index: usize) {
        self.weights.will_need(&format!("{}{index}.", self.prefix));
    }

    fn done(&self, index: usize) {
        self.weights.release(&format!("{}{index}.", self.prefix));
    }
}

/// The values of a vector, as f32.
pub(super) fn vector(weights: &Weights, name: &str, size: usize) -> Result<Vec<f32>, WeightsError> {
    weights.view_of_shape(name, &[size])?;
    weights.f32(name)
}

/// How captions go through the layers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batching {
    /// Tokens of a caption.
    tokens: usize,
    /// Captions that are multiplied at once.
    pub(super) captions: usize,
    /// Batches that are on the device at once.
    batches: usize,
    /// Whether a batch that is not full is filled with zeros.
    filled: bool,
}

impl Batching {
    /// `batch_invariant`: see [`Device::is_batch_invariant`].
    pub(super) fn new(batch_invariant: bool, tokens: usize, width: usize) -> Self {
        let captions = (ROWS / tokens).max(1);
        Self { tokens, captions, batches: (RESIDENT_VALUES / (captions * tokens * width)).max(1), filled: !batch_invariant }
    }

    /// Captions of one pass over the weights.
    pub(super) fn pass(&self) -> usize {
        self.captions * self.batches
    }

    /// Rows of a batch on the device.
    pub(super) fn rows(&self, batch: &[Vec<u32>]) -> usize {
        self.tokens * if self.filled { self.captions } else { batch.len() }
    }
}

/// The table `name` [vocabulary, width], of which the ids' rows exist and are of a type that can be read.
pub(super) fn table<'a>(weights: &'a Weights, name: &str, (vocabulary, width): (usize, usize), ids: &[u32]) -> Result<View<'a>, TextError> {
    let table = weights.view_of_shape(name, &[vocabulary, width])?;
    if table.precision().is_none() {
        return Err(WeightsError::Dtype { path: weights.path().to_owned(), name: name.to_owned(), dtype: table.dtype }.into());
    }
    match ids.iter().find(|id| **id as usize >= vocabulary) {
        Some(&id) => Err(TextError::TokenOutOfRange { id, vocabulary, path: weights.path().to_owned() }),
        None => Ok(table),
    }
}

/// `h Wᵀ (+ bias)` in new memory.
pub(super) fn linear<D: Device>(device: &D, rows: usize, h: &D::Buffer, w: D::LayerMatrix<'_>, bias: Option<&D::Buffer>) -> D::Buffer {
    let mut y = device.alloc(rows * w.outputs());
    device.layer_product(rows, h, w, bias, &mut y, false);
    y
}
