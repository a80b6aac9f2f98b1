//! What `finetune train` and `finetune run` share: a run in this process, its progress server and its end.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::USAGE;
use finetune_api::plan::TrainConfig;
use finetune_api::{FailureReport, JOB_UID_VARIABLE, Reason, ReportedArtifact, TrainingResult};
use finetune_store::Buckets;
use finetune_store::claims::{LEASE, Run};
use finetune_train::environment::JobEnvironment;
use finetune_train::error::TrainError;
pub(super) use finetune_train::error::chain;
use finetune_train::interrupt::Interrupt;
use finetune_train::job::Outcome;
use finetune_train::log::LogTail;
use finetune_train::report::Reporter;
use finetune_train::{server, shutdown};

/// Where a run may put things on this machine, and who may watch it.
pub(super) struct Place {
    /// Directories that stand in for buckets.
    pub(super) buckets: Buckets,
    /// Folder for downloads and prepared data.
    pub(super) cache_dir: PathBuf,
    /// How long after a request to stop the run may go on; none: no limit.
    pub(super) time_to_end: Option<Duration>,
    /// Address of the progress server; none: no server.
    pub(super) progress_address: Option<SocketAddr>,
    /// Called with the address in use.
    pub(super) serving: fn(SocketAddr),
    /// The end of this process's log, which goes to the bucket.
    pub(super) log: LogTail,
}

/// How a run ended.
pub(super) struct Ended {
    /// The outcome.
    pub(super) result: Result<Outcome, TrainError>,
    /// What is reported to the operator.
    pub(super) reporter: Reporter,
}

/// Runs a job to its end.
///
/// # Errors
/// If the runtime or the signal handlers cannot be set up.
pub(super) fn execute(config: &TrainConfig, place: Place) -> Result<Ended> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("failed to start the runtime")?;
    let reporter = Reporter::new();
    let interrupt = Interrupt::with_limit(place.time_to_end);
    let environment = JobEnvironment {
        buckets: place.buckets,
        cache_dir: place.cache_dir,
        owner: owner(),
        run_id: run_id(),
        claim_lease: claim_lease(),
        interrupt: interrupt.clone(),
        reporter: reporter.clone(),
        log: place.log,
    };
    let result = runtime.block_on(async {
        interrupt.on_signals().context("failed to listen to signals")?;
        if let Some(address) = place.progress_address {
            match server::serve(address, reporter.clone()).await {
                Ok(address) => {
                    tracing::info!(%address, "serving the page of the run, /progress and /metrics");
                    (place.serving)(address);
                }
                // Nobody can watch, but training is what counts.
                Err(error) => tracing::warn!(%address, %error, "failed to serve the page of the run, /progress and /metrics"),
            }
        }
        anyhow::Ok(Box::pin(shutdown::run(config, &environment)).await)
    })?;
    reporter.finished(training_result(&result), artifacts(config, &result));
    runtime.shutdown_background();
    Ok(Ended { result, reporter })
}

fn training_result(result: &Result<Outcome, TrainError>) -> TrainingResult {
    match result {
        Ok(outcome) => TrainingResult { already_completed: outcome.already_completed, failure: None },
        Err(error) => {
            let (reason, message) = (error.reason(), chain(error));
            TrainingResult { already_completed: false, failure: Some(FailureReport { reason, exit_code: reason.exit_code(), message }) }
        }
    }
}

fn artifacts(config: &TrainConfig, result: &Result<Outcome, TrainError>) -> Vec<ReportedArtifact> {
    let Ok(outcome) = result else { return Vec::new() };
    let report = |a: &finetune_train::result::Artifact| ReportedArtifact {
        format: a.format,
        uri: format!("{}{}", config.output.uri, a.file),
        sha256: a.sha256.clone(),
        size_bytes: a.size_bytes,
    };
    outcome.result.artifacts.iter().map(report).collect()
}

/// Prints the failure and returns its exit code.
#[expect(clippy::print_stderr, reason = "the command's own error report")]
pub(super) fn fail(reason: Reason, message: &str) -> ExitCode {
    let word = if reason.exit_code() == Reason::Interrupted.exit_code() { "stopped" } else { "error" };
    eprintln!("{word}: {message} ({reason}, exit code {})", reason.exit_code());
    ExitCode::from(reason.exit_code())
}

/// Prints a problem with the command line or manifest and returns its exit code.
#[expect(clippy::print_stderr, reason = "the command's own error report")]
pub(super) fn refuse(message: &str) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::from(USAGE)
}

/// The folder for downloads and prepared data: as given, else of the configuration, else the user's cache.
pub(super) fn cache_dir(given: Option<PathBuf>, config: &TrainConfig) -> PathBuf {
    given.or_else(|| config.model.cache_dir.clone()).unwrap_or_else(users_cache)
}

/// The user's cache.
pub(super) fn users_cache() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("finetune")
}

/// Which run this is an attempt of: the FineTuneJob's, which the operator passes to its pods, else one of this process.
fn run_id() -> String {
    std::env::var(JOB_UID_VARIABLE).ok().filter(|uid| !uid.is_empty()).unwrap_or_else(Run::local_id)
}

/// `FINETUNE_CLAIM_LEASE_SECONDS` changes how long another job at the same output may be silent before it is taken for dead.
pub(super) fn claim_lease() -> Duration {
    std::env::var("FINETUNE_CLAIM_LEASE_SECONDS").ok().and_then(|text| text.parse().ok()).map_or(LEASE, Duration::from_secs)
}

/// A name for people to see in claims.
fn owner() -> String {
    let named = ["POD_NAME", "HOSTNAME"].iter().find_map(|name| std::env::var(name).ok()).filter(|n| !n.is_empty());
    let host = named.or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok()).unwrap_or_default();
    format!("{} process {}", host.trim(), std::process::id())
}
