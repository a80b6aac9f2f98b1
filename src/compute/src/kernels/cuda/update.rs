//! The kernels of `update.cu`: what happens to parameters between the last backward of an update and the next forward.

use super::driver::arguments;
use super::{BLOCK, Device, Kind, Memory};
use crate::kernels::Buffer;

/// Values per block of the elementwise kernels.
const ELEMENTS: usize = 4 * BLOCK;
/// Values of one partial sum.
const PARTIAL: usize = 8192;

/// Operations on f32 parameters, gradients and moments on a GPU. Parameters lie one after another, as
/// [`crate::kernels::Engine::zeros_together`] lays gradients.
#[derive(Debug, Clone, Copy)]
pub struct UpdateOps<'a>(pub(in crate::kernels) &'a Device);

/// The numbers of one update of AdamW, in f32.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWScalars {
    /// 1 - learning rate · weight decay.
    pub keep: f32,
    /// 1 - β₁.
    pub one_minus_beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// 1 - β₂.
    pub one_minus_beta2: f32,
    /// √(1 - β₂ᵗ).
    pub root_correction2: f32,
    /// ε.
    pub epsilon: f32,
    /// Learning rate / (1 - β₁ᵗ).
    pub step_size: f32,
    /// What gradients are multiplied with first.
    pub clip: f32,
}

/// Up to 256 neighbouring values of one parameter and where their moments are.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first value, among all parameters.
    pub values: i64,
    /// The first of its moments: among the codes (a multiple of 256), or among the f32 moments.
    pub state: i64,
    /// How many.
    pub count: i32,
    /// 1: moments of 32 bits.
    pub full: i32,
}

/// A moment as codes: the codes (four in a word), the largest magnitude of each 256, the value of each code and the code of each point of
/// the grid (four in a word).
#[derive(Debug, Clone, Copy)]
pub struct CodedMoment<'a> {
    /// Codes.
    pub codes: &'a Buffer,
    /// One per 256 codes.
    pub largest: &'a Buffer,
    /// 256 values.
    pub table: &'a Buffer,
    /// 65,536 codes.
    pub nearest: &'a Buffer,
}

/// As `Codes` of `update.cu`.
#[repr(C)]
struct Codes {
    codes: u64,
    largest: u64,
    table: u64,
    nearest: u64,
}

impl UpdateOps<'_> {
    /// f32 values on the device.
    pub fn upload(&self, values: &[f32]) -> Buffer {
        Buffer::on_device(self.0.upload_f32(values))
    }

    /// Bytes on the device, as words of four.
    pub fn upload_bytes(&self, bytes: &[u8]) -> Buffer {
        Buffer::on_device(self.0.upload_bytes(bytes, bytes.len() / 4, Kind::F32))
    }

    /// The ranges on the device.
    pub fn upload_ranges(&self, ranges: &[Range]) -> Buffer {
        // SAFETY: a range has no padding: 8 + 8 + 4 + 4 bytes.
        let bytes = unsafe { std::slice::from_raw_parts(ranges.as_ptr().cast::<u8>(), size_of_val(ranges)) };
        self.upload_bytes(bytes)
    }

    /// Zeros.
    pub fn zeros(&self, len: usize) -> Buffer {
        let mut buffer = self.0.alloc_f32(len);
        self.0.fill_zero(&mut buffer);
        buffer
    }

    /// Sets all values to zero.
    pub fn clear(&self, buffer: &mut Buffer) {
        self.0.fill_zero(buffer);
    }

    /// `sum += factor · x`.
    pub fn add_scaled(&self, sum: &mut Buffer, x: &Buffer, factor: f32) {
        let n = alike(&[sum, x]);
        let (to, from, count) = (sum.device().pointer(), x.device().pointer(), n as i64);
        // SAFETY: both have `count` values.
        unsafe { self.0.driver.launch(("add_scaled", ""), (n.div_ceil(ELEMENTS), 1, 1), BLOCK, 0, arguments![to, from, count, factor]) };
    }

    /// Σ x² in f64, in a fixed order; waits for the device.
    pub fn square_sum(&self, x: &Buffer) -> f64 {
        let n = alike(&[x]);
        let blocks = n.div_ceil(PARTIAL);
        let (partial, sum) = (self.0.memory_of(2 * blocks, Kind::F32), self.0.memory_of(2, Kind::F32));
        let (to, partials, from, count, sums) = (sum.pointer(), partial.pointer(), x.device().pointer(), n as i64, blocks as i32);
        // SAFETY: one f64 per block.
        unsafe { self.0.driver.launch(("square_sums", ""), (blocks, 1, 1), BLOCK, 0, arguments![partials, from, count]) };
        // SAFETY: as above; `to` has one f64.
        unsafe { self.0.driver.launch(("sum_partials", ""), (1, 1, 1), BLOCK, 0, arguments![to, partials, sums]) };
        let halves = self.0.download(&Buffer::on_device(sum));
        let half = |i: usize| u64::from(halves.get(i).map_or(0, |half| half.to_bits()));
        f64::from_bits(half(0) | half(1) << 32)
    }

    /// One update with f32 moments.
    pub fn adamw(&self, values: &mut Buffer, grads: &Buffer, first: &mut Buffer, second: &mut Buffer, numbers: AdamWScalars) {
        let n = alike(&[values, grads, first, second]);
        let (p, g, m, v, count) = (values.device().pointer(), grads.device().pointer(), first.device().pointer(), second.device().pointer(), n as i64);
        // SAFETY: all have `count` values; the numbers have the kernel's layout.
        unsafe { self.0.driver.launch(("adamw", ""), (n.div_ceil(ELEMENTS), 1, 1), BLOCK, 0, arguments![p, g, m, v, count, numbers]) };
    }

    /// One update with moments as codes, or as f32 in the ranges that say so. `ranges`: `count` of them, which cover every value once and lie within
    /// the values and the moments.
    #[expect(clippy::too_many_arguments, reason = "parameters, gradients, both kinds of moments and the numbers")]
    pub fn adamw_8bit(
        &self,
        values: &mut Buffer,
        grads: &Buffer,
        (ranges, count): (&Buffer, usize),
        (full_first, full_second): (&mut Buffer, &mut Buffer),
        first: CodedMoment<'_>,
        second: CodedMoment<'_>,
        numbers: AdamWScalars,
    ) {
        alike(&[values, grads]);
        alike(&[full_first, full_second]);
        assert_eq!(ranges.len() * 4, count * size_of::<Range>(), "should be the ranges");
        let pointer = |memory: &Memory| if memory.len() == 0 { 0 } else { memory.pointer() };
        let codes = |moment: CodedMoment<'_>| {
            let CodedMoment { codes, largest, table, nearest } = moment;
            assert!(codes.len() * 4 == largest.len() * 256 && table.len() == 256 && nearest.len() * 4 == 1 << 16, "should be codes and their tables");
            let at = |buffer: &Buffer| pointer(buffer.device());
            Codes { codes: at(codes), largest: at(largest), table: at(table), nearest: at(nearest) }
        };
        let (first, second) = (codes(first), codes(second));
        let (p, g, r) = (values.device().pointer(), grads.device().pointer(), ranges.device().pointer());
        let (m, v) = (pointer(full_first.device()), pointer(full_second.device()));
        // SAFETY: the caller's ranges lie within; structures have the kernel's layout.
        unsafe { self.0.driver.launch(("adamw_8bit", ""), (count, 1, 1), BLOCK, 0, arguments![p, g, r, m, v, first, second, numbers]) };
    }
}

/// The number of values that all have.
fn alike(buffers: &[&Buffer]) -> usize {
    let len = buffers.first().map_or(0, |buffer| buffer.len());
    assert!(buffers.iter().all(|b| b.len() == len && (len == 0 || b.device().kind() == Kind::F32)), "should be f32, and alike");
    len
}
