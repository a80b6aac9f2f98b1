//! Dynamic loss scaling for f16: the loss is multiplied before the backward pass, so that small gradients do not become zero, and the
//! gradients are divided after it. The factor is a power of two: the division changes no bit of a gradient that neither overflows nor
//! vanishes. As PyTorch's `GradScaler`, but an update whose gradients overflow is computed again with a smaller factor, not left out.

use serde::{Deserialize, Serialize};

/// Exponent at the beginning: 2^16.
const FIRST: u32 = 16;
/// Largest exponent.
const LAST: u32 = 24;
/// The factor is doubled after this many updates without an overflow.
const INTERVAL: u32 = 2000;

/// The factor on the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LossScale {
    /// Power of two.
    exponent: u32,
    /// Updates since the factor changed.
    updates: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { exponent: FIRST, updates: 0 }
    }
}

impl LossScale {
    /// The factor.
    pub fn factor(self) -> f64 {
        f64::from(self.exponent).exp2()
    }

    /// Halves the factor after an overflow; false if it is 1 already, so that the overflow is not its fault.
    pub fn overflowed(&mut self) -> bool {
        self.updates = 0;
        let lower = self.exponent > 0;
        self.exponent = self.exponent.saturating_sub(1);
        lower
    }

    /// Counts an update without an overflow.
    pub fn succeeded(&mut self) {
        self.updates += 1;
        if self.updates >= INTERVAL {
            *self = Self { exponent: (self.exponent + 1).min(LAST), updates: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_falls_at_once_and_rises_slowly() {
        let mut scale = LossScale::default();
        assert_eq!(scale.factor(), 65536.0);
        assert!(scale.overflowed());
        assert_eq!(scale.factor(), 32768.0);
        (0..INTERVAL - 1).for_each(|_| scale.succeeded());
        assert_eq!(scale.factor(), 32768.0);
        scale.succeeded();
        assert_eq!(scale.factor(), 65536.0);
        (0..INTERVAL * 20).for_each(|_| scale.succeeded());
        assert_eq!(scale.factor(), f64::from(1 << LAST));
        assert_eq!((0..=LAST).filter(|_| scale.overflowed()).count(), LAST as usize);
        assert_eq!(scale.factor(), 1.0);
    }
}
