//! What operations of layers work on: modulations, attention's operands, LoRA's places.

use std::ops::Range;

/// Mean and reciprocal standard deviation of each row.
#[derive(Debug)]
pub struct NormStats<B>(pub(super) B);

/// Where an operation finds its modulation: `values` [batch, stride], one vector of width D per sample at each offset.
#[derive(Debug)]
pub struct Modulation<'a, B> {
    /// [batch, stride].
    pub values: &'a B,
    /// From one sample to the next.
    pub stride: usize,
    /// Tokens per sample.
    pub tokens: usize,
    /// Width D.
    pub width: usize,
}

impl<B> Clone for Modulation<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Modulation<'_, B> {}

/// Sizes of a joint attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Samples.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Image tokens per sample.
    pub image: usize,
    /// Context tokens per sample; 0: the image attends to itself.
    pub context: usize,
    /// Whether the context asks too; if not, it is only attended to.
    pub context_queries: bool,
}

impl AttentionShape {
    /// Width of a row: heads · head_dim.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Tokens attended to.
    pub fn keys(&self) -> usize {
        self.image + self.context
    }
}

/// An operand of both streams: [batch · image, width] and [batch · context, width].
#[derive(Debug)]
pub struct Joint<T> {
    /// The image's.
    pub image: T,
    /// The context's, where it takes part.
    pub context: Option<T>,
}

/// Query, key and value of one stream, or their gradients: [rows, width] each.
///
/// Where they come from one product they are columns of one matrix, and what is written to a part is in it; the backward of that product takes
/// the matrix. Elsewhere each is memory of its own.
#[derive(Debug)]
pub struct Qkv<B> {
    /// Query; absent where the stream is only attended to.
    pub q: Option<B>,
    /// Key.
    pub k: B,
    /// Value.
    pub v: B,
    /// [rows, q, k, v side by side].
    pub packed: Option<B>,
}

impl<B> Qkv<B> {
    /// Each in memory of its own.
    pub fn separate(q: Option<B>, k: B, v: B) -> Self {
        Self { q, k, v, packed: None }
    }
}

/// Where a layer's parameters lie among all: A's first value, B's first value, and the scale that B carries.
pub type LoraSource = (usize, usize, f32);

/// Where a layer's gradients lie among all.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraTarget {
    /// A's.
    pub a: Range<usize>,
    /// B's.
    pub b: Range<usize>,
    /// The scale that B carries.
    pub scale: f32,
}

/// Tensors of a flat buffer begin at multiples of this many values.
const ALIGNMENT: usize = 64;

/// Where tensors of these lengths begin in a flat buffer, and where the last one ends. Between them are zeros.
pub fn flat_offsets(lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut offsets = vec![0];
    offsets.extend(lengths.scan(0, |end, len| {
        *end += len.next_multiple_of(ALIGNMENT);
        Some(*end)
    }));
    offsets
}
