//! The autoencoder (diffusers' `AutoencoderKL`): pictures to latents and back.
//!
//! Pictures are [B, 3, H, W] in [-1, 1], latents [B, C, h, w]. Each picture is computed by itself, so that neither memory
//! nor its numbers depend on the batch. f32 on the CPU, as the reference trains; the engine's precision on a GPU.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::Deserialize;

use super::digest::{DigestError, component_digest};
use super::layout::{ComponentConfig, LayoutError, ModelDir, Part};
use super::weights::{Weights, WeightsError};
use finetune_common::digest::{Sha256Digest, sha256_parts};
#[cfg(feature = "cuda")]
use finetune_compute::kernels::catch;
use finetune_compute::kernels::{DeviceError, Engine};

mod blocks;
#[cfg(feature = "cuda")]
mod gpu;
mod layers;

use blocks::{DownBlock, MidBlock, UpBlock};
use layers::{Conv, Norm, Reader};

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
    /// The weights, read from here, are of another form.
    #[error("failed to build the VAE of {path}")]
    Build {
        /// The weights.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<candle_core::Error>,
    },
    /// A tensor operation failed.
    #[error("failed to run the VAE")]
    Tensor(#[from] candle_core::Error),
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
    ///
    /// # Errors
    /// If the device fails.
    pub fn scale(&self, z: &Tensor) -> candle_core::Result<Tensor> {
        (z - self.shift_factor.unwrap_or(0.0))? * self.scaling_factor
    }

    /// Latents as the decoder sees them: x / scale + shift.
    ///
    /// # Errors
    /// If the device fails.
    pub fn unscale(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        (x / self.scaling_factor)? + self.shift_factor.unwrap_or(0.0)
    }
}

/// What decides latents besides the picture: the contents of `vae/`. `memory` is as in [`component_digest`].
///
/// # Errors
/// If a file cannot be read.
pub fn digest(model: &ModelDir, memory: Option<&Path>) -> Result<Sha256Digest, VaeError> {
    Ok(sha256_parts([&b"latents 1"[..], &component_digest(&model.path(Part::Vae), memory)?]))
}

/// Mean and logarithm of the variance of a picture's latents, [B, C, h, w] each; logvar is clamped to -30..=20.
#[derive(Debug, Clone)]
pub struct Posterior {
    /// The mean.
    pub mean: Tensor,
    /// ln σ².
    pub logvar: Tensor,
}

/// Pictures to latents.
#[derive(Debug)]
pub struct VaeEncoder {
    config: VaeConfig,
    network: EncoderNetwork,
}

#[derive(Debug)]
enum EncoderNetwork {
    Host(Box<HostEncoder>),
    #[cfg(feature = "cuda")]
    Gpu(Box<gpu::Encoder>),
}

impl VaeEncoder {
    /// Loads the encoder's weights for the engine's device.
    ///
    /// # Errors
    /// If a file is missing, or the weights do not fit the configuration.
    pub fn load(model: &ModelDir, engine: &Engine) -> Result<Self, VaeError> {
        let config = VaeConfig::read(model)?;
        let weights = Weights::open(&model.path(Part::Vae))?;
        let network = Self::network(&config, &weights, engine)?;
        weights.release("");
        Ok(Self { config, network })
    }

    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "used with the feature"))]
    fn network(config: &VaeConfig, weights: &Weights, engine: &Engine) -> Result<EncoderNetwork, VaeError> {
        #[cfg(feature = "cuda")]
        if let Some(ops) = engine.encode_ops() {
            return Ok(EncoderNetwork::Gpu(Box::new(catch(|| gpu::Encoder::load(engine, ops, weights, config))??)));
        }
        Ok(EncoderNetwork::Host(Box::new(HostEncoder::load(config, weights)?)))
    }

    /// The configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Encodes pictures [B, 3, H, W] in [-1, 1].
    ///
    /// # Errors
    /// If the shape does not fit or the device has no room.
    pub fn encode(&self, pixels: &Tensor) -> Result<Posterior, VaeError> {
        let least = self.config.downscale();
        match pixels.dims() {
            &[b, c, h, w] if b > 0 && c == self.config.in_channels && h >= least && w >= least => {}
            got => {
                return Err(VaeError::Input {
                    expected: format!("pictures [B, {}, H, W] of at least {least} x {least}", self.config.in_channels),
                    got: got.to_vec(),
                });
            }
        }
        let moments = match &self.network {
            EncoderNetwork::Host(encoder) => each(pixels, |picture| encoder.moments(picture))?,
            #[cfg(feature = "cuda")]
            EncoderNetwork::Gpu(encoder) => catch(|| moments_on_gpu(encoder, pixels))??,
        };
        let logvar = moments.narrow(1, self.config.latent_channels, self.config.latent_channels)?;
        Ok(Posterior { mean: moments.narrow(1, 0, self.config.latent_channels)?.contiguous()?, logvar: logvar.clamp(-30.0, 20.0)? })
    }
}

/// The moments of pictures [B, C, H, W]: each picture by itself, and the next one on its way to the GPU while one is computed.
#[cfg(feature = "cuda")]
fn moments_on_gpu(encoder: &gpu::Encoder, pixels: &Tensor) -> candle_core::Result<Tensor> {
    let (batch, _, height, width) = pixels.dims4()?;
    let begin = |i| Ok::<_, candle_core::Error>(encoder.moments(&pixels.narrow(0, i, 1)?.flatten_all()?.to_vec1::<f32>()?, height, width));
    let begun = (0..batch).map(begin).collect::<candle_core::Result<Vec<_>>>()?;
    let mut all = Vec::new();
    let mut size = (0, 0);
    for moments in &begun {
        let Some((values, height, width)) = moments.as_ref().and_then(|moments| encoder.finish(moments)) else {
            candle_core::bail!("the engine has left its GPU")
        };
        all.extend(values);
        size = (height, width);
    }
    let channels = all.len() / (batch * size.0 * size.1);
    Tensor::from_vec(all, (batch, channels, size.0, size.1), &Device::Cpu)
}

/// One sample [1, C, H, W] through a network on the GPU.
#[cfg(feature = "cuda")]
fn on_gpu(x: &Tensor, run: impl Fn(&[f32], usize, usize) -> Option<(Vec<f32>, usize, usize)>) -> candle_core::Result<Tensor> {
    let (_, _, height, width) = x.dims4()?;
    let values: Vec<f32> = x.flatten_all()?.to_vec1()?;
    let Some((values, height, width)) = run(&values, height, width) else { candle_core::bail!("the engine has left its GPU") };
    let channels = values.len() / (height * width);
    Tensor::from_vec(values, (1, channels, height, width), &Device::Cpu)
}

/// The encoder on the CPU.
#[derive(Debug)]
struct HostEncoder {
    conv_in: Conv,
    down: Vec<DownBlock>,
    mid: MidBlock,
    norm_out: Norm,
    conv_out: Conv,
    quant: Option<Conv>,
}

impl HostEncoder {
    fn load(config: &VaeConfig, weights: &Weights) -> Result<Self, VaeError> {
        let root = Reader::new(weights, &Device::Cpu, config.norm_num_groups);
        let reader = root.at("encoder");
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let mut down = Vec::new();
        for (i, &out) in channels.iter().enumerate() {
            let input = channels[i.saturating_sub(1)];
            down.push(DownBlock::load(&reader.at(&format!("down_blocks.{i}")), input, out, config.layers_per_block, i + 1 < channels.len())?);
        }
        Ok(Self {
            conv_in: reader.conv3("conv_in", config.in_channels, first)?,
            down,
            mid: MidBlock::load(&reader.at("mid_block"), last, config.mid_block_add_attention)?,
            norm_out: reader.norm("conv_norm_out", last)?,
            conv_out: reader.conv3("conv_out", last, 2 * config.latent_channels)?,
            quant: if config.use_quant_conv { Some(root.conv1("quant_conv", 2 * config.latent_channels, 2 * config.latent_channels)?) } else { None },
        })
    }

    fn moments(&self, picture: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = self.conv_in.forward(picture)?;
        for block in &self.down {
            x = block.forward(&x)?;
        }
        x = self.conv_out.forward(&self.norm_out.forward_silu(&self.mid.forward(&x)?)?)?;
        match &self.quant {
            Some(quant) => quant.forward(&x),
            None => Ok(x),
        }
    }
}

/// Latents to pictures.
#[derive(Debug)]
pub struct VaeDecoder {
    config: VaeConfig,
    network: DecoderNetwork,
}

#[derive(Debug)]
enum DecoderNetwork {
    Host(Box<HostDecoder>),
    #[cfg(feature = "cuda")]
    Gpu(Box<gpu::Decoder>),
}

impl VaeDecoder {
    /// Loads the decoder's weights for the engine's device.
    ///
    /// # Errors
    /// If a file is missing, or the weights do not fit the configuration.
    pub fn load(model: &ModelDir, engine: &Engine) -> Result<Self, VaeError> {
        let config = VaeConfig::read(model)?;
        let weights = Weights::open(&model.path(Part::Vae))?;
        let network = Self::network(&config, &weights, engine)?;
        weights.release("");
        Ok(Self { config, network })
    }

    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "used with the feature"))]
    fn network(config: &VaeConfig, weights: &Weights, engine: &Engine) -> Result<DecoderNetwork, VaeError> {
        #[cfg(feature = "cuda")]
        if let Some(ops) = engine.encode_ops() {
            return Ok(DecoderNetwork::Gpu(Box::new(catch(|| gpu::Decoder::load(engine, ops, weights, config))??)));
        }
        Ok(DecoderNetwork::Host(Box::new(HostDecoder::load(config, weights)?)))
    }

    /// The configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Decodes latents [B, C, h, w], already passed through [`VaeConfig::unscale`], to about [-1, 1].
    ///
    /// # Errors
    /// If the shape does not fit or the device has no room.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor, VaeError> {
        match latents.dims() {
            &[b, c, h, w] if c == self.config.latent_channels && b * h * w > 0 => {}
            got => return Err(VaeError::Input { expected: format!("latents [B, {}, h, w]", self.config.latent_channels), got: got.to_vec() }),
        }
        Ok(match &self.network {
            DecoderNetwork::Host(decoder) => each(latents, |latent| decoder.picture(latent))?,
            #[cfg(feature = "cuda")]
            DecoderNetwork::Gpu(decoder) => catch(|| each(latents, |latent| on_gpu(latent, |x, h, w| decoder.picture(x, h, w))))??,
        })
    }
}

/// The decoder on the CPU.
#[derive(Debug)]
struct HostDecoder {
    post_quant: Option<Conv>,
    conv_in: Conv,
    mid: MidBlock,
    up: Vec<UpBlock>,
    norm_out: Norm,
    conv_out: Conv,
}

impl HostDecoder {
    fn load(config: &VaeConfig, weights: &Weights) -> Result<Self, VaeError> {
        let root = Reader::new(weights, &Device::Cpu, config.norm_num_groups);
        let reader = root.at("decoder");
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let mut up = Vec::new();
        for (i, &out) in channels.iter().enumerate() {
            let input = channels[i.saturating_sub(1)];
            up.push(UpBlock::load(&reader.at(&format!("up_blocks.{i}")), input, out, config.layers_per_block + 1, i + 1 < channels.len())?);
        }
        Ok(Self {
            post_quant: if config.use_post_quant_conv { Some(root.conv1("post_quant_conv", config.latent_channels, config.latent_channels)?) } else { None },
            conv_in: reader.conv3("conv_in", config.latent_channels, first)?,
            mid: MidBlock::load(&reader.at("mid_block"), first, config.mid_block_add_attention)?,
            up,
            norm_out: reader.norm("conv_norm_out", last)?,
            conv_out: reader.conv3("conv_out", last, config.out_channels)?,
        })
    }

    fn picture(&self, latent: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = match &self.post_quant {
            Some(conv) => conv.forward(latent)?,
            None => latent.clone(),
        };
        x = self.mid.forward(&self.conv_in.forward(&x)?)?;
        for block in &self.up {
            x = block.forward(&x)?;
        }
        self.conv_out.forward(&self.norm_out.forward_silu(&x)?)
    }
}

/// Runs `f` on each sample [1, ..] of a batch.
fn each(batch: &Tensor, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> candle_core::Result<Tensor> {
    let results = (0..batch.dim(0)?).map(|i| f(&batch.narrow(0, i, 1)?.contiguous()?)).collect::<candle_core::Result<Vec<_>>>()?;
    Tensor::cat(&results, 0)
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
        let z = Tensor::new(&[[0.5_f32, -2.0]], &Device::Cpu).unwrap();
        let scaled = config.scale(&z).unwrap();
        let values = scaled.to_vec2::<f32>().unwrap();
        assert!((values[0][0] - 0.66).abs() < 1e-6 && (values[0][1] + 3.09).abs() < 1e-6);
        let back = config.unscale(&scaled).unwrap().to_vec2::<f32>().unwrap();
        assert!((back[0][0] - 0.5).abs() < 1e-6 && (back[0][1] + 2.0).abs() < 1e-6);
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
