//! The operations of text encoders. Nothing of them is kept for a backward: they are not trained.
//!
//! The residual stream is f32 in every precision (in f16 T5's would overflow); products, norms' results and activations have the engine's.

use super::cpu::{linear, norm, pointwise, self_attention};
use super::engine::{Backend, Engine, on_gpu};
use super::{Buffer, Precision, StoredMatrix};

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

/// A frozen matrix [outputs, inputs] of the layer that is being computed: on the CPU as it is stored, on a GPU in its memory.
#[derive(Clone, Copy)]
pub struct LayerMatrix<'a>(LayerWeight<'a>);

#[derive(Clone, Copy)]
enum LayerWeight<'a> {
    Host(&'a StoredRows<'a>),
    #[cfg(feature = "cuda")]
    Device(super::cuda::Matrix<'a>),
}

impl LayerMatrix<'_> {
    /// Rows.
    pub fn outputs(&self) -> usize {
        match &self.0 {
            LayerWeight::Host(rows) => rows.outputs(),
            #[cfg(feature = "cuda")]
            LayerWeight::Device(matrix) => matrix.outputs,
        }
    }
}

impl Engine {
    /// Whether a row of a product has the same bits whatever the number of rows: so on the CPU. A GPU's library chooses its algorithm by the
    /// sizes, so that what must not depend on its company is always multiplied in batches of one size.
    pub fn is_batch_invariant(&self) -> bool {
        !self.is_cuda()
    }

    /// Calls `work(index, matrices)` for each layer in order. On a GPU `work` only puts work on the engine's stream while the next layer is
    /// copied, and the memory of the matrices is used again after it.
    ///
    /// # Errors
    /// What `work` returns.
    #[expect(clippy::type_complexity, reason = "a callback with its error, used here alone")]
    pub fn stream_layers<E>(&self, layers: usize, source: &dyn LayerSource, work: &mut dyn FnMut(usize, &[LayerMatrix<'_>]) -> Result<(), E>) -> Result<(), E> {
        on_gpu!(self, gpu => gpu.stream_layers(layers, source, &mut |index, matrices| {
            let matrices: Vec<_> = matrices.iter().map(|m| LayerMatrix(LayerWeight::Device(*m))).collect();
            work(index, &matrices)
        }));
        source.will_need(0);
        for index in 0..layers {
            source.will_need(index + 1);
            let stored = source.matrices(index);
            let matrices: Vec<_> = stored.iter().map(|rows| LayerMatrix(LayerWeight::Host(rows))).collect();
            work(index, &matrices)?;
            source.done(index);
        }
        Ok(())
    }

    /// `y = x Wᵀ + bias (+ y)` for x [rows, inputs]. `bias` has y's type.
    pub fn layer_product(&self, rows: usize, x: &Buffer, w: LayerMatrix<'_>, bias: Option<&Buffer>, y: &mut Buffer, accumulate: bool) {
        match (&self.backend, w.0) {
            (Backend::Cpu(_), LayerWeight::Host(w)) => {
                linear::stored(rows, x.host(), w, (w.outputs(), w.inputs), bias.map(Buffer::host), accumulate, y.host_mut());
            }
            #[cfg(feature = "cuda")]
            (Backend::Cuda(gpu), LayerWeight::Device(w)) => gpu.matrix_product(rows, x, w, bias, y, 0, accumulate),
            #[cfg(feature = "cuda")]
            _ => unreachable!("a layer's matrix in an operation of another device"),
        }
    }

    /// Rows `ids` of a stored table with rows of `width` values, in f32; zeros after them, up to `rows` rows.
    pub fn embed(&self, table: &dyn StoredMatrix, width: usize, ids: &[u32], rows: usize) -> Buffer {
        on_gpu!(self, gpu => gpu.embed(table, width, ids, rows));
        let mut y = self.zeros(rows * width);
        for (row, &id) in y.host_mut().chunks_exact_mut(width).zip(ids) {
            table.read_block(id as usize..id as usize + 1, 0..width, row);
        }
        y
    }

    /// T5's norm of f32 rows: x / √(mean(x²) + ε) · weight, in the engine's precision.
    pub fn rms_norm_rows(&self, x: &Buffer, weight: &Buffer, epsilon: f32) -> Buffer {
        on_gpu!(self, gpu => gpu.rms_norm_rows(x, weight, epsilon));
        let mut y = self.alloc(x.len());
        norm::rms_norm(x.host(), weight.host(), epsilon, y.host_mut());
        y
    }

    /// CLIP's norm of f32 rows: (x - mean) / √(var + ε) · weight + bias, in the engine's precision.
    pub fn layer_norm(&self, x: &Buffer, weight: &Buffer, bias: &Buffer, epsilon: f32) -> Buffer {
        on_gpu!(self, gpu => gpu.layer_norm(x, weight, bias, epsilon));
        let mut y = self.alloc(x.len());
        norm::layer_norm(x.host(), weight.host(), bias.host(), epsilon, y.host_mut());
        y
    }

    /// gelu(a) · b (tanh form) of the halves (a, b) of each row of x [rows, 2 · width].
    pub fn gated_gelu(&self, x: &Buffer, width: usize) -> Buffer {
        on_gpu!(self, gpu => gpu.gated_gelu(x, width));
        let mut y = self.alloc(x.len() / 2);
        pointwise::gated_gelu(x.host(), width, y.host_mut());
        y
    }

    /// CLIP's activation, in place.
    pub fn activate(&self, x: &mut Buffer, activation: TextActivation) {
        on_gpu!(self, gpu => gpu.activate(x, activation));
        match activation {
            TextActivation::QuickGelu => pointwise::quick_gelu(x.host_mut()),
            TextActivation::Gelu => pointwise::gelu_erf(x.host_mut()),
        }
    }

    /// Attention of each caption with itself: softmax(scale · q kᵀ + bias) v for qkv [captions · tokens, 3 · heads · dim], `bias`
    /// [heads, tokens, tokens] in f32.
    pub fn text_attention(&self, shape: TextAttention, qkv: &Buffer, bias: Option<&Buffer>) -> Buffer {
        on_gpu!(self, gpu => gpu.text_attention(shape, qkv, bias));
        let mut out = self.alloc(qkv.len() / 3);
        self_attention::text(&shape, qkv.host(), bias.map(Buffer::host), out.host_mut());
        out
    }

    /// The first values to places on the host, one after another.
    pub fn download_to(&self, buffer: &Buffer, places: &mut [&mut [f32]]) {
        on_gpu!(self, gpu => gpu.download_to(buffer, places));
        let mut values = buffer.host();
        for place in places {
            let (own, rest) = values.split_at(place.len());
            place.copy_from_slice(own);
            values = rest;
        }
    }
}
