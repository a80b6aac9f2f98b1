//! Reads cases written by the reference implementation (`tests/golden/README.md`) and compares the product's own numbers with them.
//!
//! Each kind of case has a module that calls the code which trains, encodes or samples, not a second implementation.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use finetune_common::tensor::{HostTensor, ShapeError};
use finetune_compute::kernels::{Engine, Precision};

mod encode_image;
mod encode_prompt;
mod preprocess;
mod sample;
mod second;
pub mod train;

pub use second::text_encoder;

/// Why a case could not be run.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A file of the case cannot be read.
    #[error("failed to read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// `case.json` is not what it should be.
    #[error("failed to understand {path}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// `case.json` has no usable value at this key.
    #[error("case.json has no usable value for {key:?}")]
    Setting {
        /// The key.
        key: String,
    },
    /// The case has no such tensor.
    #[error("the case has no tensor {name:?} in {file}")]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The file.
        file: &'static str,
    },
    /// In half precision only PyTorch's own error says what may be expected.
    #[error(
        "case.json has no half_precision.{0}: the errors of the reference implementation in that precision (reference/half_precision.py); without them a case is judged in fp32 only"
    )]
    NoHalfPrecision(&'static str),
    /// The second implementation covers T5 alone.
    #[error("the model in {0} has no text_encoder_3/: there is nothing to compare")]
    NoT5(PathBuf),
    /// No module for this kind.
    #[error("unknown kind of case {0:?}")]
    UnknownKind(String),
    /// A file of tensors cannot be read.
    #[error("failed to read a tensor of the case")]
    Tensor(#[from] candle_core::Error),
    /// A tensor does not have the shape that it should have.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The product's own code failed.
    #[error("failed to run the case")]
    Product(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl VerifyError {
    /// Wraps an error of the code under test.
    pub fn product(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Product(Box::new(error))
    }
}

/// One case: a folder with `case.json`, `inputs.safetensors`, `expected.safetensors` and mostly `model/`.
#[derive(Debug)]
pub struct Case {
    dir: PathBuf,
    settings: serde_json::Value,
    kind: String,
    tolerance: f64,
}

impl Case {
    /// Opens the case in `dir`.
    ///
    /// # Errors
    /// If `case.json` is missing or has no kind or tolerance.
    pub fn open(dir: &Path) -> Result<Self, VerifyError> {
        let path = dir.join("case.json");
        let text = std::fs::read_to_string(&path).map_err(|source| VerifyError::Read { path: path.clone(), source })?;
        let settings: serde_json::Value = serde_json::from_str(&text).map_err(|source| VerifyError::Json { path, source })?;
        let kind = settings["kind"].as_str().ok_or_else(|| VerifyError::Setting { key: "kind".into() })?.to_owned();
        let tolerance = settings["tolerance"].as_f64().ok_or_else(|| VerifyError::Setting { key: "tolerance".into() })?;
        Ok(Self { dir: dir.to_owned(), settings, kind, tolerance })
    }

    /// The case in `dir`, or the cases in its sub-folders, by name.
    ///
    /// # Errors
    /// If the folder or a case in it cannot be read.
    pub fn find(dir: &Path) -> Result<Vec<Self>, VerifyError> {
        if dir.join("case.json").exists() {
            return Ok(vec![Self::open(dir)?]);
        }
        let read = |source| VerifyError::Read { path: dir.to_owned(), source };
        let mut folders = BTreeSet::new();
        for entry in std::fs::read_dir(dir).map_err(read)? {
            let path = entry.map_err(read)?.path();
            if path.join("case.json").exists() {
                folders.insert(path);
            }
        }
        folders.iter().map(|path| Self::open(path)).collect()
    }

    /// The folder's name.
    pub fn name(&self) -> String {
        self.dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// The kind, as `train`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Allowed relative error (Frobenius) of each tensor.
    pub fn tolerance(&self) -> f64 {
        self.tolerance
    }

    /// The case's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's folder in diffusers layout.
    pub fn model_dir(&self) -> PathBuf {
        self.dir.join("model")
    }

    /// All of `case.json`.
    pub fn settings(&self) -> &serde_json::Value {
        &self.settings
    }

    /// The value at `key` of `case.json`.
    ///
    /// # Errors
    /// If it is missing or not a `T`.
    pub fn setting<T: serde::de::DeserializeOwned>(&self, key: &str) -> Result<T, VerifyError> {
        serde_json::from_value(self.settings[key].clone()).map_err(|_| VerifyError::Setting { key: key.into() })
    }

    /// All input tensors.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn inputs(&self) -> Result<Tensors, VerifyError> {
        Ok(Tensors { tensors: candle_core::safetensors::load(self.dir.join(INPUTS), &Device::Cpu)?.into_iter().collect(), file: INPUTS })
    }

    /// All expected tensors.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn expected(&self) -> Result<Tensors, VerifyError> {
        Ok(Tensors { tensors: candle_core::safetensors::load(self.dir.join(EXPECTED), &Device::Cpu)?.into_iter().collect(), file: EXPECTED })
    }
}

/// How many times the reference implementation's error in half precision ours may be.
const HALF_PRECISION: f64 = 1.1;
const INPUTS: &str = "inputs.safetensors";
const EXPECTED: &str = "expected.safetensors";

/// Tensors of a case by name, in the types that their file has.
#[derive(Debug)]
pub struct Tensors {
    tensors: BTreeMap<String, Tensor>,
    file: &'static str,
}

impl Tensors {
    /// The tensor of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, name: &str) -> Result<&Tensor, VerifyError> {
        self.tensors.get(name).ok_or_else(|| VerifyError::MissingTensor { name: name.to_owned(), file: self.file })
    }

    /// The tensor of this name as f32.
    ///
    /// # Errors
    /// If there is none.
    pub fn f32(&self, name: &str) -> Result<HostTensor, VerifyError> {
        let tensor = self.get(name)?;
        Ok(HostTensor::new(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?, tensor.dims())?)
    }

    /// Every name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

/// One compared tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The tensor's name.
    pub name: String,
    /// ‖got − want‖ / ‖want‖ (Frobenius); absolute where ‖want‖ is 0; infinite where shapes differ.
    pub error: f64,
    /// What is allowed; none: nothing says what may be expected in this precision.
    pub tolerance: Option<f64>,
    /// Whether the error is within the tolerance, if there is one.
    pub passed: bool,
}

/// The comparison of a case.
#[derive(Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
}

impl Report {
    /// Compares a tensor with the expected one of this name. Values are compared in f64.
    ///
    /// # Errors
    /// If nothing of this name is expected, or it cannot be read.
    pub fn compare(&mut self, case: &Case, name: &str, got: &HostTensor, expected: &Tensors) -> Result<(), VerifyError> {
        let want = expected.get(name)?;
        let error =
            if got.shape() == want.dims() { relative_error(got.values(), &want.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?) } else { f64::INFINITY };
        self.rows.push(Row { name: name.to_owned(), error, tolerance: Some(case.tolerance), passed: error <= case.tolerance });
        Ok(())
    }

    /// Adds a failed row for every expected tensor that was not compared: a case must not pass by what was left out.
    pub fn require_all(&mut self, case: &Case, expected: &Tensors) {
        let seen: BTreeSet<String> = self.rows.iter().map(|r| r.name.clone()).collect();
        for name in expected.names().filter(|n| !seen.contains(*n)) {
            self.rows.push(Row { name: name.to_owned(), error: f64::INFINITY, tolerance: Some(case.tolerance), passed: false });
        }
    }

    /// Judges by the reference implementation's own errors in half precision instead: at most [`HALF_PRECISION`] times as large. Tensors that
    /// are missing stay failed.
    fn judge_by(&mut self, reference: &BTreeMap<String, f64>) {
        for row in self.rows.iter_mut().filter(|row| row.error.is_finite()) {
            row.tolerance = reference.get(&row.name).map(|error| HALF_PRECISION * error);
            row.passed = row.tolerance.is_none_or(|tolerance| row.error <= tolerance);
        }
    }

    /// All rows in the order of comparison.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Whether something was judged and all of it passed.
    pub fn passed(&self) -> bool {
        self.rows.iter().any(|r| r.tolerance.is_some()) && self.rows.iter().all(|r| r.passed)
    }

    /// The largest error.
    pub fn worst(&self) -> f64 {
        self.rows.iter().map(|r| r.error).fold(0.0, f64::max)
    }
}

/// ‖got − want‖ / ‖want‖; ‖got‖ where ‖want‖ is 0; infinite where something is not a number.
pub(crate) fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    let difference = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
    let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    let error = if norm > 0.0 { difference / norm } else { difference };
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Runs the case and compares every expected tensor.
///
/// # Errors
/// If the case is malformed, its kind unknown, or the product's code fails on it.
pub fn run(case: &Case, engine: &Engine) -> Result<Report, VerifyError> {
    let kinds: &[(&str, RunKind)] = &[
        ("encode_image", encode_image::run),
        ("encode_prompt", encode_prompt::run),
        ("preprocess", preprocess::run),
        ("sample", sample::run),
        ("train", train::run),
    ];
    let (_, run) = kinds.iter().find(|(kind, _)| *kind == case.kind()).ok_or_else(|| VerifyError::UnknownKind(case.kind().to_owned()))?;
    let mut report = run(case, engine)?;
    report.require_all(case, &case.expected()?);
    let half = match engine.precision() {
        Precision::F32 => return Ok(report),
        Precision::F16 => "fp16",
        Precision::Bf16 => "bf16",
    };
    let reference = serde_json::from_value(case.settings["half_precision"][half].clone()).map_err(|_| VerifyError::NoHalfPrecision(half))?;
    report.judge_by(&reference);
    Ok(report)
}

type RunKind = fn(&Case, &Engine) -> Result<Report, VerifyError>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_absolute_for_zero_and_never_nan() {
        assert!((relative_error(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-12);
        assert!((relative_error(&[0.0, 0.5], &[0.0, 0.0]) - 0.5).abs() < 1e-12);
        assert_eq!(relative_error(&[f32::NAN], &[1.0]), f64::INFINITY);
    }

    #[test]
    fn a_report_without_rows_or_with_a_missing_tensor_fails() {
        assert!(!Report::default().passed());
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("case.json"), r#"{"kind": "train", "tolerance": 0.1}"#).unwrap();
        let case = Case::open(dir.path()).unwrap();
        let one = Tensor::new(&[1.0_f32], &Device::Cpu).unwrap();
        let expected = Tensors { tensors: [("a".to_owned(), one.clone()), ("b".to_owned(), one)].into(), file: EXPECTED };
        let mut report = Report::default();
        report.compare(&case, "a", &HostTensor::vector(vec![1.0]), &expected).unwrap();
        assert!(report.passed());
        report.require_all(&case, &expected);
        assert!(!report.passed());
    }

    #[test]
    fn in_half_precision_the_reference_says_what_is_allowed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("case.json"), r#"{"kind": "train", "tolerance": 1e-4}"#).unwrap();
        let case = Case::open(dir.path()).unwrap();
        let expected = |name: &str| Tensors { tensors: [(name.to_owned(), Tensor::new(&[1.0_f32], &Device::Cpu).unwrap())].into(), file: EXPECTED };
        let judged = |got: f32, reference: &[(&str, f64)]| {
            let mut report = Report::default();
            report.compare(&case, "a", &HostTensor::vector(vec![got]), &expected("a")).unwrap();
            report.judge_by(&reference.iter().map(|(name, error)| ((*name).to_owned(), *error)).collect());
            report
        };
        assert!(judged(1.01, &[("a", 0.0095)]).passed());
        assert!(!judged(1.01, &[("a", 0.0088)]).passed());
        // Nothing was judged.
        assert!(!judged(1.01, &[("b", 1.0)]).passed());
        assert_eq!(judged(1.01, &[("b", 1.0)]).rows()[0].tolerance, None);
        // What could not be compared stays failed.
        let mut report = judged(1.0, &[("a", 1.0)]);
        report.require_all(&case, &expected("b"));
        report.judge_by(&[("a".to_owned(), 1.0), ("b".to_owned(), 1.0)].into());
        assert!(!report.passed());
    }
}
