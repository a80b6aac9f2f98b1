//! Frozen weights in 8 bits: see [`crate::kernels::Int8Matrix`].

use super::driver::arguments;
use super::linear::{DeviceWeight, Frozen};
use super::{BLOCK, Cuda, Kind, Memory, any, widest};

/// Rows of codes are multiples of so many bytes.
const PITCH: usize = 16;

/// A matrix of codes with a scale per row.
#[derive(Debug)]
pub(super) struct Codes {
    /// Rows of `pitch` codes, as words of four.
    codes: Memory,
    /// `[rows]`.
    scales: Memory,
    pitch: usize,
}

impl Codes {
    /// Memory for rows of `inputs` codes.
    fn new(device: &Cuda, rows: usize, inputs: usize) -> Self {
        let pitch = inputs.next_multiple_of(PITCH);
        Self { codes: device.memory_of(rows * pitch / 4, Kind::F32), scales: device.memory_of(rows, Kind::F32), pitch }
    }

    /// Some of the rows, in the same memory.
    fn rows(&self, first: usize, rows: usize) -> Self {
        let words = self.pitch / 4;
        Self { codes: self.codes.part(first * words, rows * words), scales: self.scales.part(first, rows), pitch: self.pitch }
    }
}

impl Cuda {
    /// Quantises the rows of a matrix on the device.
    pub(super) fn quantize(&self, outputs: usize, inputs: usize, values: &Memory) -> Codes {
        assert_eq!(values.len(), outputs * inputs, "should be [outputs, inputs]");
        let to = Codes::new(self, outputs, inputs);
        let (codes, scales, from, width, pitch) = (to.codes.pointer(), to.scales.pointer(), values.pointer(), inputs as i32, to.pitch as i32);
        // SAFETY: the values are [outputs, inputs], the codes rows of `pitch`; a block per row.
        unsafe { self.driver.launch(("quantize_rows", any(values.kind())), (outputs, 1, 1), BLOCK, 0, arguments![codes, scales, from, width, pitch]) };
        to
    }

    /// The values [outputs, inputs] in the device's precision.
    pub(super) fn widened(&self, outputs: usize, inputs: usize, from: &Codes) -> Memory {
        let values = self.memory_of(outputs * inputs, self.precision);
        // Eight values each: all or none of them are there.
        let suffix = if inputs.is_multiple_of(8) { widest(self.precision, &[inputs]).0 } else { any(self.precision) };
        let (to, codes, scales) = (values.pointer(), from.codes.pointer(), from.scales.pointer());
        let (rows, width, pitch) = (outputs as i32, inputs as i32, from.pitch as i32);
        let grid = ((outputs * from.pitch).div_ceil(8 * BLOCK), 1, 1);
        // SAFETY: as above; the result is new.
        unsafe { self.driver.launch(("widen_rows", suffix), grid, BLOCK, 0, arguments![to, codes, scales, rows, width, pitch]) };
        values
    }

    /// The rows of several matrices below each other; `parts` become parts of it.
    pub(super) fn joined(&self, parts: &mut [&mut Codes], outputs: &[usize], inputs: usize) -> Codes {
        let whole = Codes::new(self, outputs.iter().sum(), inputs);
        let mut first = 0;
        for (part, &rows) in parts.iter_mut().zip(outputs) {
            let to = whole.rows(first, rows);
            self.copy_into(&to.codes, &part.codes);
            self.copy_into(&to.scales, &part.scales);
            **part = to;
            first += rows;
        }
        whole
    }

    /// The codes [outputs, inputs] and scales of a weight in 8 bits, on the host.
    pub(in crate::kernels) fn codes_of(&self, weight: &DeviceWeight) -> Option<(Vec<i8>, Vec<f32>)> {
        let Frozen::Int8(Codes { codes, scales, pitch }) = &weight.values else { return None };
        let bytes = self.download_words(codes);
        let rows = bytes.chunks_exact(*pitch).flat_map(|row| &row[..weight.inputs]);
        Some((rows.map(|code| i8::from_ne_bytes([*code])).collect(), self.download(scales)))
    }
}
