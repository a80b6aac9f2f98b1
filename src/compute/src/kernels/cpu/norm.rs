//! LayerNorm with modulation, and RMSNorm of heads.

use rayon::prelude::*;

use super::simd::{sum, vectorised};

/// Rows per task.
const ROWS: usize = 16;

/// The epsilon of every norm of the model.
const EPSILON: f32 = 1e-6;

vectorised! {
    /// One sample's rows: `y = (x - mean) · rstd · (1 + scale) + shift`; statistics [rows, 2] get (mean, rstd).
    fn modulate_rows(x: &[f32], shift: &[f32], scale: &[f32], y: &mut [f32], statistics: &mut [f32]) {
        let d = shift.len();
        let scale = &scale[..d];
        for ((x, y), statistics) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(statistics.chunks_exact_mut(2)) {
            let mean = sum(d, |i| x[i]) / d as f32;
            let variance = sum(d, |i| (x[i] - mean) * (x[i] - mean)) / d as f32;
            let rstd = 1.0 / (variance + EPSILON).sqrt();
            (statistics[0], statistics[1]) = (mean, rstd);
            for i in 0..d {
                y[i] = (x[i] - mean) * rstd * (1.0 + scale[i]) + shift[i];
            }
        }
    }
}

vectorised! {
    /// One sample's rows: `dx += rstd · (g - mean(g) - x̂ · mean(g · x̂))` with `g = dy · (1 + scale)`.
    fn modulate_backward_rows(x: &[f32], statistics: &[f32], scale: &[f32], dy: &[f32], dx: &mut [f32]) {
        let d = scale.len();
        for (((x, dy), dx), statistics) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(statistics.chunks_exact(2)) {
            let (mean, rstd) = (statistics[0], statistics[1]);
            let g_mean = sum(d, |i| dy[i] * (1.0 + scale[i])) / d as f32;
            let gx_mean = sum(d, |i| dy[i] * (1.0 + scale[i]) * ((x[i] - mean) * rstd)) / d as f32;
            for i in 0..d {
                let normal = (x[i] - mean) * rstd;
                dx[i] += rstd * (dy[i] * (1.0 + scale[i]) - g_mean - normal * gx_mean);
            }
        }
    }
}

vectorised! {
    /// One sample: `d_shift += Σ_t dy`, `d_scale += Σ_t dy · x̂`.
    fn modulation_gradient_rows(x: &[f32], statistics: &[f32], dy: &[f32], d_shift: &mut [f32], d_scale: &mut [f32]) {
        let d = d_shift.len();
        let d_scale = &mut d_scale[..d];
        for ((x, dy), statistics) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(statistics.chunks_exact(2)) {
            for i in 0..d {
                d_shift[i] += dy[i];
                d_scale[i] += dy[i] * ((x[i] - statistics[0]) * statistics[1]);
            }
        }
    }
}

/// LayerNorm without affine, then modulation, of [batch · tokens, d]; `modulation` [batch, stride] holds shift and scale at
/// these offsets.
pub(crate) fn modulate(
    tokens: usize,
    d: usize,
    x: &[f32],
    modulation: &[f32],
    stride: usize,
    shift: usize,
    scale: usize,
    y: &mut [f32],
    statistics: &mut [f32],
) {
    let per_sample = x.par_chunks(tokens * d).zip(y.par_chunks_mut(tokens * d)).zip(statistics.par_chunks_mut(tokens * 2)).enumerate();
    per_sample.for_each(|(b, ((x, y), statistics))| {
        let (shift, scale) = (&modulation[b * stride + shift..][..d], &modulation[b * stride + scale..][..d]);
        let rows = x.par_chunks(ROWS * d).zip(y.par_chunks_mut(ROWS * d)).zip(statistics.par_chunks_mut(ROWS * 2));
        rows.for_each(|((x, y), statistics)| modulate_rows(x, shift, scale, y, statistics));
    });
}

/// Adds the gradient of [`modulate`]'s input to `dx`.
pub(crate) fn modulate_backward(
    tokens: usize,
    d: usize,
    x: &[f32],
    statistics: &[f32],
    modulation: &[f32],
    stride: usize,
    scale: usize,
    dy: &[f32],
    dx: &mut [f32],
) {
    let per_sample = x.par_chunks(tokens * d).zip(dy.par_chunks(tokens * d)).zip(dx.par_chunks_mut(tokens * d)).zip(statistics.par_chunks(tokens * 2));
    per_sample.enumerate().for_each(|(b, (((x, dy), dx), statistics))| {
        let scale = &modulation[b * stride + scale..][..d];
        let rows = x.par_chunks(ROWS * d).zip(dy.par_chunks(ROWS * d)).zip(dx.par_chunks_mut(ROWS * d)).zip(statistics.par_chunks(ROWS * 2));
        rows.for_each(|(((x, dy), dx), statistics)| modulate_backward_rows(x, statistics, scale, dy, dx));
    });
}

/// Adds the gradients of shift and scale to `d_modulation` [batch, stride] at their offsets.
pub(crate) fn modulation_gradient(
    tokens: usize,
    d: usize,
    x: &[f32],
    statistics: &[f32],
    dy: &[f32],
    d_modulation: &mut [f32],
    stride: usize,
    shift: usize,
    scale: usize,
) {
    let samples = d_modulation.par_chunks_mut(stride).zip(x.par_chunks(tokens * d)).zip(dy.par_chunks(tokens * d)).zip(statistics.par_chunks(tokens * 2));
    samples.for_each(|(((row, x), dy), statistics)| {
        let (low, high) = row.split_at_mut(shift.max(scale));
        let (d_shift, d_scale) = if shift < scale { (&mut low[shift..shift + d], &mut high[..d]) } else { (&mut high[..d], &mut low[scale..scale + d]) };
        modulation_gradient_rows(x, statistics, dy, d_shift, d_scale);
    });
}

vectorised! {
    fn rms_rows(x: &[f32], weight: &[f32], y: &mut [f32], rstds: &mut [f32]) {
        let d = weight.len();
        for ((x, y), rstd) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(rstds) {
            *rstd = 1.0 / (sum(d, |i| x[i] * x[i]) / d as f32 + EPSILON).sqrt();
            for i in 0..d {
                y[i] = x[i] * *rstd * weight[i];
            }
        }
    }
}

vectorised! {
    fn rms_backward_rows(x: &[f32], weight: &[f32], rstds: &[f32], dy: &mut [f32]) {
        let d = weight.len();
        for ((x, dy), &rstd) in x.chunks_exact(d).zip(dy.chunks_exact_mut(d)).zip(rstds) {
            let mean = sum(d, |i| dy[i] * weight[i] * x[i] * rstd) / d as f32;
            for i in 0..d {
                dy[i] = rstd * (dy[i] * weight[i] - x[i] * rstd * mean);
            }
        }
    }
}

vectorised! {
    /// `y = (x - mean) / √(variance + ε) · weight + bias`.
    fn layer_norm_rows(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, y: &mut [f32]) {
        let d = weight.len();
        let bias = &bias[..d];
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let mean = sum(d, |i| x[i]) / d as f32;
            let variance = sum(d, |i| (x[i] - mean) * (x[i] - mean)) / d as f32;
            let rstd = 1.0 / (variance + epsilon).sqrt();
            for i in 0..d {
                y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
            }
        }
    }
}

vectorised! {
    /// `y = x / √(mean(x²) + ε) · weight`.
    fn rms_norm_rows(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32]) {
        let d = weight.len();
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let rstd = 1.0 / (sum(d, |i| x[i] * x[i]) / d as f32 + epsilon).sqrt();
            for i in 0..d {
                y[i] = x[i] * rstd * weight[i];
            }
        }
    }
}

/// LayerNorm with affine of rows of `weight.len()` values.
pub(crate) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, y: &mut [f32]) {
    let d = weight.len();
    assert!(bias.len() == d && x.len() == y.len() && x.len().is_multiple_of(d), "should be rows of the weight's width");
    x.par_chunks(ROWS * d).zip(y.par_chunks_mut(ROWS * d)).for_each(|(x, y)| layer_norm_rows(x, weight, bias, epsilon, y));
}

/// RMSNorm of rows of `weight.len()` values, for networks that are not trained: nothing is kept.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32]) {
    let d = weight.len();
    assert!(x.len() == y.len() && x.len().is_multiple_of(d), "should be rows of the weight's width");
    x.par_chunks(ROWS * d).zip(y.par_chunks_mut(ROWS * d)).for_each(|(x, y)| rms_norm_rows(x, weight, epsilon, y));
}

/// RMSNorm of each head: `y = x · rstd · weight` over runs of `weight.len()` values; `rstds` has one value per run.
pub(crate) fn rms(x: &[f32], weight: &[f32], y: &mut [f32], rstds: &mut [f32]) {
    let run = 64;
    let d = weight.len();
    x.par_chunks(run * d).zip(y.par_chunks_mut(run * d)).zip(rstds.par_chunks_mut(run)).for_each(|((x, y), rstds)| rms_rows(x, weight, y, rstds));
}

/// Replaces the gradient of [`rms`]'s output by that of its input.
pub(crate) fn rms_backward(x: &[f32], weight: &[f32], rstds: &[f32], dy: &mut [f32]) {
    let run = 64;
    let d = weight.len();
    x.par_chunks(run * d).zip(dy.par_chunks_mut(run * d)).zip(rstds.par_chunks(run)).for_each(|((x, dy), rstds)| rms_backward_rows(x, weight, rstds, dy));
}
