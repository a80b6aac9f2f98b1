//! Blockwise 8-bit codes of bitsandbytes (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021).

/// Values that share a scale.
pub(super) const BLOCK: usize = 256;

/// A table of 256 ascending values in [-1, 1] with the search for the nearest.
#[derive(Debug, Clone)]
pub(super) struct CodeTable {
    values: [f32; 256],
}

impl CodeTable {
    /// `create_dynamic_map(signed, max_exponent_bits=7, total_bits=8)`: a sign (if signed), a unary exponent, a linear fraction.
    pub(super) fn dynamic(signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for i in 0..7_i32 {
            let count = 1_usize << if signed { i } else { i + 1 };
            let boundaries: Vec<f32> = (0..=count).map(|k| linspace(0.1, 1.0, count, k)).collect();
            for pair in boundaries.windows(2) {
                let value = 10_f64.powi(i - 6) as f32 * f32::midpoint(pair[0], pair[1]);
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        let mut table = [0.0; 256];
        table.copy_from_slice(&values);
        Self { values: table }
    }

    /// The value of a code.
    pub(super) fn value(&self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }

    /// The nearest code to `x` in [-1, 1].
    pub(super) fn nearest(&self, x: f32) -> u8 {
        let right = self.values.partition_point(|v| *v < x).min(255);
        let left = right.saturating_sub(1);
        (if x - self.values[left] < self.values[right] - x { left } else { right }) as u8
    }
}

/// Element `k` of `torch.linspace(start, end, steps=count + 1, dtype=float32)`: counted from the nearer end.
fn linspace(start: f32, end: f32, count: usize, k: usize) -> f32 {
    let step = (end - start) / count as f32;
    if k < count.div_ceil(2) { step.mul_add(k as f32, start) } else { end - step * (count - k) as f32 }
}
