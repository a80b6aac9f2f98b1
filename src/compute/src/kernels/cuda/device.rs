//! The GPU as a device: which kernels each operation runs.

use std::sync::Arc;

use super::fused_linear::DeviceFusedLora;
use super::{Arrival, Cuda, DeviceFusedLinear, DeviceGraph, DeviceLora, DeviceRanges, DeviceScatter, DeviceWeight, Matrix, Memory, Timer};
use crate::kernels::cpu::device::dropout_stream;
use crate::kernels::device::plain;
use crate::kernels::{
    AdamWScalars, AttentionShape, CodedMoment, Convolution, Device, DeviceBuffer, DeviceError, FlowData, GroupNorm, HostConvolution, Joint, LayerMatrix,
    LayerSource, LoraSource, LoraTarget, Modulation, NormStats, PatchLayout, Picture, Precision, Qkv, Range, Resampling, StoredMatrix, TextActivation,
    TextAttention,
};

/// Layers with one input as one product, with their LoRA.
#[derive(Debug)]
pub struct FusedLayers {
    weights: DeviceFusedLinear,
    lora: Option<DeviceFusedLora>,
}

impl DeviceBuffer for Memory {
    fn len(&self) -> usize {
        Self::len(self)
    }
}

impl LayerMatrix for Matrix<'_> {
    fn outputs(&self) -> usize {
        self.outputs
    }
}

impl Cuda {
    /// GPU `ordinal`, computing in this precision.
    ///
    /// # Errors
    /// If the driver, a library or the device does not do.
    pub fn open(ordinal: i32, precision: Precision) -> Result<Self, DeviceError> {
        Ok(Self::open_driver(ordinal, precision)?)
    }

    /// The codes [outputs, inputs] and scales `[outputs]` of a weight in 8 bits.
    pub fn int8_codes(&self, weight: &<Self as Device>::Weight) -> Option<(Vec<i8>, Vec<f32>)> {
        self.codes_of(weight)
    }

    /// This point in the device's work, for timing.
    pub fn timer(&self) -> Timer {
        Timer::now(&self.driver)
    }
}

impl Device for Cuda {
    type Buffer = Memory;
    /// As words of four.
    type Bytes = Memory;
    type Ranges = DeviceRanges;
    type Weight = DeviceWeight;
    type Lora = DeviceLora;
    type FusedLinear = FusedLayers;
    type LoraScatter = DeviceScatter;
    type Recording = DeviceGraph;
    type Arrival = Arrival;
    type LayerMatrix<'a> = Matrix<'a>;

    const IS_HOST: bool = false;

    fn precision(&self) -> Precision {
        self.precision
    }

    fn in_precision(&self, precision: Precision) -> Result<Self, DeviceError> {
        Ok(self.with_precision(precision)?)
    }

    fn describe(&self) -> Option<(String, (i32, i32))> {
        Some((self.driver.name.clone(), self.driver.capability))
    }

    fn set_memory_cap(&self, bytes: usize) {
        self.pool.set_cap(bytes);
    }

    fn peak_memory(&self) -> usize {
        self.pool.peak()
    }

    fn device_memory(&self) -> Option<(usize, usize)> {
        Some(self.memory())
    }

    fn trim(&self) {
        self.pool.trim();
    }

    fn synchronize(&self) {
        self.driver.synchronize();
    }

    fn start_profile(&self) {
        self.driver.start_profile();
    }

    fn end_profile(&self) -> Vec<(String, usize, f64)> {
        self.driver.end_profile()
    }

    fn alloc(&self, len: usize) -> Memory {
        self.memory_of(len, self.precision)
    }

    fn zeros_f32(&self, len: usize) -> Memory {
        let buffer = self.memory_of(len, Precision::F32);
        self.fill_memory(&buffer);
        buffer
    }

    fn clear(&self, buffer: &mut Memory) {
        self.fill_memory(buffer);
    }

    fn upload(&self, values: &[f32]) -> Memory {
        self.upload_as(values, self.precision)
    }

    fn upload_f32(&self, values: &[f32]) -> Memory {
        self.upload_values(values)
    }

    fn overwrite(&self, buffer: &mut Memory, values: &[f32]) {
        self.overwrite(buffer, values);
    }

    fn download(&self, buffer: &Memory) -> Vec<f32> {
        self.download(buffer)
    }

    fn download_to(&self, buffer: &Memory, places: &mut [&mut [f32]]) {
        self.download_to(buffer, places);
    }

    fn send(&self, buffer: &Memory) -> Arrival {
        self.send(buffer)
    }

    fn receive(&self, arrival: Arrival) -> Vec<f32> {
        arrival.receive()
    }

    fn copy(&self, buffer: &Memory) -> Memory {
        self.copy(buffer)
    }

    fn upload_bytes(&self, bytes: &[u8]) -> Memory {
        self.upload_words(bytes)
    }

    fn download_bytes(&self, bytes: &Memory) -> Vec<u8> {
        self.download_words(bytes)
    }

    fn upload_ranges(&self, ranges: &[Range]) -> DeviceRanges {
        self.upload_ranges(ranges)
    }

    fn records(&self) -> bool {
        !self.driver.is_profiling()
    }

    fn record<T>(&self, operations: impl FnOnce() -> T) -> (T, Option<DeviceGraph>) {
        let (result, graph) = self.capture(operations);
        self.replay(&graph);
        (result, Some(graph))
    }

    fn replay(&self, recording: &DeviceGraph) {
        self.replay(recording);
    }

    fn frozen(&self, outputs: usize, inputs: usize, values: &[f32]) -> DeviceWeight {
        DeviceWeight::new(outputs, inputs, self.upload_as(values, self.precision))
    }

    fn frozen_stored(&self, outputs: usize, inputs: usize, matrix: Arc<dyn StoredMatrix>) -> DeviceWeight {
        if let Some((precision, bytes)) = matrix.stored() {
            return DeviceWeight::new(outputs, inputs, self.upload_stored(bytes, precision, self.precision));
        }
        let mut values = vec![0.0; outputs * inputs];
        matrix.read_block(0..outputs, 0..inputs, &mut values);
        self.frozen(outputs, inputs, &values)
    }

    fn frozen_kept(&self, outputs: usize, inputs: usize, matrix: Arc<dyn StoredMatrix>, model: Precision) -> DeviceWeight {
        if model != Precision::F32
            && let Some((stored, bytes)) = matrix.stored()
        {
            // f16 has more digits, and no weight needs bf16's range; a GPU whose model is in f16 may have no bf16.
            let kind = if (stored, model) == (Precision::Bf16, Precision::Bf16) { stored } else { Precision::F16 };
            return DeviceWeight::new(outputs, inputs, self.upload_stored(bytes, stored, kind));
        }
        self.frozen_stored(outputs, inputs, matrix)
    }

    fn frozen_int8(&self, outputs: usize, inputs: usize, matrix: Arc<dyn StoredMatrix>) -> DeviceWeight {
        let values = if let Some((stored, bytes)) = matrix.stored() {
            // Exact, and older GPUs have no kernels for bf16.
            self.upload_stored(bytes, stored, if stored == Precision::Bf16 { Precision::F32 } else { stored })
        } else {
            let mut values = vec![0.0; outputs * inputs];
            matrix.read_block(0..outputs, 0..inputs, &mut values);
            self.upload_values(&values)
        };
        DeviceWeight::int8(outputs, inputs, self.quantize(outputs, inputs, &values))
    }

    fn lora(&self, rank: usize, inputs: usize, outputs: usize, a: &[f32], b: &[f32], scale: f32) -> DeviceLora {
        self.lora(rank, inputs, outputs, a, b, scale)
    }

    fn linear(
        &self,
        rows: usize,
        x: &Memory,
        weight: &DeviceWeight,
        bias: Option<&Memory>,
        lora: Option<(&DeviceLora, Option<&Memory>, f32)>,
        y: &mut Memory,
    ) -> Option<Memory> {
        self.linear(rows, x, weight, bias, lora, y)
    }

    fn linear_backward(
        &self,
        rows: usize,
        dy: &Memory,
        weight: &DeviceWeight,
        lora: Option<(&DeviceLora, Option<&Memory>)>,
        dx: Option<(&mut Memory, bool)>,
    ) -> Option<Memory> {
        self.linear_backward(rows, dy, weight, lora, dx)
    }

    fn lora_gradient(&self, rows: usize, x_lora: &Memory, dy: &Memory, t: &Memory, dt: &Memory, gradients: &mut Memory, target: &LoraTarget) {
        let (mut da, mut db) = (gradients.part(target.a.start, target.a.len()), gradients.part(target.b.start, target.b.len()));
        self.lora_gradient(rows, x_lora, dy, t, dt, target.scale, &mut da, &mut db);
    }

    fn linear_gelu(&self, rows: usize, x: &Memory, weight: &DeviceWeight, bias: &Memory) -> (Memory, Memory) {
        self.linear_gelu(rows, x, weight, bias).unwrap_or_else(|| plain::linear_gelu(self, rows, x, weight, bias))
    }

    fn fuse(&self, weights: &mut [&mut DeviceWeight], biases: &mut [&mut Memory]) -> Option<FusedLayers> {
        self.fuse(weights, biases).map(|weights| FusedLayers { weights, lora: None })
    }

    fn fuse_lora(&self, fused: &mut FusedLayers, layers: &[Option<&DeviceLora>]) {
        fused.lora = self.fuse_lora(&fused.weights, layers);
    }

    fn fused_forward(&self, rows: usize, x: &Memory, fused: &FusedLayers, lora_scale: f32) -> (Vec<Memory>, Option<Memory>) {
        self.fused_forward(rows, x, &fused.weights, fused.lora.as_ref().filter(|_| lora_scale != 0.0).map(|l| (l, lora_scale)))
    }

    fn qkv(&self, rows: usize, width: usize, query: bool, packed: bool) -> Qkv<Memory> {
        if packed {
            return self.packed_qkv(rows, width, query);
        }
        let part = || self.memory_of(rows * width, self.precision);
        Qkv::separate(query.then(part), part(), part())
    }

    fn fused_backward(
        &self,
        rows: usize,
        dy: &Qkv<Memory>,
        fused: &FusedLayers,
        lora: Option<(&Memory, &Memory)>,
        dx: Option<&mut Memory>,
        gradients: &mut Memory,
        targets: &[LoraTarget],
    ) {
        let Some(dy) = &dy.packed else { return };
        let lora = fused.lora.as_ref().zip(lora).map(|(l, (x, t))| (l, x, t));
        let part = |place: &std::ops::Range<usize>| gradients.part(place.start, place.len());
        let places: Vec<_> = targets.iter().map(|target| (part(&target.a), part(&target.b), target.scale)).collect();
        let places: Vec<_> = places.iter().map(|(a, b, scale)| (a, b, *scale)).collect();
        self.fused_backward(rows, dy, &fused.weights, lora, dx, &places);
    }

    fn lora_scatter(&self, layers: &[(&DeviceLora, LoraSource)], fused_layers: &[(&FusedLayers, Vec<LoraSource>)], parameters: usize) -> Option<DeviceScatter> {
        let fused_layers: Vec<_> = fused_layers.iter().filter_map(|(fused, sources)| Some((&fused.weights, fused.lora.as_ref()?, sources.clone()))).collect();
        Some(self.lora_scatter(layers, &fused_layers, parameters))
    }

    fn scatter_lora(&self, scatter: &DeviceScatter, parameters: &Memory) {
        self.scatter_lora(scatter, parameters);
    }

    fn dropout_mask(&self, seed: u64, samples: &[(u64, u64)], module: usize, tokens: usize, width: usize, p: f64) -> Memory {
        let streams: Vec<_> = samples.iter().map(|sample| dropout_stream(seed, *sample, module)).collect();
        self.dropout_mask(&streams, tokens * width, p as f32, (1.0 / (1.0 - p)) as f32)
    }

    fn multiply(&self, x: &mut Memory, y: &Memory) {
        self.multiply(x, y);
    }

    fn add(&self, x: &mut Memory, y: &Memory) {
        self.add(x, y);
    }

    fn gelu(&self, x: &Memory) -> Memory {
        self.unary("gelu", x)
    }

    fn gelu_backward(&self, x: &Memory, dy: &mut Memory) {
        self.unary_backward("gelu_backward", x, dy);
    }

    fn silu(&self, x: &Memory) -> Memory {
        self.unary("silu", x)
    }

    fn silu_backward(&self, x: &Memory, dy: &mut Memory) {
        self.unary_backward("silu_backward", x, dy);
    }

    fn modulate(&self, x: &Memory, m: Modulation<'_, Memory>, shift: usize, scale: usize) -> (Memory, NormStats<Memory>) {
        let (y, stats) = self.modulate(x, m, shift, scale);
        (y, NormStats(stats))
    }

    fn modulate_backward(
        &self,
        x: &Memory,
        stats: &NormStats<Memory>,
        m: Modulation<'_, Memory>,
        shift: usize,
        scale: usize,
        dy: &Memory,
        dx: Option<&mut Memory>,
        d_modulation: Option<&mut Memory>,
    ) {
        self.modulate_backward(x, &stats.0, m, shift, scale, dy, dx, d_modulation);
    }

    fn gate_residual(&self, x: &Memory, y: &Memory, m: Modulation<'_, Memory>, gate: usize) -> Memory {
        self.gate_residual(x, y, m, gate)
    }

    fn gate_backward(&self, d_out: &Memory, m: Modulation<'_, Memory>, gate: usize, d_modulation: Option<(&Memory, &mut Memory)>) -> Memory {
        self.gate_backward(d_out, m, gate, d_modulation)
    }

    fn gate_modulate(
        &self,
        x: &Memory,
        branch: &Memory,
        m: Modulation<'_, Memory>,
        gate: usize,
        shift: usize,
        scale: usize,
    ) -> (Memory, Memory, NormStats<Memory>) {
        match self.gate_modulate(x, branch, m, gate, shift, scale) {
            Some((out, y, stats)) => (out, y, NormStats(stats)),
            None => plain::gate_modulate(self, x, branch, m, gate, shift, scale),
        }
    }

    fn modulate_gate_backward(
        &self,
        x: &Memory,
        stats: &NormStats<Memory>,
        m: Modulation<'_, Memory>,
        _shift: usize,
        scale: usize,
        dy: &Memory,
        dx: &mut Memory,
        gate: usize,
    ) -> Memory {
        let mut gated = self.memory_of(x.len(), x.kind());
        self.modulate_backward_into(x, &stats.0, m, scale, dy, dx, Some((gate, &mut gated)));
        gated
    }

    fn rms_norm(&self, x: &Memory, weight: &Memory) -> (Memory, NormStats<Memory>) {
        let (y, rstd) = self.rms_norm(x, weight);
        (y, NormStats(rstd))
    }

    fn rms_norm_backward(&self, x: &Memory, weight: &Memory, stats: &NormStats<Memory>, dy: &mut Memory) {
        self.rms_norm_backward(x, weight, &stats.0, dy);
    }

    fn attention(&self, shape: &AttentionShape, q: &Joint<Memory>, k: &Joint<Memory>, v: &Joint<Memory>) -> (Joint<Memory>, Memory) {
        self.attention(shape, q, k, v)
    }

    fn attention_backward(
        &self,
        shape: &AttentionShape,
        qkv: (&Joint<Memory>, &Joint<Memory>, &Joint<Memory>),
        out: &Joint<Memory>,
        lse: &Memory,
        d_out: &Joint<Memory>,
        gradients: &mut Joint<Qkv<Memory>>,
    ) {
        self.attention_backward(shape, qkv, out, lse, d_out, gradients);
    }

    fn flow_loss(&self, out: &Memory, target: &FlowData<Memory>, layout: PatchLayout, preconditioned: bool) -> (Memory, Memory) {
        self.flow_loss(out, target, layout, preconditioned)
    }

    fn add_scaled(&self, sum: &mut Memory, x: &Memory, factor: f32) {
        self.add_scaled(sum, x, factor);
    }

    fn square_sum(&self, x: &Memory) -> f64 {
        self.square_sum(x)
    }

    fn adamw(&self, values: &mut Memory, grads: &Memory, first: &mut Memory, second: &mut Memory, scalars: AdamWScalars) {
        self.adamw(values, grads, first, second, scalars);
    }

    fn adamw_8bit(
        &self,
        values: &mut Memory,
        grads: &Memory,
        ranges: &DeviceRanges,
        full: (&mut Memory, &mut Memory),
        first: CodedMoment<'_, Memory, Memory>,
        second: CodedMoment<'_, Memory, Memory>,
        scalars: AdamWScalars,
    ) {
        self.adamw_8bit(values, grads, ranges, full, &first, &second, scalars);
    }

    fn stream_layers<E>(&self, layers: usize, source: &dyn LayerSource, work: &mut dyn FnMut(usize, &[Matrix<'_>]) -> Result<(), E>) -> Result<(), E> {
        self.stream_layers(layers, source, work)
    }

    fn layer_product(&self, rows: usize, x: &Memory, w: Matrix<'_>, bias: Option<&Memory>, y: &mut Memory, accumulate: bool) {
        self.matrix_product(rows, x, w, bias, y, 0, accumulate);
    }

    fn embed(&self, table: &dyn StoredMatrix, width: usize, ids: &[u32], rows: usize) -> Memory {
        self.embed(table, width, ids, rows)
    }

    fn rms_norm_rows(&self, x: &Memory, weight: &Memory, epsilon: f32) -> Memory {
        self.rms_norm_rows(x, weight, epsilon)
    }

    fn layer_norm(&self, x: &Memory, weight: &Memory, bias: &Memory, epsilon: f32) -> Memory {
        self.layer_norm(x, weight, bias, epsilon)
    }

    fn gated_gelu(&self, x: &Memory, width: usize) -> Memory {
        self.gated_gelu(x, width)
    }

    fn activate(&self, x: &mut Memory, activation: TextActivation) {
        self.activate(x, activation);
    }

    fn text_attention(&self, shape: TextAttention, qkv: &Memory, bias: Option<&Memory>) -> Memory {
        self.text_attention(shape, qkv, bias)
    }

    fn padded_channels(&self, channels: usize) -> usize {
        channels.next_multiple_of(8)
    }

    fn convolution(&self, host: HostConvolution<'_>, padded: (usize, usize), resampling: Resampling) -> Convolution<Memory> {
        let HostConvolution { weight, bias, inputs, outputs, kernel } = host;
        assert!(weight.len() == outputs * inputs * kernel * kernel && bias.len() == outputs, "should be weights of this shape");
        self.convolution(host, padded, resampling)
    }

    fn upload_picture(&self, values: &[f32], (channels, height, width): (usize, usize, usize), padded: usize) -> Picture<Memory> {
        assert_eq!(values.len(), channels * height * width, "should be one picture");
        self.upload_picture(values, (channels, height, width), padded)
    }

    fn download_picture(&self, x: &Picture<Memory>, channels: usize) -> Vec<f32> {
        self.download_picture(x, channels)
    }

    fn convolve(&self, x: &Picture<Memory>, convolution: &Convolution<Memory>, onto: Option<Picture<Memory>>) -> Picture<Memory> {
        assert_eq!(x.channels, convolution.inputs, "should be a picture of the convolution's inputs");
        self.convolve(x, convolution, onto)
    }

    fn normalise(&self, x: &Picture<Memory>, norm: &GroupNorm<Memory>, silu: bool) -> Picture<Memory> {
        assert_eq!(x.channels, norm.weight.len(), "should be a picture of the norm's channels");
        self.normalise(x, norm, silu)
    }

    fn picture_attention(&self, qkv: &Picture<Memory>) -> Picture<Memory> {
        assert_eq!(qkv.channels, qkv.channels / 3 * 3, "should be q, k and v");
        self.picture_attention(qkv)
    }
}
