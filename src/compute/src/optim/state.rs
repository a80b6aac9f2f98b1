//! Optimizer state as named tensors, for checkpoints.

use safetensors::Dtype;

/// A named tensor of optimizer state.
#[derive(Debug, Clone, PartialEq)]
pub struct StateTensor {
    /// Unique name, as `exp_avg.<parameter>`.
    pub name: String,
    /// Shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub data: StateData,
}

/// Values of a state tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum StateData {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit floats.
    F64(Vec<f64>),
    /// Codes.
    U8(Vec<u8>),
    /// Counters.
    U64(Vec<u64>),
}

/// Why a state was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The checkpoint lacks a tensor.
    #[error("failed to load the optimizer state: it has no tensor {name:?}")]
    Missing {
        /// The tensor.
        name: String,
    },
    /// The checkpoint has a tensor that this optimizer does not know.
    #[error("failed to load the optimizer state: tensor {name:?} does not belong to this optimizer and these parameters")]
    Unknown {
        /// The tensor.
        name: String,
    },
    /// Type or length differ.
    #[error("failed to load the optimizer state: tensor {name:?} is {got}, expected {want}")]
    Mismatch {
        /// The tensor.
        name: String,
        /// What the checkpoint holds.
        got: String,
        /// What the optimizer needs.
        want: String,
    },
    /// The bytes do not make whole values of a known type.
    #[error("failed to read state tensor {name:?}: {len} bytes of type {dtype} for shape {shape:?}")]
    Bytes {
        /// The tensor.
        name: String,
        /// The stored type.
        dtype: String,
        /// The number of bytes.
        len: usize,
        /// The stored shape.
        shape: Vec<usize>,
    },
}

impl StateTensor {
    /// An f32 tensor.
    pub(super) fn f32(name: String, values: Vec<f32>) -> Self {
        Self { name, shape: vec![values.len()], data: StateData::F32(values) }
    }

    /// The element type in a safetensors file.
    pub fn dtype(&self) -> Dtype {
        match self.data {
            StateData::F32(_) => Dtype::F32,
            StateData::F64(_) => Dtype::F64,
            StateData::U8(_) => Dtype::U8,
            StateData::U64(_) => Dtype::U64,
        }
    }

    /// The values as little-endian bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        match &self.data {
            StateData::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            StateData::F64(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            StateData::U8(v) => v.clone(),
            StateData::U64(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    /// A tensor from little-endian bytes.
    ///
    /// # Errors
    /// If the type is none of the four, or shape and length disagree.
    pub fn from_bytes(name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<Self, StateError> {
        let count = shape.iter().try_fold(1_usize, |n, d| n.checked_mul(*d));
        let data = match dtype {
            Dtype::F32 => StateData::F32(chunks(bytes).map(f32::from_le_bytes).collect()),
            Dtype::F64 => StateData::F64(chunks(bytes).map(f64::from_le_bytes).collect()),
            Dtype::U8 => StateData::U8(bytes.to_vec()),
            Dtype::U64 => StateData::U64(chunks(bytes).map(u64::from_le_bytes).collect()),
            _ => return Err(bad_bytes(name, dtype, shape, bytes)),
        };
        let tensor = Self { name: name.to_owned(), shape: shape.to_vec(), data };
        if Some(tensor.len()) != count || tensor.byte_len() != bytes.len() {
            return Err(bad_bytes(name, dtype, shape, bytes));
        }
        Ok(tensor)
    }

    fn len(&self) -> usize {
        match &self.data {
            StateData::F32(v) => v.len(),
            StateData::F64(v) => v.len(),
            StateData::U8(v) => v.len(),
            StateData::U64(v) => v.len(),
        }
    }

    fn byte_len(&self) -> usize {
        self.len() * (self.dtype().bitsize() / 8)
    }

    fn describe(&self) -> String {
        format!("{} values of {:?}", self.len(), self.dtype())
    }
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks().0.iter().copied()
}

fn bad_bytes(name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> StateError {
    StateError::Bytes { name: name.to_owned(), dtype: format!("{dtype:?}"), len: bytes.len(), shape: shape.to_vec() }
}

/// Takes a new state apart by name; nothing may be missing, left over or of another shape than in the old one.
pub(super) struct Incoming(std::collections::BTreeMap<String, StateTensor>);

impl Incoming {
    /// Checks `tensors` against the optimizer's own `current` state.
    pub(super) fn check(tensors: Vec<StateTensor>, current: &[StateTensor]) -> Result<Self, StateError> {
        let mut map = std::collections::BTreeMap::new();
        for tensor in tensors {
            if let Some(twice) = map.insert(tensor.name.clone(), tensor) {
                return Err(StateError::Unknown { name: twice.name });
            }
        }
        for want in current {
            let got = map.get(&want.name).ok_or_else(|| StateError::Missing { name: want.name.clone() })?;
            if got.dtype() != want.dtype() || got.shape != want.shape || got.len() != want.len() {
                return Err(StateError::Mismatch { name: want.name.clone(), got: got.describe(), want: want.describe() });
            }
        }
        if map.len() > current.len() {
            let known: std::collections::BTreeSet<&str> = current.iter().map(|t| t.name.as_str()).collect();
            if let Some(name) = map.keys().find(|name| !known.contains(name.as_str())) {
                return Err(StateError::Unknown { name: name.clone() });
            }
        }
        Ok(Self(map))
    }

    pub(super) fn f32(&mut self, name: &str) -> Vec<f32> {
        match self.0.remove(name).map(|t| t.data) {
            Some(StateData::F32(v)) => v,
            _ => Vec::new(),
        }
    }

    pub(super) fn f64(&mut self, name: &str) -> f64 {
        match self.0.remove(name).map(|t| t.data) {
            Some(StateData::F64(v)) => v.first().copied().unwrap_or_default(),
            _ => 0.0,
        }
    }

    pub(super) fn u8(&mut self, name: &str) -> Vec<u8> {
        match self.0.remove(name).map(|t| t.data) {
            Some(StateData::U8(v)) => v,
            _ => Vec::new(),
        }
    }

    pub(super) fn u64(&mut self, name: &str) -> u64 {
        match self.0.remove(name).map(|t| t.data) {
            Some(StateData::U64(v)) => v.first().copied().unwrap_or_default(),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_for_every_type() {
        for data in [
            StateData::F32(vec![1.5, -0.0, f32::MIN_POSITIVE]),
            StateData::F64(vec![1e-300, 2.0, 3.0]),
            StateData::U8(vec![0, 127, 255]),
            StateData::U64(vec![1, u64::MAX, 0]),
        ] {
            let tensor = StateTensor { name: "x".into(), shape: vec![3], data };
            assert_eq!(StateTensor::from_bytes("x", tensor.dtype(), &tensor.shape, &tensor.to_bytes()), Ok(tensor));
        }
    }

    #[test]
    fn wrong_lengths_and_types_are_refused() {
        assert!(StateTensor::from_bytes("x", Dtype::F32, &[2], &[0; 7]).is_err());
        assert!(StateTensor::from_bytes("x", Dtype::F32, &[3], &[0; 8]).is_err());
        assert!(StateTensor::from_bytes("x", Dtype::F16, &[2], &[0; 4]).is_err());
        assert!(StateTensor::from_bytes("x", Dtype::U8, &[usize::MAX, 2], &[0; 4]).is_err());
    }

    #[test]
    fn incoming_state_must_match_exactly() {
        let tensor = |name: &str, n| StateTensor::f32(name.into(), vec![0.0; n]);
        let current = [tensor("a", 2), tensor("b", 3)];
        assert!(Incoming::check(vec![tensor("b", 3), tensor("a", 2)], &current).is_ok());
        assert_eq!(Incoming::check(vec![tensor("a", 2)], &current).err(), Some(StateError::Missing { name: "b".into() }));
        assert!(matches!(Incoming::check(vec![tensor("a", 2), tensor("b", 4)], &current), Err(StateError::Mismatch { .. })));
        assert_eq!(Incoming::check(vec![tensor("a", 2), tensor("b", 3), tensor("c", 1)], &current).err(), Some(StateError::Unknown { name: "c".into() }));
    }
}
