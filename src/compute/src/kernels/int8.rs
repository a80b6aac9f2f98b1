//! Frozen weights in 8 bits: of each output (a row of W [outputs, inputs]) a scale in f32, the row's largest magnitude / 127, and of each value the
//! nearest whole multiple of it, ties to even. So a value is off by at most half a scale, and zero stays zero. Products widen a weight to the
//! device's precision when they use it and are otherwise those of a weight that was stored so: "weight-only" quantisation with symmetric scales per
//! channel, as torchao's `Int8WeightOnlyConfig`.

use std::ops::Range;

use rayon::prelude::*;

use super::{Precision, StoredMatrix};

/// How a device keeps frozen weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// As numbers of the device's precision.
    #[default]
    Float,
    /// In 8 bits with a scale per output.
    Int8,
}

/// The largest code.
const LARGEST: f32 = 127.0;

/// A weight [outputs, inputs] in 8 bits, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Int8Matrix {
    inputs: usize,
    /// [outputs, inputs], each in -127..=127.
    codes: Vec<i8>,
    /// `[outputs]`.
    scales: Vec<f32>,
}

impl Int8Matrix {
    /// Quantises a matrix. A row with a value that is not finite gets that value, or NaN, as its scale, so that it shows in every result.
    pub fn quantize(outputs: usize, inputs: usize, matrix: &dyn StoredMatrix) -> Self {
        let (mut codes, mut scales) = (vec![0_i8; outputs * inputs], vec![0.0; outputs]);
        codes.par_chunks_mut(inputs.max(1)).zip(&mut scales).enumerate().for_each(|(row, (codes, scale))| {
            let mut values = vec![0.0_f32; inputs];
            matrix.read_block(row..row + 1, 0..inputs, &mut values);
            *scale = row_scale(&values);
            codes.iter_mut().zip(&values).for_each(|(code, value)| *code = nearest(*value, *scale));
        });
        Self { inputs, codes, scales }
    }

    /// The codes [outputs, inputs].
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// The scales `[outputs]`.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }
}

/// The largest magnitude / 127. NaN wins over everything.
fn row_scale(values: &[f32]) -> f32 {
    let largest = values.iter().fold(0.0_f32, |largest, value| if value.is_nan() || largest.is_nan() { f32::NAN } else { largest.max(value.abs()) });
    largest / LARGEST
}

/// The multiple of `scale` that is nearest to `value`; 0 where there is none.
fn nearest(value: f32, scale: f32) -> i8 {
    // A row of zeros has no scale to divide by: NaN becomes 0.
    (value / scale).round_ties_even() as i8
}

impl StoredMatrix for Int8Matrix {
    fn read_block(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            let codes = &self.codes[row * self.inputs..][columns.clone()];
            let scale = self.scales[row];
            out.iter_mut().zip(codes).for_each(|(value, code)| *value = f32::from(*code) * scale);
        }
    }

    fn stored(&self) -> Option<(Precision, &[u8])> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Cpu, Device};

    /// Rows of f32.
    struct Rows(Vec<f32>, usize);

    impl StoredMatrix for Rows {
        fn read_block(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
            for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
                out.copy_from_slice(&self.0[row * self.1..][columns.clone()]);
            }
        }

        fn stored(&self) -> Option<(Precision, &[u8])> {
            None
        }
    }

    #[test]
    fn a_value_becomes_the_nearest_multiple_of_its_rows_scale() {
        let rows = Rows(vec![127.0, -127.0, 0.5, 1.5, -2.4, 0.0, 0.0, 0.0, 0.0, -0.5, 0.3, 0.1], 4);
        let matrix = Int8Matrix::quantize(3, 4, &rows);
        assert_eq!(matrix.scales(), [1.0, 2.4 / 127.0, 0.5 / 127.0]);
        // Ties go to even.
        assert_eq!(matrix.codes(), [127, -127, 0, 2, -127, 0, 0, 0, 0, -127, 76, 25]);
        let zeros = Int8Matrix::quantize(1, 4, &Rows(vec![0.0; 4], 4));
        assert_eq!((zeros.codes(), zeros.scales()), (&[0_i8; 4][..], &[0.0][..]));
    }

    #[test]
    fn no_value_is_off_by_more_than_half_a_scale() {
        let mut values = vec![0.0; 64 * 96];
        finetune_common::rng::Stream::new(5, finetune_common::rng::Purpose::Noise, 0, 0).fill_normal(&mut values);
        let rows = Rows(values, 96);
        let matrix = Int8Matrix::quantize(64, 96, &rows);
        let mut widened = vec![0.0; 64 * 96];
        matrix.read_block(0..64, 0..96, &mut widened);
        for (i, (value, found)) in rows.0.iter().zip(&widened).enumerate() {
            assert!((value - found).abs() <= 0.5001 * matrix.scales()[i / 96], "{value} {found}");
        }
        let mut part = [0.0; 6];
        matrix.read_block(3..5, 7..10, &mut part);
        assert_eq!(part, [&widened[3 * 96 + 7..3 * 96 + 10], &widened[4 * 96 + 7..4 * 96 + 10]].concat()[..]);
    }

    /// Weights that are not numbers are not numbers in 8 bits either.
    #[test]
    fn what_is_not_finite_shows_in_the_products() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = vec![1.0; 8];
            values[5] = bad;
            let device = Cpu::default();
            let weight = device.frozen_int8(2, 4, std::sync::Arc::new(Rows(values, 4)));
            let mut y = device.alloc(2);
            device.linear(1, &device.upload(&[1.0; 4]), &weight, None, None, &mut y);
            assert!((y[0] - 4.0).abs() < 1e-5 && !y[1].is_finite(), "{bad}: {:?}", &y[..]);
        }
    }

    /// Forward and backward of a layer in 8 bits are those of its widened values, bit for bit.
    #[test]
    fn products_are_those_of_the_widened_values() {
        let (rows, outputs, inputs) = (33, 48, 40);
        let mut values = vec![0.0; outputs * inputs];
        finetune_common::rng::Stream::new(6, finetune_common::rng::Purpose::Noise, 0, 0).fill_normal(&mut values);
        let stored = std::sync::Arc::new(Rows(values, inputs));
        let matrix = Int8Matrix::quantize(outputs, inputs, &*stored);
        let mut widened = vec![0.0; outputs * inputs];
        matrix.read_block(0..outputs, 0..inputs, &mut widened);
        let device = Cpu::default();
        let (int8, float) = (device.frozen_int8(outputs, inputs, stored), device.frozen_stored(outputs, inputs, std::sync::Arc::new(Rows(widened, inputs))));
        let input = |n: usize| device.upload(&(0..rows * n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect::<Vec<_>>());
        let run = |weight| {
            let (mut y, mut dx) = (device.alloc(rows * outputs), device.alloc(rows * inputs));
            device.linear(rows, &input(inputs), weight, None, None, &mut y);
            device.linear_backward(rows, &input(outputs), weight, None, Some((&mut dx, false)));
            (y.to_vec(), dx.to_vec())
        };
        assert!(run(&int8) == run(&float));
    }
}
