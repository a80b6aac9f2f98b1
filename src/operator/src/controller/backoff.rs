//! Per-object exponential backoff with jitter, for errors that may pass by themselves.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Delay after the first failure.
const FIRST: Duration = Duration::from_millis(500);
/// Longest delay.
const LONGEST: Duration = Duration::from_mins(5);

/// Counts failures in a row by object UID.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: Mutex<HashMap<String, u32>>,
}

impl Backoff {
    /// Notes one more failure of the object and returns how long to wait: doubled each time up to five minutes, of that 50 to 100 %.
    pub fn failed(&self, uid: &str) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(uid.to_owned()).or_insert(0);
        *count = count.saturating_add(1);
        delay(*count, rand::random::<f64>())
    }

    /// Forgets the object's failures: it was reconciled, or is gone.
    pub fn succeeded(&self, uid: &str) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

/// Delay after `failures` in a row; `random` is in 0..1.
fn delay(failures: u32, random: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(20);
    FIRST.saturating_mul(1 << doublings).min(LONGEST).mul_f64(0.5 + random / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_a_limit_and_are_spread() {
        let upper: Vec<u128> = (1..=5).map(|failures| delay(failures, 1.0).as_millis()).collect();
        assert_eq!(upper, [500, 1000, 2000, 4000, 8000]);
        assert_eq!(delay(1, 0.0).as_millis(), 250);
        assert_eq!(delay(u32::MAX, 1.0), LONGEST);
        assert_eq!(delay(u32::MAX, 0.0), LONGEST / 2);
    }

    #[test]
    fn one_object_failing_does_not_slow_another() {
        let backoff = Backoff::default();
        for _ in 0..8 {
            backoff.failed("a");
        }
        assert!(backoff.failed("a") >= Duration::from_mins(1));
        assert!(backoff.failed("b") <= FIRST);
        backoff.succeeded("a");
        assert!(backoff.failed("a") <= FIRST, "success starts over");
    }
}
