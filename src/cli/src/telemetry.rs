//! Logs: text where a person reads them, JSON lines where a cluster collects them; always on stderr.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;
use tracing_subscriber::util::SubscriberInitExt as _;

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

/// Starts logging to stderr; `collected`: where that is no terminal, a program reads it. `RUST_LOG` wins over `default_filter`. A second
/// call changes nothing.
pub(crate) fn init(format: LogFormat, collected: bool, default_filter: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_filter));
    let json = match format {
        LogFormat::Auto => collected && !std::io::stderr().is_terminal(),
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    // Colours are for people: none in files.
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    // A second subscriber (in tests) is refused; the first one goes on.
    let _already_started =
        if json { builder.json().flatten_event(true).with_span_list(false).finish().try_init() } else { builder.with_target(false).finish().try_init() };
}
