//! The kernels of `pointwise.cu` and `norm.cu`.

use super::driver::arguments;
use super::{BLOCK, Device, Kind, Memory, any, widest};
use crate::kernels::{Buffer, Modulation};
use finetune_common::rng::Stream;

/// Rows per block of the kernels of `norm.cu`.
const ROWS: usize = BLOCK / 32;

/// A modulation on the device, in f32: columns of a wider matrix, or a matrix of its own.
struct Vectors<'a> {
    m: Modulation<'a>,
    first: u64,
    stride: usize,
}

impl<'a> Vectors<'a> {
    fn new(m: Modulation<'a>) -> Self {
        let values = m.values.device();
        assert_eq!(values.kind(), Kind::F32, "should be f32");
        let (first, stride) = values.rows(m.stride);
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

impl Device {
    /// One kernel over all values of x and y.
    fn each(&self, name: &'static str, to: &Buffer, from: &Buffer) {
        let (to, from) = (to.device(), from.device());
        assert!(to.len() == from.len() && to.kind() == from.kind(), "should be alike");
        let (suffix, values) = widest(to.kind(), &[to.len()]);
        let (y, x, count) = (to.pointer(), from.pointer(), (to.len() / values) as i64);
        // SAFETY: both have `count` packs.
        unsafe { self.driver.launch((name, suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments![y, x, count]) };
    }

    pub(in crate::kernels) fn multiply(&self, x: &mut Buffer, y: &Buffer) {
        self.each("multiply", x, y);
    }

    pub(in crate::kernels) fn add(&self, x: &mut Buffer, y: &Buffer) {
        let (to, from) = (x.device(), y.device());
        assert!(to.kind() == from.kind() && to.len().is_multiple_of(from.len()), "should repeat a whole number of times");
        let (suffix, values) = widest(to.kind(), &[from.len()]);
        let (x, y, count, period) = (to.pointer(), from.pointer(), (to.len() / values) as i64, (from.len() / values) as i64);
        // SAFETY: x has `count` packs, y has `period`.
        unsafe { self.driver.launch(("add", suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments![x, y, count, period]) };
    }

    pub(in crate::kernels) fn unary(&self, name: &'static str, x: &Buffer) -> Buffer {
        let y = Buffer::on_device(self.memory_of(x.len(), x.device().kind()));
        self.each(name, &y, x);
        y
    }

    pub(in crate::kernels) fn unary_backward(&self, name: &'static str, x: &Buffer, dy: &mut Buffer) {
        self.each(name, dy, x);
    }

    pub(in crate::kernels) fn modulate(&self, x: &Buffer, m: Modulation<'_>, shift: usize, scale: usize) -> (Buffer, Buffer) {
        let (x, at) = (x.device(), Vectors::new(m));
        let (y, statistics) = (self.memory_of(x.len(), x.kind()), self.memory_of(x.len() / m.width * 2, Kind::F32));
        let (suffix, _) = at.widest(x.kind(), &[shift, scale]);
        let rows = (x.len() / m.width) as i64;
        let (to, sums, from, shift, scale) = (y.pointer(), statistics.pointer(), x.pointer(), at.address(shift), at.address(scale));
        let (width, tokens, stride) = at.sizes();
        let arguments = arguments![to, sums, from, shift, scale, rows, width, tokens, stride];
        // SAFETY: x and y are [rows, width], the statistics [rows, 2], the modulation [rows / tokens, stride].
        unsafe { self.driver.launch(("modulate", suffix), ((rows as usize).div_ceil(ROWS), 1, 1), BLOCK, 0, arguments) };
        (Buffer::on_device(y), Buffer::on_device(statistics))
    }

    /// `out = x + gate · branch` and the modulation of out, if a row is short enough: (out, y, statistics).
    pub(in crate::kernels) fn gate_modulate(
        &self,
        x: &Buffer,
        branch: &Buffer,
        m: Modulation<'_>,
        gate: usize,
        shift: usize,
        scale: usize,
    ) -> Option<(Buffer, Buffer, Buffer)> {
        let (x, branch, at) = (x.device(), branch.device(), Vectors::new(m));
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
        Some((Buffer::on_device(out), Buffer::on_device(y), Buffer::on_device(statistics)))
    }

    #[expect(clippy::too_many_arguments, reason = "the forward's operands, their gradients and where they lie")]
    pub(in crate::kernels) fn modulate_backward(
        &self,
        x: &Buffer,
        statistics: &Buffer,
        m: Modulation<'_>,
        shift: usize,
        scale: usize,
        dy: &Buffer,
        dx: Option<&mut Buffer>,
        d_modulation: Option<&mut Buffer>,
    ) {
        if let Some(dx) = dx {
            self.modulate_backward_gated(x, statistics, m, scale, dy, dx, None);
        }
        if let Some(gradient) = d_modulation {
            let (x, statistics, dy) = (x.device(), statistics.device(), dy.device());
            let (from, at, d) = (x.pointer(), statistics.pointer(), dy.pointer());
            let (width, tokens, stride) = (m.width as i32, m.tokens as i32, m.stride as i64);
            assert_eq!(gradient.device().kind(), Kind::F32, "should be f32");
            let (shift, scale) = (gradient.device().at(shift), gradient.device().at(scale));
            let grid = (m.width.div_ceil(BLOCK), x.len() / m.width / m.tokens, 1);
            // SAFETY: dy and x are [batch · tokens, width], the gradient [batch, stride].
            unsafe { self.driver.launch(("modulation_gradient", any(x.kind())), grid, BLOCK, 0, arguments![shift, scale, d, from, at, tokens, width, stride]) };
        }
    }

    /// Adds to dx; with a gate, returns gate · dx.
    #[expect(clippy::too_many_arguments, reason = "the forward's operands, their gradients and where they lie")]
    pub(in crate::kernels) fn modulate_backward_gated(
        &self,
        x: &Buffer,
        statistics: &Buffer,
        m: Modulation<'_>,
        scale: usize,
        dy: &Buffer,
        dx: &mut Buffer,
        gate: Option<usize>,
    ) -> Option<Buffer> {
        let (x, dx, at) = (x.device(), dx.device(), Vectors::new(m));
        let gated = gate.map(|_| self.memory_of(x.len(), x.kind()));
        let (suffix, _) = at.widest(x.kind(), &[scale, gate.unwrap_or(0)]);
        let (to, d, from, sums, scale) = (dx.pointer(), dy.device().pointer(), x.pointer(), statistics.device().pointer(), at.address(scale));
        let (result, gate, rows) = (gated.as_ref().map_or(0, Memory::pointer), gate.map_or(0, |gate| at.address(gate)), (x.len() / m.width) as i64);
        let (width, tokens, stride) = at.sizes();
        let arguments = arguments![to, d, from, sums, scale, result, gate, rows, width, tokens, stride];
        // SAFETY: all are [rows, width], the statistics [rows, 2], the modulation [rows / tokens, stride].
        unsafe { self.driver.launch(("modulate_backward", suffix), ((rows as usize).div_ceil(ROWS), 1, 1), BLOCK, 0, arguments) };
        gated.map(Buffer::on_device)
    }

    pub(in crate::kernels) fn gate_residual(&self, x: &Buffer, y: &Buffer, m: Modulation<'_>, gate: usize) -> Buffer {
        let (x, y, at) = (x.device(), y.device(), Vectors::new(m));
        assert_eq!(x.len(), y.len(), "should be alike");
        let out = self.memory_of(x.len(), x.kind());
        let (suffix, values) = at.widest(x.kind(), &[gate]);
        let (to, a, b, gate, count) = (out.pointer(), x.pointer(), y.pointer(), at.address(gate), (x.len() / values) as i64);
        let (width, tokens, stride) = at.sizes();
        let packs = width / values as i32;
        let arguments = arguments![to, a, b, gate, count, packs, tokens, stride];
        // SAFETY: all three are [batch · tokens, width], the modulation [batch, stride].
        unsafe { self.driver.launch(("gate_residual", suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments) };
        Buffer::on_device(out)
    }

    pub(in crate::kernels) fn gate_backward(&self, d_out: &Buffer, m: Modulation<'_>, gate: usize, d_modulation: Option<(&Buffer, &mut Buffer)>) -> Buffer {
        let (d, at) = (d_out.device(), Vectors::new(m));
        let dy = self.memory_of(d.len(), d.kind());
        let (suffix, values) = at.widest(d.kind(), &[gate]);
        let (to, from, factor, count) = (dy.pointer(), d.pointer(), at.address(gate), (d.len() / values) as i64);
        let (width, tokens, stride) = at.sizes();
        let packs = width / values as i32;
        let arguments = arguments![to, from, factor, count, packs, tokens, stride];
        // SAFETY: both are [batch · tokens, width], the modulation [batch, stride].
        unsafe { self.driver.launch(("gate_backward", suffix), ((count as usize).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments) };
        if let Some((y, gradient)) = d_modulation {
            assert_eq!(gradient.device().kind(), Kind::F32, "should be f32");
            let (to, y, stride) = (gradient.device().at(gate), y.device().pointer(), m.stride as i64);
            let grid = (m.width.div_ceil(BLOCK), d.len() / m.width / m.tokens, 1);
            // SAFETY: y and d_out are [batch · tokens, width], the gradient [batch, stride].
            unsafe { self.driver.launch(("gate_gradient", any(d.kind())), grid, BLOCK, 0, arguments![to, y, from, tokens, width, stride]) };
        }
        Buffer::on_device(dy)
    }

    pub(in crate::kernels) fn rms_norm(&self, x: &Buffer, weight: &Buffer) -> (Buffer, Buffer) {
        let (x, weight) = (x.device(), weight.device());
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
        (Buffer::on_device(y), Buffer::on_device(statistics))
    }

    pub(in crate::kernels) fn rms_norm_backward(&self, x: &Buffer, weight: &Buffer, statistics: &Buffer, dy: &mut Buffer) {
        let (x, weight, dy) = (x.device(), weight.device(), dy.device());
        let columns = x.place().or(dy.place()).map_or(weight.len(), |(_, width, _)| width);
        let ((from, x_stride), (to, y_stride)) = (x.rows(columns), dy.rows(columns));
        let (suffix, _) = widest(x.kind(), &[weight.len(), x_stride, y_stride]);
        let (w, at) = (weight.pointer(), statistics.device().pointer());
        let (rows, width, heads) = ((x.len() / weight.len()) as i64, weight.len() as i32, (columns / weight.len()) as i32);
        let (x_stride, y_stride) = (x_stride as i64, y_stride as i64);
        let arguments = arguments![to, from, w, at, rows, width, heads, x_stride, y_stride];
        // SAFETY: x and dy are [rows, width] at these strides, the statistics [rows], the weight [width].
        unsafe { self.driver.launch(("rms_norm_backward", suffix), ((rows as usize).div_ceil(ROWS), 1, 1), BLOCK, 0, arguments) };
    }

    /// A mask of `values` per stream, in the order in which [`Stream::uniform_f32`] would give them.
    pub(in crate::kernels) fn dropout_mask(&self, streams: &[Stream], values: usize, p: f32, kept: f32) -> Buffer {
        let mask = self.memory_of(streams.len() * values, self.precision);
        let words: Vec<u8> = streams.iter().flat_map(Stream::words).flat_map(u32::to_le_bytes).collect();
        let names = self.upload_bytes(&words, words.len() / 4, Kind::F32);
        let (to, names, count) = (mask.pointer(), names.pointer(), values as i64);
        let grid = (values.div_ceil(4 * BLOCK), streams.len(), 1);
        // SAFETY: the mask is [streams, values], five words per stream.
        unsafe { self.driver.launch(("dropout_mask", any(self.precision)), grid, BLOCK, 0, arguments![to, names, count, p, kept]) };
        Buffer::on_device(mask)
    }
}
