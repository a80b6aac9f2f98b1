//! The device that a run computes on.

use crate::kernels::{DeviceError, Engine, Precision};
use crate::plan::{self, BUDGET_BYTES, DeviceRequest, LIBRARY_BYTES, MemoryBudget};

/// Whether this build can use a GPU.
pub const fn has_gpu_code() -> bool {
    cfg!(feature = "cuda")
}

/// Opens the device that the job asks for. There is no silent fallback to the CPU.
///
/// # Errors
/// If it asks for a GPU and there is none that works.
pub fn open(request: DeviceRequest, precision: plan::Precision) -> Result<Engine, DeviceError> {
    let auto = precision == plan::Precision::Auto;
    let precision = match precision {
        plan::Precision::FP32 => Precision::F32,
        plan::Precision::FP16 => Precision::F16,
        plan::Precision::Auto | plan::Precision::BF16 => Precision::Bf16,
    };
    match request {
        DeviceRequest::Cpu => Ok(Engine::cpu()),
        DeviceRequest::Gpu => Engine::cuda(0, precision).or_else(|error| if auto { Engine::cuda(0, Precision::F16) } else { Err(error) }),
    }
}

/// What the process may hold on the device, from what others have left of it; buffers may take that less what the driver and the
/// libraries need. To be called before anything is put on the device.
pub fn limit_memory(engine: &Engine) -> MemoryBudget {
    let Some((free, _)) = engine.device_memory() else { return MemoryBudget::Cpu };
    let budget = BUDGET_BYTES.min(free as u64 + LIBRARY_BYTES / 2);
    engine.set_memory_cap(budget.saturating_sub(LIBRARY_BYTES) as usize);
    MemoryBudget::Gpu(budget)
}

/// Whether there is a GPU that works.
pub fn gpu_is_usable() -> bool {
    Engine::cuda(0, Precision::F16).is_ok()
}

/// `cpu` or `cuda`.
pub fn name(engine: &Engine) -> &'static str {
    if engine.is_cuda() { "cuda" } else { "cpu" }
}
