//! A tensor where it is stored.

use std::ops::Range;

use half::slice::{HalfBitsSliceExt as _, HalfFloatSliceExt as _};
use safetensors::Dtype;

use finetune_compute::kernels::{Precision, StoredMatrix};

/// A tensor as it lies in the file: little-endian values, row-major, of no particular alignment.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Type of the values.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: &'a [usize],
    /// The values.
    pub bytes: &'a [u8],
    /// What values of 8 bits are multiplied by; 1 for every other type.
    pub scale: f32,
}

impl<'a> View<'a> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of the values, if it is one that can be computed with. Values of 8 bits are f32 once they are scaled.
    pub fn precision(&self) -> Option<Precision> {
        match self.dtype {
            Dtype::F32 | Dtype::F8_E4M3 => Some(Precision::F32),
            Dtype::F16 => Some(Precision::F16),
            Dtype::BF16 => Some(Precision::Bf16),
            _ => None,
        }
    }

    /// The values as they are stored, if they can be computed with as they are.
    pub fn raw(&self) -> Option<(Precision, &'a [u8])> {
        if self.dtype == Dtype::F8_E4M3 { None } else { Some((self.precision()?, self.bytes)) }
    }

    /// The values in a form that [`StoredMatrix::stored`] has: as they are, or scaled to f32 in memory of their own.
    pub fn stored_or_scaled(self) -> Box<dyn StoredMatrix + 'a> {
        match (self.dtype == Dtype::F8_E4M3).then(|| self.to_f32()).flatten() {
            Some(values) => {
                Box::new(Scaled { width: self.shape.last().copied().unwrap_or(0), bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect() })
            }
            None => Box::new(self),
        }
    }

    /// Writes values `start..start + out.len()` to `out` as f32. Exact for f16, bf16, f32 and, without a scale, for the 8 bits of E4M3.
    ///
    /// Returns `false`, and leaves `out` alone, if the type is none of these or the range lies outside the tensor.
    #[must_use]
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> bool {
        let size = match self.dtype {
            Dtype::F8_E4M3 => 1,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::F32 => 4,
            _ => return false,
        };
        let Some(bytes) = start.checked_mul(size).and_then(|first| self.bytes.get(first..first.checked_add(out.len().checked_mul(size)?)?)) else {
            return false;
        };
        match self.dtype {
            Dtype::F8_E4M3 => {
                for (value, byte) in out.iter_mut().zip(bytes) {
                    *value = E4M3[usize::from(*byte)] * self.scale;
                }
            }
            Dtype::F32 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Dtype::BF16 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                }
            }
            _ => {
                // Through a small aligned buffer, which the F16C instructions need.
                let mut bits = [0_u16; 1024];
                for (out, bytes) in out.chunks_mut(bits.len()).zip(bytes.chunks(2 * bits.len())) {
                    let bits = &mut bits[..out.len()];
                    for (bit, b) in bits.iter_mut().zip(bytes.chunks_exact(2)) {
                        *bit = u16::from_le_bytes([b[0], b[1]]);
                    }
                    bits.reinterpret_cast::<half::f16>().convert_to_f32_slice(out);
                }
            }
        }
        true
    }

    /// All values as f32, converted by several threads; `None` if the type is none that [`View::read_f32`] reads.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        use rayon::prelude::*;
        const PIECE: usize = 1 << 18;
        let mut values = vec![0.0_f32; self.len()];
        let good = values.par_chunks_mut(PIECE).enumerate().map(|(i, piece)| self.read_f32(i * PIECE, piece)).reduce(|| true, |a, b| a && b);
        good.then_some(values)
    }
}

/// Of two dimensions, and of a type that can be computed with.
impl StoredMatrix for View<'_> {
    fn read_block(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let width = self.shape.last().copied().unwrap_or(0);
        let mut blocks = out.chunks_exact_mut(columns.len().max(1)).zip(rows);
        assert!(blocks.all(|(out, row)| self.read_f32(row * width + columns.start, out)), "should be a checked weight");
    }

    fn stored(&self) -> Option<(Precision, &[u8])> {
        self.raw()
    }
}

/// A matrix of f32 that was made of one of 8 bits.
struct Scaled {
    width: usize,
    bytes: Vec<u8>,
}

impl StoredMatrix for Scaled {
    fn read_block(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        for (out, row) in out.chunks_exact_mut(columns.len().max(1)).zip(rows) {
            let bytes = &self.bytes[4 * (row * self.width + columns.start)..];
            out.iter_mut().zip(bytes.chunks_exact(4)).for_each(|(value, b)| *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        }
    }

    fn stored(&self) -> Option<(Precision, &[u8])> {
        Some((Precision::F32, &self.bytes))
    }
}

/// The values of E4M3 (the finite form, "e4m3fn"): a sign, 4 bits of exponent with bias 7, 3 bits of fraction; no infinities, all ones is not a number.
/// Micikevicius et al., "FP8 formats for deep learning", 2022, table 1.
static E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, fraction) = ((code >> 3) & 15, (code & 7) as f32);
        let magnitude = match (exponent, code & 7) {
            (15, 7) => f32::NAN,
            // Smallest exponent 2^-6, fractions of eighths.
            (0, _) => fraction / 512.0,
            _ => (8.0 + fraction) / 1024.0 * (1_u32 << exponent) as f32,
        };
        values[code] = if code >= 128 { -magnitude } else { magnitude };
        code += 1;
    }
    values
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of the format's own table: largest, smallest normal and subnormal, one.
    #[test]
    fn eight_bits_are_read_as_the_format_says() {
        for (code, value) in [(0x7e, 448.0), (0x08, 0.015_625), (0x01, 0.001_953_125), (0x07, 0.013_671_875), (0x38, 1.0), (0xb9, -1.125), (0x80, -0.0)] {
            assert_eq!(E4M3[code].to_bits(), f32::to_bits(value), "{code:#x}");
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan() && E4M3.iter().filter(|value| value.is_nan()).count() == 2);
    }

    #[test]
    fn scaled_values_are_the_same_in_both_forms() {
        let bytes: Vec<u8> = (0..12).map(|i| 0x30 + 5 * i).collect();
        let view = View { dtype: Dtype::F8_E4M3, shape: &[3, 4], bytes: &bytes, scale: 0.375 };
        let mut block = [0.0; 4];
        view.read_block(1..3, 1..3, &mut block);
        let scaled = view.stored_or_scaled();
        let mut other = [0.0; 4];
        scaled.read_block(1..3, 1..3, &mut other);
        assert_eq!(block, other);
        assert_eq!(block[0].to_bits(), (E4M3[usize::from(bytes[5])] * 0.375).to_bits());
        assert!(view.stored().is_none() && scaled.stored().is_some_and(|(kind, bytes)| kind == Precision::F32 && bytes.len() == 48));
    }
}
