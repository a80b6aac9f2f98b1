//! The autoencoder (diffusers' `AutoencoderKL`): pictures to latents and back.
//!
//! Pictures are [B, 3, H, W] in [-1, 1], latents [B, C, h, w]. Each picture is computed by itself, so that neither memory
//! nor its numbers depend on the batch. f32 on the CPU, as the reference trains; the engine's precision on a GPU.

use std::path::Path;

use serde::Deserialize;

use super::digest::{DigestError, component_digest};
use super::layout::{ComponentConfig, LayoutError, ModelDir, Part};
use super::weights::{Weights, WeightsError};
use finetune_common::digest::{Sha256Digest, sha256_parts};
use finetune_common::tensor::{HostTensor, ShapeError};
use finetune_compute::kernels::{DeviceError, Engine, catch};
use finetune_compute::with_device;

mod blocks;
mod networks;

use networks::{Decoder, Encoder, Network};

/// Why the autoencoder could not be used.
#[derive(Debug, thiserror::Error)]
pub enum VaeError {
    /// The model folder is not as it should be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The weights are not as they should be.
    #[error("failed to load the VAE")]
    Weights(#[from] WeightsError),
    /// The identity could not be made.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// The input does not fit.
    #[error("the VAE takes {expected}, got {got:?}")]
    Input {
        /// What fits.
        expected: String,
        /// The input's shape.
        got: Vec<usize>,
    },
    /// A tensor does not have the shape that it should have.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The GPU failed.
    #[error("failed to run the VAE")]
    Device(#[from] DeviceError),
}

/// `vae/config.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct VaeConfig {
    /// Channels of pictures.
    #[serde(default = "three")]
    pub in_channels: usize,
    /// Channels of decoded pictures.
    #[serde(default = "three")]
    pub out_channels: usize,
    /// Channels of each level.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each of the encoder's levels; the decoder has one more.
    #[serde(default = "one")]
    pub layers_per_block: usize,
    /// Channels of latents.
    #[serde(default = "four")]
    pub latent_channels: usize,
    /// Groups of the norms.
    #[serde(default = "thirty_two")]
    pub norm_num_groups: usize,
    /// What latents are multiplied by.
    #[serde(default = "scaling")]
    pub scaling_factor: f64,
    /// What is taken off latents before.
    pub shift_factor: Option<f64>,
    /// Whether a 1x1 convolution follows the encoder.
    #[serde(default = "yes")]
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    #[serde(default = "yes")]
    pub use_post_quant_conv: bool,
    /// Whether the lowest level has attention.
    #[serde(default = "yes")]
    pub mid_block_add_attention: bool,
    /// Must be `silu`.
    #[serde(default = "silu")]
    pub act_fn: String,
    /// Must all be `DownEncoderBlock2D`.
    #[serde(default)]
    pub down_block_types: Vec<String>,
    /// Must all be `UpDecoderBlock2D`.
    #[serde(default)]
    pub up_block_types: Vec<String>,
}

fn one() -> usize {
    1
}

fn three() -> usize {
    3
}

fn four() -> usize {
    4
}

fn thirty_two() -> usize {
    32
}

fn scaling() -> f64 {
    0.18215
}

fn yes() -> bool {
    true
}

fn silu() -> String {
    "silu".into()
}

impl ComponentConfig for VaeConfig {
    fn check(&self) -> Result<(), String> {
        if self.block_out_channels.is_empty() || self.block_out_channels.len() > 8 {
            return Err("block_out_channels must name one to eight levels".into());
        }
        if self.norm_num_groups == 0 || self.in_channels == 0 || self.out_channels == 0 || self.latent_channels == 0 || self.layers_per_block == 0 {
            return Err("a size is 0".into());
        }
        if let Some(channels) = self.block_out_channels.iter().find(|c| **c == 0 || !c.is_multiple_of(self.norm_num_groups)) {
            return Err(format!("block_out_channels has {channels}, which is not a multiple of norm_num_groups {}", self.norm_num_groups));
        }
        if self.act_fn != "silu" {
            return Err(format!("act_fn is {:?}, only \"silu\" is supported", self.act_fn));
        }
        if let Some(kind) =
            self.down_block_types.iter().find(|k| *k != "DownEncoderBlock2D").or_else(|| self.up_block_types.iter().find(|k| *k != "UpDecoderBlock2D"))
        {
            return Err(format!("block type {kind:?} is not supported"));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor != 0.0) {
            return Err(format!("scaling_factor is {}", self.scaling_factor));
        }
        Ok(())
    }
}

impl VaeConfig {
    /// Reads the configuration of a model folder.
    ///
    /// # Errors
    /// If it is missing, cannot be understood or is not supported.
    pub fn read(model: &ModelDir) -> Result<Self, VaeError> {
        Ok(model.config(Part::Vae)?)
    }

    /// Pixels per latent pixel, each way (8).
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Latents as the transformer sees them: (z - shift) · scale.
    #[must_use]
    pub fn scale(&self, z: HostTensor) -> HostTensor {
        let (shift, scale) = (self.shift_factor.unwrap_or(0.0) as f32, self.scaling_factor as f32);
        z.map(|z| (z - shift) * scale)
    }

    /// Latents as the decoder sees them: x / scale + shift.
    #[must_use]
    pub fn unscale(&self, x: HostTensor) -> HostTensor {
        let (shift, scale) = (self.shift_factor.unwrap_or(0.0) as f32, self.scaling_factor as f32);
        x.map(|x| x / scale + shift)
    }
}

/// What decides latents besides the picture: the contents of `vae/`. `memory` is as in [`component_digest`].
///
/// # Errors
/// If a file cannot be read.
pub fn digest(model: &ModelDir, memory: Option<&Path>) -> Result<Sha256Digest, VaeError> {
    Ok(sha256_parts([&b"latents 2"[..], &component_digest(&model.path(Part::Vae), memory)?]))
}

/// Mean and logarithm of the variance of a picture's latents, [B, C, h, w] each; logvar is clamped to -30..=20.
#[derive(Debug, Clone)]
pub struct Posterior {
    /// The mean.
    pub mean: HostTensor,
    /// ln σ².
    pub logvar: HostTensor,
}

/// Pictures to latents.
#[derive(Debug)]
pub struct VaeEncoder {
    config: VaeConfig,
    network: Box<dyn Network>,
}

impl VaeEncoder {
    /// Loads the encoder's weights onto the engine's device.
    ///
    /// # Errors
    /// If a file is missing, the weights do not fit the configuration, or the device has no room.
    pub fn load(model: &ModelDir, engine: &Engine) -> Result<Self, VaeError> {
        let config = VaeConfig::read(model)?;
        let weights = Weights::open(&model.path(Part::Vae))?;
        let load = || -> Result<Box<dyn Network>, VaeError> { with_device!(engine, device => Ok(Box::new(Encoder::load(&config, &weights, device)?))) };
        let network = catch(load)??;
        weights.release("");
        Ok(Self { config, network })
    }

    /// The configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Encodes pictures [B, 3, H, W] in [-1, 1]. A GPU gets the next one while it computes one.
    ///
    /// # Errors
    /// If the shape does not fit or the device has no room.
    pub fn encode(&self, pixels: &HostTensor) -> Result<Posterior, VaeError> {
        let (channels, least) = (self.config.in_channels, self.config.downscale());
        let (batch, height, width) = match pixels.shape() {
            &[b, c, h, w] if b > 0 && c == channels && h >= least && w >= least => (b, h, w),
            got => {
                return Err(VaeError::Input { expected: format!("pictures [B, {channels}, H, W] of at least {least} x {least}"), got: got.to_vec() });
            }
        };
        let (moments, size) = catch(|| self.network.run(pixels.values(), height, width))?;
        let (mut mean, mut logvar) = (Vec::new(), Vec::new());
        for values in moments {
            let (own_mean, own_logvar) = values.split_at(values.len() / 2);
            mean.extend_from_slice(own_mean);
            logvar.extend(own_logvar.iter().map(|v| v.clamp(-30.0, 20.0)));
        }
        let shape = [batch, self.config.latent_channels, size.0, size.1];
        Ok(Posterior { mean: HostTensor::new(mean, shape)?, logvar: HostTensor::new(logvar, shape)? })
    }
}

/// Latents to pictures.
#[derive(Debug)]
pub struct VaeDecoder {
    config: VaeConfig,
    network: Box<dyn Network>,
}

impl VaeDecoder {
    /// Loads the decoder's weights onto the engine's device.
    ///
    /// # Errors
    /// If a file is missing, the weights do not fit the configuration, or the device has no room.
    pub fn load(model: &ModelDir, engine: &Engine) -> Result<Self, VaeError> {
        let config = VaeConfig::read(model)?;
        let weights = Weights::open(&model.path(Part::Vae))?;
        let load = || -> Result<Box<dyn Network>, VaeError> { with_device!(engine, device => Ok(Box::new(Decoder::load(&config, &weights, device)?))) };
        let network = catch(load)??;
        weights.release("");
        Ok(Self { config, network })
    }

    /// The configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Decodes latents [B, C, h, w], already passed through [`VaeConfig::unscale`], to about [-1, 1].
    ///
    /// # Errors
    /// If the shape does not fit or the device has no room.
    pub fn decode(&self, latents: &HostTensor) -> Result<HostTensor, VaeError> {
        let channels = self.config.latent_channels;
        let (batch, height, width) = match latents.shape() {
            &[b, c, h, w] if c == channels && b * h * w > 0 => (b, h, w),
            got => return Err(VaeError::Input { expected: format!("latents [B, {channels}, h, w]"), got: got.to_vec() }),
        };
        let (pictures, size) = catch(|| self.network.run(latents.values(), height, width))?;
        Ok(HostTensor::new(pictures.concat(), [batch, self.config.out_channels, size.0, size.1])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_is_checked_and_scaling_inverts() {
        let config: VaeConfig =
            serde_json::from_value(serde_json::json!({"block_out_channels": [16, 32], "norm_num_groups": 8, "scaling_factor": 1.5, "shift_factor": 0.06}))
                .unwrap();
        config.check().unwrap();
        let scaled = config.scale(HostTensor::vector(vec![0.5, -2.0]));
        assert!((scaled.values()[0] - 0.66).abs() < 1e-6 && (scaled.values()[1] + 3.09).abs() < 1e-6);
        let back = config.unscale(scaled);
        assert!((back.values()[0] - 0.5).abs() < 1e-6 && (back.values()[1] + 2.0).abs() < 1e-6);
        for (key, value, part) in [
            ("act_fn", serde_json::json!("relu"), "silu"),
            ("norm_num_groups", serde_json::json!(5), "multiple"),
            ("down_block_types", serde_json::json!(["AttnDownBlock2D"]), "AttnDownBlock2D"),
            ("block_out_channels", serde_json::json!([]), "levels"),
        ] {
            let mut json = serde_json::json!({"block_out_channels": [16, 32], "norm_num_groups": 8});
            json[key] = value;
            assert!(serde_json::from_value::<VaeConfig>(json).unwrap().check().unwrap_err().contains(part));
        }
    }
}
