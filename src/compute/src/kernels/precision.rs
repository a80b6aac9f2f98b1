//! What activations and weights are stored as.

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
