//! Group norm of one picture, with or without SiLU.

use rayon::prelude::*;

use super::simd::{exp, sum, vectorised};

/// Values per partial sum; partial sums are added in f64.
const PIECE: usize = 4096;

/// The group norm of x `[channels, pixels]`, with `silu` its SiLU; `gain` and `offset` `[channels]`.
pub(crate) fn group_norm(x: &[f32], groups: usize, gain: &[f32], offset: &[f32], epsilon: f64, silu: bool) -> Vec<f32> {
    let channels = gain.len();
    assert!(offset.len() == channels && groups > 0 && channels.is_multiple_of(groups) && x.len().is_multiple_of(channels), "should be channels in groups");
    let pixels = x.len() / channels;
    let per_group = channels / groups;
    let mut out = vec![0.0_f32; x.len()];
    let tasks = out.par_chunks_mut((per_group * pixels).max(1)).zip(x.par_chunks((per_group * pixels).max(1))).enumerate();
    tasks.for_each(|(group, (out, x))| {
        let count = x.len() as f64;
        let mut mean = 0.0;
        let mut variance = 0.0;
        add_up(x, 0.0, false, &mut mean);
        mean /= count;
        add_up(x, mean as f32, true, &mut variance);
        let rstd = 1.0 / (variance / count + epsilon).sqrt();
        for (i, (out, x)) in out.chunks_exact_mut(pixels).zip(x.chunks_exact(pixels)).enumerate() {
            let channel = group * per_group + i;
            let factor = f64::from(gain[channel]) * rstd;
            let shift = (f64::from(offset[channel]) - mean * factor) as f32;
            if silu { scale_silu(x, out, factor as f32, shift) } else { scale(x, out, factor as f32, shift) }
        }
    });
    out
}

vectorised! {
    /// Adds Σ (x - centre), or its squares, to `total`.
    fn add_up(x: &[f32], centre: f32, square: bool, total: &mut f64) {
        for piece in x.chunks(PIECE) {
            let n = piece.len();
            *total += f64::from(if square {
                sum(n, |i| (piece[i] - centre) * (piece[i] - centre))
            } else {
                sum(n, |i| piece[i])
            });
        }
    }
}

vectorised! {
    /// silu(factor x + shift).
    fn scale_silu(x: &[f32], out: &mut [f32], factor: f32, shift: f32) {
        for (out, x) in out.iter_mut().zip(x) {
            let y = x * factor + shift;
            *out = y / (1.0 + exp(-y));
        }
    }
}

vectorised! {
    /// factor x + shift.
    fn scale(x: &[f32], out: &mut [f32], factor: f32, shift: f32) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = x * factor + shift;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_common::rng::{Purpose, Stream};

    #[test]
    fn equals_the_definition() {
        for (channels, groups, pixels) in [(4, 2, 5), (6, 6, 64), (8, 1, 10_007), (32, 32, 33)] {
            let mut x = vec![0.0; channels * pixels];
            Stream::new(1, Purpose::Noise, 0, 0).fill_normal(&mut x);
            for value in &mut x {
                *value = *value * 3.0 + 10.0;
            }
            let gain: Vec<f32> = (0..channels).map(|i| 0.5 + i as f32 / 7.0).collect();
            let offset: Vec<f32> = (0..channels).map(|i| i as f32 / 5.0 - 1.0).collect();
            let got = [false, true].map(|silu| group_norm(&x, groups, &gain, &offset, 1e-6, silu));
            let size = channels / groups * pixels;
            for (g, values) in x.chunks(size).enumerate() {
                let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / size as f64;
                let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / size as f64;
                for (i, v) in values.iter().enumerate() {
                    let c = g * channels / groups + i / pixels;
                    let y = (f64::from(*v) - mean) / (variance + 1e-6).sqrt() * f64::from(gain[c]) + f64::from(offset[c]);
                    for (got, want) in got.iter().zip([y, y / (1.0 + (-y).exp())]) {
                        assert!((f64::from(got[g * size + i]) - want).abs() < 1e-5 * want.abs().max(1.0), "{channels} {groups} {pixels}");
                    }
                }
            }
        }
    }
}
