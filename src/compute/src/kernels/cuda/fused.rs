//! Products with GELU, the loss, and buffers that lie together.

use super::driver::arguments;
use super::gemm::{Epilogue, Operand, Product};
use super::{BLOCK, Device, DeviceWeight, Kind, any};
use crate::kernels::fused::{FlatBuffer, FlowData, PatchLayout, flat_offsets};
use crate::kernels::{Buffer, Qkv};

impl Device {
    pub(in crate::kernels) fn linear_gelu(&self, rows: usize, x: &Buffer, w: &DeviceWeight, bias: &Buffer) -> Option<(Buffer, Buffer)> {
        let (n, k) = (w.outputs, w.inputs);
        if self.precision == Kind::F32 || !n.is_multiple_of(8) {
            return None;
        }
        assert!(x.len() == rows * k && bias.len() == n, "should be [rows, inputs] and [outputs]");
        let (h, y) = (self.memory_of(rows * n, self.precision), self.memory_of(rows * n, self.precision));
        let product = Product {
            m: rows,
            n,
            k,
            a: Operand::stored(x.device(), k),
            b: Operand::transposed(&w.values, k),
            c: Operand::stored(&y, n),
            alpha: 1.0,
            beta: 0.0,
            epilogue: Epilogue::BiasGelu,
            bias: bias.device().pointer(),
            pre: h.pointer(),
        };
        // SAFETY: lengths were checked; h and y are new.
        unsafe { self.blas.run(&product) };
        Some((Buffer::on_device(h), Buffer::on_device(y)))
    }

    pub(in crate::kernels) fn flow_loss(&self, out: &Buffer, target: &FlowData, layout: PatchLayout, preconditioned: bool) -> (Buffer, Buffer) {
        let (x0, noise, samples) = (target.x0.device(), target.noise.device(), target.samples.device());
        let (n, batch) = (x0.len() / target.batch, target.batch);
        assert!(out.len() == x0.len() && x0.len() == noise.len() && n * batch == out.len(), "should be alike");
        let blocks = n.div_ceil(4 * BLOCK);
        let (d_out, sums) = (self.memory_of(out.len(), self.precision), self.memory_of(2 * blocks * batch, Kind::F32));
        let (d, s, o, x, e, p) = (d_out.pointer(), sums.pointer(), out.device().pointer(), x0.pointer(), noise.pointer(), samples.pointer());
        let (n, channels, width, patch) = (n as i32, layout.channels as i32, layout.width as i32, layout.patch as i32);
        let preconditioned = i32::from(preconditioned);
        let arguments = arguments![d, s, o, x, e, p, n, channels, width, patch, preconditioned];
        // SAFETY: all are [batch, n]; two f32 per block and sample.
        unsafe { self.driver.launch(("flow_loss", any(self.precision)), (blocks, batch, 1), BLOCK, 0, arguments) };
        (Buffer::on_device(d_out), Buffer::on_device(sums))
    }

    pub(in crate::kernels) fn flat_zeros(&self, lengths: &[usize]) -> FlatBuffer {
        let offsets = flat_offsets(lengths.iter().copied());
        let whole = self.memory_of(offsets[lengths.len()], Kind::F32);
        self.fill_memory(&whole);
        let parts = lengths.iter().zip(offsets).map(|(len, offset)| Buffer::on_device(whole.part(offset, *len))).collect();
        FlatBuffer { parts, whole: Some(Buffer::on_device(whole)) }
    }

    pub(in crate::kernels) fn packed_qkv(&self, rows: usize, width: usize, query: bool) -> Qkv {
        let count = if query { 3 } else { 2 };
        let whole = self.memory_of(rows * count * width, self.precision);
        let part = |i: usize| Buffer::on_device(whole.columns(i * width, width, count * width));
        Qkv { q: query.then(|| part(0)), k: part(count - 2), v: part(count - 1), packed: Some(Buffer::on_device(whole)) }
    }
}
