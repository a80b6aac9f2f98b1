//! The device that a run computes on.

use candle_core::Device;

use crate::plan::DeviceRequest;

/// No device as the job asked for. There is no silent fallback to the CPU.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// This build has no GPU code.
    #[error(
        "the job asks for a GPU, and this build of finetune has no CUDA kernels. Use the CUDA image, or train on the CPU: \
         spec.scheduling.gpu.perReplica: 0, or finetune run --device cpu"
    )]
    NotBuilt,
    /// The GPU cannot be used.
    #[cfg(feature = "cuda")]
    #[error("the job asks for a GPU, and none can be used: check the node's driver and that the pod requests the GPU")]
    Unusable(#[source] candle_core::Error),
}

/// Whether this build can use a GPU.
pub const fn has_gpu_code() -> bool {
    cfg!(feature = "cuda")
}

/// Opens the device that the job asks for.
///
/// # Errors
/// If it asks for a GPU and there is none that works.
pub fn open(request: DeviceRequest) -> Result<Device, DeviceError> {
    match request {
        DeviceRequest::Cpu => Ok(Device::Cpu),
        #[cfg(feature = "cuda")]
        DeviceRequest::Gpu => Device::new_cuda(0).map_err(DeviceError::Unusable),
        #[cfg(not(feature = "cuda"))]
        DeviceRequest::Gpu => Err(DeviceError::NotBuilt),
    }
}

/// `cpu` or `cuda`.
pub fn name(device: &Device) -> &'static str {
    if device.is_cuda() { "cuda" } else { "cpu" }
}
