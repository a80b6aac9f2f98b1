//! Attention of one sequence with itself, for networks that are not trained: a text encoder's, with a bias or a causal mask, and the
//! autoencoder's over the pixels of a picture.
//!
//! Tiles of queries against all keys, in order, as in [`super::attention`].

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Packed, Start, Strided, product, with_scratch};
use super::microkernel::PANEL;
use super::share::Shared;
use super::simd::{LANES, exp, sum, vectorised};
use crate::kernels::TextAttention;

/// Queries per tile.
const QUERIES: usize = 48;

vectorised! {
    /// For each row: softmax of `scale · s (+ bias)` over the keys that it sees: all, or with `causal` those up to its own token, of which the
    /// first row's is `token`. Hidden keys get zeros.
    fn softmax_rows(scores: &mut [f32], stride: usize, keys: usize, scale: f32, bias: Option<&[f32]>, causal: bool, token: usize) {
        for (i, row) in scores.chunks_exact_mut(stride).enumerate() {
            let seen = if causal { keys.min(token + i + 1) } else { keys };
            let (row, hidden) = row[..keys].split_at_mut(seen);
            hidden.fill(0.0);
            match bias {
                Some(bias) => row.iter_mut().zip(&bias[i * keys..]).for_each(|(s, b)| *s = *s * scale + b),
                None => row.iter_mut().for_each(|s| *s *= scale),
            }
            let mut largest = [f32::NEG_INFINITY; LANES];
            for part in row.chunks_exact(LANES) {
                for (l, &s) in largest.iter_mut().zip(part) {
                    *l = if s > *l { s } else { *l };
                }
            }
            for &s in &row[seen / LANES * LANES..] {
                largest[0] = if s > largest[0] { s } else { largest[0] };
            }
            let largest = largest.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
            for s in row.iter_mut() {
                *s = exp(*s - largest);
            }
            let inverse = 1.0 / sum(seen, |i| row[i]);
            for s in row.iter_mut() {
                *s *= inverse;
            }
        }
    }
}

/// Keys and values of one head, packed, and what is done to its scores.
struct Head<'a> {
    /// kᵀ: [dim, tokens].
    keys: Packed,
    /// [tokens, dim].
    values: Packed,
    scale: f32,
    /// [tokens, tokens].
    bias: Option<&'a [f32]>,
    causal: bool,
}

impl Head<'_> {
    fn tokens(&self) -> usize {
        self.keys.n()
    }

    /// Values of scratch memory for a tile's scores.
    fn scratch(&self) -> usize {
        QUERIES * self.tokens().next_multiple_of(PANEL)
    }

    /// The outputs of these queries; `q` begins with the first one's row.
    ///
    /// # Safety
    /// `out` must be valid for as many rows of dim values at a distance of `stride`, which no other task touches meanwhile.
    unsafe fn attend(&self, queries: Range<usize>, q: Strided<'_>, scores: &mut [f32], out: *mut f32, stride: usize) {
        let (keys, rows) = (self.tokens(), queries.len());
        let width = keys.next_multiple_of(PANEL);
        let scores = &mut scores[..rows * width];
        // SAFETY: `scores` is the caller's own.
        unsafe { product(rows, q, &self.keys, 0..self.keys.panels(), Start::Zero, scores.as_mut_ptr(), width) };
        let bias = self.bias.map(|bias| &bias[queries.start * keys..queries.end * keys]);
        softmax_rows(scores, width, keys, self.scale, bias, self.causal, queries.start);
        // SAFETY: as the caller vouches.
        unsafe { product(rows, Strided::rows(scores, width), &self.values, 0..self.values.panels(), Start::Zero, out, stride) };
    }
}

fn tiles(tokens: usize) -> impl IndexedParallelIterator<Item = Range<usize>> {
    (0..tokens.div_ceil(QUERIES)).into_par_iter().map(move |tile| tile * QUERIES..tokens.min((tile + 1) * QUERIES))
}

/// Attention of each caption with itself: softmax(scale · q kᵀ + bias) v for qkv [captions · tokens, 3 · heads · dim], `bias`
/// [heads, tokens, tokens], out [captions · tokens, heads · dim].
pub(crate) fn text(shape: &TextAttention, qkv: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
    let &TextAttention { tokens, heads, dim, scale, causal } = shape;
    let inner = heads * dim;
    let width = 3 * inner;
    assert!(qkv.len().is_multiple_of(width * tokens) && out.len() * 3 == qkv.len(), "should be [captions · tokens, 3 · heads · dim]");
    assert!(bias.is_none_or(|b| b.len() == heads * tokens * tokens), "should be [heads, tokens, tokens]");
    let captions = qkv.len() / (width * tokens);
    let out = Shared::new(out);
    (0..captions * heads).into_par_iter().for_each(|task| {
        let (caption, head) = (task / heads, task % heads);
        let rows = &qkv[caption * tokens * width..][..tokens * width];
        let part = |which: usize| &rows[which * inner + head * dim..];
        let packed = Head {
            keys: Packed::new(dim, tokens, part(1), 1, width, 1.0),
            values: Packed::new(tokens, dim, part(2), width, 1, 1.0),
            scale,
            bias: bias.map(|bias| &bias[head * tokens * tokens..][..tokens * tokens]),
            causal,
        };
        with_scratch(packed.scratch(), |scores| {
            for first in (0..tokens).step_by(QUERIES) {
                let queries = first..tokens.min(first + QUERIES);
                let to = out.at((caption * tokens + first) * inner + head * dim, (queries.len() - 1) * inner + dim);
                let q = Strided::rows(&part(0)[first * width..], width);
                // SAFETY: this head's columns of these rows are written by this task alone.
                unsafe { packed.attend(queries, q, scores, to, inner) };
            }
        });
    });
}

/// Attention of one head of `width` channels over the pixels of qkv [3 · width, pixels], scaled by 1/√width: out [width, pixels].
pub(crate) fn picture(width: usize, qkv: &[f32], out: &mut [f32]) {
    let pixels = qkv.len() / (3 * width);
    assert!(qkv.len() == 3 * width * pixels && out.len() == width * pixels, "should be [3 · width, pixels]");
    let (q, kv) = qkv.split_at(width * pixels);
    let (k, v) = kv.split_at(width * pixels);
    let head = Head {
        keys: Packed::new(width, pixels, k, pixels, 1, 1.0),
        values: Packed::new(pixels, width, v, 1, pixels, 1.0),
        scale: 1.0 / (width as f32).sqrt(),
        bias: None,
        causal: false,
    };
    let out = Shared::new(out);
    tiles(pixels).for_each(|queries| {
        with_scratch(head.scratch() + QUERIES * width, |memory| {
            let (scores, rows) = memory.split_at_mut(head.scratch());
            let q = Strided::transposed(&q[queries.start..], pixels);
            // SAFETY: `rows` is this task's own.
            unsafe { head.attend(queries.clone(), q, scores, rows.as_mut_ptr(), width) };
            for channel in 0..width {
                let to = out.at(channel * pixels + queries.start, queries.len());
                for i in 0..queries.len() {
                    // SAFETY: these pixels are written by this task alone.
                    unsafe { *to.add(i) = rows[i * width + channel] };
                }
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_common::rng::{Purpose, Stream};

    fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut values = vec![0.0; len];
        Stream::new(seed, Purpose::Noise, 0, 0).fill_normal(&mut values);
        values
    }

    /// The definition in f64: value(which of q, k and v; token; channel).
    fn reference(tokens: usize, dim: usize, scale: f64, score: impl Fn(usize, usize) -> Option<f64>, value: impl Fn(usize, usize, usize) -> f64) -> Vec<f64> {
        let mut out = Vec::new();
        for t in 0..tokens {
            let scores: Vec<f64> = (0..tokens)
                .map(|u| score(t, u).map_or(f64::NEG_INFINITY, |bias| scale * (0..dim).map(|c| value(0, t, c) * value(1, u, c)).sum::<f64>() + bias))
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
            out.extend((0..dim).map(|c| scores.iter().enumerate().map(|(u, s)| (s - largest).exp() / total * value(2, u, c)).sum::<f64>()));
        }
        out
    }

    #[test]
    fn captions_attend_to_themselves() {
        for (captions, tokens, heads, dim, causal, biased) in
            [(2, 5, 3, 4, true, false), (1, 77, 2, 8, true, false), (3, 50, 2, 5, false, true), (2, 1, 1, 3, false, true)]
        {
            let scale = 0.37;
            let (qkv, bias) = (random(captions * tokens * 3 * heads * dim, 1), random(heads * tokens * tokens, 2));
            let mut out = vec![f32::NAN; captions * tokens * heads * dim];
            text(&TextAttention { tokens, heads, dim, scale, causal }, &qkv, biased.then_some(&bias), &mut out);
            for caption in 0..captions {
                for head in 0..heads {
                    let value = |which: usize, t: usize, c: usize| f64::from(qkv[((caption * tokens + t) * 3 + which) * heads * dim + head * dim + c]);
                    let score = |t: usize, u: usize| (!causal || u <= t).then(|| if biased { f64::from(bias[(head * tokens + t) * tokens + u]) } else { 0.0 });
                    for (i, want) in reference(tokens, dim, f64::from(scale), score, value).iter().enumerate() {
                        let got = out[(caption * tokens + i / dim) * heads * dim + head * dim + i % dim];
                        assert!((f64::from(got) - want).abs() < 2e-6, "{captions} {tokens} {i}: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn pixels_attend_to_each_other() {
        for (pixels, width) in [(1, 4), (7, 3), (130, 33)] {
            let qkv = random(3 * width * pixels, 1);
            let mut out = vec![f32::NAN; width * pixels];
            picture(width, &qkv, &mut out);
            let value = |which: usize, t: usize, c: usize| f64::from(qkv[(which * width + c) * pixels + t]);
            for (i, want) in reference(pixels, width, 1.0 / (width as f64).sqrt(), |_, _| Some(0.0), value).iter().enumerate() {
                let got = out[i % width * pixels + i / width];
                assert!((f64::from(got) - want).abs() < 2e-6, "{pixels} {width} {i}: {got} {want}");
            }
        }
    }
}
