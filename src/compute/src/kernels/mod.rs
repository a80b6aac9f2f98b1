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
mod pool;
#[cfg(test)]
mod tests;

pub use cpu::conv::{ConvShape, conv2d};
pub use cpu::group_norm::group_norm_silu;
#[cfg(feature = "cuda")]
pub use cuda::{
    AdamWNumbers, CodedMoment, CudaError, EncodeOps, LayerSource, Matrix, Range, StoredRows, TextActivation, TextAttention, Timer, UpdateOps, Window,
};
pub use device::{DeviceError, Precision, UnknownPrecision, catch};
pub use engine::{Engine, StoredMatrix};
pub use fused::{FlowData, FlowSample, LoraSource, LoraSpread, PatchLayout, Recording, Stack, starts_together};
pub use operands::{AttentionShape, FrozenMatrix, Joint, LoraMatrix, Modulation, NormStats};
pub use pool::Buffer;
