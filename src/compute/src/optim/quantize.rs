//! Blockwise 8-bit codes of bitsandbytes (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021).
//!
//! The codes are those of bitsandbytes 0.50's CPU path, which the reference cases follow: a value divided by its block's
//! largest magnitude is rounded to one of 65,536 evenly spaced points in [-1, 1], and the point's nearest table value is
//! its code. The CUDA kernels search the table for the value itself; the two differ by rounding to the grid (1.5e-5),
//! which shows in values below about 1e-4 of their block's largest.

use crate::kernels::GRID;

/// A table of 256 ascending values in [-1, 1], and the nearest code of each grid point.
#[derive(Clone)]
pub(super) struct CodeTable {
    values: [f32; 256],
    nearest: Vec<u8>,
}

impl std::fmt::Debug for CodeTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodeTable").field("first", &self.values[0]).finish_non_exhaustive()
    }
}

impl CodeTable {
    /// `create_dynamic_map(signed, max_exponent_bits=7, total_bits=8)`: a sign (if signed), a unary exponent, a linear fraction.
    pub(super) fn dynamic(signed: bool) -> Self {
        let mut sorted = vec![0.0, 1.0];
        for i in 0..7_i32 {
            let count = 1_usize << if signed { i } else { i + 1 };
            let boundaries: Vec<f32> = (0..=count).map(|k| linspace(0.1, 1.0, count, k)).collect();
            for pair in boundaries.windows(2) {
                let value = 10_f64.powi(i - 6) as f32 * f32::midpoint(pair[0], pair[1]);
                sorted.push(value);
                if signed {
                    sorted.push(-value);
                }
            }
        }
        sorted.sort_by(f32::total_cmp);
        let mut values = [0.0; 256];
        values.copy_from_slice(&sorted);
        let nearest = (0..GRID).map(|k| nearest(&values, k as f32 / (GRID - 1) as f32 * 2.0 - 1.0)).collect();
        Self { values, nearest }
    }

    /// The value of each code, and the code of each point of the grid.
    pub(super) fn tables(&self) -> (&[f32; 256], &[u8]) {
        (&self.values, &self.nearest)
    }
}

/// The nearest of ascending `values` to `x`; the lower one at a midpoint.
fn nearest(values: &[f32; 256], x: f32) -> u8 {
    let right = values.partition_point(|v| *v < x).min(255);
    let left = right.saturating_sub(1);
    (if values[right] - x < x - values[left] { right } else { left }) as u8
}

/// Element `k` of `torch.linspace(start, end, steps=count + 1, dtype=float32)`: counted from the nearer end.
fn linspace(start: f32, end: f32, count: usize, k: usize) -> f32 {
    let step = (end - start) / count as f32;
    if k < count.div_ceil(2) { step.mul_add(k as f32, start) } else { end - step * (count - k) as f32 }
}
