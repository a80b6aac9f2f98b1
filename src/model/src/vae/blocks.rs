//! Residual blocks, attention, and the levels made of them.

use crate::weights::{Weights, WeightsError};
use finetune_compute::kernels::{Convolution, Device, GroupNorm, HostConvolution, Picture, Resampling};

/// Epsilon of every norm.
const EPSILON: f32 = 1e-6;

/// Reads weights onto the device.
pub(super) struct Reader<'a, D> {
    pub(super) device: &'a D,
    pub(super) weights: &'a Weights,
    /// Groups of the norms.
    pub(super) groups: usize,
}

impl<D: Device> Reader<'_, D> {
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, WeightsError> {
        self.weights.view_of_shape(name, shape)?;
        self.weights.f32(name)
    }

    pub(super) fn norm(&self, name: &str, channels: usize) -> Result<GroupNorm<D::Buffer>, WeightsError> {
        let values = |part: &str| self.values(&format!("{name}.{part}"), &[channels]);
        Ok(self.device.group_norm(self.groups, &values("weight")?, &values("bias")?, EPSILON))
    }

    /// A convolution that keeps the size, for pictures of `padded` (inputs, outputs) channels.
    pub(super) fn padded(
        &self,
        name: &str,
        (inputs, outputs): (usize, usize),
        padded: (usize, usize),
        kernel: usize,
    ) -> Result<Convolution<D::Buffer>, WeightsError> {
        let weight = self.values(&format!("{name}.weight"), &[outputs, inputs, kernel, kernel])?;
        let bias = self.values(&format!("{name}.bias"), &[outputs])?;
        Ok(self.device.convolution(HostConvolution { weight: &weight, bias: &bias, inputs, outputs, kernel }, padded, Resampling::Same))
    }

    /// 1x1 or 3x3.
    pub(super) fn conv(&self, name: &str, inputs: usize, outputs: usize, kernel: usize) -> Result<Convolution<D::Buffer>, WeightsError> {
        self.padded(name, (inputs, outputs), (inputs, outputs), kernel)
    }

    /// 3x3 that changes the size.
    fn resize(&self, name: &str, channels: usize, resampling: Resampling) -> Result<Convolution<D::Buffer>, WeightsError> {
        let weight = self.values(&format!("{name}.weight"), &[channels, channels, 3, 3])?;
        let bias = self.values(&format!("{name}.bias"), &[channels])?;
        let host = HostConvolution { weight: &weight, bias: &bias, inputs: channels, outputs: channels, kernel: 3 };
        Ok(self.device.convolution(host, (channels, channels), resampling))
    }

    /// Linear layers of single pixels as one convolution. Each is called by its name of today or, in old files, by the other one and may have a
    /// kernel of 1x1.
    fn linears(&self, name: &str, layers: &[(&str, &str)], channels: usize) -> Result<Convolution<D::Buffer>, WeightsError> {
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
        Ok(self.device.convolution(host, (channels, outputs), Resampling::Same))
    }
}

/// x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 convolution of x where the number of channels changes.
#[derive(Debug)]
struct Resnet<D: Device> {
    norm1: GroupNorm<D::Buffer>,
    conv1: Convolution<D::Buffer>,
    norm2: GroupNorm<D::Buffer>,
    conv2: Convolution<D::Buffer>,
    shortcut: Option<Convolution<D::Buffer>>,
}

impl<D: Device> Resnet<D> {
    fn load(reader: &Reader<'_, D>, name: &str, inputs: usize, outputs: usize) -> Result<Self, WeightsError> {
        Ok(Self {
            norm1: reader.norm(&format!("{name}.norm1"), inputs)?,
            conv1: reader.conv(&format!("{name}.conv1"), inputs, outputs, 3)?,
            norm2: reader.norm(&format!("{name}.norm2"), outputs)?,
            conv2: reader.conv(&format!("{name}.conv2"), outputs, outputs, 3)?,
            shortcut: if inputs == outputs { None } else { Some(reader.conv(&format!("{name}.conv_shortcut"), inputs, outputs, 1)?) },
        })
    }

    fn forward(&self, device: &D, x: Picture<D::Buffer>) -> Picture<D::Buffer> {
        let h = device.convolve(&device.normalise(&x, &self.norm1, true), &self.conv1, None);
        let h = device.normalise(&h, &self.norm2, true);
        let onto = match &self.shortcut {
            Some(shortcut) => device.convolve(&x, shortcut, None),
            None => x,
        };
        device.convolve(&h, &self.conv2, Some(onto))
    }
}

/// One head over all pixels.
#[derive(Debug)]
struct Attention<D: Device> {
    norm: GroupNorm<D::Buffer>,
    qkv: Convolution<D::Buffer>,
    out: Convolution<D::Buffer>,
}

impl<D: Device> Attention<D> {
    fn load(reader: &Reader<'_, D>, name: &str, channels: usize) -> Result<Self, WeightsError> {
        Ok(Self {
            norm: reader.norm(&format!("{name}.group_norm"), channels)?,
            qkv: reader.linears(name, &[("to_q", "query"), ("to_k", "key"), ("to_v", "value")], channels)?,
            out: reader.linears(name, &[("to_out.0", "proj_attn")], channels)?,
        })
    }

    fn forward(&self, device: &D, x: Picture<D::Buffer>) -> Picture<D::Buffer> {
        let qkv = device.convolve(&device.normalise(&x, &self.norm, false), &self.qkv, None);
        device.convolve(&device.picture_attention(&qkv), &self.out, Some(x))
    }
}

/// The lowest level.
#[derive(Debug)]
pub(super) struct MidBlock<D: Device> {
    first: Resnet<D>,
    attention: Option<Attention<D>>,
    second: Resnet<D>,
}

impl<D: Device> MidBlock<D> {
    pub(super) fn load(reader: &Reader<'_, D>, name: &str, channels: usize, attention: bool) -> Result<Self, WeightsError> {
        Ok(Self {
            first: Resnet::load(reader, &format!("{name}.resnets.0"), channels, channels)?,
            attention: if attention { Some(Attention::load(reader, &format!("{name}.attentions.0"), channels)?) } else { None },
            second: Resnet::load(reader, &format!("{name}.resnets.1"), channels, channels)?,
        })
    }

    pub(super) fn forward(&self, device: &D, x: Picture<D::Buffer>) -> Picture<D::Buffer> {
        let mut x = self.first.forward(device, x);
        if let Some(attention) = &self.attention {
            x = attention.forward(device, x);
        }
        self.second.forward(device, x)
    }
}

/// A level of the encoder or the decoder: its residual blocks, then the convolution that changes the size.
#[derive(Debug)]
pub(super) struct Level<D: Device> {
    resnets: Vec<Resnet<D>>,
    resize: Option<Convolution<D::Buffer>>,
}

impl<D: Device> Level<D> {
    /// `count` blocks; `resize`: the convolution's name and what it does.
    pub(super) fn load(
        reader: &Reader<'_, D>,
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

    pub(super) fn forward(&self, device: &D, mut x: Picture<D::Buffer>) -> Picture<D::Buffer> {
        for resnet in &self.resnets {
            x = resnet.forward(device, x);
        }
        match &self.resize {
            Some(resize) => device.convolve(&x, resize, None),
            None => x,
        }
    }
}
