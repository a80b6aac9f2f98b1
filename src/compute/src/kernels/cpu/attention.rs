//! Joint attention of two streams, forward and backward, without the whole matrix of scores.
//!
//! One task per sample and head; within it, tiles of queries against all keys, in order. The forward keeps the logarithm of
//! each row's sum of exponentials, from which the backward computes the probabilities again.

use std::cell::RefCell;

use rayon::prelude::*;

use super::gemm::{Packed, Start, Strided, product, with_scratch};
use super::microkernel::PANEL;
use super::share::Shared;
use super::simd::{LANES, exp, sum, vectorised};
use crate::kernels::AttentionShape;

/// Queries per tile.
const QUERIES: usize = 48;

/// The same operand of both streams: [batch · image tokens, width] and [batch · context tokens, width].
#[derive(Clone, Copy)]
pub(crate) struct Streams<T> {
    /// The image's.
    pub(crate) image: T,
    /// The context's; `None` where the context takes no part.
    pub(crate) context: Option<T>,
}

impl<'a> Streams<&'a mut [f32]> {
    fn share(self) -> Streams<Shared<'a>> {
        Streams { image: Shared::new(self.image), context: self.context.map(Shared::new) }
    }
}

impl<T> Streams<T> {
    fn pick(self, context: bool) -> Option<T> {
        if context { self.context } else { Some(self.image) }
    }
}

#[derive(Default)]
struct Scratch {
    keys: Packed,
    keys_transposed: Packed,
    values: Packed,
    queries: Packed,
    d_outs: Packed,
    gathered: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

vectorised! {
    /// For each row: `p = exp((s - max) · scale)`, `inverse = 1 / Σp`, `lse = max · scale + ln Σp`.
    fn softmax_rows(scores: &mut [f32], stride: usize, keys: usize, scale: f32, inverse: &mut [f32], lse: &mut [f32]) {
        for ((row, inverse), lse) in scores.chunks_exact_mut(stride).zip(inverse).zip(lse) {
            let row = &mut row[..keys];
            let mut largest = [f32::NEG_INFINITY; LANES];
            for part in row.chunks_exact(LANES) {
                for (l, &s) in largest.iter_mut().zip(part) {
                    *l = if s > *l { s } else { *l };
                }
            }
            for &s in &row[keys / LANES * LANES..] {
                largest[0] = if s > largest[0] { s } else { largest[0] };
            }
            let largest = largest.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
            for s in row.iter_mut() {
                *s = exp((*s - largest) * scale);
            }
            let total = sum(keys, |i| row[i]);
            *inverse = 1.0 / total;
            *lse = largest * scale + total.ln();
        }
    }
}

vectorised! {
    /// `row *= factor` for each row of `width` values at distance `stride`.
    fn scale_rows(values: &mut [f32], stride: usize, width: usize, factors: &[f32]) {
        for (row, &factor) in values.chunks_mut(stride).zip(factors) {
            for v in &mut row[..width] {
                *v *= factor;
            }
        }
    }
}

vectorised! {
    /// For each row: `p = exp(s · scale - lse)`; `ds = p · (dp - delta) · scale` in place of dp.
    fn score_gradient_rows(scores: &mut [f32], d_scores: &mut [f32], stride: usize, keys: usize, scale: f32, lse: &[f32], delta: &[f32]) {
        for (((s, ds), &lse), &delta) in scores.chunks_exact_mut(stride).zip(d_scores.chunks_exact_mut(stride)).zip(lse).zip(delta) {
            for (s, ds) in s[..keys].iter_mut().zip(&mut ds[..keys]) {
                let p = exp(*s * scale - lse);
                *s = p;
                *ds = p * (*ds - delta) * scale;
            }
        }
    }
}

vectorised! {
    fn dot_rows(a: &[f32], b: &[f32], stride: usize, width: usize, out: &mut [f32]) {
        for ((a, b), out) in a.chunks(stride).zip(b.chunks(stride)).zip(out) {
            *out = sum(width, |i| a[i] * b[i]);
        }
    }
}

/// A head's rows of both streams, copied together: [keys, head_dim].
fn gather(shape: &AttentionShape, b: usize, h: usize, source: Streams<&[f32]>, out: &mut Vec<f32>) {
    out.clear();
    let (width, dim) = (shape.width(), shape.head_dim);
    for (rows, tokens) in [(Some(source.image), shape.image), (source.context, shape.context)] {
        if let Some(rows) = rows {
            for row in rows[b * tokens * width..][..tokens * width].chunks_exact(width) {
                out.extend_from_slice(&row[h * dim..][..dim]);
            }
        }
    }
}

/// A tile of queries: which stream, its first row in the stream's buffer, its place among the sample's tokens, its size.
struct QueryTile {
    context: bool,
    row: usize,
    token: usize,
    rows: usize,
}

fn tiles(shape: &AttentionShape, b: usize) -> impl Iterator<Item = QueryTile> {
    let context = if shape.context_queries { shape.context } else { 0 };
    [(false, shape.image, 0), (true, context, shape.image)].into_iter().flat_map(move |(context, tokens, before)| {
        (0..tokens).step_by(QUERIES).map(move |i| QueryTile { context, row: b * tokens + i, token: before + i, rows: QUERIES.min(tokens - i) })
    })
}

/// `out = softmax(q kᵀ / √head_dim) v` per sample and head over the tokens of both streams.
///
/// `lse` [batch, heads, tokens] gets the logarithms. No context in `out`: context queries are left out.
pub(crate) fn forward(shape: &AttentionShape, q: Streams<&[f32]>, k: Streams<&[f32]>, v: Streams<&[f32]>, out: Streams<&mut [f32]>, lse: &mut [f32]) {
    let (width, dim, keys) = (shape.width(), shape.head_dim, shape.keys());
    let scale = 1.0 / (dim as f32).sqrt();
    let out = out.share();
    lse.par_chunks_mut(keys).enumerate().for_each(|(task, lse)| {
        let (b, h) = (task / shape.heads, task % shape.heads);
        let mut scratch = SCRATCH.with_borrow_mut(std::mem::take);
        let Scratch { keys_transposed, values, gathered, .. } = &mut scratch;
        gather(shape, b, h, k, gathered);
        keys_transposed.repack(dim, keys, gathered, 1, dim);
        gather(shape, b, h, v, gathered);
        values.repack(keys, dim, gathered, dim, 1);
        let stride = keys.next_multiple_of(PANEL);
        with_scratch(QUERIES * (stride + 1), |memory| {
            let (scores, inverse) = memory.split_at_mut(QUERIES * stride);
            for tile in tiles(shape, b) {
                let (Some(q), Some(out)) = (q.pick(tile.context), out.pick(tile.context)) else { continue };
                let first = tile.row * width + h * dim;
                let extent = (tile.rows - 1) * width + dim;
                // SAFETY: `scores` is this task's own.
                unsafe {
                    product(
                        tile.rows,
                        Strided::rows(&q[first..first + extent], width),
                        keys_transposed,
                        0..keys_transposed.panels(),
                        Start::Zero,
                        scores.as_mut_ptr(),
                        stride,
                    );
                }
                softmax_rows(&mut scores[..tile.rows * stride], stride, keys, scale, &mut inverse[..tile.rows], &mut lse[tile.token..][..tile.rows]);
                scale_rows(&mut scores[..tile.rows * stride], stride, keys, &inverse[..tile.rows]);
                let out = out.at(first, extent);
                // SAFETY: this head's columns of these rows are written by this task alone.
                unsafe { product(tile.rows, Strided::rows(scores, stride), values, 0..values.panels(), Start::Zero, out, width) };
            }
        });
        SCRATCH.set(scratch);
    });
}

/// The gradients of [`forward`]'s q, k and v (all assigned).
///
/// `d_q` without context: context queries took no part; otherwise every stream that is in `k` is in all of `d_k`, `d_v`.
pub(crate) fn backward(
    shape: &AttentionShape,
    q: Streams<&[f32]>,
    k: Streams<&[f32]>,
    v: Streams<&[f32]>,
    out: Streams<&[f32]>,
    lse: &[f32],
    d_out: Streams<&[f32]>,
    d_q: Streams<&mut [f32]>,
    d_k: Streams<&mut [f32]>,
    d_v: Streams<&mut [f32]>,
) {
    let (width, dim, keys) = (shape.width(), shape.head_dim, shape.keys());
    let scale = 1.0 / (dim as f32).sqrt();
    let (d_q, d_kv) = (d_q.share(), [d_k.share(), d_v.share()]);
    lse.par_chunks(keys).enumerate().for_each(|(task, lse)| {
        let (b, h) = (task / shape.heads, task % shape.heads);
        let mut scratch = SCRATCH.with_borrow_mut(std::mem::take);
        let Scratch { keys: keys_packed, keys_transposed, values: values_transposed, queries, d_outs, gathered } = &mut scratch;
        gather(shape, b, h, k, gathered);
        keys_transposed.repack(dim, keys, gathered, 1, dim);
        keys_packed.repack(keys, dim, gathered, dim, 1);
        gather(shape, b, h, v, gathered);
        values_transposed.repack(dim, keys, gathered, 1, dim);
        let stride = keys.next_multiple_of(PANEL);
        with_scratch(2 * QUERIES * stride + 2 * keys * dim + QUERIES, |memory| {
            let (scores, memory) = memory.split_at_mut(QUERIES * stride);
            let (d_scores, memory) = memory.split_at_mut(QUERIES * stride);
            let (d_keys, memory) = memory.split_at_mut(keys * dim);
            let (d_values, delta) = memory.split_at_mut(keys * dim);
            let mut start = Start::Zero;
            for tile in tiles(shape, b) {
                let (Some(q), Some(out), Some(d_out), Some(d_q)) =
                    (q.pick(tile.context), out.pick(tile.context), d_out.pick(tile.context), d_q.pick(tile.context))
                else {
                    continue;
                };
                let (first, rows) = (tile.row * width + h * dim, tile.rows);
                let extent = (rows - 1) * width + dim;
                let (q, out, d_out) = (&q[first..first + extent], &out[first..first + extent], &d_out[first..first + extent]);
                dot_rows(out, d_out, width, dim, &mut delta[..rows]);
                // SAFETY: scores, d_scores, d_keys and d_values are this task's own; so are this head's columns of d_q's rows.
                unsafe {
                    let all = 0..keys_transposed.panels();
                    product(rows, Strided::rows(q, width), keys_transposed, all.clone(), Start::Zero, scores.as_mut_ptr(), stride);
                    product(rows, Strided::rows(d_out, width), values_transposed, all, Start::Zero, d_scores.as_mut_ptr(), stride);
                }
                let used = rows * stride;
                score_gradient_rows(&mut scores[..used], &mut d_scores[..used], stride, keys, scale, &lse[tile.token..][..rows], &delta[..rows]);
                queries.repack(rows, dim, q, width, 1);
                d_outs.repack(rows, dim, d_out, width, 1);
                // SAFETY: as above.
                unsafe {
                    let all = 0..keys_packed.panels();
                    product(rows, Strided::rows(d_scores, stride), keys_packed, all.clone(), Start::Zero, d_q.at(first, extent), width);
                    product(keys, Strided::transposed(d_scores, stride), queries, all.clone(), start, d_keys.as_mut_ptr(), dim);
                    product(keys, Strided::transposed(scores, stride), d_outs, all, start, d_values.as_mut_ptr(), dim);
                }
                start = Start::Accumulate;
            }
            for (gradient, target) in [(&*d_keys, d_kv[0]), (&*d_values, d_kv[1])] {
                let streams = [(Some(target.image), shape.image, 0), (target.context, shape.context, shape.image)];
                for (target, tokens, before) in streams {
                    let Some(target) = target else { continue };
                    for i in 0..tokens {
                        let source = &gradient[(before + i) * dim..][..dim];
                        let to = target.at((b * tokens + i) * width + h * dim, dim);
                        // SAFETY: this head's columns of this sample's rows are written by this task alone.
                        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), to, dim) };
                    }
                }
            }
        });
        SCRATCH.set(scratch);
    });
}
