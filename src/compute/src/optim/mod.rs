//! Optimizers, learning-rate schedules and gradient clipping on f32 master parameters.
//!
//! Parameters, sums of gradients and the moments of AdamW are where the model is, so that an update moves nothing, and every device gives
//! the same bits; state is named and checked on the host, so that a checkpoint goes on anywhere. Updates are element by element and every sum
//! has a fixed partition, so results do not depend on the number of threads.

pub mod adamw;
pub mod adamw8bit;
mod layout;
mod parameters;
pub mod prodigy;
mod quantize;
pub mod schedule;
pub mod state;

pub use adamw::{AdamW, AdamWSettings};
pub use adamw8bit::AdamW8bit;
pub use parameters::{OptimizerSettings, Parameters};
pub use prodigy::{Prodigy, ProdigySettings};
pub use schedule::Schedule;
pub use state::{StateData, StateError, StateTensor};

use crate::kernels::Device;

/// A trainable tensor: the f32 master copy on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Param {
    /// Its name in a LoRA file, as `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`.
    pub name: String,
    /// Its shape; the product is the length of `value`.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub value: Vec<f32>,
}

/// A first-order optimizer with its state.
///
/// The layout (names, order, lengths) of the parameters is fixed when the optimizer is made; `step` must be given the same, laid out as
/// [`crate::kernels::flat_offsets`] says.
pub trait Optimizer<D: Device>: std::fmt::Debug + Send + Sync {
    /// Changes `values` by one update with `clip · grads` at learning rate `lr`.
    fn step(&mut self, values: &mut D::Buffer, grads: &D::Buffer, clip: f32, lr: f64);

    /// All state as named tensors, in a fixed order. Loading it gives the same next updates, bit for bit.
    fn state(&self) -> Vec<StateTensor>;

    /// Replaces the state by what [`Optimizer::state`] returned.
    ///
    /// # Errors
    /// If a tensor is missing, unknown or of another type or shape. The state is unchanged then.
    fn load_state(&mut self, tensors: Vec<StateTensor>) -> Result<(), StateError>;
}

#[cfg(test)]
mod tests;
