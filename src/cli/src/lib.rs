//! The command line: one file per subcommand. The only place for stdout, `anyhow` and the process's exit code.

#[cfg(feature = "train")]
use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
#[cfg(feature = "train")]
use finetune_train::log::LogTail;
#[cfg(feature = "train")]
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::telemetry::LogFormat;

#[cfg(feature = "train")]
mod bench;
mod convert;
mod crd;
#[cfg(feature = "train")]
mod device;
#[cfg(feature = "train")]
mod estimate;
#[cfg(feature = "train")]
mod gc;
#[cfg(feature = "train")]
mod job;
#[cfg(feature = "train")]
mod model;
#[cfg(feature = "operator")]
mod operator;
mod plan;
#[cfg(feature = "train")]
mod reach;
mod reference;
#[cfg(feature = "train")]
mod run;
#[cfg(feature = "train")]
mod sample;
#[cfg(feature = "train")]
mod set;
#[cfg(feature = "train")]
mod stand_ins;
mod telemetry;
#[cfg(feature = "train")]
mod train;
mod validate;
#[cfg(feature = "train")]
mod verify;

/// Fine-tune Stable Diffusion 3 with LoRA on 16 GB GPUs, on this machine or on Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "finetune", version, propagate_version = true)]
struct Cli {
    /// How log lines (on stderr) look.
    #[arg(long, global = true, value_enum, default_value = "auto", env = "FINETUNE_LOG_FORMAT")]
    log_format: LogFormat,

    #[command(subcommand)]
    command: Command,
}

/// Keep in alphabetical order; each variant's arguments and code are in the file of its name.
#[derive(Debug, Subcommand)]
enum Command {
    /// Measure a training step on this machine's GPU and check its numbers; needs no model.
    #[cfg(feature = "train")]
    Bench(bench::Args),
    /// Turn the article's command line into a FineTuneJob.
    Convert(convert::Args),
    /// Print the CustomResourceDefinition.
    Crd(crd::Args),
    /// List what runs have left behind in a bucket and nobody needs any more; delete it with --delete.
    #[cfg(feature = "train")]
    Gc(gc::Args),
    /// Reconcile FineTuneJobs of a Kubernetes cluster into trainer pods.
    #[cfg(feature = "operator")]
    Operator(Box<operator::Args>),
    /// Show steps, memory per stage and work of a job before anything runs.
    Plan(plan::Args),
    /// Print a generated page of the documentation.
    #[command(hide = true)]
    Reference(reference::Args),
    /// Train a FineTuneJob manifest on this machine, without a cluster.
    #[cfg(feature = "train")]
    Run(run::Args),
    /// Draw pictures with a model, with or without a LoRA.
    #[cfg(feature = "train")]
    Sample(sample::Args),
    /// Train from a resolved configuration: what runs in the pod.
    #[cfg(feature = "train")]
    Train(train::Args),
    /// Check a manifest as the API server and the planner would, and the dataset and model that it names: all problems at once.
    Validate(validate::Args),
    /// Compare this build's numbers with cases of the reference implementation.
    #[cfg(feature = "train")]
    Verify(verify::Args),
}

impl Command {
    /// Whether the logs are a cluster's, whose collectors take JSON lines, rather than a person's.
    fn is_read_by_programs(&self) -> bool {
        match self {
            #[cfg(feature = "operator")]
            Self::Operator(_) => true,
            #[cfg(feature = "train")]
            Self::Train(_) => true,
            _ => false,
        }
    }
}

/// Exit code for a command line or manifest that cannot be used (`EX_USAGE`).
const USAGE: u8 = 64;

/// Runs the command line and returns the process's exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are errors to clap, but not to the caller.
            let code = if error.use_stderr() { USAGE } else { 0 };
            return if error.print().is_ok() { ExitCode::from(code) } else { ExitCode::FAILURE };
        }
    };
    let default_filter = match cli.command {
        Command::Convert(_) | Command::Crd(_) | Command::Plan(_) | Command::Reference(_) | Command::Validate(_) => "warn",
        #[cfg(feature = "operator")]
        Command::Operator(_) => "info",
        #[cfg(feature = "train")]
        Command::Train(_) => "info",
        // On a terminal the progress bar shows it, elsewhere log lines.
        #[cfg(feature = "train")]
        Command::Run(_) if !std::io::stderr().is_terminal() => "info",
        #[cfg(feature = "train")]
        Command::Bench(_) | Command::Gc(_) | Command::Run(_) | Command::Sample(_) | Command::Verify(_) => "warn",
    };
    #[cfg(feature = "train")]
    let log = LogTail::default();
    #[cfg(feature = "train")]
    let kept = matches!(cli.command, Command::Run(_) | Command::Train(_)).then(|| log.clone());
    #[cfg(feature = "train")]
    let kept = kept.map(|log| BoxMakeWriter::new(move || log.clone()));
    #[cfg(not(feature = "train"))]
    let kept = None;
    telemetry::init(cli.log_format, cli.command.is_read_by_programs(), default_filter, kept);
    // A second installation is refused; the first one is the same.
    let _already_installed = rustls::crypto::ring::default_provider().install_default();
    let result = match cli.command {
        #[cfg(feature = "train")]
        Command::Bench(args) => bench::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Crd(args) => crd::run(&args),
        #[cfg(feature = "train")]
        Command::Gc(args) => gc::run(&args),
        #[cfg(feature = "operator")]
        Command::Operator(args) => operator::run(*args),
        Command::Plan(args) => plan::run(&args),
        Command::Reference(args) => reference::run(&args),
        #[cfg(feature = "train")]
        Command::Run(args) => run::run(args, log),
        #[cfg(feature = "train")]
        Command::Sample(args) => sample::run(&args),
        #[cfg(feature = "train")]
        Command::Train(args) => train::run(args, log),
        Command::Validate(args) => validate::run(&args),
        #[cfg(feature = "train")]
        Command::Verify(args) => verify::run(&args),
    };
    result.unwrap_or_else(|error| {
        report(&error);
        ExitCode::FAILURE
    })
}

/// Prints an error and its causes to stderr, each cause once.
#[expect(clippy::print_stderr, reason = "the command line's own error report")]
fn report(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}
