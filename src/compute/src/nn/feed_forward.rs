//! Linear, GELU (tanh), linear.

use super::{Gradients, Linear, LinearSaved, Pass};
use crate::kernels::{Device, DeviceBuffer as _};

/// `y = down(gelu(up(x)))`.
#[derive(Debug)]
pub struct FeedForward<D: Device> {
    /// [4D, D] (`net.0.proj`).
    pub up: Linear<D>,
    /// [D, 4D] (`net.2`).
    pub down: Linear<D>,
}

/// # Saved for backward
/// x [rows, D] if `up` has LoRA; h = up(x) [rows, 4D]; gelu(h) if `down` has LoRA.
#[derive(Debug)]
pub struct FeedForwardSaved<D: Device> {
    x: Option<D::Buffer>,
    h: D::Buffer,
    activated: Option<D::Buffer>,
    up: LinearSaved<D>,
    down: LinearSaved<D>,
}

impl<D: Device> FeedForward<D> {
    /// Whether it has LoRA.
    pub fn has_lora(&self) -> bool {
        self.up.has_lora() || self.down.has_lora()
    }

    /// Calls `f` on both linear layers.
    pub fn each_linear(&mut self, f: &mut dyn FnMut(&mut Linear<D>)) {
        f(&mut self.up);
        f(&mut self.down);
    }

    /// # Shapes
    /// x [rows, D] -> y [rows, D].
    pub fn forward(&self, pass: Pass<'_, D>, rows: usize, x: D::Buffer) -> (D::Buffer, FeedForwardSaved<D>) {
        let (h, activated, up) = self.up.forward_gelu(pass, rows, &x);
        let (y, down) = self.down.forward(pass, rows, &activated);
        let saved = FeedForwardSaved { x: Some(x).filter(|_| self.up.has_lora()), h, activated: Some(activated).filter(|_| self.down.has_lora()), up, down };
        (y, saved)
    }

    /// # Backward
    /// Returns dx [rows, D] if `need_input`.
    pub fn backward(
        &self,
        pass: Pass<'_, D>,
        rows: usize,
        saved: &FeedForwardSaved<D>,
        dy: &D::Buffer,
        need_input: bool,
        gradients: &mut Gradients<D>,
    ) -> Option<D::Buffer> {
        let through = need_input || self.up.has_lora();
        let mut dh = through.then(|| pass.device.alloc(saved.h.len()));
        self.down.backward(pass, rows, saved.activated.as_ref(), &saved.down, dy, dh.as_mut().map(|d| (d, false)), gradients);
        let mut dh = dh?;
        pass.device.gelu_backward(&saved.h, &mut dh);
        let mut dx = need_input.then(|| pass.device.alloc(dy.len()));
        self.up.backward(pass, rows, saved.x.as_ref(), &saved.up, &dh, dx.as_mut().map(|d| (d, false)), gradients);
        dx
    }
}
