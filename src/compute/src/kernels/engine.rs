//! The operations that layers are made of, on the engine's device.

use std::sync::Arc;

use rayon::prelude::*;

use super::cpu::attention::{self, Streams};
use super::cpu::{gemm::Packed, linear, norm, pointwise};
use super::operands::{AttentionShape, Factors, Frozen, FrozenMatrix, Joint, LoraMatrix, Modulation, NormStats, Qkv};
use super::pool::{Buffer, Pool};
use super::{DeviceError, Precision};
use finetune_common::rng::{Purpose, Stream};

pub use super::cpu::linear::StoredMatrix;

/// Runs operations on one device and keeps its memory for reuse. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {
    pub(super) backend: Backend,
}

#[derive(Debug, Clone)]
pub(super) enum Backend {
    Cpu(Arc<Pool>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<super::cuda::Device>),
}

/// Returns what the GPU's operation returns, if the engine is on one.
macro_rules! on_gpu {
    ($engine:expr, $gpu:ident => $operation:expr) => {
        #[cfg(feature = "cuda")]
        if let $crate::kernels::engine::Backend::Cuda($gpu) = &$engine.backend {
            return $operation;
        }
    };
}

pub(super) use on_gpu;

impl Engine {
    /// The engine of the CPU.
    pub fn cpu() -> Self {
        Self { backend: Backend::Cpu(Arc::default()) }
    }

    /// The engine of a GPU, computing in this precision.
    ///
    /// # Errors
    /// If this build has no kernels for it, or the driver, a library or the device does not do.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "used with the feature"))]
    pub fn cuda(ordinal: i32, precision: Precision) -> Result<Self, DeviceError> {
        #[cfg(feature = "cuda")]
        return Ok(Self { backend: Backend::Cuda(Arc::new(super::cuda::Device::open(ordinal, precision)?)) });
        #[cfg(not(feature = "cuda"))]
        Err(DeviceError::NotBuilt)
    }

    /// The same device and memory, computing in another precision. The CPU computes in f32 whatever is asked.
    ///
    /// # Errors
    /// If the device cannot compute in it.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "used with the feature"))]
    pub fn in_precision(&self, precision: Precision) -> Result<Self, DeviceError> {
        on_gpu!(self, gpu => Ok(Self { backend: Backend::Cuda(Arc::new(gpu.in_precision(precision)?)) }));
        Ok(self.clone())
    }

    /// Whether it computes on a GPU.
    pub fn is_cuda(&self) -> bool {
        on_gpu!(self, _gpu => true);
        false
    }

    /// The operations of optimizers, if the engine is on a GPU.
    #[cfg(feature = "cuda")]
    pub fn update_ops(&self) -> Option<super::UpdateOps<'_>> {
        match &self.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(gpu) => Some(super::UpdateOps(gpu)),
        }
    }

    /// What it computes in.
    pub fn precision(&self) -> Precision {
        on_gpu!(self, gpu => gpu.precision());
        Precision::F32
    }

    fn pool(&self) -> &Arc<Pool> {
        match &self.backend {
            Backend::Cpu(pool) => pool,
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => unreachable!("host memory of a GPU's engine"),
        }
    }

    /// The device's name and compute capability, if it is a GPU.
    pub fn describe(&self) -> Option<(String, (i32, i32))> {
        on_gpu!(self, gpu => Some(gpu.describe()));
        None
    }

    /// Most bytes of a GPU's memory that buffers may take, in use or kept for reuse.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "used with the feature"))]
    pub fn set_memory_cap(&self, bytes: usize) {
        on_gpu!(self, gpu => gpu.set_cap(bytes));
    }

    /// The most bytes that buffers took at once so far, on a GPU.
    pub fn peak_memory(&self) -> usize {
        on_gpu!(self, gpu => gpu.peak());
        0
    }

    /// Bytes (free, total) of a GPU's memory, as its driver says.
    pub fn device_memory(&self) -> Option<(usize, usize)> {
        on_gpu!(self, gpu => Some(gpu.memory()));
        None
    }

    /// Waits until the device has done all that was asked.
    pub fn synchronize(&self) {
        on_gpu!(self, gpu => gpu.synchronize());
    }

    /// This point in the device's work, for timing. None on the CPU.
    #[cfg(feature = "cuda")]
    pub fn timer(&self) -> Option<super::Timer> {
        on_gpu!(self, gpu => Some(gpu.timer()));
        None
    }

    /// Begins to time every kernel on a GPU.
    pub fn start_profile(&self) {
        on_gpu!(self, gpu => gpu.start_profile());
    }

    /// Ends it: each kind of kernel with its calls and milliseconds, longest first.
    pub fn end_profile(&self) -> Vec<(String, usize, f64)> {
        on_gpu!(self, gpu => gpu.end_profile());
        Vec::new()
    }

    /// `len` values of any content.
    pub fn alloc(&self, len: usize) -> Buffer {
        on_gpu!(self, gpu => gpu.alloc(len));
        Buffer::new(self.pool(), len)
    }

    /// `len` zeros.
    pub fn zeros(&self, len: usize) -> Buffer {
        let mut buffer = self.alloc(len);
        self.clear(&mut buffer);
        buffer
    }

    /// `len` zeros in f32, whatever the precision: where sums are kept.
    pub fn zeros_f32(&self, len: usize) -> Buffer {
        on_gpu!(self, gpu => {
            let mut buffer = gpu.alloc_f32(len);
            gpu.fill_zero(&mut buffer);
            buffer
        });
        self.zeros(len)
    }

    /// Sets all values to zero.
    pub fn clear(&self, buffer: &mut Buffer) {
        on_gpu!(self, gpu => gpu.fill_zero(buffer));
        buffer.host_mut().fill(0.0);
    }

    /// A copy of host values on the device, in the engine's precision.
    pub fn upload(&self, values: &[f32]) -> Buffer {
        on_gpu!(self, gpu => gpu.upload(values));
        let mut buffer = self.alloc(values.len());
        buffer.host_mut().copy_from_slice(values);
        buffer
    }

    /// A copy on the host.
    pub fn download(&self, buffer: &Buffer) -> Vec<f32> {
        on_gpu!(self, gpu => gpu.download(buffer));
        buffer.host().to_vec()
    }

    /// A copy on the device.
    pub fn copy(&self, buffer: &Buffer) -> Buffer {
        on_gpu!(self, gpu => gpu.copy(buffer));
        self.upload(buffer.host())
    }

    /// Gives memory that is not in use back to the system.
    pub fn trim(&self) {
        on_gpu!(self, gpu => gpu.trim());
        self.pool().clear();
    }

    /// A frozen weight W [outputs, inputs] from host values, kept in the form that is fastest.
    pub fn frozen(&self, outputs: usize, inputs: usize, values: &[f32]) -> FrozenMatrix {
        on_gpu!(self, gpu => FrozenMatrix(Frozen::Device(super::cuda::DeviceWeight::new(outputs, inputs, gpu.upload(values)))));
        FrozenMatrix(Frozen::Host(linear::Weight::Packed {
            forward: Packed::transposed(outputs, inputs, values),
            backward: Packed::new(outputs, inputs, values, inputs, 1, 1.0),
        }))
    }

    /// A frozen weight W [outputs, inputs] that stays where it is stored and is converted in passing (on a GPU: copied there).
    pub fn frozen_stored(&self, outputs: usize, inputs: usize, matrix: Arc<dyn StoredMatrix>) -> FrozenMatrix {
        on_gpu!(self, gpu => {
            if let Some((precision, bytes)) = matrix.stored() {
                return FrozenMatrix(Frozen::Device(super::cuda::DeviceWeight::new(outputs, inputs, gpu.upload_stored(bytes, precision))));
            }
            let mut values = vec![0.0; outputs * inputs];
            matrix.read_block(0..outputs, 0..inputs, &mut values);
            self.frozen(outputs, inputs, &values)
        });
        FrozenMatrix(Frozen::Host(linear::Weight::Stored { matrix, outputs, inputs }))
    }

    /// As [`Engine::frozen_stored`], for an engine of f32 beside a model in `model`: on a GPU the weight takes half precision there, too,
    /// as it is stored if it is stored so, and is multiplied with f32 all the same.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "used with the feature"))]
    pub fn frozen_kept(&self, outputs: usize, inputs: usize, matrix: Arc<dyn StoredMatrix>, model: Precision) -> FrozenMatrix {
        #[cfg(feature = "cuda")]
        if let Backend::Cuda(gpu) = &self.backend
            && model != Precision::F32
            && let Some((stored, bytes)) = matrix.stored()
        {
            // f16 has more digits, and no weight needs bf16's range; a GPU whose model is in f16 may have no bf16.
            let kind = if (stored, model) == (Precision::Bf16, Precision::Bf16) { stored } else { Precision::F16 };
            return FrozenMatrix(Frozen::Device(super::cuda::DeviceWeight::new(outputs, inputs, gpu.upload_stored_as(bytes, stored, kind))));
        }
        self.frozen_stored(outputs, inputs, matrix)
    }

    /// LoRA factors: A [rank, inputs], B [outputs, rank], and the scale (alpha / rank) that B carries.
    pub fn lora(&self, rank: usize, inputs: usize, outputs: usize, a: &[f32], b: &[f32], scale: f32) -> LoraMatrix {
        on_gpu!(self, gpu => LoraMatrix(Factors::Device(gpu.lora(rank, inputs, outputs, a, b, scale))));
        LoraMatrix(Factors::Host(linear::Lora::new(rank, inputs, outputs, a, b, scale)))
    }

    /// `y = bias + x Wᵀ + s · scale · (x_lora Aᵀ) Bᵀ`, with LoRA given as (factors, x_lora if dropout changed x, s).
    ///
    /// # Shapes
    /// x [rows, in], y [rows, out]; also returns t = s · x_lora Aᵀ [rows, r], which the backward wants (with s = 1).
    pub fn linear(
        &self,
        rows: usize,
        x: &Buffer,
        weight: &FrozenMatrix,
        bias: Option<&Buffer>,
        lora: Option<(&LoraMatrix, Option<&Buffer>, f32)>,
        y: &mut Buffer,
    ) -> Option<Buffer> {
        on_gpu!(self, gpu => gpu.linear(rows, x, weight.device(), bias, lora.map(|(l, dropped, s)| (l.device(), dropped, s)), y));
        let mut t = lora.map(|(l, ..)| self.alloc(rows * l.rank()));
        let side = lora.map(|(l, dropped, s)| (l.host(), dropped.unwrap_or(x).host(), s));
        linear::forward(rows, x.host(), weight.host(), bias.map(Buffer::host), side, t.as_mut().map(Buffer::host_mut), y.host_mut());
        t
    }

    /// The backward of [`Engine::linear`]: `dx (+)= dy W + mask ∘ (scale · dy B A)`; `dx` is (buffer, accumulate).
    ///
    /// Returns `dt = scale · dy B` [rows, r], which [`Engine::lora_gradient`] wants.
    pub fn linear_backward(
        &self,
        rows: usize,
        dy: &Buffer,
        weight: &FrozenMatrix,
        lora: Option<(&LoraMatrix, Option<&Buffer>)>,
        mut dx: Option<(&mut Buffer, bool)>,
    ) -> Option<Buffer> {
        on_gpu!(self, gpu => gpu.linear_backward(rows, dy, weight.device(), lora.map(|(l, mask)| (l.device(), mask)), dx));
        let mut dt = lora.map(|(l, _)| self.alloc(rows * l.rank()));
        let mask = lora.and_then(|(_, mask)| mask);
        let host = dx.as_mut().map(|(dx, accumulate)| (dx.host_mut(), *accumulate));
        linear::backward(rows, dy.host(), weight.host(), lora.map(|(l, _)| l.host()), mask.is_none(), dt.as_mut().map(Buffer::host_mut), host);
        if let (Some((l, _)), Some(mask), Some((dx, _)), Some(dt)) = (lora, mask, dx, &dt) {
            let mut through = self.alloc(dx.len());
            linear::through_a(rows, dt.host(), l.host(), through.host_mut());
            pointwise::multiply(through.host_mut(), mask.host());
            pointwise::add(dx.host_mut(), through.host());
        }
        dt
    }

    /// Adds LoRA's gradients: `dA += dtᵀ x_lora` [r, in], `dB += scale · dyᵀ t` [out, r].
    #[expect(clippy::too_many_arguments, reason = "four operands, two results and their sizes")]
    pub fn lora_gradient(&self, rows: usize, x_lora: &Buffer, dy: &Buffer, t: &Buffer, dt: &Buffer, scale: f32, da: &mut Buffer, db: &mut Buffer) {
        on_gpu!(self, gpu => gpu.lora_gradient(rows, x_lora, dy, t, dt, scale, da, db));
        let (inputs, outputs, rank) = (x_lora.len() / rows, dy.len() / rows, t.len() / rows);
        linear::outer_products(rows, x_lora.host(), inputs, dt.host(), rank, 1.0, true, da.host_mut());
        linear::outer_products(rows, dy.host(), outputs, t.host(), rank, scale, false, db.host_mut());
    }

    /// A dropout mask [batch · tokens, width]: 0 with probability p, else 1 / (1 - p). One random stream per sample, named
    /// by (seed, the sample's name, module).
    pub fn dropout_mask(&self, seed: u64, samples: &[(u64, u64)], module: usize, tokens: usize, width: usize, p: f64) -> Buffer {
        let (kept, p) = ((1.0 / (1.0 - p)) as f32, p as f32);
        let stream = |&(a, b): &(u64, u64)| Stream::new(seed, Purpose::LoraDropout, a, b & 0xffff_ffff | (module as u64) << 32);
        on_gpu!(self, gpu => gpu.dropout_mask(&samples.iter().map(stream).collect::<Vec<_>>(), tokens * width, p, kept));
        let mut mask = self.alloc(samples.len() * tokens * width);
        mask.host_mut().par_chunks_mut(tokens * width).zip(samples).for_each(|(mask, sample)| {
            let mut stream = stream(sample);
            for value in mask {
                *value = if stream.uniform_f32() < p { 0.0 } else { kept };
            }
        });
        mask
    }

    /// `x *= y`.
    pub fn multiply(&self, x: &mut Buffer, y: &Buffer) {
        on_gpu!(self, gpu => gpu.multiply(x, y));
        pointwise::multiply(x.host_mut(), y.host());
    }

    /// `x += y`; y is repeated where x is longer.
    pub fn add(&self, x: &mut Buffer, y: &Buffer) {
        on_gpu!(self, gpu => gpu.add(x, y));
        if x.len() == y.len() { pointwise::add(x.host_mut(), y.host()) } else { pointwise::add_repeated(x.host_mut(), y.host()) }
    }

    /// `y = LN(x) · (1 + scale) + shift` (no affine, ε = 1e-6), shift and scale at these offsets of the modulation, which is f32 as its
    /// gradient is, whatever the precision.
    pub fn modulate(&self, x: &Buffer, m: Modulation<'_>, shift: usize, scale: usize) -> (Buffer, NormStats) {
        on_gpu!(self, gpu => {
            let (y, stats) = gpu.modulate(x, m, shift, scale);
            (y, NormStats(stats))
        });
        let mut y = self.alloc(x.len());
        let mut stats = self.alloc(x.len() / m.width * 2);
        norm::modulate(m.tokens, m.width, x.host(), m.values.host(), m.stride, shift, scale, y.host_mut(), stats.host_mut());
        (y, NormStats(stats))
    }

    /// The backward of [`Engine::modulate`]: adds to `dx`, and to shift and scale in `d_modulation` where given.
    #[expect(clippy::too_many_arguments, reason = "the forward's operands, their gradients and where they lie")]
    pub fn modulate_backward(
        &self,
        x: &Buffer,
        stats: &NormStats,
        m: Modulation<'_>,
        shift: usize,
        scale: usize,
        dy: &Buffer,
        dx: Option<&mut Buffer>,
        d_modulation: Option<&mut Buffer>,
    ) {
        on_gpu!(self, gpu => gpu.modulate_backward(x, &stats.0, m, shift, scale, dy, dx, d_modulation));
        if let Some(dx) = dx {
            norm::modulate_backward(m.tokens, m.width, x.host(), stats.0.host(), m.values.host(), m.stride, scale, dy.host(), dx.host_mut());
        }
        if let Some(d) = d_modulation {
            norm::modulation_gradient(m.tokens, m.width, x.host(), stats.0.host(), dy.host(), d.host_mut(), m.stride, shift, scale);
        }
    }

    /// `x + gate · y`.
    pub fn gate_residual(&self, x: &Buffer, y: &Buffer, m: Modulation<'_>, gate: usize) -> Buffer {
        on_gpu!(self, gpu => gpu.gate_residual(x, y, m, gate));
        let mut out = self.alloc(x.len());
        pointwise::gate_residual(m.tokens, m.width, x.host(), y.host(), m.values.host(), m.stride, gate, out.host_mut());
        out
    }

    /// The backward of [`Engine::gate_residual`]: returns `gate · d_out`; adds `Σ_t y · d_out` to the gate in `d_modulation`
    /// where y and it are given. (The residual's gradient is `d_out`.)
    pub fn gate_backward(&self, d_out: &Buffer, m: Modulation<'_>, gate: usize, d_modulation: Option<(&Buffer, &mut Buffer)>) -> Buffer {
        on_gpu!(self, gpu => gpu.gate_backward(d_out, m, gate, d_modulation));
        let mut dy = self.alloc(d_out.len());
        pointwise::gate_backward(m.tokens, m.width, d_out.host(), m.values.host(), m.stride, gate, dy.host_mut());
        if let Some((y, d)) = d_modulation {
            pointwise::gate_gradient(m.tokens, m.width, y.host(), d_out.host(), d.host_mut(), m.stride, gate);
        }
        dy
    }

    /// GELU, tanh form.
    pub fn gelu(&self, x: &Buffer) -> Buffer {
        on_gpu!(self, gpu => gpu.unary("gelu", x));
        let mut y = self.alloc(x.len());
        pointwise::gelu(x.host(), y.host_mut());
        y
    }

    /// Turns the gradient of [`Engine::gelu`]'s output into that of its input.
    pub fn gelu_backward(&self, x: &Buffer, dy: &mut Buffer) {
        on_gpu!(self, gpu => gpu.unary_backward("gelu_backward", x, dy));
        pointwise::gelu_backward(x.host(), dy.host_mut());
    }

    /// SiLU.
    pub fn silu(&self, x: &Buffer) -> Buffer {
        on_gpu!(self, gpu => gpu.unary("silu", x));
        let mut y = self.alloc(x.len());
        pointwise::silu(x.host(), y.host_mut());
        y
    }

    /// Turns the gradient of [`Engine::silu`]'s output into that of its input.
    pub fn silu_backward(&self, x: &Buffer, dy: &mut Buffer) {
        on_gpu!(self, gpu => gpu.unary_backward("silu_backward", x, dy));
        pointwise::silu_backward(x.host(), dy.host_mut());
    }

    /// RMSNorm of each head with a weight of head_dim values (ε = 1e-6). Also returns each head's reciprocal root.
    pub fn rms_norm(&self, x: &Buffer, weight: &Buffer) -> (Buffer, NormStats) {
        on_gpu!(self, gpu => {
            let (y, rstd) = gpu.rms_norm(x, weight);
            (y, NormStats(rstd))
        });
        let mut y = self.alloc(x.len());
        let mut rstd = self.alloc(x.len() / weight.len());
        norm::rms(x.host(), weight.host(), y.host_mut(), rstd.host_mut());
        (y, NormStats(rstd))
    }

    /// Turns the gradient of [`Engine::rms_norm`]'s output into that of its input x.
    pub fn rms_norm_backward(&self, x: &Buffer, weight: &Buffer, stats: &NormStats, dy: &mut Buffer) {
        on_gpu!(self, gpu => gpu.rms_norm_backward(x, weight, &stats.0, dy));
        norm::rms_backward(x.host(), weight.host(), stats.0.host(), dy.host_mut());
    }

    /// Attention of [image, context] per sample and head, scaled by 1/√head_dim, no mask. Returns the output and the
    /// logarithm of each row's sum of exponentials [batch, heads, tokens].
    pub fn attention(&self, shape: &AttentionShape, q: &Joint<Buffer>, k: &Joint<Buffer>, v: &Joint<Buffer>) -> (Joint<Buffer>, Buffer) {
        on_gpu!(self, gpu => gpu.attention(shape, q, k, v));
        let mut out = Joint { image: self.alloc(q.image.len()), context: q.context.as_ref().map(|c| self.alloc(c.len())) };
        let mut lse = self.alloc(shape.batch * shape.heads * shape.keys());
        attention::forward(shape, q.host(), k.host(), v.host(), out.host_mut(), lse.host_mut());
        (out, lse)
    }

    /// The backward of [`Engine::attention`]: assigns the gradients of q, k and v of both streams.
    pub fn attention_backward(
        &self,
        shape: &AttentionShape,
        (q, k, v): (&Joint<Buffer>, &Joint<Buffer>, &Joint<Buffer>),
        out: &Joint<Buffer>,
        lse: &Buffer,
        d_out: &Joint<Buffer>,
        gradients: &mut Joint<Qkv>,
    ) {
        on_gpu!(self, gpu => gpu.attention_backward(shape, (q, k, v), out, lse, d_out, gradients));
        let Joint { image, context } = gradients;
        let mut unused = self.alloc(0);
        let d_image_q = image.q.as_mut().unwrap_or(&mut unused).host_mut();
        let (d_context_q, d_context_k, d_context_v) = match context {
            Some(Qkv { q, k, v, .. }) => (q.as_mut().map(Buffer::host_mut), Some(k.host_mut()), Some(v.host_mut())),
            None => (None, None, None),
        };
        let d_q = Streams { image: d_image_q, context: d_context_q };
        let d_k = Streams { image: image.k.host_mut(), context: d_context_k };
        let d_v = Streams { image: image.v.host_mut(), context: d_context_v };
        attention::backward(shape, q.host(), k.host(), v.host(), out.host(), lse.host(), d_out.host(), d_q, d_k, d_v);
    }
}
