//! `encode_prompt`: tokenizers and text encoders.

use std::ops::ControlFlow;

use super::{Case, Report, VerifyError};
use finetune_common::tensor::{HostTensor, ShapeError};
use finetune_compute::kernels::Engine;
use finetune_model::ModelDir;
use finetune_model::text::{PromptEmbedding, PromptEncoder};

/// Encodes the case's captions.
///
/// # Errors
/// If the case is malformed or encoding fails.
pub(super) fn run(case: &Case, engine: &Engine) -> Result<Report, VerifyError> {
    let captions: Vec<String> = case.setting("captions")?;
    let model = ModelDir::open(&case.model_dir()).map_err(VerifyError::product)?;
    let encoder = PromptEncoder::open(&model, case.setting("max_sequence_length")?, engine).map_err(VerifyError::product)?;
    let ids = captions.iter().map(|c| encoder.tokenize(c)).collect::<Result<Vec<_>, _>>().map_err(VerifyError::product)?;
    let embeddings = encoder.encode(&captions, &mut |_| ControlFlow::Continue(())).map_err(VerifyError::product)?;

    let want = case.expected()?;
    let mut report = Report::default();
    // Ids are whole numbers that f32 holds.
    let integers = |rows: Vec<&[u32]>| -> Result<HostTensor, ShapeError> {
        let width = rows.first().map_or(0, |r| r.len());
        HostTensor::new(rows.concat().into_iter().map(|id| id as f32).collect(), [rows.len(), width])
    };
    report.compare(case, "input_ids.clip_l", &integers(ids.iter().map(|i| &i.clip_l[..]).collect())?, &want)?;
    report.compare(case, "input_ids.clip_g", &integers(ids.iter().map(|i| &i.clip_g[..]).collect())?, &want)?;
    if want.names().any(|name| name == "input_ids.t5") {
        report.compare(case, "input_ids.t5", &integers(ids.iter().map(|i| &i.t5[..]).collect())?, &want)?;
    }
    let stack = |part: fn(&PromptEmbedding) -> &HostTensor| HostTensor::stack(&embeddings.iter().map(part).collect::<Vec<_>>());
    report.compare(case, "prompt_embeds", &stack(|e| &e.embeds)?, &want)?;
    report.compare(case, "pooled", &stack(|e| &e.pooled)?, &want)?;
    Ok(report)
}
