//! The CPU as a device.

use std::convert::Infallible;
use std::sync::Arc;

use rayon::prelude::*;

use super::adamw::{self, Coded};
use super::attention::{self, Streams};
use super::gemm::Packed;
use super::memory::{HostBuffer, Pool};
use super::{conv, flow_loss, group_norm, linear, norm, pointwise, self_attention};
use crate::kernels::{
    AdamWScalars, AttentionShape, CodedMoment, Convolution, Device, DeviceError, FlowData, GroupNorm, HostConvolution, Int8Matrix, Joint, LayerMatrix,
    LayerSource, LoraTarget, Modulation, NormStats, PatchLayout, Picture, Precision, Qkv, Range, Resampling, StoredMatrix, StoredRows, TextActivation,
    TextAttention,
};
use finetune_common::rng::{Purpose, Stream};

/// The CPU. It computes in f32.
#[derive(Debug, Clone, Default)]
pub struct Cpu {
    pool: Arc<Pool>,
}

impl LayerMatrix for &StoredRows<'_> {
    fn outputs(&self) -> usize {
        StoredRows::outputs(self)
    }
}

impl Joint<HostBuffer> {
    fn host(&self) -> Streams<&[f32]> {
        Streams { image: &self.image[..], context: self.context.as_deref() }
    }

    fn host_mut(&mut self) -> Streams<&mut [f32]> {
        Streams { image: &mut self.image[..], context: self.context.as_deref_mut() }
    }
}

fn coded(moment: CodedMoment<'_, HostBuffer, Vec<u8>>) -> Coded<'_> {
    let CodedMoment { codes, largest, table, nearest } = moment;
    Coded { codes, largest, table, nearest }
}

impl Device for Cpu {
    type Buffer = HostBuffer;
    type Bytes = Vec<u8>;
    type Ranges = Vec<Range>;
    type Weight = linear::Weight;
    type Lora = linear::Lora;
    type FusedLinear = Infallible;
    type LoraScatter = Infallible;
    type Recording = Infallible;
    type Arrival = Vec<f32>;
    type LayerMatrix<'a> = &'a StoredRows<'a>;

    const IS_HOST: bool = true;

    fn precision(&self) -> Precision {
        Precision::F32
    }

    fn in_precision(&self, _precision: Precision) -> Result<Self, DeviceError> {
        Ok(self.clone())
    }

    fn trim(&self) {
        self.pool.clear();
    }

    fn alloc(&self, len: usize) -> HostBuffer {
        HostBuffer::new(&self.pool, len)
    }

    fn zeros_f32(&self, len: usize) -> HostBuffer {
        self.zeros(len)
    }

    fn clear(&self, buffer: &mut HostBuffer) {
        buffer.fill(0.0);
    }

    fn upload(&self, values: &[f32]) -> HostBuffer {
        let mut buffer = self.alloc(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    fn upload_f32(&self, values: &[f32]) -> HostBuffer {
        self.upload(values)
    }

    fn overwrite(&self, buffer: &mut HostBuffer, values: &[f32]) {
        buffer.copy_from_slice(values);
    }

    fn download(&self, buffer: &HostBuffer) -> Vec<f32> {
        buffer.to_vec()
    }

    fn download_to(&self, buffer: &HostBuffer, places: &mut [&mut [f32]]) {
        let mut values: &[f32] = buffer;
        for place in places {
            let (own, rest) = values.split_at(place.len());
            place.copy_from_slice(own);
            values = rest;
        }
    }

    fn send(&self, buffer: &HostBuffer) -> Vec<f32> {
        buffer.to_vec()
    }

    fn receive(&self, arrival: Vec<f32>) -> Vec<f32> {
        arrival
    }

    fn copy(&self, buffer: &HostBuffer) -> HostBuffer {
        self.upload(buffer)
    }

    fn upload_bytes(&self, bytes: &[u8]) -> Vec<u8> {
        bytes.to_vec()
    }

    fn download_bytes(&self, bytes: &Vec<u8>) -> Vec<u8> {
        bytes.clone()
    }

    fn upload_ranges(&self, ranges: &[Range]) -> Vec<Range> {
        ranges.to_vec()
    }

    fn replay(&self, recording: &Infallible) {
        match *recording {}
    }

    fn frozen(&self, outputs: usize, inputs: usize, values: &[f32]) -> linear::Weight {
        linear::Weight::Packed { forward: Packed::transposed(outputs, inputs, values), backward: Packed::new(outputs, inputs, values, inputs, 1, 1.0) }
    }

    fn frozen_stored(&self, outputs: usize, inputs: usize, matrix: Arc<dyn StoredMatrix>) -> linear::Weight {
        linear::Weight::Stored { matrix, outputs, inputs }
    }

    fn frozen_int8(&self, outputs: usize, inputs: usize, matrix: Arc<dyn StoredMatrix>) -> linear::Weight {
        self.frozen_stored(outputs, inputs, Arc::new(Int8Matrix::quantize(outputs, inputs, &*matrix)))
    }

    fn lora(&self, rank: usize, inputs: usize, outputs: usize, a: &[f32], b: &[f32], scale: f32) -> linear::Lora {
        linear::Lora::new(rank, inputs, outputs, a, b, scale)
    }

    fn linear(
        &self,
        rows: usize,
        x: &HostBuffer,
        weight: &linear::Weight,
        bias: Option<&HostBuffer>,
        lora: Option<(&linear::Lora, Option<&HostBuffer>, f32)>,
        y: &mut HostBuffer,
    ) -> Option<HostBuffer> {
        let mut t = lora.map(|(l, ..)| self.alloc(rows * l.rank));
        let side = lora.map(|(l, dropped, s)| (l, &**dropped.unwrap_or(x), s));
        linear::forward(rows, x, weight, bias.map(|b| &**b), side, t.as_deref_mut(), y);
        t
    }

    fn linear_backward(
        &self,
        rows: usize,
        dy: &HostBuffer,
        weight: &linear::Weight,
        lora: Option<(&linear::Lora, Option<&HostBuffer>)>,
        mut dx: Option<(&mut HostBuffer, bool)>,
    ) -> Option<HostBuffer> {
        let mut dt = lora.map(|(l, _)| self.alloc(rows * l.rank));
        let mask = lora.and_then(|(_, mask)| mask);
        let host = dx.as_mut().map(|(dx, accumulate)| (&mut ***dx, *accumulate));
        linear::backward(rows, dy, weight, lora.map(|(l, _)| l), mask.is_none(), dt.as_deref_mut(), host);
        if let (Some((l, _)), Some(mask), Some((dx, _)), Some(dt)) = (lora, mask, dx, &dt) {
            let mut through = self.alloc(dx.len());
            linear::through_a(rows, dt, l, &mut through);
            pointwise::multiply(&mut through, mask);
            pointwise::add(dx, &through);
        }
        dt
    }

    fn lora_gradient(
        &self,
        rows: usize,
        x_lora: &HostBuffer,
        dy: &HostBuffer,
        t: &HostBuffer,
        dt: &HostBuffer,
        gradients: &mut HostBuffer,
        target: &LoraTarget,
    ) {
        let (x_lora, dy, t): (&[f32], &[f32], &[f32]) = (x_lora, dy, t);
        let (inputs, outputs, rank) = (x_lora.len() / rows, dy.len() / rows, t.len() / rows);
        linear::outer_products(rows, x_lora, inputs, dt, rank, 1.0, true, &mut gradients[target.a.clone()]);
        linear::outer_products(rows, dy, outputs, t, rank, target.scale, false, &mut gradients[target.b.clone()]);
    }

    fn fuse_lora(&self, fused: &mut Infallible, _layers: &[Option<&linear::Lora>]) {
        match *fused {}
    }

    fn fused_forward(&self, _rows: usize, _x: &HostBuffer, fused: &Infallible, _lora_scale: f32) -> (Vec<HostBuffer>, Option<HostBuffer>) {
        match *fused {}
    }

    fn fused_backward(
        &self,
        _rows: usize,
        _dy: &Qkv<HostBuffer>,
        fused: &Infallible,
        _lora: Option<(&HostBuffer, &HostBuffer)>,
        _dx: Option<&mut HostBuffer>,
        _gradients: &mut HostBuffer,
        _targets: &[LoraTarget],
    ) {
        match *fused {}
    }

    fn scatter_lora(&self, scatter: &Infallible, _parameters: &HostBuffer) {
        match *scatter {}
    }

    fn dropout_mask(&self, seed: u64, samples: &[(u64, u64)], module: usize, tokens: usize, width: usize, p: f64) -> HostBuffer {
        let (kept, p) = ((1.0 / (1.0 - p)) as f32, p as f32);
        let mut mask = self.alloc(samples.len() * tokens * width);
        mask.par_chunks_mut(tokens * width).zip(samples).for_each(|(mask, sample)| {
            let mut stream = dropout_stream(seed, *sample, module);
            for value in mask {
                *value = if stream.uniform_f32() < p { 0.0 } else { kept };
            }
        });
        mask
    }

    fn multiply(&self, x: &mut HostBuffer, y: &HostBuffer) {
        pointwise::multiply(x, y);
    }

    fn add(&self, x: &mut HostBuffer, y: &HostBuffer) {
        if x.len() == y.len() { pointwise::add(x, y) } else { pointwise::add_repeated(x, y) }
    }

    fn gelu(&self, x: &HostBuffer) -> HostBuffer {
        let mut y = self.like(x);
        pointwise::gelu(x, &mut y);
        y
    }

    fn gelu_backward(&self, x: &HostBuffer, dy: &mut HostBuffer) {
        pointwise::gelu_backward(x, dy);
    }

    fn silu(&self, x: &HostBuffer) -> HostBuffer {
        let mut y = self.like(x);
        pointwise::silu(x, &mut y);
        y
    }

    fn silu_backward(&self, x: &HostBuffer, dy: &mut HostBuffer) {
        pointwise::silu_backward(x, dy);
    }

    fn modulate(&self, x: &HostBuffer, m: Modulation<'_, HostBuffer>, shift: usize, scale: usize) -> (HostBuffer, NormStats<HostBuffer>) {
        let mut y = self.like(x);
        let mut stats = self.alloc(x.len() / m.width * 2);
        norm::modulate(m.tokens, m.width, x, m.values, m.stride, shift, scale, &mut y, &mut stats);
        (y, NormStats(stats))
    }

    fn modulate_backward(
        &self,
        x: &HostBuffer,
        stats: &NormStats<HostBuffer>,
        m: Modulation<'_, HostBuffer>,
        shift: usize,
        scale: usize,
        dy: &HostBuffer,
        dx: Option<&mut HostBuffer>,
        d_modulation: Option<&mut HostBuffer>,
    ) {
        if let Some(dx) = dx {
            norm::modulate_backward(m.tokens, m.width, x, &stats.0, m.values, m.stride, scale, dy, dx);
        }
        if let Some(d) = d_modulation {
            norm::modulation_gradient(m.tokens, m.width, x, &stats.0, dy, d, m.stride, shift, scale);
        }
    }

    fn gate_residual(&self, x: &HostBuffer, y: &HostBuffer, m: Modulation<'_, HostBuffer>, gate: usize) -> HostBuffer {
        let mut out = self.like(x);
        pointwise::gate_residual(m.tokens, m.width, x, y, m.values, m.stride, gate, &mut out);
        out
    }

    fn gate_backward(
        &self,
        d_out: &HostBuffer,
        m: Modulation<'_, HostBuffer>,
        gate: usize,
        d_modulation: Option<(&HostBuffer, &mut HostBuffer)>,
    ) -> HostBuffer {
        let mut dy = self.like(d_out);
        pointwise::gate_backward(m.tokens, m.width, d_out, m.values, m.stride, gate, &mut dy);
        if let Some((y, d)) = d_modulation {
            pointwise::gate_gradient(m.tokens, m.width, y, d_out, d, m.stride, gate);
        }
        dy
    }

    fn rms_norm(&self, x: &HostBuffer, weight: &HostBuffer) -> (HostBuffer, NormStats<HostBuffer>) {
        let mut y = self.like(x);
        let mut rstd = self.alloc(x.len() / weight.len());
        norm::rms(x, weight, &mut y, &mut rstd);
        (y, NormStats(rstd))
    }

    fn rms_norm_backward(&self, x: &HostBuffer, weight: &HostBuffer, stats: &NormStats<HostBuffer>, dy: &mut HostBuffer) {
        norm::rms_backward(x, weight, &stats.0, dy);
    }

    fn attention(&self, shape: &AttentionShape, q: &Joint<HostBuffer>, k: &Joint<HostBuffer>, v: &Joint<HostBuffer>) -> (Joint<HostBuffer>, HostBuffer) {
        let mut out = Joint { image: self.like(&q.image), context: q.context.as_ref().map(|c| self.like(c)) };
        let mut lse = self.alloc(shape.batch * shape.heads * shape.keys());
        attention::forward(shape, q.host(), k.host(), v.host(), out.host_mut(), &mut lse);
        (out, lse)
    }

    fn attention_backward(
        &self,
        shape: &AttentionShape,
        (q, k, v): (&Joint<HostBuffer>, &Joint<HostBuffer>, &Joint<HostBuffer>),
        out: &Joint<HostBuffer>,
        lse: &HostBuffer,
        d_out: &Joint<HostBuffer>,
        gradients: &mut Joint<Qkv<HostBuffer>>,
    ) {
        let Joint { image, context } = gradients;
        let (d_context_q, d_context_k, d_context_v) = match context {
            Some(Qkv { q, k, v, .. }) => (q.as_deref_mut(), Some(&mut **k), Some(&mut **v)),
            None => (None, None, None),
        };
        let d_q = Streams { image: image.q.as_deref_mut().unwrap_or_default(), context: d_context_q };
        let d_k = Streams { image: &mut *image.k, context: d_context_k };
        let d_v = Streams { image: &mut *image.v, context: d_context_v };
        attention::backward(shape, q.host(), k.host(), v.host(), out.host(), lse, d_out.host(), d_q, d_k, d_v);
    }

    fn flow_loss(&self, out: &HostBuffer, target: &FlowData<HostBuffer>, layout: PatchLayout, preconditioned: bool) -> (HostBuffer, HostBuffer) {
        let mut d_out = self.like(out);
        let sums = flow_loss::flow_loss(out, &target.x0, &target.noise, &target.samples, layout, preconditioned, &mut d_out);
        (d_out, self.upload(&sums))
    }

    fn add_scaled(&self, sum: &mut HostBuffer, x: &HostBuffer, factor: f32) {
        adamw::add_scaled(sum, x, factor);
    }

    fn square_sum(&self, x: &HostBuffer) -> f64 {
        adamw::square_sum(x)
    }

    fn adamw(&self, values: &mut HostBuffer, grads: &HostBuffer, first: &mut HostBuffer, second: &mut HostBuffer, scalars: AdamWScalars) {
        adamw::update(values, grads, first, second, scalars);
    }

    fn adamw_8bit(
        &self,
        values: &mut HostBuffer,
        grads: &HostBuffer,
        ranges: &Vec<Range>,
        (full_first, full_second): (&mut HostBuffer, &mut HostBuffer),
        first: CodedMoment<'_, HostBuffer, Vec<u8>>,
        second: CodedMoment<'_, HostBuffer, Vec<u8>>,
        scalars: AdamWScalars,
    ) {
        adamw::update_8bit(values, grads, ranges, (full_first, full_second), [coded(first), coded(second)], scalars);
    }

    fn stream_layers<E>(
        &self,
        layers: usize,
        source: &dyn LayerSource,
        work: &mut dyn FnMut(usize, &[Self::LayerMatrix<'_>]) -> Result<(), E>,
    ) -> Result<(), E> {
        source.will_need(0);
        for index in 0..layers {
            source.will_need(index + 1);
            let stored = source.matrices(index);
            let matrices: Vec<_> = stored.iter().collect();
            work(index, &matrices)?;
            source.done(index);
        }
        Ok(())
    }

    fn layer_product(&self, rows: usize, x: &HostBuffer, w: &StoredRows<'_>, bias: Option<&HostBuffer>, y: &mut HostBuffer, accumulate: bool) {
        linear::stored(rows, x, w, (w.outputs(), w.inputs), bias.map(|b| &**b), accumulate, y);
    }

    fn embed(&self, table: &dyn StoredMatrix, width: usize, ids: &[u32], rows: usize) -> HostBuffer {
        let mut y = self.zeros(rows * width);
        for (row, &id) in y.chunks_exact_mut(width).zip(ids) {
            table.read_block(id as usize..id as usize + 1, 0..width, row);
        }
        y
    }

    fn rms_norm_rows(&self, x: &HostBuffer, weight: &HostBuffer, epsilon: f32) -> HostBuffer {
        let mut y = self.like(x);
        norm::rms_norm(x, weight, epsilon, &mut y);
        y
    }

    fn layer_norm(&self, x: &HostBuffer, weight: &HostBuffer, bias: &HostBuffer, epsilon: f32) -> HostBuffer {
        let mut y = self.like(x);
        norm::layer_norm(x, weight, bias, epsilon, &mut y);
        y
    }

    fn gated_gelu(&self, x: &HostBuffer, width: usize) -> HostBuffer {
        let mut y = self.alloc(x.len() / 2);
        pointwise::gated_gelu(x, width, &mut y);
        y
    }

    fn activate(&self, x: &mut HostBuffer, activation: TextActivation) {
        match activation {
            TextActivation::QuickGelu => pointwise::quick_gelu(x),
            TextActivation::Gelu => pointwise::gelu_erf(x),
        }
    }

    fn text_attention(&self, shape: TextAttention, qkv: &HostBuffer, bias: Option<&HostBuffer>) -> HostBuffer {
        let mut out = self.alloc(qkv.len() / 3);
        self_attention::text(&shape, qkv, bias.map(|b| &**b), &mut out);
        out
    }

    fn convolution(&self, host: HostConvolution<'_>, padded: (usize, usize), resampling: Resampling) -> Convolution<HostBuffer> {
        let HostConvolution { weight, bias, inputs, outputs, kernel } = host;
        assert!(weight.len() == outputs * inputs * kernel * kernel && bias.len() == outputs, "should be weights of this shape");
        assert_eq!(padded, (inputs, outputs), "should not be padded on the CPU");
        Convolution { weight: self.upload(weight), bias: self.upload(bias), inputs, outputs, kernel, resampling }
    }

    fn upload_picture(&self, values: &[f32], (channels, height, width): (usize, usize, usize), padded: usize) -> Picture<HostBuffer> {
        assert_eq!(values.len(), channels * height * width, "should be one picture");
        assert_eq!(padded, channels, "should not be padded on the CPU");
        Picture { values: HostBuffer::unpooled(values.to_vec()), height, width, channels }
    }

    fn download_picture(&self, x: &Picture<HostBuffer>, channels: usize) -> Vec<f32> {
        x.values[..channels * x.height * x.width].to_vec()
    }

    fn convolve(&self, x: &Picture<HostBuffer>, convolution: &Convolution<HostBuffer>, onto: Option<Picture<HostBuffer>>) -> Picture<HostBuffer> {
        let &Convolution { inputs, outputs, kernel, resampling, .. } = convolution;
        assert_eq!(x.channels, inputs, "should be a picture of the convolution's inputs");
        let (stride, pad_before, pad_after) = match resampling {
            Resampling::Same | Resampling::Double => (1, kernel / 2, kernel / 2),
            Resampling::Halve => (2, 0, 1),
        };
        let double = resampling == Resampling::Double;
        let shape = conv::ConvShape { inputs, outputs, height: x.height, width: x.width, kernel, stride, pad_before, pad_after, double };
        let (height, width, accumulate) = (shape.out_height(), shape.out_width(), onto.is_some());
        let mut values = onto.map_or_else(|| HostBuffer::unpooled(vec![0.0; outputs * height * width]), |onto| onto.values);
        conv::conv2d(&x.values, &convolution.weight, &convolution.bias, &shape, accumulate, &mut values);
        Picture { values, height, width, channels: outputs }
    }

    fn normalise(&self, x: &Picture<HostBuffer>, norm: &GroupNorm<HostBuffer>, silu: bool) -> Picture<HostBuffer> {
        let GroupNorm { weight, bias, groups, epsilon } = norm;
        assert_eq!(x.channels, weight.len(), "should be a picture of the norm's channels");
        let values = group_norm::group_norm(&x.values, *groups, weight, bias, f64::from(*epsilon), silu);
        Picture { values: HostBuffer::unpooled(values), ..*x }
    }

    fn picture_attention(&self, qkv: &Picture<HostBuffer>) -> Picture<HostBuffer> {
        let channels = qkv.channels / 3;
        assert_eq!(qkv.channels, 3 * channels, "should be q, k and v");
        let mut values = vec![0.0; channels * qkv.height * qkv.width];
        self_attention::picture(channels, &qkv.values, &mut values);
        Picture { values: HostBuffer::unpooled(values), height: qkv.height, width: qkv.width, channels }
    }
}

impl Cpu {
    /// Memory of as many values, of any content.
    fn like(&self, x: &[f32]) -> HostBuffer {
        self.alloc(x.len())
    }
}

/// The random numbers of a sample's dropout mask in a module, on every device.
pub(in crate::kernels) fn dropout_stream(seed: u64, (a, b): (u64, u64), module: usize) -> Stream {
    Stream::new(seed, Purpose::LoraDropout, a, b & 0xffff_ffff | (module as u64) << 32)
}
