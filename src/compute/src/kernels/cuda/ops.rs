//! The kernels of `pointwise.cu` and `norm.cu`.

use super::driver::arguments;
use super::{BLOCK, Cuda, Kind, Memory, any, widest};
use crate::kernels::Modulation;
use finetune_common::rng::Stream;

/// Rows per block of the kernels of `norm.cu`.
const ROWS: usize = BLOCK / 32;

/// A modulation on the device, in f32: columns of a wider matrix, or a matrix of its own.
struct Vectors<'a> {
    m: Modulation<'a, Memory>,
    first: u64,
    stride: usize,
}

impl<'a> Vectors<'a> {
    fn new(m: Modulation<'a, Memory>) -> Self {
        assert_eq!(m.values.kind(), Kind::F32, "should be f32");
        let (first, stride) = m.values.rows(m.stride);
        Self { m, first, stride }
    }

    /// Address of the first sample's vector at this offset.
    fn address(&self, offset: usize) -> u64 {
        assert!(offset + self.m.width <= self.m.stride, "should lie within");
        self.first + (offset * Kind::F32.bytes()) as u64
    }

    /// (width, tokens, stride) as kernels want them.
    fn sizes(&self) -> (i32, i32, i64) {
        (self.m.width as i32, self.m.tokens as i32, self.stride as i64)
    }

    /// The kernels' suffix for values of this kind and vectors at these offsets, and how many values are accessed at a time.
    fn widest(&self, kind: Kind, offsets: &[usize]) -> (&'static str, usize) {
        let lengths: Vec<usize> = [self.m.width, self.stride].iter().chain(offsets).copied().collect();
        widest(kind, &lengths)
    }
}

impl Cuda {
    /// One kernel over all values of x and y.
    fn each(&self, name: &'static str, to: &Memory, from: &Memory) {
        assert!(to.len() == from.len() && to.kind() == from.kind(), "should be alike");
        let (suffix, values) = widest(to.kind(), &[to.len()]);
        let (y, x, count) = (to.pointer(), from.pointer(), (to.len() / values) as i64);
        // SAFETY: both have `count` packs.
        unsafe { self.driver.launch((name, suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments![y, x, count]) };
    }

    pub(in crate::kernels) fn multiply(&self, x: &mut Memory, y: &Memory) {
        self.each("multiply", x, y);
    }

    pub(in crate::kernels) fn add(&self, to: &mut Memory, from: &Memory) {
        assert!(to.kind() == from.kind() && to.len().is_multiple_of(from.len()), "should repeat a whole number of times");
        let (suffix, values) = widest(to.kind(), &[from.len()]);
        let (x, y, count, period) = (to.pointer(), from.pointer(), (to.len() / values) as i64, (from.len() / values) as i64);
        // SAFETY: x has `count` packs, y has `period`.
        unsafe { self.driver.launch(("add", suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments![x, y, count, period]) };
    }

    pub(in crate::kernels) fn unary(&self, name: &'static str, x: &Memory) -> Memory {
        let y = self.memory_of(x.len(), x.kind());
        self.each(name, &y, x);
        y
    }

    pub(in crate::kernels) fn unary_backward(&self, name: &'static str, x: &Memory, dy: &mut Memory) {
        self.each(name, dy, x);
    }

    pub(in crate::kernels) fn modulate(&self, x: &Memory, m: Modulation<'_, Memory>, shift: usize, scale: usize) -> (Memory, Memory) {
        let at = Vectors::new(m);
        let (y, statistics) = (self.memory_of(x.len(), x.kind()), self.memory_of(x.len() / m.width * 2, Kind::F32));
        let (suffix, _) = at.widest(x.kind(), &[shift, scale]);
        let rows = (x.len() / m.width) as i64;
        let (to, sums, from, shift, scale) = (y.pointer(), statistics.pointer(), x.pointer(), at.address(shift), at.address(scale));
        let (width, tokens, stride) = at.sizes();
        let arguments = arguments![to, sums, from, shift, scale, rows, width, tokens, stride];
        // SAFETY: x and y are [rows, width], the statistics [rows, 2], the modulation [rows / tokens, stride].
        unsafe { self.driver.launch(("modulate", suffix), ((rows as usize).div_ceil(ROWS), 1, 1), BLOCK, 0, arguments) };
        (y, statistics)
    }

    /// `out = x + gate · branch` and the modulation of out, if a row is short enough: (out, y, statistics).
    pub(in crate::kernels) fn gate_modulate(
        &self,
        x: &Memory,
        branch: &Memory,
        m: Modulation<'_, Memory>,
        gate: usize,
        shift: usize,
        scale: usize,
    ) -> Option<(Memory, Memory, Memory)> {
        let at = Vectors::new(m);
        let (suffix, values) = at.widest(x.kind(), &[gate, shift, scale]);
        if m.width > BLOCK * values {
            return None;
        }
        assert_eq!(x.len(), branch.len(), "should be alike");
        let (out, y, statistics) = (self.memory_of(x.len(), x.kind()), self.memory_of(x.len(), x.kind()), self.memory_of(x.len() / m.width * 2, Kind::F32));
        let rows = (x.len() / m.width) as i64;
        let (to, normal, sums, a, b) = (out.pointer(), y.pointer(), statistics.pointer(), x.pointer(), branch.pointer());
        let (gate, shift, scale) = (at.address(gate), at.address(shift), at.address(scale));
        let (width, tokens, stride) = at.sizes();
        let arguments = arguments![to, normal, sums, a, b, gate, shift, scale, rows, width, tokens, stride];
        // SAFETY: all are [rows, width], the statistics [rows, 2], the modulation [rows / tokens, stride].
        unsafe { self.driver.launch(("gate_modulate", suffix), ((rows as usize).div_ceil(ROWS), 1, 1), BLOCK, 0, arguments) };
        Some((out, y, statistics))
    }

    #[expect(clippy::too_many_arguments, reason = "the forward's operands, their gradients and where they lie")]
    pub(in crate::kernels) fn modulate_backward(
        &self,
        x: &Memory,
        statistics: &Memory,
        m: Modulation<'_, Memory>,
        shift: usize,
        scale: usize,
        dy: &Memory,
        dx: Option<&mut Memory>,
        d_modulation: Option<&mut Memory>,
    ) {
        if let Some(dx) = dx {
            self.modulate_backward_into(x, statistics, m, scale, dy, dx, None);
        }
        if let Some(gradient) = d_modulation {
            let (from, at, d) = (x.pointer(), statistics.pointer(), dy.pointer());
            let (width, tokens, stride) = (m.width as i32, m.tokens as i32, m.stride as i64);
            assert_eq!(gradient.kind(), Kind::F32, "should be f32");
            let (shift, scale) = (gradient.at(shift), gradient.at(scale));
            let grid = (m.width.div_ceil(BLOCK), x.len() / m.width / m.tokens, 1);
            // SAFETY: dy and x are [batch · tokens, width], the gradient [batch, stride].
            unsafe { self.driver.launch(("modulation_gradient", any(x.kind())), grid, BLOCK, 0, arguments![shift, scale, d, from, at, tokens, width, stride]) };
        }
    }

    /// Adds to dx; with the gate's offset, assigns gate · dx to what is beside it.
    #[expect(clippy::too_many_arguments, reason = "the forward's operands, their gradients and where they lie")]
    pub(in crate::kernels) fn modulate_backward_into(
        &self,
        x: &Memory,
        statistics: &Memory,
        m: Modulation<'_, Memory>,
        scale: usize,
        dy: &Memory,
        dx: &mut Memory,
        gated: Option<(usize, &mut Memory)>,
    ) {
        let at = Vectors::new(m);
        let (suffix, _) = at.widest(x.kind(), &[scale, gated.as_ref().map_or(0, |(gate, _)| *gate)]);
        let (to, d, from, sums, scale) = (dx.pointer(), dy.pointer(), x.pointer(), statistics.pointer(), at.address(scale));
        let (result, gate) = gated.map_or((0, 0), |(gate, result)| (result.pointer(), at.address(gate)));
        let rows = (x.len() / m.width) as i64;
        let (width, tokens, stride) = at.sizes();
        let arguments = arguments![to, d, from, sums, scale, result, gate, rows, width, tokens, stride];
        // SAFETY: all are [rows, width], the statistics [rows, 2], the modulation [rows / tokens, stride].
        unsafe { self.driver.launch(("modulate_backward", suffix), ((rows as usize).div_ceil(ROWS), 1, 1), BLOCK, 0, arguments) };
    }

    pub(in crate::kernels) fn gate_residual(&self, x: &Memory, y: &Memory, m: Modulation<'_, Memory>, gate: usize) -> Memory {
        let at = Vectors::new(m);
        assert_eq!(x.len(), y.len(), "should be alike");
        let out = self.memory_of(x.len(), x.kind());
        let (suffix, values) = at.widest(x.kind(), &[gate]);
        let (to, a, b, gate, count) = (out.pointer(), x.pointer(), y.pointer(), at.address(gate), (x.len() / values) as i64);
        let (width, tokens, stride) = at.sizes();
        let packs = width / values as i32;
        let arguments = arguments![to, a, b, gate, count, packs, tokens, stride];
        // SAFETY: all three are [batch · tokens, width], the modulation [batch, stride].
        unsafe { self.driver.launch(("gate_residual", suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments) };
        out
    }

    pub(in crate::kernels) fn gate_backward(&self, d: &Memory, m: Modulation<'_, Memory>, gate: usize, d_modulation: Option<(&Memory, &mut Memory)>) -> Memory {
        let at = Vectors::new(m);
        let dy = self.memory_of(d.len(), d.kind());
        let (suffix, values) = at.widest(d.kind(), &[gate]);
        let (to, from, factor, count) = (dy.pointer(), d.pointer(), at.address(gate), (d.len() / values) as i64);
        let (width, tokens, stride) = at.sizes();
        let packs = width / values as i32;
        let arguments = arguments![to, from, factor, count, packs, tokens, stride];
        // SAFETY: both are [batch · tokens, width], the modulation [batch, stride].
        unsafe { self.driver.launch(("gate_backward", suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments) };
        if let Some((y, gradient)) = d_modulation {
            assert_eq!(gradient.kind(), Kind::F32, "should be f32");
            let (to, y, stride) = (gradient.at(gate), y.pointer(), m.stride as i64);
            let grid = (m.width.div_ceil(BLOCK), d.len() / m.width / m.tokens, 1);
            // SAFETY: y and d are [batch · tokens, width], the gradient [batch, stride].
            unsafe { self.driver.launch(("gate_gradient", any(d.kind())), grid, BLOCK, 0, arguments![to, y, from, tokens, width, stride]) };
        }
        dy
    }

    pub(in crate::kernels) fn rms_norm(&self, x: &Memory, weight: &Memory) -> (Memory, Memory) {
        let (y, statistics) = (self.memory_of(x.len(), x.kind()), self.memory_of(x.len() / weight.len(), Kind::F32));
        // Rows of tokens where x is columns of a wider matrix, else of heads.
        let columns = x.place().map_or(weight.len(), |(_, width, _)| width);
        let (from, x_stride) = x.rows(columns);
        let (suffix, _) = widest(x.kind(), &[weight.len(), x_stride]);
        let (to, at, w) = (y.pointer(), statistics.pointer(), weight.pointer());
        let (rows, width, heads) = ((x.len() / weight.len()) as i64, weight.len() as i32, (columns / weight.len()) as i32);
        let (x_stride, y_stride) = (x_stride as i64, columns as i64);
        let arguments = arguments![to, at, from, w, rows, width, heads, x_stride, y_stride];
        // SAFETY: x and y are [rows, width] at these strides, the statistics [rows], the weight [width].
        unsafe { self.driver.launch(("rms_norm", suffix), ((rows as usize).div_ceil(ROWS), 1, 1), BLOCK, 0, arguments) };
        (y, statistics)
    }

    pub(in crate::kernels) fn rms_norm_backward(&self, x: &Memory, weight: &Memory, statistics: &Memory, dy: &mut Memory) {
        let columns = x.place().or(dy.place()).map_or(weight.len(), |(_, width, _)| width);
        let ((from, x_stride), (to, y_stride)) = (x.rows(columns), dy.rows(columns));
        let (suffix, _) = widest(x.kind(), &[weight.len(), x_stride, y_stride]);
        let (w, at) = (weight.pointer(), statistics.pointer());
        let (rows, width, heads) = ((x.len() / weight.len()) as i64, weight.len() as i32, (columns / weight.len()) as i32);
        let (x_stride, y_stride) = (x_stride as i64, y_stride as i64);
        let arguments = arguments![to, from, w, at, rows, width, heads, x_stride, y_stride];
        // SAFETY: x and dy are [rows, width] at these strides, the statistics [rows], the weight [width].
        unsafe { self.driver.launch(("rms_norm_backward", suffix), ((rows as usize).div_ceil(ROWS), 1, 1), BLOCK, 0, arguments) };
    }

    /// A mask of `values` per stream, in the order in which [`Stream::uniform_f32`] would give them.
    pub(in crate::kernels) fn dropout_mask(&self, streams: &[Stream], values: usize, p: f32, kept: f32) -> Memory {
        let mask = self.memory_of(streams.len() * values, self.precision);
        let words: Vec<u8> = streams.iter().flat_map(Stream::words).flat_map(u32::to_le_bytes).collect();
        let names = self.upload_bytes(&words, words.len() / 4, Kind::F32);
        let (to, names, count) = (mask.pointer(), names.pointer(), values as i64);
        let grid = (values.div_ceil(4 * BLOCK), streams.len(), 1);
        // SAFETY: the mask is [streams, values], five words per stream.
        unsafe { self.driver.launch(("dropout_mask", any(self.precision)), grid, BLOCK, 0, arguments![to, names, count, p, kept]) };
        mask
    }
}
