//! What can go wrong on a GPU.

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
        precision: super::Precision,
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

/// Leaves the computation; [`crate::kernels::catch`] at its top turns this into an error again. Operations have no result to carry
/// it, and nothing can go on after it.
pub(super) fn raise(error: CudaError) -> ! {
    std::panic::resume_unwind(Box::new(error))
}

/// The value, or [`raise`].
pub(super) fn must<T>(result: Result<T, CudaError>) -> T {
    result.unwrap_or_else(|error| raise(error))
}
