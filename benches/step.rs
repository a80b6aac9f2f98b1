//! Time of one training step (forward, loss, backward, clipping, AdamW), to compare with `benches/step_pytorch.py`.
//!
//! `cargo bench --bench step -- --model DIR [--steps N] [--batch N] [--size LATENT] [--recompute]`; prints one JSON line.
#![expect(clippy::print_stdout, reason = "a bench reports on stdout")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use finetune_common::rng::{Purpose, Stream};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Engine, WeightFormat};
use finetune_compute::nn::flow_matching::{LossKind, SigmaTable, Weighting, mix};
use finetune_compute::optim::{AdamWSettings, OptimizerSettings};
use finetune_model::Weights;
use finetune_model::learner;
use finetune_model::lora::{LoraLayout, LoraSpec};
use finetune_model::mmdit::{FlowTarget, MmditConfig, MmditInputs};

/// What to measure.
struct Options {
    /// A model folder in diffusers layout.
    model: PathBuf,
    steps: usize,
    batch: usize,
    /// Side of the latents.
    size: usize,
    tokens: usize,
    rank: usize,
    targets: Vec<String>,
    recompute: bool,
}

impl Options {
    fn parse() -> Result<Self> {
        let all = "to_q,to_k,to_v,to_out.0,add_k_proj,add_q_proj,add_v_proj";
        let split = |s: &str| s.split(',').map(str::to_owned).collect();
        let mut options = Self { model: PathBuf::new(), steps: 20, batch: 8, size: 8, tokens: 93, rank: 16, targets: split(all), recompute: false };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
            match arg.as_str() {
                "--model" => options.model = value()?.into(),
                "--steps" => options.steps = value()?.parse()?,
                "--batch" => options.batch = value()?.parse()?,
                "--size" => options.size = value()?.parse()?,
                "--tokens" => options.tokens = value()?.parse()?,
                "--rank" => options.rank = value()?.parse()?,
                "--targets" => options.targets = split(&value()?),
                "--recompute" => options.recompute = true,
                "--bench" => {}
                other => bail!("unknown argument {other}"),
            }
        }
        if options.model.as_os_str().is_empty() {
            bail!("usage: cargo bench --bench step -- --model DIR");
        }
        Ok(options)
    }
}

fn random(stream: &mut Stream, shape: &[usize]) -> Result<HostTensor> {
    let mut values = vec![0.0; shape.iter().product()];
    stream.fill_normal(&mut values);
    Ok(HostTensor::new(values, shape)?)
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let folder = options.model.join("transformer");
    let config = MmditConfig::open(&folder)?;
    let started = Instant::now();
    let spec = LoraSpec { rank: options.rank, alpha: options.rank as f64, dropout: 0.0, target_modules: options.targets.clone() };
    let layout = LoraLayout::new(&spec, &config.linear_sites())?;
    let (params, adamw) = (layout.init(1), OptimizerSettings::AdamW(AdamWSettings::default()));
    let mut learner = learner::load(Arc::new(Weights::open(&folder)?), config.clone(), &Engine::cpu(), WeightFormat::Float, layout, &params, adamw)?;
    learner.set_recompute(&vec![options.recompute; config.num_layers]);
    let load_seconds = started.elapsed().as_secs_f64();

    let table = SigmaTable::default();
    let kind = LossKind { weighting: Weighting::LogitNormal, precondition_outputs: true };
    let mut stream = Stream::new(1, Purpose::Noise, 0, 0);
    let batch = options.batch;
    let latents = [batch, config.in_channels, options.size, options.size];
    let prompt = random(&mut stream, &[batch, options.tokens, config.joint_attention_dim])?;
    let pooled = random(&mut stream, &[batch, config.pooled_projection_dim])?;
    let (mut times, mut last_loss) = (Vec::new(), 0.0);
    for step in 0..options.steps {
        let x0: Vec<f32> = random(&mut stream, &latents)?.into_values();
        let noise: Vec<f32> = random(&mut stream, &latents)?.into_values();
        let started = Instant::now();
        learner.begin()?;
        let indices: Vec<usize> = (0..batch).map(|b| (37 * step + 101 * b) % 1000).collect();
        let sigmas: Vec<f32> = indices.iter().map(|&i| table.sigma(i)).collect();
        let timesteps = HostTensor::vector(indices.iter().map(|&i| table.timestep(i)).collect());
        let x_t = HostTensor::new(mix(&x0, &noise, &sigmas), latents)?;
        let inputs = MmditInputs { x: &x_t, timestep: &timesteps, prompt_embeds: &prompt, pooled: &pooled };
        let target = FlowTarget { kind, x0: &x0, noise: &noise, sigmas: &sigmas, coefficients: &vec![1.0 / batch as f64; batch] };
        learner.accumulate(inputs, None, &target)?;
        last_loss = learner.losses()?.iter().sum::<f64>() / batch as f64;
        learner.clip(1.0)?;
        learner.step(1e-4)?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let first = times.first().copied().unwrap_or_default();
    times.sort_by(f64::total_cmp);
    let report = serde_json::json!({
        "engine": "finetune", "median_ms": times[times.len() / 2], "best_ms": times[0], "first_ms": first, "steps": times.len(),
        "load_s": load_seconds, "loss": last_loss, "threads": rayon::current_num_threads(),
    });
    println!("{report}");
    Ok(())
}
