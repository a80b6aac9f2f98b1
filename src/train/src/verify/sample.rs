//! `sample`: guidance sampling with a LoRA.

use std::ops::ControlFlow;

use super::{Case, Report, VerifyError};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Engine, WeightFormat};
use finetune_model::layout::{ModelDir, Part};
use finetune_model::lora::LoraState;
use finetune_model::mmdit::MmditConfig;
use finetune_model::sample::{Denoise, PromptBatch, SkipLayers, denoise, sigmas, to_unit, transformer};
use finetune_model::vae::VaeDecoder;
use finetune_model::weights::Weights;

/// Samples from the case's latents.
///
/// # Errors
/// If the case is malformed or sampling fails.
pub(super) fn run(case: &Case, engine: &Engine) -> Result<Report, VerifyError> {
    let model = ModelDir::open(&case.model_dir()).map_err(VerifyError::product)?;
    let inputs = case.inputs()?;
    let config = MmditConfig::open(&model.path(Part::Transformer)).map_err(VerifyError::product)?;
    let weights = Weights::open(&model.path(Part::Transformer)).map_err(VerifyError::product)?;

    // The reference loads the LoRA from a file without metadata, where alpha is the rank.
    let mut lora = Vec::new();
    for name in inputs.names().filter(|n| n.starts_with("lora.")) {
        lora.push((name["lora.".len()..].to_owned(), inputs.get(name)?.clone()));
    }
    let file = safetensors::serialize(lora.iter().map(|(n, t)| (n.as_str(), t)), None).map_err(VerifyError::product)?;
    let (layout, params) = LoraState::parse(&file, case.dir()).and_then(|l| l.resolve(&config.linear_sites())).map_err(VerifyError::product)?;
    let transformer = transformer(weights, config, engine, WeightFormat::Float, Some((layout, params))).map_err(VerifyError::product)?;

    let skip = &case.settings()["skip_guidance_layers"];
    let skip_layers = if skip.is_null() {
        None
    } else {
        let layers: Vec<usize> = case.setting("skip_guidance_layers")?;
        let number = |key: &str, default: f64| case.settings()[key].as_f64().unwrap_or(default);
        let usual = SkipLayers::default();
        Some(SkipLayers {
            layers,
            scale: number("skip_layer_guidance_scale", usual.scale),
            start: number("skip_layer_guidance_start", usual.start),
            stop: number("skip_layer_guidance_stop", usual.stop),
        })
    };
    let settings = Denoise {
        steps: case.setting("num_inference_steps")?,
        guidance_scale: case.setting("guidance_scale")?,
        lora_scale: case.setting("lora_scale")?,
        skip_layers,
    };
    let scheduler = model.scheduler().map_err(VerifyError::product)?;
    let prompts = PromptBatch { embeds: inputs.f32("prompt_embeds")?, pooled: inputs.f32("pooled")? };
    let negative = PromptBatch { embeds: inputs.f32("negative_prompt_embeds")?, pooled: inputs.f32("negative_pooled")? };
    let latents = denoise(transformer.as_ref(), &scheduler, &inputs.f32("latents")?, &prompts, &negative, &settings, &mut |_| ControlFlow::Continue(()))
        .map_err(VerifyError::product)?;

    let want = case.expected()?;
    let mut report = Report::default();
    report.compare(case, "sigmas", &HostTensor::vector(sigmas(&scheduler, settings.steps)), &want)?;
    report.compare(case, "latents", &latents, &want)?;
    let decoder = VaeDecoder::load(&model, engine).map_err(VerifyError::product)?;
    let decoded = decoder.decode(&decoder.config().unscale(latents)).map_err(VerifyError::product)?;
    report.compare(case, "image", &to_unit(decoded), &want)?;
    Ok(report)
}
