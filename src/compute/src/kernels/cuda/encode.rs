//! The kernels of `encode.cu`, and products with frozen weights, for networks that are not trained: text encoders and autoencoder. The
//! operations of [`crate::kernels::Device`] say what each computes.

use rayon::prelude::*;

use super::driver::arguments;
use super::gemm::{Epilogue, Operand, Product};
use super::{BLOCK, Cuda, Kind, Memory, any, widest};
use crate::kernels::{StoredMatrix, TextActivation, TextAttention};

/// Rows per block of the norms.
const ROWS: usize = BLOCK / 32;
/// Queries per block of the attention, and keys per tile.
const QUERIES: usize = 32;
const KEYS: usize = 64;
/// Pixels of one partial sum of a group norm.
const RUN: usize = 512;

/// A frozen matrix [outputs, inputs] on the device, in the device's precision. Its owner keeps the memory.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    pub(super) pointer: u64,
    pub(super) kind: Kind,
    /// Rows.
    pub(in crate::kernels) outputs: usize,
    /// Columns.
    pub(super) inputs: usize,
    pub(super) owner: std::marker::PhantomData<&'a ()>,
}

/// What a convolution reads: a picture [height, width, channels], and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    /// Pixels of the input.
    pub(super) height: usize,
    /// Pixels of the input.
    pub(super) width: usize,
    /// Channels of the input.
    pub(super) channels: usize,
    /// Side of the kernel.
    pub(super) kernel: usize,
    /// Pixels from one result to the next.
    pub(super) stride: usize,
    /// Zeros before the first pixel.
    pub(super) pad: usize,
    /// Whether pixels are doubled each way first.
    pub(super) double: bool,
    /// Columns of the result.
    pub(super) out_width: usize,
}

/// As `Conv` in `encode.cu`.
#[repr(C)]
struct Geometry {
    height: i32,
    width: i32,
    packs: i32,
    out_width: i32,
    kernel: i32,
    stride: i32,
    pad: i32,
    doubled: i32,
}

impl Cuda {
    /// A matrix in memory of its own.
    #[expect(clippy::unused_self, reason = "reads as an operation of the device")]
    pub(super) fn matrix<'a>(&self, values: &'a Memory, outputs: usize, inputs: usize) -> Matrix<'a> {
        assert_eq!(values.len(), outputs * inputs, "should be [outputs, inputs]");
        Matrix { pointer: values.pointer(), kind: values.kind(), outputs, inputs, owner: std::marker::PhantomData }
    }

    /// `y = x Wᵀ + bias (+ y)` for x [rows, inputs] and the rows of y [.., outputs] from `first` on. `bias` has y's type.
    #[expect(clippy::too_many_arguments, reason = "the operands, where the result goes and how")]
    pub(in crate::kernels) fn matrix_product(
        &self,
        rows: usize,
        x: &Memory,
        w: Matrix<'_>,
        bias: Option<&Memory>,
        y: &mut Memory,
        first: usize,
        accumulate: bool,
    ) {
        assert!(x.len() >= rows * w.inputs && y.len() >= (first + rows) * w.outputs, "should be [rows, inputs] and [rows, outputs]");
        assert!(bias.is_none_or(|b| b.len() == w.outputs && b.kind() == y.kind()), "should be [outputs] of the result's type");
        let operand = |pointer, stride, transposed, kind| Operand { pointer, stride, transposed, kind };
        let product = Product {
            m: rows,
            n: w.outputs,
            k: w.inputs,
            a: operand(x.pointer(), w.inputs, false, x.kind()),
            b: operand(w.pointer, w.inputs, true, w.kind),
            c: operand(y.at(first * w.outputs), w.outputs, false, y.kind()),
            alpha: 1.0,
            beta: if accumulate { 1.0 } else { 0.0 },
            epilogue: if bias.is_some() { Epilogue::Bias } else { Epilogue::None },
            bias: bias.map_or(0, Memory::pointer),
            pre: 0,
        };
        // SAFETY: lengths are checked above; x and y are buffers of their own.
        unsafe { self.blas.run(&product) };
    }

    /// `c = a b` [m, n].
    fn part_product(&self, (m, n, k): (usize, usize, usize), a: Operand, b: Operand, c: Operand) {
        let product = Product { m, n, k, a, b, c, alpha: 1.0, beta: 0.0, epilogue: Epilogue::None, bias: 0, pre: 0 };
        // SAFETY: callers pass operands within their buffers.
        unsafe { self.blas.run(&product) };
    }

    /// Rows of a stored table, which travel as they are stored; zeros after them.
    pub(in crate::kernels) fn embed(&self, table: &dyn StoredMatrix, width: usize, ids: &[u32], rows: usize) -> Memory {
        let Some((kind, stored)) = table.stored() else {
            let mut values = vec![0.0; rows * width];
            values.par_chunks_exact_mut(width).zip(ids).for_each(|(row, &id)| table.read_block(id as usize..id as usize + 1, 0..width, row));
            return self.upload_values(&values);
        };
        let row_bytes = width * kind.bytes();
        let mut bytes = vec![0; rows * row_bytes];
        bytes.par_chunks_exact_mut(row_bytes).zip(ids).for_each(|(row, &id)| row.copy_from_slice(&stored[id as usize * row_bytes..][..row_bytes]));
        let source = self.upload_bytes(&bytes, rows * width, kind);
        self.convert(source, Kind::F32)
    }

    /// T5's norm of f32 rows: x / √(mean(x²) + ε) · weight, in the device's precision.
    pub(in crate::kernels) fn rms_norm_rows(&self, x: &Memory, weight: &Memory, epsilon: f32) -> Memory {
        let width = weight.len();
        assert!(x.kind() == Kind::F32 && weight.kind() == Kind::F32 && x.len().is_multiple_of(width), "should be f32 rows");
        let y = self.memory_of(x.len(), self.precision);
        let (suffix, _) = widest(y.kind(), &[width]);
        let (to, from, w, rows, columns) = (y.pointer(), x.pointer(), weight.pointer(), (x.len() / width) as i64, width as i32);
        let grid = (x.len() / width).div_ceil(ROWS);
        // SAFETY: x and y are [rows, width], the weight [width].
        unsafe { self.driver.launch(("text_rms_norm", suffix), (grid, 1, 1), BLOCK, 0, arguments![to, from, w, rows, columns, epsilon]) };
        y
    }

    /// CLIP's norm of f32 rows: (x - mean) / √(var + ε) · weight + bias, in the device's precision.
    pub(in crate::kernels) fn layer_norm(&self, x: &Memory, weight: &Memory, bias: &Memory, epsilon: f32) -> Memory {
        let width = weight.len();
        let kinds = [x, weight, bias].iter().all(|m| m.kind() == Kind::F32);
        assert!(kinds && bias.len() == width && x.len().is_multiple_of(width), "should be f32 rows");
        let y = self.memory_of(x.len(), self.precision);
        let (suffix, _) = widest(y.kind(), &[width]);
        let (to, from, w, b, rows, columns) = (y.pointer(), x.pointer(), weight.pointer(), bias.pointer(), (x.len() / width) as i64, width as i32);
        let grid = (x.len() / width).div_ceil(ROWS);
        // SAFETY: x and y are [rows, width], weight and bias [width].
        unsafe { self.driver.launch(("text_layer_norm", suffix), (grid, 1, 1), BLOCK, 0, arguments![to, from, w, b, rows, columns, epsilon]) };
        y
    }

    /// gelu(a) · b (tanh form) of the halves (a, b) of each row of x [rows, 2 · width].
    pub(in crate::kernels) fn gated_gelu(&self, x: &Memory, width: usize) -> Memory {
        assert!(x.len().is_multiple_of(2 * width), "should be [rows, 2 · width]");
        let y = self.memory_of(x.len() / 2, x.kind());
        let (suffix, values) = widest(x.kind(), &[width]);
        let (to, from, count, packs) = (y.pointer(), x.pointer(), (y.len() / values) as i64, (width / values) as i32);
        // SAFETY: x has twice as many values as y.
        unsafe { self.driver.launch(("gated_gelu", suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments![to, from, count, packs]) };
        y
    }

    /// CLIP's activation, in place.
    pub(in crate::kernels) fn activate(&self, x: &mut Memory, activation: TextActivation) {
        let (suffix, values) = widest(x.kind(), &[x.len()]);
        let (to, count, exact) = (x.pointer(), (x.len() / values) as i64, i32::from(activation == TextActivation::Gelu));
        // SAFETY: x has `count` packs.
        unsafe { self.driver.launch(("clip_activation", suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments![to, count, exact]) };
    }

    /// Attention of each caption with itself: softmax(scale · q kᵀ + bias) v for qkv [captions · tokens, 3 · heads · dim], `bias`
    /// [heads, tokens, tokens] in f32.
    pub(in crate::kernels) fn text_attention(&self, shape: TextAttention, qkv: &Memory, bias: Option<&Memory>) -> Memory {
        let TextAttention { tokens, heads, dim, scale, causal } = shape;
        let inner = heads * dim;
        assert!(dim <= 128 && qkv.len().is_multiple_of(3 * inner * tokens), "should be [captions · tokens, 3 · heads · dim], dim at most 128");
        assert!(bias.is_none_or(|b| b.len() == heads * tokens * tokens && b.kind() == Kind::F32), "should be [heads, tokens, tokens]");
        let captions = qkv.len() / (3 * inner * tokens);
        let out = self.memory_of(qkv.len() / 3, qkv.kind());
        let (to, from, bias) = (out.pointer(), qkv.pointer(), bias.map_or(0, Memory::pointer));
        let (t, h, d, causal) = (tokens as i32, heads as i32, dim as i32, i32::from(causal));
        let shared = (QUERIES * dim + 2 * KEYS * (dim + 1)) * 4;
        let grid = (tokens.div_ceil(QUERIES), heads, captions);
        let arguments = arguments![to, from, bias, t, h, d, scale, causal];
        // SAFETY: sizes are checked above; the shared memory is what the kernel's comment says.
        unsafe { self.driver.launch(("text_attention", any(qkv.kind())), grid, 128, shared, arguments) };
        out
    }

    /// Scale and shift [2, channels] that make the group norm of x [pixels, channels]: y = x · scale + shift. `weight` and `bias` are f32.
    pub(super) fn group_affine(&self, x: &Memory, groups: usize, weight: &Memory, bias: &Memory, epsilon: f32) -> Memory {
        let channels = weight.len();
        assert!(bias.len() == channels && x.len().is_multiple_of(channels) && channels.is_multiple_of(groups), "should be channels in groups");
        let (pixels, run) = (x.len() / channels, RUN);
        let chunks = pixels.div_ceil(run);
        let (sums, affine) = (self.memory_of(chunks * 2 * channels, Kind::F32), self.memory_of(2 * channels, Kind::F32));
        let (suffix, values) = widest(x.kind(), &[channels]);
        let (s, from, count, c, length) = (sums.pointer(), x.pointer(), pixels as i64, channels as i32, run as i64);
        let grid = (chunks, (channels / values).div_ceil(32), 1);
        // SAFETY: x is [pixels, channels], the sums [chunks, 2, channels].
        unsafe { self.driver.launch(("channel_sums", suffix), grid, BLOCK, 0, arguments![s, from, count, c, length]) };
        let (to, w, b, g, n) = (affine.pointer(), weight.pointer(), bias.pointer(), groups as i32, chunks as i32);
        let arguments = arguments![to, s, from, w, b, count, c, g, length, n, epsilon];
        // SAFETY: as above; weight and bias are [channels], the result [2, channels].
        unsafe { self.driver.launch(("group_affine", suffix), (groups, 1, 1), BLOCK, 0, arguments) };
        affine
    }

    /// x · scale + shift for x [pixels, channels] and `affine` [2, channels]; with `activate` its SiLU.
    pub(super) fn apply_affine(&self, x: &Memory, affine: &Memory, activate: bool) -> Memory {
        let channels = affine.len() / 2;
        assert!(x.len().is_multiple_of(channels) && affine.kind() == Kind::F32, "should be [pixels, channels]");
        let y = self.memory_of(x.len(), x.kind());
        let (suffix, values) = widest(x.kind(), &[channels]);
        let (to, from, with, count, packs) = (y.pointer(), x.pointer(), affine.pointer(), (x.len() / values) as i64, (channels / values) as i32);
        let (grid, activate) = (((count as usize).div_ceil(BLOCK), 1, 1), i32::from(activate));
        // SAFETY: x and y are [pixels, channels], the affine [2, channels].
        unsafe { self.driver.launch(("apply_affine", suffix), grid, BLOCK, 0, arguments![to, from, with, count, packs, activate]) };
        y
    }

    /// What a convolution multiplies for `rows` of its results from `first` on: [rows, kernel², channels]. Less than 2³¹ values.
    pub(super) fn columns(&self, x: &Memory, window: Window, first: usize, rows: usize) -> Memory {
        let Window { height, width, channels, kernel, stride, pad, double, out_width } = window;
        assert_eq!(x.len(), height * width * channels, "should be [height, width, channels]");
        let (suffix, values) = widest(x.kind(), &[channels]);
        let geometry = Geometry {
            height: height as i32,
            width: width as i32,
            packs: (channels / values) as i32,
            out_width: out_width as i32,
            kernel: kernel as i32,
            stride: stride as i32,
            pad: pad as i32,
            doubled: i32::from(double),
        };
        let to = self.memory_of(rows * kernel * kernel * channels, x.kind());
        assert!(to.len() < 1 << 31 && first + rows < 1 << 31, "should fit 32 bits");
        let (y, from, first, count) = (to.pointer(), x.pointer(), first as i32, (to.len() / values) as i32);
        let arguments = arguments![y, from, first, count, geometry];
        // SAFETY: the result has `count` packs; reads outside the picture are zeros.
        unsafe { self.driver.launch(("columns", suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments) };
        to
    }

    /// Attention of one head of width `width` over all rows of qkv [tokens, 3 · width], scaled by 1/√width, in strips of queries so that at
    /// most `strip` rows of scores are there.
    pub(super) fn attention_of_rows(&self, qkv: &Memory, width: usize, strip: usize) -> Memory {
        let tokens = qkv.len() / (3 * width);
        assert_eq!(qkv.len(), tokens * 3 * width, "should be [tokens, 3 · width]");
        let out = self.memory_of(tokens * width, qkv.kind());
        let scale = 1.0 / (width as f32).sqrt();
        let at = |offset, transposed| Operand { pointer: qkv.at(offset), stride: 3 * width, transposed, kind: qkv.kind() };
        let of = |memory: &Memory, offset, stride| Operand { pointer: memory.at(offset), stride, transposed: false, kind: memory.kind() };
        for first in (0..tokens).step_by(strip.max(1)) {
            let rows = strip.max(1).min(tokens - first);
            let scores = self.memory_of(rows * tokens, Kind::F32);
            self.part_product((rows, tokens, width), at(first * 3 * width, false), at(width, true), of(&scores, 0, tokens));
            let weights = self.memory_of(rows * tokens, qkv.kind());
            let (to, from, columns) = (weights.pointer(), scores.pointer(), tokens as i32);
            // SAFETY: both are [rows, tokens].
            unsafe { self.driver.launch(("softmax_rows", any(qkv.kind())), (rows, 1, 1), BLOCK, 0, arguments![to, from, columns, scale]) };
            self.part_product((rows, width, tokens), of(&weights, 0, tokens), at(2 * width, false), of(&out, first * width, width));
        }
        out
    }
}
