//! How a failed call of the driver leaves an operation.

pub(super) use crate::kernels::error::CudaError;

/// Leaves the computation; [`crate::kernels::catch`] at its top turns this into an error again. Operations have no result to carry
/// it, and nothing can go on after it.
pub(super) fn raise(error: CudaError) -> ! {
    std::panic::resume_unwind(Box::new(error))
}

/// The value, or [`raise`].
pub(super) fn must<T>(result: Result<T, CudaError>) -> T {
    result.unwrap_or_else(|error| raise(error))
}
