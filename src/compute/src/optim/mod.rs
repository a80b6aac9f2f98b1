//! Optimizers, learning-rate schedules and gradient clipping on f32 master parameters.
//!
//! It runs on the host over plain slices; AdamW and its 8-bit form also where the model is on a GPU (`gpu`). Updates are element
//! by element and every sum has a fixed partition, so results do not depend on the number of threads.

pub mod adamw;
pub mod adamw8bit;
pub mod clip;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod prodigy;
mod quantize;
pub mod schedule;
pub mod state;

pub use adamw::{AdamW, AdamWSettings};
pub use adamw8bit::AdamW8bit;
pub use clip::clip_global_norm;
pub use prodigy::{Prodigy, ProdigySettings};
pub use schedule::Schedule;
pub use state::{StateData, StateError, StateTensor};

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
/// The layout (names, order, lengths) of the parameters is fixed when the optimizer is made; `step` must be given the same.
pub trait Optimizer: Send {
    /// Changes `params` by one update with `grads` (same order and lengths as `params`) at learning rate `lr`.
    fn step(&mut self, params: &mut [Param], grads: &[Vec<f32>], lr: f64);

    /// All state as named tensors, in a fixed order. Loading it gives the same next updates, bit for bit.
    fn state(&self) -> Vec<StateTensor>;

    /// Replaces the state by what [`Optimizer::state`] returned.
    ///
    /// # Errors
    /// If a tensor is missing, unknown or of another type or shape. The state is unchanged then.
    fn load_state(&mut self, tensors: Vec<StateTensor>) -> Result<(), StateError>;
}

/// Name and length of each parameter, fixed when an optimizer is made.
#[derive(Debug, Clone)]
struct Layout(Vec<(String, usize)>);

impl Layout {
    fn of(params: &[Param]) -> Self {
        Self(params.iter().map(|p| (p.name.clone(), p.value.len())).collect())
    }

    /// Panics on a caller's mistake: a mixed-up order would train the wrong tensors without a sign.
    fn check(&self, params: &[Param], grads: &[Vec<f32>]) {
        assert!(self.0.len() == params.len() && params.len() == grads.len(), "parameters and gradients should be those of the optimizer");
        for ((name, len), (param, grad)) in self.0.iter().zip(params.iter().zip(grads)) {
            assert!(*name == param.name && *len == param.value.len() && *len == grad.len(), "parameter {name:?} and its gradient should have {len} values");
        }
    }
}

#[cfg(test)]
mod tests;
