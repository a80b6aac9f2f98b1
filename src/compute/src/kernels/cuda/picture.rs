//! Pictures as [pixels, channels]: convolutions as products with columns that are made strip by strip; group statistics are f64.

use rayon::prelude::*;

use super::encode::Window;
use super::{Cuda, Memory};
use crate::kernels::{Convolution, GroupNorm, HostConvolution, Picture, Resampling};

/// Values of columns that are there at once (256 MiB of 16-bit values).
const COLUMN_VALUES: usize = 1 << 27;
/// Pixels that one thread lays out at a time.
const RUN: usize = 8192;
/// Values of attention scores that are there at once.
const SCORE_VALUES: usize = 1 << 24;

impl Cuda {
    /// [out, in, k, k] as [out, k, k, in], with zeros in place of the channels that pad it.
    pub(in crate::kernels) fn convolution(&self, host: HostConvolution<'_>, padded: (usize, usize), resampling: Resampling) -> Convolution<Memory> {
        let HostConvolution { weight: stored, bias, inputs, kernel, .. } = host;
        let taps = kernel * kernel;
        let mut weight = vec![0.0; padded.1 * taps * padded.0];
        for (o, stored) in stored.chunks_exact(inputs * taps).enumerate() {
            for (i, stored) in stored.chunks_exact(taps).enumerate() {
                for (tap, value) in stored.iter().enumerate() {
                    weight[(o * taps + tap) * padded.0 + i] = *value;
                }
            }
        }
        let mut bias = bias.to_vec();
        bias.resize(padded.1, 0.0);
        Convolution {
            weight: self.upload_as(&weight, self.precision),
            bias: self.upload_as(&bias, self.precision),
            inputs: padded.0,
            outputs: padded.1,
            kernel,
            resampling,
        }
    }

    pub(in crate::kernels) fn upload_picture(&self, values: &[f32], (channels, height, width): (usize, usize, usize), padded: usize) -> Picture<Memory> {
        let pixels = height * width;
        let mut rows = vec![0.0; pixels * padded];
        rows.par_chunks_mut(RUN * padded).enumerate().for_each(|(run, rows)| {
            for (channel, values) in values.chunks_exact(pixels).enumerate().take(channels) {
                for (row, value) in rows.chunks_exact_mut(padded).zip(&values[run * RUN..]) {
                    row[channel] = *value;
                }
            }
        });
        Picture { values: self.upload_as(&rows, self.precision), height, width, channels: padded }
    }

    pub(in crate::kernels) fn download_picture(&self, x: &Picture<Memory>, channels: usize) -> Vec<f32> {
        let rows = self.download(&x.values);
        let mut values = Vec::with_capacity(channels * x.height * x.width);
        for channel in 0..channels {
            values.extend(rows.chunks_exact(x.channels).map(|row| row[channel]));
        }
        values
    }

    pub(in crate::kernels) fn convolve(&self, x: &Picture<Memory>, convolution: &Convolution<Memory>, onto: Option<Picture<Memory>>) -> Picture<Memory> {
        let &Convolution { ref weight, ref bias, inputs, outputs, kernel, resampling } = convolution;
        let (height, width, stride, pad) = match resampling {
            Resampling::Same => (x.height, x.width, 1, kernel / 2),
            Resampling::Halve => ((x.height - 2) / 2 + 1, (x.width - 2) / 2 + 1, 2, 0),
            Resampling::Double => (2 * x.height, 2 * x.width, 1, 1),
        };
        let (rows, k) = (height * width, kernel * kernel * inputs);
        let accumulate = onto.is_some();
        let mut y = onto.map_or_else(|| self.memory_of(rows * outputs, self.precision), |onto| onto.values);
        let matrix = self.matrix(weight, outputs, k);
        if kernel == 1 {
            self.matrix_product(rows, &x.values, matrix, Some(bias), &mut y, 0, accumulate);
        } else {
            let double = resampling == Resampling::Double;
            let window = Window { height: x.height, width: x.width, channels: inputs, kernel, stride, pad, double, out_width: width };
            let strip = (COLUMN_VALUES / k).clamp(1, rows);
            for first in (0..rows).step_by(strip) {
                let count = strip.min(rows - first);
                let columns = self.columns(&x.values, window, first, count);
                self.matrix_product(count, &columns, matrix, Some(bias), &mut y, first, accumulate);
            }
        }
        Picture { values: y, height, width, channels: outputs }
    }

    pub(in crate::kernels) fn normalise(&self, x: &Picture<Memory>, norm: &GroupNorm<Memory>, silu: bool) -> Picture<Memory> {
        let affine = self.group_affine(&x.values, norm.groups, &norm.weight, &norm.bias, norm.epsilon);
        Picture { values: self.apply_affine(&x.values, &affine, silu), ..*x }
    }

    pub(in crate::kernels) fn picture_attention(&self, qkv: &Picture<Memory>) -> Picture<Memory> {
        let (tokens, channels) = (qkv.height * qkv.width, qkv.channels / 3);
        let values = self.attention_of_rows(&qkv.values, channels, (SCORE_VALUES / tokens).max(1));
        Picture { values, height: qkv.height, width: qkv.width, channels }
    }
}
