//! What can go wrong on a device, and how an operation's failure reaches its caller.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::Precision;

/// Why a device cannot be used, or stopped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DeviceError {
    /// This build has no GPU code.
    #[error("failed to use the GPU: this build of finetune has no CUDA kernels (cargo build --features cuda)")]
    NotBuilt,
    /// The GPU.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

impl DeviceError {
    /// Whether it is for want of memory.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Cuda(CudaError::OutOfMemory { .. }))
    }
}

/// Runs operations of a device. They have no results of their own to report that a device failed or ran out of memory:
/// such a failure leaves them all at once and ends up here. Called where a network is hidden behind an object without a type of device.
///
/// # Errors
/// The device's failure.
pub fn catch<T>(operations: impl FnOnce() -> T) -> Result<T, DeviceError> {
    catch_unwind(AssertUnwindSafe(operations)).map_err(|cause| match cause.downcast::<CudaError>() {
        Ok(error) => DeviceError::Cuda(*error),
        Err(other) => resume_unwind(other),
    })
}

/// Why the GPU cannot be used, or stopped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CudaError {
    /// The driver's library cannot be opened.
    #[error("failed to open the NVIDIA driver (libcuda.so.1): is this machine's driver installed, and is the GPU given to this container?")]
    NoDriver,
    /// The driver cannot run code of this CUDA version.
    #[error("failed to use the NVIDIA driver: it supports CUDA {}.{}, needed is 13.0 or newer (driver 580 or newer)", .version / 1000, .version % 1000 / 10)]
    OldDriver {
        /// As the driver reports it: 12040 is 12.4.
        version: i32,
    },
    /// The driver works and shows no device.
    #[error("failed to find a GPU: the NVIDIA driver reports none with this number ({ordinal})")]
    NoDevice {
        /// The number asked for.
        ordinal: i32,
    },
    /// A library is in none of the places.
    #[error("failed to open libcublasLt.so.13 (searched {searched}): install CUDA 13's cuBLAS (PyPI: nvidia-cublas) or set LD_LIBRARY_PATH to its folder")]
    NoBlas {
        /// Where it was looked for.
        searched: String,
    },
    /// The card lacks what the precision needs.
    #[error("failed to compute in {precision}: {device} (compute capability {}.{}) has no such arithmetic; use fp16", .capability.0, .capability.1)]
    Precision {
        /// The precision.
        precision: Precision,
        /// The device's name.
        device: String,
        /// Its compute capability.
        capability: (i32, i32),
    },
    /// A call of the driver failed.
    #[error("failed to {doing} on the GPU: {problem}")]
    Call {
        /// What was asked.
        doing: &'static str,
        /// The driver's words.
        problem: String,
    },
    /// A call of cuBLASLt failed.
    #[error("failed to {doing} with cuBLASLt: {status} ({detail})")]
    Blas {
        /// What was asked.
        doing: &'static str,
        /// The status.
        status: String,
        /// Sizes and types.
        detail: String,
    },
    /// The memory is used up.
    #[error("out of GPU memory: {asked} more bytes do not fit beside {used} in use (at most {cap})")]
    OutOfMemory {
        /// Bytes asked for.
        asked: usize,
        /// Bytes in use.
        used: usize,
        /// Bytes allowed; `usize::MAX` where only the card's memory limits.
        cap: usize,
    },
    /// This build has no kernel of this name.
    #[error("failed to find the GPU kernel {0:?}")]
    NoKernel(String),
}
