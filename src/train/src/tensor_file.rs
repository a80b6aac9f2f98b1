//! safetensors files whose bytes depend on nothing but their content.
//!
//! The `safetensors` crate keeps header metadata in a hash map, so two runs may write its keys in different order; here
//! tensors and metadata are sorted by name. Layout: header length (u64, little-endian), JSON header padded with spaces to
//! a multiple of 8, values.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use safetensors::{Dtype, SafeTensors};

use finetune_api::OutputDtype;
use finetune_compute::optim::{Param, StateError, StateTensor};

/// Why a tensor file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// Not a safetensors file.
    #[error("failed to read {what}: not a safetensors file")]
    Format {
        /// What the file is.
        what: &'static str,
        /// The cause.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A tensor has an unexpected type or length.
    #[error("failed to read {what}")]
    Tensor {
        /// What the file is.
        what: &'static str,
        /// The cause.
        #[source]
        source: StateError,
    },
    /// A parameter is not f32.
    #[error("failed to read {what}: tensor {name:?} is not F32")]
    NotF32 {
        /// What the file is.
        what: &'static str,
        /// The tensor.
        name: String,
    },
}

/// A tensor on its way into a file.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Little-endian values, row-major.
    pub bytes: Vec<u8>,
}

/// The file with these tensors and header metadata. Equal content gives equal bytes.
pub fn write(mut entries: Vec<Entry>, metadata: &BTreeMap<String, String>) -> Vec<u8> {
    // Wide types first keeps every tensor aligned; within a type by name.
    entries.sort_by(|a, b| (std::cmp::Reverse(a.dtype.bitsize()), &a.name).cmp(&(std::cmp::Reverse(b.dtype.bitsize()), &b.name)));
    let text = |s: &str| serde_json::Value::from(s).to_string();
    let mut header = String::from("{");
    if !metadata.is_empty() {
        let pairs: Vec<String> = metadata.iter().map(|(k, v)| format!("{}:{}", text(k), text(v))).collect();
        let _infallible = write!(header, "\"__metadata__\":{{{}}}", pairs.join(","));
    }
    let mut offset = 0;
    for entry in &entries {
        if header.len() > 1 {
            header.push(',');
        }
        let end = offset + entry.bytes.len();
        let _infallible =
            write!(header, "{}:{{\"dtype\":\"{:?}\",\"shape\":{:?},\"data_offsets\":[{offset},{end}]}}", text(&entry.name), entry.dtype, entry.shape);
        offset = end;
    }
    header.push('}');
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    let mut out = Vec::with_capacity(8 + header.len() + offset);
    out.extend_from_slice(&(header.len() as u64).to_le_bytes());
    out.extend_from_slice(header.as_bytes());
    for entry in &entries {
        out.extend_from_slice(&entry.bytes);
    }
    out
}

/// f32 parameters as entries.
pub fn param_entries(params: &[Param]) -> Vec<Entry> {
    let bytes = |p: &Param| p.value.iter().flat_map(|x| x.to_le_bytes()).collect();
    params.iter().map(|p| Entry { name: p.name.clone(), dtype: Dtype::F32, shape: p.shape.clone(), bytes: bytes(p) }).collect()
}

impl Entry {
    /// The same f32 values in a shorter format, each rounded to nearest, ties to even; another type, and f32 itself, stays as it is.
    /// `None` where a finite value is larger than the format's largest.
    #[must_use]
    pub fn rounded(self, dtype: OutputDtype) -> Option<Self> {
        let convert: fn(f32) -> Option<[u8; 2]> = match dtype {
            OutputDtype::F32 => return Some(self),
            OutputDtype::F16 => |x| Some(half::f16::from_f32(x)).filter(|y| y.is_finite() || !x.is_finite()).map(half::f16::to_le_bytes),
            OutputDtype::BF16 => |x| Some(half::bf16::from_f32(x)).filter(|y| y.is_finite() || !x.is_finite()).map(half::bf16::to_le_bytes),
        };
        if self.dtype != Dtype::F32 {
            return Some(self);
        }
        let (values, _) = self.bytes.as_chunks::<4>();
        let mut bytes = Vec::with_capacity(2 * values.len());
        for value in values {
            bytes.extend_from_slice(&convert(f32::from_le_bytes(*value))?);
        }
        let dtype = if dtype == OutputDtype::F16 { Dtype::F16 } else { Dtype::BF16 };
        Some(Self { dtype, bytes, ..self })
    }
}

/// Optimizer state as entries.
pub fn state_entries(state: &[StateTensor]) -> Vec<Entry> {
    state.iter().map(|t| Entry { name: t.name.clone(), dtype: t.dtype(), shape: t.shape.clone(), bytes: t.to_bytes() }).collect()
}

/// Reads every tensor as state.
///
/// # Errors
/// If the bytes are not a safetensors file of known types. `what` names it in the error.
pub fn read_state(bytes: &[u8], what: &'static str) -> Result<Vec<StateTensor>, TensorFileError> {
    let file = SafeTensors::deserialize(bytes).map_err(|source| TensorFileError::Format { what, source })?;
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        StateTensor::from_bytes(&name, view.dtype(), view.shape(), view.data()).map_err(|source| TensorFileError::Tensor { what, source })
    };
    file.tensors().into_iter().map(tensor).collect()
}

/// Reads f32 parameters, by name.
///
/// # Errors
/// If the bytes are not a safetensors file of f32 tensors.
pub fn read_params(bytes: &[u8], what: &'static str) -> Result<BTreeMap<String, Param>, TensorFileError> {
    let mut params = BTreeMap::new();
    for tensor in read_state(bytes, what)? {
        let finetune_compute::optim::StateData::F32(value) = tensor.data else { return Err(TensorFileError::NotF32 { what, name: tensor.name }) };
        params.insert(tensor.name.clone(), Param { name: tensor.name, shape: tensor.shape, value });
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_compute::optim::StateData;

    #[test]
    fn files_are_read_back_by_the_crate_and_do_not_depend_on_order() {
        let param = |name: &str, value: Vec<f32>| Param { name: name.into(), shape: vec![value.len()], value };
        let params = [param("b\"quoted", vec![1.0, -2.5]), param("a", vec![f32::MIN_POSITIVE])];
        let metadata: BTreeMap<String, String> = [("format", "pt"), ("alpha", "{\"x\": 1}")].map(|(k, v)| (k.into(), v.into())).into();
        let bytes = write(param_entries(&params), &metadata);
        assert_eq!(bytes, write(param_entries(&[params[1].clone(), params[0].clone()]), &metadata));
        assert_eq!(read_params(&bytes, "test").unwrap().into_values().collect::<Vec<_>>(), [params[1].clone(), params[0].clone()]);
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["alpha"], "{\"x\": 1}");
    }

    #[test]
    fn values_are_rounded_and_none_becomes_infinite() {
        let entry = |value: &[f32]| param_entries(&[Param { name: "a".into(), shape: vec![value.len()], value: value.to_vec() }]).pop().unwrap();
        let read = |entry: Entry| -> Vec<u16> { entry.bytes.chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect() };
        // 1 + 2^-11 lies between two values of f16: the even one is 1.
        let values = [1.0, -2.5, 1.0 + 2f32.powi(-11), 65504.0, 1e-9];
        let short = entry(&values).rounded(OutputDtype::F16).unwrap();
        assert_eq!((short.dtype, short.shape.clone(), read(short)), (Dtype::F16, vec![5], vec![0x3c00, 0xc100, 0x3c00, 0x7bff, 0]));
        let brain = entry(&values).rounded(OutputDtype::BF16).unwrap();
        assert_eq!((brain.dtype, read(brain)[..3].to_vec()), (Dtype::BF16, vec![0x3f80, 0xc020, 0x3f80]));
        assert_eq!(entry(&values).rounded(OutputDtype::F32).unwrap().bytes, entry(&values).bytes);
        assert!(entry(&[65520.0]).rounded(OutputDtype::F16).is_none() && entry(&[65520.0]).rounded(OutputDtype::BF16).is_some());
        assert!(entry(&[f32::MAX]).rounded(OutputDtype::BF16).is_none());
        // What is broken already stays visible.
        assert_eq!(read(entry(&[f32::INFINITY]).rounded(OutputDtype::F16).unwrap()), [0x7c00]);
        let other = Entry { dtype: Dtype::U8, bytes: vec![7], ..entry(&[0.0]) };
        assert_eq!(other.rounded(OutputDtype::F16).unwrap().bytes, [7]);
    }

    #[test]
    fn mixed_types_keep_their_values() {
        let state = [
            StateTensor { name: "codes".into(), shape: vec![3], data: StateData::U8(vec![1, 2, 3]) },
            StateTensor { name: "step".into(), shape: vec![], data: StateData::U64(vec![7]) },
            StateTensor { name: "d".into(), shape: vec![], data: StateData::F64(vec![0.1]) },
        ];
        let mut read = read_state(&write(state_entries(&state), &BTreeMap::new()), "test").unwrap();
        read.sort_by_key(|t| state.iter().position(|s| s.name == t.name));
        assert_eq!(read, state);
        assert!(matches!(read_params(&write(state_entries(&state), &BTreeMap::new()), "test"), Err(TensorFileError::NotF32 { .. })));
    }
}
