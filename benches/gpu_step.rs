//! Time and memory of one micro-step (forward, loss, backward, gradients added to those of the update) of Stable Diffusion 3 or 3.5 on a GPU, with random weights.
//!
//! `cargo bench --features cuda --bench gpu_step -- [--model sd3-medium] [--int8] [--precision bf16] [--steps 20] [--profile] [--layers 24]
//! [--recompute BLOCKS] [--cap GIB] [--rank 4] [--optimizer] SIZE/BATCH...`
//! with sizes in pixels, as 512/4; prints one JSON line per shape. `--profile` adds the time by kind of kernel, `--optimizer`
//! one update (sums, clipping, AdamW, the model's new factors) on the GPU and on the host.
#![expect(clippy::print_stdout, reason = "a bench reports on stdout")]

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use finetune_common::rng::{Purpose, Stream};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Cpu, Cuda, Device as _, Precision, WeightFormat, flat_offsets};
use finetune_compute::nn::flow_matching::{LossKind, SigmaTable, Weighting, mix};
use finetune_compute::optim::{AdamWSettings, OptimizerSettings, Param, Parameters};
use finetune_model::Weights;
use finetune_model::lora::LoraSpec;
use finetune_model::mmdit::{FlowTarget, Mmdit, MmditConfig, MmditInputs};
use finetune_model::random::write_transformer;

fn random(stream: &mut Stream, shape: &[usize]) -> Result<HostTensor> {
    let mut values = vec![0.0; shape.iter().product()];
    stream.fill_normal(&mut values);
    Ok(HostTensor::new(values, shape)?)
}

struct Options {
    precision: Precision,
    steps: usize,
    model: String,
    /// The blocks' weights in 8 bits.
    format: WeightFormat,
    layers: Option<usize>,
    rank: usize,
    /// Blocks that are computed again in the backward pass.
    recompute: usize,
    /// Most GiB for buffers; the forward pass alone is then not timed.
    cap: Option<f64>,
    profile: bool,
    optimizer: bool,
    /// (pixels, batch)
    shapes: Vec<(usize, usize)>,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            precision: Precision::Bf16,
            steps: 20,
            model: "sd3-medium".to_owned(),
            format: WeightFormat::Float,
            layers: None,
            rank: 4,
            recompute: 0,
            cap: None,
            profile: false,
            optimizer: false,
            shapes: Vec::new(),
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
            match arg.as_str() {
                "--precision" => options.precision = value()?.parse()?,
                "--steps" => options.steps = value()?.parse()?,
                "--model" => options.model = value()?,
                "--int8" => options.format = WeightFormat::Int8,
                "--layers" => options.layers = Some(value()?.parse()?),
                "--rank" => options.rank = value()?.parse()?,
                "--recompute" => options.recompute = value()?.parse()?,
                "--cap" => options.cap = Some(value()?.parse()?),
                "--profile" => options.profile = true,
                "--optimizer" => options.optimizer = true,
                "--bench" => {}
                shape => {
                    let (pixels, batch) = shape.split_once('/').with_context(|| format!("{shape} is not a shape such as 512/4"))?;
                    options.shapes.push((pixels.parse()?, batch.parse()?));
                }
            }
        }
        Ok(options)
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let published = MmditConfig::published(&options.model).with_context(|| format!("{} is no published model, such as sd3-medium", options.model))?;
    let config = MmditConfig { num_layers: options.layers.unwrap_or(published.num_layers), ..published };
    let folder = tempfile::tempdir()?;
    let started = Instant::now();
    write_transformer(&config, folder.path())?;
    println!("weights written in {:.1} s", started.elapsed().as_secs_f64());
    let started = Instant::now();
    let gpu = Cuda::open(0, options.precision)?;
    println!("{:?} opened in {:.2} s, free and total memory {:?}", gpu.describe(), started.elapsed().as_secs_f64(), gpu.device_memory());
    let started = Instant::now();
    let mut model = Mmdit::load_as(Arc::new(Weights::open(folder.path())?), config.clone(), &gpu, options.format)?;
    let targets = ["to_q", "to_k", "to_v", "to_out.0"].map(str::to_owned).to_vec();
    let spec = LoraSpec { rank: options.rank, alpha: options.rank as f64, dropout: 0.0, target_modules: targets };
    let mut params = model.attach_lora(&spec)?.init(1);
    for param in params.iter_mut().filter(|p| p.name.contains("lora_B")) {
        Stream::new(2, Purpose::Noise, 0, 0).fill_normal(&mut param.value);
        param.value.iter_mut().for_each(|v| *v *= 0.01);
    }
    model.set_lora(&params)?;
    model.set_recompute(&vec![true; options.recompute]);
    if let Some(cap) = options.cap {
        gpu.set_memory_cap((cap * f64::powi(1024.0, 3)) as usize);
    }
    gpu.synchronize();
    println!(
        "model loaded in {:.2} s, {} LoRA parameters, free memory {:?}",
        started.elapsed().as_secs_f64(),
        params.iter().map(|p| p.value.len()).sum::<usize>(),
        gpu.device_memory()
    );
    for &(pixels, batch) in &options.shapes {
        shape(&options, &gpu, &model, &config, &params, pixels, batch)?;
    }
    if options.optimizer {
        update(&gpu, &mut model, &params)?;
    }
    Ok(())
}

/// Milliseconds of the median of ten.
fn timed(gpu: &Cuda, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..12 {
        gpu.synchronize();
        let started = Instant::now();
        run()?;
        gpu.synchronize();
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(times.split_off(2)))
}

/// One update from a micro-batch's gradients on the GPU to the model's new factors.
fn update(gpu: &Cuda, model: &mut Mmdit<Cuda>, params: &[Param]) -> Result<()> {
    let starts = flat_offsets(params.iter().map(|p| p.value.len()));
    let mut values = vec![0.0; starts[params.len()]];
    Stream::new(3, Purpose::Noise, 0, 0).fill_normal(&mut values);
    let gradients = gpu.upload_f32(&values);
    let settings = AdamWSettings::default();
    let report = |what: &str, ms: f64| {
        println!("{}", serde_json::json!({"what": "optimizer", "engine": "finetune", "mode": what, "parameters": values.len(), "ms": ms}));
    };
    for (name, optimizer) in [("adamw", OptimizerSettings::AdamW(settings)), ("adamw8bit", OptimizerSettings::AdamW8bit(settings))] {
        let mut parameters = Parameters::new(gpu, optimizer, params);
        let ms = timed(gpu, || {
            parameters.begin();
            gpu.add_scaled(parameters.sums(), &gradients, 1.0);
            parameters.clip(1.0);
            parameters.step(1e-4);
            model.set_lora_from(parameters.values());
            Ok(())
        })?;
        report(name, ms);
    }
    let cpu = Cpu::default();
    let mut parameters = Parameters::new(&cpu, OptimizerSettings::AdamW(settings), params);
    let ms = timed(gpu, || {
        parameters.begin();
        let all = cpu.upload(&gpu.download(&gradients));
        cpu.add_scaled(parameters.sums(), &all, 1.0);
        parameters.clip(1.0);
        parameters.step(1e-4);
        model.set_lora(&parameters.params())?;
        Ok(())
    })?;
    report("adamw on the host", ms);
    Ok(())
}

fn shape(options: &Options, gpu: &Cuda, model: &Mmdit<Cuda>, config: &MmditConfig, params: &[Param], pixels: usize, batch: usize) -> Result<()> {
    let mut sums = gpu.zeros_f32(flat_offsets(params.iter().map(|p| p.value.len()))[params.len()]);
    let mut stream = Stream::new(1, Purpose::Noise, 0, 0);
    let latents = [batch, config.in_channels, pixels / 8, pixels / 8];
    let prompt = random(&mut stream, &[batch, 154, config.joint_attention_dim])?;
    let pooled = random(&mut stream, &[batch, config.pooled_projection_dim])?;
    let x0: Vec<f32> = random(&mut stream, &latents)?.into_values();
    let noise: Vec<f32> = random(&mut stream, &latents)?.into_values();
    let table = SigmaTable::default();
    let kind = LossKind { weighting: Weighting::LogitNormal, precondition_outputs: true };
    let (mut steps, mut forwards, mut last) = (Vec::new(), Vec::new(), 0.0);
    let mut profile = Vec::new();
    for step in 0..options.steps + 3 {
        let indices: Vec<usize> = (0..batch).map(|b| (37 * step + 101 * b) % 1000).collect();
        let sigmas: Vec<f32> = indices.iter().map(|&i| table.sigma(i)).collect();
        let timesteps = HostTensor::vector(indices.iter().map(|&i| table.timestep(i)).collect());
        let x_t = HostTensor::new(mix(&x0, &noise, &sigmas), latents)?;
        gpu.synchronize();
        let last_step = options.profile && step == options.steps + 2;
        if last_step {
            gpu.start_profile();
        }
        let started = Instant::now();
        let target = FlowTarget { kind, x0: &x0, noise: &noise, sigmas: &sigmas, coefficients: &vec![1.0 / batch as f64; batch] };
        let losses = model.flow_step_into(MmditInputs { x: &x_t, timestep: &timesteps, prompt_embeds: &prompt, pooled: &pooled }, None, &target, &mut sums)?;
        gpu.synchronize();
        let whole = started.elapsed().as_secs_f64() * 1e3;
        if last_step {
            profile = gpu.end_profile();
        }
        last = losses.receive(gpu).iter().sum::<f64>() / batch as f64;
        let started = Instant::now();
        if options.cap.is_none() {
            model.forward_only(&x_t, &timesteps, &prompt, &pooled, 1.0, &[])?;
        }
        let forward = started.elapsed().as_secs_f64() * 1e3;
        if !last_step && step >= 3 {
            steps.push(whole);
            forwards.push(forward);
        }
    }
    let (free, total) = gpu.device_memory().unwrap_or_default();
    let report = serde_json::json!({
        "shape": format!("{pixels}/{batch}"), "precision": options.precision.to_string(), "recompute": options.recompute,
        "step_ms": median(steps), "forward_only_ms": median(forwards), "loss": last,
        "pool_peak_gib": gpu.peak_memory() as f64 / f64::powi(1024.0, 3), "card_used_gib": (total - free) as f64 / f64::powi(1024.0, 3),
    });
    println!("{report}");
    let sum: f64 = profile.iter().map(|(_, _, ms)| ms).sum();
    for (name, count, ms) in &profile {
        println!("  {ms:8.3} ms {:5.1} % {count:5} x {:8.1} us  {name}", 100.0 * ms / sum, 1e3 * ms / *count as f64);
    }
    Ok(())
}
