//! `encode_image`: the autoencoder, both ways.

use super::{Case, Report, VerifyError};
use finetune_compute::kernels::Engine;
use finetune_model::ModelDir;
use finetune_model::vae::{VaeDecoder, VaeEncoder};

/// Encodes the case's pixels and decodes the reference's mean.
///
/// # Errors
/// If the case is malformed or the autoencoder fails.
pub(super) fn run(case: &Case, engine: &Engine) -> Result<Report, VerifyError> {
    let model = ModelDir::open(&case.model_dir()).map_err(VerifyError::product)?;
    let encoder = VaeEncoder::load(&model, engine).map_err(VerifyError::product)?;
    let posterior = encoder.encode(&case.inputs()?.f32("pixels")?).map_err(VerifyError::product)?;
    let want = case.expected()?;
    let mut report = Report::default();
    report.compare(case, "mean", &posterior.mean, &want)?;
    report.compare(case, "logvar", &posterior.logvar, &want)?;
    let decoder = VaeDecoder::load(&model, engine).map_err(VerifyError::product)?;
    let decoded = decoder.decode(&want.f32("mean")?).map_err(VerifyError::product)?;
    report.compare(case, "decoded", &decoded, &want)?;
    Ok(report)
}
