//! A linear layer with a frozen weight and optional LoRA.

use std::ops::Range;

use super::Pass;
use crate::kernels::{Device, LoraTarget, flat_offsets};

/// Gradients of the LoRA parameters: A and B of each module in the layout's order, one after another in f32 on the device, as
/// [`flat_offsets`] lays them.
#[derive(Debug)]
pub struct Gradients<D: Device> {
    values: D::Buffer,
    /// Where each tensor lies.
    spans: Vec<Range<usize>>,
}

impl<D: Device> Gradients<D> {
    /// Zeros for parameters of these lengths.
    pub fn zeros(device: &D, lengths: impl Iterator<Item = usize>) -> Self {
        let lengths: Vec<usize> = lengths.collect();
        let offsets = flat_offsets(lengths.iter().copied());
        let values = device.zeros_f32(offsets[lengths.len()]);
        Self { values, spans: lengths.iter().zip(offsets).map(|(len, start)| start..start + len).collect() }
    }

    /// On the host, in order.
    pub fn download(&self, device: &D) -> Vec<Vec<f32>> {
        let values = device.download(&self.values);
        self.spans.iter().map(|span| values[span.clone()].to_vec()).collect()
    }

    /// All of them on the device.
    pub fn values(&self) -> &D::Buffer {
        &self.values
    }

    /// All of them, to be added to.
    pub(super) fn values_mut(&mut self) -> &mut D::Buffer {
        &mut self.values
    }

    /// Where those of the module at `slot` lie.
    pub(super) fn target(&self, slot: usize, scale: f32) -> LoraTarget {
        LoraTarget { a: self.spans[2 * slot].clone(), b: self.spans[2 * slot + 1].clone(), scale }
    }
}

#[derive(Debug)]
struct Lora<D: Device> {
    /// Place in the layout.
    slot: usize,
    /// alpha / rank.
    scale: f32,
    factors: D::Lora,
}

/// `y = x Wᵀ + b + s · (alpha / r) · dropout(x) Aᵀ Bᵀ` with W `[out, in]`, b `[out]` frozen.
#[derive(Debug)]
pub struct Linear<D: Device> {
    ordinal: usize,
    inputs: usize,
    outputs: usize,
    weight: D::Weight,
    bias: Option<D::Buffer>,
    lora: Option<Lora<D>>,
}

/// # Saved for backward
/// t = dropout(x) Aᵀ [rows, r], if there is LoRA. The input x is the caller's to keep.
#[derive(Debug)]
pub struct LinearSaved<D: Device> {
    t: Option<D::Buffer>,
}

impl<D: Device> Default for LinearSaved<D> {
    fn default() -> Self {
        Self { t: None }
    }
}

impl<D: Device> Linear<D> {
    /// A layer without LoRA; `ordinal` is its place among the model's linear modules.
    pub fn new(ordinal: usize, inputs: usize, outputs: usize, weight: D::Weight, bias: Option<D::Buffer>) -> Self {
        Self { ordinal, inputs, outputs, weight, bias, lora: None }
    }

    /// Its place among the model's linear modules.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether it has LoRA: its backward then wants its input.
    pub fn has_lora(&self) -> bool {
        self.lora.is_some()
    }

    /// Sets LoRA: A [rank, in], B [out, rank], `scale` = alpha / rank, gradients at `slot`.
    pub fn set_lora(&mut self, device: &D, slot: usize, rank: usize, scale: f32, a: &[f32], b: &[f32]) {
        self.lora = Some(Lora { slot, scale, factors: device.lora(rank, self.inputs, self.outputs, a, b, scale) });
    }

    /// Fuses layers with the same input into one product, if the device is faster then.
    pub fn fuse(device: &D, layers: &mut [&mut Self]) -> Option<D::FusedLinear> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for layer in layers {
            weights.push(&mut layer.weight);
            biases.extend(layer.bias.as_mut());
        }
        device.fuse(&mut weights, &mut biases)
    }

    /// Its LoRA: factors, place in the layout, scale.
    pub fn lora(&self) -> Option<(&D::Lora, usize, f32)> {
        self.lora.as_ref().map(|l| (&l.factors, l.slot, l.scale))
    }

    /// As [`Linear::forward`], then GELU: (before it, after it).
    pub fn forward_gelu(&self, pass: Pass<'_, D>, rows: usize, x: &D::Buffer) -> (D::Buffer, D::Buffer, LinearSaved<D>) {
        let plain = self.lora.is_none() || pass.lora_scale == 0.0;
        if let Some(bias) = self.bias.as_ref().filter(|_| plain) {
            let (h, y) = pass.device.linear_gelu(rows, x, &self.weight, bias);
            return (h, y, LinearSaved::default());
        }
        let (h, saved) = self.forward(pass, rows, x);
        let y = pass.device.gelu(&h);
        (h, y, saved)
    }

    /// Takes LoRA away.
    pub fn clear_lora(&mut self) {
        self.lora = None;
    }

    /// # Shapes
    /// x [rows, in] -> y [rows, out].
    pub fn forward(&self, pass: Pass<'_, D>, rows: usize, x: &D::Buffer) -> (D::Buffer, LinearSaved<D>) {
        let mut y = pass.device.alloc(rows * self.outputs);
        let lora = self.lora.as_ref().filter(|_| pass.lora_scale != 0.0);
        let mask = lora.and_then(|_| self.mask(pass, rows));
        let dropped = mask.map(|mut mask| {
            pass.device.multiply(&mut mask, x);
            mask
        });
        let t = pass.device.linear(rows, x, &self.weight, self.bias.as_ref(), lora.map(|l| (&l.factors, dropped.as_ref(), pass.lora_scale)), &mut y);
        (y, LinearSaved { t })
    }

    /// # Backward
    /// `dx (+)= dy W + mask ∘ (scale · dy B A)` where `dx` is given as (buffer, whether to accumulate);
    /// `dA += (scale · dy B)ᵀ dropout(x)`, `dB += scale · dyᵀ t`. `x`: the forward's input, wanted where there is LoRA.
    #[expect(clippy::too_many_arguments, reason = "what the forward had, and the gradients")]
    pub fn backward(
        &self,
        pass: Pass<'_, D>,
        rows: usize,
        x: Option<&D::Buffer>,
        saved: &LinearSaved<D>,
        dy: &D::Buffer,
        dx: Option<(&mut D::Buffer, bool)>,
        gradients: &mut Gradients<D>,
    ) {
        let (Some(lora), Some(x), Some(t)) = (&self.lora, x, &saved.t) else {
            if dx.is_some() {
                pass.device.linear_backward(rows, dy, &self.weight, None, dx);
            }
            return;
        };
        let mask = self.mask(pass, rows);
        let dt = pass.device.linear_backward(rows, dy, &self.weight, Some((&lora.factors, mask.as_ref())), dx);
        let dropped = mask.map(|mut mask| {
            pass.device.multiply(&mut mask, x);
            mask
        });
        if let Some(dt) = dt {
            let target = gradients.target(lora.slot, lora.scale);
            pass.device.lora_gradient(rows, dropped.as_ref().unwrap_or(x), dy, t, &dt, gradients.values_mut(), &target);
        }
    }

    /// The dropout mask of the input.
    fn mask(&self, pass: Pass<'_, D>, rows: usize) -> Option<D::Buffer> {
        let (key, p) = pass.dropout.filter(|(_, p)| *p > 0.0)?;
        let tokens = rows / key.samples.len().max(1);
        Some(pass.device.dropout_mask(key.seed, &key.samples, self.ordinal, tokens, self.inputs, p))
    }
}
