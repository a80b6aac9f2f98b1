//! The loss of flow matching on an output of patches (`nn::flow_matching` has the formulas).

use crate::kernels::{FlowSample, PatchLayout};

/// `out`, `d_out` [batch, h · w, p · p · channels] in the order (p, q, c); `x0`, `noise` [batch, channels, h · p, w · p]. Returns each sample's
/// Σ weight · difference² as two floats whose sum it is. Sums are in the order of the latents.
pub(crate) fn flow_loss(
    out: &[f32],
    x0: &[f32],
    noise: &[f32],
    samples: &[FlowSample],
    PatchLayout { channels, width, patch }: PatchLayout,
    preconditioned: bool,
    d_out: &mut [f32],
) -> Vec<f32> {
    assert!(out.len() == x0.len() && x0.len() == noise.len() && out.len() == d_out.len(), "should be alike");
    let n = out.len() / samples.len();
    let (columns, rows) = (width * patch, n / (channels * width * patch));
    assert_eq!(channels * rows * columns * samples.len(), out.len(), "should be whole patches");
    let mut sums = Vec::with_capacity(2 * samples.len());
    for (b, sample) in samples.iter().enumerate() {
        let mut sum = 0.0_f64;
        for at in 0..n {
            let (c, row, column) = (at / (rows * columns), at / columns % rows, at % columns);
            let (i, p, j, q) = (row / patch, row % patch, column / patch, column % patch);
            let e = b * n + (((i * width + j) * patch + p) * patch + q) * channels + c;
            let (v, x0, noise) = (out[e], x0[b * n + at], noise[b * n + at]);
            let (difference, slope) = if preconditioned {
                let x_t = (1.0 - sample.sigma) * x0 + sample.sigma * noise;
                ((v * -sample.sigma + x_t) - x0, -sample.sigma)
            } else {
                (v - (noise - x0), 1.0)
            };
            sum += f64::from(sample.weight * difference * difference);
            d_out[e] = (sample.factor * f64::from(difference) * f64::from(slope)) as f32;
        }
        let high = sum as f32;
        sums.extend([high, (sum - f64::from(high)) as f32]);
    }
    sums
}
