//! Cases of kind `preprocess`: a picture file to the model's input with a centre crop.

use super::{Case, Report, VerifyError};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::Engine;
use finetune_data::image::{ImageLimits, decode};
use finetune_data::transform::Transform;

/// Runs the case.
///
/// # Errors
/// If a file cannot be read or decoded.
pub(super) fn run(case: &Case, _engine: &Engine) -> Result<Report, VerifyError> {
    let resolution: u32 = case.setting("resolution")?;
    let expected = case.expected()?;
    let mut report = Report::default();
    for name in expected.names() {
        let path = case.dir().join("images").join(name);
        let bytes = std::fs::read(&path).map_err(|source| VerifyError::Read { path, source })?;
        let picture = decode(&bytes, &ImageLimits::default()).map_err(VerifyError::product)?;
        let pixels = Transform::center((picture.width, picture.height), (resolution, resolution)).apply(&picture);
        let side = resolution as usize;
        let got = HostTensor::new(pixels.data, [3, side, side])?;
        report.compare(case, name, &got, &expected)?;
    }
    Ok(report)
}
