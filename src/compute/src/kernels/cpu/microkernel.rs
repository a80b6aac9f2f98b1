//! The inner loop of the matrix product: a tile of C held in registers.
//!
//! `C[i][j] = init + Σ_p A[i][p] · B[p][j]` for up to `ROWS` rows and `COLUMNS` columns. A is read by strides (no
//! packing, transposed or not), B is a packed panel of [`PANEL`] columns.

use super::simd::Level;

/// Columns of a packed panel of B.
pub(crate) const PANEL: usize = 32;

/// Where a tile's sums begin.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Init {
    /// At zero.
    Zero,
    /// At what C holds.
    Accumulate,
    /// At these values, the same for every row.
    Row(*const f32),
}

/// One tile: see the module's documentation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    /// Length of the sums.
    pub(crate) k: usize,
    /// A[0][0].
    pub(crate) a: *const f32,
    /// From one row of A to the next.
    pub(crate) row_stride: isize,
    /// From one column of A to the next.
    pub(crate) column_stride: isize,
    /// B[0][0] in a panel.
    pub(crate) b: *const f32,
    /// C[0][0].
    pub(crate) c: *mut f32,
    /// From one row of C to the next.
    pub(crate) c_stride: usize,
    /// Where the sums begin.
    pub(crate) init: Init,
}

/// Rows of a tile.
pub(crate) fn max_rows(level: Level) -> usize {
    match level {
        Level::Avx512 => 12,
        Level::Avx2 => 6,
        Level::Plain => 4,
    }
}

/// Columns of a tile.
pub(crate) fn max_columns(level: Level) -> usize {
    match level {
        Level::Avx512 => PANEL,
        Level::Avx2 => 16,
        Level::Plain => 8,
    }
}

/// Repeats a block for the rows of a tile, with the row as a constant: sums then stay in registers at any optimisation level.
#[cfg(target_arch = "x86_64")]
macro_rules! each_row {
    ($rows:ident, $row:ident, $body:block) => {
        each_row!(@ $rows, $row, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $rows:ident, $row:ident, $body:block, $($n:literal)*) => {
        {$(
            if $n < $rows {
                const $row: usize = $n;
                $body
            }
        )*}
    };
}

#[cfg(target_arch = "x86_64")]
macro_rules! x86_kernel {
    ($name:ident, $features:literal, $vector:ty, $width:literal, $zero:ident, $load:ident, $store:ident, $splat:ident, $fma:ident) => {
        /// `ROWS` rows of `VECTORS` (1 or 2) vectors.
        ///
        /// # Safety
        /// The processor must have the instructions; A, B and C must hold the tile (C and an `Init::Row` all of its columns).
        #[target_feature(enable = $features)]
        unsafe fn $name<const ROWS: usize, const VECTORS: usize>(t: &Tile) {
            use std::arch::x86_64::{$fma, $load, $splat, $store, $zero};
            let two = VECTORS == 2;
            // SAFETY: the caller vouches for A, B and C; indices stay within `k`, ROWS and VECTORS.
            unsafe {
                let mut left: [$vector; 12] = [$zero(); 12];
                let mut right: [$vector; 12] = [$zero(); 12];
                match t.init {
                    Init::Zero => {}
                    Init::Accumulate => each_row!(ROWS, I, {
                        let c = t.c.wrapping_add(I * t.c_stride);
                        left[I] = $load(c);
                        if two {
                            right[I] = $load(c.wrapping_add($width));
                        }
                    }),
                    Init::Row(init) => each_row!(ROWS, I, {
                        left[I] = $load(init);
                        if two {
                            right[I] = $load(init.wrapping_add($width));
                        }
                    }),
                }
                // Rows by threes from four pointers: each address is a pointer plus 0, 1 or 2 strides.
                let stride = t.row_stride;
                let mut a = [t.a, t.a.wrapping_offset(3 * stride), t.a.wrapping_offset(6 * stride), t.a.wrapping_offset(9 * stride)];
                let mut b = t.b;
                for _ in 0..t.k {
                    let first = $load(b);
                    let second = if two { $load(b.wrapping_add($width)) } else { $zero() };
                    each_row!(ROWS, I, {
                        let value = $splat(*a[I / 3].wrapping_offset((I % 3) as isize * stride));
                        left[I] = $fma(value, first, left[I]);
                        if two {
                            right[I] = $fma(value, second, right[I]);
                        }
                    });
                    a[0] = a[0].wrapping_offset(t.column_stride);
                    a[1] = a[1].wrapping_offset(t.column_stride);
                    a[2] = a[2].wrapping_offset(t.column_stride);
                    a[3] = a[3].wrapping_offset(t.column_stride);
                    b = b.wrapping_add(PANEL);
                }
                each_row!(ROWS, I, {
                    let c = t.c.wrapping_add(I * t.c_stride);
                    $store(c, left[I]);
                    if two {
                        $store(c.wrapping_add($width), right[I]);
                    }
                });
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
x86_kernel!(avx512, "avx512f", std::arch::x86_64::__m512, 16, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps);
#[cfg(target_arch = "x86_64")]
x86_kernel!(avx2, "avx2,fma", std::arch::x86_64::__m256, 8, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps);

/// `rows` x 8 tile without vector instructions beyond the target's.
///
/// # Safety
/// A, B and C must hold the tile.
unsafe fn plain(t: &Tile, rows: usize) {
    // SAFETY: the caller vouches for A, B and C.
    unsafe {
        for i in 0..rows {
            let mut sums = [0.0_f32; 8];
            let c = t.c.add(i * t.c_stride);
            match t.init {
                Init::Zero => {}
                Init::Accumulate => std::ptr::copy_nonoverlapping(c, sums.as_mut_ptr(), 8),
                Init::Row(init) => std::ptr::copy_nonoverlapping(init, sums.as_mut_ptr(), 8),
            }
            let (mut a, mut b) = (t.a.offset(i as isize * t.row_stride), t.b);
            for _ in 0..t.k {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum += *a * *b.add(j);
                }
                a = a.wrapping_offset(t.column_stride);
                b = b.wrapping_add(PANEL);
            }
            std::ptr::copy_nonoverlapping(sums.as_ptr(), c, 8);
        }
    }
}

/// Runs a tile of `rows` rows; `narrow`: only its first half of columns (AVX-512) is wanted.
///
/// # Safety
/// `level` must be the processor's; A, B and C must hold the tile, C [`max_columns`] wide (half of it if narrow).
pub(crate) unsafe fn run(level: Level, tile: &Tile, rows: usize, narrow: bool) {
    #[cfg(target_arch = "x86_64")]
    macro_rules! by_rows {
        ($kernel:ident, $vectors:literal, $($rows:literal)*) => {
            match rows {
                // SAFETY: the caller vouches for level and operands.
                $($rows => unsafe { $kernel::<$rows, $vectors>(tile) },)*
                _ => unreachable!("tiles have 1 to max_rows rows"),
            }
        };
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 if narrow => by_rows!(avx512, 1, 12 11 10 9 8 7 6 5 4 3 2 1),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => by_rows!(avx512, 2, 12 11 10 9 8 7 6 5 4 3 2 1),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => by_rows!(avx2, 2, 6 5 4 3 2 1),
        // SAFETY: the caller vouches for the operands.
        _ => unsafe { plain(tile, rows) },
    }
}
