//! How often and how long a request is tried again.

use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, Instant};

/// Bounds of retrying one request. Waiting grows from `first_delay` to `max_delay`, each wait drawn from its upper half.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Retries after the first attempt.
    pub max_retries: u32,
    /// No attempt starts, and none goes on, after this time from the first one.
    pub total: Duration,
    /// Wait before the first retry.
    pub first_delay: Duration,
    /// Longest wait between attempts, also for a server's `Retry-After`.
    pub max_delay: Duration,
    /// Time for a connection to be made.
    pub connect_timeout: Duration,
    /// Time without a byte after which a request counts as dead.
    pub read_timeout: Duration,
}

impl Default for RetryPolicy {
    /// Ten retries within three minutes: signatures stay valid that long, and an outage longer than that is better handled by
    /// ending the attempt with an exit code that means "try again later".
    fn default() -> Self {
        Self {
            max_retries: 10,
            total: Duration::from_mins(3),
            first_delay: Duration::from_millis(200),
            max_delay: Duration::from_secs(20),
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_mins(1),
        }
    }
}

/// Counts the attempts of one request.
#[derive(Debug)]
pub(super) struct Attempts {
    policy: RetryPolicy,
    started: Instant,
    retries: u32,
}

impl Attempts {
    pub(super) fn new(policy: &RetryPolicy) -> Self {
        Self { policy: policy.clone(), started: Instant::now(), retries: 0 }
    }

    /// Attempts made so far, the first included.
    pub(super) fn made(&self) -> u32 {
        self.retries + 1
    }

    /// Time since the first attempt.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Time left in the budget.
    pub(super) fn remaining(&self) -> Duration {
        self.policy.total.saturating_sub(self.elapsed())
    }

    /// The wait before the next attempt, or `None` when the budget is spent. `asked` is what the server asked for.
    pub(super) fn next_delay(&mut self, asked: Option<Duration>) -> Option<Duration> {
        if self.retries >= self.policy.max_retries {
            return None;
        }
        let step = self.policy.first_delay.saturating_mul(1 << self.retries.min(20)).min(self.policy.max_delay);
        let delay = step.mul_f64(0.5 + 0.5 * random_fraction()).max(asked.unwrap_or_default().min(self.policy.max_delay));
        if delay >= self.remaining() {
            return None;
        }
        self.retries += 1;
        Some(delay)
    }
}

/// 64 bits that differ from call to call and from process to process (the standard library seeds its hashers from the
/// operating system). For jitter and unique names, not for keys.
pub(super) fn random_bits() -> u64 {
    RandomState::new().hash_one(std::time::SystemTime::now())
}

/// Uniform in [0, 1).
fn random_fraction() -> f64 {
    (random_bits() >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_are_jittered_and_end() {
        let policy = RetryPolicy { max_retries: 6, ..RetryPolicy::default() };
        let mut attempts = Attempts::new(&policy);
        for step in [200, 400, 800, 1600, 3200, 6400] {
            let delay = attempts.next_delay(None).unwrap().as_millis();
            assert!((step / 2..=step).contains(&delay), "{delay} of {step}");
        }
        assert_eq!(attempts.next_delay(None), None);
        assert_eq!(attempts.made(), 7);
    }

    #[test]
    fn a_servers_wish_is_followed_up_to_the_longest_wait() {
        let mut attempts = Attempts::new(&RetryPolicy::default());
        assert_eq!(attempts.next_delay(Some(Duration::from_secs(7))), Some(Duration::from_secs(7)));
        assert_eq!(attempts.next_delay(Some(Duration::from_secs(7000))), Some(Duration::from_secs(20)));
    }

    #[test]
    fn nothing_is_tried_beyond_the_total() {
        let policy = RetryPolicy { total: Duration::from_millis(50), ..RetryPolicy::default() };
        assert_eq!(Attempts::new(&policy).next_delay(None), None);
    }

    #[test]
    fn jitter_differs() {
        assert_ne!(random_bits(), random_bits());
    }
}
