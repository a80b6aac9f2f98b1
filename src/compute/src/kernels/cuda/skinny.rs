//! LoRA's own kernels (`lora.cu`): gradients, which are products of a matrix with a few columns, and the factors' values.

use super::driver::arguments;
use super::fused_linear::{DeviceFusedLinear, DeviceFusedLora};
use super::linear::DeviceLora;
use super::{BLOCK, Cuda, Kind, Memory, any, widest};

/// Ranks up to which the gradients are computed by `thin_sums`; above, products are faster.
pub(super) const MAX_RANK: usize = 32;

const PARTS: usize = 32;
const RANKS: usize = 8;
const THREADS: usize = 64;
const ROWS: usize = 128;

/// `ThinPart` of `lora.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Part {
    x: u64,
    t: u64,
    to: u64,
    n: i32,
    x_stride: i32,
    t_stride: i32,
    ranks: i32,
    rank_stride: i32,
    column_stride: i32,
    scale: f32,
    first: i32,
}

/// `to += scale · tᵀ x` for a t of few columns: x [rows, n], t [rows, ranks] (columns of wider matrices or whole ones), `to` with
/// its own distances between ranks and columns.
pub(super) struct SkinnyGemm<'a> {
    pub(super) x: &'a Memory,
    pub(super) n: usize,
    pub(super) t: &'a Memory,
    /// Columns of t in memory, of which the first `ranks` count.
    pub(super) padded: usize,
    pub(super) ranks: usize,
    pub(super) to: &'a Memory,
    pub(super) strides: (usize, usize),
    pub(super) scale: f32,
}

/// `Spread` of `lora.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Spread {
    to: u64,
    from: i64,
    rows: i32,
    columns: i32,
    stride: i32,
    factor: f32,
}

/// Where every parameter of a LoRA is read by products.
#[derive(Debug)]
pub struct DeviceScatter {
    table: Memory,
    matrices: usize,
    largest: usize,
    parameters: usize,
}

/// Where the parameters of a layer lie among all: A's first value, B's first value; and B's factor.
pub(in crate::kernels) type Source = (usize, usize, f32);

impl Cuda {
    /// Adds skinny products.
    pub(super) fn skinny_gemms(&self, rows: usize, products: &[SkinnyGemm<'_>]) {
        let mut parts = Vec::new();
        let mut lengths = Vec::new();
        for p in products {
            assert!(p.x.len() == rows * p.n && p.t.len() == rows * p.padded && p.ranks <= p.padded, "should be [rows, n] and [rows, ranks]");
            assert!(p.to.kind() == Kind::F32 && p.to.len() == p.ranks * p.n, "should be f32 [ranks, n]");
            let ((x, x_stride), (t, t_stride)) = (p.x.rows(p.n), p.t.rows(p.padded));
            lengths.extend([p.n, x_stride, if x.is_multiple_of(16) { 16 } else { 1 }]);
            for first in (0..p.ranks).step_by(RANKS) {
                parts.push(Part {
                    x,
                    t: t + (first * p.t.kind().bytes()) as u64,
                    to: p.to.at(first * p.strides.0),
                    n: p.n as i32,
                    x_stride: x_stride as i32,
                    t_stride: t_stride as i32,
                    ranks: RANKS.min(p.ranks - first) as i32,
                    rank_stride: p.strides.0 as i32,
                    column_stride: p.strides.1 as i32,
                    scale: p.scale,
                    first: 0,
                });
            }
        }
        let (suffix, values) = widest(self.precision, &lengths);
        let splits = rows.div_ceil(ROWS);
        for parts in parts.chunks(PARTS) {
            let mut table = [Part::default(); PARTS];
            let mut columns = 0;
            for (to, part) in table.iter_mut().zip(parts) {
                *to = Part { first: columns as i32, ..*part };
                columns += part.n as usize;
            }
            let widest = parts.iter().map(|p| p.n as usize).max().unwrap_or(0);
            let partial = self.memory_of(columns * splits * RANKS, Kind::F32);
            let (sums, rows, count) = (partial.pointer(), rows as i32, splits as i32);
            let grid = (widest.div_ceil(THREADS * values), splits, parts.len());
            // SAFETY: `table` has the kernel's layout; lengths were checked; there is room for the sums of every part and split.
            unsafe { self.driver.launch(("thin_sums", suffix), grid, BLOCK, 0, arguments![table, sums, rows, count]) };
            let grid = ((RANKS * widest).div_ceil(BLOCK), parts.len(), 1);
            // SAFETY: as above; every gradient has its own place.
            unsafe { self.driver.launch(("thin_add", ""), grid, BLOCK, 0, arguments![table, sums, count]) };
        }
    }

    /// Where the parameters of layers and of fused layers go.
    pub(in crate::kernels) fn lora_scatter(
        &self,
        layers: &[(&DeviceLora, Source)],
        fused_layers: &[(&DeviceFusedLinear, &DeviceFusedLora, Vec<Source>)],
        parameters: usize,
    ) -> DeviceScatter {
        let mut scatters = Vec::new();
        let matrix = |to: u64, from: usize, rows: usize, columns: usize, stride: usize, factor: f32| Spread {
            to,
            from: from as i64,
            rows: rows as i32,
            columns: columns as i32,
            stride: stride as i32,
            factor,
        };
        for (lora, (a, b, scale)) in layers {
            scatters.push(matrix(lora.a.pointer(), *a, lora.rank, lora.inputs, lora.inputs, 1.0));
            scatters.push(matrix(lora.b.pointer(), *b, lora.outputs, lora.rank, lora.padded, *scale));
        }
        for (fused, lora, sources) in fused_layers {
            for (&(place, first_output, first_rank, rank), (a, b, scale)) in lora.layers.iter().zip(sources) {
                let (inputs, ranks) = (fused.inputs, lora.ranks);
                scatters.push(matrix(lora.a.at(first_rank * inputs), *a, rank, inputs, inputs, 1.0));
                scatters.push(matrix(lora.b.at(first_output * ranks + first_rank), *b, fused.outputs[place], rank, ranks, *scale));
            }
        }
        let largest = scatters.iter().map(|s| (s.rows * s.columns) as usize).max().unwrap_or(0);
        // SAFETY: Spread has no padding: 8 + 8 + 4 times 4 bytes.
        let bytes = unsafe { std::slice::from_raw_parts(scatters.as_ptr().cast::<u8>(), size_of_val(scatters.as_slice())) };
        DeviceScatter { table: self.upload_bytes(bytes, bytes.len() / 4, Kind::F32), matrices: scatters.len(), largest, parameters }
    }

    /// Sets all parameters of a LoRA.
    pub(in crate::kernels) fn scatter_lora(&self, scatter: &DeviceScatter, values: &Memory) {
        assert!(values.kind() == Kind::F32 && values.len() == scatter.parameters, "should be all parameters in f32");
        let (table, from) = (scatter.table.pointer(), values.pointer());
        if scatter.matrices == 0 {
            return;
        }
        let grid = (scatter.largest.div_ceil(4 * BLOCK), scatter.matrices, 1);
        // SAFETY: the table names places in buffers that the layers keep, and parts of the parameters.
        unsafe { self.driver.launch(("lora_spread", any(self.precision)), grid, BLOCK, 0, arguments![table, from]) };
    }
}
