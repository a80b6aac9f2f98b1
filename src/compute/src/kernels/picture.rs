//! The operations of the autoencoder, on one picture at a time. Nothing is kept for a backward: it is not trained.
//!
//! How a picture lies in memory is the device's matter: [channels, height, width] on the CPU, whose convolution packs patches straight into
//! panels; [height · width, channels] on a GPU, whose convolution is a product with columns that are made strip by strip.

use super::Buffer;
use super::cpu::{conv, group_norm, self_attention};
use super::engine::{Engine, on_gpu};

/// A picture on the engine's device.
#[derive(Debug)]
pub struct Picture {
    pub(super) values: Buffer,
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) channels: usize,
}

impl Picture {
    /// Rows of pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Columns of pixels.
    pub fn width(&self) -> usize {
        self.width
    }
}

/// What a convolution does to the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resampling {
    /// Nothing: stride 1, padded by half the kernel.
    Same,
    /// Halves it: stride 2, padded by one at the right and the bottom only, as diffusers does.
    Halve,
    /// Doubles it: every pixel stands for two by two before the convolution.
    Double,
}

/// A convolution with a square kernel, weights on the device.
#[derive(Debug)]
pub struct Convolution {
    /// [outputs, inputs, kernel²] on the CPU, [outputs, kernel², inputs] on a GPU.
    pub(super) weight: Buffer,
    pub(super) bias: Buffer,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) kernel: usize,
    pub(super) resampling: Resampling,
}

/// A group norm, weights on the device in f32.
#[derive(Debug)]
pub struct GroupNorm {
    pub(super) weight: Buffer,
    pub(super) bias: Buffer,
    pub(super) groups: usize,
    pub(super) epsilon: f32,
}

/// Weights `[outputs, inputs, kernel, kernel]` and bias `[outputs]` of a convolution on the host.
#[derive(Debug, Clone, Copy)]
pub struct HostConvolution<'a> {
    /// [outputs, inputs, kernel, kernel].
    pub weight: &'a [f32],
    /// `[outputs]`.
    pub bias: &'a [f32],
    /// Channels in.
    pub inputs: usize,
    /// Channels out.
    pub outputs: usize,
    /// Side of the kernel.
    pub kernel: usize,
}

impl Engine {
    /// As many channels or a few more, which are zeros: rows that the device reads well. For pictures and latents at the network's ends.
    pub fn padded_channels(&self, channels: usize) -> usize {
        if self.is_cuda() { channels.next_multiple_of(8) } else { channels }
    }

    /// A convolution's weights on the device, for pictures of `padded` (inputs, outputs) channels.
    pub fn convolution(&self, host: HostConvolution<'_>, padded: (usize, usize), resampling: Resampling) -> Convolution {
        let HostConvolution { weight, bias, inputs, outputs, kernel } = host;
        assert!(weight.len() == outputs * inputs * kernel * kernel && bias.len() == outputs, "should be weights of this shape");
        on_gpu!(self, gpu => gpu.convolution(host, padded, resampling));
        assert_eq!(padded, (inputs, outputs), "should not be padded on the CPU");
        Convolution { weight: self.upload(weight), bias: self.upload(bias), inputs, outputs, kernel, resampling }
    }

    /// A group norm's weights on the device.
    pub fn group_norm(&self, groups: usize, weight: &[f32], bias: &[f32], epsilon: f32) -> GroupNorm {
        GroupNorm { weight: self.upload_f32(weight), bias: self.upload_f32(bias), groups, epsilon }
    }

    /// Host values [channels, height, width] as a picture of `padded` channels.
    pub fn upload_picture(&self, values: &[f32], (channels, height, width): (usize, usize, usize), padded: usize) -> Picture {
        assert_eq!(values.len(), channels * height * width, "should be one picture");
        on_gpu!(self, gpu => gpu.upload_picture(values, (channels, height, width), padded));
        assert_eq!(padded, channels, "should not be padded on the CPU");
        Picture { values: Buffer::unpooled(values.to_vec()), height, width, channels }
    }

    /// The first `channels` channels as host values [channels, height, width].
    pub fn download_picture(&self, x: &Picture, channels: usize) -> Vec<f32> {
        on_gpu!(self, gpu => gpu.download_picture(x, channels));
        x.values.host()[..channels * x.height * x.width].to_vec()
    }

    /// The convolution of x, added to `onto` where given.
    pub fn convolve(&self, x: &Picture, convolution: &Convolution, onto: Option<Picture>) -> Picture {
        let &Convolution { inputs, outputs, kernel, resampling, .. } = convolution;
        assert_eq!(x.channels, inputs, "should be a picture of the convolution's inputs");
        on_gpu!(self, gpu => gpu.convolve(x, convolution, onto));
        let (stride, pad_before, pad_after) = match resampling {
            Resampling::Same | Resampling::Double => (1, kernel / 2, kernel / 2),
            Resampling::Halve => (2, 0, 1),
        };
        let double = resampling == Resampling::Double;
        let shape = conv::ConvShape { inputs, outputs, height: x.height, width: x.width, kernel, stride, pad_before, pad_after, double };
        let (height, width, accumulate) = (shape.out_height(), shape.out_width(), onto.is_some());
        let mut values = onto.map_or_else(|| Buffer::unpooled(vec![0.0; outputs * height * width]), |onto| onto.values);
        conv::conv2d(x.values.host(), convolution.weight.host(), convolution.bias.host(), &shape, accumulate, values.host_mut());
        Picture { values, height, width, channels: outputs }
    }

    /// The group norm of x; with `silu` its SiLU.
    pub fn normalise(&self, x: &Picture, norm: &GroupNorm, silu: bool) -> Picture {
        assert_eq!(x.channels, norm.weight.len(), "should be a picture of the norm's channels");
        on_gpu!(self, gpu => gpu.normalise(x, norm, silu));
        let GroupNorm { weight, bias, groups, epsilon } = norm;
        let values = group_norm::group_norm(x.values.host(), *groups, weight.host(), bias.host(), f64::from(*epsilon), silu);
        Picture { values: Buffer::unpooled(values), ..*x }
    }

    /// Attention of one head over all pixels of a picture with the channels of q, k and v, scaled by 1/√(channels of one).
    pub fn picture_attention(&self, qkv: &Picture) -> Picture {
        let channels = qkv.channels / 3;
        assert_eq!(qkv.channels, 3 * channels, "should be q, k and v");
        on_gpu!(self, gpu => gpu.picture_attention(qkv));
        let mut values = vec![0.0; channels * qkv.height * qkv.width];
        self_attention::picture(channels, qkv.values.host(), &mut values);
        Picture { values: Buffer::unpooled(values), height: qkv.height, width: qkv.width, channels }
    }
}
