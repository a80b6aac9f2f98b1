//! `finetune operator`: the controller.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;

use finetune_operator::controller::context::FaultHook;
use finetune_operator::controller::lease::Intervals;
use finetune_operator::run::{Election, Options, run as run_operator};
use finetune_operator::settings::{ConfigFile, Settings};
use finetune_operator::telemetry::metrics::Metrics;

/// Arguments of `finetune operator`.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line are independent switches")]
pub(super) struct Args {
    /// Configuration file (YAML): trainer image, storage defaults, node classes.
    #[arg(long, value_name = "FILE", env = "FINETUNE_OPERATOR_CONFIG")]
    config: Option<PathBuf>,

    /// Image of trainers whose job names none; wins over the configuration file.
    #[arg(long, value_name = "IMAGE", env = "FINETUNE_TRAINER_IMAGE")]
    trainer_image: Option<String>,

    /// Namespaces to watch, separated by commas; all where absent.
    #[arg(long, value_name = "NAMESPACES", value_delimiter = ',', env = "FINETUNE_WATCH_NAMESPACES")]
    watch_namespaces: Vec<String>,

    /// FineTuneJobs that are reconciled at the same time.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1000))]
    concurrency: u16,

    /// Where /healthz, /readyz and /metrics are served; "[::]" is every address of both families.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:8080", env = "FINETUNE_OPERATOR_ADDRESS")]
    address: SocketAddr,

    /// Where /metrics is served, if elsewhere.
    #[arg(long, value_name = "ADDRESS")]
    metrics_address: Option<SocketAddr>,

    /// Run only while holding a Lease, so that several replicas can stand by.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", env = "FINETUNE_LEADER_ELECT")]
    leader_elect: bool,

    /// Name of the Lease.
    #[arg(long, value_name = "NAME", default_value = "finetune-operator")]
    lease_name: String,

    /// Namespace of the Lease.
    #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE")]
    lease_namespace: Option<String>,

    /// Name of this process in the Lease and in events; the host name where absent.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    identity: Option<String>,

    /// How long others wait for a holder that renews no more.
    #[arg(long, value_name = "SECONDS", default_value_t = 15)]
    lease_duration: u64,

    /// How long the holder goes on without a successful renewal.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    renew_deadline: u64,

    /// Time between two renewals.
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    retry_period: u64,

    /// Least time between two status writes that bring only progress; trainers are asked twice as often.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    progress_interval: u64,

    /// Watch the labels of nodes, to tell "no node has such a GPU" from "all are busy". Needs list and watch on nodes; off with --watch-namespaces.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    watch_nodes: bool,

    /// Let FineTuneJobs with ttlScope All delete themselves. Under GitOps that means training for ever.
    #[arg(long)]
    allow_ttl_scope_all: bool,

    /// For tests on clusters whose GPUs are imaginary: trainers of GPU jobs use the CPU.
    #[arg(long)]
    allow_cpu_fallback: bool,

    /// For tests: end like killed at this point, such as "after:create_job".
    #[arg(long, hide = true, value_name = "POINT", env = "FINETUNE_OPERATOR_FAULT")]
    fault: Option<String>,
}

/// Runs the operator until SIGTERM or the loss of the lease.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let options = options(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("failed to start the runtime")?;
    let ended = runtime.block_on(async {
        let config = kube::Config::infer().await.context("failed to find a Kubernetes configuration: run in a pod, or set KUBECONFIG")?;
        let stop = termination().context("failed to listen for signals")?;
        run_operator(config, options, Arc::new(Metrics::new()), stop).await.map_err(anyhow::Error::from)
    });
    // Whatever still runs must not write after the lease is lost.
    runtime.shutdown_background();
    ended.map(|()| ExitCode::SUCCESS)
}

fn options(args: Args) -> anyhow::Result<Options> {
    // In full, so that a new flag cannot be forgotten.
    let Args {
        config,
        trainer_image,
        watch_namespaces,
        concurrency,
        address,
        metrics_address,
        leader_elect,
        lease_name,
        lease_namespace,
        identity,
        lease_duration,
        renew_deadline,
        retry_period,
        progress_interval,
        watch_nodes,
        allow_ttl_scope_all,
        allow_cpu_fallback,
        fault,
    } = args;
    let mut file = match &config {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
            finetune_common::yaml::from_str::<ConfigFile>(&text).with_context(|| format!("failed to read the configuration in {}", path.display()))?
        }
        None => ConfigFile::default(),
    };
    if trainer_image.is_some() {
        file.trainer.image = trainer_image;
    }
    let mut settings = Settings::new(file).context("failed to use the configuration")?;
    settings.allow_cpu_fallback = allow_cpu_fallback;
    settings.allow_ttl_scope_all = allow_ttl_scope_all;
    settings.progress_interval = Duration::from_secs(progress_interval);
    let identity = identity.or_else(host_name);
    let election = if leader_elect {
        let namespace = lease_namespace
            .context("no namespace for the Lease: set --lease-namespace or POD_NAMESPACE, or --leader-elect=false where this is the only replica")?;
        let seconds = Duration::from_secs;
        let intervals = Intervals { duration: seconds(lease_duration), renew_deadline: seconds(renew_deadline), retry: seconds(retry_period) };
        let holder = Election::holder(identity.as_deref().unwrap_or("finetune-operator"));
        Some(Election { namespace, name: lease_name, identity: holder, intervals: intervals.checked()? })
    } else {
        None
    };
    let namespaces = watch_namespaces.into_iter().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
    let faults = fault.map_or_else(FaultHook::default, |point| {
        FaultHook::new(move |reached| {
            if reached == point {
                std::process::abort();
            }
            false
        })
    });
    Ok(Options {
        poll_interval: settings.progress_interval / 2,
        settings,
        namespaces,
        concurrency,
        address,
        metrics_address,
        election,
        instance: identity,
        watch_nodes,
        faults,
    })
}

/// Resolves at SIGTERM or SIGINT.
fn termination() -> std::io::Result<impl Future<Output = ()> + Send + 'static> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("asked to end");
    })
}

fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}
