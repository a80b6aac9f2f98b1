//! `train` cases: steps of flow matching with LoRA, tensor by tensor.

use std::sync::Arc;

use serde::Deserialize;

use super::{Case, Report, Tensors, VerifyError};
use crate::step::coefficients;
use finetune_api::plan::rank_stabilised;
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Engine, WeightFormat};
use finetune_compute::nn::flow_matching::{LossKind, SigmaTable, Weighting, mix};
use finetune_compute::optim::{AdamWSettings, OptimizerSettings, Param};
use finetune_model::Weights;
use finetune_model::learner;
use finetune_model::lora::{LoraLayout, LoraSpec, LoraState, Scaling};
use finetune_model::mmdit::{FlowTarget, MmditConfig, MmditInputs};

#[derive(Deserialize)]
struct LoraSettings {
    rank: u32,
    alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    target_modules: Vec<String>,
}

#[derive(Deserialize)]
struct CaseOptimizer {
    name: String,
    learning_rate: f64,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
}

/// Runs the case with the object that trains: the MMDiT's forward, the flow-matching loss and backward, clipping, the optimizer.
///
/// # Errors
/// If the case is malformed or the product's code fails on it.
pub fn run(case: &Case, engine: &Engine) -> Result<Report, VerifyError> {
    let (inputs, expected) = (case.inputs()?, case.expected()?);
    let lora: LoraSettings = case.setting("lora")?;
    let settings: CaseOptimizer = case.setting("optimizer")?;
    let weighting: String = case.setting("weighting_scheme")?;
    let weighting: Weighting = weighting.parse().map_err(VerifyError::product)?;
    let kind = LossKind { weighting, precondition_outputs: case.setting("precondition_outputs")? };
    let accumulation: usize = case.setting("gradient_accumulation_steps")?;
    let steps: usize = case.setting("optimizer_steps")?;
    let prior: Option<f64> = case.setting("prior_loss_weight")?;
    let max_grad_norm: f64 = case.setting("max_grad_norm")?;

    let folder = case.model_dir().join("transformer");
    let weights = Weights::open(&folder).map_err(VerifyError::product)?;
    let config = MmditConfig::open(&folder).map_err(VerifyError::product)?;
    let format = match case.setting::<Option<String>>("weights")?.as_deref() {
        None => WeightFormat::Float,
        Some("int8") => WeightFormat::Int8,
        Some(_) => return Err(VerifyError::Setting { key: "weights".into() }),
    };
    let alpha = if lora.use_rslora { rank_stabilised(lora.alpha, lora.rank) } else { lora.alpha };
    let spec = LoraSpec { rank: lora.rank as usize, alpha, dropout: 0.0, target_modules: lora.target_modules };
    let layout = LoraLayout::new(&spec, &config.linear_sites()).map_err(VerifyError::product)?;
    let params = parameters(&inputs, &layout.parameters())?;
    // What the file names must be exactly what the targets mean.
    let state = LoraState { tensors: given(&inputs)?, scaling: Scaling { alpha: Some(lora.alpha), rank_stabilised: lora.use_rslora, ..Scaling::default() } };
    let (resolved, _) = state.resolve(&config.linear_sites()).map_err(VerifyError::product)?;
    if resolved.modules != layout.modules {
        return Err(VerifyError::Setting { key: "lora.target_modules".into() });
    }

    let adamw = AdamWSettings { beta1: settings.betas.0, beta2: settings.betas.1, epsilon: settings.epsilon, weight_decay: settings.weight_decay };
    let optimizer = match settings.name.as_str() {
        "adamw" => OptimizerSettings::AdamW(adamw),
        "adamw8bit" => OptimizerSettings::AdamW8bit(adamw),
        _ => return Err(VerifyError::Setting { key: "optimizer.name".into() }),
    };
    let mut learner = learner::load(Arc::new(weights), config, engine, format, layout, &params, optimizer).map_err(VerifyError::product)?;

    let table = SigmaTable::default();
    let mut report = Report::default();
    for s in 0..steps {
        learner.begin().map_err(VerifyError::product)?;
        for m in 0..accumulation {
            let input = |name: &str| inputs.f32(&format!("{name}.{s}.{m}"));
            let indices: Vec<i64> = inputs.get(&format!("sigma_index.{s}.{m}"))?.to_vec1()?;
            let sigmas: Vec<f32> = indices.iter().map(|&i| table.sigma(i as usize)).collect();
            let timesteps: Vec<f32> = indices.iter().map(|&i| table.timestep(i as usize)).collect();
            let (x0, noise) = (input("x0")?, input("noise")?.into_values());
            let batch = sigmas.len();
            let x_t = HostTensor::new(mix(x0.values(), &noise, &sigmas), x0.shape())?;
            let timesteps = HostTensor::vector(timesteps);
            let (prompt_embeds, pooled) = (input("prompt_embeds")?, input("pooled")?);
            let model_inputs = MmditInputs { x: &x_t, timestep: &timesteps, prompt_embeds: &prompt_embeds, pooled: &pooled };
            let velocity = learner.predict(model_inputs).map_err(VerifyError::product)?;
            // With prior preservation the second half of the batch are class pictures.
            let samples = if prior.is_some() { batch / 2 } else { batch };
            let coefficients = coefficients(samples, 1.0 / (samples * accumulation) as f64, prior);
            let target = FlowTarget { kind, x0: x0.values(), noise: &noise, sigmas: &sigmas, coefficients: &coefficients };
            learner.accumulate(model_inputs, None, &target).map_err(VerifyError::product)?;
            let losses = learner.losses().map_err(VerifyError::product)?;
            report.compare(case, &format!("velocity.{s}.{m}"), &velocity, &expected)?;
            let objective: f64 = losses.iter().zip(&coefficients).map(|(loss, coefficient)| loss * coefficient * accumulation as f64).sum();
            report.compare(case, &format!("loss.{s}.{m}"), &HostTensor::vector(vec![objective as f32]), &expected)?;
        }
        for (param, gradient) in params.iter().zip(learner.gradients().map_err(VerifyError::product)?) {
            let gradient = HostTensor::new(gradient, param.shape.as_slice())?;
            report.compare(case, &format!("grad.{s}.{}", param.name), &gradient, &expected)?;
        }
        let norm = learner.clip(max_grad_norm).map_err(VerifyError::product)?;
        report.compare(case, &format!("grad_norm.{s}"), &HostTensor::vector(vec![norm as f32]), &expected)?;
        learner.step(settings.learning_rate).map_err(VerifyError::product)?;
        for param in learner.params().map_err(VerifyError::product)? {
            let value = HostTensor::new(param.value, param.shape.as_slice())?;
            report.compare(case, &format!("lora.{s}.{}", param.name), &value, &expected)?;
        }
    }
    Ok(report)
}

const INPUT_PREFIX: &str = "lora.";

/// The LoRA of the inputs, by key.
fn given(inputs: &Tensors) -> Result<std::collections::BTreeMap<String, Param>, VerifyError> {
    let names = inputs.names().filter_map(|n| n.strip_prefix(INPUT_PREFIX)).map(str::to_owned);
    names.map(|name| Ok((name.clone(), parameter(inputs, &name)?))).collect()
}

fn parameter(inputs: &Tensors, name: &str) -> Result<Param, VerifyError> {
    let tensor = inputs.f32(&format!("{INPUT_PREFIX}{name}"))?;
    Ok(Param { name: name.to_owned(), shape: tensor.shape().to_vec(), value: tensor.into_values() })
}

fn parameters(inputs: &Tensors, wanted: &[(String, Vec<usize>)]) -> Result<Vec<Param>, VerifyError> {
    wanted.iter().map(|(name, _)| parameter(inputs, name)).collect()
}
