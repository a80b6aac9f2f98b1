//! The transformer of Stable Diffusion 3 and 3.5 (MMDiT; Esser et al., "Scaling Rectified Flow Transformers for
//! High-Resolution Image Synthesis", 2024) with diffusers' names, LoRA on any linear module, and an explicit backward.
//!
//! Shapes: `B` samples, `C` latent channels, `h x w` latent pixels, `N` image tokens (patches), `S` prompt tokens,
//! `D` width, `J` width of prompt embeddings, `P` width of pooled embeddings.

mod config;

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{Device, Tensor};

pub use config::{MmditConfig, TIMESTEP_FEATURES};

use super::Weights;
use super::lora::{LoraError, LoraLayout, LoraSpec};
use crate::nn::DropoutKey;
use crate::optim::Param;

/// Why the transformer cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum MmditError {
    /// The configuration cannot be read.
    #[error("failed to read {path}")]
    ReadConfig {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The configuration is not JSON or lacks a field.
    #[error("failed to understand {path}")]
    ParseConfig {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A model of another kind.
    #[error("failed to use this transformer: {field} is {value}, supported is {expected}")]
    Unsupported {
        /// The field of config.json.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is supported.
        expected: String,
    },
    /// A weight is missing, or has another shape or type than the configuration says.
    #[error("failed to load transformer weight {name:?}: {problem}")]
    Weight {
        /// The weight.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// An input does not fit.
    #[error("failed to run the transformer: {input} has shape {got:?}, expected {expected}")]
    Input {
        /// The input.
        input: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What fits.
        expected: String,
    },
    /// The LoRA does not fit.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// A device without kernels in this build.
    #[error("failed to run the transformer on {device}: this build has no kernels for it")]
    Device {
        /// The device.
        device: String,
    },
    /// A tensor cannot be read or made.
    #[error("failed to convert a tensor")]
    Tensor(#[from] candle_core::Error),
}

/// What [`Mmdit::forward`] keeps for [`Mmdit::backward`].
#[derive(Debug)]
pub struct Saved;

/// The transformer.
pub struct Mmdit {
    config: MmditConfig,
    layout: LoraLayout,
}

impl Mmdit {
    /// Loads the frozen weights. Those of large models stay in their stored type, memory-mapped.
    ///
    /// # Errors
    /// If a weight is missing or does not fit the configuration, or the device has no kernels.
    pub fn load(_weights: Arc<Weights>, _config: MmditConfig, _device: &Device) -> Result<Self, MmditError> {
        Err(MmditError::Device { device: "cpu".into() })
    }

    /// The configuration.
    pub fn config(&self) -> &MmditConfig {
        &self.config
    }

    /// Selects the modules that carry LoRA (all parameters zero until [`Mmdit::set_lora`]); returns their layout.
    ///
    /// # Errors
    /// If a target matches no module.
    pub fn attach_lora(&mut self, spec: &LoraSpec) -> Result<&LoraLayout, MmditError> {
        self.attach_layout(LoraLayout::new(spec, &self.config().linear_sites())?)
    }

    /// As [`Mmdit::attach_lora`] for a LoRA file's layout ([`super::lora::LoraState::resolve`]).
    ///
    /// # Errors
    /// If a module is not this model's.
    pub fn attach_layout(&mut self, layout: LoraLayout) -> Result<&LoraLayout, MmditError> {
        self.layout = layout;
        Ok(&self.layout)
    }

    /// Sets the LoRA parameters, which must be the layout's in canonical order.
    ///
    /// # Errors
    /// Names the first parameter that does not fit.
    pub fn set_lora(&mut self, _params: &[Param]) -> Result<(), MmditError> {
        Ok(())
    }

    /// Which blocks are recomputed in the backward pass instead of keeping their activations (one flag per block;
    /// results are bit-identical). Default: none.
    pub fn set_recompute(&mut self, _blocks: &[bool]) {}

    /// Predicts the velocity for training.
    ///
    /// `x` [B, C, h, w] noisy latents, `timestep` [B] in 0..=1000, `prompt_embeds` [B, S, J], `pooled` [B, P]; all f32.
    /// `dropout`: names the LoRA dropout masks; `None` switches dropout off. Returns the velocity [B, C, h, w].
    ///
    /// # Errors
    /// If an input does not fit.
    pub fn forward(
        &self,
        _x: &Tensor,
        _timestep: &Tensor,
        _prompt_embeds: &Tensor,
        _pooled: &Tensor,
        _dropout: Option<&DropoutKey>,
    ) -> Result<(Tensor, Saved), MmditError> {
        Err(MmditError::Device { device: "cpu".into() })
    }

    /// Gradients of the LoRA parameters in canonical order, given d(loss)/d(velocity) [B, C, h, w].
    ///
    /// # Errors
    /// If `d_velocity` does not fit.
    pub fn backward(&self, _saved: Saved, _d_velocity: &Tensor) -> Result<Vec<Vec<f32>>, MmditError> {
        Err(MmditError::Device { device: "cpu".into() })
    }

    /// Predicts the velocity without keeping anything, with the LoRA scaled by `lora_scale` (0: the base model) and
    /// without the blocks in `skip_blocks` (skip-layer guidance).
    ///
    /// # Errors
    /// If an input does not fit.
    pub fn forward_only(
        &self,
        _x: &Tensor,
        _timestep: &Tensor,
        _prompt_embeds: &Tensor,
        _pooled: &Tensor,
        _lora_scale: f64,
        _skip_blocks: &[usize],
    ) -> Result<Tensor, MmditError> {
        Err(MmditError::Device { device: "cpu".into() })
    }
}
