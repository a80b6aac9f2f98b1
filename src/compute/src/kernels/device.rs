//! Devices, precisions, and how an operation's failure reaches its caller.

use std::fmt;
use std::str::FromStr;

/// Type of activations and frozen weights. Statistics, sums and LoRA's parameters and gradients are f32 in every precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// f32, and no shorter type inside a product.
    #[default]
    F32,
    /// f16.
    F16,
    /// bf16.
    Bf16,
}

impl Precision {
    /// Bytes per value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// As the kernels know it.
    #[cfg(feature = "cuda")]
    pub(super) const fn tag(self) -> i32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// A name that is no precision.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no precision: fp32, fp16 and bf16 are")]
pub struct UnknownPrecision(String);

impl FromStr for Precision {
    type Err = UnknownPrecision;

    fn from_str(name: &str) -> Result<Self, UnknownPrecision> {
        match name {
            "fp32" => Ok(Self::F32),
            "fp16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            other => Err(UnknownPrecision(other.to_owned())),
        }
    }
}

/// Why a device cannot be used, or stopped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DeviceError {
    /// This build has no GPU code.
    #[error("failed to use the GPU: this build of finetune has no CUDA kernels (cargo build --features cuda)")]
    NotBuilt,
    /// The GPU.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] super::CudaError),
}

impl DeviceError {
    /// Whether it is for want of memory.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::NotBuilt => false,
            #[cfg(feature = "cuda")]
            Self::Cuda(error) => matches!(error, super::CudaError::OutOfMemory { .. }),
        }
    }
}

/// Runs operations of an engine. They have no results of their own to say that a device failed or ran out of memory:
/// such a failure leaves them all at once and ends up here.
///
/// # Errors
/// The device's failure.
pub fn catch<T>(operations: impl FnOnce() -> T) -> Result<T, DeviceError> {
    #[cfg(feature = "cuda")]
    return std::panic::catch_unwind(std::panic::AssertUnwindSafe(operations)).map_err(|cause| match cause.downcast::<super::CudaError>() {
        Ok(error) => DeviceError::Cuda(*error),
        Err(other) => std::panic::resume_unwind(other),
    });
    #[cfg(not(feature = "cuda"))]
    Ok(operations())
}
