//! Encoder and decoder on a device, once for all devices.

use std::fmt::Debug;

use super::blocks::{Level, MidBlock, Reader};
use super::{VaeConfig, VaeError};
use crate::weights::Weights;
use finetune_compute::kernels::{Convolution, Device, GroupNorm, Picture, Resampling};

/// A half of the autoencoder on a device.
pub(super) trait Network: Debug + Send + Sync {
    /// The results of tensors [channels, height, width], which lie one after another, and their size (height, width).
    fn run(&self, inputs: &[f32], height: usize, width: usize) -> (Vec<Vec<f32>>, (usize, usize));
}

/// Pictures to moments of latents.
#[derive(Debug)]
pub(super) struct Encoder<D: Device> {
    device: D,
    in_channels: usize,
    latent_channels: usize,
    /// Channels of the first convolution's input on the device.
    channels: usize,
    conv_in: Convolution<D::Buffer>,
    down: Vec<Level<D>>,
    mid: MidBlock<D>,
    norm_out: GroupNorm<D::Buffer>,
    conv_out: Convolution<D::Buffer>,
    quant: Option<Convolution<D::Buffer>>,
}

impl<D: Device> Encoder<D> {
    pub(super) fn load(config: &VaeConfig, weights: &Weights, device: &D) -> Result<Self, VaeError> {
        let reader = Reader { device, weights, groups: config.norm_num_groups };
        let levels = &config.block_out_channels;
        let (first, last, moments) = (levels[0], levels[levels.len() - 1], 2 * config.latent_channels);
        let mut down = Vec::new();
        for (i, &out) in levels.iter().enumerate() {
            let resize = (i + 1 < levels.len()).then_some(("downsamplers.0.conv", Resampling::Halve));
            let channels = (levels[i.saturating_sub(1)], out);
            down.push(Level::load(&reader, &format!("encoder.down_blocks.{i}"), channels, config.layers_per_block, resize)?);
        }
        let channels = device.padded_channels(config.in_channels);
        Ok(Self {
            conv_in: reader.padded("encoder.conv_in", (config.in_channels, first), (channels, first), 3)?,
            down,
            mid: MidBlock::load(&reader, "encoder.mid_block", last, config.mid_block_add_attention)?,
            norm_out: reader.norm("encoder.conv_norm_out", last)?,
            conv_out: reader.conv("encoder.conv_out", last, moments, 3)?,
            quant: if config.use_quant_conv { Some(reader.conv("quant_conv", moments, moments, 1)?) } else { None },
            channels,
            in_channels: config.in_channels,
            latent_channels: config.latent_channels,
            device: device.clone(),
        })
    }

    /// Mean and logarithm of the variance [2 · latent channels, h, w] of a picture [channels, H, W].
    fn moments(&self, picture: &[f32], height: usize, width: usize) -> Picture<D::Buffer> {
        let device = &self.device;
        let x = device.upload_picture(picture, (self.in_channels, height, width), self.channels);
        let mut x = device.convolve(&x, &self.conv_in, None);
        for level in &self.down {
            x = level.forward(device, x);
        }
        let x = self.mid.forward(device, x);
        let x = device.convolve(&device.normalise(&x, &self.norm_out, true), &self.conv_out, None);
        match &self.quant {
            Some(quant) => device.convolve(&x, quant, None),
            None => x,
        }
    }
}

impl<D: Device> Network for Encoder<D> {
    fn run(&self, inputs: &[f32], height: usize, width: usize) -> (Vec<Vec<f32>>, (usize, usize)) {
        // A GPU gets the next picture while it computes one.
        let begun: Vec<_> = inputs.chunks_exact(self.in_channels * height * width).map(|picture| self.moments(picture, height, width)).collect();
        let size = begun.last().map_or((0, 0), |moments| (moments.height(), moments.width()));
        (begun.iter().map(|moments| self.device.download_picture(moments, 2 * self.latent_channels)).collect(), size)
    }
}

/// Latents to pictures.
#[derive(Debug)]
pub(super) struct Decoder<D: Device> {
    device: D,
    latent_channels: usize,
    out_channels: usize,
    /// Channels of latents on the device.
    channels: usize,
    post_quant: Option<Convolution<D::Buffer>>,
    conv_in: Convolution<D::Buffer>,
    mid: MidBlock<D>,
    up: Vec<Level<D>>,
    norm_out: GroupNorm<D::Buffer>,
    conv_out: Convolution<D::Buffer>,
}

impl<D: Device> Decoder<D> {
    pub(super) fn load(config: &VaeConfig, weights: &Weights, device: &D) -> Result<Self, VaeError> {
        let reader = Reader { device, weights, groups: config.norm_num_groups };
        let levels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last, latent) = (levels[0], levels[levels.len() - 1], config.latent_channels);
        let mut up = Vec::new();
        for (i, &out) in levels.iter().enumerate() {
            let resize = (i + 1 < levels.len()).then_some(("upsamplers.0.conv", Resampling::Double));
            let channels = (levels[i.saturating_sub(1)], out);
            up.push(Level::load(&reader, &format!("decoder.up_blocks.{i}"), channels, config.layers_per_block + 1, resize)?);
        }
        let (channels, picture) = (device.padded_channels(latent), device.padded_channels(config.out_channels));
        Ok(Self {
            post_quant: if config.use_post_quant_conv { Some(reader.padded("post_quant_conv", (latent, latent), (channels, channels), 1)?) } else { None },
            conv_in: reader.padded("decoder.conv_in", (latent, first), (channels, first), 3)?,
            mid: MidBlock::load(&reader, "decoder.mid_block", first, config.mid_block_add_attention)?,
            up,
            norm_out: reader.norm("decoder.conv_norm_out", last)?,
            conv_out: reader.padded("decoder.conv_out", (last, config.out_channels), (last, picture), 3)?,
            channels,
            latent_channels: latent,
            out_channels: config.out_channels,
            device: device.clone(),
        })
    }

    /// A picture [channels, H, W] of latents [latent channels, h, w].
    fn picture(&self, latents: &[f32], height: usize, width: usize) -> Picture<D::Buffer> {
        let device = &self.device;
        let mut x = device.upload_picture(latents, (self.latent_channels, height, width), self.channels);
        if let Some(post_quant) = &self.post_quant {
            x = device.convolve(&x, post_quant, None);
        }
        let mut x = self.mid.forward(device, device.convolve(&x, &self.conv_in, None));
        for level in &self.up {
            x = level.forward(device, x);
        }
        device.convolve(&device.normalise(&x, &self.norm_out, true), &self.conv_out, None)
    }
}

impl<D: Device> Network for Decoder<D> {
    fn run(&self, inputs: &[f32], height: usize, width: usize) -> (Vec<Vec<f32>>, (usize, usize)) {
        let mut size = (0, 0);
        let latents = inputs.chunks_exact(self.latent_channels * height * width);
        let pictures = latents.map(|latents| {
            let picture = self.picture(latents, height, width);
            size = (picture.height(), picture.width());
            self.device.download_picture(&picture, self.out_channels)
        });
        (pictures.collect(), size)
    }
}
