//! Names of tensors in a file of another layout.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::WeightsError;
use crate::survey::{TensorInfo, Tensors};

/// What the tensors of a component are in a file of another layout: `tensors.json` beside the file, by their names in diffusers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorMap(pub BTreeMap<String, Source>);

/// Where a tensor comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// A tensor of the file, or rows of one.
    Stored(Stored),
    /// The identity matrix of this size.
    Identity(usize),
}

/// A tensor of the file, or rows of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Stored {
    /// Its name in the file.
    pub tensor: String,
    /// Part `.0` of `.1` equal parts of its rows; all rows where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<(usize, usize)>,
    /// Whether the second half of the rows comes first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub swap_halves: bool,
    /// The tensor that holds the scale of its 8-bit values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<String>,
}

impl TensorMap {
    /// The file's name.
    pub const FILE: &str = "tensors.json";

    /// What a file with these tensors has under the names of this map.
    ///
    /// # Errors
    /// A sentence without its subject, the file: which tensor is missing or has no such part.
    pub fn of(&self, tensors: &Tensors) -> Result<Tensors, String> {
        let find = |name: &String| tensors.get(name).ok_or_else(|| format!("has no tensor {name:?}"));
        let each = self.0.iter().map(|(name, source)| {
            let info = match source {
                Source::Identity(size) => TensorInfo::made(vec![*size; 2]),
                Source::Stored(Stored { tensor, part, swap_halves, scale }) => {
                    let mut info = find(tensor)?.clone();
                    let parts = part.iter().chain(swap_halves.then_some(&(0, 2)));
                    let rows = parts.map(|part| part_of(&info.shape, *part)).collect::<Result<Vec<_>, _>>();
                    let rows = rows.map_err(|problem| format!("has a tensor {tensor:?} that {problem}"))?;
                    if let (Some((_, count)), Some(rows)) = (part, rows.first()) {
                        info.part(*rows, *count);
                    }
                    match scale.as_ref().map(find).transpose()? {
                        Some(found) if found.shape.iter().product::<usize>() != 1 || found.dtype != "F32" => {
                            return Err(format!("scales {tensor:?} by a tensor of shape {:?} and type {}; one value in F32 is read", found.shape, found.dtype));
                        }
                        _ => info,
                    }
                }
            };
            Ok((name.clone(), info))
        });
        each.collect()
    }

    /// The map of the component folder `dir`, if it has one.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, WeightsError> {
        let path = dir.join(Self::FILE);
        match std::fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map(Some).map_err(|error| WeightsError::Map { path, problem: error.to_string() }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(WeightsError::Read { path, source }),
        }
    }
}

/// Rows of part `index` of `count` of a tensor of this shape.
pub(super) fn part_of(shape: &[usize], (index, count): (usize, usize)) -> Result<usize, String> {
    match shape.first() {
        Some(rows) if index < count && rows.is_multiple_of(count) => Ok(rows / count),
        _ => Err(format!("has shape {shape:?}, which has no part {index} of {count}")),
    }
}

/// The bytes of the identity matrix in f32.
pub(super) fn identity(size: usize) -> Vec<u8> {
    (0..size * size).flat_map(|at| if at / size == at % size { 1.0_f32 } else { 0.0 }.to_le_bytes()).collect()
}
