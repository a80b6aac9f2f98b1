//! Convolutions of one picture as matrix products: columns of the picture's patches are packed straight into the
//! product's panels, so no matrix of patches is ever built.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Start, Strided, product_panels, with_scratch};
use super::microkernel::PANEL;
use super::share::Shared;

/// A convolution with a square kernel and zero padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ConvShape {
    /// Channels in.
    pub inputs: usize,
    /// Channels out.
    pub outputs: usize,
    /// Height of the picture.
    pub height: usize,
    /// Width of the picture.
    pub width: usize,
    /// Side of the kernel.
    pub kernel: usize,
    /// Pixels from one output to the next.
    pub stride: usize,
    /// Zeros before the first row and column.
    pub pad_before: usize,
    /// Zeros after the last row and column.
    pub pad_after: usize,
    /// Whether every pixel stands for two by two (nearest-neighbour enlargement before the convolution).
    pub double: bool,
}

impl ConvShape {
    fn side(&self, pixels: usize) -> usize {
        let whole = if self.double { 2 * pixels } else { pixels };
        (whole + self.pad_before + self.pad_after).saturating_sub(self.kernel) / self.stride + 1
    }

    /// Height of the result.
    pub(crate) fn out_height(&self) -> usize {
        self.side(self.height)
    }

    /// Width of the result.
    pub(crate) fn out_width(&self) -> usize {
        self.side(self.width)
    }
}

/// Convolves x `[inputs, height, width]` with weight `[outputs, inputs, kernel, kernel]`, adds bias `[outputs]`, and adds it all to `out` or with
/// `accumulate` false sets it.
pub(crate) fn conv2d(x: &[f32], weight: &[f32], bias: &[f32], shape: &ConvShape, accumulate: bool, out: &mut [f32]) {
    let depth = shape.inputs * shape.kernel * shape.kernel;
    let pixels = shape.out_height() * shape.out_width();
    assert!(x.len() == shape.inputs * shape.height * shape.width, "should be one picture");
    assert!(weight.len() == shape.outputs * depth && bias.len() == shape.outputs, "should be weights of this shape");
    assert_eq!(out.len(), shape.outputs * pixels, "should be the result's shape");
    out.par_chunks_mut(pixels.max(1)).zip(bias).for_each(|(row, b)| if accumulate { row.iter_mut().for_each(|x| *x += b) } else { row.fill(*b) });
    let panels = pixels.div_ceil(PANEL);
    // By the shape alone: enough tasks to share, panels enough to use a block of weights several times.
    let group = (panels / 8).clamp(1, 8);
    let shared = Shared::new(out);
    (0..panels.div_ceil(group)).into_par_iter().for_each(|task| {
        let range = task * group..panels.min((task + 1) * group);
        with_scratch(range.len() * PANEL * depth, |data| {
            for (panel, packed) in range.clone().zip(data.chunks_exact_mut(PANEL * depth)) {
                pack(x, shape, panel * PANEL..pixels.min((panel + 1) * PANEL), packed);
            }
            let c = shared.at(0, shape.outputs * pixels);
            // SAFETY: `out` has `outputs` rows of `pixels`, and only this task writes these panels' columns.
            unsafe { product_panels(shape.outputs, Strided::rows(weight, depth), data, depth, pixels, range, Start::Accumulate, c, pixels) };
        });
    });
}

/// Outputs that follow each other in a row.
struct Run {
    /// Row of the first.
    y: usize,
    /// Column of the first.
    x: usize,
    /// Place of the first in the panel.
    at: usize,
    /// How many.
    len: usize,
}

/// The patches of outputs `pixels` (at most [`PANEL`]) as [inputs · kernel², PANEL].
fn pack(x: &[f32], shape: &ConvShape, pixels: Range<usize>, packed: &mut [f32]) {
    let width = shape.out_width();
    let mut runs: Vec<Run> = Vec::with_capacity(PANEL);
    let mut pixel = pixels.start;
    while pixel < pixels.end {
        let (row, column) = (pixel / width, pixel % width);
        let len = (width - column).min(pixels.end - pixel);
        runs.push(Run { y: row, x: column, at: pixel - pixels.start, len });
        pixel += len;
    }
    let zoom = usize::from(shape.double);
    let (height, wide) = (shape.height << zoom, shape.width << zoom);
    let mut rows = packed.chunks_exact_mut(PANEL);
    for channel in x.chunks_exact(shape.height * shape.width) {
        for ky in 0..shape.kernel {
            for kx in 0..shape.kernel {
                let Some(out) = rows.next() else { return };
                out[pixels.len()..].fill(0.0);
                for run in &runs {
                    let out = &mut out[run.at..run.at + run.len];
                    let y = (run.y * shape.stride + ky).wrapping_sub(shape.pad_before);
                    if y >= height {
                        out.fill(0.0);
                        continue;
                    }
                    let line = &channel[(y >> zoom) * shape.width..][..shape.width];
                    let first = run.x * shape.stride + kx;
                    if shape.stride == 1 && !shape.double {
                        // Outputs whose pixel lies in the padding, before and after, are zero.
                        let before = shape.pad_before.saturating_sub(first).min(run.len);
                        let start = first + before - shape.pad_before.min(first + before);
                        let inside = (run.len - before).min(wide.saturating_sub(start));
                        out[..before].fill(0.0);
                        out[before..before + inside].copy_from_slice(&line[start.min(wide)..][..inside]);
                        out[before + inside..].fill(0.0);
                    } else {
                        for (i, value) in out.iter_mut().enumerate() {
                            let column = (first + i * shape.stride).wrapping_sub(shape.pad_before);
                            *value = if column < wide { line[column >> zoom] } else { 0.0 };
                        }
                    }
                }
            }
        }
    }
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

    /// The definition, in f64.
    fn direct(x: &[f32], weight: &[f32], bias: &[f32], s: &ConvShape) -> Vec<f64> {
        let zoom = if s.double { 2 } else { 1 };
        let mut out = Vec::new();
        for o in 0..s.outputs {
            for oy in 0..s.out_height() {
                for ox in 0..s.out_width() {
                    let mut sum = f64::from(bias[o]);
                    for c in 0..s.inputs {
                        for ky in 0..s.kernel {
                            for kx in 0..s.kernel {
                                let (y, x0) = ((oy * s.stride + ky) as i64 - s.pad_before as i64, (ox * s.stride + kx) as i64 - s.pad_before as i64);
                                if y >= 0 && x0 >= 0 && (y as usize) < s.height * zoom && (x0 as usize) < s.width * zoom {
                                    let pixel = x[(c * s.height + y as usize / zoom) * s.width + x0 as usize / zoom];
                                    sum += f64::from(pixel) * f64::from(weight[((o * s.inputs + c) * s.kernel + ky) * s.kernel + kx]);
                                }
                            }
                        }
                    }
                    out.push(sum);
                }
            }
        }
        out
    }

    #[test]
    fn equals_the_definition() {
        let base = ConvShape { inputs: 3, outputs: 5, height: 7, width: 9, kernel: 3, stride: 1, pad_before: 1, pad_after: 1, double: false };
        for shape in [
            base,
            ConvShape { height: 1, width: 1, ..base },
            ConvShape { height: 2, width: 70, inputs: 1, outputs: 13, ..base },
            ConvShape { kernel: 1, pad_before: 0, pad_after: 0, ..base },
            ConvShape { stride: 2, pad_before: 0, ..base },
            ConvShape { stride: 2, pad_before: 0, height: 8, width: 6, inputs: 40, ..base },
            ConvShape { double: true, ..base },
            ConvShape { double: true, height: 17, width: 16, inputs: 30, outputs: 33, ..base },
        ] {
            let x = random(shape.inputs * shape.height * shape.width, 1);
            let weight = random(shape.outputs * shape.inputs * shape.kernel * shape.kernel, 2);
            let bias = random(shape.outputs, 3);
            let want = direct(&x, &weight, &bias, &shape);
            let mut got = vec![f32::NAN; want.len()];
            conv2d(&x, &weight, &bias, &shape, false, &mut got);
            let mut twice = got.clone();
            conv2d(&x, &weight, &bias, &shape, true, &mut twice);
            assert!(twice.iter().zip(&want).all(|(t, w)| (f64::from(*t) - 2.0 * w).abs() < 2e-4), "{shape:?}: added");
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((f64::from(*g) - w).abs() < 1e-4, "{shape:?} {i}: {g} {w}");
            }
        }
    }
}
