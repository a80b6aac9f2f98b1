//! Antialiased bilinear resizing in Pillow's fixed-point arithmetic, so that a picture becomes the same bytes as there.
//!
//! Only the wanted window of the result is computed: a very long picture costs no more than its crop.

use std::ops::Range;

/// Fraction bits of the weights: 32 bits less 8 of the pixel and 2 of headroom.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// Weights of the input pixels for some output pixels of one axis.
struct Kernel {
    /// First input pixel and its weights, per output pixel.
    taps: Vec<(usize, Vec<i32>)>,
}

impl Kernel {
    /// The triangle filter, widened by the scale when the picture shrinks. Output pixels `wanted` of `output`.
    fn bilinear(input: usize, output: usize, wanted: Range<usize>) -> Self {
        let scale = input as f64 / output as f64;
        let filter_scale = scale.max(1.0);
        let support = filter_scale;
        let taps = wanted.map(|out| {
            let center = (out as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let count = ((center + support + 0.5) as usize).min(input) - first;
            let weight = |x: usize| (1.0 - (((x + first) as f64 - center + 0.5) * (1.0 / filter_scale)).abs()).max(0.0);
            let weights: Vec<f64> = (0..count).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            let fixed = |w: &f64| (0.5 + if sum == 0.0 { *w } else { *w / sum } * f64::from(1_u32 << PRECISION_BITS)) as i32;
            (first, weights.iter().map(fixed).collect())
        });
        Self { taps: taps.collect() }
    }

    /// The copy of input pixels, for an axis that keeps its size.
    fn identity(wanted: Range<usize>) -> Self {
        Self { taps: wanted.map(|x| (x, vec![1 << PRECISION_BITS])).collect() }
    }

    fn of(input: usize, output: usize, wanted: Range<usize>) -> Self {
        if input == output { Self::identity(wanted) } else { Self::bilinear(input, output, wanted) }
    }

    /// Input pixels that are looked at.
    fn span(&self) -> Range<usize> {
        let first = self.taps.iter().map(|(first, _)| *first).min().unwrap_or(0);
        let end = self.taps.iter().map(|(first, weights)| first + weights.len()).max().unwrap_or(0);
        first..end
    }
}

fn clip8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Rounds to nearest.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// An RGB picture, `[height, width, 3]`.
struct Rows<'a> {
    data: &'a [u8],
    width: usize,
}

/// Resizes `[height, width, 3]` bytes to `to` = (width, height) and returns the window `columns` x `rows` of the result.
/// One axis is resized after the other, with rounding in between.
///
/// The vertical pass comes first where the height loses more than twice what the width loses, as in Pillow 13
/// (python-pillow/Pillow#9549). The order is visible: it decides which rounding happens first.
pub(super) fn bilinear_rgb(data: &[u8], (width, height): (usize, usize), to: (usize, usize), columns: Range<usize>, rows: Range<usize>) -> Vec<u8> {
    let horizontal = Kernel::of(width, to.0, columns);
    let vertical = Kernel::of(height, to.1, rows);
    let height_loss = height as i64 - to.1 as i64;
    let width_loss = width as i64 - to.0 as i64;
    let picture = Rows { data, width };
    if height_loss > 0 && height_loss > 2 * width_loss {
        let span = horizontal.span();
        let between = resize_columns(&picture, &vertical, 0, span.clone());
        resize_rows(&Rows { data: &between, width: span.len() }, &horizontal, span.start, 0..vertical.taps.len())
    } else {
        let span = vertical.span();
        let between = resize_rows(&picture, &horizontal, 0, span.clone());
        resize_columns(&Rows { data: &between, width: horizontal.taps.len() }, &vertical, span.start, 0..horizontal.taps.len())
    }
}

/// Resizes the given `rows` of the picture, whose column 0 is column `origin` of the kernel's input.
fn resize_rows(picture: &Rows<'_>, kernel: &Kernel, origin: usize, rows: Range<usize>) -> Vec<u8> {
    let mut out = Vec::with_capacity(kernel.taps.len() * rows.len() * 3);
    for from in picture.data.chunks_exact(picture.width * 3).take(rows.end).skip(rows.start) {
        for (first, weights) in &kernel.taps {
            let mut sum = [HALF; 3];
            for (source, weight) in from[(first - origin) * 3..].as_chunks::<3>().0.iter().zip(weights) {
                for c in 0..3 {
                    sum[c] += i32::from(source[c]) * weight;
                }
            }
            out.extend(sum.map(clip8));
        }
    }
    out
}

/// Resizes the given `columns` of the picture, whose row 0 is row `origin` of the kernel's input.
fn resize_columns(picture: &Rows<'_>, kernel: &Kernel, origin: usize, columns: Range<usize>) -> Vec<u8> {
    let mut out = Vec::with_capacity(columns.len() * kernel.taps.len() * 3);
    let mut sums = vec![0_i32; columns.len() * 3];
    for (first, weights) in &kernel.taps {
        sums.fill(HALF);
        for (from, weight) in picture.data.chunks_exact(picture.width * 3).skip(first - origin).zip(weights) {
            for (sum, value) in sums.iter_mut().zip(&from[columns.start * 3..columns.end * 3]) {
                *sum += i32::from(*value) * weight;
            }
        }
        out.extend(sums.iter().map(|sum| clip8(*sum)));
    }
    out
}
