//! The device of a run, chosen once: where networks are made, [`crate::with_device`] gives them its type.

use super::{Cpu, Device, DeviceError, Precision};

/// A device that is chosen while the program runs. It has no operations: networks have the device's type.
#[derive(Debug, Clone)]
pub enum Engine {
    /// The CPU.
    Cpu(Cpu),
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(super::Cuda),
}

/// Evaluates an expression with the device of an [`Engine`] in its own type.
#[cfg(feature = "cuda")]
#[macro_export]
macro_rules! with_device {
    ($engine:expr, $device:ident => $work:expr) => {
        match $engine {
            $crate::kernels::Engine::Cpu($device) => $work,
            $crate::kernels::Engine::Cuda($device) => $work,
        }
    };
}

/// Evaluates an expression with the device of an [`Engine`] in its own type.
#[cfg(not(feature = "cuda"))]
#[macro_export]
macro_rules! with_device {
    ($engine:expr, $device:ident => $work:expr) => {
        match $engine {
            $crate::kernels::Engine::Cpu($device) => $work,
        }
    };
}

impl Engine {
    /// Whether this build can use a GPU.
    pub const HAS_CUDA: bool = cfg!(feature = "cuda");

    /// The CPU.
    pub fn cpu() -> Self {
        Self::Cpu(Cpu::default())
    }

    /// A GPU, computing in this precision.
    ///
    /// # Errors
    /// If this build has no kernels for it, or the driver, a library or the device does not do.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: i32, precision: Precision) -> Result<Self, DeviceError> {
        super::Cuda::open(ordinal, precision).map(Self::Cuda)
    }

    /// A GPU, computing in this precision.
    ///
    /// # Errors
    /// Always: this build has no kernels for it.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda(_ordinal: i32, _precision: Precision) -> Result<Self, DeviceError> {
        Err(DeviceError::NotBuilt)
    }

    /// As [`Device::in_precision`].
    ///
    /// # Errors
    /// If the device cannot compute in it.
    pub fn in_precision(&self, precision: Precision) -> Result<Self, DeviceError> {
        with_device!(self, device => device.in_precision(precision).map(Self::from))
    }

    /// Whether it computes on a GPU.
    pub fn is_cuda(&self) -> bool {
        fn is_gpu<D: Device>(_: &D) -> bool {
            !D::IS_HOST
        }
        with_device!(self, device => is_gpu(device))
    }

    /// What it computes in.
    pub fn precision(&self) -> Precision {
        with_device!(self, device => device.precision())
    }

    /// As [`Device::is_batch_invariant`].
    pub fn is_batch_invariant(&self) -> bool {
        with_device!(self, device => device.is_batch_invariant())
    }

    /// As [`Device::describe`].
    pub fn describe(&self) -> Option<(String, (i32, i32))> {
        with_device!(self, device => device.describe())
    }

    /// As [`Device::set_memory_cap`].
    pub fn set_memory_cap(&self, bytes: usize) {
        with_device!(self, device => device.set_memory_cap(bytes));
    }

    /// As [`Device::peak_memory`].
    pub fn peak_memory(&self) -> usize {
        with_device!(self, device => device.peak_memory())
    }

    /// As [`Device::device_memory`].
    pub fn device_memory(&self) -> Option<(usize, usize)> {
        with_device!(self, device => device.device_memory())
    }

    /// As [`Device::start_profile`].
    pub fn start_profile(&self) {
        with_device!(self, device => device.start_profile());
    }

    /// As [`Device::end_profile`].
    pub fn end_profile(&self) -> Vec<(String, usize, f64)> {
        with_device!(self, device => device.end_profile())
    }

    /// As [`Device::trim`].
    pub fn trim(&self) {
        with_device!(self, device => device.trim());
    }
}

impl From<Cpu> for Engine {
    fn from(device: Cpu) -> Self {
        Self::Cpu(device)
    }
}

#[cfg(feature = "cuda")]
impl From<super::Cuda> for Engine {
    fn from(device: super::Cuda) -> Self {
        Self::Cuda(device)
    }
}
