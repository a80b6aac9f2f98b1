//! Frozen weights as they are stored.

/// How values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl StoredType {
    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// A stored tensor: little-endian values, row-major, possibly unaligned.
#[derive(Debug, Clone, Copy)]
pub struct StoredTensor<'a> {
    /// The type of its values.
    pub stored_type: StoredType,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// Where frozen weights come from: memory-mapped files, or memory in tests.
pub trait WeightSource: Send + Sync {
    /// The tensor of this name; `None` if there is none or its type is not a supported float.
    fn stored(&self, name: &str) -> Option<StoredTensor<'_>>;
}
