//! `finetune train`: the job itself, as the operator starts it in a pod.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use super::job::{self, Ended, Place};
use finetune_api::plan::{DeviceRequest, TrainConfig};
use finetune_api::{FailureReport, Reason, TrainingResult};
use finetune_common::yaml;
use finetune_store::Buckets;
use finetune_train::device;
use finetune_train::log::LogTail;
use finetune_train::report::Reporter;
use finetune_train::shutdown;

/// Where Kubernetes expects a container's last words.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// Arguments of `finetune train`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The resolved configuration (YAML or JSON), as `finetune plan` prints it and the operator writes it.
    #[arg(long)]
    config: PathBuf,

    /// A directory that stands in for a bucket, as s3://NAME=DIR. May be repeated.
    #[arg(long, value_name = "URI=DIR")]
    bucket: Vec<String>,

    /// Folder for downloads and prepared data. Default: the configuration's, else ~/.cache/finetune.
    #[arg(long, env = "FINETUNE_CACHE_DIR")]
    cache_dir: Option<PathBuf>,

    /// Address of the progress server; "[::]" is every address of both families.
    #[arg(long, env = "FINETUNE_PROGRESS_ADDRESS", default_value = "[::]:9400")]
    progress_address: SocketAddr,

    /// File for the termination message. Default: /dev/termination-log, where it exists.
    #[arg(long, env = "FINETUNE_TERMINATION_LOG")]
    termination_log: Option<PathBuf>,

    /// Seconds between SIGTERM and SIGKILL, the pod's terminationGracePeriodSeconds: the last checkpoint is tried until shortly before. Default: no limit.
    #[arg(long, env = "FINETUNE_TERMINATION_GRACE_SECONDS")]
    termination_grace_seconds: Option<u64>,

    /// For tests on clusters whose GPUs are imaginary: train on the CPU where the job asks for a GPU and none can be used.
    #[arg(long, env = "FINETUNE_ALLOW_CPU_FALLBACK")]
    allow_cpu_fallback: bool,
}

/// Runs the job and returns its exit code.
pub(super) fn run(args: Args, log: LogTail) -> Result<ExitCode> {
    let buckets = match Buckets::parse(&args.bucket) {
        Ok(buckets) => buckets,
        Err(error) => return Ok(job::refuse(&job::chain(&error))),
    };
    let config = match read(&args.config) {
        Ok(config) => with_fallback(config, args.allow_cpu_fallback),
        Err(message) => {
            // The operator reads it there.
            let reporter = Reporter::new();
            let failure = FailureReport { reason: Reason::InvalidConfig, exit_code: Reason::InvalidConfig.exit_code(), message: message.clone() };
            reporter.finished(TrainingResult { already_completed: false, failure: Some(failure) }, Vec::new());
            write_termination_message(args.termination_log, &reporter);
            return Ok(job::fail(Reason::InvalidConfig, &message));
        }
    };
    let cache_dir = job::cache_dir(args.cache_dir, &config);
    let time_to_end = args.termination_grace_seconds.map(|seconds| shutdown::time_to_end(Duration::from_secs(seconds)));
    let Ended { result, reporter } =
        job::execute(&config, Place { buckets, cache_dir, time_to_end, progress_address: Some(args.progress_address), serving: |_| {}, log })?;
    write_termination_message(args.termination_log, &reporter);
    Ok(match result {
        Ok(outcome) => {
            tracing::info!(attempt = outcome.result.attempt, output = config.output.uri, "done");
            ExitCode::SUCCESS
        }
        Err(error) => job::fail(error.reason(), &job::chain(&error)),
    })
}

fn read(path: &Path) -> Result<TrainConfig, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("failed to read the configuration {}: {error}", path.display()))?;
    parse(&text).map_err(|error| format!("failed to understand the configuration {}: {error}", path.display()))
}

/// YAML or JSON. By way of JSON's data model: the YAML library wants `!Tag` for the enums that JSON writes as maps with one key.
fn parse(text: &str) -> Result<TrainConfig, String> {
    let value: serde_json::Value = yaml::from_str(text).map_err(|error| job::chain(&error))?;
    let (config, unknown) = TrainConfig::read(&value).map_err(|error| error.to_string())?;
    if !unknown.is_empty() {
        tracing::warn!(
            fields = unknown.join(", "),
            "the configuration has fields that this trainer does not know; a newer operator has made it. They are left out"
        );
    }
    Ok(config)
}

/// The configuration, with the CPU in place of a GPU that cannot be used, where that is allowed.
fn with_fallback(mut config: TrainConfig, allowed: bool) -> TrainConfig {
    if allowed && config.device == DeviceRequest::Gpu && !device::gpu_is_usable() {
        tracing::warn!("no GPU can be used: training on the CPU, as --allow-cpu-fallback says");
        config.device = DeviceRequest::Cpu;
    }
    config
}

fn write_termination_message(path: Option<PathBuf>, reporter: &Reporter) {
    let Some(path) = path.or_else(|| Some(PathBuf::from(TERMINATION_LOG)).filter(|path| path.exists())) else { return };
    let text = reporter.progress().to_termination_message().map_err(std::io::Error::other);
    if let Err(error) = text.and_then(|text| std::fs::write(&path, text)) {
        tracing::warn!(path = %path.display(), %error, "failed to write the termination message");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_api::FineTuneJob;
    use finetune_api::plan::{self, Facts};

    #[test]
    fn the_configuration_that_the_operator_writes_is_understood_as_json_and_as_yaml() {
        let job: FineTuneJob = serde_json::from_value(serde_json::json!({
            "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "corgi"},
            "spec": {
                "model": {"source": {"objectStore": {"uri": "s3://models/sd3/"}}},
                "dataset": {"uri": "s3://bucket/data/"},
                "output": {"uri": "s3://bucket/loras/"},
            },
        }))
        .unwrap();
        let config = plan::resolve(&job.spec, "team-a", "corgi", &Facts::default()).unwrap().config;
        assert_eq!(parse(&serde_json::to_string(&config).unwrap()).unwrap(), config);
        let value = serde_json::to_value(&config).unwrap();
        assert_eq!(parse(&yaml::to_string(&value).unwrap()).unwrap(), config);
    }
}
