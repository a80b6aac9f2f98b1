//! The devices that commands compute on.

use anyhow::Result;

use finetune_compute::kernels::{Engine, Precision, WeightFormat};

/// `--device`.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum DeviceName {
    /// This machine's processor.
    Cpu,
    /// The first GPU.
    Cuda,
}

/// `--precision`.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum PrecisionName {
    /// 32 bits, without TF32.
    Fp32,
    /// IEEE's half precision.
    Fp16,
    /// bfloat16: from compute capability 8.0 on.
    Bf16,
}

/// `--weights`.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum WeightsName {
    /// In the number format that the device computes in.
    Float,
    /// In 8 bits with a scale per output: half the memory, as with `training.weights: Int8`.
    Int8,
}

impl From<WeightsName> for WeightFormat {
    fn from(name: WeightsName) -> Self {
        match name {
            WeightsName::Float => Self::Float,
            WeightsName::Int8 => Self::Int8,
        }
    }
}

impl From<PrecisionName> for Precision {
    fn from(name: PrecisionName) -> Self {
        match name {
            PrecisionName::Fp32 => Self::F32,
            PrecisionName::Fp16 => Self::F16,
            PrecisionName::Bf16 => Self::Bf16,
        }
    }
}

impl DeviceName {
    /// Opens the device. The CPU computes in f32 whatever the precision.
    pub(super) fn open(self, precision: PrecisionName) -> Result<Engine> {
        Ok(match self {
            Self::Cpu => Engine::cpu(),
            Self::Cuda => Engine::cuda(0, precision.into())?,
        })
    }
}
