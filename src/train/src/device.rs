//! The device that a run computes on.

use finetune_api::plan::{self, BUDGET_BYTES, DeviceRequest, LIBRARY_BYTES, MemoryBudget};
use finetune_compute::kernels::{DeviceError, Engine, Precision};

/// Whether this build can use a GPU.
pub const fn has_gpu_code() -> bool {
    Engine::HAS_CUDA
}

/// Opens the device that the job asks for. There is no silent fallback to the CPU.
///
/// # Errors
/// If it asks for a GPU and there is none that works.
pub fn open(request: DeviceRequest, precision: plan::Precision) -> Result<Engine, DeviceError> {
    match (request, wanted(precision)) {
        (DeviceRequest::Cpu, _) => Ok(Engine::cpu()),
        (DeviceRequest::Gpu, Some(precision)) => Engine::cuda(0, precision),
        (DeviceRequest::Gpu, None) => Engine::cuda(0, Precision::Bf16).or_else(|_| Engine::cuda(0, Precision::F16)),
    }
}

/// The engine to draw class pictures with: the run's own, in the precision that was asked for; `Auto` is the run's. On the CPU always f32.
///
/// # Errors
/// If the device cannot compute in it.
pub fn drawing(engine: &Engine, precision: plan::Precision) -> Result<Engine, DeviceError> {
    wanted(precision).map_or_else(|| Ok(engine.clone()), |precision| engine.in_precision(precision))
}

/// None: whatever suits the device.
fn wanted(precision: plan::Precision) -> Option<Precision> {
    match precision {
        plan::Precision::Auto => None,
        plan::Precision::FP32 => Some(Precision::F32),
        plan::Precision::FP16 => Some(Precision::F16),
        plan::Precision::BF16 => Some(Precision::Bf16),
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
