//! Logs: text where a person reads them, JSON lines where a cluster collects them; always on stderr.

use std::io::IsTerminal as _;

use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// Text; JSON for `operator` and `train` when stderr is no terminal.
    Auto,
    /// One line of text per event.
    Text,
    /// One JSON object per event.
    Json,
}

/// What is kept of the log, whatever is shown of it: enough to follow a run, and no details of requests.
const KEPT: &str = "info";

/// Starts logging to stderr; `collected`: where that is no terminal, a program reads it. `RUST_LOG` wins over `default_filter`. `kept` gets lines of text
/// besides. A second call changes nothing.
pub(crate) fn init(format: LogFormat, collected: bool, default_filter: &str, kept: Option<BoxMakeWriter>) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_filter));
    let json = match format {
        LogFormat::Auto => collected && !std::io::stderr().is_terminal(),
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    // Colours are for people: none in files.
    let shown = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let shown = if json { shown.json().flatten_event(true).with_span_list(false).boxed() } else { shown.with_target(false).boxed() };
    let kept = kept.map(|writer| fmt::layer().with_writer(writer).with_ansi(false).with_target(false).with_filter(EnvFilter::new(KEPT)));
    // A second subscriber (in tests) is refused; the first one goes on.
    let _already_started = tracing_subscriber::registry().with(shown.with_filter(filter)).with(kept).try_init();
}
