//! The autoencoder on a GPU: pictures as [pixels, channels], convolutions as products with columns that are made strip by strip. In the engine's precision; group statistics are f64.

use rayon::prelude::*;

use super::layers::EPSILON;
use super::{VaeConfig, VaeError};
use crate::weights::{Weights, WeightsError};
use finetune_compute::kernels::{Buffer, EncodeOps, Engine, Window};

/// Values of columns that are there at once (256 MiB of 16-bit values).
const COLUMN_VALUES: usize = 1 << 27;
/// Pixels that one thread lays out at a time.
const RUN: usize = 8192;
/// Values of attention scores that are there at once.
const SCORE_VALUES: usize = 1 << 24;
/// Channels of pictures and latents are padded with zeros to a multiple of this: rows of 16 bytes.
const CHANNELS: usize = 8;

/// Values [height · width, channels].
struct Picture {
    values: Buffer,
    height: usize,
    width: usize,
    channels: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Same,
    Halve,
    Double,
}

struct Conv {
    /// [outputs, kernel², inputs].
    weight: Buffer,
    bias: Buffer,
    inputs: usize,
    outputs: usize,
    kernel: usize,
    how: How,
}

struct Norm {
    weight: Buffer,
    bias: Buffer,
}

struct Resnet {
    norm1: Norm,
    conv1: Conv,
    norm2: Norm,
    conv2: Conv,
    shortcut: Option<Conv>,
}

struct Attention {
    norm: Norm,
    qkv: Conv,
    out: Conv,
}

struct Middle {
    first: Resnet,
    attention: Option<Attention>,
    second: Resnet,
}

/// A level: its residual blocks, then the convolution that changes the size.
struct Level {
    resnets: Vec<Resnet>,
    resize: Option<Conv>,
}

struct Reader<'a> {
    ops: EncodeOps<'a>,
    weights: &'a Weights,
}

impl Reader<'_> {
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, WeightsError> {
        self.weights.view_of_shape(name, shape)?;
        self.weights.f32(name)
    }

    fn norm(&self, name: &str, channels: usize) -> Result<Norm, WeightsError> {
        let values = |part: &str| Ok::<_, WeightsError>(self.ops.upload_f32(&self.values(&format!("{name}.{part}"), &[channels])?));
        Ok(Norm { weight: values("weight")?, bias: values("bias")? })
    }

    /// [out, in, k, k] as [out, k, k, in], with zeros in place of the channels that pad it.
    fn conv(&self, name: &str, (inputs, outputs): (usize, usize), padded: (usize, usize), kernel: usize, how: How) -> Result<Conv, WeightsError> {
        let stored = self.values(&format!("{name}.weight"), &[outputs, inputs, kernel, kernel])?;
        let taps = kernel * kernel;
        let mut weight = vec![0.0; padded.1 * taps * padded.0];
        for (o, stored) in stored.chunks_exact(inputs * taps).enumerate() {
            for (i, stored) in stored.chunks_exact(taps).enumerate() {
                for (tap, value) in stored.iter().enumerate() {
                    weight[(o * taps + tap) * padded.0 + i] = *value;
                }
            }
        }
        let mut bias = self.values(&format!("{name}.bias"), &[outputs])?;
        bias.resize(padded.1, 0.0);
        Ok(Conv { weight: self.ops.upload(&weight), bias: self.ops.upload(&bias), inputs: padded.0, outputs: padded.1, kernel, how })
    }

    fn plain(&self, name: &str, inputs: usize, outputs: usize, kernel: usize, how: How) -> Result<Conv, WeightsError> {
        self.conv(name, (inputs, outputs), (inputs, outputs), kernel, how)
    }

    fn resnet(&self, name: &str, inputs: usize, outputs: usize) -> Result<Resnet, WeightsError> {
        Ok(Resnet {
            norm1: self.norm(&format!("{name}.norm1"), inputs)?,
            conv1: self.plain(&format!("{name}.conv1"), inputs, outputs, 3, How::Same)?,
            norm2: self.norm(&format!("{name}.norm2"), outputs)?,
            conv2: self.plain(&format!("{name}.conv2"), outputs, outputs, 3, How::Same)?,
            shortcut: if inputs == outputs { None } else { Some(self.plain(&format!("{name}.conv_shortcut"), inputs, outputs, 1, How::Same)?) },
        })
    }

    /// A linear layer as a convolution of single pixels, its rows from these parts. Old files have other names, and a kernel of 1x1.
    fn linear(&self, name: &str, parts: &[(&str, &str)], channels: usize) -> Result<Conv, WeightsError> {
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for (new, old) in parts {
            let part = if self.weights.contains(&format!("{name}.{new}.weight")) { new } else { old };
            let path = format!("{name}.{part}.weight");
            let shape: &[usize] = if self.weights.view(&path)?.shape.len() == 4 { &[channels, channels, 1, 1] } else { &[channels, channels] };
            weight.extend(self.values(&path, shape)?);
            bias.extend(self.values(&format!("{name}.{part}.bias"), &[channels])?);
        }
        let outputs = parts.len() * channels;
        Ok(Conv { weight: self.ops.upload(&weight), bias: self.ops.upload(&bias), inputs: channels, outputs, kernel: 1, how: How::Same })
    }

    fn middle(&self, name: &str, channels: usize, attention: bool) -> Result<Middle, WeightsError> {
        let at = format!("{name}.attentions.0");
        let attention = if attention {
            Some(Attention {
                norm: self.norm(&format!("{at}.group_norm"), channels)?,
                qkv: self.linear(&at, &[("to_q", "query"), ("to_k", "key"), ("to_v", "value")], channels)?,
                out: self.linear(&at, &[("to_out.0", "proj_attn")], channels)?,
            })
        } else {
            None
        };
        Ok(Middle {
            first: self.resnet(&format!("{name}.resnets.0"), channels, channels)?,
            attention,
            second: self.resnet(&format!("{name}.resnets.1"), channels, channels)?,
        })
    }

    fn level(&self, name: &str, inputs: usize, outputs: usize, layers: usize, resize: Option<(&str, How)>) -> Result<Level, WeightsError> {
        let resnet = |i| self.resnet(&format!("{name}.resnets.{i}"), if i == 0 { inputs } else { outputs }, outputs);
        Ok(Level {
            resnets: (0..layers).map(resnet).collect::<Result<_, _>>()?,
            resize: resize.map(|(part, how)| self.plain(&format!("{name}.{part}"), outputs, outputs, 3, how)).transpose()?,
        })
    }
}

/// The operations, with the number of groups of the norms.
#[derive(Clone, Copy)]
struct Run<'a> {
    ops: EncodeOps<'a>,
    groups: usize,
}

impl Run<'_> {
    fn norm(self, x: &Picture, norm: &Norm) -> Buffer {
        self.ops.group_norm(&x.values, self.groups, &norm.weight, &norm.bias, EPSILON as f32)
    }

    /// The convolution of x, or of silu(norm(x)) with `affine` from [`Self::norm`]; added to `onto` where given.
    fn conv(self, x: &Picture, affine: Option<&Buffer>, conv: &Conv, onto: Option<Buffer>) -> Picture {
        let &Conv { ref weight, ref bias, inputs, outputs, kernel, how } = conv;
        let (height, width, stride, pad) = match how {
            How::Same => (x.height, x.width, 1, kernel / 2),
            // Padded by one at the right and the bottom only, as diffusers does.
            How::Halve => ((x.height - 2) / 2 + 1, (x.width - 2) / 2 + 1, 2, 0),
            How::Double => (2 * x.height, 2 * x.width, 1, 1),
        };
        let (rows, k) = (height * width, kernel * kernel * inputs);
        let accumulate = onto.is_some();
        let mut y = onto.unwrap_or_else(|| self.ops.alloc(rows * outputs));
        let matrix = self.ops.matrix(weight, outputs, k);
        if kernel == 1 && affine.is_none() {
            self.ops.product(rows, &x.values, matrix, Some(bias), &mut y, 0, accumulate);
        } else {
            let window = Window { height: x.height, width: x.width, channels: inputs, kernel, stride, pad, double: how == How::Double, out_width: width };
            let strip = (COLUMN_VALUES / k).clamp(1, rows);
            // Once for each value, not for each of its columns.
            let activated = affine.map(|affine| self.ops.apply_affine(&x.values, affine, true));
            let values = activated.as_ref().unwrap_or(&x.values);
            for first in (0..rows).step_by(strip) {
                let count = strip.min(rows - first);
                let columns = self.ops.columns(values, window, first, count);
                self.ops.product(count, &columns, matrix, Some(bias), &mut y, first, accumulate);
            }
        }
        Picture { values: y, height, width, channels: outputs }
    }

    fn resnet(self, x: Picture, resnet: &Resnet) -> Picture {
        let h = self.conv(&x, Some(&self.norm(&x, &resnet.norm1)), &resnet.conv1, None);
        let affine = self.norm(&h, &resnet.norm2);
        let onto = match &resnet.shortcut {
            Some(shortcut) => self.conv(&x, None, shortcut, None),
            None => x,
        };
        self.conv(&h, Some(&affine), &resnet.conv2, Some(onto.values))
    }

    fn attention(self, x: Picture, attention: &Attention) -> Picture {
        let normal = self.ops.apply_affine(&x.values, &self.norm(&x, &attention.norm), false);
        let normal = Picture { values: normal, ..x };
        let qkv = self.conv(&normal, None, &attention.qkv, None);
        let tokens = x.height * x.width;
        let mixed = self.ops.picture_attention(&qkv.values, x.channels, (SCORE_VALUES / tokens).max(1));
        self.conv(&Picture { values: mixed, ..normal }, None, &attention.out, Some(x.values))
    }

    fn middle(self, x: Picture, middle: &Middle) -> Picture {
        let mut x = self.resnet(x, &middle.first);
        if let Some(attention) = &middle.attention {
            x = self.attention(x, attention);
        }
        self.resnet(x, &middle.second)
    }

    fn levels(self, mut x: Picture, levels: &[Level]) -> Picture {
        for level in levels {
            for resnet in &level.resnets {
                x = self.resnet(x, resnet);
            }
            if let Some(resize) = &level.resize {
                x = self.conv(&x, None, resize, None);
            }
        }
        x
    }

    /// Host values [channels, height, width] on the device, padded to `padded` channels.
    fn upload(self, values: &[f32], (channels, height, width): (usize, usize, usize), padded: usize) -> Picture {
        let pixels = height * width;
        let mut rows = vec![0.0; pixels * padded];
        rows.par_chunks_mut(RUN * padded).enumerate().for_each(|(run, rows)| {
            for (channel, values) in values.chunks_exact(pixels).enumerate().take(channels) {
                for (row, value) in rows.chunks_exact_mut(padded).zip(&values[run * RUN..]) {
                    row[channel] = *value;
                }
            }
        });
        Picture { values: self.ops.upload(&rows), height, width, channels: padded }
    }

    /// The first `channels` channels as host values [channels, height, width].
    fn download(self, x: &Picture, channels: usize) -> (Vec<f32>, usize, usize) {
        let rows = self.ops.download(&x.values);
        let mut values = Vec::with_capacity(channels * x.height * x.width);
        for channel in 0..channels {
            values.extend(rows.chunks_exact(x.channels).map(|row| row[channel]));
        }
        (values, x.height, x.width)
    }
}

/// Pictures to the moments of latents.
pub(super) struct Encoder {
    engine: Engine,
    config: VaeConfig,
    conv_in: Conv,
    down: Vec<Level>,
    middle: Middle,
    norm_out: Norm,
    conv_out: Conv,
    quant: Option<Conv>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Encoder on a GPU")
    }
}

impl Encoder {
    pub(super) fn load(engine: &Engine, ops: EncodeOps<'_>, weights: &Weights, config: &VaeConfig) -> Result<Self, VaeError> {
        let reader = Reader { ops, weights };
        let channels = &config.block_out_channels;
        let (first, last, moments) = (channels[0], channels[channels.len() - 1], 2 * config.latent_channels);
        let mut down = Vec::new();
        for (i, &out) in channels.iter().enumerate() {
            let resize = (i + 1 < channels.len()).then_some(("downsamplers.0.conv", How::Halve));
            down.push(reader.level(&format!("encoder.down_blocks.{i}"), channels[i.saturating_sub(1)], out, config.layers_per_block, resize)?);
        }
        let padded = config.in_channels.next_multiple_of(CHANNELS);
        Ok(Self {
            conv_in: reader.conv("encoder.conv_in", (config.in_channels, first), (padded, first), 3, How::Same)?,
            down,
            middle: reader.middle("encoder.mid_block", last, config.mid_block_add_attention)?,
            norm_out: reader.norm("encoder.conv_norm_out", last)?,
            conv_out: reader.plain("encoder.conv_out", last, moments, 3, How::Same)?,
            quant: if config.use_quant_conv { Some(reader.plain("quant_conv", moments, moments, 1, How::Same)?) } else { None },
            config: config.clone(),
            engine: engine.clone(),
        })
    }

    /// Mean and logarithm of the variance [2 · latent channels, h, w] of a picture [channels, H, W], on their way.
    pub(super) fn moments(&self, picture: &[f32], height: usize, width: usize) -> Option<Moments> {
        let run = Run { ops: self.engine.encode_ops()?, groups: self.config.norm_num_groups };
        let x = run.upload(picture, (self.config.in_channels, height, width), self.conv_in.inputs);
        let x = run.levels(run.conv(&x, None, &self.conv_in, None), &self.down);
        let x = run.middle(x, &self.middle);
        let mut x = run.conv(&x, Some(&run.norm(&x, &self.norm_out)), &self.conv_out, None);
        if let Some(quant) = &self.quant {
            x = run.conv(&x, None, quant, None);
        }
        Some(Moments(x))
    }

    /// What [`Self::moments`] has begun, with h and w; waits for it.
    pub(super) fn finish(&self, Moments(x): &Moments) -> Option<(Vec<f32>, usize, usize)> {
        let run = Run { ops: self.engine.encode_ops()?, groups: self.config.norm_num_groups };
        Some(run.download(x, 2 * self.config.latent_channels))
    }
}

/// What the GPU is computing or has computed of a picture.
pub(super) struct Moments(Picture);

/// Latents to pictures.
pub(super) struct Decoder {
    engine: Engine,
    config: VaeConfig,
    post_quant: Option<Conv>,
    conv_in: Conv,
    middle: Middle,
    up: Vec<Level>,
    norm_out: Norm,
    conv_out: Conv,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decoder on a GPU")
    }
}

impl Decoder {
    pub(super) fn load(engine: &Engine, ops: EncodeOps<'_>, weights: &Weights, config: &VaeConfig) -> Result<Self, VaeError> {
        let reader = Reader { ops, weights };
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last, latent) = (channels[0], channels[channels.len() - 1], config.latent_channels);
        let padded = latent.next_multiple_of(CHANNELS);
        let mut up = Vec::new();
        for (i, &out) in channels.iter().enumerate() {
            let resize = (i + 1 < channels.len()).then_some(("upsamplers.0.conv", How::Double));
            up.push(reader.level(&format!("decoder.up_blocks.{i}"), channels[i.saturating_sub(1)], out, config.layers_per_block + 1, resize)?);
        }
        let sizes = (last, config.out_channels.next_multiple_of(CHANNELS));
        Ok(Self {
            post_quant: if config.use_post_quant_conv { Some(reader.conv("post_quant_conv", (latent, latent), (padded, padded), 1, How::Same)?) } else { None },
            conv_in: reader.conv("decoder.conv_in", (latent, first), (padded, first), 3, How::Same)?,
            middle: reader.middle("decoder.mid_block", first, config.mid_block_add_attention)?,
            up,
            norm_out: reader.norm("decoder.conv_norm_out", last)?,
            conv_out: reader.conv("decoder.conv_out", (last, config.out_channels), sizes, 3, How::Same)?,
            config: config.clone(),
            engine: engine.clone(),
        })
    }

    /// A picture [channels, H, W] of latents [latent channels, h, w], with H and W.
    pub(super) fn picture(&self, latents: &[f32], height: usize, width: usize) -> Option<(Vec<f32>, usize, usize)> {
        let run = Run { ops: self.engine.encode_ops()?, groups: self.config.norm_num_groups };
        let mut x = run.upload(latents, (self.config.latent_channels, height, width), self.conv_in.inputs);
        if let Some(conv) = &self.post_quant {
            x = run.conv(&x, None, conv, None);
        }
        let x = run.middle(run.conv(&x, None, &self.conv_in, None), &self.middle);
        let x = run.levels(x, &self.up);
        Some(run.download(&run.conv(&x, Some(&run.norm(&x, &self.norm_out)), &self.conv_out, None), self.config.out_channels))
    }
}
