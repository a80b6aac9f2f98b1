//! Computing kernels: the only place for unsafe code.
//!
//! [`Engine`] has one method per operation and decides by its device which kernel runs; [`Buffer`] is memory of that device,
//! whose values nothing outside this module touches except by [`Engine::upload`] and [`Engine::download`]. Layers in `nn`
//! are written once, over these.
//!
//! CPU kernels use rayon with a partition of the work that depends on shapes only, and every value is
//! computed in one fixed order: results are bit-identical for any number of threads, and a sample's values do not depend
//! on the batch around it.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod engine;
mod fused;
mod operands;
mod picture;
mod pool;
#[cfg(test)]
mod tests;
mod text;

#[cfg(feature = "cuda")]
pub use cuda::{AdamWScalars, CodedMoment, CudaError, Range, Timer, UpdateOps};
pub use device::{DeviceError, Precision, UnknownPrecision, catch};
pub use engine::{Engine, StoredMatrix};
pub use fused::{FlatBuffer, FlowData, FlowSample, FusedLinear, LoraScatter, LoraSource, PatchLayout, Recording, flat_offsets};
pub use operands::{AttentionShape, FrozenMatrix, Joint, LoraMatrix, Modulation, NormStats, Qkv};
pub use picture::{Convolution, GroupNorm, HostConvolution, Picture, Resampling};
pub use pool::Buffer;
pub use text::{LayerMatrix, LayerSource, StoredRows, TextActivation, TextAttention};
