//! The user's own weights through an independent second implementation: T5 by candle-transformers.
//!
//! The published weights are gated, so no case of ours can hold them. Their owner can compare in minutes what this build computes from them with
//! what candle-transformers does. The tokens are ours; the reference cases cover them.

use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::t5;

use super::{Report, Row, VerifyError, relative_error};
use finetune_compute::kernels::{Engine, Precision};
use finetune_model::layout::{ModelDir, Part};
use finetune_model::text::PromptEncoder;
use finetune_model::weights::Weights;

/// Tokens that T5 reads.
const LENGTH: usize = 77;
const CAPTION: &str = "a watercolour of a corgi in a red hat, running along the beach at sunset";

/// Encodes a caption with the T5 of `model` twice: by the product's code on `engine`'s device, and in f32 by candle-transformers on the CPU, which needs
/// four bytes of memory per weight (19 GB for T5-XXL).
///
/// # Errors
/// If the model has no T5, or one of the two fails.
pub fn text_encoder(model: &ModelDir, engine: &Engine) -> Result<Report, VerifyError> {
    let encoder = PromptEncoder::open(model, LENGTH, engine).map_err(VerifyError::product)?;
    if !model.has(Part::TextEncoder3).map_err(VerifyError::product)? {
        return Err(VerifyError::NoT5(model.root().to_owned()));
    }
    let ids = encoder.tokenize(CAPTION).map_err(VerifyError::product)?.t5;
    let embeddings = encoder.encode(&[CAPTION.to_owned()], &mut |_| ControlFlow::Continue(())).map_err(VerifyError::product)?;
    let want = by_candle(model, &ids)?;
    // CLIP's rows come before T5's.
    let got = embeddings.first().map(|e| e.embeds.values()).unwrap_or_default();
    let got = got.get(got.len().saturating_sub(want.len())..).unwrap_or_default();
    let error = if got.len() == want.len() { relative_error(got, &want) } else { f64::INFINITY };
    let tolerance = match engine.precision() {
        Precision::F32 => 1e-4,
        Precision::F16 => 1e-2,
        Precision::Bf16 => 5e-2,
    };
    Ok(Report { rows: vec![Row { name: "text_encoder_3".to_owned(), error, tolerance: Some(tolerance), passed: error <= tolerance }] })
}

/// T5's last hidden states, [S, D] in one row.
fn by_candle(model: &ModelDir, ids: &[u32]) -> Result<Vec<f64>, VerifyError> {
    let config: t5::Config = model.json(Part::TextEncoder3, "config.json").map_err(VerifyError::product)?;
    let weights = Weights::open(&model.path(Part::TextEncoder3)).map_err(VerifyError::product)?;
    let tensors = weights.names().map(|name| {
        let values = weights.f32(name).map_err(VerifyError::product)?;
        let shape = weights.shape(name).map_err(VerifyError::product)?;
        Ok((name.to_owned(), Tensor::from_vec(values, shape, &Device::Cpu)?))
    });
    let tensors = tensors.collect::<Result<_, VerifyError>>()?;
    let mut encoder = t5::T5EncoderModel::load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), &config)?;
    let states = encoder.forward(&Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?)?;
    Ok(states.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}
