//! Learning-rate schedules, as `diffusers.optimization.get_scheduler` makes them.

/// The shape of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The same rate throughout; warm-up is ignored, as in diffusers.
    Constant,
    /// Linear rise over the warm-up, then constant.
    ConstantWithWarmup,
    /// Linear rise, then a linear fall to 0.
    Linear,
    /// Linear rise, then `cycles` cosine waves from the full rate; 0.5 (diffusers' `get_scheduler`) ends at 0.
    Cosine,
    /// Linear rise, then `cycles` half cosine waves, each from the full rate to 0.
    CosineWithRestarts,
    /// Linear rise, then a fall to 1e-7 with the given power.
    Polynomial,
}

/// The rate at which diffusers' polynomial schedule ends.
const POLYNOMIAL_END: f64 = 1e-7;

/// A learning rate for each update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The shape.
    pub shape: Shape,
    /// The full rate.
    pub learning_rate: f64,
    /// Updates of the linear rise from 0.
    pub warmup_steps: u64,
    /// Updates of the whole run.
    pub total_steps: u64,
    /// Waves of the two cosine shapes.
    pub cycles: f64,
    /// Power of the polynomial.
    pub power: f64,
}

impl Schedule {
    /// The rate of update `index`, counted from 0.
    pub fn lr(&self, index: u64) -> f64 {
        self.learning_rate * self.factor(index)
    }

    fn factor(&self, index: u64) -> f64 {
        let (n, warmup, total) = (index as f64, self.warmup_steps as f64, self.total_steps as f64);
        if self.shape != Shape::Constant && index < self.warmup_steps {
            return n / warmup.max(1.0);
        }
        let progress = (n - warmup) / (total - warmup).max(1.0);
        match self.shape {
            Shape::Constant | Shape::ConstantWithWarmup => 1.0,
            Shape::Linear => ((total - n) / (total - warmup).max(1.0)).max(0.0),
            Shape::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * self.cycles * 2.0 * progress).cos())).max(0.0),
            Shape::CosineWithRestarts if progress >= 1.0 => 0.0,
            Shape::CosineWithRestarts => (0.5 * (1.0 + (std::f64::consts::PI * ((self.cycles * progress) % 1.0)).cos())).max(0.0),
            Shape::Polynomial if index > self.total_steps => POLYNOMIAL_END / self.learning_rate,
            Shape::Polynomial => {
                // At the end itself total = warm-up gives 0/0 in diffusers; the end rate is meant.
                let remaining = if total > warmup { 1.0 - (n - warmup) / (total - warmup) } else { 0.0 };
                ((self.learning_rate - POLYNOMIAL_END) * remaining.powf(self.power) + POLYNOMIAL_END) / self.learning_rate
            }
        }
    }
}
