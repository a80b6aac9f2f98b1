//! `finetune run`: a FineTuneJob manifest on this machine, without a cluster.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;

use super::estimate::{self, Estimate};
use super::job::{self, Ended, Place};
use super::{set, stand_ins};
use finetune_api::plan::{self, DeviceRequest, Facts, TrainConfig};
use finetune_api::{FineTuneJob, OutputFormat, Reason};
use finetune_store::{Buckets, Store, StoreOptions};
use finetune_train::device;
use finetune_train::job::Outcome;
use finetune_train::log::LogTail;
use finetune_train::result::RunResult;

/// Arguments of `finetune run`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The manifest: the same file that kubectl apply takes.
    manifest: PathBuf,

    /// A directory that stands in for a bucket, as s3://NAME=DIR. May be repeated.
    #[arg(long, value_name = "URI=DIR")]
    bucket: Vec<String>,

    /// What to compute on. Auto: what the manifest asks for; where there is no GPU, the CPU, if that takes an hour at most.
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,

    /// Which job, where the manifest has several.
    #[arg(long)]
    name: Option<String>,

    /// Changes a field of the spec before anything else, as training.maxSteps=20. May be repeated.
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,

    /// Folder for downloads and prepared data. Default: ~/.cache/finetune.
    #[arg(long, env = "FINETUNE_CACHE_DIR")]
    cache_dir: Option<PathBuf>,

    /// Serve the page of the run, /progress and /metrics here while the job runs, as 127.0.0.1:9400; the page's address is printed.
    #[arg(long)]
    progress_address: Option<SocketAddr>,
}

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum DeviceChoice {
    /// What the manifest asks for; the CPU for a short job where there is no GPU.
    Auto,
    /// This machine's processor.
    Cpu,
    /// The first GPU.
    Cuda,
}

/// Runs the job and returns its exit code.
pub(super) fn run(args: Args, log: LogTail) -> Result<ExitCode> {
    let Args { manifest, bucket, device, name, set, cache_dir, progress_address } = args;
    let prepared = Buckets::parse(&bucket)
        .map_err(|error| job::chain(&error))
        .and_then(|buckets| Ok((buckets, read(&manifest, &set)?)))
        .and_then(|(buckets, jobs)| Ok((buckets, select(jobs, name.as_deref(), &manifest)?)))
        .and_then(|(buckets, job)| Ok((buckets, resolve(&job)?, job)));
    let (buckets, mut config, job) = match prepared {
        Ok(prepared) => prepared,
        Err(message) => return Ok(job::refuse(&message)),
    };
    let cache_dir = job::cache_dir(cache_dir, &config);
    if let Err(message) = stand_ins::check(&config, &buckets) {
        return Ok(job::refuse(&message));
    }
    config.device = match choose(device, config.device, || estimate::on_cpu(&job, &config, &buckets)) {
        Ok(device) => device,
        Err(message) => return Ok(job::fail(Reason::GPUUnavailable, &message)),
    };
    let output = local_output(&config, &buckets);
    let Ended { result, reporter: _ } = job::execute(&config, Place { buckets, cache_dir, time_to_end: None, progress_address, serving, log })?;
    Ok(match result {
        Ok(outcome) => {
            say(&summary(&outcome, &config, output.as_deref()));
            ExitCode::SUCCESS
        }
        Err(error) => job::fail(error.reason(), &job::chain(&error)),
    })
}

/// The jobs of the manifest, validated as the API server does.
fn read(path: &Path, set: &[String]) -> Result<Vec<FineTuneJob>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("failed to read {}: {error}", path.display()))?;
    let text = if set.is_empty() { text } else { set::with_changes(&text, set)? };
    finetune_api::validate::manifest(&text).map_err(|violations| format!("{} cannot be used:\n{violations}", path.display()))
}

fn select(mut jobs: Vec<FineTuneJob>, name: Option<&str>, manifest: &Path) -> Result<FineTuneJob, String> {
    let names: Vec<String> = jobs.iter().filter_map(|j| j.metadata.name.clone()).collect();
    let found = |jobs: &[FineTuneJob], name: &str| jobs.iter().position(|j| j.metadata.name.as_deref() == Some(name));
    match name {
        Some(name) => {
            found(&jobs, name).map(|i| jobs.swap_remove(i)).ok_or_else(|| format!("{} has no job {name:?}, only {}", manifest.display(), names.join(", ")))
        }
        None if jobs.len() > 1 => Err(format!("{} has several jobs: choose one with --name ({})", manifest.display(), names.join(", "))),
        None => jobs.pop().ok_or_else(|| format!("{} has no FineTuneJob", manifest.display())),
    }
}

fn resolve(job: &FineTuneJob) -> Result<TrainConfig, String> {
    let namespace = job.metadata.namespace.as_deref().unwrap_or("default");
    let name = job.metadata.name.as_deref().unwrap_or_default();
    plan::resolve(&job.spec, namespace, name, &Facts::default()).map(|plan| plan.config).map_err(|error| job::chain(&error))
}

/// The device to train on. On the CPU the estimated length of the run is printed before it begins, and a long one must be asked for.
fn choose(choice: DeviceChoice, asked: DeviceRequest, on_cpu: impl FnOnce() -> Estimate) -> Result<DeviceRequest, String> {
    match (choice, asked) {
        (DeviceChoice::Cuda, _) => Ok(DeviceRequest::Gpu),
        (DeviceChoice::Auto, DeviceRequest::Gpu) if device::gpu_is_usable() => Ok(DeviceRequest::Gpu),
        (DeviceChoice::Cpu, _) | (DeviceChoice::Auto, DeviceRequest::Cpu) => {
            notice(&format!("training on the CPU: {}", on_cpu()));
            Ok(DeviceRequest::Cpu)
        }
        (DeviceChoice::Auto, DeviceRequest::Gpu) => {
            let why = if device::has_gpu_code() { "none can be used here" } else { "this build has no GPU code (cargo feature cuda)" };
            let estimate = on_cpu();
            if estimate.is_long() {
                return Err(format!("the job asks for a GPU and {why}; on this machine's CPU: {estimate}. Give --device cpu to train on it all the same"));
            }
            notice(&format!("the job asks for a GPU and {why}: training on the CPU: {estimate}"));
            Ok(DeviceRequest::Cpu)
        }
    }
}

/// The directory that the results go to, where the output is one.
fn local_output(config: &TrainConfig, buckets: &Buckets) -> Option<PathBuf> {
    let options = StoreOptions { buckets: buckets.clone(), ..StoreOptions::default() };
    Store::open(&config.output.uri, &options).ok()?.local_directory()
}

fn summary(outcome: &Outcome, config: &TrainConfig, local: Option<&Path>) -> String {
    let result = &outcome.result;
    let place = local.map_or_else(|| config.output.uri.clone(), |path| format!("{}/", path.display()));
    let mut rows: Vec<(String, String)> = Vec::new();
    let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));
    row("steps", format!("{} ({:.1} epochs of {} pictures)", result.steps, result.epochs, result.samples));
    row("training loss", format!("{:.4} at the end, smoothed ({:.4} at first)", result.loss.smoothed, result.loss.first));
    let RunResult { evaluation, lora, .. } = result;
    let change = -100.0 * evaluation.improvement;
    row("loss, fixed noise", format!("{:.4} -> {:.4} ({change:+.1}%) on {} training pictures", evaluation.start, evaluation.end, evaluation.samples));
    if let Some(comparison) = &result.comparison {
        let (base, lora) = (comparison.base_distance, comparison.lora_distance);
        row("held-out pictures", format!("distance {base:.3} by the base model -> {lora:.3} with the LoRA ({} pictures)", comparison.pictures));
        row("look at", format!("{place}{}", finetune_train::comparison::FILE_NAME));
    }
    row("training time", estimate::duration(result.training_seconds));
    row("LoRA", format!("rank {}, alpha {}, {} modules, {} parameters", lora.rank, lora.alpha, lora.modules, lora.parameters));
    for artifact in &result.artifacts {
        let reader = if artifact.format == OutputFormat::Diffusers { "diffusers" } else { "ComfyUI, kohya" };
        row("file", format!("{} ({:.1} KiB, {reader})", artifact.file, artifact.size_bytes as f64 / 1024.0));
    }
    if result.files.contains_key(finetune_train::page::FILE_NAME) {
        row("open", format!("{place}{}", finetune_train::page::FILE_NAME));
    }
    row("also", "result.json, metrics.jsonl, logs/ (TensorBoard)".to_owned());
    row("in", place.clone());
    if result.artifacts.iter().any(|a| a.format == OutputFormat::Diffusers) {
        row("load it", format!("pipeline.load_lora_weights({place:?})"));
    }
    outcome.notes.iter().for_each(|note| row("warning", note.clone()));
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let head = if outcome.already_completed {
        format!("{} was trained already, on {}: the output holds the result of this very spec and dataset.", config.job, result.completed)
    } else {
        format!("{} is trained.", config.job)
    };
    let lines = rows.iter().map(|(name, value)| format!("  {name:width$}  {value}"));
    std::iter::once(head).chain(lines).collect::<Vec<_>>().join("\n")
}

/// Prints where the run can be watched.
fn serving(address: SocketAddr) {
    notice(&format!("look at the run at http://{address}/"));
}

#[expect(clippy::print_stdout, reason = "the command's result")]
fn say(text: &str) {
    println!("{text}");
}

#[expect(clippy::print_stderr, reason = "a notice that must be seen, whatever the log level")]
fn notice(text: &str) {
    eprintln!("note: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_stands_in_only_where_run_may_choose() {
        let chosen = |choice, asked| choose(choice, asked, || Estimate::of(3600.0 * 24.0));
        assert_eq!(chosen(DeviceChoice::Cpu, DeviceRequest::Gpu), Ok(DeviceRequest::Cpu));
        assert_eq!(chosen(DeviceChoice::Cuda, DeviceRequest::Cpu), Ok(DeviceRequest::Gpu));
        assert_eq!(chosen(DeviceChoice::Auto, DeviceRequest::Cpu), Ok(DeviceRequest::Cpu));
        if !device::gpu_is_usable() {
            let refused = chosen(DeviceChoice::Auto, DeviceRequest::Gpu).unwrap_err();
            assert!(refused.contains("--device cpu") && refused.contains("24 h"), "{refused}");
            assert_eq!(choose(DeviceChoice::Auto, DeviceRequest::Gpu, || Estimate::of(60.0)), Ok(DeviceRequest::Cpu));
        }
    }
}
