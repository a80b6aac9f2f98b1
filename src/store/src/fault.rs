//! A place to freeze a run at a chosen instant, for tests of fencing (documented in `docs/concepts/checkpoints.md`).
//!
//! `FINETUNE_FAULT=<point>:<path>` makes the run create the file `<path>` when it first reaches the point, and wait until
//! somebody removes it. Points: `before-manifest`, `before-result`. Without the variable nothing happens.

use std::path::Path;
use std::time::Duration;

/// The environment variable.
pub(crate) const VARIABLE: &str = "FINETUNE_FAULT";

/// Waits here if the environment asks for it.
pub async fn pause(point: &str) {
    let Ok(setting) = std::env::var(VARIABLE) else { return };
    let Some(path) = setting.split_once(':').filter(|(at, _)| *at == point).map(|(_, path)| Path::new(path)) else { return };
    if std::fs::OpenOptions::new().write(true).create_new(true).open(path).is_err() {
        return;
    }
    tracing::warn!(point, path = %path.display(), "waiting at a fault point until the file is removed");
    while path.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
