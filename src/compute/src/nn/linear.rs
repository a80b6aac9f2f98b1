//! A linear layer with a frozen weight and optional LoRA.

use super::Pass;
use crate::kernels::{Buffer, Engine, FlatBuffer, FrozenMatrix, FusedLinear, LoraMatrix};

/// Gradients of the LoRA parameters: A and B of each module in the layout's order, in f32 on the device.
#[derive(Debug)]
pub struct Gradients {
    values: FlatBuffer,
}

impl Gradients {
    /// Zeros for parameters of these lengths.
    pub fn zeros(engine: &Engine, lengths: impl Iterator<Item = usize>) -> Self {
        Self { values: engine.flat_zeros(&lengths.collect::<Vec<_>>()) }
    }

    /// On the host, in order.
    pub fn download(&self, engine: &Engine) -> Vec<Vec<f32>> {
        engine.download_parts(&self.values)
    }

    /// All of them on a GPU, one after another: see [`FlatBuffer::whole`].
    pub fn whole(&self) -> Option<&Buffer> {
        self.values.whole()
    }

    /// A's and B's gradients of the module at `slot`, for an engine that adds to them where they are.
    pub(super) fn of(&self, slot: usize) -> (&Buffer, &Buffer) {
        let parts = self.values.parts();
        (&parts[2 * slot], &parts[2 * slot + 1])
    }

    /// A's and B's gradients of the module at `slot`.
    fn pair(&mut self, slot: usize) -> (&mut Buffer, &mut Buffer) {
        let (low, high) = self.values.parts_mut().split_at_mut(2 * slot + 1);
        (&mut low[2 * slot], &mut high[0])
    }
}

#[derive(Debug)]
struct Lora {
    /// Place in the layout.
    slot: usize,
    /// alpha / rank.
    scale: f32,
    factors: LoraMatrix,
}

/// `y = x Wᵀ + b + s · (alpha / r) · dropout(x) Aᵀ Bᵀ` with W `[out, in]`, b `[out]` frozen.
#[derive(Debug)]
pub struct Linear {
    ordinal: usize,
    inputs: usize,
    outputs: usize,
    weight: FrozenMatrix,
    bias: Option<Buffer>,
    lora: Option<Lora>,
}

/// # Saved for backward
/// t = dropout(x) Aᵀ [rows, r], if there is LoRA. The input x is the caller's to keep.
#[derive(Debug, Default)]
pub struct LinearSaved {
    t: Option<Buffer>,
}

impl Linear {
    /// A layer without LoRA; `ordinal` is its place among the model's linear modules.
    pub fn new(ordinal: usize, inputs: usize, outputs: usize, weight: FrozenMatrix, bias: Option<Buffer>) -> Self {
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
    pub fn set_lora(&mut self, engine: &Engine, slot: usize, rank: usize, scale: f32, a: &[f32], b: &[f32]) {
        self.lora = Some(Lora { slot, scale, factors: engine.lora(rank, self.inputs, self.outputs, a, b, scale) });
    }

    /// Fuses layers with the same input into one product, if the engine is faster then.
    pub fn fuse(engine: &Engine, layers: &mut [&mut Self]) -> Option<FusedLinear> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for layer in layers {
            weights.push(&mut layer.weight);
            biases.extend(layer.bias.as_mut());
        }
        engine.fuse(&mut weights, &mut biases)
    }

    /// Its LoRA: factors, place in the layout, scale.
    pub fn lora(&self) -> Option<(&LoraMatrix, usize, f32)> {
        self.lora.as_ref().map(|l| (&l.factors, l.slot, l.scale))
    }

    /// As [`Linear::forward`], then GELU: (before it, after it).
    pub fn forward_gelu(&self, pass: Pass<'_>, rows: usize, x: &Buffer) -> (Buffer, Buffer, LinearSaved) {
        let plain = self.lora.is_none() || pass.lora_scale == 0.0;
        if let Some((h, y)) = self.bias.as_ref().filter(|_| plain).and_then(|bias| pass.engine.linear_gelu(rows, x, &self.weight, bias)) {
            return (h, y, LinearSaved { t: None });
        }
        let (h, saved) = self.forward(pass, rows, x);
        let y = pass.engine.gelu(&h);
        (h, y, saved)
    }

    /// Takes LoRA away.
    pub fn clear_lora(&mut self) {
        self.lora = None;
    }

    /// # Shapes
    /// x [rows, in] -> y [rows, out].
    pub fn forward(&self, pass: Pass<'_>, rows: usize, x: &Buffer) -> (Buffer, LinearSaved) {
        let mut y = pass.engine.alloc(rows * self.outputs);
        let lora = self.lora.as_ref().filter(|_| pass.lora_scale != 0.0);
        let mask = lora.and_then(|_| self.mask(pass, rows));
        let dropped = mask.map(|mut mask| {
            pass.engine.multiply(&mut mask, x);
            mask
        });
        let t = pass.engine.linear(rows, x, &self.weight, self.bias.as_ref(), lora.map(|l| (&l.factors, dropped.as_ref(), pass.lora_scale)), &mut y);
        (y, LinearSaved { t })
    }

    /// # Backward
    /// `dx (+)= dy W + mask ∘ (scale · dy B A)` where `dx` is given as (buffer, whether to accumulate);
    /// `dA += (scale · dy B)ᵀ dropout(x)`, `dB += scale · dyᵀ t`. `x`: the forward's input, wanted where there is LoRA.
    #[expect(clippy::too_many_arguments, reason = "what the forward had, and the gradients")]
    pub fn backward(
        &self,
        pass: Pass<'_>,
        rows: usize,
        x: Option<&Buffer>,
        saved: &LinearSaved,
        dy: &Buffer,
        dx: Option<(&mut Buffer, bool)>,
        gradients: &mut Gradients,
    ) {
        let (Some(lora), Some(x), Some(t)) = (&self.lora, x, &saved.t) else {
            if dx.is_some() {
                pass.engine.linear_backward(rows, dy, &self.weight, None, dx);
            }
            return;
        };
        let mask = self.mask(pass, rows);
        let dt = pass.engine.linear_backward(rows, dy, &self.weight, Some((&lora.factors, mask.as_ref())), dx);
        let dropped = mask.map(|mut mask| {
            pass.engine.multiply(&mut mask, x);
            mask
        });
        if let Some(dt) = dt {
            let (da, db) = gradients.pair(lora.slot);
            pass.engine.lora_gradient(rows, dropped.as_ref().unwrap_or(x), dy, t, &dt, lora.scale, da, db);
        }
    }

    /// The dropout mask of the input.
    fn mask(&self, pass: Pass<'_>, rows: usize) -> Option<Buffer> {
        let (key, p) = pass.dropout.filter(|(_, p)| *p > 0.0)?;
        let tokens = rows / key.samples.len().max(1);
        Some(pass.engine.dropout_mask(key.seed, &key.samples, self.ordinal, tokens, self.inputs, p))
    }
}
