//! The devices that commands compute on.

use anyhow::{Context as _, Result};
use candle_core::Device;

/// `--device`.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum DeviceName {
    /// This machine's processor.
    Cpu,
    /// The first GPU.
    Cuda,
}

impl DeviceName {
    /// Opens the device.
    pub(super) fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => Device::new_cuda(0).context("failed to open the CUDA device"),
        }
    }
}
