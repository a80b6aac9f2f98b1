//! Residual blocks, attention, and the levels made of them. The attention block is candle-transformers'.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use candle_nn::{Module as _, VarBuilder};
use candle_transformers::models::stable_diffusion::attention::{AttentionBlock, AttentionBlockConfig};

use super::VaeError;
use super::layers::{Conv, EPSILON, Norm, Reader, Result};

/// x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 convolution of x where the number of channels changes.
#[derive(Debug)]
struct Resnet {
    norm1: Norm,
    conv1: Conv,
    norm2: Norm,
    conv2: Conv,
    shortcut: Option<Conv>,
}

impl Resnet {
    fn load(reader: &Reader, input: usize, output: usize) -> Result<Self, VaeError> {
        Ok(Self {
            norm1: reader.norm("norm1", input)?,
            conv1: reader.conv3("conv1", input, output)?,
            norm2: reader.norm("norm2", output)?,
            conv2: reader.conv3("conv2", output, output)?,
            shortcut: if input == output { None } else { Some(reader.conv1("conv_shortcut", input, output)?) },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        let h = self.conv2.forward(&self.norm2.forward_silu(&h)?)?;
        match &self.shortcut {
            Some(shortcut) => shortcut.forward(x)? + h,
            None => x + h,
        }
    }
}

fn resnets(reader: &Reader, input: usize, output: usize, count: usize) -> Result<Vec<Resnet>, VaeError> {
    (0..count).map(|i| Resnet::load(&reader.at(&format!("resnets.{i}")), if i == 0 { input } else { output }, output)).collect()
}

/// A level of the encoder.
#[derive(Debug)]
pub(super) struct DownBlock {
    resnets: Vec<Resnet>,
    down: Option<Conv>,
}

impl DownBlock {
    pub(super) fn load(reader: &Reader, input: usize, output: usize, layers: usize, halve: bool) -> Result<Self, VaeError> {
        let down = if halve { Some(reader.conv_down("downsamplers.0.conv", output)?) } else { None };
        Ok(Self { resnets: resnets(reader, input, output, layers)?, down })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        match &self.down {
            Some(down) => down.forward(&x),
            None => Ok(x),
        }
    }
}

/// A level of the decoder.
#[derive(Debug)]
pub(super) struct UpBlock {
    resnets: Vec<Resnet>,
    up: Option<Conv>,
}

impl UpBlock {
    pub(super) fn load(reader: &Reader, input: usize, output: usize, layers: usize, double: bool) -> Result<Self, VaeError> {
        let up = if double { Some(reader.conv_up("upsamplers.0.conv", output)?) } else { None };
        Ok(Self { resnets: resnets(reader, input, output, layers)?, up })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        match &self.up {
            Some(up) => up.forward(&x),
            None => Ok(x),
        }
    }
}

/// The lowest level.
#[derive(Debug)]
pub(super) struct MidBlock {
    first: Resnet,
    attention: Option<AttentionBlock>,
    second: Resnet,
}

impl MidBlock {
    pub(super) fn load(reader: &Reader, channels: usize, attention: bool) -> Result<Self, VaeError> {
        Ok(Self {
            first: Resnet::load(&reader.at("resnets.0"), channels, channels)?,
            attention: if attention { Some(load_attention(&reader.at("attentions.0"), channels)?) } else { None },
            second: Resnet::load(&reader.at("resnets.1"), channels, channels)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x)
    }
}

/// One head over all pixels. Reads today's names (`to_q`) and the old ones (`query`), which candle-transformers tells apart.
fn load_attention(reader: &Reader, channels: usize) -> Result<AttentionBlock, VaeError> {
    let weights = reader.weights();
    let mut tensors = HashMap::new();
    for name in weights.names().filter(|n| n.starts_with(reader.prefix())) {
        tensors.insert(name[reader.prefix().len()..].to_owned(), weights.tensor(name, DType::F32, reader.device())?);
    }
    let config = AttentionBlockConfig { num_head_channels: None, num_groups: reader.groups, rescale_output_factor: 1.0, eps: EPSILON };
    let builder = VarBuilder::from_tensors(tensors, DType::F32, reader.device());
    AttentionBlock::new(builder, channels, config).map_err(|source| VaeError::Build { path: weights.path().to_owned(), source: Box::new(source) })
}
