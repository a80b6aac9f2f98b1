//! Computing kernels: the only place for unsafe code.
//!
//! [`Device`] has one method per operation; [`Cpu`] and `Cuda` implement it over memory of their own, whose values nothing outside this
//! module touches except by [`Device::upload`] and [`Device::download`]. Layers in `nn` are written once, generic in the device.
//!
//! CPU kernels use rayon with a partition of the work that depends on shapes only, and every value is
//! computed in one fixed order: results are bit-identical for any number of threads, and a sample's values do not depend
//! on the batch around it.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod engine;
mod error;
mod int8;
mod operands;
mod picture;
mod precision;
#[cfg(test)]
mod tests;
mod text;
mod training;

pub use cpu::linear::StoredMatrix;
pub use cpu::{Cpu, HostBuffer};
#[cfg(feature = "cuda")]
pub use cuda::{Cuda, Memory as CudaBuffer, Timer};
pub use device::{Device, DeviceBuffer, LayerMatrix};
pub use engine::Engine;
pub use error::{CudaError, DeviceError, catch};
pub use int8::{Int8Matrix, WeightFormat};
pub use operands::{AttentionShape, Joint, LoraSource, LoraTarget, Modulation, NormStats, Qkv, flat_offsets};
pub use picture::{Convolution, GroupNorm, HostConvolution, Picture, Resampling};
pub use precision::{Precision, UnknownPrecision};
pub use text::{LayerSource, StoredRows, TextActivation, TextAttention};
pub use training::{AdamWScalars, BLOCK, CodedMoment, FlowData, FlowSample, GRID, PatchLayout, Range};
