//! The kernels of `update.cu`: what happens to parameters between the last backward of an update and the next forward.

use super::driver::arguments;
use super::{BLOCK, Cuda, Kind, Memory};
use crate::kernels::{AdamWScalars, CodedMoment, Range};

/// Values per block of the elementwise kernels.
const ELEMENTS: usize = 4 * BLOCK;
/// Values of one partial sum.
const PARTIAL: usize = 8192;

/// Ranges of parameters on a GPU, and how many.
#[derive(Debug)]
pub struct DeviceRanges {
    table: Memory,
    count: usize,
}

/// As `Codes` of `update.cu`.
#[repr(C)]
struct Codes {
    codes: u64,
    largest: u64,
    table: u64,
    nearest: u64,
}

impl Cuda {
    /// Bytes, as words of four.
    pub(in crate::kernels) fn upload_words(&self, bytes: &[u8]) -> Memory {
        self.upload_bytes(bytes, bytes.len() / 4, Kind::F32)
    }

    /// The bytes of [`Cuda::upload_words`].
    pub(in crate::kernels) fn download_words(&self, words: &Memory) -> Vec<u8> {
        self.download(words).iter().flat_map(|word| word.to_bits().to_le_bytes()).collect()
    }

    pub(in crate::kernels) fn upload_ranges(&self, ranges: &[Range]) -> DeviceRanges {
        // SAFETY: a range has no padding: 8 + 8 + 4 + 4 bytes.
        let bytes = unsafe { std::slice::from_raw_parts(ranges.as_ptr().cast::<u8>(), size_of_val(ranges)) };
        DeviceRanges { table: self.upload_words(bytes), count: ranges.len() }
    }

    /// `sum += factor · x`.
    pub(in crate::kernels) fn add_scaled(&self, sum: &mut Memory, x: &Memory, factor: f32) {
        let n = alike(&[sum, x]);
        let (to, from, count) = (sum.pointer(), x.pointer(), n as i64);
        // SAFETY: both have `count` values.
        unsafe { self.driver.launch(("add_scaled", ""), (n.div_ceil(ELEMENTS), 1, 1), BLOCK, 0, arguments![to, from, count, factor]) };
    }

    /// Σ x² in f64, in a fixed order; waits for the device.
    pub(in crate::kernels) fn square_sum(&self, x: &Memory) -> f64 {
        let n = alike(&[x]);
        let blocks = n.div_ceil(PARTIAL);
        let (partial, sum) = (self.memory_of(2 * blocks, Kind::F32), self.memory_of(2, Kind::F32));
        let (to, partials, from, count, sums) = (sum.pointer(), partial.pointer(), x.pointer(), n as i64, blocks as i32);
        // SAFETY: one f64 per block.
        unsafe { self.driver.launch(("square_sums", ""), (blocks, 1, 1), BLOCK, 0, arguments![partials, from, count]) };
        // SAFETY: as above; `to` has one f64.
        unsafe { self.driver.launch(("sum_partials", ""), (1, 1, 1), BLOCK, 0, arguments![to, partials, sums]) };
        let halves = self.download(&sum);
        let half = |i: usize| u64::from(halves.get(i).map_or(0, |half| half.to_bits()));
        f64::from_bits(half(0) | half(1) << 32)
    }

    /// One update with f32 moments.
    pub(in crate::kernels) fn adamw(&self, values: &mut Memory, grads: &Memory, first: &mut Memory, second: &mut Memory, numbers: AdamWScalars) {
        let n = alike(&[values, grads, first, second]);
        let (p, g, m, v, count) = (values.pointer(), grads.pointer(), first.pointer(), second.pointer(), n as i64);
        // SAFETY: all have `count` values; the numbers have the kernel's layout.
        unsafe { self.driver.launch(("adamw", ""), (n.div_ceil(ELEMENTS), 1, 1), BLOCK, 0, arguments![p, g, m, v, count, numbers]) };
    }

    /// One update with moments as codes, or as f32 in the ranges that say so. `ranges`: `count` of them, which cover every value once and lie within
    /// the values and the moments.
    #[expect(clippy::too_many_arguments, reason = "parameters, gradients, both kinds of moments and the numbers")]
    pub(in crate::kernels) fn adamw_8bit(
        &self,
        values: &mut Memory,
        grads: &Memory,
        DeviceRanges { table: ranges, count }: &DeviceRanges,
        (full_first, full_second): (&mut Memory, &mut Memory),
        first: &CodedMoment<'_, Memory, Memory>,
        second: &CodedMoment<'_, Memory, Memory>,
        numbers: AdamWScalars,
    ) {
        alike(&[values, grads]);
        alike(&[full_first, full_second]);
        assert_eq!(ranges.len() * 4, *count * size_of::<Range>(), "should be the ranges");
        let pointer = |memory: &Memory| if memory.len() == 0 { 0 } else { memory.pointer() };
        let codes = |moment: &CodedMoment<'_, Memory, Memory>| {
            let CodedMoment { codes, largest, table, nearest } = moment;
            assert!(codes.len() * 4 == largest.len() * 256 && table.len() == 256 && nearest.len() * 4 == 1 << 16, "should be codes and their tables");
            Codes { codes: pointer(codes), largest: pointer(largest), table: pointer(table), nearest: pointer(nearest) }
        };
        let (first, second) = (codes(first), codes(second));
        let (p, g, r) = (values.pointer(), grads.pointer(), ranges.pointer());
        let (m, v) = (pointer(full_first), pointer(full_second));
        // SAFETY: the caller's ranges lie within; structures have the kernel's layout.
        unsafe { self.driver.launch(("adamw_8bit", ""), (*count, 1, 1), BLOCK, 0, arguments![p, g, r, m, v, first, second, numbers]) };
    }
}

/// The number of values that all have.
fn alike(buffers: &[&Memory]) -> usize {
    let len = buffers.first().map_or(0, |buffer| buffer.len());
    assert!(buffers.iter().all(|b| b.len() == len && (len == 0 || b.kind() == Kind::F32)), "should be f32, and alike");
    len
}
