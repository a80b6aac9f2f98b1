//! What operations work on: weights in the device's form, modulations, attention's operands.

use super::cpu::attention::Streams;
use super::cpu::linear;
use super::pool::Buffer;

/// A frozen weight [out, in] in the form that the device's products want.
pub struct FrozenMatrix(pub(super) Frozen);

pub(super) enum Frozen {
    Host(linear::Weight),
    #[cfg(feature = "cuda")]
    Device(super::cuda::DeviceWeight),
}

impl FrozenMatrix {
    pub(super) fn host(&self) -> &linear::Weight {
        match &self.0 {
            Frozen::Host(weight) => weight,
            #[cfg(feature = "cuda")]
            Frozen::Device(_) => unreachable!("a GPU's weight in an operation of the CPU"),
        }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn device_mut(&mut self) -> &mut super::cuda::DeviceWeight {
        match &mut self.0 {
            Frozen::Device(weight) => weight,
            Frozen::Host(_) => unreachable!("a CPU's weight in an operation of the GPU"),
        }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn device(&self) -> &super::cuda::DeviceWeight {
        match &self.0 {
            Frozen::Device(weight) => weight,
            Frozen::Host(_) => unreachable!("a CPU's weight in an operation of the GPU"),
        }
    }
}

impl std::fmt::Debug for FrozenMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FrozenMatrix")
    }
}

/// LoRA factors in the form that the device's products want.
pub struct LoraMatrix(pub(super) Factors);

pub(super) enum Factors {
    Host(linear::Lora),
    #[cfg(feature = "cuda")]
    Device(super::cuda::DeviceLora),
}

impl std::fmt::Debug for LoraMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LoraMatrix(rank {})", self.rank())
    }
}

impl LoraMatrix {
    /// The rank.
    pub fn rank(&self) -> usize {
        match &self.0 {
            Factors::Host(lora) => lora.rank,
            #[cfg(feature = "cuda")]
            Factors::Device(lora) => lora.rank,
        }
    }

    pub(super) fn host(&self) -> &linear::Lora {
        match &self.0 {
            Factors::Host(lora) => lora,
            #[cfg(feature = "cuda")]
            Factors::Device(_) => unreachable!("a GPU's LoRA in an operation of the CPU"),
        }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn device(&self) -> &super::cuda::DeviceLora {
        match &self.0 {
            Factors::Device(lora) => lora,
            Factors::Host(_) => unreachable!("a CPU's LoRA in an operation of the GPU"),
        }
    }
}

/// Mean and reciprocal standard deviation of each row.
#[derive(Debug)]
pub struct NormStats(pub(super) Buffer);

/// Where an operation finds its modulation: `values` [batch, stride], one vector of width D per sample at each offset.
#[derive(Debug, Clone, Copy)]
pub struct Modulation<'a> {
    /// [batch, stride].
    pub values: &'a Buffer,
    /// From one sample to the next.
    pub stride: usize,
    /// Tokens per sample.
    pub tokens: usize,
    /// Width D.
    pub width: usize,
}

/// Sizes of a joint attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Samples.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Image tokens per sample.
    pub image: usize,
    /// Context tokens per sample; 0: the image attends to itself.
    pub context: usize,
    /// Whether the context asks too; if not, it is only attended to.
    pub context_queries: bool,
}

impl AttentionShape {
    /// Width of a row: heads · head_dim.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Tokens attended to.
    pub fn keys(&self) -> usize {
        self.image + self.context
    }
}

/// An operand of both streams: [batch · image, width] and [batch · context, width].
#[derive(Debug)]
pub struct Joint<T> {
    /// The image's.
    pub image: T,
    /// The context's, where it takes part.
    pub context: Option<T>,
}

/// Query, key and value of one stream, or their gradients: [rows, width] each.
///
/// Where they come from one product they are columns of one matrix, and what is written to a part is in it; the backward of that product takes
/// the matrix. Elsewhere each is memory of its own.
#[derive(Debug)]
pub struct Qkv {
    /// Query; absent where the stream is only attended to.
    pub q: Option<Buffer>,
    /// Key.
    pub k: Buffer,
    /// Value.
    pub v: Buffer,
    /// [rows, q, k, v side by side].
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read on a GPU"))]
    pub(super) packed: Option<Buffer>,
}

impl Qkv {
    /// Each in memory of its own.
    pub fn separate(q: Option<Buffer>, k: Buffer, v: Buffer) -> Self {
        Self { q, k, v, packed: None }
    }
}

impl Joint<Buffer> {
    pub(super) fn host(&self) -> Streams<&[f32]> {
        Streams { image: self.image.host(), context: self.context.as_ref().map(Buffer::host) }
    }

    pub(super) fn host_mut(&mut self) -> Streams<&mut [f32]> {
        Streams { image: self.image.host_mut(), context: self.context.as_mut().map(Buffer::host_mut) }
    }
}
