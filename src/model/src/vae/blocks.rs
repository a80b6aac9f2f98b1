//! Residual blocks, attention, and the levels made of them.

use crate::weights::{Weights, WeightsError};
use finetune_compute::kernels::{Convolution, Engine, GroupNorm, HostConvolution, Picture, Resampling};

/// Epsilon of every norm.
const EPSILON: f32 = 1e-6;

/// Reads weights onto the engine's device.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    pub(super) engine: &'a Engine,
    pub(super) weights: &'a Weights,
    /// Groups of the norms.
    pub(super) groups: usize,
}

impl Reader<'_> {
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, WeightsError> {
        self.weights.view_of_shape(name, shape)?;
        self.weights.f32(name)
    }

    pub(super) fn norm(&self, name: &str, channels: usize) -> Result<GroupNorm, WeightsError> {
        let values = |part: &str| self.values(&format!("{name}.{part}"), &[channels]);
        Ok(self.engine.group_norm(self.groups, &values("weight")?, &values("bias")?, EPSILON))
    }

    /// A convolution that keeps the size, for pictures of `padded` (inputs, outputs) channels.
    pub(super) fn padded(&self, name: &str, (inputs, outputs): (usize, usize), padded: (usize, usize), kernel: usize) -> Result<Convolution, WeightsError> {
        let weight = self.values(&format!("{name}.weight"), &[outputs, inputs, kernel, kernel])?;
        let bias = self.values(&format!("{name}.bias"), &[outputs])?;
        Ok(self.engine.convolution(HostConvolution { weight: &weight, bias: &bias, inputs, outputs, kernel }, padded, Resampling::Same))
    }

    /// 1x1 or 3x3.
    pub(super) fn conv(&self, name: &str, inputs: usize, outputs: usize, kernel: usize) -> Result<Convolution, WeightsError> {
        self.padded(name, (inputs, outputs), (inputs, outputs), kernel)
    }

    /// 3x3 that changes the size.
    fn resize(&self, name: &str, channels: usize, resampling: Resampling) -> Result<Convolution, WeightsError> {
        let weight = self.values(&format!("{name}.weight"), &[channels, channels, 3, 3])?;
        let bias = self.values(&format!("{name}.bias"), &[channels])?;
        let host = HostConvolution { weight: &weight, bias: &bias, inputs: channels, outputs: channels, kernel: 3 };
        Ok(self.engine.convolution(host, (channels, channels), resampling))
    }

    /// Linear layers of single pixels as one convolution. Each is called by its name of today or, in old files, by the other one and may have a
    /// kernel of 1x1.
    fn linears(&self, name: &str, layers: &[(&str, &str)], channels: usize) -> Result<Convolution, WeightsError> {
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for (new, old) in layers {
            let part = if self.weights.contains(&format!("{name}.{new}.weight")) { new } else { old };
            let path = format!("{name}.{part}.weight");
            let shape: &[usize] = if self.weights.view(&path)?.shape.len() == 4 { &[channels, channels, 1, 1] } else { &[channels, channels] };
            weight.extend(self.values(&path, shape)?);
            bias.extend(self.values(&format!("{name}.{part}.bias"), &[channels])?);
        }
        let outputs = layers.len() * channels;
        let host = HostConvolution { weight: &weight, bias: &bias, inputs: channels, outputs, kernel: 1 };
        Ok(self.engine.convolution(host, (channels, outputs), Resampling::Same))
    }
}

/// x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 convolution of x where the number of channels changes.
#[derive(Debug)]
struct Resnet {
    norm1: GroupNorm,
    conv1: Convolution,
    norm2: GroupNorm,
    conv2: Convolution,
    shortcut: Option<Convolution>,
}

impl Resnet {
    fn load(reader: &Reader<'_>, name: &str, inputs: usize, outputs: usize) -> Result<Self, WeightsError> {
        Ok(Self {
            norm1: reader.norm(&format!("{name}.norm1"), inputs)?,
            conv1: reader.conv(&format!("{name}.conv1"), inputs, outputs, 3)?,
            norm2: reader.norm(&format!("{name}.norm2"), outputs)?,
            conv2: reader.conv(&format!("{name}.conv2"), outputs, outputs, 3)?,
            shortcut: if inputs == outputs { None } else { Some(reader.conv(&format!("{name}.conv_shortcut"), inputs, outputs, 1)?) },
        })
    }

    fn forward(&self, engine: &Engine, x: Picture) -> Picture {
        let h = engine.convolve(&engine.normalise(&x, &self.norm1, true), &self.conv1, None);
        let h = engine.normalise(&h, &self.norm2, true);
        let onto = match &self.shortcut {
            Some(shortcut) => engine.convolve(&x, shortcut, None),
            None => x,
        };
        engine.convolve(&h, &self.conv2, Some(onto))
    }
}

/// One head over all pixels.
#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    qkv: Convolution,
    out: Convolution,
}

impl Attention {
    fn load(reader: &Reader<'_>, name: &str, channels: usize) -> Result<Self, WeightsError> {
        Ok(Self {
            norm: reader.norm(&format!("{name}.group_norm"), channels)?,
            qkv: reader.linears(name, &[("to_q", "query"), ("to_k", "key"), ("to_v", "value")], channels)?,
            out: reader.linears(name, &[("to_out.0", "proj_attn")], channels)?,
        })
    }

    fn forward(&self, engine: &Engine, x: Picture) -> Picture {
        let qkv = engine.convolve(&engine.normalise(&x, &self.norm, false), &self.qkv, None);
        engine.convolve(&engine.picture_attention(&qkv), &self.out, Some(x))
    }
}

/// The lowest level.
#[derive(Debug)]
pub(super) struct MidBlock {
    first: Resnet,
    attention: Option<Attention>,
    second: Resnet,
}

impl MidBlock {
    pub(super) fn load(reader: &Reader<'_>, name: &str, channels: usize, attention: bool) -> Result<Self, WeightsError> {
        Ok(Self {
            first: Resnet::load(reader, &format!("{name}.resnets.0"), channels, channels)?,
            attention: if attention { Some(Attention::load(reader, &format!("{name}.attentions.0"), channels)?) } else { None },
            second: Resnet::load(reader, &format!("{name}.resnets.1"), channels, channels)?,
        })
    }

    pub(super) fn forward(&self, engine: &Engine, x: Picture) -> Picture {
        let mut x = self.first.forward(engine, x);
        if let Some(attention) = &self.attention {
            x = attention.forward(engine, x);
        }
        self.second.forward(engine, x)
    }
}

/// A level of the encoder or the decoder: its residual blocks, then the convolution that changes the size.
#[derive(Debug)]
pub(super) struct Level {
    resnets: Vec<Resnet>,
    resize: Option<Convolution>,
}

impl Level {
    /// `count` blocks; `resize`: the convolution's name and what it does.
    pub(super) fn load(
        reader: &Reader<'_>,
        name: &str,
        (inputs, outputs): (usize, usize),
        count: usize,
        resize: Option<(&str, Resampling)>,
    ) -> Result<Self, WeightsError> {
        let resnet = |i| Resnet::load(reader, &format!("{name}.resnets.{i}"), if i == 0 { inputs } else { outputs }, outputs);
        Ok(Self {
            resnets: (0..count).map(resnet).collect::<Result<_, _>>()?,
            resize: resize.map(|(part, resampling)| reader.resize(&format!("{name}.{part}"), outputs, resampling)).transpose()?,
        })
    }

    pub(super) fn forward(&self, engine: &Engine, mut x: Picture) -> Picture {
        for resnet in &self.resnets {
            x = resnet.forward(engine, x);
        }
        match &self.resize {
            Some(resize) => engine.convolve(&x, resize, None),
            None => x,
        }
    }
}
