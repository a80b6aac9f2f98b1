//! Linear, GELU (tanh), linear.

use super::{Gradients, Linear, LinearSaved, Pass};
use crate::kernels::Buffer;

/// `y = down(gelu(up(x)))`.
#[derive(Debug)]
pub struct FeedForward {
    /// [4D, D] (`net.0.proj`).
    pub up: Linear,
    /// [D, 4D] (`net.2`).
    pub down: Linear,
}

/// # Saved for backward
/// x [rows, D] if `up` has LoRA; h = up(x) [rows, 4D]; gelu(h) if `down` has LoRA.
#[derive(Debug)]
pub struct FeedForwardSaved {
    x: Option<Buffer>,
    h: Buffer,
    activated: Option<Buffer>,
    up: LinearSaved,
    down: LinearSaved,
}

impl FeedForward {
    /// Whether it has LoRA.
    pub fn has_lora(&self) -> bool {
        self.up.has_lora() || self.down.has_lora()
    }

    /// Calls `f` on both linear layers.
    pub fn each_linear(&mut self, f: &mut dyn FnMut(&mut Linear)) {
        f(&mut self.up);
        f(&mut self.down);
    }

    /// # Shapes
    /// x [rows, D] -> y [rows, D].
    pub fn forward(&self, pass: Pass<'_>, rows: usize, x: Buffer) -> (Buffer, FeedForwardSaved) {
        let (h, activated, up) = self.up.forward_gelu(pass, rows, &x);
        let (y, down) = self.down.forward(pass, rows, &activated);
        let saved = FeedForwardSaved { x: Some(x).filter(|_| self.up.has_lora()), h, activated: Some(activated).filter(|_| self.down.has_lora()), up, down };
        (y, saved)
    }

    /// # Backward
    /// Returns dx [rows, D] if `need_input`.
    pub fn backward(&self, pass: Pass<'_>, rows: usize, saved: &FeedForwardSaved, dy: &Buffer, need_input: bool, gradients: &mut Gradients) -> Option<Buffer> {
        let through = need_input || self.up.has_lora();
        let mut dh = through.then(|| pass.engine.alloc(saved.h.len()));
        self.down.backward(pass, rows, saved.activated.as_ref(), &saved.down, dy, dh.as_mut().map(|d| (d, false)), gradients);
        let mut dh = dh?;
        pass.engine.gelu_backward(&saved.h, &mut dh);
        let mut dx = need_input.then(|| pass.engine.alloc(dy.len()));
        self.up.backward(pass, rows, saved.x.as_ref(), &saved.up, &dh, dx.as_mut().map(|d| (d, false)), gradients);
        dx
    }
}
