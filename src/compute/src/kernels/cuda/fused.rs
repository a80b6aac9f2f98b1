//! Products with GELU, the loss, and gradients of queries, keys and values side by side.

use super::driver::arguments;
use super::gemm::{Epilogue, Operand, Product};
use super::{BLOCK, Cuda, DeviceWeight, Kind, Memory, any};
use crate::kernels::{FlowData, PatchLayout, Qkv};

impl Cuda {
    pub(in crate::kernels) fn linear_gelu(&self, rows: usize, x: &Memory, w: &DeviceWeight, bias: &Memory) -> Option<(Memory, Memory)> {
        let (n, k) = (w.outputs, w.inputs);
        if self.precision == Kind::F32 || !n.is_multiple_of(8) {
            return None;
        }
        assert!(x.len() == rows * k && bias.len() == n, "should be [rows, inputs] and [outputs]");
        let (h, y) = (self.memory_of(rows * n, self.precision), self.memory_of(rows * n, self.precision));
        let values = w.values(self);
        let product = Product {
            m: rows,
            n,
            k,
            a: Operand::stored(x, k),
            b: Operand::transposed(&values, k),
            c: Operand::stored(&y, n),
            alpha: 1.0,
            beta: 0.0,
            epilogue: Epilogue::BiasGelu,
            bias: bias.pointer(),
            pre: h.pointer(),
        };
        // SAFETY: lengths were checked; h and y are new.
        unsafe { self.blas.run(&product) };
        Some((h, y))
    }

    pub(in crate::kernels) fn flow_loss(&self, out: &Memory, target: &FlowData<Memory>, layout: PatchLayout, preconditioned: bool) -> (Memory, Memory) {
        let FlowData { x0, noise, words, samples } = target;
        let (n, batch) = (x0.len() / samples.len(), samples.len());
        assert!(out.len() == x0.len() && x0.len() == noise.len() && n * batch == out.len(), "should be alike");
        let blocks = n.div_ceil(4 * BLOCK);
        let (d_out, sums) = (self.memory_of(out.len(), self.precision), self.memory_of(2 * blocks * batch, Kind::F32));
        let (d, s, o, x, e, p) = (d_out.pointer(), sums.pointer(), out.pointer(), x0.pointer(), noise.pointer(), words.pointer());
        let (n, channels, width, patch) = (n as i32, layout.channels as i32, layout.width as i32, layout.patch as i32);
        let preconditioned = i32::from(preconditioned);
        let arguments = arguments![d, s, o, x, e, p, n, channels, width, patch, preconditioned];
        // SAFETY: all are [batch, n]; two f32 per block and sample.
        unsafe { self.driver.launch(("flow_loss", any(self.precision)), (blocks, batch, 1), BLOCK, 0, arguments) };
        (d_out, sums)
    }

    pub(in crate::kernels) fn packed_qkv(&self, rows: usize, width: usize, query: bool) -> Qkv<Memory> {
        let count = if query { 3 } else { 2 };
        let whole = self.memory_of(rows * count * width, self.precision);
        let part = |i: usize| whole.columns(i * width, width, count * width);
        Qkv { q: query.then(|| part(0)), k: part(count - 2), v: part(count - 1), packed: Some(whole) }
    }
}
