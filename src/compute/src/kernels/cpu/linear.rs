//! Linear layers with frozen weights and LoRA.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::gemm::{Packed, Start, Strided, product, product_panels, rows_per_task, with_scratch};
use super::microkernel::PANEL;
use super::share::Shared;
use crate::kernels::Precision;

/// A frozen weight [out, in] that is read from where it is stored whenever it is used.
pub trait StoredMatrix: Send + Sync {
    /// Writes rows x columns of the matrix to `out`, row-major, as f32.
    fn read_block(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]);

    /// The whole matrix as it is stored, row-major.
    fn stored(&self) -> Option<(Precision, &[u8])>;
}

/// A frozen weight W [out, in].
pub enum Weight {
    /// As panels of Wᵀ (for `x Wᵀ`) and of W (for `dy W`).
    Packed {
        /// Wᵀ: [in, out].
        forward: Packed,
        /// W: [out, in].
        backward: Packed,
    },
    /// As stored.
    Stored {
        /// The matrix.
        matrix: Arc<dyn StoredMatrix>,
        /// Rows of W.
        outputs: usize,
        /// Columns of W.
        inputs: usize,
    },
}

/// LoRA factors A [r, in] and `scale · B` [out, r], packed for every product that uses them.
pub struct Lora {
    pub(crate) rank: usize,
    /// Aᵀ: [in, r], for `t = x Aᵀ`.
    pub(crate) a_transposed: Packed,
    /// scale · Bᵀ: [r, out], for `y += t Bᵀ`.
    pub(crate) b_transposed: Packed,
    /// scale · B: [out, r], for `dt = dy B`.
    pub(crate) b: Packed,
    /// A: [r, in], for `dx += dt A`.
    pub(crate) a: Packed,
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Packed { .. } => "Weight(packed)",
            Self::Stored { .. } => "Weight(stored)",
        })
    }
}

impl fmt::Debug for Lora {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lora(rank {})", self.rank)
    }
}

impl Lora {
    pub(crate) fn new(rank: usize, inputs: usize, outputs: usize, a: &[f32], b: &[f32], scale: f32) -> Self {
        Self {
            rank,
            a_transposed: Packed::transposed(rank, inputs, a),
            b_transposed: Packed::new(rank, outputs, b, 1, rank, scale),
            b: Packed::new(outputs, rank, b, rank, 1, scale),
            a: Packed::new(rank, inputs, a, inputs, 1, 1.0),
        }
    }
}

/// Which way a weight is used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `x Wᵀ`: sums over inputs.
    Forward,
    /// `dy W`: sums over outputs.
    Backward,
}

impl Weight {
    fn packed(&self, way: Way) -> Option<&Packed> {
        match self {
            Self::Packed { forward, backward } => Some(if way == Way::Forward { forward } else { backward }),
            Self::Stored { .. } => None,
        }
    }

    /// (length of the sums, columns of the result).
    fn shape(&self, way: Way) -> (usize, usize) {
        let (outputs, inputs) = match self {
            Self::Packed { forward, .. } => (forward.n(), forward.k()),
            Self::Stored { outputs, inputs, .. } => (*outputs, *inputs),
        };
        if way == Way::Forward { (inputs, outputs) } else { (outputs, inputs) }
    }
}

/// Panels per task where tasks divide columns.
const GROUP: usize = 4;

/// Rows up to which columns are divided among tasks, not rows.
const FEW_ROWS: usize = 24;

/// k per pass over a stored weight; equal to the packed product's, so that both sum in the same order.
const DEPTH: usize = 256;

/// `y = bias + x Wᵀ (+ (x_lora Aᵀ) (scale B)ᵀ)`; `t` gets `x_lora Aᵀ · lora_scale` [rows, r].
///
/// x [rows, in], y [rows, out]; `x_lora` is x or x after dropout.
pub(crate) fn forward(rows: usize, x: &[f32], weight: &Weight, bias: Option<&[f32]>, lora: Option<(&Lora, &[f32], f32)>, t: Option<&mut [f32]>, y: &mut [f32]) {
    let start = bias.map_or(Start::Zero, Start::Row);
    let lora = lora.zip(t).map(|((lora, x, scale), t)| Side {
        down: &lora.a_transposed,
        up: &lora.b_transposed,
        x,
        scale: Some(scale).filter(|s| (s - 1.0).abs() > 0.0),
        rank: lora.rank,
        t: Shared::new(t),
    });
    run(rows, x, weight, Way::Forward, start, lora.as_ref(), y);
}

/// `y (+)= x Wᵀ + bias` for a weight [outputs, inputs] that is read where it is stored and used by the whole product at once.
pub(crate) fn stored(
    rows: usize,
    x: &[f32],
    matrix: &dyn StoredMatrix,
    (outputs, inputs): (usize, usize),
    bias: Option<&[f32]>,
    accumulate: bool,
    y: &mut [f32],
) {
    assert!(x.len() == rows * inputs && y.len() == rows * outputs, "should be [rows, inputs] and [rows, outputs]");
    let start = match bias {
        Some(bias) if accumulate => {
            super::pointwise::add_repeated(y, bias);
            Start::Accumulate
        }
        Some(bias) => Start::Row(bias),
        None if accumulate => Start::Accumulate,
        None => Start::Zero,
    };
    let y = Shared::new(y);
    let panels = outputs.div_ceil(PANEL);
    (0..panels.div_ceil(GROUP)).into_par_iter().for_each(|i| {
        let c = y.at(0, rows * outputs);
        // SAFETY: y's columns of this group are written by this task alone.
        unsafe { stored_group(rows, Strided::rows(x, inputs), matrix, Way::Forward, inputs, outputs, i * GROUP..panels.min((i + 1) * GROUP), start, c) };
    });
}

/// `dx (+)= dy W (+ (dy scale B) A)`; `dt` gets `dy scale B` [rows, r]. With `dx` absent only `dt` is computed.
///
/// dy [rows, out], dx [rows, in]. `lora_into_dx` is false where dropout stands between x and A.
pub(crate) fn backward(
    rows: usize,
    dy: &[f32],
    weight: &Weight,
    lora: Option<&Lora>,
    lora_into_dx: bool,
    dt: Option<&mut [f32]>,
    dx: Option<(&mut [f32], bool)>,
) {
    let mut side = lora.zip(dt).map(|(lora, dt)| Side { down: &lora.b, up: &lora.a, x: dy, scale: None, rank: lora.rank, t: Shared::new(dt) });
    if (dx.is_none() || !lora_into_dx)
        && let Some(side) = side.take()
    {
        side.down_all(rows);
    }
    if let Some((dx, accumulate)) = dx {
        run(rows, dy, weight, Way::Backward, if accumulate { Start::Accumulate } else { Start::Zero }, side.as_ref(), dx);
    }
}

/// `dx = dt A` [rows, in].
pub(crate) fn through_a(rows: usize, dt: &[f32], lora: &Lora, dx: &mut [f32]) {
    let (n, chunk) = (lora.a.n(), rows_per_task(rows));
    dx.par_chunks_mut(chunk * n).zip(dt.par_chunks(chunk * lora.rank)).for_each(|(dx, dt)| {
        // SAFETY: this task's own rows.
        unsafe { product(dx.len() / n, Strided::rows(dt, lora.rank), &lora.a, 0..lora.a.panels(), Start::Zero, dx.as_mut_ptr(), n) };
    });
}

/// The low-rank path beside a weight: `t = scale · x down`, then `y += t up`.
struct Side<'a> {
    down: &'a Packed,
    up: &'a Packed,
    x: &'a [f32],
    /// Factor of t, if not 1.
    scale: Option<f32>,
    rank: usize,
    t: Shared<'a>,
}

impl Side<'_> {
    /// t of these rows.
    fn down(&self, rows: Range<usize>) {
        let (m, k) = (rows.len(), self.down.k());
        let t = self.t.at(rows.start * self.rank, m * self.rank);
        // SAFETY: t's rows of this task are written by it alone.
        unsafe {
            product(m, Strided::rows(&self.x[rows.start * k..rows.end * k], k), self.down, 0..self.down.panels(), Start::Zero, t, self.rank);
            if let Some(scale) = self.scale {
                for value in std::slice::from_raw_parts_mut(t, m * self.rank) {
                    *value *= scale;
                }
            }
        }
    }

    fn down_all(&self, rows: usize) {
        let chunk = rows_per_task(rows);
        (0..rows.div_ceil(chunk)).into_par_iter().for_each(|i| self.down(i * chunk..rows.min((i + 1) * chunk)));
    }

    /// Adds t up of these rows and panels to y.
    ///
    /// # Safety
    /// t of these rows must be complete; y's rows and panels must be this task's alone.
    unsafe fn up(&self, rows: Range<usize>, panels: Range<usize>, y: *mut f32, n: usize) {
        let m = rows.len();
        // SAFETY: as the caller vouches.
        unsafe {
            let t = std::slice::from_raw_parts(self.t.at(rows.start * self.rank, m * self.rank).cast_const(), m * self.rank);
            product(m, Strided::rows(t, self.rank), self.up, panels, Start::Accumulate, y, n);
        }
    }
}

fn run(rows: usize, x: &[f32], weight: &Weight, way: Way, start: Start<'_>, side: Option<&Side<'_>>, y: &mut [f32]) {
    let (k, n) = weight.shape(way);
    assert!(x.len() == rows * k && y.len() == rows * n, "should be [rows, k] and [rows, n]");
    let y = Shared::new(y);
    if let Some(packed) = weight.packed(way).filter(|_| rows > FEW_ROWS) {
        let chunk = rows_per_task(rows);
        (0..rows.div_ceil(chunk)).into_par_iter().for_each(|i| {
            let part = i * chunk..rows.min((i + 1) * chunk);
            let m = part.len();
            if let Some(side) = side {
                side.down(part.clone());
            }
            let c = y.at(part.start * n, m * n);
            // SAFETY: y's rows of this task are written by it alone; t of these rows was computed above.
            unsafe {
                product(m, Strided::rows(&x[part.start * k..part.end * k], k), packed, 0..packed.panels(), start, c, n);
                if let Some(side) = side {
                    side.up(part, 0..packed.panels(), c, n);
                }
            }
        });
        return;
    }
    if let Some(side) = side {
        side.down_all(rows);
    }
    let panels = n.div_ceil(PANEL);
    (0..panels.div_ceil(GROUP)).into_par_iter().for_each(|i| {
        let group = i * GROUP..panels.min((i + 1) * GROUP);
        let c = y.at(0, rows * n);
        let x = Strided::rows(x, k);
        // SAFETY: y's columns of this group are written by this task alone; t is complete.
        unsafe {
            match weight {
                Weight::Packed { .. } => {
                    if let Some(packed) = weight.packed(way) {
                        product(rows, x, packed, group.clone(), start, c, n);
                    }
                }
                Weight::Stored { matrix, .. } => stored_group(rows, x, matrix.as_ref(), way, k, n, group.clone(), start, c),
            }
            if let Some(side) = side {
                side.up(0..rows, group, c, n);
            }
        }
    });
}

/// A group of panels of a product with a stored weight, converted and packed block by block.
///
/// # Safety
/// As [`product`].
unsafe fn stored_group(
    rows: usize,
    x: Strided<'_>,
    matrix: &dyn StoredMatrix,
    way: Way,
    k: usize,
    n: usize,
    group: Range<usize>,
    start: Start<'_>,
    c: *mut f32,
) {
    let columns = group.start * PANEL..n.min(group.end * PANEL);
    let width = columns.len();
    with_scratch(DEPTH * (width + group.len() * PANEL), |memory| {
        let (block, packed) = memory.split_at_mut(DEPTH * width);
        for depth in (0..k).step_by(DEPTH) {
            let steps = DEPTH.min(k - depth);
            let packed = &mut packed[..group.len() * steps * PANEL];
            let block = &mut block[..steps * width];
            if way == Way::Forward {
                matrix.read_block(columns.clone(), depth..depth + steps, block);
                for (panel, out) in packed.chunks_exact_mut(steps * PANEL).enumerate() {
                    let valid = PANEL.min(width - panel * PANEL);
                    if valid < PANEL {
                        out.fill(0.0);
                    }
                    for p in (0..steps).step_by(16) {
                        for j in 0..valid {
                            let row = &block[(panel * PANEL + j) * steps..][p..steps.min(p + 16)];
                            for (q, &value) in row.iter().enumerate() {
                                out[(p + q) * PANEL + j] = value;
                            }
                        }
                    }
                }
            } else {
                matrix.read_block(depth..depth + steps, columns.clone(), block);
                for (panel, out) in packed.chunks_exact_mut(steps * PANEL).enumerate() {
                    let valid = PANEL.min(width - panel * PANEL);
                    for (row, out) in block.chunks_exact(width).zip(out.chunks_exact_mut(PANEL)) {
                        out[..valid].copy_from_slice(&row[panel * PANEL..][..valid]);
                        out[valid..].fill(0.0);
                    }
                }
            }
            let part = Strided { data: &x.data[depth..], ..x };
            let start = if depth == 0 { start } else { Start::Accumulate };
            // SAFETY: as the caller vouches.
            unsafe { product_panels(rows, part, packed, steps, n, group.clone(), start, c, n) };
        }
    });
}

/// `gradient += lᵀ r · scale` for l [rows, p], r [rows, q]: [p, q] row-major, q being the rank (`by_rank_first` false) or
/// transposed on the way out ([q, p], `by_rank_first` true).
pub(crate) fn outer_products(rows: usize, l: &[f32], p: usize, r: &[f32], q: usize, scale: f32, by_rank_first: bool, gradient: &mut [f32]) {
    assert!(l.len() == rows * p && r.len() == rows * q && gradient.len() == p * q, "should be [rows, p], [rows, q] and [p, q]");
    let packed = Packed::new(rows, q, r, q, 1, scale);
    let chunk = 48;
    let gradient = Shared::new(gradient);
    (0..p.div_ceil(chunk)).into_par_iter().for_each(|i| {
        let first = i * chunk;
        let m = chunk.min(p - first);
        with_scratch(m * q, |tile| {
            // SAFETY: `tile` is this task's own.
            unsafe { product(m, Strided::transposed(&l[first..], p), &packed, 0..packed.panels(), Start::Zero, tile.as_mut_ptr(), q) };
            for (j, row) in tile.chunks_exact(q).enumerate() {
                for (c, value) in row.iter().enumerate() {
                    let index = if by_rank_first { c * p + first + j } else { (first + j) * q + c };
                    // SAFETY: these elements are written by this task alone.
                    unsafe { *gradient.at(index, 1) += value };
                }
            }
        });
    });
}
