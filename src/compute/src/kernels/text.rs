//! What the operations of text encoders work on.

use super::{Precision, StoredMatrix};

/// The activation of CLIP's MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextActivation {
    /// x σ(1.702 x).
    QuickGelu,
    /// x Φ(x), with the error function.
    Gelu,
}

/// Sizes of a text encoder's attention.
#[derive(Debug, Clone, Copy)]
pub struct TextAttention {
    /// Tokens of each caption.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head, at most 128.
    pub dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Whether later tokens are hidden.
    pub causal: bool,
}

/// A matrix of a layer as it is stored: the rows of its parts, one below the other.
pub struct StoredRows<'a> {
    /// Each [outputs of the part, inputs], of one type.
    pub parts: Vec<Box<dyn StoredMatrix + 'a>>,
    /// Type of the values.
    pub kind: Precision,
    /// Rows of each part.
    pub part_outputs: usize,
    /// Columns.
    pub inputs: usize,
}

impl StoredRows<'_> {
    /// Rows of all parts.
    pub fn outputs(&self) -> usize {
        self.part_outputs * self.parts.len()
    }
}

impl StoredMatrix for StoredRows<'_> {
    fn read_block(&self, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>, mut out: &mut [f32]) {
        let mut first = rows.start;
        while first < rows.end {
            let (part, row) = (first / self.part_outputs, first % self.part_outputs);
            let count = (self.part_outputs - row).min(rows.end - first);
            let (block, rest) = out.split_at_mut(count * columns.len());
            self.parts[part].read_block(row..row + count, columns.clone(), block);
            (out, first) = (rest, first + count);
        }
    }

    fn stored(&self) -> Option<(Precision, &[u8])> {
        match self.parts.as_slice() {
            [part] => part.stored(),
            _ => None,
        }
    }
}

/// Where and how to read the weights of each layer.
pub trait LayerSource: Sync {
    /// The matrices of layer `index`; of the same shapes and types in every layer.
    fn matrices(&self, index: usize) -> Vec<StoredRows<'_>>;

    /// Layer `index`, if there is such a one, will be read soon.
    fn will_need(&self, index: usize);

    /// Layer `index` has been read.
    fn done(&self, index: usize);
}
