//! What a device is: its memory, the forms that it keeps weights in, and the operations that networks are made of.
//!
//! The types of a device's memory are its own, so that a buffer of the host cannot reach an operation of a GPU. An operation that a
//! device may do in fewer steps (a fused one) is a provided method, whose default is the plain composition.

use std::fmt;
use std::sync::Arc;

use super::operands::{AttentionShape, Joint, LoraSource, LoraTarget, Modulation, NormStats, Qkv};
use super::picture::{Convolution, GroupNorm, HostConvolution, Picture, Resampling};
use super::text::{LayerSource, TextActivation, TextAttention};
use super::training::{AdamWScalars, CodedMoment, FlowData, FlowSample, PatchLayout, Range};
use super::{DeviceError, Precision, StoredMatrix};

/// Memory of a device: f32 values on the CPU, the device's precision (or f32) on a GPU. Returns to its device's pool when dropped.
pub trait DeviceBuffer: fmt::Debug + Send + Sync {
    /// Number of values.
    fn len(&self) -> usize;

    /// Whether there are no values.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A frozen matrix [outputs, inputs] of the layer that is being computed: on the CPU as it is stored, on a GPU in its memory.
pub trait LayerMatrix: Copy {
    /// Rows.
    fn outputs(&self) -> usize;
}

/// Runs operations and keeps its memory for reuse. Cheap to clone.
///
/// Operations return nothing that reports a device's failure: [`super::catch`] does.
#[expect(clippy::too_many_arguments, clippy::type_complexity, reason = "operands, results and their sizes, in the device's types")]
pub trait Device: Clone + fmt::Debug + Send + Sync + 'static {
    /// Values.
    type Buffer: DeviceBuffer;
    /// Bytes.
    type Bytes: fmt::Debug + Send + Sync;
    /// [`Range`]s.
    type Ranges: fmt::Debug + Send + Sync;
    /// A frozen weight W [outputs, inputs] in the form that products want.
    type Weight: fmt::Debug + Send + Sync;
    /// LoRA factors in the form that products want.
    type Lora: fmt::Debug + Send + Sync;
    /// Layers with the same input as one product: their weights lie below each other. Uninhabited where that is no faster.
    type FusedLinear: fmt::Debug + Send + Sync;
    /// Where every LoRA parameter goes. Uninhabited where they are set one by one.
    type LoraScatter: fmt::Debug + Send + Sync;
    /// Operations that were recorded. Uninhabited where nothing is.
    type Recording: fmt::Debug + Send;
    /// Values on their way to the host.
    type Arrival: fmt::Debug + Send + Sync;
    /// A matrix of a layer of [`Device::stream_layers`].
    type LayerMatrix<'a>: LayerMatrix;

    /// Whether its memory is the host's: stored weights can stay in their file and are converted in passing.
    const IS_HOST: bool;

    // The device.

    /// What it computes in.
    fn precision(&self) -> Precision;

    /// The same device and memory, computing in another precision. The CPU computes in f32 whatever is asked.
    ///
    /// # Errors
    /// If the device cannot compute in it.
    fn in_precision(&self, precision: Precision) -> Result<Self, DeviceError>;

    /// Whether a row of a product has the same bits whatever the number of rows: so on the CPU. A GPU's library chooses its algorithm by the
    /// sizes, so that what must not depend on its company is always multiplied in batches of one size.
    fn is_batch_invariant(&self) -> bool {
        Self::IS_HOST
    }

    /// Name and compute capability of a GPU.
    fn describe(&self) -> Option<(String, (i32, i32))> {
        None
    }

    /// Most bytes of a GPU's memory that buffers may take, in use or kept for reuse.
    fn set_memory_cap(&self, _bytes: usize) {}

    /// The most bytes that buffers took at once so far, on a GPU.
    fn peak_memory(&self) -> usize {
        0
    }

    /// Bytes (free, total) of a GPU's memory, as its driver reports.
    fn device_memory(&self) -> Option<(usize, usize)> {
        None
    }

    /// Gives memory that is not in use back to the system.
    fn trim(&self);

    /// Waits until the device has done all that was asked.
    fn synchronize(&self) {}

    /// Begins to time every kernel on a GPU.
    fn start_profile(&self) {}

    /// Ends it: each kind of kernel with its calls and milliseconds, longest first.
    fn end_profile(&self) -> Vec<(String, usize, f64)> {
        Vec::new()
    }

    // Memory.

    /// `len` values of any content.
    fn alloc(&self, len: usize) -> Self::Buffer;

    /// `len` zeros.
    fn zeros(&self, len: usize) -> Self::Buffer {
        let mut buffer = self.alloc(len);
        self.clear(&mut buffer);
        buffer
    }

    /// `len` zeros in f32, whatever the precision: where sums are kept.
    fn zeros_f32(&self, len: usize) -> Self::Buffer;

    /// Sets all values to zero.
    fn clear(&self, buffer: &mut Self::Buffer);

    /// A copy of host values on the device, in its precision.
    fn upload(&self, values: &[f32]) -> Self::Buffer;

    /// A copy of host values on the device in f32, whatever the precision.
    fn upload_f32(&self, values: &[f32]) -> Self::Buffer;

    /// New values for a buffer, as [`Device::upload`] or [`Device::upload_f32`] would have made it.
    fn overwrite(&self, buffer: &mut Self::Buffer, values: &[f32]);

    /// A copy on the host.
    fn download(&self, buffer: &Self::Buffer) -> Vec<f32>;

    /// The first values to places on the host, one after another.
    fn download_to(&self, buffer: &Self::Buffer, places: &mut [&mut [f32]]);

    /// Begins to copy f32 values to the host, as they are when all that was asked before is done. Nothing waits, and the buffer may change afterwards.
    fn send(&self, buffer: &Self::Buffer) -> Self::Arrival;

    /// What [`Device::send`] sent; waits for it alone, not for what was asked since.
    fn receive(&self, arrival: Self::Arrival) -> Vec<f32>;

    /// A copy on the device.
    fn copy(&self, buffer: &Self::Buffer) -> Self::Buffer;

    /// Bytes on the device; their number is a multiple of four.
    fn upload_bytes(&self, bytes: &[u8]) -> Self::Bytes;

    /// The bytes on the host.
    fn download_bytes(&self, bytes: &Self::Bytes) -> Vec<u8>;

    /// Ranges on the device.
    fn upload_ranges(&self, ranges: &[Range]) -> Self::Ranges;

    // Recording.

    /// Whether [`Device::record`] records: on a GPU whose kernels are not being timed.
    fn records(&self) -> bool {
        false
    }

    /// Does operations, and records them if it can, so that [`Device::replay`] does them again at once. They must neither upload nor
    /// download, and must have been done before with the same sizes. What they return has its values after each replay.
    fn record<T>(&self, operations: impl FnOnce() -> T) -> (T, Option<Self::Recording>) {
        (operations(), None)
    }

    /// Does what was recorded.
    fn replay(&self, recording: &Self::Recording);

    // Linear layers with a frozen weight and LoRA.

    /// A frozen weight W [outputs, inputs] from host values, kept in the form that is fastest.
    fn frozen(&self, outputs: usize, inputs: usize, values: &[f32]) -> Self::Weight;

    /// A frozen weight W [outputs, inputs] that stays where it is stored and is converted in passing (on a GPU: copied there).
    fn frozen_stored(&self, outputs: usize, inputs: usize, matrix: Arc<dyn StoredMatrix>) -> Self::Weight;

    /// As [`Device::frozen_stored`], for a device in f32 beside a model in `model`: on a GPU the weight takes half precision there, too,
    /// as it is stored if it is stored so, and is multiplied with f32 all the same.
    fn frozen_kept(&self, outputs: usize, inputs: usize, matrix: Arc<dyn StoredMatrix>, _model: Precision) -> Self::Weight {
        self.frozen_stored(outputs, inputs, matrix)
    }

    /// A frozen weight W [outputs, inputs] in 8 bits with a scale per output ([`super::Int8Matrix`]), which is widened to the device's precision whenever
    /// it is used.
    fn frozen_int8(&self, outputs: usize, inputs: usize, matrix: Arc<dyn StoredMatrix>) -> Self::Weight;

    /// LoRA factors: A [rank, inputs], B [outputs, rank], and the scale (alpha / rank) that B carries.
    fn lora(&self, rank: usize, inputs: usize, outputs: usize, a: &[f32], b: &[f32], scale: f32) -> Self::Lora;

    /// `y = bias + x Wᵀ + s · scale · (x_lora Aᵀ) Bᵀ`, with LoRA given as (factors, x_lora if dropout changed x, s).
    ///
    /// # Shapes
    /// x [rows, in], y [rows, out]; also returns t = s · x_lora Aᵀ [rows, r], which the backward wants (with s = 1).
    fn linear(
        &self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Weight,
        bias: Option<&Self::Buffer>,
        lora: Option<(&Self::Lora, Option<&Self::Buffer>, f32)>,
        y: &mut Self::Buffer,
    ) -> Option<Self::Buffer>;

    /// The backward of [`Device::linear`]: `dx (+)= dy W + mask ∘ (scale · dy B A)`; `dx` is (buffer, accumulate).
    ///
    /// Returns `dt = scale · dy B` [rows, r], which [`Device::lora_gradient`] wants.
    fn linear_backward(
        &self,
        rows: usize,
        dy: &Self::Buffer,
        weight: &Self::Weight,
        lora: Option<(&Self::Lora, Option<&Self::Buffer>)>,
        dx: Option<(&mut Self::Buffer, bool)>,
    ) -> Option<Self::Buffer>;

    /// Adds LoRA's gradients: `dA += dtᵀ x_lora` [r, in], `dB += scale · dyᵀ t` [out, r], to their places among all `gradients` (f32).
    fn lora_gradient(
        &self,
        rows: usize,
        x_lora: &Self::Buffer,
        dy: &Self::Buffer,
        t: &Self::Buffer,
        dt: &Self::Buffer,
        gradients: &mut Self::Buffer,
        target: &LoraTarget,
    );

    /// `h = x Wᵀ + bias` and its GELU.
    fn linear_gelu(&self, rows: usize, x: &Self::Buffer, weight: &Self::Weight, bias: &Self::Buffer) -> (Self::Buffer, Self::Buffer) {
        plain::linear_gelu(self, rows, x, weight, bias)
    }

    /// Lays the weights [out, in] and biases of layers with the same input together, if that makes them faster here.
    fn fuse(&self, _weights: &mut [&mut Self::Weight], _biases: &mut [&mut Self::Buffer]) -> Option<Self::FusedLinear> {
        None
    }

    /// Sets the LoRA of fused layers: of those that have any.
    fn fuse_lora(&self, fused: &mut Self::FusedLinear, layers: &[Option<&Self::Lora>]);

    /// `y = x Wᵀ + bias + s · scale · (x Aᵀ) Bᵀ` of all layers: y of each, and t = s · x Aᵀ for the backward. s = 0 leaves LoRA out.
    fn fused_forward(&self, rows: usize, x: &Self::Buffer, fused: &Self::FusedLinear, lora_scale: f32) -> (Vec<Self::Buffer>, Option<Self::Buffer>);

    /// Memory for the gradients of a stream's query (if there is one), key and value [rows, width]. `packed`: as columns of one matrix, which
    /// [`Device::fused_backward`] takes.
    fn qkv(&self, rows: usize, width: usize, query: bool, _packed: bool) -> Qkv<Self::Buffer> {
        let part = || self.alloc(rows * width);
        Qkv::separate(query.then(part), part(), part())
    }

    /// The backward of [`Device::fused_forward`] (with s = 1): assigns dx, adds LoRA's gradients to their places among all `gradients` for each
    /// layer that has LoRA. `dy`: the gradients of the results, packed. `lora`: the forward's x and t.
    fn fused_backward(
        &self,
        rows: usize,
        dy: &Qkv<Self::Buffer>,
        fused: &Self::FusedLinear,
        lora: Option<(&Self::Buffer, &Self::Buffer)>,
        dx: Option<&mut Self::Buffer>,
        gradients: &mut Self::Buffer,
        targets: &[LoraTarget],
    );

    /// Where the parameters of all layers with LoRA go, and of the fused layers that they are part of (those with LoRA, in order), so
    /// that [`Device::scatter_lora`] sets them at once. `None`: they are set one by one.
    fn lora_scatter(
        &self,
        _layers: &[(&Self::Lora, LoraSource)],
        _fused_layers: &[(&Self::FusedLinear, Vec<LoraSource>)],
        _parameters: usize,
    ) -> Option<Self::LoraScatter> {
        None
    }

    /// Sets all parameters, f32 values that begin at [`super::flat_offsets`].
    fn scatter_lora(&self, scatter: &Self::LoraScatter, parameters: &Self::Buffer);

    /// A dropout mask [batch · tokens, width]: 0 with probability p, else 1 / (1 - p). One random stream per sample, named
    /// by (seed, the sample's name, module).
    fn dropout_mask(&self, seed: u64, samples: &[(u64, u64)], module: usize, tokens: usize, width: usize, p: f64) -> Self::Buffer;

    // Values one by one.

    /// `x *= y`.
    fn multiply(&self, x: &mut Self::Buffer, y: &Self::Buffer);

    /// `x += y`; y is repeated where x is longer.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer);

    /// GELU, tanh form.
    fn gelu(&self, x: &Self::Buffer) -> Self::Buffer;

    /// Turns the gradient of [`Device::gelu`]'s output into that of its input.
    fn gelu_backward(&self, x: &Self::Buffer, dy: &mut Self::Buffer);

    /// SiLU.
    fn silu(&self, x: &Self::Buffer) -> Self::Buffer;

    /// Turns the gradient of [`Device::silu`]'s output into that of its input.
    fn silu_backward(&self, x: &Self::Buffer, dy: &mut Self::Buffer);

    // Norms and modulation.

    /// `y = LN(x) · (1 + scale) + shift` (no affine, ε = 1e-6), shift and scale at these offsets of the modulation, which is f32 as its
    /// gradient is, whatever the precision.
    fn modulate(&self, x: &Self::Buffer, m: Modulation<'_, Self::Buffer>, shift: usize, scale: usize) -> (Self::Buffer, NormStats<Self::Buffer>);

    /// The backward of [`Device::modulate`]: adds to `dx`, and to shift and scale in `d_modulation` where given.
    fn modulate_backward(
        &self,
        x: &Self::Buffer,
        stats: &NormStats<Self::Buffer>,
        m: Modulation<'_, Self::Buffer>,
        shift: usize,
        scale: usize,
        dy: &Self::Buffer,
        dx: Option<&mut Self::Buffer>,
        d_modulation: Option<&mut Self::Buffer>,
    );

    /// `x + gate · y`.
    fn gate_residual(&self, x: &Self::Buffer, y: &Self::Buffer, m: Modulation<'_, Self::Buffer>, gate: usize) -> Self::Buffer;

    /// The backward of [`Device::gate_residual`]: returns `gate · d_out`; adds `Σ_t y · d_out` to the gate in `d_modulation`
    /// where y and it are given. (The residual's gradient is `d_out`.)
    fn gate_backward(
        &self,
        d_out: &Self::Buffer,
        m: Modulation<'_, Self::Buffer>,
        gate: usize,
        d_modulation: Option<(&Self::Buffer, &mut Self::Buffer)>,
    ) -> Self::Buffer;

    /// [`Device::gate_residual`] and [`Device::modulate`] of its result: (x + gate · branch, its modulation, the statistics).
    fn gate_modulate(
        &self,
        x: &Self::Buffer,
        branch: &Self::Buffer,
        m: Modulation<'_, Self::Buffer>,
        gate: usize,
        shift: usize,
        scale: usize,
    ) -> (Self::Buffer, Self::Buffer, NormStats<Self::Buffer>) {
        plain::gate_modulate(self, x, branch, m, gate, shift, scale)
    }

    /// [`Device::modulate_backward`] into dx, then `gate · dx` as [`Device::gate_backward`] gives it.
    fn modulate_gate_backward(
        &self,
        x: &Self::Buffer,
        stats: &NormStats<Self::Buffer>,
        m: Modulation<'_, Self::Buffer>,
        shift: usize,
        scale: usize,
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
        gate: usize,
    ) -> Self::Buffer {
        self.modulate_backward(x, stats, m, shift, scale, dy, Some(&mut *dx), None);
        self.gate_backward(dx, m, gate, None)
    }

    /// RMSNorm of each head with a weight of head_dim values (ε = 1e-6). Also returns each head's reciprocal root.
    fn rms_norm(&self, x: &Self::Buffer, weight: &Self::Buffer) -> (Self::Buffer, NormStats<Self::Buffer>);

    /// Turns the gradient of [`Device::rms_norm`]'s output into that of its input x.
    fn rms_norm_backward(&self, x: &Self::Buffer, weight: &Self::Buffer, stats: &NormStats<Self::Buffer>, dy: &mut Self::Buffer);

    // Attention.

    /// Attention of [image, context] per sample and head, scaled by 1/√head_dim, no mask. Returns the output and the
    /// logarithm of each row's sum of exponentials [batch, heads, tokens].
    fn attention(
        &self,
        shape: &AttentionShape,
        q: &Joint<Self::Buffer>,
        k: &Joint<Self::Buffer>,
        v: &Joint<Self::Buffer>,
    ) -> (Joint<Self::Buffer>, Self::Buffer);

    /// The backward of [`Device::attention`]: assigns the gradients of q, k and v of both streams.
    fn attention_backward(
        &self,
        shape: &AttentionShape,
        qkv: (&Joint<Self::Buffer>, &Joint<Self::Buffer>, &Joint<Self::Buffer>),
        out: &Joint<Self::Buffer>,
        lse: &Self::Buffer,
        d_out: &Joint<Self::Buffer>,
        gradients: &mut Joint<Qkv<Self::Buffer>>,
    );

    // The loss of flow matching.

    /// The loss of flow matching on an output of patches, where it is: its gradient, and per sample Σ weight · difference² in parts
    /// (pairs of f32 whose sum is the part).
    fn flow_loss(&self, out: &Self::Buffer, target: &FlowData<Self::Buffer>, layout: PatchLayout, preconditioned: bool) -> (Self::Buffer, Self::Buffer);

    /// What [`Device::flow_loss`] compares with: latents and noise [B, n], one after another.
    fn flow_data(&self, x0: &[f32], noise: &[f32], samples: &[FlowSample]) -> FlowData<Self::Buffer> {
        let words = self.upload_f32(&FlowSample::words(samples));
        FlowData { x0: self.upload_f32(x0), noise: self.upload_f32(noise), words, samples: samples.to_vec() }
    }

    /// New values of the same sizes.
    fn overwrite_flow_data(&self, data: &mut FlowData<Self::Buffer>, x0: &[f32], noise: &[f32], samples: &[FlowSample]) {
        self.overwrite(&mut data.x0, x0);
        self.overwrite(&mut data.noise, noise);
        self.overwrite(&mut data.words, &FlowSample::words(samples));
        data.samples.clear();
        data.samples.extend_from_slice(samples);
    }

    // What happens to parameters between the last backward of an update and the next forward. All is f32.

    /// `sum += factor · x`.
    fn add_scaled(&self, sum: &mut Self::Buffer, x: &Self::Buffer, factor: f32);

    /// Σ x² in f64, in a fixed order.
    fn square_sum(&self, x: &Self::Buffer) -> f64;

    /// One update of AdamW with f32 moments.
    fn adamw(&self, values: &mut Self::Buffer, grads: &Self::Buffer, first: &mut Self::Buffer, second: &mut Self::Buffer, scalars: AdamWScalars);

    /// One update of AdamW with moments as codes, or as f32 in the ranges that ask for it. `ranges`: they cover every value once, in order,
    /// and lie within the values and the moments.
    fn adamw_8bit(
        &self,
        values: &mut Self::Buffer,
        grads: &Self::Buffer,
        ranges: &Self::Ranges,
        full: (&mut Self::Buffer, &mut Self::Buffer),
        first: CodedMoment<'_, Self::Buffer, Self::Bytes>,
        second: CodedMoment<'_, Self::Buffer, Self::Bytes>,
        scalars: AdamWScalars,
    );

    // Text encoders. Nothing is kept for a backward: they are not trained. The residual stream is f32 in every precision (in f16 T5's would
    // overflow); products, norms' results and activations have the device's.

    /// Calls `work(index, matrices)` for each layer in order. On a GPU `work` only puts work on the device's stream while the next layer is
    /// copied, and the memory of the matrices is used again after it.
    ///
    /// # Errors
    /// What `work` returns.
    fn stream_layers<E>(
        &self,
        layers: usize,
        source: &dyn LayerSource,
        work: &mut dyn FnMut(usize, &[Self::LayerMatrix<'_>]) -> Result<(), E>,
    ) -> Result<(), E>;

    /// `y = x Wᵀ + bias (+ y)` for x [rows, inputs]. `bias` has y's type.
    fn layer_product(&self, rows: usize, x: &Self::Buffer, w: Self::LayerMatrix<'_>, bias: Option<&Self::Buffer>, y: &mut Self::Buffer, accumulate: bool);

    /// Rows `ids` of a stored table with rows of `width` values, in f32; zeros after them, up to `rows` rows.
    fn embed(&self, table: &dyn StoredMatrix, width: usize, ids: &[u32], rows: usize) -> Self::Buffer;

    /// T5's norm of f32 rows: x / √(mean(x²) + ε) · weight, in the device's precision.
    fn rms_norm_rows(&self, x: &Self::Buffer, weight: &Self::Buffer, epsilon: f32) -> Self::Buffer;

    /// CLIP's norm of f32 rows: (x - mean) / √(var + ε) · weight + bias, in the device's precision.
    fn layer_norm(&self, x: &Self::Buffer, weight: &Self::Buffer, bias: &Self::Buffer, epsilon: f32) -> Self::Buffer;

    /// gelu(a) · b (tanh form) of the halves (a, b) of each row of x [rows, 2 · width].
    fn gated_gelu(&self, x: &Self::Buffer, width: usize) -> Self::Buffer;

    /// CLIP's activation, in place.
    fn activate(&self, x: &mut Self::Buffer, activation: TextActivation);

    /// Attention of each caption with itself: softmax(scale · q kᵀ + bias) v for qkv [captions · tokens, 3 · heads · dim], `bias`
    /// [heads, tokens, tokens] in f32.
    fn text_attention(&self, shape: TextAttention, qkv: &Self::Buffer, bias: Option<&Self::Buffer>) -> Self::Buffer;

    // The autoencoder, on one picture at a time. Nothing is kept for a backward: it is not trained. How a picture lies in memory is the
    // device's matter.

    /// As many channels or a few more, which are zeros: rows that the device reads well. For pictures and latents at the network's ends.
    fn padded_channels(&self, channels: usize) -> usize {
        channels
    }

    /// A convolution's weights on the device, for pictures of `padded` (inputs, outputs) channels.
    fn convolution(&self, host: HostConvolution<'_>, padded: (usize, usize), resampling: Resampling) -> Convolution<Self::Buffer>;

    /// A group norm's weights on the device.
    fn group_norm(&self, groups: usize, weight: &[f32], bias: &[f32], epsilon: f32) -> GroupNorm<Self::Buffer> {
        GroupNorm { weight: self.upload_f32(weight), bias: self.upload_f32(bias), groups, epsilon }
    }

    /// Host values [channels, height, width] as a picture of `padded` channels.
    fn upload_picture(&self, values: &[f32], size: (usize, usize, usize), padded: usize) -> Picture<Self::Buffer>;

    /// The first `channels` channels as host values [channels, height, width].
    fn download_picture(&self, x: &Picture<Self::Buffer>, channels: usize) -> Vec<f32>;

    /// The convolution of x, added to `onto` where given.
    fn convolve(&self, x: &Picture<Self::Buffer>, convolution: &Convolution<Self::Buffer>, onto: Option<Picture<Self::Buffer>>) -> Picture<Self::Buffer>;

    /// The group norm of x; with `silu` its SiLU.
    fn normalise(&self, x: &Picture<Self::Buffer>, norm: &GroupNorm<Self::Buffer>, silu: bool) -> Picture<Self::Buffer>;

    /// Attention of one head over all pixels of a picture with the channels of q, k and v, scaled by 1/√(channels of one).
    fn picture_attention(&self, qkv: &Picture<Self::Buffer>) -> Picture<Self::Buffer>;
}

/// Fused operations as compositions of plain ones, for devices that fuse them only for some sizes.
pub(super) mod plain {
    use super::{Device, DeviceBuffer as _, Modulation, NormStats};

    pub(in crate::kernels) fn linear_gelu<D: Device>(device: &D, rows: usize, x: &D::Buffer, weight: &D::Weight, bias: &D::Buffer) -> (D::Buffer, D::Buffer) {
        let mut h = device.alloc(rows * bias.len());
        device.linear(rows, x, weight, Some(bias), None, &mut h);
        let y = device.gelu(&h);
        (h, y)
    }

    pub(in crate::kernels) fn gate_modulate<D: Device>(
        device: &D,
        x: &D::Buffer,
        branch: &D::Buffer,
        m: Modulation<'_, D::Buffer>,
        gate: usize,
        shift: usize,
        scale: usize,
    ) -> (D::Buffer, D::Buffer, NormStats<D::Buffer>) {
        let out = device.gate_residual(x, branch, m, gate);
        let (y, stats) = device.modulate(&out, m, shift, scale);
        (out, y, stats)
    }
}
