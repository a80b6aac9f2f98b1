//! SIGTERM, SIGHUP and SIGINT: asks a run to stop at the next safe place.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Exit code of a process that SIGINT has ended, as shells report it.
const ENDED_BY_SIGINT: i32 = 130;

/// A request to stop, shared by whoever asks and whoever obeys.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    requested: AtomicBool,
    notify: Notify,
    /// How long after the request the run may go on; for ever where there is no limit.
    limit: Option<Duration>,
    requested_at: OnceLock<Instant>,
}

impl Interrupt {
    /// A request after which the run may go on for `limit`.
    pub fn with_limit(limit: Option<Duration>) -> Self {
        Self { inner: Arc::new(Inner { limit, ..Inner::default() }) }
    }

    /// Whether the time after the request is limited, so that what fails can be tried until it is over.
    pub fn has_limit(&self) -> bool {
        self.inner.limit.is_some()
    }

    /// Waits until somebody asks to stop and the time after that is over.
    pub async fn out_of_time(&self) {
        self.wait().await;
        match (self.inner.limit, self.inner.requested_at.get()) {
            (Some(limit), Some(at)) => tokio::time::sleep_until(*at + limit).await,
            _ => std::future::pending().await,
        }
    }

    /// Asks to stop. A second request changes nothing.
    pub fn request(&self) {
        self.inner.requested_at.get_or_init(Instant::now);
        self.inner.requested.store(true, Ordering::SeqCst);
        self.inner.notify.notify_waiters();
    }

    /// Whether somebody has asked to stop.
    pub fn requested(&self) -> bool {
        self.inner.requested.load(Ordering::SeqCst)
    }

    /// Waits until somebody asks to stop.
    pub async fn wait(&self) {
        loop {
            let notified = self.inner.notify.notified();
            if self.requested() {
                return;
            }
            notified.await;
        }
    }

    /// Lets SIGTERM, SIGHUP (a closed terminal) and SIGINT ask to stop. A second SIGINT ends the process at once: who presses
    /// Ctrl-C twice does not want to wait. Must be called within a runtime.
    ///
    /// # Errors
    /// If the system refuses the handlers.
    pub fn on_signals(&self) -> std::io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        // nohup lets a run outlive its terminal by having SIGHUP ignored: a handler would undo that.
        let mut hangup = if is_hangup_ignored() { None } else { Some(signal(SignalKind::hangup())?) };
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = self.clone();
        tokio::spawn(async move {
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    () = next(&mut hangup) => "SIGHUP",
                    _ = interrupt.recv() => "SIGINT",
                };
                if name == "SIGINT" && stop.requested() {
                    end_at_once();
                }
                if !stop.requested() {
                    tracing::warn!(signal = name, "stopping at the next safe place; the run can be resumed");
                }
                stop.request();
            }
        });
        Ok(())
    }
}

/// The next signal of a stream; never where there is none.
async fn next(signals: &mut Option<Signal>) {
    match signals {
        Some(signals) => drop(signals.recv().await),
        None => std::future::pending().await,
    }
}

/// Whether the process was started with SIGHUP ignored.
fn is_hangup_ignored() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| ignores_hangup(&status))
}

/// Bit 0 of the mask is signal 1, SIGHUP.
fn ignores_hangup(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}

#[expect(clippy::exit, clippy::disallowed_methods, reason = "a pass at work cannot be cancelled, and nobody wants to wait for its end any longer")]
fn end_at_once() -> ! {
    tracing::warn!("ended by a second SIGINT; what came after the last checkpoint is lost");
    std::process::exit(ENDED_BY_SIGINT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nohup_is_recognised() {
        assert!(ignores_hangup("Name:\tfinetune\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\n"));
        assert!(!ignores_hangup("Name:\tfinetune\nSigIgn:\t0000000000001000\n"));
        assert!(!ignores_hangup(""));
    }

    #[tokio::test]
    async fn the_time_after_a_request_is_limited_by_its_first() {
        let limit = Duration::from_millis(200);
        let interrupt = Interrupt::with_limit(Some(limit));
        let begin = Instant::now();
        interrupt.request();
        tokio::time::sleep(limit / 2).await;
        interrupt.request();
        interrupt.out_of_time().await;
        assert!((limit..limit * 3 / 2).contains(&begin.elapsed()), "{:?}", begin.elapsed());
        let free = Interrupt::default();
        free.request();
        assert!(tokio::time::timeout(limit, free.out_of_time()).await.is_err());
    }

    #[tokio::test]
    async fn waiting_ends_with_the_request_even_if_it_came_first() {
        let interrupt = Interrupt::default();
        let waiter = tokio::spawn({
            let interrupt = interrupt.clone();
            async move { interrupt.wait().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        interrupt.request();
        waiter.await.unwrap();
        interrupt.wait().await;
        assert!(interrupt.requested());
    }
}
