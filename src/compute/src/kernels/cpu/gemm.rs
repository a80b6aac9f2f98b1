//! Single-precision matrix products over packed panels.
//!
//! Every element of C is summed over k in one fixed order (blocks of [`DEPTH`], one accumulator), whatever the tile,
//! task or batch it belongs to: results depend neither on threads nor on the other rows.

use std::cell::RefCell;

use super::microkernel::{Init, PANEL, Tile, max_columns, max_rows, run};
use super::simd::{Level, level};

/// Steps of k per pass over C: a panel of so many rows stays in the first-level cache.
const DEPTH: usize = 256;

/// B [k, n] as panels of 32 columns, each [k, 32], padded with zeros.
#[derive(Debug, Clone, Default)]
pub struct Packed {
    k: usize,
    n: usize,
    data: Vec<f32>,
}

impl Packed {
    /// Packs B [k, n], `B[p][j] = scale · b[p · row_stride + j · column_stride]`.
    pub(crate) fn new(k: usize, n: usize, b: &[f32], row_stride: usize, column_stride: usize, scale: f32) -> Self {
        let mut packed = Self { k, n, data: Vec::new() };
        packed.fill(b, row_stride, column_stride, scale);
        packed
    }

    /// B = Wᵀ for W [n, k] row-major: `X B` is a linear layer's output.
    pub(crate) fn transposed(n: usize, k: usize, w: &[f32]) -> Self {
        Self::new(k, n, w, 1, k, 1.0)
    }

    /// Packs another matrix into the same memory.
    pub(super) fn repack(&mut self, k: usize, n: usize, b: &[f32], row_stride: usize, column_stride: usize) {
        (self.k, self.n) = (k, n);
        self.fill(b, row_stride, column_stride, 1.0);
    }

    fn fill(&mut self, b: &[f32], row_stride: usize, column_stride: usize, scale: f32) {
        let (k, n) = (self.k, self.n);
        self.data.resize(n.div_ceil(PANEL) * PANEL * k, 0.0);
        for (panel, out) in self.data.chunks_exact_mut((PANEL * k).max(1)).enumerate() {
            let columns = PANEL.min(n - panel * PANEL);
            let first = panel * PANEL * column_stride;
            if column_stride == 1 {
                for (p, out) in out.chunks_exact_mut(PANEL).enumerate() {
                    let row = &b[first + p * row_stride..][..columns];
                    out[..columns].iter_mut().zip(row).for_each(|(o, x)| *o = x * scale);
                    out[columns..].fill(0.0);
                }
            } else {
                // Transposes 16 rows of B at a time, so that lines of both sides are used whole.
                let mut p = 0;
                while p < k {
                    let depth = 16.min(k - p);
                    for j in 0..columns {
                        let column = &b[first + j * column_stride + p * row_stride..];
                        for q in 0..depth {
                            out[(p + q) * PANEL + j] = column[q * row_stride] * scale;
                        }
                    }
                    for q in 0..depth {
                        out[(p + q) * PANEL + columns..(p + q + 1) * PANEL].fill(0.0);
                    }
                    p += depth;
                }
            }
        }
    }

    /// Length of the sums.
    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// Columns.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }
}

/// A matrix read by strides: `A[i][p] = data[i · row_stride + p · column_stride]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strided<'a> {
    /// From A[0][0] on.
    pub(crate) data: &'a [f32],
    /// From one row to the next.
    pub(crate) row_stride: usize,
    /// From one column to the next.
    pub(crate) column_stride: usize,
}

impl<'a> Strided<'a> {
    /// Row-major, `width` values from row to row.
    pub(crate) fn rows(data: &'a [f32], width: usize) -> Self {
        Self { data, row_stride: width, column_stride: 1 }
    }

    /// The transpose of a row-major matrix with `width` values from row to row.
    pub(crate) fn transposed(data: &'a [f32], width: usize) -> Self {
        Self { data, row_stride: 1, column_stride: width }
    }
}

/// Where C's sums begin.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Start<'a> {
    /// At zero.
    Zero,
    /// At C.
    Accumulate,
    /// At a row vector (a bias), one value for each of B's columns.
    Row(&'a [f32]),
}

/// C rows 0..m, panels `panels` of B: `C = start + A B`. C points to its row 0, column 0; `c_stride` from row to row.
///
/// # Safety
/// C must be valid for writing rows 0..m and the columns of these panels, which no other task touches meanwhile.
pub(crate) unsafe fn product(m: usize, a: Strided<'_>, b: &Packed, panels: std::ops::Range<usize>, start: Start<'_>, c: *mut f32, c_stride: usize) {
    // SAFETY: as the caller vouches.
    unsafe { product_panels(m, a, &b.data[panels.start * PANEL * b.k..], b.k, b.n, panels, start, c, c_stride) };
}

/// As [`product`], with the panels' data given apart (`data` begins with the first panel of `panels`).
///
/// # Safety
/// As [`product`].
pub(crate) unsafe fn product_panels(
    m: usize,
    a: Strided<'_>,
    data: &[f32],
    k: usize,
    n: usize,
    panels: std::ops::Range<usize>,
    start: Start<'_>,
    c: *mut f32,
    c_stride: usize,
) {
    if m == 0 || panels.is_empty() {
        return;
    }
    assert!(data.len() >= panels.len() * PANEL * k && panels.end <= n.div_ceil(PANEL), "should have these panels");
    assert!(k == 0 || a.data.len() > (m - 1) * a.row_stride + (k - 1) * a.column_stride, "should have m rows of k");
    if let Start::Row(row) = start {
        assert!(row.len() == n, "should have one value per column");
    }
    let level = level();
    let (tile_rows, tile_columns) = (max_rows(level), max_columns(level));
    let mut depth = 0;
    loop {
        let steps = DEPTH.min(k - depth);
        for (index, panel) in panels.clone().enumerate() {
            for offset in (0..PANEL).step_by(tile_columns) {
                let column = panel * PANEL + offset;
                if column >= n {
                    break;
                }
                let columns = tile_columns.min(n - column);
                let narrow = level == Level::Avx512 && columns <= tile_columns / 2;
                let width = if narrow { tile_columns / 2 } else { tile_columns };
                let mut row = 0;
                while row < m {
                    let rows = tile_rows.min(m - row);
                    let init = match start {
                        _ if depth > 0 => Init::Accumulate,
                        Start::Zero => Init::Zero,
                        Start::Accumulate => Init::Accumulate,
                        Start::Row(values) => Init::Row(values[column..].as_ptr()),
                    };
                    let tile = Tile {
                        k: steps,
                        a: a.data.as_ptr().wrapping_add(row * a.row_stride + depth * a.column_stride),
                        row_stride: a.row_stride as isize,
                        column_stride: a.column_stride as isize,
                        b: data[(index * k + depth) * PANEL..].as_ptr().wrapping_add(offset),
                        c: c.wrapping_add(row * c_stride + column),
                        c_stride,
                        init,
                    };
                    // SAFETY: A and B hold the tile (asserted), C does as the caller vouches; a tile wider than what is left
                    // of C goes through memory of its own.
                    unsafe {
                        if columns == width {
                            run(level, &tile, rows, narrow);
                        } else {
                            edge(level, tile, rows, columns, narrow);
                        }
                    }
                    row += rows;
                }
            }
        }
        depth += steps;
        if depth >= k {
            break;
        }
    }
}

/// A tile at the right edge of C, only `columns` wide.
///
/// # Safety
/// As [`product`], for this tile.
#[cold]
#[inline(never)]
unsafe fn edge(level: Level, mut tile: Tile, rows: usize, columns: usize, narrow: bool) {
    let mut memory = [0.0_f32; 12 * PANEL];
    let mut init = [0.0_f32; PANEL];
    let (c, c_stride) = (tile.c, tile.c_stride);
    // SAFETY: `memory` holds 12 rows of PANEL; C has `rows` rows of `columns` values from `c` on; a row vector has `columns`.
    unsafe {
        match tile.init {
            Init::Accumulate => (0..rows).for_each(|i| std::ptr::copy_nonoverlapping(c.add(i * c_stride), memory[i * PANEL..].as_mut_ptr(), columns)),
            Init::Row(row) => {
                std::ptr::copy_nonoverlapping(row, init.as_mut_ptr(), columns);
                tile.init = Init::Row(init.as_ptr());
            }
            Init::Zero => {}
        }
        (tile.c, tile.c_stride) = (memory.as_mut_ptr(), PANEL);
        run(level, &tile, rows, narrow);
        (0..rows).for_each(|i| std::ptr::copy_nonoverlapping(memory[i * PANEL..].as_ptr(), c.add(i * c_stride), columns));
    }
}

/// Rows per task for a product with `m` rows: by `m` alone, never by the number of threads.
pub(crate) fn rows_per_task(m: usize) -> usize {
    m.div_ceil(16).next_multiple_of(12).max(24)
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `len` values of scratch memory (any content) of this thread.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut memory = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    let result = f(&mut memory[..len]);
    SCRATCH.with_borrow_mut(|free| free.push(memory));
    result
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

    /// Against f64 sums, at sizes around every tile edge, with all starts and both layouts of A and B.
    #[test]
    fn products_equal_sums_in_f64() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (12, 32, 16), (13, 33, 17), (25, 16, 300), (7, 48, 256), (40, 70, 513), (24, 31, 64), (5, 17, 0)] {
            let (a, b, bias) = (random(m * k, 1), random(k * n, 2), random(n, 3));
            let before = random(m * n, 4);
            for (transpose_a, transpose_b, case) in [(false, false, 0), (true, false, 1), (false, true, 2), (true, true, 1)] {
                let view = if transpose_a { Strided::transposed(&a, m) } else { Strided::rows(&a, k) };
                let packed = if transpose_b { Packed::transposed(n, k, &b) } else { Packed::new(k, n, &b, n, 1, 1.0) };
                let start = [Start::Zero, Start::Accumulate, Start::Row(&bias)][case];
                let mut c = before.clone();
                // SAFETY: `c` has m rows of n values.
                unsafe { product(m, view, &packed, 0..packed.panels(), start, c.as_mut_ptr(), n) };
                for i in 0..m {
                    for j in 0..n {
                        let init = [0.0, before[i * n + j], bias[j]][case];
                        let terms = (0..k).map(|p| {
                            let a = if transpose_a { a[p * m + i] } else { a[i * k + p] };
                            let b = if transpose_b { b[j * k + p] } else { b[p * n + j] };
                            (f64::from(a) * f64::from(b), f64::from(a * b).abs())
                        });
                        let (sum, size) = terms.fold((f64::from(init), 1.0), |(s, t), (x, y)| (s + x, t + y));
                        assert!((f64::from(c[i * n + j]) - sum).abs() < 1e-6 * size, "{m} {n} {k} {i} {j}: {} {sum}", c[i * n + j]);
                    }
                }
            }
        }
    }

    /// A row's result does not depend on which rows are beside it.
    #[test]
    fn rows_do_not_depend_on_their_neighbours() {
        let (m, n, k) = (29, 45, 300);
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let packed = Packed::new(k, n, &b, n, 1, 1.0);
        let mut whole = vec![0.0; m * n];
        // SAFETY: `whole` has m rows of n values.
        unsafe { product(m, Strided::rows(&a, k), &packed, 0..packed.panels(), Start::Zero, whole.as_mut_ptr(), n) };
        for i in 0..m {
            let mut row = vec![0.0; n];
            // SAFETY: `row` has one row of n values.
            unsafe { product(1, Strided::rows(&a[i * k..], k), &packed, 0..packed.panels(), Start::Zero, row.as_mut_ptr(), n) };
            assert_eq!(row, whole[i * n..][..n]);
        }
    }
}
