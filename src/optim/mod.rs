//! Optimizers, learning-rate schedules and gradient clipping on f32 master parameters.

/// A trainable tensor: the f32 master copy on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Param {
    /// Its name in a LoRA file, as `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub value: Vec<f32>,
}
