//! Convolutions and group norms of the autoencoder.

use candle_core::{DType, Device, Storage, Tensor};

pub(super) type Result<T, E = candle_core::Error> = std::result::Result<T, E>;

use crate::weights::{Weights, WeightsError};
use finetune_compute::kernels::{ConvShape, conv2d, group_norm_silu};

/// Epsilon of every norm.
pub(super) const EPSILON: f64 = 1e-6;

/// Reads the weights below a name.
pub(super) struct Reader<'a> {
    weights: &'a Weights,
    device: &'a Device,
    pub(super) groups: usize,
    prefix: String,
}

impl<'a> Reader<'a> {
    pub(super) fn new(weights: &'a Weights, device: &'a Device, groups: usize) -> Self {
        Self { weights, device, groups, prefix: String::new() }
    }

    pub(super) fn at(&self, name: &str) -> Reader<'a> {
        Reader { prefix: format!("{}{name}.", self.prefix), ..*self }
    }

    pub(super) fn weights(&self) -> &'a Weights {
        self.weights
    }

    pub(super) fn device(&self) -> &'a Device {
        self.device
    }

    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, WeightsError> {
        self.weights.tensor_of_shape(&format!("{}{name}", self.prefix), shape, DType::F32, self.device)
    }

    fn conv(&self, name: &str, input: usize, output: usize, kernel: usize, how: How) -> Result<Conv, WeightsError> {
        let weight = self.tensor(&format!("{name}.weight"), &[output, input, kernel, kernel])?;
        let bias = self.tensor(&format!("{name}.bias"), &[output])?;
        Ok(Conv { weight, bias, how })
    }

    /// 1x1.
    pub(super) fn conv1(&self, name: &str, input: usize, output: usize) -> Result<Conv, WeightsError> {
        self.conv(name, input, output, 1, How::Pointwise)
    }

    /// 3x3 that keeps the size.
    pub(super) fn conv3(&self, name: &str, input: usize, output: usize) -> Result<Conv, WeightsError> {
        self.conv(name, input, output, 3, How::Same)
    }

    /// 3x3 that halves the size.
    pub(super) fn conv_down(&self, name: &str, channels: usize) -> Result<Conv, WeightsError> {
        self.conv(name, channels, channels, 3, How::Halve)
    }

    /// 3x3 after doubling the size.
    pub(super) fn conv_up(&self, name: &str, channels: usize) -> Result<Conv, WeightsError> {
        self.conv(name, channels, channels, 3, How::Double)
    }

    pub(super) fn norm(&self, name: &str, channels: usize) -> Result<Norm, WeightsError> {
        let (weight, bias) = (self.tensor(&format!("{name}.weight"), &[channels])?, self.tensor(&format!("{name}.bias"), &[channels])?);
        Ok(Norm { weight, bias, groups: self.groups })
    }
}

/// What a convolution does to the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// 1x1, no padding.
    Pointwise,
    /// 3x3, padded by one.
    Same,
    /// 3x3 with stride 2, padded by one at the right and the bottom only, as diffusers does.
    Halve,
    /// 3x3, padded by one, over pixels doubled each way.
    Double,
}

/// A convolution with bias.
#[derive(Debug)]
pub(super) struct Conv {
    weight: Tensor,
    bias: Tensor,
    how: How,
}

impl Conv {
    /// [B, in, H, W] -> [B, out, H', W'].
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, inputs, height, width) = x.dims4()?;
        let (outputs, _, kernel, _) = self.weight.dims4()?;
        let (stride, pad_before, pad_after) = match self.how {
            How::Pointwise => (1, 0, 0),
            How::Same | How::Double => (1, 1, 1),
            How::Halve => (2, 0, 1),
        };
        let shape = ConvShape { inputs, outputs, height, width, kernel, stride, pad_before, pad_after, double: self.how == How::Double };
        let pictures = on_host(x, |x| {
            on_host(&self.weight, |weight| {
                on_host(&self.bias, |bias| x.chunks_exact(inputs * height * width).flat_map(|x| conv2d(x, weight, bias, &shape)).collect::<Vec<f32>>())
            })
        })???;
        Tensor::from_vec(pictures, (batch, outputs, shape.out_height(), shape.out_width()), x.device())
    }
}

/// Lends the values of a tensor in host memory.
fn on_host<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(values) = &*storage else { candle_core::bail!("expected a tensor in host memory") };
    let start = layout.start_offset();
    Ok(f(&values.as_slice::<f32>()?[start..start + layout.shape().elem_count()]))
}

/// A group norm.
#[derive(Debug)]
pub(super) struct Norm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
}

impl Norm {
    /// silu(norm(x)).
    pub(super) fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, ..) = x.dims4()?;
        let pictures = on_host(x, |x| {
            on_host(&self.weight, |gain| {
                on_host(&self.bias, |offset| {
                    let size = (x.len() / batch.max(1)).max(1);
                    x.chunks_exact(size).flat_map(|x| group_norm_silu(x, self.groups, gain, offset, EPSILON)).collect::<Vec<f32>>()
                })
            })
        })???;
        Tensor::from_vec(pictures, x.shape(), x.device())
    }
}
