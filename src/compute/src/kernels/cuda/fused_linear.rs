//! Linear layers with one input as one product: their weights lie below each other, their results beside each other.

use cudarc::driver::sys::{self, CUDA_MEMCPY2D_st, CUmemorytype};

use super::driver::check;
use super::error::must;
use super::gemm::Operand;
use super::linear::{DeviceLora, Frozen, RANK};
use super::skinny::SkinnyGemm;
use super::{Cuda, DeviceWeight, Memory};

/// Weights [Σ outputs, inputs] and biases [Σ outputs] of layers that have the same input.
#[derive(Debug)]
pub(in crate::kernels) struct DeviceFusedLinear {
    weight: DeviceWeight,
    bias: Memory,
    pub(super) inputs: usize,
    /// Of each layer.
    pub(super) outputs: Vec<usize>,
}

/// LoRA of fused layers: A [Σ ranks, inputs] and the block-diagonal B [Σ outputs, Σ ranks].
#[derive(Debug)]
pub(in crate::kernels) struct DeviceFusedLora {
    pub(super) a: Memory,
    pub(super) b: Memory,
    pub(super) ranks: usize,
    /// Per layer with LoRA: its place in `outputs`, its first row in B, its first row in A, its rank.
    pub(super) layers: Vec<(usize, usize, usize, usize)>,
}

impl Cuda {
    /// Lays weights and biases of layers with the same input together; the layers then share this memory.
    pub(in crate::kernels) fn fuse(&self, weights: &mut [&mut DeviceWeight], biases: &mut [&mut Memory]) -> Option<DeviceFusedLinear> {
        let inputs = weights.first()?.inputs;
        if weights.iter().any(|w| w.inputs != inputs) || biases.len() != weights.len() {
            return None;
        }
        let outputs: Vec<usize> = weights.iter().map(|w| w.outputs).collect();
        let weight = self.fuse_weights(weights, &outputs, inputs)?;
        let bias = self.memory_of(weight.outputs, self.precision);
        let mut first = 0;
        for (b, &rows) in biases.iter_mut().zip(&outputs) {
            let to = bias.part(first, rows);
            self.copy_into(&to, b);
            **b = to;
            first += rows;
        }
        Some(DeviceFusedLinear { weight, bias, inputs, outputs })
    }

    /// Weights [outputs, inputs] below each other, which then share this memory. `None` if they are kept in different ways.
    fn fuse_weights(&self, weights: &mut [&mut DeviceWeight], outputs: &[usize], inputs: usize) -> Option<DeviceWeight> {
        let total: usize = outputs.iter().sum();
        let (mut floats, mut codes) = (Vec::new(), Vec::new());
        for weight in weights.iter_mut() {
            match &mut weight.values {
                Frozen::Float(values) => floats.push(values),
                Frozen::Int8(own) => codes.push(own),
            }
        }
        if floats.is_empty() {
            return Some(DeviceWeight::int8(total, inputs, self.joined(&mut codes, outputs, inputs)));
        }
        let kind = floats[0].kind();
        if !codes.is_empty() || floats.iter().any(|values| values.kind() != kind) {
            return None;
        }
        let whole = self.memory_of(total * inputs, kind);
        let mut first = 0;
        for (values, &rows) in floats.into_iter().zip(outputs) {
            let to = whole.part(first * inputs, rows * inputs);
            self.copy_into(&to, values);
            *values = to;
            first += rows;
        }
        Some(DeviceWeight::new(total, inputs, whole))
    }

    /// Lays the factors of the layers (those that have any) together.
    pub(in crate::kernels) fn fuse_lora(&self, fused: &DeviceFusedLinear, layers: &[Option<&DeviceLora>]) -> Option<DeviceFusedLora> {
        let ranks: usize = layers.iter().flatten().map(|l| l.padded).sum();
        let total: usize = fused.outputs.iter().sum();
        if ranks == 0 {
            return None;
        }
        let (a, b) = (self.memory_of(ranks * fused.inputs, self.precision), self.memory_of(total * ranks, self.precision));
        let mut places = Vec::new();
        let (mut first_rank, mut first_output) = (0, 0);
        self.fill_memory(&b);
        for (i, (lora, &outputs)) in layers.iter().zip(&fused.outputs).enumerate() {
            if let Some(lora) = lora {
                self.copy_into(&a.part(first_rank * fused.inputs, lora.padded * fused.inputs), &lora.a);
                self.copy_rows(b.at(first_output * ranks + first_rank), ranks, lora.b.pointer(), lora.padded, outputs, lora.padded);
                places.push((i, first_output, first_rank, lora.rank));
                first_rank += lora.padded;
            }
            first_output += outputs;
        }
        Some(DeviceFusedLora { a, b, ranks, layers: places })
    }

    /// Rows of `width` values of the device's precision.
    fn copy_rows(&self, to: u64, to_stride: usize, from: u64, from_stride: usize, rows: usize, width: usize) {
        let bytes = self.precision.bytes();
        let copy = CUDA_MEMCPY2D_st {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcPitch: from_stride * bytes,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstPitch: to_stride * bytes,
            WidthInBytes: width * bytes,
            Height: rows,
        };
        self.driver.bind();
        // SAFETY: both matrices have this many rows at their strides; callers lay them out.
        must(check("copy rows", unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.driver.stream()) }));
    }

    /// See [`crate::kernels::Device::fused_forward`]; the results are columns of one matrix.
    pub(in crate::kernels) fn fused_forward(
        &self,
        rows: usize,
        x: &Memory,
        fused: &DeviceFusedLinear,
        lora: Option<(&DeviceFusedLora, f32)>,
    ) -> (Vec<Memory>, Option<Memory>) {
        let (k, n) = (fused.inputs, fused.outputs.iter().sum::<usize>());
        assert_eq!(x.len(), rows * k, "should be [rows, inputs]");
        let y = self.memory_of(rows * n, self.precision);
        self.frozen_matmul((rows, n, k), x, Operand::transposed(&fused.weight.values(self), k), &y, false, Some(&fused.bias));
        let t = lora.map(|(lora, scale)| {
            let r = lora.ranks;
            let t = self.memory_of(rows * r, self.precision);
            self.product((rows, r, k), Operand::stored(x, k), Operand::transposed(&lora.a, k), Operand::stored(&t, r), (scale, 0.0), None);
            self.product((rows, n, r), Operand::stored(&t, r), Operand::transposed(&lora.b, r), Operand::stored(&y, n), (1.0, 1.0), None);
            t
        });
        let mut first = 0;
        let mut parts = Vec::with_capacity(fused.outputs.len());
        for &outputs in &fused.outputs {
            parts.push(y.columns(first, outputs, n));
            first += outputs;
        }
        (parts, t)
    }

    /// The backward of [`Cuda::fused_forward`]: `dy` [rows, Σ outputs] has the gradients of the parts side by side. Adds LoRA's gradients to those of the layers given (A's and B's of each layer with LoRA, and its scale).
    pub(in crate::kernels) fn fused_backward(
        &self,
        rows: usize,
        dy: &Memory,
        fused: &DeviceFusedLinear,
        lora: Option<(&DeviceFusedLora, &Memory, &Memory)>,
        dx: Option<&mut Memory>,
        gradients: &[(&Memory, &Memory, f32)],
    ) {
        let (n, k) = (fused.inputs, fused.outputs.iter().sum::<usize>());
        assert_eq!(dy.len(), rows * k, "should be [rows, outputs of all]");
        if let Some(dx) = &dx {
            assert_eq!(dx.len(), rows * n, "should be [rows, inputs]");
            self.frozen_matmul((rows, n, k), dy, Operand::stored(&fused.weight.values(self), n), dx, false, None);
        }
        let Some((lora, x, t)) = lora else { return };
        let r = lora.ranks;
        let dt = self.memory_of(rows * r, self.precision);
        self.product((rows, r, k), Operand::stored(dy, k), Operand::stored(&lora.b, r), Operand::stored(&dt, r), (1.0, 0.0), None);
        if let Some(dx) = dx {
            self.product((rows, n, r), Operand::stored(&dt, r), Operand::stored(&lora.a, n), Operand::stored(dx, n), (1.0, 1.0), None);
        }
        assert_eq!(gradients.len(), lora.layers.len(), "should be those of the layers with LoRA");
        let mut parts = Vec::new();
        for (&(place, first_output, first_rank, rank), &(da, db, scale)) in lora.layers.iter().zip(gradients) {
            let (outputs, padded) = (fused.outputs[place], rank.next_multiple_of(RANK));
            let (t, dt) = (t.columns(first_rank, padded, r), dt.columns(first_rank, padded, r));
            parts.push((x.part(0, x.len()), n, dt, padded, rank, da, (n, 1), 1.0));
            parts.push((dy.columns(first_output, outputs, k), outputs, t, padded, rank, db, (1, rank), scale));
        }
        let products = parts.iter().map(|p| SkinnyGemm { x: &p.0, n: p.1, t: &p.2, padded: p.3, ranks: p.4, to: p.5, strides: p.6, scale: p.7 });
        self.lora_products(rows, &products.collect::<Vec<_>>());
    }
}
