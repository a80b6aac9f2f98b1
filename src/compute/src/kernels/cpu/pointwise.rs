//! Operations on each value alone, and sums over a sample's tokens.

use rayon::prelude::*;

use super::simd::{exp, vectorised};

/// Values per task.
const PIECE: usize = 1 << 14;

/// √(2/π).
const ROOT: f32 = 0.797_884_6;
const CUBE: f32 = 0.044_715;

vectorised! {
    /// `y = x · sigmoid(2u)`, `u = √(2/π) (x + 0.044715 x³)`: the tanh form of GELU.
    fn gelu_piece(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x / (1.0 + exp(-2.0 * ROOT * (x + CUBE * x * x * x)));
        }
    }
}

vectorised! {
    /// `dy · (s + 2 x s (1 - s) u')`, s = sigmoid(2u).
    fn gelu_backward_piece(x: &[f32], dy: &mut [f32]) {
        for (dy, &x) in dy.iter_mut().zip(x) {
            let s = 1.0 / (1.0 + exp(-2.0 * ROOT * (x + CUBE * x * x * x)));
            *dy *= s + 2.0 * x * s * (1.0 - s) * ROOT * (1.0 + 3.0 * CUBE * x * x);
        }
    }
}

vectorised! {
    fn silu_piece(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x / (1.0 + exp(-x));
        }
    }
}

vectorised! {
    fn silu_backward_piece(x: &[f32], dy: &mut [f32]) {
        for (dy, &x) in dy.iter_mut().zip(x) {
            let s = 1.0 / (1.0 + exp(-x));
            *dy *= s * (1.0 + x * (1.0 - s));
        }
    }
}

vectorised! {
    fn gate_rows(gate: &[f32], y: &[f32], x: &[f32], out: &mut [f32]) {
        let d = gate.len();
        for ((out, x), y) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(y.chunks_exact(d)) {
            for i in 0..d {
                out[i] = x[i] + gate[i] * y[i];
            }
        }
    }
}

vectorised! {
    fn gate_backward_rows(gate: &[f32], dout: &[f32], dy: &mut [f32]) {
        let d = gate.len();
        for (dy, dout) in dy.chunks_exact_mut(d).zip(dout.chunks_exact(d)) {
            for i in 0..d {
                dy[i] = gate[i] * dout[i];
            }
        }
    }
}

vectorised! {
    fn gate_gradient_rows(y: &[f32], dout: &[f32], d_gate: &mut [f32]) {
        let d = d_gate.len();
        for (y, dout) in y.chunks_exact(d).zip(dout.chunks_exact(d)) {
            for i in 0..d {
                d_gate[i] += y[i] * dout[i];
            }
        }
    }
}

vectorised! {
    fn multiply_piece(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x *= y;
        }
    }
}

vectorised! {
    fn add_piece(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

/// GELU (tanh form).
pub(crate) fn gelu(x: &[f32], y: &mut [f32]) {
    x.par_chunks(PIECE).zip(y.par_chunks_mut(PIECE)).for_each(|(x, y)| gelu_piece(x, y));
}

/// Replaces the gradient of [`gelu`]'s output by that of its input.
pub(crate) fn gelu_backward(x: &[f32], dy: &mut [f32]) {
    x.par_chunks(PIECE).zip(dy.par_chunks_mut(PIECE)).for_each(|(x, dy)| gelu_backward_piece(x, dy));
}

vectorised! {
    /// gelu(a) · b (tanh form) of the halves (a, b) of each row of x [rows, 2 · width].
    fn gated_gelu_rows(x: &[f32], width: usize, y: &mut [f32]) {
        for (x, y) in x.chunks_exact(2 * width).zip(y.chunks_exact_mut(width)) {
            let (a, b) = x.split_at(width);
            for i in 0..width {
                let a = a[i];
                y[i] = a / (1.0 + exp(-2.0 * ROOT * (a + CUBE * a * a * a))) * b[i];
            }
        }
    }
}

vectorised! {
    fn quick_gelu_piece(x: &mut [f32]) {
        for x in x {
            *x /= 1.0 + exp(-1.702 * *x);
        }
    }
}

/// gelu(a) · b (tanh form) of the halves (a, b) of each row of x [rows, 2 · width].
pub(crate) fn gated_gelu(x: &[f32], width: usize, y: &mut [f32]) {
    assert!(x.len() == 2 * y.len() && y.len().is_multiple_of(width), "should be [rows, 2 · width] and [rows, width]");
    let rows = (PIECE / width).max(1);
    x.par_chunks(2 * rows * width).zip(y.par_chunks_mut(rows * width)).for_each(|(x, y)| gated_gelu_rows(x, width, y));
}

/// x σ(1.702 x), in place.
pub(crate) fn quick_gelu(x: &mut [f32]) {
    x.par_chunks_mut(PIECE).for_each(quick_gelu_piece);
}

/// x Φ(x), with the error function, in place.
pub(crate) fn gelu_erf(x: &mut [f32]) {
    x.par_chunks_mut(PIECE).for_each(|piece| {
        for x in piece {
            *x *= 0.5 * (1.0 + libm::erff(*x * std::f32::consts::FRAC_1_SQRT_2));
        }
    });
}

/// SiLU.
pub(crate) fn silu(x: &[f32], y: &mut [f32]) {
    silu_piece(x, y);
}

/// Replaces the gradient of [`silu`]'s output by that of its input.
pub(crate) fn silu_backward(x: &[f32], dy: &mut [f32]) {
    silu_backward_piece(x, dy);
}

/// `out = x + gate_b · y` for [batch · tokens, d]; `modulation` [batch, stride] holds the gate at this offset.
pub(crate) fn gate_residual(tokens: usize, d: usize, x: &[f32], y: &[f32], modulation: &[f32], stride: usize, gate: usize, out: &mut [f32]) {
    let rows = (PIECE / d).max(1);
    let samples = out.par_chunks_mut(tokens * d).zip(x.par_chunks(tokens * d)).zip(y.par_chunks(tokens * d)).enumerate();
    samples.for_each(|(b, ((out, x), y))| {
        let gate = &modulation[b * stride + gate..][..d];
        let pieces = out.par_chunks_mut(rows * d).zip(x.par_chunks(rows * d)).zip(y.par_chunks(rows * d));
        pieces.for_each(|((out, x), y)| gate_rows(gate, y, x, out));
    });
}

/// `dy = gate_b · d_out`: the gradient of [`gate_residual`]'s branch (that of its residual is `d_out` itself).
pub(crate) fn gate_backward(tokens: usize, d: usize, dout: &[f32], modulation: &[f32], stride: usize, gate: usize, dy: &mut [f32]) {
    let rows = (PIECE / d).max(1);
    let samples = dy.par_chunks_mut(tokens * d).zip(dout.par_chunks(tokens * d)).enumerate();
    samples.for_each(|(b, (dy, dout))| {
        let gate = &modulation[b * stride + gate..][..d];
        dy.par_chunks_mut(rows * d).zip(dout.par_chunks(rows * d)).for_each(|(dy, dout)| gate_backward_rows(gate, dout, dy));
    });
}

/// Adds `Σ_t y · d_out` to the gate's place in `d_modulation` [batch, stride].
pub(crate) fn gate_gradient(tokens: usize, d: usize, y: &[f32], dout: &[f32], d_modulation: &mut [f32], stride: usize, gate: usize) {
    let samples = d_modulation.par_chunks_mut(stride).zip(y.par_chunks(tokens * d)).zip(dout.par_chunks(tokens * d));
    samples.for_each(|((row, y), dout)| gate_gradient_rows(y, dout, &mut row[gate..gate + d]));
}

/// `x *= y`.
pub(crate) fn multiply(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(PIECE).zip(y.par_chunks(PIECE)).for_each(|(x, y)| multiply_piece(x, y));
}

/// `x += y`.
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(PIECE).zip(y.par_chunks(PIECE)).for_each(|(x, y)| add_piece(x, y));
}

/// `x += y` repeated for every sample: x [batch, n], y [n].
pub(crate) fn add_repeated(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(y.len()).for_each(|x| add_piece(x, y));
}
