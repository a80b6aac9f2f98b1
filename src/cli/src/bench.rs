//! `finetune bench`: what this machine's GPU (or CPU) does, without a model.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::device::{DeviceName, PrecisionName, WeightsName};
use finetune_api::FineTuneJobSpec;
use finetune_api::plan::{self, Facts, FrozenWeights, TrainingConfig};
use finetune_compute::kernels::Engine;
use finetune_model::mmdit::MmditConfig;
use finetune_train::bench::{self, Check, Measured, RandomWeights, Workload};
use finetune_train::device;

/// How to print.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
enum OutputFormat {
    /// For people.
    Text,
    /// For programs: one document, to send in.
    Json,
}

/// Arguments of `finetune bench`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Pixels of a side and pictures of a batch. Default: 512/1 512/4 1024/1 1024/4; on the CPU 512/1.
    #[arg(value_name = "SIZE/BATCH")]
    workloads: Vec<Workload>,

    /// The model whose size is measured: sd3-medium, sd3.5-medium or sd3.5-large.
    #[arg(long, default_value = "sd3-medium")]
    model: String,

    /// Where to compute. Default: a GPU where there is one.
    #[arg(long, value_enum)]
    device: Option<DeviceName>,

    /// What the GPU computes in. Default: bf16 where it has that, else fp16.
    #[arg(long, value_enum)]
    precision: Option<PrecisionName>,

    /// How the weights of the transformer's blocks are kept. Default: as numbers where the training then fits, else in 8 bits.
    #[arg(long, value_enum)]
    weights: Option<WeightsName>,

    /// Rank of the LoRA, on the four attention projections of the picture.
    #[arg(long, default_value_t = 4)]
    rank: u32,

    /// Batches that are timed.
    #[arg(long, default_value_t = 20)]
    steps: usize,

    /// Folder for random weights, which take as much room as the model: 4, 5 or 16 GB. Default: the system's for temporary files.
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,

    /// How to print.
    #[arg(short, long, value_enum, default_value = "text")]
    output: OutputFormat,
}

/// Exit code 0 when every number is as it should be and every size was measured.
#[expect(clippy::print_stdout, reason = "the command's result")]
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let config = MmditConfig::published(&args.model).with_context(|| format!("--model {}: give sd3-medium, sd3.5-medium or sd3.5-large", args.model))?;
    let engine = open(args)?;
    let on_gpu = engine.is_cuda();
    let workloads = match &args.workloads[..] {
        [] if on_gpu => ["512/1", "512/4", "1024/1", "1024/4"].iter().map(|text| text.parse()).collect::<Result<Vec<_>, _>>()?,
        [] => vec!["512/1".parse()?],
        given => given.to_vec(),
    };
    let text = args.output == OutputFormat::Text;
    let describe =
        engine.describe().map_or_else(|| "this machine's CPU".to_owned(), |(name, (major, minor))| format!("{name} (compute capability {major}.{minor})"));
    if text {
        println!("{describe}, {}, {}, LoRA of rank {}", engine.precision(), args.model, args.rank);
    }
    let checks = if on_gpu { bench::numerics(&engine, &training(args, Workload { resolution: 64, batch: 1 })?)? } else { Vec::new() };
    if text {
        checks.iter().for_each(|check| println!("{}", line_of(check)));
    }
    let weights = RandomWeights::write(&config, args.work_dir.as_deref()).context("--work-dir names another folder for them")?;
    let (mut rows, mut failed) = (Vec::new(), checks.iter().any(|check| !check.passed));
    for workload in workloads {
        let steps = args.steps.max(1);
        let mut progress = |done| tracing::debug!(%workload, done, steps, "measuring");
        match bench::measure(&config, &weights, &engine, &training(args, workload)?, steps, &mut progress) {
            Ok(measured) => {
                if text {
                    println!("{}", line(&measured));
                }
                rows.push(json!(measured));
            }
            Err(error) => {
                failed = true;
                let error = format!("{:#}", anyhow::Error::from(error));
                if text {
                    println!("{workload}: {error}");
                }
                rows.push(json!({"workload": workload.to_string(), "error": error}));
            }
        }
    }
    if !text {
        let document = json!({
            "version": env!("CARGO_PKG_VERSION"), "device": describe, "model": args.model, "rank": args.rank, "checks": checks, "steps": rows,
        });
        println!("{}", serde_json::to_string_pretty(&document)?);
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn open(args: &Args) -> Result<Engine> {
    let on_gpu = match args.device {
        Some(device) => matches!(device, DeviceName::Cuda),
        None => device::gpu_is_usable(),
    };
    let request = if on_gpu { plan::DeviceRequest::Gpu } else { plan::DeviceRequest::Cpu };
    let precision = match args.precision {
        None => plan::Precision::Auto,
        Some(PrecisionName::Fp32) => plan::Precision::FP32,
        Some(PrecisionName::Fp16) => plan::Precision::FP16,
        Some(PrecisionName::Bf16) => plan::Precision::BF16,
    };
    Ok(device::open(request, precision)?)
}

/// The training of a job with this workload, which is otherwise the article's.
fn training(args: &Args, workload: Workload) -> Result<TrainingConfig> {
    let spec = json!({
        "model": {"source": {"objectStore": {"uri": "s3://random/weights/"}}}, "dataset": {"uri": "s3://random/pictures/"}, "output": {"uri": "s3://nowhere/"},
        "training": {
            "resolution": workload.resolution,
            "batchSize": workload.batch,
            "lora": {"rank": args.rank, "targetModules": ["to_q", "to_k", "to_v", "to_out.0"]},
            "precision": match args.precision { Some(PrecisionName::Fp32) => "FP32", Some(PrecisionName::Fp16) => "FP16", Some(PrecisionName::Bf16) => "BF16", None => "Auto" },
            "weights": match args.weights { Some(WeightsName::Float) => "Float", Some(WeightsName::Int8) => "Int8", None => "Auto" },
        },
        // What fits is decided where it is measured, on this device.
        "scheduling": {"gpu": {"perReplica": 0}},
    });
    let spec: FineTuneJobSpec = serde_json::from_value(spec).context("failed to describe the training")?;
    Ok(plan::resolve(&spec, "bench", "bench", &Facts::default())?.config.training)
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / 1_073_741_824.0
}

fn line(measured: &Measured) -> String {
    let Measured { workload, weights, micro_batch, recomputed_blocks, step_ms, range_ms: [least, most], tflops, .. } = measured;
    let bits = if *weights == FrozenWeights::Int8 { ", weights in 8 bits" } else { "" };
    let card = measured.card_bytes.map_or_else(String::new, |bytes| format!(", card {:.2} GiB", gib(bytes)));
    format!(
        "{workload:>7}: {step_ms:.2} ms ({least:.2} to {most:.2}), {tflops:.1} TFLOP/s; planned {:.2} GiB{card}; {micro_batch} at once, {recomputed_blocks} blocks computed again{bits}",
        gib(measured.planned_bytes)
    )
}

fn line_of(Check { name, error, allowed, passed }: &Check) -> String {
    format!("{name}: error {error:.1e}, allowed {allowed:.1e}: {}", if *passed { "ok" } else { "FAILED" })
}
