//! What the operations of the autoencoder work on, one picture at a time.
//!
//! How a picture lies in memory is the device's matter: [channels, height, width] on the CPU, whose convolution packs patches straight into
//! panels; [height · width, channels] on a GPU, whose convolution is a product with columns that are made strip by strip.

/// A picture on a device.
#[derive(Debug)]
pub struct Picture<B> {
    pub(super) values: B,
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) channels: usize,
}

impl<B> Picture<B> {
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
pub struct Convolution<B> {
    /// [outputs, inputs, kernel²] on the CPU, [outputs, kernel², inputs] on a GPU.
    pub(super) weight: B,
    pub(super) bias: B,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) kernel: usize,
    pub(super) resampling: Resampling,
}

/// A group norm, weights on the device in f32.
#[derive(Debug)]
pub struct GroupNorm<B> {
    pub(super) weight: B,
    pub(super) bias: B,
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
