//! When a run saves.

use std::time::{Duration, Instant};

use finetune_api::plan::CheckpointConfig;

/// After a checkpoint could not be saved for lack of storage, the next attempt follows after this time.
const RETRY: Duration = Duration::from_secs(30);

/// When the next checkpoint is due.
#[derive(Debug)]
pub struct Due {
    every_steps: Option<u64>,
    every: Option<Duration>,
    next: Option<Instant>,
    retry: Option<Instant>,
}

impl Due {
    /// As the configuration says, from now on.
    pub fn new(config: &CheckpointConfig) -> Self {
        let every = config.every_seconds.map(Duration::from_secs);
        Self { every_steps: config.every_steps, every, next: every.map(|e| Instant::now() + e), retry: None }
    }

    /// Whether to save after update `step`.
    pub fn at(&self, step: u64) -> bool {
        let now = Instant::now();
        match self.retry {
            Some(retry) => now >= retry,
            None => self.every_steps.is_some_and(|n| step.is_multiple_of(n)) || self.next.is_some_and(|next| now >= next),
        }
    }

    /// One was saved.
    pub fn saved(&mut self) {
        self.retry = None;
        self.next = self.every.map(|e| Instant::now() + e);
    }

    /// One could not be saved.
    pub fn failed(&mut self) {
        self.retry = Some(Instant::now() + RETRY);
    }
}
