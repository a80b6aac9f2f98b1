//! `finetune train`: the job itself, as the operator starts it in a pod.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;

use super::job::{self, Ended, Place};
use crate::api::Reason;
use crate::plan::TrainConfig;
use crate::store::Buckets;
use crate::train::report::Reporter;
use crate::yaml;

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

    /// Address of the progress server.
    #[arg(long, env = "FINETUNE_PROGRESS_ADDRESS", default_value = "0.0.0.0:9400")]
    progress_address: SocketAddr,

    /// File for the termination message. Default: /dev/termination-log, where it exists.
    #[arg(long, env = "FINETUNE_TERMINATION_LOG")]
    termination_log: Option<PathBuf>,
}

/// Runs the job and returns its exit code.
pub(super) fn run(args: Args) -> Result<ExitCode> {
    let buckets = match Buckets::parse(&args.bucket) {
        Ok(buckets) => buckets,
        Err(error) => return Ok(job::refuse(&job::chain(&error))),
    };
    let config = match read(&args.config) {
        Ok(config) => config,
        Err(message) => return Ok(job::fail(Reason::InvalidConfig, &message)),
    };
    let cache_dir = job::cache_dir(args.cache_dir, &config);
    let Ended { result, reporter } = job::execute(&config, Place { buckets, cache_dir, progress_address: Some(args.progress_address) })?;
    let log = args.termination_log.or_else(|| Some(PathBuf::from(TERMINATION_LOG)).filter(|p| p.exists()));
    if let Some(log) = log {
        write_termination_message(&log, &reporter);
    }
    Ok(match result {
        Ok(outcome) => {
            tracing::info!(attempt = outcome.result().attempt, output = config.output.uri, "done");
            ExitCode::SUCCESS
        }
        Err(error) => job::fail(error.reason(), &job::chain(&error)),
    })
}

fn read(path: &Path) -> Result<TrainConfig, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("failed to read the configuration {}: {error}", path.display()))?;
    let failed = |error: &dyn std::error::Error| format!("failed to understand the configuration {}: {}", path.display(), job::chain(error));
    // Through JSON, whose way to write a choice (an object with one key) is the usual one in YAML files too.
    let mut documents = yaml::documents(&text).map_err(|error| failed(&error))?;
    match (documents.pop(), documents.is_empty()) {
        (Some(document), true) => serde_json::from_value(document).map_err(|error| failed(&error)),
        _ => Err(format!("the configuration {} must be one document", path.display())),
    }
}

fn write_termination_message(path: &Path, reporter: &Reporter) {
    let text = reporter.progress().to_termination_message().map_err(std::io::Error::other);
    if let Err(error) = text.and_then(|text| std::fs::write(path, text)) {
        tracing::warn!(path = %path.display(), %error, "failed to write the termination message");
    }
}
