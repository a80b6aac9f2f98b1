//! Optimizers, learning-rate schedules and gradient clipping on f32 master parameters.
