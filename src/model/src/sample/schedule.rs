//! Noise levels of sampling, as diffusers' `FlowMatchEulerDiscreteScheduler`.

use crate::layout::SchedulerConfig;

/// `steps + 1` noise levels from 1 to 0.
///
/// diffusers applies the shift twice: the table of training levels is shifted, the sampling levels are spread evenly
/// between its ends, and shifted again. f64, rounded to f32 once, as the reference.
pub fn sigmas(scheduler: &SchedulerConfig, steps: usize) -> Vec<f32> {
    let shift = |sigma: f64| scheduler.shift * sigma / (1.0 + (scheduler.shift - 1.0) * sigma);
    let train_steps = f64::from(scheduler.num_train_timesteps);
    // The table's ends are f32 there.
    let (first, last) = (f64::from(shift(1.0) as f32), f64::from(shift(1.0 / train_steps) as f32));
    let (start, stop) = (first * train_steps, last * train_steps);
    let spacing = (stop - start) / (steps.max(2) - 1) as f64;
    let level = |i: usize| {
        let timestep = if i > 0 && i + 1 == steps { stop } else { start + i as f64 * spacing };
        shift(timestep / train_steps) as f32
    };
    (0..steps).map(level).chain([0.0]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Spots of diffusers' table for 28 steps and shift 3.
    #[test]
    fn equals_the_reference() {
        let got = sigmas(&SchedulerConfig::default(), 28);
        assert_eq!(got.len(), 29);
        for (i, want) in
            [(0, 1.0), (1, 0.987_381), (2, 0.974_108), (3, 0.960_129), (24, 0.278_049), (25, 0.199_827), (26, 0.110_906), (27, 0.008_929), (28, 0.0)]
        {
            assert!((got[i] - want).abs() < 1e-6, "{i}: {}", got[i]);
        }
        assert_eq!(sigmas(&SchedulerConfig::default(), 1), [1.0, 0.0]);
    }
}
